//! Command line tool `bds`: creates, converts, compares and checks disk images with qemu-img's
//! options.
//!
//! Translates arguments into calls of the library, results into text, errors into exit codes.
//! Contains no block layer code.
#![forbid(unsafe_code)]
// println! and its like: see printer.rs
#![deny(clippy::disallowed_macros, clippy::disallowed_methods)]

mod args;
mod backup_set;
mod cmd;
mod file_identity;
mod human_size;
mod image;
mod image_options;
mod image_spec;
mod incomplete;
mod interrupt;
mod overlay;
mod partial_output;
mod printer;
mod progress;
mod rates;
mod render;
mod report;

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
        Command::Verify(args) => return cmd::verify::run(args),
        Command::Backup(args) => return cmd::backup::run(args),
        Command::Measure(args) => cmd::measure::run(args),
        Command::Resize(args) => cmd::resize::run(args),
        Command::Bitmap(args) => cmd::bitmap::run(args),
        Command::Commit(args) => cmd::commit::run(args),
        Command::Stream(args) => cmd::stream::run(args),
        Command::Mirror(args) => cmd::mirror::run(args),
        Command::Bench(args) => cmd::bench::run(args),
        Command::Dd(args) => cmd::dd::run(args),
        Command::Graph(args) => cmd::graph::run(args),
        Command::Drivers(args) => cmd::drivers::run(args),
        Command::Completions(args) => cmd::manual::completions(args),
        Command::ManPages(args) => cmd::manual::man_pages(args),
    };
    match outcome {
        Ok(()) => printer::progress_failure().map_or(ExitCode::SUCCESS, report::failure),
        Err(error) => report::failure(&error),
    }
}

/// Prints what the parser returned instead of arguments. Help and version are results; anything
/// else is a usage error with exit code 1 as in qemu-img, except for `compare`, where 1 means
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
