//! How much the searches do: a fixed sample by default, everything with `BDS_TEST_BUDGET=full`.
//!
//! `BDS_TEST_SEED=n` runs one seed of those searches that name it.

use bds_io::Sim;

/// Power cuts of each type of job in the full tier.
pub(crate) const CRASH_POINTS: u64 = 10_000;
/// Cycles of start, and complete or cancel, in the full tier.
pub(crate) const CYCLES: u64 = 1_000;
/// Seeds of random commands in the full tier.
pub(crate) const SCHEDULES: u64 = 10_000;

/// Whether everything is run.
pub(crate) fn is_full() -> bool {
    std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full")
}

/// The one seed that the environment asks for, or `usual` of them, or `full` in the full tier.
pub(crate) fn seeds(usual: u64, full: u64) -> std::ops::Range<u64> {
    match std::env::var("BDS_TEST_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("BDS_TEST_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..if is_full() { full } else { usual },
    }
}

/// Cuts the power and drops what the dead process held inside its world: tasks that destructors
/// spawn elsewhere would keep the world alive.
pub(crate) fn cut_power_holding<T>(sim: &Sim, held: T) {
    sim.power_cut();
    let gone = sim.run_until_cut(async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    assert!(gone.is_none(), "the power is gone");
}

/// Logs how much a search has covered.
#[expect(clippy::print_stdout, reason = "the coverage is logged")]
pub(crate) fn report(words: &str) {
    println!("{words}");
}
