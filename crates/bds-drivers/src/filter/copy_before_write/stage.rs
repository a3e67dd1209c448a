//! The staging area: old data in memory and in a spill file, which tasks write to the target behind
//! the guest.
//!
//! ```text
//! guest write ─► reserve memory ─► read old data ─► put ─► the write goes on
//!                     ▲                              │
//!                     │ memory free                  ├─► written to the target: claim done
//!                     └──────────────────────────────┴─► over half of the limit: to the spill file
//! ```
//!
//! An entry holds the claim of its range until the target has it: no other copy of the range begins
//! meanwhile, and a snapshot reader finds the data here. An entry whose write failed stays and is
//! tried again after a while. An entry without a claim stands behind another copy that is under
//! way: it goes when that one has succeeded, else it gets the claim.
//!
//! With a spill file, writes to the target hold no more than half of the memory, so that a target
//! which hangs leaves the other half to guests; that half is emptied into the spill file. So a
//! guest's write waits for memory or for the spill file, and for the target only when both are
//! full.

mod entries;
mod space;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bds_core::copy::{Claim, CopyMap};
use bds_core::{Error, ErrorKind};
use bds_io::IoVec;
use bds_io::sync::Notify;

pub(super) use entries::Data;
use entries::{Entries, Entry, Work, memory_of};
pub(super) use space::SpillRange;
use space::SpillSpace;

/// First wait after a failed write, doubled after each further one.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
/// Longest wait.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(1);
/// Failures of one after the other, after which all writes wait.
const MANY_FAILURES: u32 = 16;
/// Longest run that is staged at once: bounds how long a write waits for the read of old data.
const MAX_STAGED: u64 = 1 << 20;
/// Fewest granules of memory, and of the spill file, where there is one.
pub(super) const MIN_GRANULES: u64 = 4;

/// Policy at the limit of the staging area.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtLimit {
    /// The guest's write waits for space.
    #[default]
    Stall,
    /// The snapshot is given up, the write goes on.
    BreakSnapshot,
    /// Writes that must be kept are delayed from half of the limit on, so that the limit is not
    /// reached; at the limit they wait.
    Throttle,
}

/// A failed write of staged data to the target.
#[derive(Debug)]
pub struct StageFailure {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// The failure.
    pub error: Error,
}

/// What a staging area holds, and what waited for it so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StagingInfo {
    /// Bytes of memory in use.
    pub memory_bytes: u64,
    /// Bytes of the spill file in use.
    pub spilled_bytes: u64,
    /// Runs of old data that waited until memory was free because others went to the spill file.
    pub spill_waits: u64,
    /// Runs of old data that waited until the target had others: memory and spill file were full.
    pub target_waits: u64,
}

/// One entry to be written to the target.
pub(super) struct ToWrite {
    pub(super) range: Range<u64>,
    pub(super) data: Data,
}

/// One entry to be written to the spill file.
pub(super) struct ToSpill {
    pub(super) start: u64,
    pub(super) data: IoVec,
    pub(super) place: Arc<SpillRange>,
}

/// What is staged at an offset.
pub(super) enum Staged {
    Nothing,
    /// So many bytes were copied.
    Copied(usize),
    /// The spill file holds so many bytes, from this byte of the range on.
    Spilled(Arc<SpillRange>, u64, usize),
}

#[derive(Default)]
struct State {
    entries: Entries,
    /// Bytes of memory for entries to come.
    reserved: u64,
    /// Ranges whose old data is being read.
    being_staged: Vec<Range<u64>>,
    /// The tasks behind the guest run.
    has_writer: bool,
    has_spiller: bool,
    is_closed: bool,
    /// Taken by the job, if there is one.
    failure: Option<StageFailure>,
    /// The last write failed.
    failing: Option<Error>,
    /// Writes that failed so far, and since the last that did not.
    failures: u64,
    failures_in_row: u32,
    /// No write to the target before this moment, and none to the spill file.
    retry_at: Duration,
    spill_at: Duration,
    /// Why the spill file is not used now.
    spill_failing: Option<Error>,
    written_bytes: u64,
    writing_time: Duration,
    writing_since: Duration,
    spill_waits: u64,
    target_waits: u64,
}

impl State {
    /// Counts the time since the last call as time in which the target was written.
    fn account_time(&mut self, now: Duration) {
        let time = now.saturating_sub(self.writing_since);
        self.writing_time += time;
        self.writing_since = now;
    }

    fn memory(&self) -> u64 {
        self.reserved + self.entries.memory()
    }
}

