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

    /// Charges `bytes` if they may go now; else says how long to wait.
    pub(crate) fn try_charge(&self, now: Duration, bytes: u64) -> Result<(), Duration> {
        let mut speed = self.lock();
        let wait = speed.1.wait(now);
        if wait.is_zero() {
            speed.1.take(now, bytes);
            return Ok(());
        }
        Err(wait)
    }

    /// Charges `bytes` that go in any case.
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
        assert_eq!(speed.try_charge(SECOND, 2100), Ok(()));
        assert_eq!(speed.try_charge(SECOND, 1), Err(2 * SECOND));
        assert_eq!(speed.try_charge(3 * SECOND, 1), Ok(()));
    }

    #[test]
    fn a_new_speed_forgets_what_was_charged() {
        let speed = Speed::new(1);
        speed.charge(SECOND, 1 << 40);
        assert!(speed.try_charge(SECOND, 1).is_err());
        speed.set(2);
        assert_eq!((speed.try_charge(SECOND, 1), speed.get()), (Ok(()), 2));
        speed.set(0);
        speed.charge(SECOND, u64::MAX);
        assert_eq!(speed.try_charge(SECOND, u64::MAX), Ok(()));
    }
}
