//! Sets jobs up and starts them, all or none, with their beginnings in one change of the graph.

use std::sync::Arc;

use bds_core::Options;
use bds_jobs::{JobHandle, JobOptions, NewJob};

use crate::abi::bds_status::BDS_ERR_UNSUPPORTED;
use crate::change_commit::Beginning;
use crate::context::Context;
use crate::failure::Failure;
use crate::job_options::{self, Prepared, begins_with_a_change};

/// A job that is to be started.
pub(crate) struct Wanted {
    pub(crate) common: JobOptions,
    pub(crate) kind: String,
    /// Those of its type.
    pub(crate) options: Options,
}

/// Starts jobs as a group: all, or none.
pub(crate) fn start(
    context: &Arc<Context>,
    wanted: Vec<Wanted>,
    beginning: &Beginning,
) -> Result<Vec<JobHandle>, Failure> {
    check(context, &wanted, beginning)?;
    let prepared = bds_io::block_on(prepare(context, wanted))?;
    let staged = |change| prepared.iter().fold(change, |change, (_, job)| job.stage(change));
    let must_commit =
        !beginning.is_none() || prepared.iter().any(|(_, job)| !matches!(job, Prepared::Begun(_)));
    if must_commit && let Err(failure) = beginning.commit(context, staged) {
        bds_io::block_on(discard(context, prepared));
        return Err(failure);
    }
    bds_io::block_on(async {
        let jobs = begin(context, prepared).await?;
        Ok(context.jobs().start_group(jobs).await?)
    })
}

/// What can be checked before anything is set up.
fn check(context: &Context, wanted: &[Wanted], beginning: &Beginning) -> Result<(), Failure> {
    for (index, job) in wanted.iter().enumerate() {
        let id = &job.common.id;
        context.jobs().check_id(id)?;
        if wanted[..index].iter().any(|other| other.common.id == *id) {
            return Err(Failure::argument(format!("two jobs have the id '{id}'")));
        }
        if !beginning.is_none() && !begins_with_a_change(&job.kind) {
            let words = format!("a job of type '{}' cannot begin with a change", job.kind);
            return Err(Failure::new(BDS_ERR_UNSUPPORTED, words));
        }
    }
    Ok(())
}

async fn prepare(
    context: &Arc<Context>,
    wanted: Vec<Wanted>,
) -> Result<Vec<(JobOptions, Prepared)>, Failure> {
    let mut prepared = Vec::with_capacity(wanted.len());
    for Wanted { common, kind, options } in wanted {
        match job_options::prepare(&context.graph, &kind, &common.id, options).await {
            Ok(job) => prepared.push((common, job)),
            Err(error) => {
                discard(context, prepared).await;
                return Err(error.into());
            }
        }
    }
    Ok(prepared)
}

/// The work of all jobs, after the change took effect.
async fn begin(
    context: &Arc<Context>,
    prepared: Vec<(JobOptions, Prepared)>,
) -> Result<Vec<NewJob>, Failure> {
    let (mut jobs, mut failed) = (Vec::new(), None);
    for (common, job) in prepared {
        match job.begun().await {
            Ok(driver) => jobs.push((common, driver)),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let Some(error) = failed else { return Ok(jobs) };
    retire(context, jobs).await;
    Err(error.into())
}

/// Gives everything back that the jobs hold, newest first.
async fn discard(context: &Arc<Context>, prepared: Vec<(JobOptions, Prepared)>) {
    for (common, job) in prepared.into_iter().rev() {
        let discarded = match job {
            Prepared::Backup(backup) => backup.discard().await,
            Prepared::Mirror(mirror) => mirror.discard().await,
            Prepared::Begun(driver) => {
                retire(context, vec![(common, driver)]).await;
                continue;
            }
        };
        note(context, discarded);
    }
}

async fn retire(context: &Arc<Context>, jobs: Vec<NewJob>) {
    note(context, context.jobs().discard(jobs).await);
}

/// The job was not started, and that has an error of its own.
fn note(context: &Context, discarded: bds_core::Result<()>) {
    if let Err(error) = discarded {
        context.log().error("bds_ffi::job", &format!("a job that was not started: {error}"));
    }
}
