//! Leaky buckets: compute how long the next request must wait so that a rate is kept.
//!
//! A request adds its cost to a bucket, and the bucket leaks at the allowed rate. As long as the
//! level is not above the bucket's capacity the next request may go, whatever its size; else it
//! waits until enough has leaked.
//!
//! ```text
//! without `max`   capacity avg/10: a tenth of a second of the rate may come at once
//! with `max`      capacity max · max_secs: bursts; if max_secs > 1 a second bucket leaks at `max` and holds max/10,
//!                 so that the burst itself is not faster than `max`
//! ```
//!
//! Arithmetic only: the caller passes the time. Levels are whole billionths of a unit, so that a
//! rate in units a second times nanoseconds is exact: no drift, and a wait ends at the first moment
//! at which the request may go.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// Largest rate and burst, in units (bytes or operations) a second; also largest burst in units.
pub const MAX_VALUE: u64 = 1_000_000_000_000_000;
/// Billionths of a unit in a unit; nanoseconds in a second.
const NANO: u128 = 1_000_000_000;

/// A rate and the bursts it allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units a second in the long run; 0: no limit.
    pub avg: u64,
    /// Units a second during a burst; 0: only a tenth of a second of `avg` may come at once.
    pub max: u64,
    /// How long a burst at `max` may last, in seconds, at least 1.
    pub max_secs: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self::UNLIMITED
    }
}

impl Rate {
    /// No limit.
    pub const UNLIMITED: Rate = Rate { avg: 0, max: 0, max_secs: 1 };

    /// `avg` units a second, without bursts.
    pub const fn per_second(avg: u64) -> Rate {
        Rate { avg, ..Rate::UNLIMITED }
    }

    /// True if there is a limit.
    pub fn is_limited(&self) -> bool {
        self.avg != 0
    }

    /// # Errors
    /// `InvalidInput` if the numbers contradict each other; `name` (as in "bps-total") says which
    /// they are.
    pub fn check(&self, name: &str) -> Result<()> {
        let wrong = |words: String| Err(Error::new(ErrorKind::InvalidInput, words));
        let Rate { avg, max, max_secs } = *self;
        if avg > MAX_VALUE || max > MAX_VALUE {
            return wrong(format!("'{name}' and '{name}-max' must be at most {MAX_VALUE}"));
        }
        if max != 0 && avg == 0 {
            return wrong(format!("'{name}-max' needs '{name}', the rate outside of bursts"));
        }
        if max != 0 && max < avg {
            return wrong(format!("'{name}-max' ({max}) must not be lower than '{name}' ({avg})"));
        }
        if max_secs == 0 {
            return wrong(format!("'{name}-max-length' must be at least 1 second"));
        }
        if max_secs > 1 && max == 0 {
            return wrong(format!("'{name}-max-length' needs '{name}-max', the rate of bursts"));
        }
        if max != 0 && max_secs > MAX_VALUE / max {
            let words = format!("'{name}-max-length' ({max_secs} s) is too long for '{name}-max'");
            return wrong(format!("{words}: a burst is at most {MAX_VALUE}"));
        }
        Ok(())
    }
}

/// A leaky bucket: the level of one rate.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: Rate,
    /// Billionths of a unit.
    level: u128,
    /// The same, leaking at `max`; stays 0 unless bursts are longer than a second.
    burst_level: u128,
    leaked_at: Duration,
}

impl Bucket {
    /// An empty bucket. The rate has been checked.
    pub fn new(rate: Rate) -> Self {
        Self { rate, level: 0, burst_level: 0, leaked_at: Duration::ZERO }
    }

    /// The rate it keeps.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Time from `now` until the next request may go; zero: at once. `now` is from any clock that
    /// does not go back.
    pub fn wait(&mut self, now: Duration) -> Duration {
        self.wait_behind(now, 0)
    }

    /// Adds the cost of a request of `units` that goes now, whether or not it should have waited.
    pub fn take(&mut self, now: Duration, units: u64) {
        self.leak(now);
        self.pour(u128::from(units) * NANO);
    }

    /// As [`Bucket::wait`], if other requests of this cost (in billionths) go first.
    fn wait_behind(&mut self, now: Duration, ahead_nano: u128) -> Duration {
        self.leak(now);
        let Rate { avg, max, max_secs } = self.rate;
        if avg == 0 {
            return Duration::ZERO;
        }
        let capacity =
            if max == 0 { nano(avg) / 10 } else { nano(max).saturating_mul(max_secs.into()) };
        let mut wait_ns = excess(self.level, ahead_nano, capacity).div_ceil(avg.into());
        if max_secs > 1 {
            let excess = excess(self.burst_level, ahead_nano, nano(max) / 10);
            wait_ns = wait_ns.max(excess.div_ceil(max.into()));
        }
        Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX))
    }

    fn leak(&mut self, now: Duration) {
        // A clock that was read on another thread may be a little behind.
        let passed = now.saturating_sub(self.leaked_at).as_nanos();
        self.leaked_at = self.leaked_at.max(now);
        let leaked = |rate: u64| u128::from(rate).saturating_mul(passed);
        self.level = self.level.saturating_sub(leaked(self.rate.avg));
        self.burst_level = self.burst_level.saturating_sub(leaked(self.rate.max));
    }

    fn pour(&mut self, amount_nano: u128) {
        if self.rate.avg == 0 {
            return;
        }
        self.level = self.level.saturating_add(amount_nano);
        if self.rate.max_secs > 1 {
            self.burst_level = self.burst_level.saturating_add(amount_nano);
        }
    }

    fn scoop(&mut self, amount_nano: u128) {
        self.level = self.level.saturating_sub(amount_nano);
        self.burst_level = self.burst_level.saturating_sub(amount_nano);
    }
}

