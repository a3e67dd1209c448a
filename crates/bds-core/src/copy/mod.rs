//! Copies ranges between nodes: [`copy`] is the engine of `convert`, [`run`] the one of jobs and
//! filters.
//!
//! | | [`copy`] | [`run`] |
//! |---|---|---|
//! | what | whole backends, concatenated | dirty granules of a [`CopyMap`] |
//! | order | by offset, in turns of writes | none |
//! | others that write | none | a guest, through a filter |
//! | errors, pauses | the first error ends it | [`CopyControl`] decides |
//!
//! [`copy`]: a planner queries the block status of the sources and hands out pieces; up to
//! `workers` workers copy one piece each through one buffer each, so memory is bounded by
//! `workers * buffer_len`. Holes are not read; zeros are not written where the target reads as
//! zeros anyway.
//!
//! ```text
//! planner ─► piece: nothing to do │ zeros │ data
//! worker      read ─► (wait for its turn) ─► split into zeros and data ─► write
//! ```
//!
//! It does not decide whether the target reads as zeros, resize it, or flush it at the end. The
//! copy runs in the caller's future: dropping it stops the copy, with the target partly written.

mod control;
mod job;
mod map;
mod observer;
mod options;
mod plan;
mod run;
mod sides;
mod sparse;
mod worker;

use std::sync::atomic::AtomicBool;

use bds_io::BufPool;
use futures_util::future::join_all;

use crate::error::{Error, ErrorKind, Result};
use crate::request::Backend;

pub use control::{CopyControl, DiskUse, ErrorSite, ErrorVerdict, Side};
use job::{Counts, Job, Turns};
pub use map::{Claim, CopyMap, Exclusion};
pub use observer::{Content, CopyObserver, Examined, Observation, Observed};
use options::check_options;
pub use options::{
    BUFFER_LEN, CopyOptions, CopyReport, CopySource, GRAIN, MAX_BUFFER_LEN, MAX_WORKERS, OnSalvage,
    Progress, RateLimit,
};
use plan::Planner;
pub use run::{MAX_CHUNK, MAX_OFFLOAD, MAX_REQUESTS, MEMORY, RunOptions, run, run_in_task};
pub use sides::{CopyRead, CopyWrite, Found, FoundRun};
use worker::Worker;

/// Copies the concatenated sources to the beginning of `target`.
///
/// # Errors
/// The first failure, which says whether the source or the target failed and where; pieces in
/// flight end before this returns. `InvalidInput`: a wrong option, or the target is too short.
pub async fn copy(
    sources: &[CopySource],
    target: &Backend,
    options: &CopyOptions,
) -> Result<CopyReport> {
    check_options(options)?;
    let planner = Planner::new(sources, options);
    let total = planner.total();
    if target.len() < total {
        let message = format!("the target is shorter ({} bytes) than the source", target.len());
        return Err(Error::new(ErrorKind::InvalidInput, message).field("length", total));
    }
    let job = Job {
        sources,
        target,
        options,
        planner: bds_io::sync::Mutex::new(planner),
        turns: Turns::default(),
        counts: Counts::default(),
        failed: AtomicBool::new(false),
        pool: BufPool::new(0),
        total,
    };
    let workers = (0..options.workers).map(|_| Worker::new(&job).run());
    let mut first = Ok(());
    for result in join_all(workers).await {
        // A worker that stopped because another failed returns no error.
        first = first.and(result);
    }
    first?;
    if options.compress.is_some() {
        target
            .write_compressed(total, bds_io::IoVec::default())
            .await
            .map_err(|e| e.context("cannot finish the compressed target"))?;
    }
    Ok(job.counts.report(total))
}

#[cfg(test)]
mod tests;
