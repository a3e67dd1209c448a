//! Who is inside one node now: in-flight counts, overlapping requests, and what has been flushed.
//!
//! Pure bookkeeping: no I/O, no graph, no policy. The corridor (`request/`) enters requests here; a drain
//! (`graph/`) waits here until nobody is inside.
//!
//! Three ways to be inside, from cheap to dear:
//!
//! ```text
//! Inline   one counter of this thread's shard; never waits; refused while a serialising request exists
//! entered  one counter of this thread's shard; may wait
//! Tracked  an entry with its byte range: plain ones in this thread's shard, serialising ones in `central`
//! Kept     what is left of a Tracked whose request has gone while its driver still works
//! ```
//!
//! Only pairs with a serialising side conflict. Order is by ticket, and the later one waits for the earlier one:
//! a serialising request draws its ticket when it registers, in one critical section of `central` in which it
//! also visits all shards and gives the plain requests it overlaps an earlier ticket. A plain request without a
//! ticket either was never met, or draws its own (later) one when it sees the flag. Tickets are a total
//! order, so nobody waits in a circle, and a stream of newcomers cannot starve one that waits. A `Kept` range is a
//! serialising entry that waits for nobody; it has the ticket of the request that left it, so who waited for that one waits
//! for it, and so does everyone who overlaps it and comes later.
//!
//! Why nobody is overlooked:
//! * plain against serialising: the plain one enters its shard under the shard's lock and *then* looks at
//!   `serialising`; the serialising one raises `serialising` and *then* locks the shard. Whichever held the
//!   shard's lock second sees the other.
//! * inline against serialising: the inline one increments `inline` and then loads `serialising`; the
//!   serialising one increments `serialising` and then loads `inline`, all `SeqCst`. In the total order of
//!   `SeqCst` operations one of the two loads comes last and sees the other's increment (Dekker).
//! * wake-ups: a watcher increments `watchers`, arms its listener and then looks; a leaver leaves and then
//!   loads `watchers`. By the same two arguments either the watcher sees it gone or the leaver sees the watcher.
//!
//! Lock order: `central` before a shard's `plain`. Neither is held across an await. `flush` (waiting without
//! blocking a thread) is taken before both and held while a flush runs.

mod detached;
mod flush;

use std::fmt;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::utils::CachePadded;
use slab::Slab;

use bds_io::sync::{Mutex as AsyncMutex, Notify};
use bds_refcount::{own_shard, shard_count};

use crate::error::Error;
use flush::FlushState;

pub(crate) use flush::Flushing;

/// Bookkeeping of one node.
pub(crate) struct RequestTracker {
    shards: Box<[CachePadded<Shard>]>,
    /// Serialising requests registered; non-zero closes the inline way.
    serialising: AtomicUsize,
    /// Tasks that wait for somebody to leave.
    watchers: AtomicUsize,
    gone: Notify,
    /// Who is inside never leaves; nobody waits for them.
    is_given_up: AtomicBool,
    central: Mutex<Central>,
    flush: Arc<AsyncMutex<FlushState>>,
    /// Inside on their own behalf: operations whose request may have gone.
    detached: AtomicUsize,
    flush_failure: Mutex<Option<Error>>,
}

