//! `RcuCell<V>`: a read-mostly value, read without a lock and replaced at run time.
//!
//! An edge of a graph keeps its reference to the child in one: every request that passes reads it,
//! a graph change replaces it. Reading is one increment and one decrement of a counter that few
//! threads share; it takes no lock, never waits, and costs the same however many readers hold a
//! guard for how long (a request holds one until its I/O is done).
//!
//! ```text
//! reader:   increment ── load pointer ── use ── decrement ── anything retired? sweep
//! replacer: swap pointer, old value to the retired list ── sweep
//! sweep:    drops a retired value once every counter was seen at 0 after its swap
//! ```
//!
//! **Why no reader sees a dropped value.** After the swap the sweeper changes the counter too (it
//! adds 0), so both are in the counter's modification order. Either the reader's increment comes
//! after the sweeper's addition: then it acquires from it, the swap happens before the reader's
//! load, and the reader gets the new value. Or it comes before: then an addition that returns 0
//! also sees the reader's decrement, because each decrement follows its own increment, so a sum of
//! 0 means that all increments so far are matched. That decrement is a release and whatever changes
//! the counter between it and the addition is a read-modify-write, so what the reader did happens
//! before the drop.
//!
//! **Why every retired value is dropped.** The replacer raises `waiting`, then adds 0 to the
//! counter; a reader decrements, then loads `waiting`. If the replacer's addition still counted the
//! reader, the reader's decrement comes later, acquires from it and so sees `waiting` raised: it
//! sweeps.
//!
//! **Why no wake-up is lost.** A [`WaitUnread`] looks at the retired list and leaves its waker
//! under the list's lock; a sweep removes what it dropped and takes the wakers under the same lock.
//! Whichever comes second sees the other.
//!
//! A guard that is forgotten (`mem::forget`) keeps its counter up: values replaced afterwards stay
//! until the cell is dropped, and [`WaitUnread`] waits for ever. That leaks memory; it is not
//! unsound.

use std::{
    fmt,
    future::Future,
    ops::Deref,
    pin::Pin,
    ptr::{self, NonNull},
    task::{Context, Poll, Waker},
};

use crate::{
    shard::{own_shard, shard_count},
    sync::{AtomicPtr, AtomicUsize, Mutex, Ordering},
};

/// A reader count on cache lines of its own.
#[repr(align(128))]
struct Shard(AtomicUsize);

/// A value that was replaced.
struct Retired<V> {
    /// Position in the order of replacements.
    number: u64,
    /// `None` while a sweep drops it.
    value: Option<NonNull<V>>,
    /// Bit set of the shards that were not seen at 0 since the swap.
    unseen: u32,
}

/// The retired values, oldest first, and the tasks that wait for their drop.
struct RetiredList<V> {
    values: Vec<Retired<V>>,
    next_number: u64,
    wakers: Vec<(u64, Waker)>,
    next_waker: u64,
}

impl<V> RetiredList<V> {
    /// True if a value replaced before number `end` is not dropped yet.
    fn has_before(&self, end: u64) -> bool {
        self.values.first().is_some_and(|oldest| oldest.number < end)
    }
}

/// A value read by many threads and replaced seldom. The module's text states cost and argument.
///
/// ```
/// use bds_refcount::RcuCell;
///
/// let target = RcuCell::new("base.qcow2");
/// let guard = target.read();               // no lock; keeps this version alive
/// target.replace("overlay.qcow2");
/// assert_eq!((*guard, *target.read()), ("base.qcow2", "overlay.qcow2"));
/// drop(guard);                             // the last reader drops the old value
/// assert_eq!(target.waiting(), 0);
/// ```
pub struct RcuCell<V> {
    now: AtomicPtr<V>,
    shards: Box<[Shard]>,
    retired: Mutex<RetiredList<V>>,
    /// Number of retired values that no sweep has taken yet. Raised before a value goes on the
    /// list.
    waiting: AtomicUsize,
}

// SAFETY: readers on several threads get `&V` (V: Sync), and any thread that sweeps drops a V (V:
// Send). The pointers are owned boxes; wakers are Send and Sync.
unsafe impl<V: Send + Sync> Send for RcuCell<V> {}
// SAFETY: as above.
unsafe impl<V: Send + Sync> Sync for RcuCell<V> {}

