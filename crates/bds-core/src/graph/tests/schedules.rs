//! Searches schedules: many small simulations, each with a random program and a seeded scheduler.
//!
//! It looks for deadlocks (tasks left when nothing can run), lost wake-ups (the same), requests
//! inside a drained node, failed requests, gates that stay closed, wrong counts, and nodes that
//! cannot be closed. A seed that fails is printed, and becomes a named test in `regressions`.
//!
//! `cargo xtask test --tier full` searches 100,000 schedules, in a release build; the ordinary run
//! a few thousand. `BDS_TEST_SEED=n` runs one.

mod audit;
mod program;
mod qemu_deadlocks;
mod regressions;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::tally::Tally;
use program::{run, run_on_threads};

/// The panic's message.
fn reason(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    text.unwrap_or_else(|| "a panic without a message".into())
}

/// Runs one seed; an error is the panic's message.
fn try_seed(seed: u64, lock_first: bool, tally: &Arc<Tally>) -> Result<u64, String> {
    let run = AssertUnwindSafe(|| run(seed, lock_first, tally));
    catch_unwind(run).map_err(|panic| reason(&*panic))
}

/// Number of schedules of an ordinary run and of a full one.
fn budget() -> u64 {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    if is_full { 100_000 } else { 2_000 }
}

#[test]
fn no_schedule_deadlocks_or_enters_a_drained_node() {
    let tally = Arc::new(Tally::default());
    if let Ok(seed) = std::env::var("BDS_TEST_SEED") {
        run(seed.parse().expect("a number"), false, &tally);
        return;
    }
    let seeds = budget();
    let mut failed = Vec::new();
    for seed in 0..seeds {
        if let Err(why) = try_seed(seed, false, &tally) {
            failed.push(format!("seed {seed}: {}", why.lines().next().unwrap_or_default()));
        }
        if failed.len() > 20 {
            break;
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    tally.assert_least(&[
        ("changes", seeds / 4),
        ("refusals", seeds / 4),
        ("drains", seeds),
        ("dropped", seeds / 2),
        ("requests", seeds * 2),
        ("closes", seeds / 50),
    ]);
}

/// The same tasks on real threads: not replayable by seed, but checked by a thread sanitizer
/// (`cargo xtask test --tier full`).
#[test]
fn real_threads_run_the_same_programs() {
    let tally = Arc::new(Tally::default());
    let seeds = budget() / 100;
    for seed in 0..seeds {
        run_on_threads(seed, &tally);
    }
    tally.assert_least(&[
        ("changes", seeds / 4),
        ("drains", seeds),
        ("dropped", seeds / 4),
        ("requests", seeds * 4),
    ]);
}

#[test]
fn one_seed_is_one_schedule() {
    let tally = Arc::default();
    let mut histories = HashSet::new();
    for seed in 0..50 {
        let history = run(seed, false, &tally);
        assert_eq!(history, run(seed, false, &tally), "seed {seed}");
        histories.insert(history);
    }
    assert!(histories.len() > 40, "another seed is another history: {}", histories.len());
}

/// QEMU 10.0 takes the lock first and then drains: a request inside the parent that still has to
/// pass the inner gate waits for the lock, and the drain waits for the request. The same programs
/// and scheduler find that.
#[test]
fn the_search_finds_the_deadlock_of_locking_before_draining() {
    let tally = Arc::default();
    let deadlock = |seed: &u64| match try_seed(*seed, true, &tally) {
        Ok(_) => false,
        Err(why) => {
            assert!(why.contains("deadlock"), "seed {seed} failed in another way: {why}");
            true
        }
    };
    let found = (0..100).find(deadlock).expect("a deadlock among the first seeds");
    assert!(try_seed(found, false, &tally).is_ok(), "and the right order has none there");
}
