//! The staging area: old data in memory, which a task writes to the target behind the guest.
//!
//! ```text
//! guest write ─► reserve space ─► read old data ─► put ─► the write goes on
//!                                                  └─► task: write to the target ─► claim done, space free
//! ```
//!
//! An entry holds the claim of its range until the target has it: no other copy of the range begins
//! meanwhile, and a snapshot reader finds the data here. An entry whose write failed stays and is
//! tried again after a while.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bds_core::Error;
use bds_core::copy::Claim;
use bds_io::IoVec;
use bds_io::sync::Notify;

/// First wait after a failed write, doubled after each further one.
const FIRST_BACK_OFF: Duration = Duration::from_millis(10);
/// Longest wait.
const LONGEST_BACK_OFF: Duration = Duration::from_secs(1);

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

/// Old data of one claim.
pub(super) struct Entry {
    claim: Claim<'static>,
    /// `None`: zeros.
    data: Option<IoVec>,
    is_being_written: bool,
    attempts: u32,
    /// Not tried again before this moment.
    not_before: Duration,
}

/// One entry to be written.
pub(super) struct ToWrite {
    pub(super) range: Range<u64>,
    pub(super) data: Option<IoVec>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<u64, Entry>,
    /// Bytes of the entries, and of those to come for which space is reserved.
    bytes: u64,
    has_writer: bool,
    is_closed: bool,
    /// Taken by the job, if there is one.
    failure: Option<StageFailure>,
    /// The last write failed.
    failing: Option<Error>,
    /// Writes that failed so far.
    failures: u64,
    written_bytes: u64,
    writing_time: Duration,
    writing_since: Duration,
}

impl State {
    /// Counts the time since the last call as time in which the target was written.
    fn account_time(&mut self, now: Duration) {
        let time = now.saturating_sub(self.writing_since);
        self.writing_time += time;
        self.writing_since = now;
    }
}

/// Staged data up to a limit.
pub(super) struct Stage {
    /// Bytes; 0: no staging.
    pub(super) limit: u64,
    pub(super) policy: AtLimit,
    state: Mutex<State>,
    /// Notified when space, entries or the writer change.
    changed: Notify,
}

/// What [`Stage::reserve`] found.
pub(super) enum Space {
    Reserved,
    /// The policy breaks the snapshot.
    Full,
    /// The target fails, so that waiting for space is of no use.
    Failing(Error),
}

/// What the writer does next.
pub(super) enum Next {
    Write(ToWrite),
    /// All entries are being written, or may not be tried before this moment.
    Wait(Option<Duration>),
    /// There are no entries: the writer has ended.
    End,
}

