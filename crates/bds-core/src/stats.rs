//! Counts per backend: what passed, how many bytes, what failed. Latencies only if asked for.
//!
//! Written by every request on every thread, so counters are spread over shards; read rarely, by summing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::error::Result;
use crate::traffic::{shard_count, thread_number};

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Read,
    /// Writes, compressed ones too.
    Write,
    /// Zero writes.
    Zero,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

const OPERATIONS: usize = 5;
/// Powers of two of microseconds: below 1, 2, 4 … 2^30, and the rest.
const BUCKETS: usize = 32;

/// Totals of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Ended, well or not.
    pub ops: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Ended with an error, or dropped before their end.
    pub failed: u64,
    /// Requests a device merged into another before it came here.
    pub merged: u64,
}

#[derive(Default)]
struct Counters {
    ops: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    merged: AtomicU64,
}

#[derive(Default)]
struct Shard {
    begun: AtomicU64,
    ended: AtomicU64,
    of: [Counters; OPERATIONS],
}

/// Counts of one backend.
pub struct Stats {
    shards: Box<[CachePadded<Shard>]>,
    has_latencies: AtomicBool,
    latencies: Box<[[AtomicU64; BUCKETS]; OPERATIONS]>,
}

impl std::fmt::Debug for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stats").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl Stats {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..shard_count()).map(|_| CachePadded::default()).collect(),
            has_latencies: AtomicBool::new(false),
            latencies: Box::default(),
        }
    }

    /// Totals of one operation. While requests are under way, a moment's view.
    pub fn totals(&self, operation: Operation) -> Totals {
        let mut totals = Totals::default();
        for shard in &self.shards {
            let of = &shard.of[operation as usize];
            totals.ops += of.ops.load(Ordering::Relaxed);
            totals.bytes += of.bytes.load(Ordering::Relaxed);
            totals.failed += of.failed.load(Ordering::Relaxed);
            totals.merged += of.merged.load(Ordering::Relaxed);
        }
        totals
    }

    /// Requests begun and not ended. Those that need no waiting are never seen here.
    pub fn in_flight(&self) -> u64 {
        let sum = |of: fn(&Shard) -> &AtomicU64| {
            self.shards.iter().map(|s| of(s).load(Ordering::SeqCst)).fold(0, u64::wrapping_add)
        };
        // Ends first: a request that ends in between is counted as under way, never as less than none.
        let ended = sum(|s| &s.ended);
        sum(|s| &s.begun).wrapping_sub(ended)
    }

    /// A device merged `count` requests into others.
    pub fn merged(&self, operation: Operation, count: u64) {
        self.own().of[operation as usize].merged.fetch_add(count, Ordering::Relaxed);
    }

    /// From now on, measure how long requests take.
    pub fn enable_latencies(&self) {
        self.has_latencies.store(true, Ordering::Relaxed);
    }

    /// How many requests took less than 1, 2, 4 … microseconds (each bucket without the ones before).
    pub fn latencies(&self, operation: Operation) -> [u64; BUCKETS] {
        let of = &self.latencies[operation as usize];
        std::array::from_fn(|i| of[i].load(Ordering::Relaxed))
    }

    fn own(&self) -> &Shard {
        &self.shards[thread_number() & (self.shards.len() - 1)]
    }

    /// Counts a request that ended.
    #[inline]
    pub(crate) fn ended(&self, operation: Operation, len: u64, is_ok: bool) {
        let of = &self.own().of[operation as usize];
        of.ops.fetch_add(1, Ordering::Relaxed);
        if is_ok {
            of.bytes.fetch_add(len, Ordering::Relaxed);
        } else {
            of.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a request in; it counts itself out, as failed unless it says otherwise.
    pub(crate) fn begin(&self, operation: Operation, len: u64) -> Pending<'_> {
        self.own().begun.fetch_add(1, Ordering::SeqCst);
        let began = self.has_latencies.load(Ordering::Relaxed).then(bds_io::now);
        Pending { stats: self, operation, len, is_ok: false, began }
    }
}

/// A request under way.
pub(crate) struct Pending<'a> {
    stats: &'a Stats,
    operation: Operation,
    len: u64,
    is_ok: bool,
    began: Option<Duration>,
}

impl Pending<'_> {
    /// Passes the result on, having looked at it.
    pub(crate) fn end<T>(mut self, result: Result<T>) -> Result<T> {
        self.is_ok = result.is_ok();
        result
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(began) = self.began {
            let micros = bds_io::now().saturating_sub(began).as_micros();
            let bucket = (u128::BITS - micros.leading_zeros()) as usize;
            let of = &self.stats.latencies[self.operation as usize];
            of[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        }
        self.stats.ended(self.operation, self.len, self.is_ok);
        self.stats.own().ended.fetch_add(1, Ordering::SeqCst);
    }
}
