//! What must survive: power cuts, failing I/O and cancelled requests, at every point of seeded workloads.
//!
//! A failing sweep names the kind of image, the seed and the point; `BDS_TEST_SEED=n` runs that seed alone, and
//! `BDS_TEST_BUDGET=full` runs many more.

mod cancel;
pub(crate) mod crash;
mod fault;
#[cfg(feature = "qcow2")]
mod kept;
pub(crate) mod rig;

/// How many seeds of `usual`: all of them, ten times as many, or the one that is asked for.
pub(crate) fn seeds(usual: u64) -> std::ops::Range<u64> {
    if let Some(seed) = std::env::var("BDS_TEST_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed..seed + 1;
    }
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    0..if is_full { usual * 10 } else { usual }
}
