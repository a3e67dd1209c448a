//! `backup`: full and incremental backups of an image that no other process has open.
//!
//! A directory holds the points in time ([`crate::backup_set`]). The source's persistent bitmap
//! says what has changed since the last point.

mod copy;
mod list;
mod prune;
mod restore;
mod run;
mod verify;

use std::process::ExitCode;

use bds_core::ErrorKind;

use crate::args::{Backup, BackupCommand};
use crate::{interrupt, report};

/// Exit code of content that differs from its manifest, as of `verify`.
const DIFFERS: u8 = 2;

pub(crate) fn run(args: &Backup) -> ExitCode {
    let outcome = match &args.command {
        BackupCommand::Run(args) => run::run(args).map(|()| true),
        BackupCommand::List(args) => list::run(args).map(|()| true),
        BackupCommand::Restore(args) => restore::run(args),
        BackupCommand::Prune(args) => prune::run(args).map(|()| true),
        BackupCommand::Verify(args) => verify::run(args),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(DIFFERS),
        Err(error) => {
            report::failure(&error);
            let of_signal = interrupt::exit_code().filter(|_| error.kind() == ErrorKind::Cancelled);
            ExitCode::from(of_signal.unwrap_or(1))
        }
    }
}