impl Stage {
    pub(super) fn new(limit: u64, policy: AtLimit) -> Self {
        Self { limit, policy, state: Mutex::default(), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use.
    pub(super) fn bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Waits for space for `len` bytes. One entry may always go in, however long. `fails`: a target
    /// that fails ends the wait, but not before what waits has been tried once more.
    pub(super) async fn reserve(&self, len: u64, fails: bool) -> Space {
        let mut failures_before = None;
        let try_reserve = || {
            let mut state = self.state();
            if state.bytes == 0 || state.bytes + len <= self.limit {
                state.bytes += len;
                return Some(Space::Reserved);
            }
            if self.policy == AtLimit::BreakSnapshot {
                return Some(Space::Full);
            }
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

    /// Gives back space that was not used.
    pub(super) fn unreserve(&self, len: u64) {
        {
            let mut state = self.state();
            state.bytes = state.bytes.saturating_sub(len);
        }
        self.changed.notify_waiters();
    }

    /// The delay of a write that must be kept: from half of the limit on the time the target needs
    /// for `len` bytes, times two at the limit.
    pub(super) fn delay(&self, len: u64) -> Duration {
        let state = self.state();
        if self.policy != AtLimit::Throttle || state.written_bytes == 0 {
            return Duration::ZERO;
        }
        let over = state.bytes.saturating_sub(self.limit / 2);
        let per_byte = state.writing_time.as_nanos() / u128::from(state.written_bytes);
        let nanos = per_byte * u128::from(len) * u128::from(over) * 4;
        let nanos = nanos / u128::from(self.limit.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(LONGEST_BACK_OFF)
    }

    /// Puts in what space was reserved for. True: the caller starts the writer.
    pub(super) fn put(&self, claim: Claim<'static>, data: Option<IoVec>) -> bool {
        let mut state = self.state();
        if state.is_closed {
            return false;
        }
        let (attempts, not_before) = (0, Duration::ZERO);
        let start = claim.range().start;
        let entry = Entry { claim, data, is_being_written: false, attempts, not_before };
        state.entries.insert(start, entry);
        let starts = !std::mem::replace(&mut state.has_writer, true);
        if starts {
            state.writing_since = bds_io::now();
        }
        drop(state);
        self.changed.notify_waiters();
        starts
    }

    /// Copies what is staged at `offset` into the beginning of `iov`. The number of bytes that it
    /// holds from there on; 0: nothing.
    pub(super) fn read(&self, offset: u64, iov: &IoVec) -> usize {
        let state = self.state();
        let Some((start, entry)) = state.entries.range(..=offset).next_back() else { return 0 };
        let range = entry.claim.range();
        if !range.contains(&offset) {
            return 0;
        }
        let len = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(iov.len());
        match &entry.data {
            None => iov.fill(0..len, 0),
            Some(data) => {
                let at = usize::try_from(offset - start).unwrap_or(usize::MAX);
                let bytes = data.to_vec(at..at + len);
                iov.copy_from(0, &bytes);
            }
        }
        len
    }

    /// Where staged data at or behind `offset` begins and ends.
    pub(super) fn next(&self, offset: u64) -> Option<Range<u64>> {
        let state = self.state();
        let before = state.entries.range(..=offset).next_back().map(|(_, e)| e.claim.range());
        let here = before.filter(|range| range.contains(&offset));
        here.or_else(|| state.entries.range(offset..).next().map(|(_, e)| e.claim.range()))
    }

    /// The next entry to be written, for the writer. `is_idle`: it has no write under way.
    pub(super) fn take_next(&self, is_idle: bool) -> Next {
        let now = bds_io::now();
        let mut state = self.state();
        if state.is_closed || state.entries.is_empty() && is_idle {
            state.has_writer = false;
            state.account_time(now);
            drop(state);
            self.changed.notify_waiters();
            return Next::End;
        }
        let mut waiting: Option<Duration> = None;
        for entry in state.entries.values_mut().filter(|entry| !entry.is_being_written) {
            if entry.not_before > now {
                let wait = entry.not_before - now;
                waiting = Some(waiting.map_or(wait, |least| least.min(wait)));
                continue;
            }
            entry.is_being_written = true;
            let (range, data) = (entry.claim.range(), entry.data.clone());
            return Next::Write(ToWrite { range, data });
        }
        Next::Wait(waiting)
    }

    /// Ends a write of the writer.
    pub(super) fn written(&self, start: u64, result: Result<(), Error>) {
        let now = bds_io::now();
        let mut state = self.state();
        let done = match result {
            Ok(()) => {
                let Some(entry) = state.entries.remove(&start) else { return };
                let len = entry.claim.range().end - start;
                state.bytes = state.bytes.saturating_sub(len);
                state.failing = None;
                state.written_bytes += len;
                state.account_time(now);
                Some(entry.claim)
            }
            Err(error) => {
                let Some(entry) = state.entries.get_mut(&start) else { return };
                entry.is_being_written = false;
                let doubled = FIRST_BACK_OFF * 2_u32.saturating_pow(entry.attempts.min(10));
                entry.attempts += 1;
                entry.not_before = now + doubled.min(LONGEST_BACK_OFF);
                let len = entry.claim.range().end - start;
                state.failing = Some(error.duplicate());
                state.failures += 1;
                state.failure.get_or_insert(StageFailure { offset: start, len, error });
                None
            }
        };
        drop(state);
        if let Some(claim) = done {
            claim.done();
        }
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
        let mut waited = false;
        for entry in self.state().entries.values_mut() {
            waited |= std::mem::take(&mut entry.not_before) != Duration::ZERO;
        }
        if waited {
            self.changed.notify_waiters();
        }
    }

    /// Drops all entries, and takes no more: their claims count as failed.
    pub(super) fn close(&self) {
        let dropped = {
            let mut state = self.state();
            state.is_closed = true;
            state.bytes = 0;
            std::mem::take(&mut state.entries)
        };
        drop(dropped);
        self.changed.notify_waiters();
    }

    /// Waits until an entry may be written now, or the area is closed.
    pub(super) async fn wait_work(&self) {
        self.changed.wait_until(|| self.has_work()).await;
    }

    fn has_work(&self) -> bool {
        let now = bds_io::now();
        let state = self.state();
        state.is_closed
            || state.entries.values().any(|e| !e.is_being_written && e.not_before <= now)
    }

    /// Waits until the writer has ended.
    pub(super) async fn wait_no_writer(&self) {
        self.changed.wait_until(|| !self.state().has_writer).await;
    }
}
