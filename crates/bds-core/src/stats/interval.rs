//! Latencies of the recent past: minimum, maximum, average over intervals.
//!
//! Two windows of the interval's length run half a length apart, and the older one answers; so an
//! answer covers at least half an interval and at most a whole one, and no answer is empty because
//! a window just ended.

use std::time::Duration;

use super::operation::{OPERATIONS, Operation, nanos};
use crate::error::{Error, ErrorKind, Result};

/// Latencies of one operation in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Spread {
    /// Number of requests.
    pub count: u64,
    /// The shortest; zero if there was none, as the next ones.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
    /// The average.
    pub avg: Duration,
    /// Average number in flight at once: their total time over the window's.
    pub queue_depth: f64,
}

/// Latencies of one interval.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct IntervalStats {
    /// Its length.
    pub length: Duration,
    spreads: [Spread; OPERATIONS],
}

impl IntervalStats {
    /// Latencies of one operation.
    pub fn of(&self, operation: Operation) -> Spread {
        self.spreads[operation as usize]
    }

    /// Latencies of several operations together.
    pub(super) fn of_all(&self, operations: &[Operation]) -> Spread {
        let mut all = Spread::default();
        let mut sum = Duration::ZERO;
        for spread in operations.iter().map(|operation| self.of(*operation)) {
            if spread.count == 0 {
                continue;
            }
            all.min = if all.count == 0 { spread.min } else { all.min.min(spread.min) };
            all.max = all.max.max(spread.max);
            all.count += spread.count;
            all.queue_depth += spread.queue_depth;
            sum += spread.avg * u32::try_from(spread.count).unwrap_or(u32::MAX);
        }
        all.avg = average(sum, all.count);
        all
    }
}

fn average(sum: Duration, count: u64) -> Duration {
    Duration::from_nanos(nanos(sum).checked_div(count).unwrap_or(0))
}

#[derive(Clone, Copy, Default)]
struct Sum {
    count: u64,
    min: Duration,
    max: Duration,
    total: Duration,
}

impl Sum {
    fn add(&mut self, took: Duration) {
        self.min = if self.count == 0 { took } else { self.min.min(took) };
        self.max = self.max.max(took);
        self.count += 1;
        self.total += took;
    }
}

#[derive(Clone, Copy, Default)]
struct Window {
    begun: Duration,
    sums: [Sum; OPERATIONS],
}

/// One interval, being measured.
pub(super) struct Interval {
    length: Duration,
    /// The older one first.
    windows: [Window; 2],
}

impl Interval {
    pub(super) fn new(length: Duration, now: Duration) -> Result<Self> {
        if length.is_zero() {
            let words = "an interval is longer than zero";
            return Err(Error::new(ErrorKind::InvalidInput, words));
        }
        let older = Window { begun: now, ..Window::default() };
        let younger = Window { begun: now + length / 2, ..Window::default() };
        Ok(Self { length, windows: [older, younger] })
    }

    pub(super) fn length(&self) -> Duration {
        self.length
    }

    pub(super) fn count(&mut self, operation: Operation, took: Duration, now: Duration) {
        self.roll(now);
        for window in self.windows.iter_mut().filter(|window| window.begun <= now) {
            window.sums[operation as usize].add(took);
        }
    }

    pub(super) fn view(&mut self, now: Duration) -> IntervalStats {
        self.roll(now);
        let older = &self.windows[0];
        let covered = now.saturating_sub(older.begun).as_secs_f64();
        let spreads = older.sums.map(|sum| Spread {
            count: sum.count,
            min: sum.min,
            max: sum.max,
            avg: average(sum.total, sum.count),
            queue_depth: match covered > 0.0 {
                true => sum.total.as_secs_f64() / covered,
                false => 0.0,
            },
        });
        IntervalStats { length: self.length, spreads }
    }

    /// Ends windows that are over.
    fn roll(&mut self, now: Duration) {
        let [older, younger] = self.windows;
        if now >= younger.begun + self.length {
            // Both are over: no request or query for that long.
            let older = Window { begun: now, ..Window::default() };
            let younger = Window { begun: now + self.length / 2, ..Window::default() };
            self.windows = [older, younger];
        } else if now >= older.begun + self.length {
            let next = Window { begun: older.begun + self.length, ..Window::default() };
            self.windows = [younger, next];
        }
    }
}
