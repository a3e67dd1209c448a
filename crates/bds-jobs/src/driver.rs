//! The contract of a job type: what it does while it runs, at the end of its group, and after.

use std::sync::Arc;

use bds_core::copy::ErrorVerdict;
use bds_core::driver::BoxFuture;
use bds_core::graph::{Change, NodeId, NodeRef};
use bds_core::{Error, Result};

use crate::context::JobContext;
use crate::kinds::{JobControl, JobType};

/// How a job's group ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// The group's change took effect.
    Committed,
    /// The job, or another of its group, failed or was cancelled. Nothing has changed.
    Aborted(&'a Error),
}

/// The work of a job. A constructor of its own makes it (fallible, with everything undone on
/// error); then [`JobManager::start`](crate::JobManager::start) owns it.
///
/// ```text
/// run ─ok─► (whole group) ─► plan of each into one change ─► commit ─► retire(Committed)
///   └─error, cancel, a failure of another member ────────────────────► retire(Aborted)
/// ```
pub trait JobDriver: Send + 'static {
    /// Its type.
    fn job_type(&self) -> JobType;

    /// Does the work. Runs in a task. A forced cancel drops this future, at any await: what is left
    /// then is `self`, and requests that the target's node carries on.
    ///
    /// Calls [`JobContext::pause_point`] at least once a chunk, with none of its own requests in
    /// flight. Does not change the graph.
    ///
    /// # Errors
    /// The job fails with it, and its group is aborted.
    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>>;

    /// Does everything that may fail before the end: flushes what was written, writes headers that
    /// are valid before and after the change, and adds this job's edits to the one change of its
    /// group. Called when the work of all members has succeeded and the group is finalized. A
    /// cancel drops this future, at any await.
    ///
    /// # Errors
    /// The job fails with it, and its group is aborted.
    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        let _unused = ctx;
        Box::pin(async { Ok(change) })
    }

    /// Gives back everything that the job holds: filters (in the aborted case with a change of its
    /// own), edges, blockers, freezes, drained sections, leases. Called once, after the end of
    /// `run` or its drop, also if `run` was never called.
    ///
    /// # Errors
    /// Kept in the job's record; does not change its result.
    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>>;

    /// The nodes it writes to. If their requests do not end within the job's `cancel_timeout` after
    /// a cancel or failure, they are poisoned, and with them the nodes that store for them. Not
    /// those that belong to a guest's disk, to which a poisoned node would be a broken disk.
    fn target_nodes(&self) -> Vec<NodeId> {
        Vec::new()
    }

    /// Images whose link to the image below the job's end moves, or relies on: two members of a
    /// group that share one could only wait for each other, so the group is refused. Asked for
    /// once, before `run`.
    fn relinked_images(&self) -> Vec<NodeRef> {
        Vec::new()
    }

    /// True if the verb `complete` ends it (mirror, active commit).
    fn supports_complete(&self) -> bool {
        false
    }

    /// True if a ready job tells a cancel without force apart: it then ends in order, without its
    /// effect on the graph. Else every cancel is forced.
    fn supports_soft_cancel(&self) -> bool {
        false
    }

    /// What [`OnError::Ignore`](crate::OnError::Ignore) means: [`ErrorVerdict::Retry`], or
    /// [`ErrorVerdict::Skip`] for a job that cannot come back to a range.
    fn ignored_error(&self) -> ErrorVerdict {
        ErrorVerdict::Retry
    }

    /// Receives commands while the job runs. Asked for once, before `run`.
    fn control(&self) -> Option<Arc<dyn JobControl>> {
        None
    }
}
