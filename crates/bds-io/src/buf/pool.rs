//! `BufPool`: reuses buffers, by size class and under a budget of idle bytes.
//!
//! Fresh memory costs page faults and zeroing, often more than the request itself. The pool keeps
//! idle memory by size class (powers of two from a page to 4 MiB); larger buffers are not kept. It
//! bounds idle memory, not memory in use.

use std::alloc::Layout;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::queue::ArrayQueue;

use super::region::{Buf, Idle, Region};
use super::{IoVec, PAGE_LEN};

/// Number of size classes: 4 KiB << 0 … 4 KiB << 10 = 4 MiB.
const CLASSES: usize = 11;
/// Buffers that one class keeps at most; small ones are taken by the hundred at high queue depths.
const CLASS_SLOTS: usize = 256;

/// Reuses buffers under a budget in bytes. Cheap to clone: clones share the pool. Thread-safe.
#[derive(Clone, Debug)]
pub struct BufPool {
    classes: Arc<SizeClasses>,
}

impl BufPool {
    /// A pool that keeps at most `budget_bytes` of idle memory.
    pub fn new(budget_bytes: usize) -> BufPool {
        let classes = SizeClasses {
            budget_bytes,
            idle_bytes: AtomicUsize::new(0),
            by_class: std::array::from_fn(|_| ArrayQueue::new(CLASS_SLOTS)),
        };
        BufPool { classes: Arc::new(classes) }
    }

    /// A buffer of `len` bytes (content undefined but initialised), aligned to 4096; its memory
    /// returns to the pool when its last owner is dropped. The content is that of earlier users of
    /// the pool: share a pool only among code that may see each other's bytes.
    pub fn take(&self, len: usize) -> Buf {
        let Some(class) = class_of(len) else {
            return Buf::zeroed(len, PAGE_LEN);
        };
        let pool = Arc::downgrade(&self.classes);
        let region = match self.classes.take(class) {
            Some(idle) => Region::reused(idle, pool),
            None => fresh(class, pool),
        };
        Buf::of(region, len)
    }

    /// As `take`, as a scatter list.
    pub fn take_iov(&self, len: usize) -> IoVec {
        self.take(len).iov()
    }

    /// Bytes of idle memory now.
    pub fn idle_bytes(&self) -> usize {
        self.classes.idle_bytes.load(Ordering::Relaxed)
    }
}

fn fresh(class: usize, pool: Weak<SizeClasses>) -> Region {
    let layout = Layout::from_size_align(PAGE_LEN << class, PAGE_LEN)
        .expect("classes are small powers of two");
    Region::zeroed(layout, pool)
}

/// The smallest class that holds `len` bytes.
fn class_of(len: usize) -> Option<usize> {
    let pages = len.div_ceil(PAGE_LEN).max(1);
    let class = pages.checked_next_power_of_two()?.trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

/// Idle memory by size class.
#[derive(Debug)]
pub(super) struct SizeClasses {
    budget_bytes: usize,
    idle_bytes: AtomicUsize,
    by_class: [ArrayQueue<Idle>; CLASSES],
}

impl SizeClasses {
    fn take(&self, class: usize) -> Option<Idle> {
        let idle = self.by_class[class].pop()?;
        self.idle_bytes.fetch_sub(idle.len(), Ordering::Relaxed);
        Some(idle)
    }

    /// Keeps the memory if the budget and the class allow, else frees it.
    pub(super) fn put(&self, idle: Idle) {
        let len = idle.len();
        let Some(class) = class_of(len) else { return };
        // Counted before it is pushed, so that the budget also holds while many threads put at
        // once.
        let before = self.idle_bytes.fetch_add(len, Ordering::Relaxed);
        let fits = before.checked_add(len).is_some_and(|sum| sum <= self.budget_bytes);
        if !fits || self.by_class[class].push(idle).is_err() {
            self.idle_bytes.fetch_sub(len, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BufPool, class_of};

    #[test]
    fn classes_are_powers_of_two_of_a_page() {
        let cases = [
            (0, Some(0)),
            (1, Some(0)),
            (4096, Some(0)),
            (4097, Some(1)),
            (65536, Some(4)),
            (4 << 20, Some(10)),
            ((4 << 20) + 1, None),
            (usize::MAX, None),
        ];
        for (len, class) in cases {
            assert_eq!(class_of(len), class, "{len}");
        }
    }

    #[test]
    fn memory_returns_when_its_last_owner_is_dropped() {
        let pool = BufPool::new(1 << 20);
        let buf = pool.take(5000);
        assert_eq!(buf.len(), 5000);
        let iov = buf.slice(10..20);
        drop(buf);
        assert_eq!(pool.idle_bytes(), 0);
        drop(iov);
        assert_eq!(pool.idle_bytes(), 8192);
        let again = pool.take(8192);
        assert_eq!((pool.idle_bytes(), again.len()), (0, 8192));
    }

    #[test]
    fn budget_bounds_idle_memory() {
        let pool = BufPool::new(10_000);
        let bufs: Vec<_> = (0..5).map(|_| pool.take(4096)).collect();
        drop(bufs);
        assert_eq!(pool.idle_bytes(), 8192);
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let pool = BufPool::new(1 << 20);
        let mut buf = pool.take(4096);
        drop(pool);
        buf.get_mut().unwrap()[0] = 1;
    }
}
