//! Spreads counters over shards by thread number, so that threads do not share a cache line.
//!
//! ```
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use bds_refcount::{own_shard, shard_count};
//!
//! let requests: Vec<AtomicU64> = (0..shard_count()).map(|_| AtomicU64::new(0)).collect();
//! requests[own_shard(requests.len())].fetch_add(1, Ordering::Relaxed);
//! assert_eq!(requests.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u64>(), 1);
//! ```
//! A shard belongs on cache lines of its own (`repr(align(128))`); that is left to the caller,
//! whose shards hold more than a counter. Numbers are given to threads in order of first use, so
//! the first threads of a process do not collide.

/// Threads beyond this many share shards; more shards cost memory and longer sums for nothing.
pub const MAX_SHARDS: usize = 16;

/// Number of shards for this machine: its processors, rounded up to a power of two, at most
/// [`MAX_SHARDS`].
pub fn shard_count() -> usize {
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

/// The shard of the calling thread among `count`, which is a power of two. Always the same one for
/// a thread.
#[inline]
pub fn own_shard(count: usize) -> usize {
    debug_assert!(count.is_power_of_two(), "{count} shards");
    thread_number() & (count - 1)
}

/// Under loom all threads share one shard: fewer states, and the hardest case.
#[cfg(loom)]
fn thread_number() -> usize {
    0
}

#[cfg(not(loom))]
#[inline]
fn thread_number() -> usize {
    use std::{
        cell::Cell,
        sync::atomic::{AtomicUsize, Ordering},
    };
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    let number = NUMBER.try_with(|number| {
        if number.get() == usize::MAX {
            // Never `MAX` itself, which means that there is no number yet.
            number.set(NEXT.fetch_add(1, Ordering::Relaxed) & (usize::MAX >> 1));
        }
        number.get()
    });
    // Without its thread-locals the thread is ending; any shard will do.
    number.unwrap_or(0)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn shard_count_is_a_power_of_two_within_the_limit() {
        assert!(shard_count().is_power_of_two() && shard_count() <= MAX_SHARDS);
    }

    #[test]
    fn a_thread_keeps_its_shard_and_new_threads_take_turns() {
        assert_eq!(own_shard(1), 0);
        assert_eq!(own_shard(MAX_SHARDS), own_shard(MAX_SHARDS));
        let other = || std::thread::spawn(|| own_shard(1 << 20)).join().unwrap();
        assert_ne!(other(), other());
        assert_ne!(other(), own_shard(1 << 20));
    }
}
