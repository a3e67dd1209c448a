//! Block jobs: start, verbs, wait, facts.

use std::ffi::c_char;
use std::sync::Arc;
use std::time::Duration;

use bds_jobs::{JobHandle, JobStatus};
use futures_util::FutureExt;
use futures_util::future::{Either, select};
use serde_json::json;

use crate::abi::bds_status::{BDS_ERR_OPTION, BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{
    BDS_JOB_IS_BUSY, BDS_JOB_IS_PAUSED, BDS_JOB_IS_SYNCED, bds_context, bds_job, bds_job_info,
    bds_job_state,
};
use crate::change_commit::Beginning;
use crate::context::{self, Context};
use crate::entry::entry;
use crate::failure::{Failure, code_of};
use crate::job_options;
use crate::job_start::{self, Wanted};
use crate::option_text::parse;
use crate::ptr::{self, Checked, InOut, Out, Text};
use crate::table::{Object, Ref, Removed, Table};

static JOBS: Table<JobObject> = Table::new(11);

/// C's reference to a job. It keeps the context, not the job.
struct JobObject {
    job: JobHandle,
    context: Arc<Context>,
}

impl Object for JobObject {}

fn find(job: bds_job) -> Result<Ref<JobObject>, Failure> {
    JOBS.get(job.raw).map_err(|failure| failure.of("job"))
}

/// The entry of a job, also of one that a panic has poisoned: its end can be asked for and awaited.
fn find_any(job: bds_job) -> Result<Ref<JobObject>, Failure> {
    JOBS.find(job.raw).map_err(|failure| failure.of("job"))
}

/// A handle of C's.
pub(crate) fn handle(job: JobHandle, context: Arc<Context>) -> Result<bds_job, Failure> {
    Ok(bds_job { raw: JOBS.insert(JobObject { job, context })? })
}

fn give(job: JobHandle, context: Arc<Context>, out: Checked<bds_job>) -> Result<i32, Failure> {
    out.set(handle(job, context)?);
    Ok(BDS_OK as i32)
}

/// Starts a job. [graph]
///
/// `type`: "stream", "commit" (active or not), "mirror", "backup", "create", "amend".
/// `options`: JSON or `key=value,…` with QAPI's names: "job-id" (required), "speed",
/// "auto-finalize", "auto-dismiss", "on-error" or "on-source-error" and "on-target-error", and
/// those of the type: "device", "target", "base-node", "top-node", "sync", … Nodes are named by
/// node or backend name.
///
/// A backup or mirror with "record" (a file) goes on where an earlier one was interrupted;
/// "check-target" (full, sample, none), "record-bitmap" and "record-interval" belong to it. With
/// "manifest" (a file; also "manifest-base", "manifest-note") it writes hashes that prove the copy.
///
/// The job runs whether or not the handle is released.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8, BDS_ERR_JSON;
/// BDS_ERR_OPTION; BDS_ERR_EXISTS (the id), BDS_ERR_NOT_FOUND (a node), BDS_ERR_IN_USE,
/// BDS_ERR_UNSUPPORTED, BDS_ERR_CANCELLED, errnos. Nothing has changed then.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_start(
    context: bds_context,
    r#type: Text,
    options: Text,
    out: Out<bds_job>,
) -> i32 {
    entry("bds_job_start", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let kind = r#type.str("type")?;
        let mut options = parse(options, "options")?;
        let common = job_options::common(&mut options)?;
        let wanted = vec![Wanted { common, kind: kind.to_owned(), options }];
        let mut jobs = job_start::start(&context, wanted, &Beginning::none())?;
        let job = jobs.pop().expect("one for each that is wanted");
        give(job, Arc::clone(&context), out)
    })
}

/// A new handle for the job of this id. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_UTF8; BDS_ERR_NOT_FOUND: there
/// is none, or it was dismissed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_find(context: bds_context, id: Text, out: Out<bds_job>) -> i32 {
    entry("bds_job_find", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let job = context.jobs().job(id.str("id")?)?;
        give(job, context, out)
    })
}

