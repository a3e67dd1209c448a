//! `bds`: disk images from the shell, with qemu-img's words.
//!
//! This crate translates: arguments into calls, results into text, errors into exit codes. It decides nothing that a program
//! using the library could not decide for itself.
#![forbid(unsafe_code)]
// println! and its like: see printer.rs
#![deny(clippy::disallowed_macros, clippy::disallowed_methods)]

mod args;
mod cmd;
mod describe;
mod file_identity;
mod image;
mod overlay;
mod partial;
mod printer;
mod progress;
mod render;
mod report;
mod stop;
mod text;

use std::process::ExitCode;

use bds_core::Error;
use clap::Parser;
use clap::error::ErrorKind as ClapErrorKind;

use args::{Cli, Command};

fn main() -> ExitCode {
    if let Err(error) = bds_io::signals::ignore_file_size_limit() {
        return report::failure(&Error::io(error, "cannot ignore SIGXFSZ"));
    }
    let words = args::with_last_size_protected(std::env::args_os());
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = match &cli.command {
        Command::Create(args) => cmd::create::run(args),
        Command::Info(args) => cmd::info::run(args),
        Command::Convert(args) => cmd::convert::run(args),
        Command::Compare(args) => return cmd::compare::run(args),
        Command::Map(args) => cmd::map::run(args),
        Command::Check(args) => return cmd::check::run(args),
        Command::Measure(args) => cmd::measure::run(args),
        Command::Resize(args) => cmd::resize::run(args),
        Command::Bench(args) => cmd::bench::run(args),
        Command::Dd(args) => cmd::dd::run(args),
        Command::Graph(args) => cmd::graph::run(args),
        Command::Drivers(args) => cmd::drivers::run(args),
        Command::Completions(args) => cmd::manual::completions(args),
        Command::ManPages(args) => cmd::manual::man_pages(args),
    };
    match outcome {
        Ok(()) => printer::failed_aside().map_or(ExitCode::SUCCESS, report::failure),
        Err(error) => report::failure(&error),
    }
}

/// Help and version are answers, everything else is a mistake: 1, as qemu-img, except for `compare`, where 1 means
/// "different".
fn usage(error: &clap::Error) -> ExitCode {
    let words = error.render().to_string();
    let is_compare = std::env::args_os().nth(1).is_some_and(|word| word == "compare");
    match error.kind() {
        ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion => match printer::text(&words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => report::failure(&error),
        },
        _ => {
            printer::message(words.trim_end());
            ExitCode::from(if is_compare { 2 } else { 1 })
        }
    }
}
