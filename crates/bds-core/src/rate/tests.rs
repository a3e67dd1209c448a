//! Buckets against a model that remembers every request and computes in whole numbers.

use std::time::Duration;

use proptest::prelude::{Strategy, any, prop, proptest};
use proptest::{prop_assert, prop_assert_eq};

use super::{Bucket, Cost, Direction, Limiter, MAX_VALUE, Rate, RateLimits};

/// All that was ever taken, as (nanosecond, billionths of a unit).
#[derive(Default)]
struct Model(Vec<(u128, u128)>);

impl Model {
    /// The level at `at`: of all spans that end now, the one in which most came beyond what leaks
    /// in it.
    fn level(&self, rate: u64, at: u128) -> u128 {
        let mut sum = 0;
        let mut level = 0;
        for (when, amount) in self.0.iter().rev() {
            sum += amount;
            level = level.max(sum.saturating_sub(u128::from(rate) * (at - when)));
        }
        level
    }

    /// May a request go at `at`?
    fn admits(&self, rate: Rate, at: u128) -> bool {
        let n = 1_000_000_000;
        let Rate { avg, max, max_secs } = rate;
        let capacity = if max == 0 {
            u128::from(avg) * n / 10
        } else {
            u128::from(max) * u128::from(max_secs) * n
        };
        let calm = max_secs == 1 || self.level(max, at) <= u128::from(max) * n / 10;
        avg == 0 || self.level(avg, at) <= capacity && calm
    }
}

fn rates() -> impl Strategy<Value = Rate> {
    let value = sizes();
    (value, 0_u64..4, 1_u64..20).prop_map(|(avg, times, secs)| {
        let max = avg.saturating_mul(times).min(MAX_VALUE);
        let max_secs = MAX_VALUE.checked_div(max).map_or(1, |longest| secs.min(longest));
        Rate { avg, max, max_secs }
    })
}

fn sizes() -> impl Strategy<Value = u64> {
    proptest::prop_oneof![1_u64..50, 1_000_u64..10_000_000, 1_u64..=MAX_VALUE]
}

proptest! {
    /// The wait ends at the first nanosecond at which the model admits.
    #[test]
    fn a_wait_is_exact(
        rate in rates(),
        steps in prop::collection::vec((0_u64..3_000_000_000, any::<u32>(), any::<bool>()), 1..30),
    ) {
        rate.check("bps-total").unwrap();
        let (mut bucket, mut model, mut now) = (Bucket::new(rate), Model::default(), 0_u64);
        for (pause, units, is_patient) in steps {
            now += pause;
            let wait = bucket.wait(Duration::from_nanos(now));
            let wait_ns = u64::try_from(wait.as_nanos()).unwrap();
            // Centuries are not counted out.
            let is_never = wait_ns == u64::MAX;
            prop_assert!(is_never || model.admits(rate, u128::from(now) + u128::from(wait_ns)));
            if wait_ns > 0 {
                prop_assert!(!model.admits(rate, u128::from(now) + u128::from(wait_ns) - 1));
            }
            // Some do not wait although they should: they are drained.
            if is_patient && wait_ns < 1 << 58 {
                now += wait_ns;
                prop_assert_eq!(bucket.wait(Duration::from_nanos(now)), Duration::ZERO);
            }
            bucket.take(Duration::from_nanos(now), units.into());
            model.0.push((now.into(), u128::from(units) * 1_000_000_000));
        }
    }

    /// However requests come: what went in any span is at most the rate, the burst and one request.
    #[test]
    fn no_span_lets_more_pass_than_it_may(
        avg in 1_u64..100_000,
        requests in prop::collection::vec((0_u64..400_000_000, 1_u64..50_000), 2..60),
    ) {
        let mut bucket = Bucket::new(Rate::per_second(avg));
        let (mut now, mut went) = (0, Vec::new());
        for (pause, units) in requests {
            now += pause;
            now += u64::try_from(bucket.wait(Duration::from_nanos(now)).as_nanos()).unwrap();
            bucket.take(Duration::from_nanos(now), units);
            went.push((now, units));
        }
        for (first, (from, _)) in went.iter().enumerate() {
            let mut sum = 0_u128;
            for (to, units) in &went[first..] {
                let may = u128::from(avg) * (u128::from(to - from) + 100_000_000);
                prop_assert!(sum * 1_000_000_000 <= may, "{sum} in {}", to - from);
                sum += u128::from(*units);
            }
        }
    }
}

