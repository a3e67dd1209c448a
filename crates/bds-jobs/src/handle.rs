//! `JobHandle`: one job's verbs and its result.

use std::sync::Arc;

use bds_core::Result;

use crate::job::{Job, refused};
use crate::kinds::JobChange;
use crate::query::JobInfo;
use crate::state::JobStatus;

/// A handle to a job. Dropping it changes nothing; it stays valid when the job is gone.
#[derive(Clone, Debug)]
pub struct JobHandle(pub(crate) Arc<Job>);

impl JobHandle {
    /// Its id.
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// Its state now.
    pub fn status(&self) -> JobStatus {
        self.0.status()
    }

    /// What queries show.
    pub fn info(&self) -> JobInfo {
        JobInfo::of(&self.0)
    }

    /// Lets it stop at its next pause point.
    ///
    /// # Errors
    /// Its state does not allow that, or it is paused already.
    pub fn pause(&self) -> Result<()> {
        self.0.pause()
    }

    /// Undoes [`JobHandle::pause`], or the pause after an error; the I/O status is `ok` again.
    ///
    /// # Errors
    /// It was not paused.
    pub fn resume(&self) -> Result<()> {
        self.0.resume()
    }

    /// Requests its end. Returns at once; the job's result says how it ended.
    ///
    /// Not forced, a ready mirror or active commit ends in order, without its effect on the graph;
    /// for others every cancel is forced. A forced cancel ends its group.
    ///
    /// # Errors
    /// Its state does not allow that; or it is paused, and the cancel is not forced.
    pub fn cancel(&self, is_forced: bool) -> Result<()> {
        self.0.cancel(is_forced)
    }

    /// Ends a ready job as intended. A paused one ends after it was resumed.
    ///
    /// # Errors
    /// It is not ready, its type does not have this verb, or it was cancelled.
    pub fn complete(&self) -> Result<()> {
        self.0.complete()
    }

    /// Lets its pending group take effect.
    ///
    /// # Errors
    /// It is not pending.
    pub fn finalize(&self) -> Result<()> {
        self.0.finalize()
    }

    /// Limits its speed, in bytes a second; 0: no limit. A job that waits for its speed wakes up.
    ///
    /// # Errors
    /// Its work is over.
    pub fn set_speed(&self, speed: u64) -> Result<()> {
        self.0.set_speed(speed)
    }

    /// Changes an option of its type.
    ///
    /// # Errors
    /// Its work is over, or its type does not allow the change.
    pub fn change(&self, change: JobChange) -> Result<()> {
        self.0.change(change)
    }

    /// Waits until it holds nothing any more (and its id is free, if it dismisses itself), and
    /// returns its result: any number of times, also after it was dismissed.
    ///
    /// # Errors
    /// Why it failed; `Cancelled`: it, or another member of its group, was cancelled or failed.
    pub async fn wait(&self) -> Result<()> {
        self.0.wait().await
    }

    /// Waits until it has this status, or is over.
    ///
    /// # Errors
    /// `InvalidInput`: it is over without.
    pub async fn wait_status(&self, status: JobStatus) -> Result<()> {
        let reached = self.0.changed.wait_for(|| {
            let now = self.status();
            (now == status || now.is_over()).then_some(now == status)
        });
        if reached.await {
            return Ok(());
        }
        Err(refused(format!("Job '{}' ended before it was {status}", self.id())))
    }
}
