//! Tracks the requests in flight at one node, orders those that overlap, and records what has been
//! flushed.
//!
//! Bookkeeping only: no I/O, no graph, no policy. The request path (`request/`) registers requests
//! here; a drain (`graph/`) waits here until none is in flight.
//!
//! Four kinds of requests, from cheap to expensive:
//!
//! ```text
//! Inline         one counter of this thread's shard; never waits; refused while a serialising request exists
//! entered        one counter of this thread's shard; may wait
//! Tracked        an entry with its byte range: plain ones in this thread's shard, serialising ones in `central`
//! DetachedRange  remains of a Tracked whose request was dropped while its driver still works
//! ```
//!
//! Two requests conflict only if they overlap and one of them is serialising. They are ordered by
//! ticket; the later one waits for the earlier one. A serialising request draws its ticket when it
//! registers, in one critical section of `central` in which it also visits all shards and gives
//! each plain request that it overlaps an earlier ticket. A plain request without a ticket either
//! was never met, or draws its own (later) one when it sees the flag. Tickets are a total order, so
//! there is no cycle of waiters, and later requests cannot starve one that waits. A `DetachedRange`
//! is a serialising entry that waits for nothing. It has the ticket of its request: requests that
//! waited for that one wait for the range, and so do all later requests that overlap it.
//!
//! Why no conflict is missed:
//! * plain against serialising: the plain one enters its shard under the shard's lock and *then*
//!   looks at `serialising`; the serialising one raises `serialising` and *then* locks the shard.
//!   Whichever held the shard's lock second sees the other.
//! * inline against serialising: the inline one increments `inline` and then loads `serialising`;
//!   the serialising one increments `serialising` and then loads `inline`, all `SeqCst`. In the
//!   total order of `SeqCst` operations one of the two loads comes last and sees the other's
//!   increment (Dekker).
//! * wake-ups: a waiter increments `waiters`, arms its listener and then looks; a request that ends
//!   removes itself and then loads `waiters`. By the same two arguments either the waiter sees it
//!   removed or it sees the waiter.
//!
//! Lock order: `central` before a shard's `plain`. Neither is held across an await. `flush`
//! (waiting without blocking a thread) is taken before both and held while a flush runs.

mod detached;
mod flush;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::utils::CachePadded;
use slab::Slab;

use bds_io::sync::Notify;
use bds_refcount::{own_shard, shard_count};

use crate::error::Error;
use flush::FlushLog;

pub(crate) use detached::DetachedCount;
pub(crate) use flush::Flushing;

/// The requests in flight at one node.
pub(crate) struct RequestTracker {
    shards: Box<[CachePadded<Shard>]>,
    /// Serialising requests registered; non-zero refuses inline requests.
    serialising: AtomicUsize,
    /// Tasks that wait for requests to end.
    waiters: AtomicUsize,
    /// Notified when a request ends, if there are waiters.
    ended: Notify,
    /// The node is poisoned: its requests may never end, and are not waited for.
    is_given_up: AtomicBool,
    central: Mutex<Central>,
    flush: FlushLog,
    /// Detached operations, which may outlive their request.
    detached: AtomicUsize,
    /// Those of all nodes of the graph, for a node.
    all_detached: Option<Arc<DetachedCount>>,
}

#[derive(Default)]
struct Shard {
    /// Inline requests in flight.
    inline: AtomicUsize,
    /// Requests in flight that may wait.
    may_wait: AtomicUsize,
    /// Writes that ended, successfully or not.
    writes: AtomicU64,
    plain: Mutex<Slab<Entry>>,
}

#[derive(Default)]
struct Central {
    last_ticket: u64,
    serialising: Slab<Entry>,
}

impl Central {
    /// The ticket of a plain request, which gets one now if it has none.
    fn ticket_of(&mut self, shard: &Shard, slot: usize) -> u64 {
        let mut plain = lock_plain(shard);
        let entry = &mut plain[slot];
        if entry.ticket == 0 {
            self.last_ticket += 1;
            entry.ticket = self.last_ticket;
        }
        entry.ticket
    }
}

#[derive(Clone, Debug)]
struct Entry {
    range: Range<u64>,
    /// Zero: never met a serialising request.
    ticket: u64,
}

impl Entry {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.range.start < range.end && range.start < self.range.end
    }
}

