//! Rates of a job: how fast it copies, how fast new work comes up, and how long it still takes.
//!
//! Averages over the last seconds. A job's total is what was done plus what remains, so its growth
//! is the work that came up: bytes that a guest has written again.

use std::collections::VecDeque;
use std::time::Duration;

/// Samples that are older than this do not count, but for the newest of them.
const WINDOW: Duration = Duration::from_secs(3);

/// Progress at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    done: u64,
    total: u64,
}

/// Rates in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rates {
    /// Bytes copied a second.
    pub(crate) copied: u64,
    /// Bytes a second that have to be copied again.
    pub(crate) dirtied: u64,
    /// Whole seconds left; `None`: not known, or work comes up as fast as it is done.
    pub(crate) seconds_left: Option<u64>,
}

/// Computes [`Rates`] from samples.
#[derive(Debug, Default)]
pub(crate) struct Meter(VecDeque<Sample>);

impl Meter {
    /// Adds what was done of how much at a moment, and returns the rates up to it. Moments do not
    /// go back.
    pub(crate) fn add(&mut self, at: Duration, done: u64, total: u64) -> Rates {
        self.0.push_back(Sample { at, done, total });
        while self.0.get(1).is_some_and(|second| at.saturating_sub(second.at) >= WINDOW) {
            self.0.pop_front();
        }
        let Some(first) = self.0.front() else { return Rates::default() };
        let elapsed = at.saturating_sub(first.at);
        let copied = per_second(done.saturating_sub(first.done), elapsed);
        // A job begins with a total of nothing: that it becomes known dirties nothing.
        let dirtied = match first.total {
            0 => 0,
            known => per_second(total.saturating_sub(known), elapsed),
        };
        let left = total.saturating_sub(done);
        let seconds_left = match copied.checked_sub(dirtied) {
            _ if left == 0 => Some(0),
            None | Some(0) => None,
            Some(net) => Some(left.div_ceil(net)),
        };
        Rates { copied, dirtied, seconds_left }
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / elapsed.as_nanos().max(1);
    if elapsed.is_zero() { 0 } else { u64::try_from(rate).unwrap_or(u64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_last_seconds() {
        let mut meter = Meter::default();
        let mut add = |ms, done, total| meter.add(Duration::from_millis(ms), done, total);
        let rates = |copied, dirtied, seconds_left| Rates { copied, dirtied, seconds_left };
        assert_eq!(add(0, 0, 0), rates(0, 0, Some(0)));
        assert_eq!(add(500, 0, 1000), rates(0, 0, None));
        assert_eq!(add(1000, 100, 1000), rates(100, 0, Some(9)));
        // The guest writes 50 bytes in the second that 200 are copied in.
        assert_eq!(add(3500, 300, 1050), rates(100, 16, Some(9)));
        assert_eq!(add(4500, 300, 1250), rates(57, 71, None));
        assert_eq!(add(9000, 1250, 1250), rates(211, 0, Some(0)));
    }

    #[test]
    fn rates_of_large_numbers_do_not_overflow() {
        let mut meter = Meter::default();
        meter.add(Duration::ZERO, 0, u64::MAX);
        let rates = meter.add(Duration::from_nanos(1), u64::MAX - 1, u64::MAX);
        assert_eq!((rates.copied, rates.seconds_left), (u64::MAX, Some(1)));
    }
}
