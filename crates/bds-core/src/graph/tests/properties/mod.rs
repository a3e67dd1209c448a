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

mod beside;
mod changing;
mod check;
mod commands;
mod edits;
mod ends;
mod fake;
mod model;
mod opening;
mod picture;
mod regressions;
mod run;
mod schedules;
mod traffic;

use bds_io::{Sim, SimConfig};
use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, proptest};

use commands::{Command, script};
use run::{Widths, run};
use schedules::act;
use traffic::{Traffic, action, ground};

/// So many cases, or ten times that when everything is asked for.
fn cases(count: u32) -> ProptestConfig {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let cases = if is_full { count * 10 } else { count };
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// Plays a sequence and compares after every command.
fn play(seed: u64, widths: Option<Widths>, script: &[Command]) {
    run(seed, widths, |mut world| async move {
        for command in script {
            world.step(command).await;
            world.check(&format!("{command:?}"));
        }
        world.end().await;
    });
}

proptest! {
    #![proptest_config(cases(512))]
    #[test]
    fn any_sequence_of_commands_agrees_with_the_model(
        seed in any::<u64>(),
        script in script(1..60),
    ) {
        play(seed, None, &script.0);
    }

    #[test]
    fn requests_and_sections_wait_for_each_other_as_the_model_says(
        seed in any::<u64>(),
        ground in ground(),
        actions in vec(action(), 1..60),
    ) {
        run(seed, None, |world| async move {
            let mut traffic = Traffic::new(world, &ground).await;
            for action in &actions {
                traffic.step(action).await;
                traffic.check(&format!("{action:?}"));
            }
            traffic.end().await;
        });
    }

    #[test]
    fn tasks_in_any_order_find_what_always_holds(
        seed in any::<u64>(),
        tasks in vec(vec(act(), 1..8), 2..5),
    ) {
        let sim = Sim::new(seed, SimConfig::calm());
        sim.block_on(schedules::play(&sim, tasks));
        sim.run_until_idle();
    }

    /// Ids run out: slots are used again, retired, and the graph is full. What is refused for that leaves nothing.
    #[test]
    fn a_graph_whose_ids_run_out_agrees_with_the_model(
        seed in any::<u64>(),
        widths in (1..4u32, 0..4u32),
        script in script(1..80),
    ) {
        play(seed, Some(widths), &script.0);
    }
}
