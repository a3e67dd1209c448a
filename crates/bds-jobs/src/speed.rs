//! Speed limit of a job: work is charged when it goes, and paid for by waiting before the next.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bds_core::rate::{Bucket, MAX_VALUE, Rate};

/// A leaky bucket whose rate can change. A tenth of a second of the rate may come at once; a piece
/// that is larger goes and is paid for afterwards.
#[derive(Debug)]
pub(crate) struct Speed(Mutex<(u64, Bucket)>);

impl Speed {
    pub(crate) fn new(speed: u64) -> Self {
        Self(Mutex::new((speed, bucket(speed))))
    }

    /// The speed in bytes a second; 0: no limit.
    pub(crate) fn get(&self) -> u64 {
        self.lock().0
    }

    /// Sets the speed. What was charged before is forgotten: a lower speed does not make a job wait
    /// for what it did at a higher one, a higher one ends the wait at the lower one.
    pub(crate) fn set(&self, speed: u64) {
        *self.lock() = (speed, bucket(speed));
    }

    /// Time until what was charged is paid for.
    pub(crate) fn wait(&self, now: Duration) -> Duration {
        self.lock().1.wait(now)
    }

    /// Charges `bytes` that go now.
    pub(crate) fn charge(&self, now: Duration, bytes: u64) {
        self.lock().1.take(now, bytes);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, Bucket)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bucket(speed: u64) -> Bucket {
    Bucket::new(Rate::per_second(speed.min(MAX_VALUE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_piece_goes_and_the_next_waits_for_it() {
        let speed = Speed::new(1000);
        assert_eq!(speed.wait(SECOND), Duration::ZERO);
        speed.charge(SECOND, 2100);
        assert_eq!(speed.wait(SECOND), 2 * SECOND);
        assert_eq!(speed.wait(3 * SECOND), Duration::ZERO);
    }

    #[test]
    fn a_new_speed_forgets_what_was_charged() {
        let speed = Speed::new(1);
        speed.charge(SECOND, 1 << 40);
        assert!(!speed.wait(SECOND).is_zero());
        speed.set(2);
        assert_eq!((speed.wait(SECOND), speed.get()), (Duration::ZERO, 2));
        speed.set(0);
        speed.charge(SECOND, u64::MAX);
        assert_eq!(speed.wait(SECOND), Duration::ZERO);
    }
}
