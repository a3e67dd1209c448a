//! Sweeps of power cuts, failing I/O and abandoned requests over every point of seeded workloads.
//!
//! A failing sweep names the kind of image, the seed and the point; `BDS_TEST_SEED=n` runs that
//! seed alone, and `BDS_TEST_BUDGET=full` runs many more.

mod cancel;
pub(crate) mod crash;
mod fault;
mod nearly_full;
#[cfg(feature = "qcow2")]
mod unpolled;

/// Seeds to run: `usual` of them, ten times as many, or the one from the environment.
pub(crate) fn seeds(usual: u64) -> std::ops::Range<u64> {
    if let Some(seed) = one_seed() {
        return seed..seed + 1;
    }
    0..if is_full() { usual * 10 } else { usual }
}

/// The one seed from the environment. Requirements that only all seeds together meet are not
/// checked then.
pub(crate) fn one_seed() -> Option<u64> {
    let seed = std::env::var("BDS_TEST_SEED").ok()?;
    Some(seed.parse().expect("BDS_TEST_SEED is a number"))
}

/// Run everything (`BDS_TEST_BUDGET=full`), or a sample?
pub(crate) fn is_full() -> bool {
    std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full")
}