/// The shard a request was counted in at; it is counted out there, on whichever thread that
/// happens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShardNumber(usize);

impl fmt::Debug for RequestTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestTracker")
            .field("in_flight", &self.in_flight())
            .field("serialising", &self.serialising.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

impl Default for RequestTracker {
    fn default() -> Self {
        Self::new()
    }
}

impl RequestTracker {
    /// No request in flight, nothing written.
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..shard_count()).map(|_| CachePadded::default()).collect(),
            serialising: AtomicUsize::new(0),
            waiters: AtomicUsize::new(0),
            ended: Notify::new(),
            is_given_up: AtomicBool::new(false),
            central: Mutex::default(),
            flush: FlushLog::default(),
            detached: AtomicUsize::new(0),
            all_detached: None,
        }
    }

    /// As [`RequestTracker::new`], with detached operations also counted there.
    pub(crate) fn counted_in(all_detached: Arc<DetachedCount>) -> Self {
        Self { all_detached: Some(all_detached), ..Self::new() }
    }

    /// Number of requests in flight now, of all kinds. Exact only while none can enter.
    pub(crate) fn in_flight(&self) -> usize {
        self.shards
            .iter()
            .map(|s| s.inline.load(Ordering::SeqCst) + s.may_wait.load(Ordering::SeqCst))
            .sum()
    }

    /// Waits until no request is in flight. The caller has closed the gates before; otherwise the
    /// answer is outdated when it arrives.
    pub(crate) async fn wait_idle(&self) {
        self.wait_until(|| self.in_flight() == 0 || self.is_given_up()).await;
    }

    fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::SeqCst)
    }

    /// Waits until `is_so`, which is evaluated again whenever a request ends.
    async fn wait_until(&self, is_so: impl FnMut() -> bool) {
        let _waiter = self.add_waiter();
        self.ended.wait_until(is_so).await;
    }

    /// Waits until every inline request has ended that was in flight when this was called. Later
    /// ones are not waited for.
    pub(crate) async fn wait_inline_passed(&self) {
        let mut pending: Vec<&Shard> = self.shards.iter().map(|shard| &**shard).collect();
        self.wait_until(|| {
            pending.retain(|shard| shard.inline.load(Ordering::SeqCst) != 0);
            pending.is_empty()
        })
        .await;
    }

    /// Waits until [`RequestTracker::give_up`]: for ever, unless that happens. Requests that end do
    /// not wake it.
    pub(crate) async fn wait_given_up(&self) {
        self.ended.wait_until(|| self.is_given_up.load(Ordering::SeqCst)).await;
    }

    /// Stops all waits for requests in flight, which may never end.
    pub(crate) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::SeqCst);
        self.ended.notify_waiters();
    }

    /// Counts in a request that ends before this thread does anything else. `None` while a
    /// serialising request exists. The caller must look at the edge's gate *after* this (see
    /// `request::admit`).
    #[inline]
    pub(crate) fn try_inline(&self) -> Option<Inline<'_>> {
        let shard = &*self.shards[self.own_number()];
        shard.inline.fetch_add(1, Ordering::SeqCst);
        let guard = Inline { tracker: self, shard };
        // SeqCst pairs with `track`; see the module's argument.
        (self.serialising.load(Ordering::SeqCst) == 0).then_some(guard)
    }

    /// Counts in a request that may wait; each call is paired with one [`RequestTracker::leave`] of
    /// its shard number. The caller must look at the edge's gate *after* this.
    #[inline]
    pub(crate) fn enter(&self) -> ShardNumber {
        let number = self.own_number();
        self.shards[number].may_wait.fetch_add(1, Ordering::SeqCst);
        ShardNumber(number)
    }

    /// Counts the same request out.
    #[inline]
    pub(crate) fn leave(&self, number: ShardNumber) {
        self.shards[number.0].may_wait.fetch_sub(1, Ordering::SeqCst);
        self.notify_waiters();
    }

    /// Marks that a request may change bytes: once the mark is dropped the next flush has work.
    pub(crate) fn writing(&self, number: ShardNumber) -> Writing<'_> {
        Writing(&self.shards[number.0])
    }

    /// Excludes all requests, once the turn of the range has come: those that are in flight then
    /// have ended, later ones wait until it is dropped. For work that is no request and is not
    /// counted.
    pub(crate) fn track_all(&self) -> Tracked<'_> {
        self.track_serialising(0..u64::MAX)
    }

    /// Registers the range of a request. A serialising one excludes all that overlap it.
    /// Unless it [may go](Tracked::may_go), the caller awaits [`Tracked::wait_turn`] next.
    pub(crate) fn track(
        &self,
        number: ShardNumber,
        range: Range<u64>,
        is_serialising: bool,
    ) -> Tracked<'_> {
        if is_serialising {
            self.track_serialising(range)
        } else {
            self.track_plain(&self.shards[number.0], range)
        }
    }

    fn track_plain<'a>(&'a self, shard: &'a Shard, range: Range<u64>) -> Tracked<'a> {
        let entry = Entry { range: range.clone(), ticket: 0 };
        let slot = lock_plain(shard).insert(entry);
        let place = Place::Plain { shard, slot };
        let mut tracked = Tracked { tracker: self, place, range, ticket: 0, inline_pending: 0 };
        if self.serialising.load(Ordering::SeqCst) != 0 {
            tracked.ticket = self.lock_central().ticket_of(shard, slot);
        }
        tracked
    }

    fn track_serialising(&self, range: Range<u64>) -> Tracked<'_> {
        self.serialising.fetch_add(1, Ordering::SeqCst);
        let mut central = self.lock_central();
        for shard in &self.shards {
            for (_, entry) in lock_plain(shard).iter_mut() {
                if entry.ticket == 0 && entry.overlaps(&range) {
                    central.last_ticket += 1;
                    entry.ticket = central.last_ticket;
                }
            }
        }
        central.last_ticket += 1;
        let ticket = central.last_ticket;
        let slot = central.serialising.insert(Entry { range: range.clone(), ticket });
        let inline_pending = (1 << self.shards.len()) - 1;
        Tracked { tracker: self, place: Place::Serialising { slot }, range, ticket, inline_pending }
    }

    fn remove_serialising(&self, slot: usize) {
        self.lock_central().serialising.remove(slot);
        self.serialising.fetch_sub(1, Ordering::SeqCst);
    }

    /// Frees a range that [`Tracked::detach`] kept.
    pub(crate) fn release_detached(&self, kept: DetachedRange) {
        self.remove_serialising(kept.slot);
        self.notify_waiters();
    }

    /// Begins a flush; one at a time, in order of arrival.
    pub(crate) async fn begin_flush(&self) -> Flushing {
        self.flush.begin(|| self.writes()).await
    }

    /// The node becomes a backing node: the writes so far are covered by flushes from above until
    /// one has succeeded. No request is inside.
    pub(crate) fn note_hidden(&self) {
        self.flush.note_hidden(self.writes());
    }

    /// Whether the node has writes that a flush of the nodes above must cover.
    #[inline]
    pub(crate) fn has_hidden_writes(&self) -> bool {
        self.flush.has_hidden()
    }

    /// The failure that every later flush of this node must report, if there was one.
    pub(crate) fn flush_failure(&self) -> Option<Error> {
        self.flush.failure()
    }

    /// Records a failure: the medium may have lost writes, and every later flush reports it.
    pub(crate) fn flush_failed(&self, error: &Error) {
        self.flush.record_failure(error);
    }

    /// Synchronises with writes that ended: the bytes of a write that was counted before this, in
    /// the order of all `SeqCst` operations, are visible to the caller afterwards.
    pub(crate) fn observe_writes(&self) {
        for shard in &self.shards {
            // Only the order counts.
            let _number = shard.writes.load(Ordering::SeqCst);
        }
    }

    #[inline]
    fn own_number(&self) -> usize {
        own_shard(self.shards.len())
    }

    fn add_waiter(&self) -> WaiterGuard<'_> {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        WaiterGuard(self)
    }

    #[inline]
    fn notify_waiters(&self) {
        if self.waiters.load(Ordering::SeqCst) != 0 {
            self.ended.notify_waiters();
        }
    }

    fn lock_central(&self) -> MutexGuard<'_, Central> {
        self.central.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes that ended so far, over all shards. Shards only grow, so two equal sums mean the same
    /// writes.
    pub(crate) fn writes(&self) -> u64 {
        self.shards
            .iter()
            .fold(0, |sum, s| u64::wrapping_add(sum, s.writes.load(Ordering::Acquire)))
    }
}

