//! `backup`: full and incremental backups of an image that no other process has open.
//!
//! A directory holds the points in time ([`crate::backup_set`]). The source's persistent bitmap
//! says what has changed since the last point. A directory of several disks has such a directory
//! for each, and a record of every point that all of them have (`group`).

mod copy;
mod copy_jobs;
mod group;
mod leftover;
mod list;
mod moment;
mod notes;
mod prune;
mod restore;
mod run;
mod verify;

use std::process::ExitCode;

use bds_core::{ErrorKind, Result};

use self::group::Group;
use crate::args::{Backup, BackupCommand};
use crate::{interrupt, report};

/// Exit code of content that differs from its manifest, as of `verify`.
const DIFFERS: u8 = 2;

pub(crate) fn run(args: &Backup) -> ExitCode {
    match run_command(&args.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(DIFFERS),
        Err(error) => {
            report::failure(&error);
            let of_signal = interrupt::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
            ExitCode::from(of_signal.unwrap_or(1))
        }
    }
}

/// Returns whether all content is what its manifest describes. Directories of several disks go to
/// `group`.
fn run_command(command: &BackupCommand) -> Result<bool> {
    match command {
        BackupCommand::Run(args) => {
            let (sources, directory) = run::paths(args);
            match sources {
                [one] if args.names.is_empty() && !Group::is_one(directory) => {
                    run::run(args, one, directory)?;
                }
                several => group::run(args, several, directory)?,
            }
        }
        BackupCommand::List(args) if Group::is_one(&args.directory) => group::list(args)?,
        BackupCommand::List(args) => list::run(args)?,
        BackupCommand::Restore(args) => {
            return match Group::is_one(&args.directory) {
                true => group::restore(args),
                false => restore::run(args),
            };
        }
        BackupCommand::Prune(args) => {
            prune::check(args)?;
            let pruned = match Group::is_one(&args.directory) {
                true => group::prune(args)?,
                false => prune::prune(args)?,
            };
            prune::print(args, &pruned)?;
        }
        BackupCommand::Verify(args) => {
            return match Group::is_one(&args.directory) {
                true => group::verify(args),
                false => verify::run(args),
            };
        }
    }
    Ok(true)
}
