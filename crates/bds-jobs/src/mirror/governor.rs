//! The governor of a mirror: compares how fast guest writes mark and how fast the job copies, and
//! slows guest writes down until the copy wins.
//!
//! ```text
//! nothing ─► delay each write by 1 ms ─► 2 ms ─► … ─► the longest stall ─► synced writes
//! ```
//!
//! Arithmetic on one sample a window; no clock of its own. Each step needs several windows in which
//! the copy does not win, so a burst changes nothing. Synced writes mark nothing, so the last step
//! always wins: the governor bounds the time to a pivot, whatever the guest does.

use std::time::Duration;

/// Windows in which the copy does not win before the next step.
const PATIENCE: u32 = 3;
/// Windows in which little or nothing is left before a step back.
const RELIEF: u32 = 10;
const FIRST_DELAY: Duration = Duration::from_millis(1);

/// What happened in one window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) elapsed: Duration,
    /// Bytes copied.
    pub(super) copied: u64,
    /// Bytes that are to be copied or being copied at its end.
    pub(super) left: u64,
}

/// What to do with guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Delay each by so much.
    Delay(Duration),
    /// Write them to both sides.
    Synced,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Governor {
    max_stall: Option<Duration>,
    left_before: u64,
    /// Bytes copied a second, over the last windows.
    rate: u64,
    lost_windows: u32,
    won_windows: u32,
    delay: Duration,
    is_synced: bool,
}

impl Governor {
    pub(super) fn new(max_stall: Option<Duration>) -> Self {
        Self {
            max_stall,
            left_before: 0,
            rate: 0,
            lost_windows: 0,
            won_windows: 0,
            delay: Duration::ZERO,
            is_synced: false,
        }
    }

    /// Begins a series of windows.
    pub(super) fn begin(&mut self, left: u64) {
        self.left_before = left;
    }

    /// Takes one window into account.
    pub(super) fn advise(&mut self, sample: &Sample) -> Advice {
        let marked = (sample.left + sample.copied).saturating_sub(self.left_before);
        self.left_before = sample.left;
        self.rate = average(self.rate, per_second(sample));
        let Some(max_stall) = self.max_stall else { return Advice::Delay(Duration::ZERO) };
        if self.is_synced {
            return Advice::Synced;
        }
        if self.is_close(sample, max_stall) {
            return self.won();
        }
        self.won_windows = 0;
        // At three quarters of the copy's speed the rest still shrinks, but it takes for ever.
        if marked / 3 <= sample.copied / 4 {
            self.lost_windows = 0;
            return Advice::Delay(self.delay);
        }
        self.lost_windows += 1;
        if self.lost_windows < PATIENCE {
            return Advice::Delay(self.delay);
        }
        self.lost_windows = 0;
        self.delay = (self.delay * 2).max(FIRST_DELAY);
        self.is_synced = self.delay > max_stall;
        if self.is_synced { Advice::Synced } else { Advice::Delay(self.delay) }
    }

    /// Takes a window into account at whose end little or nothing was left: after some of them the
    /// delay is halved, and ends below a millisecond.
    pub(super) fn won(&mut self) -> Advice {
        self.lost_windows = 0;
        if self.is_synced {
            return Advice::Synced;
        }
        self.won_windows += 1;
        if self.won_windows >= RELIEF {
            self.won_windows = 0;
            let half = self.delay / 2;
            self.delay = if half < FIRST_DELAY { Duration::ZERO } else { half };
        }
        Advice::Delay(self.delay)
    }

    /// True if the rest is copied in half of the longest stall, which leaves the other half for the
    /// flush; `default` is the longest stall if none was given.
    pub(super) fn is_close(&self, sample: &Sample, default: Duration) -> bool {
        let stall = self.max_stall.unwrap_or(default);
        let budget_us = u64::try_from(stall.as_micros() / 2).unwrap_or(u64::MAX);
        let budget = u128::from(self.rate) * u128::from(budget_us) / 1_000_000;
        u128::from(sample.left) <= budget
    }
}

fn per_second(sample: &Sample) -> u64 {
    let us = sample.elapsed.as_micros().max(1);
    u64::try_from(u128::from(sample.copied) * 1_000_000 / us).unwrap_or(u64::MAX)
}