fn nano(units: u64) -> u128 {
    u128::from(units) * NANO
}

fn excess(level: u128, ahead: u128, capacity: u128) -> u128 {
    level.saturating_add(ahead).saturating_sub(capacity)
}

/// Direction of a request. Zero writes and discards are writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// The six rates of a disk, and what counts as one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Bytes, both ways together.
    pub bps_total: Rate,
    /// Bytes read.
    pub bps_read: Rate,
    /// Bytes written.
    pub bps_write: Rate,
    /// BlockOps, both ways together.
    pub iops_total: Rate,
    /// Reads.
    pub iops_read: Rate,
    /// Writes.
    pub iops_write: Rate,
    /// A request longer than so many bytes counts as several operations (length / `iops_size`); 0:
    /// as one.
    pub iops_size: u64,
}

impl RateLimits {
    /// # Errors
    /// `InvalidInput`, naming the numbers that contradict each other.
    pub fn check(&self) -> Result<()> {
        let kinds = [
            ("bps", self.bps_total, self.bps_read, self.bps_write),
            ("iops", self.iops_total, self.iops_read, self.iops_write),
        ];
        for (kind, total, read, write) in kinds {
            total.check(&format!("{kind}-total"))?;
            read.check(&format!("{kind}-read"))?;
            write.check(&format!("{kind}-write"))?;
            if total.is_limited() && (read.is_limited() || write.is_limited()) {
                let words = format!(
                    "'{kind}-total' cannot stand beside '{kind}-read' or '{kind}-write': limit both \
                     together or each"
                );
                return Err(Error::new(ErrorKind::InvalidInput, words));
            }
        }
        let has_iops =
            [self.iops_total, self.iops_read, self.iops_write].iter().any(Rate::is_limited);
        if self.iops_size != 0 && !has_iops {
            let words = "'iops-size' needs a limit of operations: give an 'iops-…' too";
            return Err(Error::new(ErrorKind::InvalidInput, words));
        }
        Ok(())
    }

    /// The cost of a request of `len` bytes.
    pub fn cost(&self, len: u64) -> Cost {
        let ops_nano = if self.iops_size != 0 && len > self.iops_size {
            nano(len).div_ceil(self.iops_size.into())
        } else {
            NANO
        };
        Cost { bytes_nano: nano(len), ops_nano }
    }
}

/// Cost of requests, in bytes and operations. Costs can be added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    bytes_nano: u128,
    ops_nano: u128,
}

impl Cost {
    /// The sum of both.
    #[must_use]
    pub fn plus(self, other: Cost) -> Cost {
        Cost {
            bytes_nano: self.bytes_nano.saturating_add(other.bytes_nano),
            ops_nano: self.ops_nano.saturating_add(other.ops_nano),
        }
    }

    /// The difference, at least zero.
    #[must_use]
    pub fn minus(self, other: Cost) -> Cost {
        Cost {
            bytes_nano: self.bytes_nano.saturating_sub(other.bytes_nano),
            ops_nano: self.ops_nano.saturating_sub(other.ops_nano),
        }
    }
}

/// All buckets of a disk, or of a group of disks.
#[derive(Clone, Debug)]
pub struct Limiter {
    limits: RateLimits,
    /// Bytes: total, read, write; operations: the same.
    bytes: [Bucket; 3],
    ops: [Bucket; 3],
}

impl Limiter {
    /// Empty buckets.
    ///
    /// # Errors
    /// As [`RateLimits::check`].
    pub fn new(limits: RateLimits) -> Result<Self> {
        limits.check()?;
        let RateLimits {
            bps_total, bps_read, bps_write, iops_total, iops_read, iops_write, ..
        } = limits;
        Ok(Self {
            limits,
            bytes: [bps_total, bps_read, bps_write].map(Bucket::new),
            ops: [iops_total, iops_read, iops_write].map(Bucket::new),
        })
    }

    /// Its limits.
    pub fn limits(&self) -> RateLimits {
        self.limits
    }

    /// Time from `now` until the next request of this direction may go.
    pub fn wait(&mut self, now: Duration, direction: Direction) -> Duration {
        self.wait_behind(now, direction, Cost::default())
    }

    /// As [`Limiter::wait`], if only other requests of this cost go first.
    pub fn wait_behind(&mut self, now: Duration, direction: Direction, ahead: Cost) -> Duration {
        let mut wait = Duration::ZERO;
        for index in indices(direction) {
            wait = wait.max(self.bytes[index].wait_behind(now, ahead.bytes_nano));
            wait = wait.max(self.ops[index].wait_behind(now, ahead.ops_nano));
        }
        wait
    }

    /// Adds the cost of a request that goes now, whether or not it should have waited.
    pub fn take(&mut self, now: Duration, direction: Direction, cost: Cost) {
        for index in indices(direction) {
            self.bytes[index].leak(now);
            self.bytes[index].pour(cost.bytes_nano);
            self.ops[index].leak(now);
            self.ops[index].pour(cost.ops_nano);
        }
    }

    /// Removes a cost that was just [added](Limiter::take) for a request that then did not go.
    pub fn refund(&mut self, direction: Direction, cost: Cost) {
        for index in indices(direction) {
            self.bytes[index].scoop(cost.bytes_nano);
            self.ops[index].scoop(cost.ops_nano);
        }
    }
}

/// Indices of the buckets of a direction: the total one and its own.
fn indices(direction: Direction) -> [usize; 2] {
    match direction {
        Direction::Read => [0, 1],
        Direction::Write => [0, 2],
    }
}

#[cfg(test)]
mod tests;