impl<V> RcuCell<V> {
    /// A cell with its first value.
    pub fn new(value: V) -> Self {
        let list =
            RetiredList { values: Vec::new(), next_number: 0, wakers: Vec::new(), next_waker: 0 };
        Self {
            now: AtomicPtr::new(Box::into_raw(Box::new(value))),
            shards: (0..shard_count()).map(|_| Shard(AtomicUsize::new(0))).collect(),
            retired: Mutex::new(list),
            waiting: AtomicUsize::new(0),
        }
    }

    /// The current value. The guard keeps it alive, also after it was replaced.
    #[inline]
    pub fn read(&self) -> RcuGuard<'_, V> {
        // The length is a power of two, so this is in bounds.
        let shard = &self.shards[own_shard(self.shards.len())];
        // Acquire: pairs with the addition in `sweep`.
        shard.0.fetch_add(1, Ordering::Acquire);
        // Acquire: pairs with the swap, for what the value holds.
        let now = self.now.load(Ordering::Acquire);
        // SAFETY: `now` came from Box::into_raw and is freed only by `sweep` or `drop`. `drop` has
        // `&mut self`, which our borrow excludes. `sweep` frees it only after a swap, and then, by
        // the argument at the top of this file, only once our shard has been seen at 0 after our
        // increment, which needs the decrement in `RcuGuard::drop`.
        RcuGuard { value: unsafe { &*now }, shard, cell: self }
    }

    /// Replaces the value. The old one is dropped here if it has no readers, else by the last of
    /// its readers. [`wait_unread`](Self::wait_unread) waits for that.
    pub fn replace(&self, value: V) {
        let all = u32::MAX >> (32 - self.shards.len());
        let new = Box::into_raw(Box::new(value));
        let mut list = self.retired.lock();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // AcqRel: readers see what the new value holds; we own all that the old one holds.
        let old = self.now.swap(new, Ordering::AcqRel);
        // SAFETY: `now` is null only within `into_inner` and `drop`, which own the cell.
        let value = unsafe { NonNull::new_unchecked(old) };
        let number = list.next_number;
        list.next_number += 1;
        list.values.push(Retired { number, value: Some(value), unseen: all });
        drop(list);
        self.sweep();
    }

    /// Completes once every value replaced so far has lost its readers and was dropped: a grace
    /// period.
    ///
    /// Values replaced later are not waited for. Readers of the current value delay it only while
    /// they overlap on one shard without a gap. Do not await it while holding a guard: it would
    /// wait for itself.
    pub fn wait_unread(&self) -> WaitUnread<'_, V> {
        let end = self.retired.lock().next_number;
        WaitUnread { cell: self, end, waker: None }
    }

    /// Takes the value out. Retired ones are dropped.
    pub fn into_inner(self) -> V {
        let now = self.now.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: from Box::into_raw; owned, as there are no readers, and `drop` finds null in its
        // place.
        *unsafe { Box::from_raw(now) }
    }

    /// Number of replaced values that still have readers. For diagnostics: outdated on return.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Drops the retired values that have no readers left, and wakes those that wait for it.
    #[cold]
    fn sweep(&self) {
        let mut unread = Vec::new();
        let mut list = self.retired.lock();
        for old in &mut list.values {
            for (index, shard) in self.shards.iter().enumerate() {
                // A change, not a load: see the argument at the top.
                if old.unseen & 1 << index != 0 && shard.0.fetch_add(0, Ordering::AcqRel) == 0 {
                    old.unseen &= !(1 << index);
                }
            }
            if old.unseen == 0 {
                unread.extend(old.value.take().map(|value| (old.number, value)));
            }
        }
        self.waiting.fetch_sub(unread.len(), Ordering::Relaxed);
        drop(list);
        if unread.is_empty() {
            return;
        }
        let (numbers, values): (Vec<u64>, Vec<_>) = unread.into_iter().unzip();
        let _remove = RemoveFromList { cell: self, numbers };
        for value in values {
            // SAFETY: from Box::into_raw; taken out of the list under its lock, so by us alone; no
            // reader has it any more, as every shard was seen at 0 after the swap. Dropped outside
            // the lock, because it is foreign code.
            drop(unsafe { Box::from_raw(value.as_ptr()) });
        }
    }
}

/// Removes the entries of dropped values from the list and wakes the waiting tasks, also if a drop
/// panicked.
struct RemoveFromList<'a, V> {
    cell: &'a RcuCell<V>,
    numbers: Vec<u64>,
}

