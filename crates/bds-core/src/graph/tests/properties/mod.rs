//! Checks the properties of the lifecycle contract on random sequences of commands, against a
//! model.
//!
//! ```text
//! commands ──► run, closing, changes, claims ──┬─► the graph, on fake drivers that assert (test_kit::stepwise)
//!                                              └─► the model: maps, all else derived (model, edits, open)
//! check: snapshots of both are equal after every command
//! requests: held requests and sections; the model says which waits
//! schedules: tasks in any order, read into a model at the end
//! ```
//! The model shares no code with the product. Sequences that found a defect are in `regressions`.
//!
//! | property | checked in |
//! |---|---|
//! | P1 ids stale for ever | `check` (ids), `run` (stale ids), also when ids run out; bds-refcount |
//! | P2 retired slots, sum of slots | `check` (ids); bds-refcount drives slots to exhaustion |
//! | P3 other graphs, kinds, random ids | bds-refcount; `graph/tests/open.rs`, `graph/tests/change.rs` for graphs |
//! | P4 acquire | `run` (acquire), `check` (ids) |
//! | P5 identity | `check` (ids), `run` (keys) |
//! | P6 counts, and by name | `check` (ids, snapshots) |
//! | P7 dead and alive | `check` (slots) |
//! | P8 released twice | by type (`compile_fail/reference_after_release`); bds-refcount `release` |
//! | P9 which release was last | `run` (release); bds-refcount `release`, `threads`, `loom_arena` |
//! | P10 release is total | bds-refcount `release` (also while unwinding); here no command but a reap ever closes |
//! | P11 one close per open | `test_kit::driver`, `check` (ends) |
//! | P12 deep chains | `graph/tests/close.rs` (20,000 nodes); bds-refcount |
//! | P13 nothing is left | `check` (end), `run` (open at every step) |
//! | P14 failures reported once | `check` (ends), `closing` (close in use) |
//! | P15 clone, release | `run`, and the snapshot afterwards |
//! | P16 both ends of an edge | `snapshot` |
//! | P17 no loops | `edits` (refusals), `model` (recompute) |
//! | P18 roles | `snapshot` (one child per name); role clashes at opening: `graph/tests/open.rs` |
//! | P19 attach | `run` (attach), `edits` |
//! | P20 attach and detach | `changes`; filters follow from the model |
//! | P21 frozen | `claims`, `edits` |
//! | P22 replace | `edits` (move parents), `check` (roots) |
//! | P23 nothing dangles | `snapshot` (inheritance; ids of dead nodes count as none), `run` (stale ids) |
//! | P24, P27 permissions fit | `model` (legal), `check` |
//! | P25 from scratch | `model` (recompute), `snapshot`; after any schedule: `schedules` |
//! | P26 loosening | `changes` (a job's access) |
//! | P28, P30 prepared: committed or dropped | `test_kit::stepwise`, `check` (ends); permissions have no callbacks to pair |
//! | P29 failure at every step | `changes` (graph's and drivers' steps in one numbering), `run` (open) |
//! | P31 dropped changes | `changes` (dropped, cancelled after n polls) |
//! | P32 order of deaths | `changes` through the model's graveyard |
//! | P33 only the outcome counts | `edits` (legal once, at the end) |
//! | P34 no request inside | `test_kit::driver`, `requests`, `schedules`, gates in `snapshot` |
//! | P35 quiesce counts | `model`, `snapshot`, `requests`, `schedules`. No pause counts of jobs: there are none yet |
//! | P36 drain callbacks alternate | `test_kit::driver` |
//! | P37 one completion | `requests`. No completion callbacks: a request leaves the count when its future ends |
//! | P38 sections hold nodes, ending one changes nothing | `requests`, `closing` |
//! | P39 lock and drain | by type (bds-core `compile_fail/drained_by_hand`, `edit_from_outside`) |
//! | P40 no deadlock | `schedules`: the simulation panics if nothing can run |
//! | P41 contexts | not here: nodes have no context, any thread runs them |
//! | P42 names | `open`, `edits` (rename), `check` (ids). Backends have no names in this namespace yet |
//! | P43 del | `closing` |
//! | P44 top level | `run` (walks with edits in between), `check` (lists) |
//! | P45 jobs | job slots (`claims`) and job edges that stay (`edits`, `check`); there is no job lifecycle yet |
//! | P46 bitmaps | `claims`, `check` (lists), failed closes in `model` |
//! | P47 inactive | `edits`, `changes`, `model` (legal) |
//! | P48 shutdown | `closing`, `check` (end) |
//! | P49 watches | `check` (lists), `run` (post mortem); wake-ups: bds-refcount |
//! | P50 C ABI | not here: there is none yet |

mod changes;
mod check;
mod claims;
mod closing;
mod commands;
mod edits;
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
use requests::{RequestTest, action, initial_nodes};
use run::{Widths, run};
pub(super) use schedules::check_permissions;
use schedules::op;

/// This many cases, or ten times that with the full budget.
fn cases(count: u32) -> ProptestConfig {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let cases = if is_full { count * 10 } else { count };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Runs a sequence and compares after every command.
fn play(seed: u64, widths: Option<Widths>, script: &[Command], tally: &Arc<Tally>) {
    run(seed, widths, tally, |mut both| async move {
        for command in script {
            both.step(command).await;
            both.check(&format!("{command:?}"));
        }
        both.end().await;
    });
}

/// Runs a test on this many generated values; a failure is shrunk and printed.
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
fn requests_and_drained_sections_wait_as_the_model_says() {
    let tally = Arc::default();
    let drawn = (any::<u64>(), initial_nodes(), vec(action(), 1..60));
    search(512, drawn, |(seed, initial_nodes, actions)| {
        run(seed, None, &tally, |both| async move {
            let mut test = RequestTest::new(both, &initial_nodes).await;
            for action in &actions {
                test.step(action).await;
                test.check(&format!("{action:?}"));
            }
            test.end().await;
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
fn concurrent_tasks_keep_the_invariants() {
    let tally = Arc::default();
    search(512, (any::<u64>(), vec(vec(op(), 1..8), 2..5)), |(seed, tasks)| {
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

/// Ids run out: slots are reused and retired, and the graph is full. BlockOps refused for that
/// leave no trace.
#[test]
fn a_graph_whose_ids_run_out_agrees_with_the_model() {
    let tally = Arc::default();
    let drawn = (any::<u64>(), (1..4u32, 0..4u32), script(1..80));
    search(512, drawn, |(seed, widths, Script(script))| play(seed, Some(widths), &script, &tally));
    tally.assert_least(&[
        ("opened", 150),
        ("graph is full", 150),
        ("committed", 120),
        ("refused", 200),
        ("faults of changes", 200),
        ("closed", 8),
        ("stale ids", 8),
        ("frozen", 8),
    ]);
}
