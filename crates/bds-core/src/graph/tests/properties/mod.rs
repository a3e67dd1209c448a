//! The properties of the lifecycle contract, checked on random sequences of commands.

mod beside;
mod changing;
mod check;
mod commands;
mod edits;
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

/// So many cases, or twenty times that when everything is asked for.
fn cases(count: u32) -> ProptestConfig {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    let cases = if is_full { count * 20 } else { count };
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
    #![proptest_config(cases(256))]
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
