//! A group of jobs: they take effect together or not at all. A job that starts alone is a group of
//! one.
//!
//! One task conducts a group: it waits for the work of all members, for the command to finalize if
//! one of them asks for it, lets each plan its part of one change, commits that, and retires all.
//! Whatever fails or is cancelled before the change takes effect aborts all members.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::driver::Role;
use bds_core::graph::{Change, ChangeReport, Graph, NodeRef, walk};
use bds_core::{Error, ErrorKind, Result};
use bds_io::Task;
use futures_util::FutureExt;
use futures_util::future::{self, Either};

use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::job::{GroupSignal, Job, cancelled};
use crate::registry::Registry;
use crate::state::JobStatus;

/// Turns that requests of a poisoned node get to leave it.
const POISON_TURNS: usize = 100;

/// Jobs that end together.
#[derive(Debug)]
pub(crate) struct Group {
    /// In the order in which they were started.
    pub(crate) jobs: Vec<Arc<Job>>,
    pub(crate) signal: Arc<GroupSignal>,
}

impl Group {
    /// Ends the other members.
    fn force_cancel_others(&self, failed: &Arc<Job>) {
        let others = self.jobs.iter().filter(|job| !Arc::ptr_eq(job, failed));
        others.for_each(|job| job.force_cancel());
    }

    /// Completes when a member is cancelled by force.
    async fn wait_cancelled(&self) {
        let is_cancelled = || self.jobs.iter().any(|job| job.is_cancel_forced());
        self.signal.changed.wait_until(is_cancelled).await;
    }
}

/// A job and its work.
struct Member {
    job: Arc<Job>,
    driver: Box<dyn JobDriver>,
}

/// Conducts a group from its start to its end.
pub(crate) async fn conduct(
    registry: Arc<Registry>,
    group: Group,
    drivers: Vec<Box<dyn JobDriver>>,
) {
    let group = Arc::new(group);
    let members = group.jobs.iter().cloned().zip(drivers);
    let runs: Vec<_> = members
        .map(|(job, driver)| bds_io::spawn(run(Arc::clone(&group), Member { job, driver })))
        .collect();
    let mut members = join(&group, runs).await;
    let result = finish(&group, &registry.graph, &mut members).await;
    let mut cleanup = match result {
        Ok(left_over) => vec![left_over],
        Err(error) => {
            abort_all(&group, error.as_ref());
            settle_targets(&group).await
        }
    };
    cleanup.resize_with(members.len(), || None);
    retire_all(&mut members, &mut cleanup).await;
    drop(members);
    for (job, cleanup_error) in group.jobs.iter().zip(cleanup).rev() {
        job.conclude(cleanup_error);
        if job.options.auto_dismiss {
            registry.dismiss_now(job);
        }
    }
}

/// Waits for the work of all members. A cancel of one, also of one that waits for the others, ends
/// all.
async fn join(group: &Group, runs: Vec<Task<Member>>) -> Vec<Member> {
    let joined = pin!(future::join_all(runs));
    match future::select(pin!(group.wait_cancelled()), joined).await {
        Either::Left(((), joined)) => {
            group.jobs.iter().for_each(|job| job.force_cancel());
            joined.await
        }
        Either::Right((members, _)) => members,
    }
}

/// Runs one member. A failure cancels the others.
async fn run(group: Arc<Group>, mut member: Member) -> Member {
    let Member { job, driver } = &mut member;
    let is_ok = if job.begin() {
        let ctx = JobContext(Arc::clone(job));
        let result = {
            let work = async {
                ctx.pause_point().await;
                driver.run(&ctx).await
            };
            let work = pin!(AssertUnwindSafe(work).catch_unwind());
            match future::select(pin!(job.wait_cancel_forced()), work).await {
                Either::Left(_) => Err(cancelled()),
                Either::Right((result, _)) => result.unwrap_or_else(|panic| Err(panicked(&*panic))),
            }
        };
        job.end_run(result)
    } else {
        job.abort(None);
        false
    };
    if !is_ok {
        group.force_cancel_others(&member.job);
    }
    member
}

/// From the end of all work until the change took effect.
///
/// # Errors
/// The group is to be aborted, with this error; `None`: members without one of their own are
/// cancelled.
async fn finish(
    group: &Arc<Group>,
    graph: &Graph,
    members: &mut [Member],
) -> Result<Option<Error>, Option<Error>> {
    let is_pending = group.jobs.iter().rev().all(|job| {
        let is_waiting = job.status() == JobStatus::Waiting;
        is_waiting && job.enter_pending()
    });
    if !is_pending {
        return Err(None);
    }
    if !group.jobs.iter().all(|job| job.options.auto_finalize) {
        let signal = &group.signal;
        let finalize = signal.changed.wait_until(|| signal.is_finalize_requested());
        if let Either::Left(_) = future::select(pin!(group.wait_cancelled()), pin!(finalize)).await
        {
            return Err(None);
        }
    }
    let planned = {
        let plan = pin!(plan(graph, members));
        match future::select(pin!(group.wait_cancelled()), plan).await {
            Either::Left(_) => return Err(None),
            // The member that failed has the error.
            Either::Right((planned, _)) => planned.map_err(|_| None)?,
        }
    };
    let left_over = commit(group, planned).await?;
    group.jobs.iter().for_each(|job| job.commit());
    Ok(left_over)
}