impl<V> Drop for RemoveFromList<'_, V> {
    fn drop(&mut self) {
        let mut list = self.cell.retired.lock();
        list.values.retain(|old| !self.numbers.contains(&old.number));
        let wakers = std::mem::take(&mut list.wakers);
        drop(list);
        // Outside the lock: wakers are foreign code.
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

impl<V> Drop for RcuCell<V> {
    fn drop(&mut self) {
        let now = self.now.swap(ptr::null_mut(), Ordering::AcqRel);
        if !now.is_null() {
            // SAFETY: from Box::into_raw, and `&mut self`: no reader exists, and nothing can swap.
            drop(unsafe { Box::from_raw(now) });
        }
        let retired = std::mem::take(&mut self.retired.lock().values);
        for value in retired.into_iter().filter_map(|old| old.value) {
            // SAFETY: as above; the list owns what is on it.
            drop(unsafe { Box::from_raw(value.as_ptr()) });
        }
    }
}

impl<V: fmt::Debug> fmt::Debug for RcuCell<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RcuCell").field("now", &*self.read()).finish_non_exhaustive()
    }
}

/// Keeps a version of an [`RcuCell`]'s value alive while it is read. May be sent to another thread
/// and held across an await.
pub struct RcuGuard<'a, V> {
    value: &'a V,
    shard: &'a Shard,
    cell: &'a RcuCell<V>,
}

impl<V> Deref for RcuGuard<'_, V> {
    type Target = V;

    #[inline]
    fn deref(&self) -> &V {
        self.value
    }
}

impl<V> Drop for RcuGuard<'_, V> {
    #[inline]
    fn drop(&mut self) {
        // Release: our use of the value ends here. Acquire: for the load of `waiting`.
        self.shard.0.fetch_sub(1, Ordering::AcqRel);
        if self.cell.waiting.load(Ordering::Relaxed) != 0 {
            self.cell.sweep();
        }
    }
}

impl<V: fmt::Debug> fmt::Debug for RcuGuard<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

/// Future of [`RcuCell::wait_unread`]. Dropping it cancels the wait.
#[must_use = "futures do nothing unless polled"]
pub struct WaitUnread<'a, V> {
    cell: &'a RcuCell<V>,
    /// Values with a smaller number are waited for.
    end: u64,
    /// Key of our waker in the list, once it is there.
    waker: Option<u64>,
}

impl<V> Future for WaitUnread<'_, V> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        // Wakers are foreign code also when cloned and dropped: both happen outside the lock.
        let waker = cx.waker().clone();
        let mut list = this.cell.retired.lock();
        if !list.has_before(this.end) {
            return Poll::Ready(());
        }
        let known = this.waker.and_then(|key| list.wakers.iter_mut().find(|(k, _)| *k == key));
        let replaced = match known {
            Some((_, old)) => Some(std::mem::replace(old, waker)),
            None => {
                let key = list.next_waker;
                list.next_waker += 1;
                list.wakers.push((key, waker));
                this.waker = Some(key);
                None
            }
        };
        drop(list);
        drop(replaced);
        Poll::Pending
    }
}

impl<V> Drop for WaitUnread<'_, V> {
    fn drop(&mut self) {
        let Some(key) = self.waker else { return };
        let mut list = self.cell.retired.lock();
        let place = list.wakers.iter().position(|(k, _)| *k == key);
        let waker = place.map(|place| list.wakers.swap_remove(place));
        drop(list);
        drop(waker); // foreign code, outside the lock
    }
}

