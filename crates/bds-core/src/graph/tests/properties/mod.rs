//! The properties of the lifecycle contract (`lifecycle.md`, section 5), checked on random sequences of commands.
//!
//! ```text
//! commands ──► run, ends, changing, beside: done to both ──► the graph, with drivers that assert (fake)
//!                                                     └────► the model: maps, from which everything follows (model, edits, opening)
//! check: pictures of both are equal after every command
//! traffic: held requests and sections, the model says who waits      schedules: tasks in any order, read into a model in the end
//! ```
//! The model shares no code with the product. Sequences that found something are in `regressions`.
//!
//! | property | checked in |
//! |---|---|
//! | P1 ids stale for ever | `check` (ids), `run` (stale ids, ids issued once), in graphs whose ids run out; bds-refcount |
//! | P2 retired slots, sum of slots | `check` (ids); bds-refcount drives slots to exhaustion |
//! | P3 other graphs, kinds, random ids | bds-refcount; `tests/open.rs`, `tests/change.rs` for graphs |
//! | P4 acquire | `run` (acquire), `check` (ids) |
//! | P5 identity | `check` (ids), `run` (keys) |
//! | P6 counts, and by name | `check` (ids, pictures) |
//! | P7 dead and alive | `check` (slots) |
//! | P8 released twice | by type: `release` takes the reference (bds-core `compile_fail/reference_after_release`); bds-refcount `release` |
//! | P9 who was last | `run` (release); bds-refcount `release`, `threads`, `loom_arena` |
//! | P10 release is total | bds-refcount `release` (also while unwinding); here no command but a reap ever closes |
//! | P11 one close an open | `fake`, `check` (ends) |
//! | P12 deep chains | `tests/close.rs` (20,000 nodes); bds-refcount |
//! | P13 nothing is left | `check` (end), `run` (open at every step) |
//! | P14 failures reported once | `check` (ends), `ends` (close in use) |
//! | P15 clone, release | `run`, and the picture afterwards |
//! | P16 both ends of an edge | `picture` |
//! | P17 no loops | `edits` (refusals), `model` (recompute) |
//! | P18 roles | `picture` (a child a name); role clashes at opening: `tests/open.rs` |
//! | P19 attach | `run` (attach), `edits` |
//! | P20 there and back | `changing`; filters follow from the model |
//! | P21 frozen | `beside`, `edits` |
//! | P22 replace | `edits` (move parents), `check` (roots) |
//! | P23 nothing dangles | `picture` (inheritance), `run` (stale ids). A dead testator's id is weak and counts as none |
//! | P24, P27 permissions fit | `model` (legal), `check` |
//! | P25 from scratch | `model` (recompute), `picture`; after any schedule: `schedules` |
//! | P26 loosening | `changing` (a job's access) |
//! | P28, P30 prepared: committed or dropped | `fake`, `check` (ends). Permissions have no driver callbacks to pair; there is no clean step |
//! | P29 failure at every step | `changing` (graph's and drivers' steps in one numbering), `run` (open) |
//! | P31 dropped changes | `changing` (dropped, cancelled after n polls) |
//! | P32 who dies when | `changing` through the model's graveyard |
//! | P33 only the outcome counts | `edits` (legal once, at the end) |
//! | P34 nobody inside | `fake`, `traffic` (begun exactly if empty), `schedules`, gates in `picture` |
//! | P35 quiesce counts | `model`, `picture`, `traffic`, `schedules`. No pause counts of jobs: there are none yet |
//! | P36 drain callbacks alternate | `fake` |
//! | P37 one completion | `traffic`. No completion callbacks: a future's end is inside by construction |
//! | P38 sections keep nodes, ends change nothing | `traffic`, `ends` |
//! | P39 lock and drain | by type (bds-core `compile_fail/drained_by_hand`, `edit_from_outside`) |
//! | P40 no deadlock | `schedules`: the simulated world panics if nothing can run; the wrong order is found by the schedule search |
//! | P41 contexts | not here: nodes have no context, any thread runs them |
//! | P42 names | `opening`, `edits` (rename), `check` (ids). Backends have no names in this namespace yet |
//! | P43 del | `ends` |
//! | P44 top level | `run` (walks with edits in between), `check` (lists) |
//! | P45 jobs | job slots (`beside`) and job edges that stay (`edits`, `check`); there is no job lifecycle yet |
//! | P46 bitmaps | `beside`, `check` (lists), failed closes in `model` |
//! | P47 inactive | `edits`, `changing`, `model` (legal) |
//! | P48 shutdown | `ends`, `check` (end) |
//! | P49 watches | `check` (lists), `run` (post mortem); wake-ups: bds-refcount |
//! | P50 C ABI | not here: there is none yet |