/// Another handle for the job, for another owner. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_ref(job: bds_job, out: Out<bds_job>) -> i32 {
    entry("bds_job_ref", || {
        let out = out.check("out")?;
        let object = find(job)?;
        give(object.job.clone(), Arc::clone(&object.context), out)
    })
}

/// Releases a handle; the job goes on. [any]
///
/// BDS_STILL_REFERENCED: a call under way uses the handle.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_unref(job: bds_job) -> i32 {
    entry("bds_job_unref", || match JOBS.remove(job.raw)? {
        Removed::Taken(_) => Ok(BDS_OK as i32),
        Removed::InUse => Ok(BDS_STILL_REFERENCED as i32),
    })
}

/// Lets the job stop at its next pause point. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; BDS_ERR_OPTION, BDS_ERR_IN_USE: its state does not allow
/// it (the message says which).
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_pause(job: bds_job) -> i32 {
    entry("bds_job_pause", || {
        find(job)?.job.pause()?;
        Ok(0)
    })
}

/// Undoes bds_job_pause, or the pause after an error. [any]
///
/// Errors: as bds_job_pause.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_resume(job: bds_job) -> i32 {
    entry("bds_job_resume", || {
        find(job)?.job.resume()?;
        Ok(0)
    })
}

/// Requests the job's end. [any]
///
/// `force` 0: a ready mirror or active commit ends in order, without its effect on the graph. 1:
/// whatever it does is dropped.
///
/// Errors: as bds_job_pause; BDS_ERR_ARGUMENT: neither 0 nor 1.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_cancel(job: bds_job, force: i32) -> i32 {
    entry("bds_job_cancel", || {
        let object = find_any(job)?;
        match force {
            0 | 1 => object.job.cancel(force == 1)?,
            _ => return Err(Failure::argument("force is neither 0 nor 1")),
        }
        Ok(0)
    })
}

/// Ends a ready job as intended: a mirror's target takes over, an active commit's base. [any]
///
/// Errors: as bds_job_pause.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_complete(job: bds_job) -> i32 {
    entry("bds_job_complete", || {
        find(job)?.job.complete()?;
        Ok(0)
    })
}

/// Lets a pending job take effect. [any]
///
/// While a mirror or active commit is pending, no write to its disk ends.
///
/// Errors: as bds_job_pause.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_finalize(job: bds_job) -> i32 {
    entry("bds_job_finalize", || {
        find(job)?.job.finalize()?;
        Ok(0)
    })
}

/// Forgets a concluded job: its id is free. [any]
///
/// Errors: as bds_job_pause; BDS_ERR_NOT_FOUND: it was dismissed.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_dismiss(job: bds_job) -> i32 {
    entry("bds_job_dismiss", || {
        let object = find(job)?;
        object.context.jobs().dismiss(object.job.id())?;
        Ok(0)
    })
}

/// Changes options of a running job: of a mirror "copy-mode=write-blocking". [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_JSON, BDS_ERR_OPTION (an unknown
/// option or value; the job's state does not allow it); BDS_ERR_UNSUPPORTED: its type has no such
/// option, or it cannot change so.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_change(job: bds_job, options: Text) -> i32 {
    entry("bds_job_change", || {
        let object = find(job)?;
        let mode = job_options::change(parse(options, "options")?)?;
        object.job.change(mode)?;
        Ok(0)
    })
}

/// Limits the job's speed; 0: no limit. [any]
///
/// Errors: as bds_job_pause.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_set_speed(job: bds_job, bytes_per_second: u64) -> i32 {
    entry("bds_job_set_speed", || {
        find(job)?.job.set_speed(bytes_per_second)?;
        Ok(0)
    })
}

/// Facts about the job as JSON: state, progress, speed, error. Free it with bds_free. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_query(job: bds_job, json_out: Out<*mut c_char>) -> i32 {
    entry("bds_job_query", || {
        let out = json_out.check("json_out")?;
        let info = find_any(job)?.job.info();
        out.set(ptr::give_text(&json!(info).to_string())?);
        Ok(0)
    })
}