impl<V> fmt::Debug for WaitUnread<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitUnread").field("end", &self.end).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize},
    };

    use super::*;

    /// Counts live values; detects a second drop.
    struct Live {
        living: Arc<AtomicUsize>,
        is_alive: AtomicBool,
    }

    impl Live {
        fn new(living: &Arc<AtomicUsize>) -> Self {
            living.fetch_add(1, Ordering::SeqCst);
            Self { living: Arc::clone(living), is_alive: AtomicBool::new(true) }
        }
    }

    impl Drop for Live {
        fn drop(&mut self) {
            assert!(self.is_alive.swap(false, Ordering::SeqCst), "dropped twice");
            self.living.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn living(count: &Arc<AtomicUsize>) -> usize {
        count.load(Ordering::SeqCst)
    }

    #[test]
    fn a_replaced_value_is_dropped_with_its_last_reader() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let first = cell.read();
        cell.replace(Live::new(&count));
        let second = cell.read();
        cell.replace(Live::new(&count));
        assert_eq!((living(&count), cell.waiting()), (3, 2));
        assert!(first.is_alive.load(Ordering::SeqCst) && second.is_alive.load(Ordering::SeqCst));
        drop(first); // the same counter holds both
        drop(second);
        assert_eq!((living(&count), cell.waiting()), (1, 0));
        drop(cell);
        assert_eq!(living(&count), 0);
    }

    #[test]
    fn into_inner_gives_the_value_once() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        std::mem::forget(cell.read());
        cell.replace(Live::new(&count));
        let value = cell.into_inner();
        assert_eq!(living(&count), 1, "the replaced one was dropped with the cell");
        drop(value);
        assert_eq!(living(&count), 0);
    }

    #[test]
    fn an_unread_value_is_dropped_by_replace() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        cell.replace(Live::new(&count));
        assert_eq!((living(&count), cell.waiting()), (1, 0));
    }

    #[test]
    fn a_forgotten_guard_delays_the_drop_until_the_cell_is_dropped() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        std::mem::forget(cell.read());
        cell.replace(Live::new(&count));
        assert_eq!(living(&count), 2);
        drop(cell);
        assert_eq!(living(&count), 0);
    }

    #[test]
    fn a_guard_may_be_dropped_on_another_thread() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let guard = cell.read();
        cell.replace(Live::new(&count));
        std::thread::scope(|scope| {
            scope.spawn(|| drop(guard));
        });
        assert_eq!((living(&count), cell.waiting()), (1, 0));
    }

    #[test]
    fn readers_on_many_threads_never_see_a_dropped_value() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut last = cell.read();
                    while !stop.load(Ordering::Relaxed) {
                        let next = cell.read(); // readers overlap, so counters are seldom 0
                        assert!(next.is_alive.load(Ordering::SeqCst));
                        assert!(last.is_alive.load(Ordering::SeqCst));
                        last = next;
                    }
                });
            }
            for _ in 0..2000 {
                cell.replace(Live::new(&count));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!((living(&count), cell.waiting()), (1, 0), "the last reader swept");
    }

    fn poll(wait: &mut WaitUnread<'_, Live>) -> Poll<()> {
        Pin::new(wait).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn wait_unread_completes_when_the_replaced_value_is_dropped() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let guard = cell.read();
        assert_eq!(poll(&mut cell.wait_unread()), Poll::Ready(()), "nothing was replaced");
        cell.replace(Live::new(&count));
        let mut wait = cell.wait_unread();
        assert_eq!(poll(&mut wait), Poll::Pending);
        assert_eq!(poll(&mut wait), Poll::Pending);
        assert_eq!(cell.retired.lock().wakers.len(), 1, "registered once");
        let current = cell.read();
        drop(guard);
        assert_eq!(
            poll(&mut wait),
            Poll::Pending,
            "the counter is shared with a reader of the new value"
        );
        drop(current);
        assert_eq!(poll(&mut wait), Poll::Ready(()));
        assert_eq!(living(&count), 1);
    }

    #[test]
    fn wait_unread_ignores_later_replacements() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let mut wait = cell.wait_unread();
        let guard = cell.read();
        cell.replace(Live::new(&count));
        assert_eq!(poll(&mut wait), Poll::Ready(()));
        drop(guard);
    }

    #[test]
    fn a_dropped_wait_leaves_no_waker() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let guard = cell.read();
        cell.replace(Live::new(&count));
        let mut wait = cell.wait_unread();
        assert_eq!(poll(&mut wait), Poll::Pending);
        drop(wait);
        assert!(cell.retired.lock().wakers.is_empty());
        drop(guard);
    }

    #[test]
    fn wait_unread_is_woken_from_another_thread() {
        let count = Arc::default();
        for _ in 0..200 {
            let cell = RcuCell::new(Live::new(&count));
            std::thread::scope(|scope| {
                let guard = cell.read();
                scope.spawn(move || drop(guard));
                cell.replace(Live::new(&count));
                let mut wait = cell.wait_unread();
                let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
                while Pin::new(&mut wait).poll(&mut Context::from_waker(&waker)).is_pending() {
                    std::thread::park();
                }
                assert_eq!(living(&count), 1);
            });
        }
    }

    struct Unpark(std::thread::Thread);

    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    #[test]
    fn a_value_whose_drop_panics_still_wakes() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                if !std::thread::panicking() {
                    panic!("in drop");
                }
            }
        }
        let cell = RcuCell::new(Some(Bomb));
        let replaced =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cell.replace(None)));
        assert!(replaced.is_err());
        let mut wait = cell.wait_unread();
        let poll = Pin::new(&mut wait).poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(poll, Poll::Ready(()));
    }
}
