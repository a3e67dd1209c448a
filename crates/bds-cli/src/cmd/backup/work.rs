//! Runs the jobs that copy the disks of a point: one group, which succeeds as a whole.

use std::pin::pin;
use std::time::Duration;

use bds_core::graph::Graph;
use bds_core::{Error, ErrorKind, Result};
use bds_jobs::backup::BackupOptions;
use bds_jobs::{Checkpoint, JobHandle, JobManager, JobOptions};
use futures_util::future::{Either, select};

use crate::args::{BackupRun, Output};
use crate::cmd::job::{self, Settings};
use crate::interrupt::{self, Interrupt};
use crate::progress::Progress;
use crate::rates::Meter;
use crate::report;

/// How often progress is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Copies all disks. Returns, for each, the bytes that an earlier run had copied.
///
/// # Errors
/// The cause, and how far the copy got; nothing more is written.
pub(super) async fn copy(
    graph: &Graph,
    backups: Vec<BackupOptions>,
    (args, interrupt): (&BackupRun, &Interrupt),
) -> Result<Vec<u64>> {
    let is_human = args.output == Output::Human && !args.quiet;
    let settings = Settings::of_command(args.progress && !args.quiet, !is_human);
    let manager = JobManager::new(graph);
    let mut events = manager.events();
    let mut checkpoint = Checkpoint::new(&manager);
    for backup in backups {
        let options = JobOptions::new(backup.job.clone());
        checkpoint = checkpoint.backup(backup, options);
    }
    let taken = checkpoint.take().await?;
    job::warn_of_left_over(&taken.left_over);
    let jobs = taken.jobs;
    let mut progress = Progress::of_job(settings.shows_progress());
    let (mut meter, mut ended) = (Meter::default(), pin!(end_of(&jobs)));
    let result = loop {
        match select(ended.as_mut(), pin!(bds_io::sleep(LOOK_INTERVAL))).await {
            Either::Left((result, _)) => break result,
            Either::Right(((), _)) => {}
        }
        let shown = job::show_events(&mut events, &settings);
        let (done, total) = done_and_total(&jobs);
        progress.show_job(done, total, &meter.add(bds_io::now(), done, total));
        if shown.is_err() || interrupt.has_arrived() {
            // One ends all, and may have ended just now.
            let _ended = jobs.first().map(|job| job.cancel(true));
        }
        shown?;
    };
    let (done, total) = done_and_total(&jobs);
    match &result {
        Ok(()) => progress.finish(total),
        Err(_) => progress.abandon(),
    }
    job::show_events(&mut events, &settings)?;
    match result {
        Ok(()) => Ok(jobs.iter().map(|job| job.info().resumed_bytes.unwrap_or(0)).collect()),
        Err(error) => Err(incomplete(&error, done, total)),
    }
}

/// Waits for all jobs. The error is that of the job that failed: the others are cancelled.
async fn end_of(jobs: &[JobHandle]) -> Result<()> {
    let mut ended = Ok(());
    for job in jobs {
        match (job.wait().await, &ended) {
            (Err(error), Ok(())) => ended = Err(error),
            (Err(error), Err(first)) if first.kind() == ErrorKind::Cancelled => ended = Err(error),
            _ => {}
        }
    }
    ended
}

fn done_and_total(jobs: &[JobHandle]) -> (u64, u64) {
    let infos = jobs.iter().map(JobHandle::info);
    infos.fold((0, 0), |(done, total), info| {
        (done + info.current_progress, total + info.total_progress)
    })
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