/// Applies the change, unless a member is cancelled before it takes effect. Returns what
/// its end could not do in order.
async fn commit(group: &Group, change: Change) -> Result<Option<Error>, Option<Error>> {
    let effect = Arc::new(AtomicBool::new(false));
    let has_effect = || effect.load(Ordering::Acquire);
    let mut commit = Box::pin(change.marks_effect(&effect).commit());
    match future::select(pin!(group.wait_cancelled()), commit.as_mut()).await {
        Either::Right((result, _)) => return result.map(left_over).map_err(Some),
        // Too late: the edges are swapped, what is left of the commit is short.
        Either::Left(_) if has_effect() => {
            return commit.await.map(left_over).map_err(Some);
        }
        Either::Left(_) => {}
    }
    // Another thread may be at work on it. When the drop returns, it is at rest.
    drop(commit);
    if has_effect() { Ok(None) } else { Err(None) }
}

/// The first failure at the end of a change that took effect.
fn left_over(report: ChangeReport) -> Option<Error> {
    let closed = report.closed.into_iter().filter_map(|closed| closed.into_result().err());
    closed.chain(report.stored_bitmaps_left).chain(report.not_flushed).next()
}

/// Lets each member plan its part of one change.
async fn plan(graph: &Graph, members: &mut [Member]) -> Result<Change> {
    let mut change = graph.change();
    for Member { job, driver } in members {
        let ctx = JobContext(Arc::clone(job));
        let planned = AssertUnwindSafe(driver.plan(&ctx, change)).catch_unwind().await;
        change = match planned.unwrap_or_else(|panic| Err(panicked(&*panic))) {
            Ok(change) => change,
            Err(error) => {
                job.abort(Some(error.duplicate()));
                return Err(error);
            }
        };
    }
    Ok(change)
}

/// Brings all members to `aborting`. Those without an error of their own get this one.
fn abort_all(group: &Group, error: Option<&Error>) {
    group.jobs.iter().rev().for_each(|job| job.abort(error.map(Error::duplicate)));
}

/// Waits for requests in the target nodes, for each member no longer than its timeout; then poisons
/// the nodes. Returns an error for each member whose target was poisoned.
async fn settle_targets(group: &Group) -> Vec<Option<Error>> {
    future::join_all(group.jobs.iter().map(|job| settle(job))).await
}

async fn settle(job: &Job) -> Option<Error> {
    let timeout = job.options.cancel_timeout;
    let mut failed = None;
    for id in &job.facts.targets {
        // Stale: the node is closed, so no request is inside.
        let Ok(node) = job.graph.acquire(*id) else { continue };
        if let Err(error) = job.graph.drain_within(&node, timeout).await {
            poison_storage(&node);
            leave_poisoned(&node).await;
            tracing::warn!(job = job.id(), node = node.name(), "target poisoned: {error}");
            failed.get_or_insert(error.context("the target was poisoned"));
        }
    }
    failed
}

/// Lets the tasks of a poisoned node's detached requests end: they keep it open until their next
/// turn. Requests of other users may stay for ever.
async fn leave_poisoned(node: &NodeRef) {
    for _ in 0..POISON_TURNS {
        if node.in_flight() == 0 {
            return;
        }
        bds_io::yield_now().await;
    }
}

/// Poisons a node, and those that store for it and have requests inside. Not its backing chain,
/// which may be another disk's.
fn poison_storage(node: &NodeRef) {
    node.poison();
    for (_, role, child) in walk::children(node) {
        if !role.contains(Role::COW) && child.in_flight() > 0 && !child.is_poisoned() {
            poison_storage(&child);
        }
    }
}

/// Retires all, newest first, and adds what went wrong to `cleanup`, in the order of the members.
async fn retire_all(members: &mut [Member], cleanup: &mut [Option<Error>]) {
    for (Member { job, driver }, failed) in members.iter_mut().zip(cleanup).rev() {
        let ctx = JobContext(Arc::clone(job));
        let error = job.lock().error.as_ref().map(Error::duplicate);
        let outcome = error.as_ref().map_or(Outcome::Committed, Outcome::Aborted);
        let retire = AssertUnwindSafe(driver.retire(&ctx, outcome)).catch_unwind().await;
        if let Err(error) = retire.unwrap_or_else(|panic| Err(panicked(&*panic))) {
            failed.get_or_insert(error);
        }
    }
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let words = panic.downcast_ref::<&str>().copied();
    let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let words = words.unwrap_or("no message");
    Error::new(ErrorKind::Io, format!("the job's code panicked: {words}"))
}
