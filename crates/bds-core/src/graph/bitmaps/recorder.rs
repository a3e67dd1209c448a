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

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;

use crate::bitmap::HBitmap;

/// Lists that a thread keeps at hand.
const KEPT: usize = 8;

/// Numbers of lists: no two lists have one number, whichever node they belong to.
static LISTS: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The lists that this thread used last, so that it need not count a reference up and down with
    /// each write. A list is replaced when the thread records for the same node again after a
    /// change, or for another one with the same place; until then it keeps bitmaps in memory.
    static RECENT: [RefCell<Option<Arc<List>>>; KEPT] =
        const { [const { RefCell::new(None) }; KEPT] };
}

/// The bitmaps that record.
struct List {
    /// Twice a number that is given once, plus one if the list is not empty.
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
        let count = LISTS.fetch_add(1, Ordering::Relaxed);
        let number = 2 * count + u64::from(!bitmaps.is_empty());
        self.list.store(Some(Arc::new(List { number, bitmaps: bitmaps.into() })));
        self.number.store(number, Ordering::SeqCst);
    }

    /// Marks the range in all bitmaps that record, after the write was counted. `len` is the node's
    /// length: a write may have made the node longer.
    #[inline]
    pub(super) fn record(&self, range: &Range<u64>, len: impl Fn() -> u64) {
        let mut number = self.number.load(Ordering::SeqCst);
        while number & 1 != 0 {
            let marked = RECENT.try_with(|recent| {
                let place = &recent[self.place()];
                if let Some(list) = &*place.borrow()
                    && list.number == number
                {
                    return list.mark(range, &len);
                }
                let list = self.list.load_full();
                let marked = list.as_deref().map_or(0, |list| list.mark(range, &len));
                // The old one is dropped after the borrow.
                drop(place.replace(list));
                marked
            });
            // Without a place if the thread is about to end.
            let marked = marked.unwrap_or_else(|_| self.mark_newest(range, &len));
            number = self.number.load(Ordering::SeqCst);
            // The list may be newer than the number: then its change is not finished, and this
            // request is concurrent with it.
            if number <= marked {
                return;
            }
        }
    }

    #[cold]
    fn mark_newest(&self, range: &Range<u64>, len: &impl Fn() -> u64) -> u64 {
        self.list.load_full().map_or(0, |list| list.mark(range, len))
    }

    /// Where a thread keeps this node's list.
    fn place(&self) -> usize {
        std::ptr::from_ref(self).addr() / size_of::<Self>() % KEPT
    }
}

impl List {
    /// Marks the range and returns the list's number.
    #[inline]
    fn mark(&self, range: &Range<u64>, len: &impl Fn() -> u64) -> u64 {
        for bits in &self.bitmaps {
            if range.end > bits.len() {
                bits.grow(len().min(range.end));
            }
            bits.record(range.clone());
        }
        self.number
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn bits(len: u64) -> Arc<HBitmap> {
        Arc::new(HBitmap::new(len, 512).unwrap())
    }

    /// Records a write of block 0, and calls `beside` once between the choice of the list and the
    /// mark: a bitmap of no length asks for the node's.
    fn record_beside(recorder: &Recorder, beside: impl Fn()) {
        let was_called = Cell::new(false);
        let len = || {
            if !was_called.replace(true) {
                beside();
            }
            512
        };
        recorder.record(&(0..512), len);
        assert!(was_called.get());
    }

    #[test]
    fn a_change_before_the_mark_is_seen_after_it() {
        let (old, new) = (bits(0), bits(512));
        let recorder = Recorder::default();
        recorder.publish(vec![old.clone()]);
        record_beside(&recorder, || recorder.publish(vec![new.clone()]));
        assert!(old.is_dirty(0) && new.is_dirty(0), "too much, never too little");
    }

    /// A successor is merged back before a request marks it: the request marks the bitmap itself.
    #[test]
    fn a_mark_behind_a_reclaim_is_not_lost() {
        let (parent, successor) = (bits(512), bits(0));
        let recorder = Recorder::default();
        recorder.publish(vec![successor.clone()]);
        record_beside(&recorder, || {
            recorder.publish(vec![parent.clone()]);
            parent.take_over(&successor);
        });
        assert!(parent.is_dirty(0));
    }

    #[test]
    fn several_changes_in_a_row_are_seen() {
        let all = [bits(0), bits(0), bits(0)];
        let recorder = Recorder::default();
        recorder.publish(vec![all[0].clone()]);
        let next = Cell::new(1);
        let len = || {
            if let Some(bits) = all.get(next.get()) {
                next.set(next.get() + 1);
                recorder.publish(vec![bits.clone()]);
            }
            512
        };
        recorder.record(&(0..512), len);
        assert!(all.iter().all(|bits| bits.is_dirty(0)));
    }

    #[test]
    fn a_bitmap_that_left_the_list_records_no_more() {
        let (one, two) = (bits(512), bits(512));
        let recorder = Recorder::default();
        for list in [vec![one.clone()], vec![two.clone()], Vec::new()] {
            recorder.record(&(0..1), || 512);
            one.clear(0..512);
            two.clear(0..512);
            let is_there = |bits: &Arc<HBitmap>| list.iter().any(|it| Arc::ptr_eq(it, bits));
            let wanted = (is_there(&one), is_there(&two));
            recorder.publish(list);
            recorder.record(&(0..1), || 512);
            assert_eq!((one.is_dirty(0), two.is_dirty(0)), wanted);
        }
    }

    /// A thread keeps lists of several nodes; those of other nodes and older ones are not mistaken
    /// for the one that is asked for.
    #[test]
    fn lists_of_many_nodes_are_distinguished() {
        let nodes: Vec<_> = (0..3 * KEPT).map(|_| (Recorder::default(), bits(4096))).collect();
        for round in 0..4_u64 {
            for (recorder, bits) in &nodes {
                recorder.publish(vec![bits.clone()]);
            }
            for (recorder, bits) in &nodes {
                recorder.record(&(round * 512..round * 512 + 1), || 4096);
                let marked: Vec<_> = bits.areas(0..4096).collect();
                assert_eq!(marked, std::slice::from_ref(&(0..(round + 1) * 512)));
            }
        }
    }
}
