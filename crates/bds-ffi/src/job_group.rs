//! Starts several jobs as one transaction that begins at one point in time.

use std::sync::Arc;

use bds_core::Options;
use serde_json::Value;

use crate::abi::bds_status::BDS_ERR_JSON;
use crate::abi::{bds_change, bds_context, bds_job};
use crate::change_commit::Beginning;
use crate::context;
use crate::entry::entry;
use crate::failure::Failure;
use crate::job::handle;
use crate::job_options;
use crate::job_start::{Wanted, start};
use crate::ptr::{Array, Text};

/// Starts jobs that take effect together or not at all, at one point in time. [graph]
///
/// `jobs`: a JSON array of objects, each with a "type" and the options of bds_job_start. The
/// copies of all backups and mirrors among them are of one moment. If one job fails or is
/// cancelled, all end as cancelled and nothing has changed; if one has "auto-finalize" off, all
/// wait for bds_job_finalize.
///
/// `change`: its edits are made in the same moment (overlays, bitmaps that begin, filters), all or
/// nothing with the beginnings; on success it is empty and can be used again, and what it closed is
/// not reported. Then all jobs must be backups or mirrors. 0: none.
///
/// `jobs_out` gets a handle for each job, in order; `capacity` is their number at least, or 0: no
/// handles are made, and bds_job_find makes them.
///
/// Errors: as bds_job_start and bds_change_commit, of the first job that cannot start; no job was
/// started, nothing has changed, and the edits are kept. BDS_ERR_JSON: no array of objects;
/// BDS_ERR_ARGUMENT also: no job, `capacity`, another context; BDS_ERR_UNSUPPORTED also: a job of
/// another type with a `change`. Where the id of a job was taken, a link was frozen, or the context
/// was shut down by another thread after the change took effect, no job runs, and the edits stay.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_job_start_group(
    context: bds_context,
    jobs: Text,
    change: bds_change,
    jobs_out: Array<bds_job>,
    capacity: usize,
) -> i32 {
    entry("bds_job_start_group", || {
        let out = jobs_out.check(capacity, "jobs_out")?;
        let context = context::find(context)?;
        let beginning = Beginning::find(&context, change)?;
        let wanted = read(jobs.str("jobs")?)?;
        if capacity != 0 && capacity < wanted.len() {
            let words = format!("capacity is {capacity}, and there are {} jobs", wanted.len());
            return Err(Failure::argument(words));
        }
        let started = start(&context, wanted, &beginning)?;
        if capacity != 0 {
            for (index, job) in started.into_iter().enumerate() {
                out.write(index, handle(job, Arc::clone(&context))?);
            }
        }
        Ok(0)
    })
}

fn read(text: &str) -> Result<Vec<Wanted>, Failure> {
    let wrong = |words: &str| Failure::new(BDS_ERR_JSON, format!("jobs: {words}"));
    let list: Value = serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
    let Value::Array(list) = list else { return Err(wrong("this is no array")) };
    if list.is_empty() {
        return Err(Failure::argument("jobs: there is none"));
    }
    let one = |value: Value| {
        if !value.is_object() {
            return Err(wrong("an element is no object"));
        }
        let mut options = Options::from_json(value)?;
        let none = || Failure::new(BDS_ERR_JSON, "jobs: an element has no \"type\"");
        let kind = options.take_str("type")?.ok_or_else(none)?;
        let common = job_options::common(&mut options)?;
        Ok(Wanted { common, kind, options })
    };
    list.into_iter().map(one).collect()
}
