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

use commands::Command;
use run::{Widths, run};

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