mod changes;
mod check;
mod claims;
mod closing;
mod commands;
mod edits;
mod fake;
mod model;
mod open;
mod regressions;
mod requests;
mod run;
mod schedules;
mod snapshot;

use std::sync::Arc;

use bds_io::{Sim, SimConfig};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, Strategy, any};
use proptest::test_runner::TestRunner;

use super::tally::Tally;
use commands::{Command, Script, script};
use requests::{Traffic, action, ground};
use run::{Widths, run};
use schedules::act;
pub(super) use schedules::check_permissions;

/// So many cases, or ten times that when everything is asked for.
fn cases(count: u32) -> ProptestConfig {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let cases = if is_full { count * 10 } else { count };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Plays a sequence and compares after every command.
fn play(seed: u64, widths: Option<Widths>, script: &[Command], tally: &Arc<Tally>) {
    run(seed, widths, tally, |mut world| async move {
        for command in script {
            world.step(command).await;
            world.check(&format!("{command:?}"));
        }
        world.end().await;
    });
}

/// Runs a test on so many drawn values; a failure is shrunk and printed.
fn search<S: Strategy>(count: u32, drawn: S, test: impl Fn(S::Value)) {
    let mut runner = TestRunner::new(cases(count));
    let outcome = runner.run(&drawn, |value| {
        test(value);
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

#[test]
fn any_sequence_of_commands_agrees_with_the_model() {
    let tally = Arc::default();
    let drawn = (any::<u64>(), script(1..60));
    search(512, drawn, |(seed, Script(script))| play(seed, None, &script, &tally));
    tally.assert_least(&[
        ("opened", 250),
        ("not opened", 100),
        ("attached", 80),
        ("committed", 150),
        ("committed, more than one edit", 20),
        ("refused", 200),
        ("removed", 5),
        ("cancelled", 2),
        ("faults of changes", 200),
        ("faults of opens", 40),
        ("faults of handovers", 10),
        ("inactivated", 20),
        ("activated", 20),
        ("closed", 10),
        ("in use", 10),
        ("stale ids", 8),
        ("frozen", 40),
        ("frozen, more than one link", 25),
    ]);
}

#[test]
fn requests_and_sections_wait_for_each_other_as_the_model_says() {
    let tally = Arc::default();
    let drawn = (any::<u64>(), ground(), vec(action(), 1..60));
    search(512, drawn, |(seed, ground, actions)| {
        run(seed, None, &tally, |world| async move {
            let mut traffic = Traffic::new(world, &ground).await;
            for action in &actions {
                traffic.step(action).await;
                traffic.check(&format!("{action:?}"));
            }
            traffic.end().await;
        });
    });
    tally.assert_least(&[
        ("completed", 400),
        ("abandoned", 100),
        ("waits at a gate", 3000),
        ("waits for requests", 600),
        ("drained", 5000),
    ]);
}

#[test]
fn tasks_in_any_order_find_what_always_holds() {
    let tally = Arc::default();
    search(512, (any::<u64>(), vec(vec(act(), 1..8), 2..5)), |(seed, tasks)| {
        let sim = Sim::new(seed, SimConfig::calm());
        sim.block_on(schedules::play(&sim, tasks, &tally));
        sim.run_until_idle();
    });
    tally.assert_least(&[
        ("changed", 600),
        ("refused", 300),
        ("cancelled", 8),
        ("read", 600),
        ("drained", 200),
        ("frozen", 80),
    ]);
}

/// Ids run out: slots are used again, retired, and the graph is full. What is refused for that leaves nothing.
#[test]
fn a_graph_whose_ids_run_out_agrees_with_the_model() {
    let tally = Arc::default();
    let drawn = (any::<u64>(), (1..4u32, 0..4u32), script(1..80));
    search(512, drawn, |(seed, widths, Script(script))| play(seed, Some(widths), &script, &tally));
    tally.assert_least(&[
        ("opened", 150),
        ("no room", 150),
        ("committed", 120),
        ("refused", 200),
        ("faults of changes", 200),
        ("closed", 8),
        ("stale ids", 8),
        ("frozen", 8),
    ]);
}
