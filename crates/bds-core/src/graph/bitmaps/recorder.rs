//! Records changes in the bitmaps of a node, without a lock.
//!
//! The bitmaps that record now are an immutable list. A change of the list (a bitmap is added,
//! enabled, disabled, split …) publishes another one with a higher number. A request that changed
//! bytes marks them after the driver is done and before its completion is reported:
//!
//! ```text
//! request                                          change of the list
//! D  the driver changes the bytes                  P  store the list's number
//! X  count the write (tracker, SeqCst)             R  whatever relies on the change: read counters,
//! L  load the number ◄──────────────────┐             merge bitmaps, read bytes
//! M  mark in the list of that number    │
//! V  load the number again: newer? ─────┘
//! ```
//!
//! Why no write is missed, though neither side waits for the other. All of X, L, M, V, P are
//! `SeqCst`, so they are in one total order.
//! * A request whose L comes after P marks in the new list.
//! * A request whose L comes before P, and whose V comes after it, marks in both.
//! * A request whose V comes before P has marked only in the old list, and M comes before P: what
//!   reads or merges an old bitmap after P sees the mark.
//! * If no bitmap recorded before P, and L comes before P, the request marks nothing. X comes
//!   before P then, so a caller that reads the tracker's counters after P ([`Recorder::publish`]
//!   says so) sees X, and with it D: the change of bytes happened before the bitmap began to
//!   record, and every later read sees it.
//!
//! A mark may still arrive in a bitmap that left the list a moment ago, from a request that was
//! under way: too much, never too little. In a drained section none is under way, and everything is
//! exact.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use crate::bitmap::HBitmap;

/// The bitmaps that record.
struct List {
    /// Twice a counter, plus one if the list is not empty.
    number: u64,
    bitmaps: Box<[Arc<HBitmap>]>,
}

/// The list of a node's recording bitmaps.
#[derive(Default)]
pub(super) struct Recorder {
    /// Number of the newest list.
    number: AtomicU64,
    list: ArcSwapOption<List>,
}

impl Recorder {
    /// These bitmaps record from now on, and no others. Calls are serialised by the caller, which
    /// reads the counters of writes afterwards if none recorded before
    /// (`RequestTracker::observe_writes`).
    pub(super) fn publish(&self, bitmaps: Vec<Arc<HBitmap>>) {
        let count = self.number.load(Ordering::Relaxed) / 2 + 1;
        let number = 2 * count + u64::from(!bitmaps.is_empty());
        self.list.store(Some(Arc::new(List { number, bitmaps: bitmaps.into() })));
        self.number.store(number, Ordering::SeqCst);
    }

    /// Marks the range in all bitmaps that record. `len` is the node's length: a write may have
    /// made the node longer.
    #[inline]
    pub(super) fn record(&self, range: &Range<u64>, len: impl Fn() -> u64) {
        let mut number = self.number.load(Ordering::SeqCst);
        while number & 1 != 0 {
            let guard = self.list.load();
            let Some(list) = guard.as_deref() else { return };
            list.bitmaps.iter().for_each(|bits| mark(bits, range, &len));
            number = self.number.load(Ordering::SeqCst);
            // The list may be newer than the number: then its change is not finished, and this
            // request is concurrent with it.
            if number <= list.number {
                return;
            }
        }
    }
}

#[inline]
fn mark(bits: &HBitmap, range: &Range<u64>, len: impl Fn() -> u64) {
    if range.end > bits.len() {
        bits.grow(len().min(range.end));
    }
    bits.set(range.clone());
}