/// Limits of a staging area.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of memory; 0: no staging.
    pub(super) memory: u64,
    /// Bytes of the spill file; 0: there is none.
    pub(super) spill: u64,
    /// Bytes of a granule.
    pub(super) granule: u32,
    pub(super) policy: AtLimit,
}

/// Staged data up to a limit.
pub(super) struct Stage {
    limits: Limits,
    space: Arc<SpillSpace>,
    state: Mutex<State>,
    /// Notified when space, entries or the tasks change.
    changed: Arc<Notify>,
}

/// What [`Stage::reserve`] found.
pub(super) enum Space {
    Reserved,
    /// The policy breaks the snapshot, with this error.
    Full(Error),
    /// The target fails, so that waiting for space is of no use.
    Failing(Error),
}

/// What a task does next.
pub(super) enum Next<T> {
    Write(T),
    /// Nothing may be written now, or not before this moment.
    Wait(Option<Duration>),
    /// There are no entries: the task has ended.
    End,
}

/// Tasks that the caller of [`Stage::put`] starts.
#[derive(Clone, Copy, Default)]
pub(super) struct Starts {
    pub(super) writer: bool,
    pub(super) spiller: bool,
}

impl Stage {
    pub(super) fn new(limits: Limits) -> Self {
        let changed = Arc::new(Notify::new());
        let space = SpillSpace::new(limits.spill, limits.granule, Arc::clone(&changed));
        Self { limits, space, state: Mutex::default(), changed }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn info(&self) -> StagingInfo {
        let state = self.state();
        StagingInfo {
            memory_bytes: state.memory(),
            spilled_bytes: self.space.len() - self.space.free_bytes(),
            spill_waits: state.spill_waits,
            target_waits: state.target_waits,
        }
    }

    /// Longest run that is staged at once.
    pub(super) fn max_run(&self) -> u64 {
        let granule = u64::from(self.limits.granule);
        let most = match self.limits.spill {
            0 => MAX_STAGED,
            _ => MAX_STAGED.min(self.limits.memory / MIN_GRANULES),
        };
        (most - most % granule).max(granule)
    }

    /// Begins to stage the run from `start` on, of at most `end - start` bytes, in whole granules.
    /// `None`: its beginning is being staged already.
    pub(super) fn begin(&self, start: u64, end: u64) -> Option<Staging<'_>> {
        let mut state = self.state();
        let end = end.min(start.saturating_add(self.max_run()));
        let overlapping = state.being_staged.iter().filter(|r| r.start < end && start < r.end);
        let end = overlapping.map(|r| r.start).min().map_or(end, |other| other.min(end));
        if end <= start {
            return None;
        }
        state.being_staged.push(start..end);
        Some(Staging { stage: self, range: start..end })
    }

    /// Waits until no old data of this byte is being read.
    pub(super) async fn wait_not_being_staged(&self, offset: u64) {
        let is_free = || !self.state().being_staged.iter().any(|range| range.contains(&offset));
        self.changed.wait_until(is_free).await;
    }

    /// Waits for memory for `len` bytes. One entry may always go in, however long. `fails`: a
    /// target that fails ends the wait, but not before what waits has been tried once more.
    pub(super) async fn reserve(&self, len: u64, fails: bool) -> Space {
        let mut failures_before = None;
        let mut has_waited = [false; 2];
        let try_reserve = || {
            let mut state = self.state();
            if state.memory() == 0 || state.memory() + len <= self.limits.memory {
                state.reserved += len;
                return Some(Space::Reserved);
            }
            if self.will_spill(&state) {
                state.spill_waits += u64::from(!std::mem::replace(&mut has_waited[0], true));
                return None;
            }
            if self.limits.policy == AtLimit::BreakSnapshot {
                return Some(Space::Full(full(state.spill_failing.as_ref())));
            }
            state.target_waits += u64::from(!std::mem::replace(&mut has_waited[1], true));
            let failing = state.failing.as_ref().filter(|_| fails)?.duplicate();
            let before = *failures_before.get_or_insert(state.failures);
            if before < state.failures {
                return Some(Space::Failing(failing));
            }
            drop(state);
            self.retry_now();
            None
        };
        self.changed.wait_for(try_reserve).await
    }

    /// True if memory becomes free without the target.
    fn will_spill(&self, state: &State) -> bool {
        let may_spill = self.limits.spill != 0 && state.spill_failing.is_none();
        may_spill
            && (state.entries.spilling_memory() > 0
                || state.entries.spillable(|len| self.space.fits(len)).is_some()
                || state.reserved > 0 && self.space.fits(1))
    }

