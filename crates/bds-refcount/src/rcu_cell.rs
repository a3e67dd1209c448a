//! `RcuCell<V>`: one value that many threads read all the time and somebody exchanges once in a while.
//!
//! An edge of a graph hangs its reference on a cell: every request that passes reads it, a graph change turns it. RcuGuard is
//! one increment and one decrement of a counter that few threads share; it takes no lock, never waits, and costs the same
//! however many readers stay how long (a request stays until its I/O is done).
//!
//! ```text
//! reader:   count up ── load pointer ── use ── count down ── anything to sweep?
//! replacer: swap pointer, old one to limbo ── sweep
//! sweep:    an old value goes once every counter has been seen at 0 after the swap
//! ```
//!
//! **Why no reader sees a value that is gone.** After the swap the sweeper changes the counter too (it adds 0), so the
//! two meet in the counter's modification order. Either the reader's increment comes after the sweeper's look: then it acquires from it,
//! the swap happens before the reader's load, and the reader gets the new value. Or it comes before: then a look that sees 0 sees
//! its decrement too, because each decrement follows its own increment, so a sum of 0 means that all increments so far are matched.
//! That decrement is a release and whatever changes the counter between it and the look is a read-modify-write, so what the reader did
//! happens before the drop.
//!
//! **Why no old value is forgotten.** The replacer raises `waiting`, then changes the counter; a reader counts down, then looks at
//! `waiting`. If the replacer's look still counted the reader, the reader's decrement comes later, acquires from it and so sees
//! `waiting` raised.
//!
//! A `RcuGuard` that is forgotten (`mem::forget`) keeps its counter up: old values then stay until the cell is dropped. That leaks
//! time, not safety.

use std::{
    fmt,
    ops::Deref,
    ptr::{self, NonNull},
};

use crate::sync::{AtomicPtr, AtomicUsize, Mutex, Ordering};

/// Threads beyond this many share counters.
#[cfg(not(loom))]
const MAX_SHARDS: usize = 16;

/// A counter on cache lines of its own.
#[repr(align(128))]
struct Shard(AtomicUsize);

/// A value in limbo, and the shards that have not been seen empty since it was swapped out.
struct Old<V> {
    value: NonNull<V>,
    unseen: u32,
}

/// One value, read by many, exchanged seldom. See the module's text for cost and promise.
pub struct RcuCell<V> {
    now: AtomicPtr<V>,
    shards: Box<[Shard]>,
    limbo: Mutex<Vec<Old<V>>>,
    /// How many are in limbo. Raised before a value goes there.
    waiting: AtomicUsize,
}

// SAFETY: readers on several threads get `&V` (V: Sync), and whoever sweeps drops a V (V: Send). The pointers are owned boxes.
unsafe impl<V: Send + Sync> Send for RcuCell<V> {}
// SAFETY: as above.
unsafe impl<V: Send + Sync> Sync for RcuCell<V> {}

impl<V> RcuCell<V> {
    /// A cell with its first value.
    pub fn new(value: V) -> Self {
        let count = shard_count();
        Self {
            now: AtomicPtr::new(Box::into_raw(Box::new(value))),
            shards: (0..count).map(|_| Shard(AtomicUsize::new(0))).collect(),
            limbo: Mutex::new(Vec::new()),
            waiting: AtomicUsize::new(0),
        }
    }

