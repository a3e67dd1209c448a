//! `bds`: disk images from the shell, with qemu-img's words.
//!
//! This crate translates: arguments into calls, results into text, errors into exit codes. It decides nothing that a program
//! using the library could not decide for itself.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "printing is what a tool does")]

mod args;
mod cmd;
mod file_identity;
mod image;
mod overlay;
mod progress;
mod render;
mod report;
mod stop;
mod text;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind as ClapErrorKind;

use args::{Cli, Command};

fn main() -> ExitCode {
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
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::failure(&error),
    }
}

/// Help and version are answers, everything else is a mistake: 1, as qemu-img, except for `compare`, where 1 means
/// "different".
fn usage(error: &clap::Error) -> ExitCode {
    // If nothing can be printed there is nobody to tell.
    let _ = error.print();
    let is_compare = std::env::args_os().nth(1).is_some_and(|word| word == "compare");
    match error.kind() {
        ClapErrorKind::DisplayHelp | ClapErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ if is_compare => ExitCode::from(2),
        _ => ExitCode::from(1),
    }
}