    /// Gives back space that was not used.
    pub(super) fn unreserve(&self, len: u64) {
        {
            let mut state = self.state();
            state.reserved = state.reserved.saturating_sub(len);
        }
        self.changed.notify_waiters();
    }

    /// The delay of a write that must be kept: from half of the limit on the time the target needs
    /// for `len` bytes, times two at the limit.
    pub(super) fn delay(&self, len: u64) -> Duration {
        let state = self.state();
        if self.limits.policy != AtLimit::Throttle || state.written_bytes == 0 {
            return Duration::ZERO;
        }
        let limit = self.limits.memory.saturating_add(self.space.len());
        let used = state.memory() + self.space.len() - self.space.free_bytes();
        let over = used.saturating_sub(limit / 2);
        let per_byte = state.writing_time.as_nanos() / u128::from(state.written_bytes);
        let nanos = per_byte * u128::from(len) * u128::from(over) * 4;
        let nanos = nanos / u128::from(limit.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(LONGEST_BACK_OFF)
    }

    /// Puts in what `reserved` bytes were reserved for, which are given back as far as they are not
    /// needed. Without a claim: another copy of the range is under way.
    pub(super) fn put(
        &self,
        range: Range<u64>,
        claim: Option<Claim<'static>>,
        data: Data,
        reserved: u64,
    ) -> Starts {
        let mut state = self.state();
        state.reserved = state.reserved.saturating_sub(reserved);
        if state.is_closed {
            return Starts::default();
        }
        debug_assert!(memory_of(&data, range.end - range.start) <= reserved, "it fits");
        state.entries.insert(Entry::new(range, claim, data));
        let writer = !std::mem::replace(&mut state.has_writer, true);
        if writer {
            state.writing_since = bds_io::now();
        }
        let spiller = self.limits.spill != 0 && !std::mem::replace(&mut state.has_spiller, true);
        drop(state);
        self.changed.notify_waiters();
        Starts { writer, spiller }
    }

    /// Decides about an entry without a claim, once the other copy of its range has ended: drops it
    /// if that has succeeded, else lets it have the claim. False: another copy is under way again.
    pub(super) fn settle(&self, start: u64, map: &Arc<CopyMap>) -> bool {
        let mut state = self.state();
        let Some(entry) = state.entries.get(start) else { return true };
        let range = entry.range.clone();
        let dropped = if map.is_clean_in(&range) {
            state.entries.remove(start)
        } else {
            let Some(claim) = map.claim_shared(range, 1) else { return false };
            state.entries.update(start, |entry| entry.claim = Some(claim));
            None
        };
        drop(state);
        drop(dropped);
        self.changed.notify_waiters();
        true
    }

    /// Copies what is staged at `offset` into the beginning of `iov`, or says where it is.
    pub(super) fn read(&self, offset: u64, iov: &IoVec) -> Staged {
        let state = self.state();
        let Some(entry) = state.entries.at(offset) else { return Staged::Nothing };
        let len = usize::try_from(entry.range.end - offset).unwrap_or(usize::MAX).min(iov.len());
        let at = offset - entry.range.start;
        match &entry.data {
            Data::Zero => iov.fill(0..len, 0),
            Data::Memory(data) => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                iov.slice(0..len).copy_from_iov(0, &data.slice(at..at + len));
            }
            Data::Spilled(place) => return Staged::Spilled(Arc::clone(place), at, len),
        }
        Staged::Copied(len)
    }

    /// Where staged data at or behind `offset` begins and ends.
    pub(super) fn next(&self, offset: u64) -> Option<Range<u64>> {
        let state = self.state();
        let found = state.entries.at(offset).or_else(|| state.entries.from(offset));
        found.map(|entry| entry.range.clone())
    }

    /// Drops the entries that lie in the range, of which the snapshot holds nothing any more, and
    /// that are not being written just now.
    pub(super) fn give_up(&self, range: &Range<u64>) {
        let mut dropped = Vec::new();
        {
            let mut state = self.state();
            for start in state.entries.idle_within(range) {
                dropped.extend(state.entries.remove(start));
            }
        }
        let any = !dropped.is_empty();
        for entry in dropped {
            entry.claim.into_iter().for_each(Claim::done);
        }
        if any {
            self.changed.notify_waiters();
        }
    }

