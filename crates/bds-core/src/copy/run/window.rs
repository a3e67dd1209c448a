//! `Window`: how many requests of a copy are in flight, found by measurement.
//!
//! A disk that answers slowly needs many requests at once; one that is busy with two answers none
//! sooner if there are more, and other users of it wait behind all of them. So the number is
//! doubled while that makes the copy faster, and halved where that makes it no slower. The speed
//! with `n` requests is `n / (time of a byte)`, both measured over the same requests; this holds
//! too where only a part of the copy is data.
//!
//! While others use the disk, the copy begins with one request, and more must pay nearly in full:
//! where doubling the requests does not double the speed, they wait for each other, and then the
//! users wait for them as well. Their length is bounded too.

use std::time::Duration;

use super::options::RunOptions;

/// Requests at the beginning of an undisturbed copy.
const FIRST: usize = 8;
/// Requests that are measured together, at least.
const SAMPLE: usize = 16;
/// Samples with an unchanged number after attempts at more and at fewer have both failed.
const REST: u32 = 12;
/// For how long after their last request the disk counts as used by others.
const USED: Duration = Duration::from_millis(200);
/// Longest request in bytes while others use the disk.
const SHORT: u64 = 256 << 10;

/// What a change of the number must bring, in parts of 100 of the speed.
struct Terms {
    /// Twice the requests are kept from this speed on.
    up: u128,
    /// Half the requests are kept from this speed on.
    down: u128,
}

const ALONE: Terms = Terms { up: 105, down: 99 };
const SHARED: Terms = Terms { up: 160, down: 85 };

/// The number that is tried, and what it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    /// None: so many more samples until the next one.
    Rest(u32),
    /// More requests than before.
    Up(Before),
    /// Fewer.
    Down(Before),
}

/// The number before an attempt, and its speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Before {
    limit: usize,
    speed: Speed,
}

/// Bytes a second.
type Speed = u128;

/// The bound of requests in flight, and the samples it is found by.
pub(super) struct Window {
    limit: usize,
    max: usize,
    /// Nothing is tried.
    is_fixed: bool,
    attempt: Attempt,
    /// The next attempt after a rest is upwards.
    is_up_next: bool,
    /// Attempts that failed since the number was last changed for good.
    failed: u32,
    /// Requests that began before the last change of the number, and are not counted.
    unsettled: usize,
    sample: Sample,
    /// Until when the disk counts as used by others.
    used_until: Option<Duration>,
    is_shared: bool,
}

/// Requests that were measured with one number.
#[derive(Default)]
struct Sample {
    requests: usize,
    bytes: u64,
    time: Duration,
}

impl Sample {
    /// Speed of `limit` requests at a time.
    fn speed(&self, limit: usize) -> Speed {
        let nanos = self.time.as_nanos().max(1);
        u128::from(self.bytes) * 1_000_000_000 * limit as u128 / nanos
    }
}

impl Window {
    pub(super) fn new(options: &RunOptions) -> Self {
        let max = options.max_requests;
        Self {
            limit: if options.is_urgent { max } else { FIRST.min(max) },
            max,
            is_fixed: options.is_urgent,
            attempt: Attempt::Rest(0),
            is_up_next: true,
            failed: 0,
            // The first ones load metadata.
            unsettled: FIRST.min(max),
            sample: Sample::default(),
            used_until: None,
            is_shared: false,
        }
    }

    /// Most requests in flight now.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Longest request now, in bytes.
    pub(super) fn max_len(&self) -> u64 {
        if self.is_shared { SHORT } else { u64::MAX }
    }

    /// Notes at a time whether others use the disk.
    pub(super) fn note_use(&mut self, now: Duration, is_used: bool) {
        if self.is_fixed {
            return;
        }
        if is_used {
            self.used_until = Some(now + USED);
        }
        let is_shared = self.used_until.is_some_and(|until| now < until);
        if is_shared == self.is_shared {
            return;
        }
        self.is_shared = is_shared;
        self.is_up_next = true;
        self.failed = 0;
        let limit = if is_shared { 1 } else { self.limit };
        self.set(limit, Attempt::Rest(0));
    }

    /// Notes a request of data that has ended well, and how long it took.
    pub(super) fn note(&mut self, bytes: u64, took: Duration) {
        if self.is_fixed {
            return;
        }
        if self.unsettled > 0 {
            self.unsettled -= 1;
            return;
        }
        self.sample.requests += 1;
        self.sample.bytes += bytes;
        self.sample.time += took;
        if self.sample.requests >= SAMPLE.max(2 * self.limit) {
            self.judge();
        }
    }

    /// Decides after a sample.
    fn judge(&mut self) {
        let speed = std::mem::take(&mut self.sample).speed(self.limit);
        let terms = if self.is_shared { SHARED } else { ALONE };
        match self.attempt {
            Attempt::Rest(0) => self.try_next(speed),
            Attempt::Rest(more) => self.attempt = Attempt::Rest(more - 1),
            Attempt::Up(before) if speed * 100 >= before.speed * terms.up => self.accept(speed),
            Attempt::Down(before) if speed * 100 >= before.speed * terms.down => {
                self.accept(speed);
            }
            Attempt::Up(before) | Attempt::Down(before) => self.turn(before.limit),
        }
    }

