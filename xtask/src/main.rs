//! Development commands of the project: demo, test, matrix, tidy, bench, outside, dist, doctor, ci.
//! Dispatch only.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_macros)] // println! and its like: see run.rs

mod abi;
mod bench;
mod cargo_test;
mod ci;
mod demo;
mod dist;
mod doctor;
mod flags;
mod header;
mod man3;
mod matrix;
mod mutants;
mod outcome;
mod outside;
mod run;
mod test;
mod tidy;

use std::process::ExitCode;

use flags::{Command, HELP};

fn main() -> ExitCode {
    let command = match flags::parse(std::env::args().skip(1)) {
        Ok(command) => command,
        Err(why) => {
            run::say_error(&format!("{why}\n\n{HELP}"));
            return ExitCode::from(2);
        }
    };
    let result = match command {
        Command::Help => {
            run::say(HELP);
            Ok(())
        }
        Command::Demo => demo::demo(),
        Command::Test { tier, rest } => test::test(tier, &rest),
        Command::Matrix { only, list } => matrix::matrix(&only, list),
        Command::Tidy(show) => tidy::tidy(show),
        Command::Bench { quick, only } => bench::bench(quick, only.as_deref()),
        Command::Measure { report, command } => bench::measure::run_child(&report, &command),
        Command::Outside => outside::outside(),
        Command::Dist { prefix, library_only } => dist::dist(prefix.as_deref(), library_only),
        Command::Abi => abi::check(),
        Command::Header { check } => header::header(check),
        Command::Doctor => doctor::doctor(),
        Command::Ci => ci::ci(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            run::say_error(&format!("xtask: {why}"));
            ExitCode::FAILURE
        }
    }
}