    /// The next entry to be written to the target, for the writer. `under_way`: its writes.
    pub(super) fn take_next(&self, under_way: usize) -> Next<ToWrite> {
        let now = bds_io::now();
        let mut state = self.state();
        if state.is_closed || state.entries.is_empty() && under_way == 0 {
            state.has_writer = false;
            state.account_time(now);
            drop(state);
            self.changed.notify_waiters();
            return Next::End;
        }
        if state.failing.is_some() && state.retry_at > now {
            return Next::Wait(Some(state.retry_at - now));
        }
        state.entries.wake_delayed(now);
        let Some((start, loaded)) = self.next_to_write(&state) else {
            let moment = state.entries.next_moment();
            return Next::Wait(moment.map(|at| at.saturating_sub(now)));
        };
        let taken = state.entries.update(start, |entry| {
            entry.work = Work::Writing(loaded);
            ToWrite { range: entry.range.clone(), data: entry.data.clone() }
        });
        taken.map_or(Next::Wait(None), Next::Write)
    }

    /// The entry to be written next, and the memory that reading it from the spill file takes. What
    /// is in memory goes first. With a spill file, writes have half of the memory.
    fn next_to_write(&self, state: &State) -> Option<(u64, u64)> {
        let (half, writing) = (self.limits.memory / 2, state.entries.writing_memory());
        if let Some(start) = state.entries.first_ready() {
            let memory = state.entries.get(start).map_or(0, Entry::memory);
            let may_go = self.limits.spill == 0 || writing == 0 || writing + memory <= half;
            return may_go.then_some((start, 0));
        }
        let (start, len) = state.entries.first_ready_spilled()?;
        let limit = if writing == 0 { self.limits.memory } else { half };
        (state.memory() + len <= limit).then_some((start, len))
    }

    /// True if the writer has something to do, with so many writes under way.
    fn has_work(&self, under_way: usize) -> bool {
        let now = bds_io::now();
        let state = self.state();
        let is_delayed = state.failing.is_some() && state.retry_at > now;
        let is_ready = || {
            state.entries.next_moment().is_some_and(|at| at <= now)
                || self.next_to_write(&state).is_some()
        };
        let has_ended = state.entries.is_empty() && under_way == 0;
        state.is_closed || has_ended || !is_delayed && is_ready()
    }

    /// Ends a write of the writer.
    pub(super) fn written(&self, start: u64, result: Result<(), Error>) {
        let now = bds_io::now();
        let mut state = self.state();
        let done = match result {
            Ok(()) => {
                let Some(entry) = state.entries.remove(start) else { return };
                (state.failing, state.failures_in_row) = (None, 0);
                state.written_bytes += entry.len();
                state.account_time(now);
                Some(entry)
            }
            Err(error) => {
                state.fail(start, error, now);
                None
            }
        };
        drop(state);
        if let Some(claim) = done.and_then(|entry| entry.claim) {
            claim.done();
        }
        self.changed.notify_waiters();
    }

    /// The next entry to be written to the spill file, for the spiller.
    pub(super) fn take_to_spill(&self, under_way: usize) -> Next<ToSpill> {
        let now = bds_io::now();
        let mut state = self.state();
        if state.is_closed || state.entries.is_empty() && under_way == 0 {
            state.has_spiller = false;
            drop(state);
            self.changed.notify_waiters();
            return Next::End;
        }
        if state.spill_at > now {
            return Next::Wait(Some(state.spill_at - now));
        }
        let was_failing = state.spill_failing.is_some();
        let Some(start) = self.next_to_spill(&state) else { return Next::Wait(None) };
        let len = state.entries.get(start).map_or(0, Entry::len);
        let Some(place) = self.space.allocate(len) else { return Next::Wait(None) };
        let taken = state.entries.update(start, |entry| match &entry.data {
            Data::Memory(data) => {
                entry.work = Work::Spilling;
                Some(ToSpill { start, data: data.clone(), place })
            }
            _ => None,
        });
        drop(state);
        if was_failing {
            self.changed.notify_waiters();
        }
        taken.flatten().map_or(Next::Wait(None), Next::Write)
    }

    /// What is over half of the memory goes to the spill file.
    fn next_to_spill(&self, state: &State) -> Option<u64> {
        let stays = state.memory() - state.entries.spilling_memory();
        if stays <= self.limits.memory / 2 {
            return None;
        }
        state.entries.spillable(|len| self.space.fits(len))
    }