    /// Keeps the number that was tried, and goes on in the same direction.
    fn accept(&mut self, speed: Speed) {
        self.failed = 0;
        self.try_next(speed);
    }

    fn try_next(&mut self, speed: Speed) {
        let before = Before { limit: self.limit, speed };
        match self.is_up_next {
            true if self.limit < self.max => {
                self.set((self.limit * 2).min(self.max), Attempt::Up(before));
            }
            false if self.limit > 1 => self.set(self.limit / 2, Attempt::Down(before)),
            _ => self.turn(self.limit),
        }
    }

    /// Tries the other direction from this number next, after a rest if that has failed too.
    fn turn(&mut self, limit: usize) {
        self.is_up_next = !self.is_up_next;
        self.failed += 1;
        let rest = if self.failed < 2 { 0 } else { REST };
        if rest > 0 {
            self.failed = 0;
        }
        self.set(limit, Attempt::Rest(rest));
    }

    fn set(&mut self, limit: usize, attempt: Attempt) {
        self.unsettled = if limit == self.limit { 0 } else { limit.max(self.limit) };
        self.limit = limit;
        self.attempt = attempt;
        self.sample = Sample::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn window(max_requests: usize) -> Window {
        Window::new(&RunOptions { max_requests, ..RunOptions::default() })
    }

    /// Ends so many requests of a device on which one takes `time(requests in flight)`; returns how
    /// many of them were sent with each number in flight.
    fn run(window: &mut Window, requests: usize, time: impl Fn(u64) -> Duration) -> [usize; 65] {
        let mut counts = [0; 65];
        for _ in 0..requests {
            counts[window.limit()] += 1;
            window.note(MIB, time(window.limit() as u64));
        }
        counts
    }

    /// Most requests were sent with a number in flight from this range. (The others are attempts.)
    fn assert_mostly(counts: &[usize; 65], range: std::ops::RangeInclusive<usize>) {
        let inside: usize = counts[range].iter().sum();
        let all: usize = counts.iter().sum();
        assert!(inside * 10 >= all * 7, "{inside} of {all}: {counts:?}");
    }

    /// A device far away: as many requests at a time as there are.
    fn far(_in_flight: u64) -> Duration {
        Duration::from_millis(5)
    }

    /// A device that serves one request after the other.
    fn serial(in_flight: u64) -> Duration {
        Duration::from_millis(in_flight)
    }

    #[test]
    fn latency_is_met_with_requests_up_to_the_maximum() {
        for max in [64, 48, 5, 1] {
            let mut window = window(max);
            run(&mut window, 500, far);
            assert_mostly(&run(&mut window, 5000, far), max..=max);
        }
    }

    #[test]
    fn a_serial_device_gets_few_requests() {
        let mut window = window(64);
        run(&mut window, 500, serial);
        assert_mostly(&run(&mut window, 5000, serial), 1..=2);
    }

    #[test]
    fn four_channels_get_four_requests_or_few_more() {
        let four = |in_flight: u64| Duration::from_millis(in_flight.div_ceil(4));
        let mut window = window(64);
        run(&mut window, 500, four);
        assert_mostly(&run(&mut window, 5000, four), 4..=8);
    }

    #[test]
    fn a_device_that_changes_is_followed() {
        let mut window = window(64);
        run(&mut window, 1000, far);
        run(&mut window, 3000, serial);
        assert_mostly(&run(&mut window, 5000, serial), 1..=2);
        run(&mut window, 1000, far);
        assert_mostly(&run(&mut window, 5000, far), 64..=64);
    }

    #[test]
    fn beside_users_requests_are_short_and_few_unless_more_cost_nothing() {
        let mut window = window(64);
        run(&mut window, 1000, far);
        window.note_use(Duration::from_secs(1), true);
        assert_eq!((window.limit(), window.max_len()), (1, SHORT));
        // Less than 1.6 times as fast with two: they wait for each other.
        let shared = |in_flight| Duration::from_micros(1000 + 700 * (in_flight - 1));
        assert_mostly(&run(&mut window, 1000, shared), 1..=1);
        run(&mut window, 1000, far);
        assert_mostly(&run(&mut window, 5000, far), 64..=64);
    }

    #[test]
    fn the_disk_counts_as_used_for_a_while() {
        let mut window = window(64);
        let used = Duration::from_secs(1);
        window.note_use(used, true);
        window.note_use(used + USED - Duration::from_nanos(1), false);
        assert_eq!(window.max_len(), SHORT);
        window.note_use(used + USED, false);
        assert_eq!(window.max_len(), u64::MAX);
    }

    #[test]
    fn an_urgent_copy_has_all_requests_at_once() {
        let options = RunOptions { is_urgent: true, ..RunOptions::default() };
        let mut window = Window::new(&options);
        window.note_use(Duration::ZERO, true);
        run(&mut window, 1000, serial);
        assert_eq!((window.limit(), window.max_len()), (options.max_requests, u64::MAX));
    }

    #[test]
    fn requests_that_take_no_time_are_measured_too() {
        let mut window = window(64);
        assert_mostly(&run(&mut window, 5000, |_| Duration::ZERO), 64..=64);
    }
}
