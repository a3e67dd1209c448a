//! Statistics of a backend: requests, bytes, failures; latencies if enabled.
//!
//! Every request on every thread writes them, so counters are spread over shards; reading sums the
//! shards.
//!
//! **The clock is read only if latencies are enabled** ([`Stats::enable_latencies`],
//! [`Stats::set_histogram`], [`Stats::add_interval`]): two readings take longer than a request that
//! the page cache answers. Until then total times are zero and there is no idle time.

mod histogram;
mod interval;
mod json;
mod operation;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bds_refcount::{own_shard, shard_count};
use crossbeam::utils::CachePadded;

use crate::error::Result;
use histogram::Bins;
pub use histogram::Histogram;
use interval::Interval;
pub use interval::{IntervalStats, Spread};
pub use operation::Operation;
use operation::{OPERATIONS, nanos};

/// Powers of two of microseconds: below 1, 2, 4 … 2^30, and the rest.
const BUCKETS: usize = 32;

/// How a request ended, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Also dropped before its end.
    Failed,
    /// Refused before it reached a medium, because its arguments were invalid.
    Invalid,
}

/// Totals of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Totals {
    /// Requests that ended, successfully or not.
    pub ops: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Ended with an error, or dropped before their end.
    pub failed: u64,
    /// Refused as invalid: past the end, too long. Not counted as failed.
    pub invalid: u64,
    /// Requests that a device merged into others before they came here.
    pub merged: u64,
    /// Time of those that succeeded, and of failed ones if [`Stats::account_failed`] is on.
    /// Includes waiting at gates and for `resume`.
    pub total_time: Duration,
}

impl Totals {
    /// Requests that succeeded.
    pub fn done(&self) -> u64 {
        self.ops.saturating_sub(self.failed).saturating_sub(self.invalid)
    }
}

#[derive(Default)]
struct Counters {
    ops: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    merged: AtomicU64,
    time_ns: AtomicU64,
}

#[derive(Default)]
struct Shard {
    of: [Counters; OPERATIONS],
}

/// Statistics of one backend.
pub struct Stats {
    shards: Box<[CachePadded<Shard>]>,
    is_timed: AtomicBool,
    counts_failed: AtomicBool,
    counts_invalid: AtomicBool,
    /// End of the last request, in nanoseconds of the clock; 0 for never.
    last_end_ns: AtomicU64,
    latencies: Box<[[AtomicU64; BUCKETS]; OPERATIONS]>,
    histograms: [ArcSwapOption<Bins>; OPERATIONS],
    intervals: Mutex<Vec<Interval>>,
}

