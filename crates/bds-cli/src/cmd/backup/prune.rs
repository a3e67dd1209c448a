//! `backup prune`: removes the oldest points.
//!
//! The oldest point that is kept becomes a full backup first: what its image shows of the images
//! below is copied into it (the job `stream`). Its content is the same at every moment of that.

use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::{JobManager, JobOptions, Stream, StreamOptions};
use serde_json::json;

use crate::args::{BackupPrune, Output};
use crate::backup_set::{BackupSet, Point};
use crate::image;
use crate::interrupt::Interrupt;
use crate::printer;

/// What was removed, and how much is left.
pub(super) struct Pruned {
    pub(super) removed: Vec<u32>,
    pub(super) kept_count: usize,
}

/// # Errors
/// `InvalidInput`: nothing would be kept.
pub(super) fn check(args: &BackupPrune) -> Result<()> {
    if args.keep == 0 {
        let message = "--keep must be at least 1: remove the directory to remove all backups";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok(())
}

pub(super) fn prune(args: &BackupPrune) -> Result<Pruned> {
    let set = BackupSet::open(&args.directory)?;
    let (old, kept) = set.points().split_at(set.points().len().saturating_sub(args.keep));
    if let (Some(first), false) = (kept.first(), old.is_empty()) {
        make_full(&set, first)?;
    }
    remove(&set, old)?;
    let removed = old.iter().map(|point| point.number).collect();
    Ok(Pruned { removed, kept_count: kept.len() })
}

pub(super) fn print(args: &BackupPrune, pruned: &Pruned) -> Result<()> {
    let Pruned { removed, kept_count } = pruned;
    match args.output {
        Output::Json => printer::json(&json!({ "removed": removed })),
        Output::Human if args.quiet => Ok(()),
        Output::Human => {
            printer::line(format_args!("Removed {} points, kept {kept_count}", removed.len()))
        }
    }
}

/// Makes the point's image hold all of its content.
pub(super) fn make_full(set: &BackupSet, point: &Point) -> Result<()> {
    set.chain(point)?;
    if set.is_full(point) {
        return Ok(());
    }
    fill(set, point)?;
    set.mark_full(point.number)
}

/// Removes points, the newest first: the others keep what they are made on, wherever this ends.
pub(super) fn remove(set: &BackupSet, points: &[Point]) -> Result<()> {
    points.iter().rev().try_for_each(|point| set.remove(point.number))
}

/// Copies all that the point's image shows into it.
fn fill(set: &BackupSet, point: &Point) -> Result<()> {
    let mut options = Options::new();
    options.set("driver", "qcow2");
    options.set("file.driver", "file");
    options.set_path("file.filename", set.image(point.number));
    image::block_on(async {
        let interrupt = Interrupt::watch()?;
        let graph = image::trusting_graph();
        let node = graph.open(options).await?;
        let job = Stream::prepare("prune", StreamOptions::new(&node)).await?;
        let jobs = JobManager::new(&graph);
        let handle = jobs.start(JobOptions::new("prune"), job).await?;
        let ended = match interrupt.run_or_drop(handle.wait()).await {
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                // It may have ended just now.
                let _ended = handle.cancel(true);
                handle.wait().await.and(Err(error))
            }
            ended => ended,
        };
        let closed = node.close().await?.into_result();
        ended.and(closed)
    })
}