    /// The value as of now; it stays as long as the `RcuGuard` does, whatever becomes of the cell's pointer meanwhile.
    #[inline]
    pub fn read(&self) -> RcuGuard<'_, V> {
        // The length is a power of two, so this is in bounds.
        let shard = &self.shards[thread_number() & (self.shards.len() - 1)];
        // Acquire: pairs with the look in `sweep`.
        shard.0.fetch_add(1, Ordering::Acquire);
        // Acquire: pairs with the swap, for what the value holds.
        let now = self.now.load(Ordering::Acquire);
        // SAFETY: `now` came from Box::into_raw and is freed only by `sweep` or `drop`. `drop` has `&mut self`, which our
        // borrow excludes. `sweep` frees it only after a swap, and then, by the argument at the top of this file, only once
        // our shard has been seen at 0 after our increment, which needs the decrement in `RcuGuard::drop`.
        RcuGuard { value: unsafe { &*now }, shard, cell: self }
    }

    /// Exchanges the value. The old one is dropped at once if nobody reads it, else by the last of its readers as it leaves.
    pub fn replace(&self, value: V) {
        let all = u32::MAX >> (32 - self.shards.len());
        let new = Box::into_raw(Box::new(value));
        let mut limbo = self.limbo.lock();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // AcqRel: readers see what the new value holds; we own all that the old one holds.
        let old = self.now.swap(new, Ordering::AcqRel);
        // SAFETY: `now` is null only within `into_inner` and `drop`, which own the cell.
        let value = unsafe { NonNull::new_unchecked(old) };
        limbo.push(Old { value, unseen: all });
        drop(limbo);
        self.sweep();
    }

    /// The value. Old ones are dropped.
    pub fn into_inner(self) -> V {
        let now = self.now.swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: from Box::into_raw; owned, as there are no readers, and `drop` finds null in its place.
        *unsafe { Box::from_raw(now) }
    }

    /// How many old values are still being read. For diagnostics: outdated on return.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    #[cold]
    fn sweep(&self) {
        let mut gone = Vec::new();
        let mut limbo = self.limbo.lock();
        limbo.retain_mut(|old| {
            for (index, shard) in self.shards.iter().enumerate() {
                // A change, not a load: see the argument at the top.
                if old.unseen & 1 << index != 0 && shard.0.fetch_add(0, Ordering::AcqRel) == 0 {
                    old.unseen &= !(1 << index);
                }
            }
            if old.unseen == 0 {
                gone.push(old.value);
            }
            old.unseen != 0
        });
        self.waiting.fetch_sub(gone.len(), Ordering::Relaxed);
        drop(limbo);
        for value in gone {
            // SAFETY: from Box::into_raw; taken out of limbo under its lock, so by us alone; no reader has it any more, as
            // every shard was seen at 0 after the swap. Dropped outside the lock, because it is foreign code.
            drop(unsafe { Box::from_raw(value.as_ptr()) });
        }
    }
}

impl<V> Drop for RcuCell<V> {
    fn drop(&mut self) {
        let now = self.now.swap(ptr::null_mut(), Ordering::AcqRel);
        if !now.is_null() {
            // SAFETY: from Box::into_raw, and `&mut self`: no reader exists, and nobody can swap.
            drop(unsafe { Box::from_raw(now) });
        }
        let olds = std::mem::take(&mut *self.limbo.lock());
        for old in olds {
            // SAFETY: as above; what is in limbo is owned by the limbo.
            drop(unsafe { Box::from_raw(old.value.as_ptr()) });
        }
    }
}

impl<V: fmt::Debug> fmt::Debug for RcuCell<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RcuCell").field("now", &*self.read()).finish_non_exhaustive()
    }
}

/// A value being read. May be sent to another thread and kept across an await.
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
        // Release: our use of the value ends here. Acquire: for the look at `waiting`.
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

fn shard_count() -> usize {
    #[cfg(loom)]
    return 2;
    #[cfg(not(loom))]
    {
        use std::sync::OnceLock;
        static COUNT: OnceLock<usize> = OnceLock::new();
        *COUNT.get_or_init(|| {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            threads.next_power_of_two().min(MAX_SHARDS)
        })
    }
}

/// Under loom all share one counter: fewer states, and the hardest case.
#[cfg(loom)]
fn thread_number() -> usize {
    0
}

/// A small number of this thread's own, given out in order.
#[cfg(not(loom))]
#[inline]
fn thread_number() -> usize {
    use std::cell::Cell;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let number = NUMBER.try_with(|number| {
        if number.get() == usize::MAX {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed) % MAX_SHARDS);
        }
        number.get()
    });
    // While a thread ends it may have no number any more; any will do.
    number.unwrap_or(0)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize},
    };

    use super::*;

    /// Counts the living; asserts that it lives when looked at.
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
    fn an_old_value_stays_as_long_as_it_is_read_and_no_longer() {
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
    fn the_value_comes_out_once() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        std::mem::forget(cell.read());
        cell.replace(Live::new(&count));
        let value = cell.into_inner();
        assert_eq!(living(&count), 1, "the old one went with the cell");
        drop(value);
        assert_eq!(living(&count), 0);
    }

    #[test]
    fn an_unread_value_goes_at_once() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        cell.replace(Live::new(&count));
        assert_eq!((living(&count), cell.waiting()), (1, 0));
    }

    #[test]
    fn a_forgotten_reader_costs_time_only() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        std::mem::forget(cell.read());
        cell.replace(Live::new(&count));
        assert_eq!(living(&count), 2);
        drop(cell);
        assert_eq!(living(&count), 0);
    }

    #[test]
    fn a_reading_may_leave_on_another_thread() {
        let count = Arc::default();
        let cell = RcuCell::new(Live::new(&count));
        let reading = cell.read();
        cell.replace(Live::new(&count));
        std::thread::scope(|scope| {
            scope.spawn(|| drop(reading));
        });
        assert_eq!((living(&count), cell.waiting()), (1, 0));
    }

    #[test]
    fn readers_on_many_threads_only_see_living_values() {
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
        assert_eq!((living(&count), cell.waiting()), (1, 0), "the last to leave swept");
    }
}