#[test]
fn limits_that_contradict_each_other_are_refused_by_name() {
    let rate = |avg, max, max_secs| Rate { avg, max, max_secs };
    let of = |bps_total| RateLimits { bps_total, ..RateLimits::default() };
    let cases = [
        (of(rate(MAX_VALUE + 1, 0, 1)), "at most"),
        (of(rate(0, 5, 1)), "'bps-total-max' needs 'bps-total'"),
        (of(rate(9, 5, 1)), "must not be lower"),
        (of(rate(9, 10, 0)), "'bps-total-max-length' must be at least 1"),
        (of(rate(9, 0, 2)), "'bps-total-max-length' needs 'bps-total-max'"),
        (of(rate(9, MAX_VALUE / 2, 3)), "too long"),
        (
            RateLimits { bps_read: Rate::per_second(1), ..of(Rate::per_second(1)) },
            "'bps-total' cannot stand beside",
        ),
        (
            RateLimits {
                iops_write: Rate::per_second(1),
                iops_total: rate(1, 2, 1),
                ..RateLimits::default()
            },
            "'iops-total' cannot stand beside",
        ),
        (RateLimits { iops_size: 4096, ..of(Rate::per_second(1)) }, "'iops-size' needs"),
    ];
    for (limits, words) in cases {
        let text = Limiter::new(limits).unwrap_err().to_string();
        assert!(text.contains(words), "{text}");
    }
    for fine in [
        RateLimits::default(),
        of(rate(MAX_VALUE, MAX_VALUE, 1)),
        of(rate(1, 1, MAX_VALUE)),
        RateLimits { iops_read: Rate::per_second(1), ..of(Rate::per_second(1)) },
    ] {
        fine.check().unwrap();
    }
}

#[test]
fn a_long_request_counts_as_several_operations() {
    let mut limits = RateLimits { iops_total: Rate::per_second(10), ..RateLimits::default() };
    // iops-size, length: milliseconds until the next may go
    for (size, len, ms) in [
        (0, 1 << 30, 0),
        (4096, 4096, 0),
        (4096, 8192, 100),
        (4096, 6144, 50),
        (4096, 1, 0),
        (512, 5120, 900),
    ] {
        limits.iops_size = size;
        let mut limiter = Limiter::new(limits).unwrap();
        limiter.take(Duration::ZERO, Direction::Read, limits.cost(len));
        let wait = limiter.wait(Duration::ZERO, Direction::Write);
        assert_eq!(wait, Duration::from_millis(ms), "{size} {len}");
    }
}

#[test]
fn directions_share_only_the_total() {
    let per = Rate::per_second(1000);
    let limits = RateLimits { bps_read: per, bps_write: per, ..RateLimits::default() };
    let mut limiter = Limiter::new(limits).unwrap();
    limiter.take(Duration::ZERO, Direction::Read, limits.cost(1100));
    assert_eq!(limiter.wait(Duration::ZERO, Direction::Read), Duration::from_secs(1));
    assert_eq!(limiter.wait(Duration::ZERO, Direction::Write), Duration::ZERO);
}

#[test]
fn a_refund_undoes_a_take() {
    let limits = RateLimits { bps_total: Rate::per_second(1000), ..RateLimits::default() };
    let mut limiter = Limiter::new(limits).unwrap();
    let at = Duration::from_millis;
    limiter.take(at(0), Direction::Read, limits.cost(600));
    limiter.take(at(0), Direction::Read, limits.cost(5000));
    limiter.refund(Direction::Read, limits.cost(5000));
    assert_eq!(limiter.wait(at(0), Direction::Read), at(500));
    let two = limits.cost(100).plus(limits.cost(100));
    assert_eq!(limiter.wait_behind(at(0), Direction::Read, two), at(700));
    let one = two.minus(limits.cost(100));
    assert_eq!(limiter.wait_behind(at(500), Direction::Read, one), at(100));
    assert_eq!(one.minus(one), Cost::default());
}

/// The largest numbers that a node can be asked for neither overflow nor end the wait too early.
#[test]
fn huge_requests_wait_for_centuries() {
    let mut bucket = Bucket::new(Rate::per_second(1));
    for _ in 0..3 {
        bucket.take(Duration::from_secs(1), u64::MAX);
    }
    assert_eq!(bucket.wait(Duration::from_secs(1)), Duration::from_nanos(u64::MAX));
}
