//! Random graphs and random commands (scenario 40 of `docs/jobs-scenarios.md`): five disks with
//! chains of up to four images, each with a guest that writes stamps; jobs of all types, alone and
//! in groups, snapshots, bitmaps, drained sections, queries, faults, and at the end a shutdown or a
//! power cut.
//!
//! A plan is data, made of a seed. A plan that fails is made shorter as long as it still fails, and
//! printed. `BDS_TEST_SEED=n` runs one seed, `BDS_TEST_BUDGET=full` two thousand, each of them once
//! with a power cut and once without.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: a panic is their way to fail, numbers are small"
)]

mod disks;
mod monitor;
mod oracle;
mod plan;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use bds_io::{Sim, SimConfig};

use disks::Disks;
use monitor::Monitor;
use plan::Plan;

/// Runs of a plan that are spent on making it shorter.
const SHRINK_RUNS: usize = 900;

/// Runs a plan. Returns how many jobs succeeded.
fn run(plan: &Plan) -> u64 {
    let config = SimConfig { short_io_rate: 0.0, max_turns: 20_000_000, ..SimConfig::default() };
    let sim = Sim::new(plan.seed, config);
    let disks = sim.block_on(Disks::make(&sim, plan));
    let monitor = Monitor::new(&sim, disks, plan);
    let Some(cut) = plan.cut else {
        sim.block_on(async {
            monitor.play().await;
            monitor.end_jobs().await;
            monitor.disks.stop().await;
        });
        return sim.block_on(oracle::after_shutdown(&sim, monitor));
    };
    sim.cut_after_writes(Some(sim.writes() + cut));
    let ended = sim.run_until_cut(async {
        monitor.play().await;
        monitor.end_jobs().await;
        std::future::pending::<()>().await;
    });
    assert!(ended.is_none(), "it waits for the power cut");
    oracle::after_cut(&sim, monitor, plan.seed)
}

/// Removes parts of a plan that fails, as long as what is left fails.
fn shrink(plan: &Plan) -> Plan {
    let fails = |plan: &Plan| catch_unwind(AssertUnwindSafe(|| run(plan))).is_err();
    let (mut best, mut runs) = (plan.clone(), 0);
    let mut part = best.commands.len().div_ceil(2);
    while part > 0 && runs < SHRINK_RUNS {
        let mut at = 0;
        while at < best.commands.len() && runs < SHRINK_RUNS {
            let mut less = best.clone();
            let end = (at + part).min(less.commands.len());
            less.commands.drain(at..end);
            runs += 1;
            if fails(&less) { best = less } else { at += part }
        }
        part /= 2;
    }
    best
}

#[test]
fn random_commands_on_random_graphs_keep_every_promise() {
    let (mut ended, mut count) = (0, 0);
    for seed in crate::budget::seeds(24, 2000) {
        let plan = Plan::new(seed);
        let other = crate::budget::is_full().then(|| plan.with_the_other_end());
        for plan in std::iter::once(plan).chain(other) {
            match catch_unwind(AssertUnwindSafe(|| run(&plan))) {
                Ok(jobs) => (ended, count) = (ended + jobs, count + 1),
                Err(panic) => {
                    let least = shrink(&plan);
                    eprintln!("BDS_TEST_SEED={seed} runs this seed; the shortest plan:\n{least}");
                    resume_unwind(panic);
                }
            }
        }
    }
    assert!(count <= 2 || ended > count, "{ended} jobs succeeded in {count} runs");
    crate::budget::report(&format!("{count} runs, {ended} jobs succeeded"));
}