struct WaiterGuard<'a>(&'a RequestTracker);

impl Drop for WaiterGuard<'_> {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, Ordering::SeqCst);
    }
}

/// An inline request in flight: it ends on this thread without waiting.
pub(crate) struct Inline<'a> {
    tracker: &'a RequestTracker,
    shard: &'a Shard,
}

impl Inline<'_> {
    /// Records that a write ended, successfully or not: the next flush has work. Called after the
    /// driver returned.
    #[inline]
    pub(crate) fn wrote(&self) {
        // SeqCst: see `observe_writes`.
        self.shard.writes.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Inline<'_> {
    #[inline]
    fn drop(&mut self) {
        self.shard.inline.fetch_sub(1, Ordering::SeqCst);
        self.tracker.notify_waiters();
    }
}

/// Marks a node as written when dropped: see [`RequestTracker::writing`].
pub(crate) struct Writing<'a>(&'a Shard);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writes.fetch_add(1, Ordering::SeqCst);
    }
}

enum Place<'a> {
    Plain { shard: &'a Shard, slot: usize },
    Serialising { slot: usize },
}

/// The range of a detached operation: see [`Tracked::detach`].
#[derive(Debug)]
#[must_use = "the range is excluded until it is released"]
pub(crate) struct DetachedRange {
    slot: usize,
}