/// Half the new value, half the history.
fn average(before: u64, now: u64) -> u64 {
    if before == 0 { now } else { before / 2 + now / 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest of `depth` writes in flight that take `write_us` each, against a copy of `rate`
    /// bytes a second. Returns the windows until the rest is small, and the last advice.
    const DISK_LEN: u64 = 256 << 20;

    fn converge(stall_ms: u64, rate: u64, depth: u64, write_us: u64) -> (u32, Advice) {
        let stall = Duration::from_millis(stall_ms);
        let mut governor = Governor::new(Some(stall));
        let mut left = DISK_LEN;
        governor.begin(left);
        let mut advice = Advice::Delay(Duration::ZERO);
        for window in 0..10_000 {
            let marked = match advice {
                Advice::Synced => 0,
                Advice::Delay(delay) => {
                    let each = write_us + u64::try_from(delay.as_micros()).unwrap();
                    100_000 / each * depth * 65536
                }
            };
            let copied = (rate / 10).min(left + marked);
            // No more is dirty than the disk has.
            left = DISK_LEN.min(left + marked - copied);
            let sample = Sample { elapsed: Duration::from_millis(100), copied, left };
            advice = governor.advise(&sample);
            if governor.is_close(&sample, stall) {
                return (window, advice);
            }
        }
        panic!("never close: {governor:?}");
    }

    #[test]
    fn it_always_converges_and_slows_down_only_as_far_as_needed() {
        // An idle guest is not slowed down.
        assert_eq!(converge(50, 100 << 20, 1, 1_000_000).1, Advice::Delay(Duration::ZERO));
        // Eight writes in flight, three times as fast as the copy.
        let (windows, advice) = converge(50, 100 << 20, 8, 1_700);
        assert!(windows < 200, "{windows}");
        assert!(matches!(advice, Advice::Delay(delay) if !delay.is_zero()), "{advice:?}");
        // So many in flight that no delay below the stall suffices.
        assert_eq!(converge(50, 10 << 20, 4096, 100).1, Advice::Synced);
        for depth in [1, 2, 7, 64, 1000] {
            for rate in [1 << 20, 50 << 20, 1 << 30] {
                converge(50, rate, depth, 100);
            }
        }
    }

    #[test]
    fn the_delay_ends_once_it_is_not_needed() {
        let mut governor = Governor::new(Some(Duration::from_millis(50)));
        governor.begin(0);
        let (mut left, mut last) = (0, Advice::Delay(Duration::ZERO));
        for _ in 0..12 {
            left += 64 << 20;
            last = governor.advise(&Sample {
                elapsed: Duration::from_millis(100),
                copied: 1 << 20,
                left,
            });
        }
        assert_eq!(last, Advice::Delay(Duration::from_millis(8)));
        let calm = (0..100).map(|_| governor.won()).collect::<Vec<_>>();
        assert_eq!(calm[9], Advice::Delay(Duration::from_millis(4)));
        assert_eq!(calm[99], Advice::Delay(Duration::ZERO));
    }

    #[test]
    fn without_a_limit_nothing_is_delayed() {
        let mut governor = Governor::new(None);
        governor.begin(0);
        for left in 1..100 {
            let sample =
                Sample { elapsed: Duration::from_millis(100), copied: 1, left: left << 20 };
            assert_eq!(governor.advise(&sample), Advice::Delay(Duration::ZERO));
        }
    }

    #[test]
    fn a_burst_changes_nothing() {
        let mut governor = Governor::new(Some(Duration::from_millis(50)));
        governor.begin(1 << 30);
        let mut left = 1 << 30;
        for window in 0..50_u64 {
            let marked = if window % 4 == 0 { 64 << 20 } else { 0 };
            let copied = 10 << 20;
            // No more is dirty than the disk has.
            left = DISK_LEN.min(left + marked - copied);
            let sample = Sample { elapsed: Duration::from_millis(100), copied, left };
            assert_eq!(governor.advise(&sample), Advice::Delay(Duration::ZERO));
        }
    }
}
