//! Reads of old data in the node itself, which writes of the same range wait for.
//!
//! A reader of the snapshot registers its range, then looks which parts have been kept elsewhere; a
//! writer lets a range be changed, then looks for readers. One of the two sees the other: both
//! steps of the waiting path take the lock, and the inline path has a fence between its two loads,
//! as the reader has between its two steps.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_io::sync::Notify;

/// The registered reads.
#[derive(Debug, Default)]
pub(super) struct FrozenReads {
    count: AtomicUsize,
    ranges: Mutex<Ranges>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Ranges {
    last: u64,
    entries: Vec<(u64, Range<u64>)>,
}

/// A registered read.
pub(super) struct FrozenRead<'f> {
    reads: &'f FrozenReads,
    number: u64,
}

impl FrozenReads {
    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a read. What the caller looks at afterwards is as the writers left it.
    pub(super) fn register(&self, range: Range<u64>) -> FrozenRead<'_> {
        self.count.fetch_add(1, Ordering::SeqCst);
        let number = {
            let mut ranges = self.ranges();
            ranges.last += 1;
            let number = ranges.last;
            ranges.entries.push((number, range));
            number
        };
        fence(Ordering::SeqCst);
        FrozenRead { reads: self, number }
    }

    /// True if none is registered. Ordered after the caller's earlier loads.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        fence(Ordering::SeqCst);
        self.count.load(Ordering::SeqCst) == 0
    }

    /// Waits until no registered read overlaps the range.
    pub(super) async fn wait_free(&self, range: &Range<u64>) {
        let is_free = || {
            let ranges = self.ranges();
            !ranges.entries.iter().any(|(_, r)| r.start < range.end && range.start < r.end)
        };
        self.ended.wait_until(is_free).await;
    }
}

impl Drop for FrozenRead<'_> {
    fn drop(&mut self) {
        self.reads.ranges().entries.retain(|(number, _)| *number != self.number);
        self.reads.count.fetch_sub(1, Ordering::SeqCst);
        self.reads.ended.notify_waiters();
    }
}