#[derive(Default)]
struct Shard {
    /// Inline requests inside.
    inline: AtomicUsize,
    /// Requests inside that may wait.
    may_wait: AtomicUsize,
    /// Writes ended, whether well or not.
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

/// Where a request was counted in: it is counted out there, on whatever thread that happens.
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
    /// Nobody inside, nothing written.
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..shard_count()).map(|_| CachePadded::default()).collect(),
            serialising: AtomicUsize::new(0),
            watchers: AtomicUsize::new(0),
            gone: Notify::new(),
            is_given_up: AtomicBool::new(false),
            central: Mutex::default(),
            flush: Arc::default(),
            detached: AtomicUsize::new(0),
            flush_failure: Mutex::default(),
        }
    }

    /// Requests inside now, of all kinds. Exact only while nobody can enter.
    pub(crate) fn in_flight(&self) -> usize {
        self.shards
            .iter()
            .map(|s| s.inline.load(Ordering::SeqCst) + s.may_wait.load(Ordering::SeqCst))
            .sum()
    }

    /// Waits until nobody is inside. The caller has closed the gates before; otherwise the answer is
    /// outdated when it arrives.
    pub(crate) async fn wait_idle(&self) {
        self.wait_until(|| self.in_flight() == 0 || self.is_given_up()).await;
    }

    fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::SeqCst)
    }

    /// Looks again whenever somebody leaves.
    async fn wait_until(&self, is_so: impl Fn() -> bool) {
        let _watching = self.watch();
        loop {
            let mut gone = pin!(self.gone.notified());
            gone.as_mut().enable();
            if is_so() {
                return;
            }
            gone.await;
        }
    }

    /// Waits until every inline request has ended that was inside when this was called. Newcomers are not waited for.
    pub(crate) async fn wait_inline_passed(&self) {
        let _watching = self.watch();
        let mut pending: Vec<&Shard> = self.shards.iter().map(|shard| &**shard).collect();
        loop {
            let mut gone = pin!(self.gone.notified());
            gone.as_mut().enable();
            pending.retain(|shard| shard.inline.load(Ordering::SeqCst) != 0);
            if pending.is_empty() {
                return;
            }
            gone.await;
        }
    }

    /// Waits until somebody [gives up](RequestTracker::give_up) who is inside: for ever, unless that happens.
    pub(crate) async fn wait_given_up(&self) {
        loop {
            let mut gone = pin!(self.gone.notified());
            gone.as_mut().enable();
            if self.is_given_up.load(Ordering::SeqCst) {
                return;
            }
            gone.await;
        }
    }

    /// Whoever is inside never leaves: nobody waits for that any more.
    pub(crate) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::SeqCst);
        self.gone.notify_waiters();
    }

    /// Enters a request that ends before this thread does anything else. `None` while a serialising request
    /// exists. The caller must look at the edge's gate *after* this (see `request::port`).
    #[inline]
    pub(crate) fn try_inline(&self) -> Option<Inline<'_>> {
        let shard = &*self.shards[self.own_number()];
        shard.inline.fetch_add(1, Ordering::SeqCst);
        let guard = Inline { tracker: self, shard };
        // SeqCst pairs with `track`; see the module's argument.
        (self.serialising.load(Ordering::SeqCst) == 0).then_some(guard)
    }

    /// Counts in a request that may wait; each call is paired with one [`RequestTracker::leave`] of its answer. The caller
    /// must look at the edge's gate *after* this.
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
        self.notify_watchers();
    }

    /// Marks that a request may change bytes: when the mark goes, however it goes, the next flush has work.
    pub(crate) fn writing(&self, number: ShardNumber) -> Writing<'_> {
        Writing(&self.shards[number.0])
    }

    /// Registers the bytes a request touches. A serialising one excludes all that overlap it.
    /// Unless it [may go](Tracked::may_go), [`Tracked::wait_turn`] comes next.
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

    /// Ends what [`Tracked::keep`] left behind on this node.
    pub(crate) fn give_back(&self, kept: Kept) {
        self.remove_serialising(kept.slot);
        self.notify_watchers();
    }

    #[inline]
    fn own_number(&self) -> usize {
        own_shard(self.shards.len())
    }

    fn watch(&self) -> Watching<'_> {
        self.watchers.fetch_add(1, Ordering::SeqCst);
        Watching(self)
    }

    #[inline]
    fn notify_watchers(&self) {
        if self.watchers.load(Ordering::SeqCst) != 0 {
            self.gone.notify_waiters();
        }
    }

    fn lock_central(&self) -> MutexGuard<'_, Central> {
        self.central.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes that ended so far, over all shards. Shards only grow, so two equal sums mean the same writes.
    fn writes(&self) -> u64 {
        self.shards
            .iter()
            .fold(0, |sum, s| u64::wrapping_add(sum, s.writes.load(Ordering::Acquire)))
    }
}

struct Watching<'a>(&'a RequestTracker);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A request that runs to its end on this thread without waiting.
pub(crate) struct Inline<'a> {
    tracker: &'a RequestTracker,
    shard: &'a Shard,
}

impl Inline<'_> {
    /// A write ended, well or not: the next flush has work. Call after the driver returned, never before.
    #[inline]
    pub(crate) fn wrote(&self) {
        self.shard.writes.fetch_add(1, Ordering::Release);
    }
}

impl Drop for Inline<'_> {
    #[inline]
    fn drop(&mut self) {
        self.shard.inline.fetch_sub(1, Ordering::SeqCst);
        self.tracker.notify_watchers();
    }
}

/// See [`RequestTracker::writing`].
pub(crate) struct Writing<'a>(&'a Shard);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writes.fetch_add(1, Ordering::Release);
    }
}

enum Place<'a> {
    Plain { shard: &'a Shard, slot: usize },
    Serialising { slot: usize },
}

/// A range whose request has gone: see [`Tracked::keep`].
#[derive(Debug)]
#[must_use = "the range is excluded until it is given back"]
pub(crate) struct Kept {
    slot: usize,
}

/// A registered byte range. Dropping it, also while it waits, lets the next ones in.
pub(crate) struct Tracked<'a> {
    tracker: &'a RequestTracker,
    place: Place<'a>,
    range: Range<u64>,
    ticket: u64,
    /// Serialising: shards not yet seen without inline requests, one bit each.
    inline_pending: u32,
}

impl Tracked<'_> {
    /// True if no earlier conflicting request is inside.
    #[inline]
    pub(crate) fn may_go(&mut self) -> bool {
        self.ticket == 0 || !self.is_blocked()
    }

    /// Waits until [`Tracked::may_go`].
    pub(crate) async fn wait_turn(&mut self) {
        let _watching = self.tracker.watch();
        loop {
            let mut gone = pin!(self.tracker.gone.notified());
            gone.as_mut().enable();
            if self.may_go() {
                return;
            }
            gone.await;
        }
    }

    /// True if an earlier request overlaps and conflicts. (Inline requests end by themselves and do not count.)
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

    /// Leaves the range behind for an operation that goes on without its request: whoever overlaps it waits until it is
    /// given back. The request may go before the operation ends, but not before its own turn came.
    pub(crate) fn keep(&self) -> Kept {
        // As in `track_serialising`: raised first, so that plain and inline ones from here on see it.
        self.tracker.serialising.fetch_add(1, Ordering::SeqCst);
        let mut central = self.tracker.lock_central();
        let ticket = match self.place {
            Place::Plain { shard, slot } => central.ticket_of(shard, slot),
            Place::Serialising { .. } => self.ticket,
        };
        Kept { slot: central.serialising.insert(Entry { range: self.range.clone(), ticket }) }
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
        self.tracker.notify_watchers();
    }
}

fn lock_plain(shard: &Shard) -> MutexGuard<'_, Slab<Entry>> {
    shard.plain.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