impl std::fmt::Debug for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stats").field("is_timed", &self.is_timed).finish_non_exhaustive()
    }
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..shard_count()).map(|_| CachePadded::default()).collect(),
            is_timed: AtomicBool::new(false),
            counts_failed: AtomicBool::new(true),
            counts_invalid: AtomicBool::new(true),
            last_end_ns: AtomicU64::new(0),
            latencies: Box::default(),
            histograms: Default::default(),
            intervals: Mutex::default(),
        }
    }

    /// Totals of one operation. A snapshot while requests are in flight.
    pub fn totals(&self, operation: Operation) -> Totals {
        let mut totals = Totals::default();
        let mut time_ns = 0;
        for shard in &self.shards {
            let of = &shard.of[operation as usize];
            totals.ops += of.ops.load(Ordering::Relaxed);
            totals.bytes += of.bytes.load(Ordering::Relaxed);
            totals.failed += of.failed.load(Ordering::Relaxed);
            totals.invalid += of.invalid.load(Ordering::Relaxed);
            totals.merged += of.merged.load(Ordering::Relaxed);
            time_ns += of.time_ns.load(Ordering::Relaxed);
        }
        totals.total_time = Duration::from_nanos(time_ns);
        totals
    }

    /// Counts `count` requests that a device merged into others.
    pub fn merged(&self, operation: Operation, count: u64) {
        self.own().of[operation as usize].merged.fetch_add(count, Ordering::Relaxed);
    }

    /// Enables latencies from now on.
    pub fn enable_latencies(&self) {
        self.is_timed.store(true, Ordering::Relaxed);
    }

    /// Sets whether failed requests count for times and end an idle time: QEMU's
    /// `stats-account-failed`. On by default.
    pub fn account_failed(&self, is_on: bool) {
        self.counts_failed.store(is_on, Ordering::Relaxed);
    }

    /// Sets whether refused requests end an idle time: QEMU's `stats-account-invalid`. On by
    /// default.
    pub fn account_invalid(&self, is_on: bool) {
        self.counts_invalid.store(is_on, Ordering::Relaxed);
    }

    /// Number of requests that took less than 1, 2, 4 … microseconds (each bucket without the ones
    /// before).
    pub fn latencies(&self, operation: Operation) -> [u64; BUCKETS] {
        let of = &self.latencies[operation as usize];
        std::array::from_fn(|i| of[i].load(Ordering::Relaxed))
    }

    /// Sets a histogram of this operation's latencies with these boundaries, in nanoseconds: QEMU's
    /// `block-latency-histogram-set`. The first bin ends below the first boundary, the last begins
    /// at the last one. Starts from zero, and enables latencies. An empty list removes the
    /// histogram.
    ///
    /// # Errors
    /// `InvalidInput`: the boundaries do not rise, or the first is zero. Nothing has changed.
    pub fn set_histogram(&self, operation: Operation, boundaries_ns: &[u64]) -> Result<()> {
        let bins = match boundaries_ns {
            [] => None,
            boundaries => Some(Bins::new(boundaries)?.into()),
        };
        if bins.is_some() {
            self.enable_latencies();
        }
        self.histograms[operation as usize].store(bins);
        Ok(())
    }

    /// The histogram, if one was set.
    pub fn histogram(&self, operation: Operation) -> Option<Histogram> {
        self.histograms[operation as usize].load().as_ref().map(|bins| bins.view())
    }

    /// Adds an interval: minimal, maximal and average latency over windows of this length: QEMU's
    /// `stats-intervals`. Enables latencies. The same length twice is one interval.
    ///
    /// # Errors
    /// `InvalidInput`: zero.
    pub fn add_interval(&self, length: Duration) -> Result<()> {
        let interval = Interval::new(length, bds_io::now())?;
        let mut intervals = self.lock_intervals();
        if intervals.iter().all(|known| known.length() != length) {
            intervals.push(interval);
        }
        self.enable_latencies();
        Ok(())
    }

    /// Latencies of the recent past, one entry per interval.
    pub fn intervals(&self) -> Vec<IntervalStats> {
        let now = bds_io::now();
        self.lock_intervals().iter_mut().map(|interval| interval.view(now)).collect()
    }

    /// Time since the last request ended. `None`: none did since latencies were enabled.
    pub fn idle_time(&self) -> Option<Duration> {
        let last = self.last_end_ns.load(Ordering::Relaxed);
        (last != 0).then(|| bds_io::now().saturating_sub(Duration::from_nanos(last)))
    }

    fn lock_intervals(&self) -> MutexGuard<'_, Vec<Interval>> {
        self.intervals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn own(&self) -> &Shard {
        &self.shards[own_shard(self.shards.len())]
    }

    /// Reads the clock at the begin of a request, if latencies are enabled.
    #[inline]
    pub(crate) fn clock(&self) -> Option<Duration> {
        self.is_timed.load(Ordering::Relaxed).then(bds_io::now)
    }

    /// Counts a request that ended.
    #[inline]
    pub(crate) fn ended(
        &self,
        operation: Operation,
        len: u64,
        outcome: Outcome,
        began: Option<Duration>,
    ) {
        let of = &self.own().of[operation as usize];
        of.ops.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Outcome::Done => of.bytes.fetch_add(len, Ordering::Relaxed),
            Outcome::Failed => of.failed.fetch_add(1, Ordering::Relaxed),
            Outcome::Invalid => of.invalid.fetch_add(1, Ordering::Relaxed),
        };
        if let Some(began) = began {
            self.took(operation, outcome, began);
        }
    }

    #[cold]
    fn took(&self, operation: Operation, outcome: Outcome, began: Duration) {
        let now = bds_io::now();
        let counts = match outcome {
            Outcome::Done => true,
            Outcome::Failed => self.counts_failed.load(Ordering::Relaxed),
            Outcome::Invalid => self.counts_invalid.load(Ordering::Relaxed),
        };
        if !counts {
            return;
        }
        self.last_end_ns.fetch_max(nanos(now).max(1), Ordering::Relaxed);
        if outcome == Outcome::Invalid {
            return;
        }
        let took = now.saturating_sub(began);
        let at = operation as usize;
        self.own().of[at].time_ns.fetch_add(nanos(took), Ordering::Relaxed);
        let bucket = (u128::BITS - took.as_micros().leading_zeros()) as usize;
        self.latencies[at][bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        if let Some(bins) = &*self.histograms[at].load() {
            bins.count(nanos(took));
        }
        self.lock_intervals().iter_mut().for_each(|interval| interval.count(operation, took, now));
    }

    /// Begins a request. Dropped before its end, it counts as failed.
    pub(crate) fn begin(&self, operation: Operation, len: u64) -> Pending<'_> {
        Pending { stats: self, operation, len, began: self.clock(), is_over: false }
    }
}

/// A request in flight, counted when it ends.
pub(crate) struct Pending<'a> {
    stats: &'a Stats,
    operation: Operation,
    len: u64,
    began: Option<Duration>,
    is_over: bool,
}

impl Pending<'_> {
    /// Counts its end; later calls do nothing.
    pub(crate) fn ended(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.is_over, true) {
            self.stats.ended(self.operation, self.len, outcome, self.began);
        }
    }

    /// Counts its end by the result, and returns that.
    pub(crate) fn end<T>(mut self, result: Result<T>) -> Result<T> {
        self.ended(if result.is_ok() { Outcome::Done } else { Outcome::Failed });
        result
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.ended(Outcome::Failed);
    }
}

#[cfg(test)]
mod tests;