    fn has_spill_work(&self, under_way: usize) -> bool {
        let now = bds_io::now();
        let state = self.state();
        state.is_closed
            || state.entries.is_empty() && under_way == 0
            || state.spill_at <= now && self.next_to_spill(&state).is_some()
    }

    /// Ends a write of the spiller.
    pub(super) fn spilled(&self, work: ToSpill, result: Result<(), Error>) {
        let mut state = self.state();
        let is_ok = result.is_ok();
        let place = work.place;
        let old = state.entries.update(work.start, |entry| {
            entry.work = Work::Idle;
            is_ok.then(|| std::mem::replace(&mut entry.data, Data::Spilled(place)))
        });
        match result {
            Ok(()) => state.spill_failing = None,
            Err(error) => {
                tracing::warn!(%error, "old data cannot be written to the spill file");
                state.spill_at = bds_io::now() + LONGEST_BACK_OFF;
                state.spill_failing = Some(error);
            }
        }
        drop(state);
        drop(old);
        self.changed.notify_waiters();
    }

    /// Waits for a failed write, and takes it.
    pub(super) async fn next_failure(&self) -> StageFailure {
        self.changed.wait_for(|| self.state().failure.take()).await
    }

    /// Forgets a failure that was not taken.
    pub(super) fn forget_failure(&self) {
        self.state().failure = None;
    }

    /// Lets failed entries be tried at once.
    pub(super) fn retry_now(&self) {
        let waited = {
            let mut state = self.state();
            let waited = !std::mem::take(&mut state.retry_at).is_zero();
            state.entries.wake_delayed(Duration::MAX) || waited
        };
        if waited {
            self.changed.notify_waiters();
        }
    }

    /// Drops all entries, and takes no more: their claims count as failed.
    pub(super) fn close(&self) {
        let dropped = {
            let mut state = self.state();
            state.is_closed = true;
            state.reserved = 0;
            std::mem::take(&mut state.entries)
        };
        drop(dropped);
        self.changed.notify_waiters();
    }

    /// Waits until an entry may be written to the target now, or the area is closed.
    pub(super) async fn wait_work(&self, under_way: usize) {
        self.changed.wait_until(|| self.has_work(under_way)).await;
    }

    /// Waits until an entry may be written to the spill file now, or the area is closed.
    pub(super) async fn wait_spill_work(&self, under_way: usize) {
        self.changed.wait_until(|| self.has_spill_work(under_way)).await;
    }

    /// Waits until the tasks have ended.
    pub(super) async fn wait_no_task(&self) {
        let has_ended = || {
            let state = self.state();
            !state.has_writer && !state.has_spiller
        };
        self.changed.wait_until(has_ended).await;
    }
}

impl State {
    /// Keeps an entry whose write failed, to be tried again later.
    fn fail(&mut self, start: u64, error: Error, now: Duration) {
        let back_off = |attempts: u32| {
            (FIRST_BACK_OFF * 2_u32.saturating_pow(attempts.min(10))).min(LONGEST_BACK_OFF)
        };
        let len = self.entries.update(start, |entry| {
            entry.work = Work::Idle;
            entry.not_before = now + back_off(entry.attempts);
            entry.attempts += 1;
            entry.len()
        });
        let Some(len) = len else { return };
        self.failing = Some(error.duplicate());
        self.failures += 1;
        self.failures_in_row = self.failures_in_row.saturating_add(1);
        if let Some(many) = self.failures_in_row.checked_sub(MANY_FAILURES) {
            self.retry_at = now + back_off(many);
        }
        self.failure.get_or_insert(StageFailure { offset: start, len, error });
    }
}

/// Why a snapshot breaks at the limit.
fn full(spill: Option<&Error>) -> Error {
    match spill {
        Some(error) => error.duplicate().context("the staging area is full, and cannot be spilled"),
        None => Error::new(ErrorKind::NoMemory, "the staging area is full"),
    }
}

/// A run whose old data is being read: no other write reads it too.
pub(super) struct Staging<'s> {
    stage: &'s Stage,
    pub(super) range: Range<u64>,
}

impl Staging<'_> {
    /// Leaves what lies behind `end` to others.
    pub(super) fn shrink(&mut self, end: u64) {
        let mut state = self.stage.state();
        let start = self.range.start;
        if let Some(range) = state.being_staged.iter_mut().find(|range| range.start == start) {
            range.end = range.end.min(end);
            self.range.end = range.end;
        }
    }
}

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        let start = self.range.start;
        self.stage.state().being_staged.retain(|range| range.start != start);
        self.stage.changed.notify_waiters();
    }
}