/// A registered byte range. Dropping it, also while it waits, lets the next requests go.
pub(crate) struct Tracked<'a> {
    tracker: &'a RequestTracker,
    place: Place<'a>,
    range: Range<u64>,
    ticket: u64,
    /// Serialising: shards not yet seen without inline requests, one bit each.
    inline_pending: u32,
}

impl Tracked<'_> {
    /// The range.
    pub(crate) fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// True if no earlier conflicting request is in flight.
    #[inline]
    pub(crate) fn may_go(&mut self) -> bool {
        self.ticket == 0 || !self.is_blocked()
    }

    /// Waits until [`Tracked::may_go`].
    pub(crate) async fn wait_turn(&mut self) {
        let tracker = self.tracker;
        tracker.wait_until(|| self.may_go()).await;
    }

    /// True if an earlier request overlaps and conflicts. (Inline requests end by themselves and do
    /// not count.)
    pub(crate) fn has_conflict(&self) -> bool {
        if self.ticket == 0 {
            return false;
        }
        let blocks = |e: &Entry| e.ticket != 0 && e.ticket < self.ticket && e.overlaps(&self.range);
        let central = self.tracker.lock_central();
        if central.serialising.iter().any(|(_, e)| blocks(e)) {
            return true;
        }
        // Plain requests conflict with a serialising one only. Those without a ticket came later.
        matches!(self.place, Place::Serialising { .. })
            && self.tracker.shards.iter().any(|s| lock_plain(s).iter().any(|(_, e)| blocks(e)))
    }

    /// Keeps the range for an operation that goes on without its request: requests that overlap it
    /// wait until [`RequestTracker::release_detached`]. The request may end before the operation,
    /// but not before its own turn came.
    pub(crate) fn detach(&self) -> DetachedRange {
        // As in `track_serialising`: raised first, so that plain and inline ones from here on see
        // it.
        self.tracker.serialising.fetch_add(1, Ordering::SeqCst);
        let mut central = self.tracker.lock_central();
        let ticket = match self.place {
            Place::Plain { shard, slot } => central.ticket_of(shard, slot),
            Place::Serialising { .. } => self.ticket,
        };
        DetachedRange {
            slot: central.serialising.insert(Entry { range: self.range.clone(), ticket }),
        }
    }

    fn is_blocked(&mut self) -> bool {
        for (bit, shard) in self.tracker.shards.iter().enumerate() {
            if self.inline_pending & (1 << bit) != 0 && shard.inline.load(Ordering::SeqCst) == 0 {
                self.inline_pending &= !(1 << bit);
            }
        }
        self.inline_pending != 0 || self.has_conflict()
    }
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        match self.place {
            Place::Plain { shard, slot } => {
                lock_plain(shard).remove(slot);
            }
            Place::Serialising { slot } => {
                self.tracker.remove_serialising(slot);
            }
        }
        self.tracker.notify_waiters();
    }
}

fn lock_plain(shard: &Shard) -> MutexGuard<'_, Slab<Entry>> {
    shard.plain.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
