//! Parses rates from options, by the names of QEMU's `ThrottleLimits`.

use bds_core::options::Options;
use bds_core::rate::{Rate, RateLimits};
use bds_core::{Error, ErrorKind, Result};

/// QEMU's names of rate, burst and burst length as properties of the object; inside `limits`
/// without "x-".
const BPS_TOTAL: [&str; 3] = ["x-bps-total", "x-bps-total-max", "x-bps-total-max-length"];
const BPS_READ: [&str; 3] = ["x-bps-read", "x-bps-read-max", "x-bps-read-max-length"];
const BPS_WRITE: [&str; 3] = ["x-bps-write", "x-bps-write-max", "x-bps-write-max-length"];
const IOPS_TOTAL: [&str; 3] = ["x-iops-total", "x-iops-total-max", "x-iops-total-max-length"];
const IOPS_READ: [&str; 3] = ["x-iops-read", "x-iops-read-max", "x-iops-read-max-length"];
const IOPS_WRITE: [&str; 3] = ["x-iops-write", "x-iops-write-max", "x-iops-write-max-length"];
const IOPS_SIZE: &str = "x-iops-size";

/// Parses the options of a `throttle-group` object: a tree `limits`, or the older `x-bps-total` and
/// so on. Rates are bytes or operations a second, burst lengths are seconds; sizes and byte rates
/// may have a suffix (`1M`).
///
/// # Errors
/// `InvalidInput`: an unknown name, a value of the wrong kind, the same rate in both spellings, or
/// numbers that contradict each other.
pub fn limits_from_options(mut options: Options) -> Result<RateLimits> {
    let limits = match take_limits(&mut options)? {
        Some(limits) if options.keys().next().is_none() => limits,
        Some(_) => {
            let words = "options 'limits' and 'x-…' exclude each other: say all of it in 'limits'";
            return Err(Error::new(ErrorKind::InvalidInput, words));
        }
        None => parse(&mut options, |name| name)?,
    };
    options.finish("a throttle group")?;
    Ok(limits)
}

/// Takes the tree `limits`, if there is one.
pub(super) fn take_limits(options: &mut Options) -> Result<Option<RateLimits>> {
    let Some(tree) = options.take("limits") else { return Ok(None) };
    let mut tree = Options::from_json(tree)
        .map_err(|error| error.context("option 'limits' wants a tree of rates"))?;
    let limits = parse(&mut tree, |name| name.strip_prefix("x-").unwrap_or(name))?;
    tree.finish("option 'limits'")?;
    Ok(Some(limits))
}

fn parse(options: &mut Options, spell: fn(&'static str) -> &'static str) -> Result<RateLimits> {
    let mut rate = |names: [&'static str; 3]| -> Result<Rate> {
        let [avg, max, length] = names.map(spell);
        Ok(Rate {
            avg: options.take_size(avg)?.unwrap_or(0),
            max: options.take_size(max)?.unwrap_or(0),
            max_secs: options.take_u64(length)?.unwrap_or(1),
        })
    };
    let limits = RateLimits {
        bps_total: rate(BPS_TOTAL)?,
        bps_read: rate(BPS_READ)?,
        bps_write: rate(BPS_WRITE)?,
        iops_total: rate(IOPS_TOTAL)?,
        iops_read: rate(IOPS_READ)?,
        iops_write: rate(IOPS_WRITE)?,
        iops_size: options.take_size(spell(IOPS_SIZE))?.unwrap_or(0),
    };
    limits.check()?;
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parsed(options: Value) -> Result<RateLimits> {
        limits_from_options(Options::from_json(options)?)
    }

    #[test]
    fn both_spellings_say_the_same() {
        let expected = RateLimits {
            bps_total: Rate { avg: 1 << 20, max: 2 << 20, max_secs: 5 },
            iops_read: Rate::per_second(100),
            iops_size: 4096,
            ..RateLimits::default()
        };
        let tree = json!({"limits": {
            "bps-total": "1M", "bps-total-max": 2097152, "bps-total-max-length": 5,
            "iops-read": 100, "iops-size": "4k",
        }});
        let flat = json!({
            "x-bps-total": 1048576, "x-bps-total-max": "2M", "x-bps-total-max-length": "5",
            "x-iops-read": 100, "x-iops-size": 4096,
        });
        assert_eq!(parsed(tree).unwrap(), expected);
        assert_eq!(parsed(flat).unwrap(), expected);
        assert_eq!(parsed(json!({})).unwrap(), RateLimits::default());
    }

    #[test]
    fn wrong_limits_are_refused_by_name() {
        for (options, word) in [
            (json!({"limits": {"bps-totl": 1}}), "bps-totl"),
            (json!({"limits": {"x-bps-total": 1}}), "x-bps-total"),
            (json!({"limits": 7}), "limits"),
            (json!({"bps-total": 1}), "bps-total"),
            (json!({"limits": {}, "x-bps-read": 1}), "exclude each other"),
            (json!({"x-iops-read": -1}), "x-iops-read"),
            (json!({"limits": {"iops-total": 5, "iops-read": 1}}), "cannot stand beside"),
            (json!({"limits": {"bps-read": 5, "bps-read-max-length": 0}}), "at least 1 second"),
        ] {
            let text = parsed(options).unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        }
    }
}
