//! Runs the jobs that copy the disks of a point: one group, which succeeds as a whole.

use bds_core::graph::Graph;
use bds_core::{Error, ErrorKind, Result};
use bds_jobs::backup::BackupOptions;
use bds_jobs::{Checkpoint, JobManager, JobOptions};

use crate::args::{BackupRun, Output};
use crate::cmd::job::{self, Settings, WhenReady};
use crate::interrupt::{self, Interrupt};
use crate::report;

/// Copies all disks. Returns, for each, the bytes that an earlier run had copied.
///
/// # Errors
/// The cause, and how far the copy got; nothing more is written.
pub(super) async fn run(
    graph: &Graph,
    backups: Vec<BackupOptions>,
    (args, interrupt): (&BackupRun, &Interrupt),
) -> Result<Vec<u64>> {
    let is_human = args.output == Output::Human && !args.quiet;
    let settings = Settings::of_command(args.progress && !args.quiet, !is_human);
    let manager = JobManager::new(graph);
    let events = manager.events();
    let mut checkpoint = Checkpoint::new(&manager);
    for backup in backups {
        let options = JobOptions::new(backup.job.clone());
        checkpoint = checkpoint.backup(backup, options);
    }
    let taken = checkpoint.take().await?;
    job::warn_of_left_over(&taken.left_over);
    let jobs = taken.jobs;
    let (result, done, total) =
        job::follow(&jobs, events, &settings, interrupt, WhenReady::Never).await;
    result.map_err(|error| incomplete(&error, done, total))?;
    Ok(jobs.iter().map(|job| job.info().resumed_bytes.unwrap_or(0)).collect())
}

fn incomplete(error: &Error, done: u64, total: u64) -> Error {
    let cause = match error.kind() {
        ErrorKind::Cancelled if interrupt::exit_code().is_some() => "interrupted".to_owned(),
        _ => report::message(error),
    };
    let message = format!(
        "{cause}; the point is unfinished: {done} of {total} bytes copied; it is kept, the next \
         run goes on with it"
    );
    Error::new(error.kind(), message)
}