/// State and progress of the job, without an allocation. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT, BDS_ERR_VERSION.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_get_info(job: bds_job, info_out: InOut<bds_job_info>) -> i32 {
    entry("bds_job_get_info", || {
        let out = info_out.check("info_out")?;
        let object = find_any(job)?;
        out.set(&facts(&object.job));
        Ok(0)
    })
}

fn facts(job: &JobHandle) -> bds_job_info {
    let info = job.info();
    // The result of a job that is over is there at once.
    let is_over = matches!(info.status, JobStatus::Concluded | JobStatus::Null);
    let result = is_over.then(|| job.wait().now_or_never()).flatten();
    let flags = [
        (info.busy, BDS_JOB_IS_BUSY),
        (info.paused, BDS_JOB_IS_PAUSED),
        (info.actively_synced == Some(true), BDS_JOB_IS_SYNCED),
    ];
    bds_job_info {
        struct_size: 0,
        state: state(info.status) as u32,
        flags: flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum(),
        status: result.and_then(Result::err).map_or(BDS_OK as i32, |error| code_of(&error)),
        reserved: 0,
        progress: info.current_progress,
        total: info.total_progress,
        speed: info.speed,
    }
}

fn state(status: JobStatus) -> bds_job_state {
    match status {
        JobStatus::Undefined | JobStatus::Created => bds_job_state::BDS_JOB_STATE_CREATED,
        JobStatus::Running => bds_job_state::BDS_JOB_STATE_RUNNING,
        JobStatus::Paused => bds_job_state::BDS_JOB_STATE_PAUSED,
        JobStatus::Ready => bds_job_state::BDS_JOB_STATE_READY,
        JobStatus::Standby => bds_job_state::BDS_JOB_STATE_STANDBY,
        JobStatus::Waiting => bds_job_state::BDS_JOB_STATE_WAITING,
        JobStatus::Pending => bds_job_state::BDS_JOB_STATE_PENDING,
        JobStatus::Aborting => bds_job_state::BDS_JOB_STATE_ABORTING,
        JobStatus::Concluded => bds_job_state::BDS_JOB_STATE_CONCLUDED,
        JobStatus::Null => bds_job_state::BDS_JOB_STATE_NULL,
    }
}

/// Waits for the job. [io]
///
/// `state` NULL: until the job holds nothing any more; returns its result, any number of times.
/// Otherwise until it is in this state ("ready", "pending", "paused", …). `timeout_ns`: -1: waits
/// as long as it takes.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_UTF8; -ETIME; BDS_ERR_OPTION: an unknown state, or
/// the job is over without having been in it; without a state: why the job failed, among these
/// BDS_ERR_CANCELLED.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_wait(job: bds_job, state: Text, timeout_ns: i64) -> i32 {
    entry("bds_job_wait", || {
        // Not the table's reference: the handle may be released meanwhile.
        let job = find_any(job)?.job.clone();
        let wanted = state.optional("state")?.map(status).transpose()?;
        let done = async {
            match wanted {
                None => job.wait().await,
                Some(status) => job.wait_status(status).await,
            }
        };
        bds_io::block_on(async {
            let Ok(limit) = u64::try_from(timeout_ns) else { return Ok(done.await?) };
            let limit = std::pin::pin!(bds_io::sleep(Duration::from_nanos(limit)));
            match select(std::pin::pin!(done), limit).await {
                Either::Left((result, _)) => Ok(result?),
                Either::Right(_) => Err(Failure::errno(libc::ETIME, "the job is not so far")),
            }
        })?;
        Ok(0)
    })
}

fn status(name: &str) -> Result<JobStatus, Failure> {
    let found = JobStatus::ALL.into_iter().find(|status| status.as_str() == name);
    found.ok_or_else(|| Failure::new(BDS_ERR_OPTION, format!("there is no state '{name}'")))
}
