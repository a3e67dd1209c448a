//! A job: its fixed facts, its state, and the verbs.
//!
//! `transition()` is the only function that sets a status. A job's state has one lock, held for
//! computation only; events are queued under it, so they are in the order of the changes. The
//! status is changed by the job's own task and by its group's (`txn`), except that `dismiss` ends
//! it.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bds_core::copy::ErrorVerdict;
use bds_core::graph::{Graph, NodeId};
use bds_core::{Error, ErrorKind, Result};
use bds_io::sync::Notify;

use crate::errors::ErrorLog;
use crate::event::{EventHub, JobEvent, JobPoint};
use crate::kinds::{JobChange, JobControl, JobType, unchangeable};
use crate::options::JobOptions;
use crate::policy::IoStatus;
use crate::progress::Progress;
use crate::speed::Speed;
use crate::state::{JobStatus, JobVerb};

/// Level of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cancel {
    None,
    Soft,
    Forced,
}

/// What of a job changes. Under one lock.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) status: JobStatus,
    /// True from `running` on: only then the end has an event of its own.
    pub(crate) is_started: bool,
    pub(crate) user_paused: bool,
    pub(crate) cancel: Cancel,
    pub(crate) complete_requested: bool,
    pub(crate) is_committed: bool,
    pub(crate) io_status: IoStatus,
    pub(crate) actively_synced: Option<bool>,
    pub(crate) resumed_bytes: Option<u64>,
    /// The first failure.
    pub(crate) error: Option<Error>,
    /// True if that is a cancel.
    pub(crate) is_cancelled: bool,
    /// What could not be given back in order.
    pub(crate) cleanup_error: Option<Error>,
    pub(crate) errors: ErrorLog,
}

/// What members of a group tell the task that conducts it.
#[derive(Debug, Default)]
pub(crate) struct GroupSignal {
    is_finalize_requested: AtomicBool,
    /// Ids of the members, once all are known.
    pub(crate) members: OnceLock<Vec<String>>,
    /// Wakes that task.
    pub(crate) changed: Notify,
}

impl GroupSignal {
    pub(crate) fn is_finalize_requested(&self) -> bool {
        self.is_finalize_requested.load(Ordering::Acquire)
    }
}

/// What a job's type says about it, asked once.
pub(crate) struct Facts {
    pub(crate) job_type: JobType,
    pub(crate) targets: Vec<NodeId>,
    pub(crate) ignored_error: ErrorVerdict,
    pub(crate) supports_complete: bool,
    pub(crate) supports_soft_cancel: bool,
    pub(crate) control: Option<Arc<dyn JobControl>>,
}

/// A job. Shared by the manager's list, its handles, its context and its group.
pub(crate) struct Job {
    pub(crate) graph: Graph,
    pub(crate) events: EventHub,
    pub(crate) facts: Facts,
    pub(crate) options: JobOptions,
    pub(crate) progress: Progress,
    pub(crate) speed: Speed,
    state: Mutex<State>,
    /// True if it is to stop at its next pause point. Follows the state, for checks without a lock.
    should_pause: AtomicBool,
    /// Wakes whatever waits for a change of this job.
    pub(crate) changed: Notify,
    pub(crate) group: Arc<GroupSignal>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({} '{}', {})", self.facts.job_type, self.id(), self.status())
    }
}

impl Job {
    pub(crate) fn new(
        graph: &Graph,
        events: &EventHub,
        group: &Arc<GroupSignal>,
        options: JobOptions,
        facts: Facts,
    ) -> Arc<Self> {
        let state = State {
            status: JobStatus::Undefined,
            is_started: false,
            user_paused: false,
            cancel: Cancel::None,
            complete_requested: false,
            is_committed: false,
            io_status: IoStatus::Ok,
            actively_synced: None,
            resumed_bytes: None,
            error: None,
            is_cancelled: false,
            cleanup_error: None,
            errors: ErrorLog::new(options.retry),
        };
        Arc::new(Self {
            graph: graph.clone(),
            events: events.clone(),
            facts,
            progress: Progress::default(),
            speed: Speed::new(options.speed),
            options,
            state: Mutex::new(state),
            should_pause: AtomicBool::new(false),
            changed: Notify::new(),
            group: Arc::clone(group),
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.options.id
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn status(&self) -> JobStatus {
        self.lock().status
    }

    /// Changes the status. The only place that does. The caller may be wrong: then nothing happens
    /// but an error in the log, in debug builds a panic.
    pub(crate) fn transition(&self, state: &mut State, next: JobStatus) {
        let from = state.status;
        if !from.may_become(next) {
            tracing::error!(job = self.id(), %from, %next, "state of a job may not change so");
            debug_assert!(false, "job '{}': {from} may not become {next}", self.id());
            return;
        }
        if from == next {
            return;
        }
        state.status = next;
        self.events.emit(JobEvent::StatusChange { id: self.id().to_owned(), status: next });
        self.changed.notify_waiters();
    }

    /// What it reached, for events.
    pub(crate) fn point(&self) -> JobPoint {
        JobPoint {
            job_type: self.facts.job_type,
            id: self.id().to_owned(),
            len: self.progress.total(),
            offset: self.progress.current(),
            speed: self.speed.get(),
        }
    }

    pub(crate) fn should_pause(&self) -> bool {
        self.should_pause.load(Ordering::Acquire)
    }

    pub(crate) fn set_user_paused(&self, state: &mut State, is_paused: bool) {
        state.user_paused = is_paused;
        self.should_pause.store(is_paused, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Leaves a pause: back to running or ready.
    pub(crate) fn leave_pause(&self, state: &mut State) {
        match state.status {
            JobStatus::Paused => self.transition(state, JobStatus::Running),
            JobStatus::Standby => self.transition(state, JobStatus::Ready),
            _ => {}
        }
    }

    pub(crate) fn is_cancel_forced(&self) -> bool {
        self.lock().cancel == Cancel::Forced
    }

    /// Completes when a forced cancel was requested.
    pub(crate) async fn wait_cancel_forced(&self) {
        self.changed.wait_until(|| self.is_cancel_forced()).await;
    }

    // Verbs.

    pub(crate) fn pause(&self) -> Result<()> {
        let mut state = self.lock();
        state.status.check(self.id(), JobVerb::Pause)?;
        if state.user_paused {
            return Err(refused("Job is already paused"));
        }
        self.set_user_paused(&mut state, true);
        Ok(())
    }

    pub(crate) fn resume(&self) -> Result<()> {
        let mut state = self.lock();
        if !state.user_paused {
            return Err(refused("Can't resume a job that was not paused"));
        }
        state.status.check(self.id(), JobVerb::Resume)?;
        state.io_status = IoStatus::Ok;
        state.errors.forget_attempts();
        self.set_user_paused(&mut state, false);
        Ok(())
    }

    pub(crate) fn set_speed(&self, speed: u64) -> Result<()> {
        let state = self.lock();
        state.status.check(self.id(), JobVerb::SetSpeed)?;
        self.speed.set(speed);
        self.changed.notify_waiters();
        Ok(())
    }

    pub(crate) fn complete(&self) -> Result<()> {
        self.check_complete()?;
        if let Some(control) = &self.facts.control {
            control.complete()?;
        }
        let mut state = self.lock();
        // It may have been cancelled meanwhile.
        self.check_complete_in(&state)?;
        state.complete_requested = true;
        self.changed.notify_waiters();
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        self.check_complete_in(&self.lock())
    }

    fn check_complete_in(&self, state: &State) -> Result<()> {
        state.status.check(self.id(), JobVerb::Complete)?;
        if state.cancel != Cancel::None || !self.facts.supports_complete {
            let id = self.id();
            return Err(refused(format!("The active block job '{id}' cannot be completed")));
        }
        Ok(())
    }

    pub(crate) fn change(&self, change: JobChange) -> Result<()> {
        self.lock().status.check(self.id(), JobVerb::Change)?;
        match &self.facts.control {
            Some(control) => control.change(change),
            None => Err(unchangeable()),
        }
    }

    /// Requests the end. Without `is_forced`, a job that can ends in order.
    pub(crate) fn cancel(&self, is_forced: bool) -> Result<()> {
        let mut state = self.lock();
        if !is_forced && state.user_paused {
            let id = self.id();
            return Err(refused(format!("The block job for device '{id}' is currently paused")));
        }
        state.status.check(self.id(), JobVerb::Cancel)?;
        if state.is_committed {
            return Err(refused(format!("Job '{}' is being finalized", self.id())));
        }
        let is_working = !state.status.is_completed();
        let is_soft = !is_forced && self.facts.supports_soft_cancel && state.status.is_ready();
        match (is_soft, is_working) {
            (true, _) => state.cancel = state.cancel.max(Cancel::Soft),
            // Its work is over: only force takes it back.
            (false, false) if !is_forced && self.facts.supports_soft_cancel => return Ok(()),
            (false, _) => self.force_cancel_in(&mut state),
        }
        self.changed.notify_waiters();
        drop(state);
        self.group.changed.notify_waiters();
        Ok(())
    }

    /// Requests a forced end, whatever the state, unless its change has taken effect.
    pub(crate) fn force_cancel(&self) {
        let mut state = self.lock();
        if state.is_committed || state.status == JobStatus::Aborting || state.status.is_over() {
            return;
        }
        self.force_cancel_in(&mut state);
        drop(state);
        self.group.changed.notify_waiters();
    }

    fn force_cancel_in(&self, state: &mut State) {
        state.cancel = Cancel::Forced;
        state.io_status = IoStatus::Ok;
        self.set_user_paused(state, false);
    }

    pub(crate) fn finalize(&self) -> Result<()> {
        self.lock().status.check(self.id(), JobVerb::Finalize)?;
        self.group.is_finalize_requested.store(true, Ordering::Release);
        self.group.changed.notify_waiters();
        Ok(())
    }

    // The life, as far as the job's own task and its group go.

    /// created → running; false if it was cancelled before.
    pub(crate) fn begin(&self) -> bool {
        let mut state = self.lock();
        if state.cancel == Cancel::Forced {
            return false;
        }
        self.transition(&mut state, JobStatus::Running);
        state.is_started = true;
        true
    }

    /// The work is over: → waiting or aborting. True if it succeeded.
    pub(crate) fn end_run(&self, result: Result<()>) -> bool {
        let mut state = self.lock();
        self.leave_pause(&mut state);
        self.set_user_paused(&mut state, false);
        if state.cancel == Cancel::Forced {
            self.abort_in(&mut state, None);
            return false;
        }
        match result {
            Ok(()) => {
                self.transition(&mut state, JobStatus::Waiting);
                true
            }
            Err(error) => {
                self.abort_in(&mut state, Some(error));
                false
            }
        }
    }

    /// waiting → pending; false if it was cancelled before.
    pub(crate) fn enter_pending(&self) -> bool {
        let mut state = self.lock();
        if state.cancel == Cancel::Forced {
            return false;
        }
        self.transition(&mut state, JobStatus::Pending);
        if !self.options.auto_finalize && self.facts.job_type.is_block_job() {
            let (job_type, id) = (self.facts.job_type, self.id().to_owned());
            self.events.emit(JobEvent::Pending { job_type, id });
        }
        true
    }

    /// → aborting, with this error unless it failed before; `None`: it is cancelled.
    pub(crate) fn abort(&self, error: Option<Error>) {
        let mut state = self.lock();
        self.leave_pause(&mut state);
        self.abort_in(&mut state, error);
    }

    fn abort_in(&self, state: &mut State, error: Option<Error>) {
        if state.error.is_none() {
            state.is_cancelled = error.is_none();
            state.error = Some(error.unwrap_or_else(cancelled));
        }
        self.transition(state, JobStatus::Aborting);
    }

    /// From now on it cannot be cancelled.
    pub(crate) fn commit(&self) {
        self.lock().is_committed = true;
    }

    /// The final event, and → concluded. Called once, when everything was given back.
    pub(crate) fn conclude(&self, cleanup_error: Option<Error>) {
        let mut state = self.lock();
        state.cleanup_error = cleanup_error;
        if let Some(event) = state.errors.take_unreported() {
            self.events.emit(event);
        }
        if state.is_started && self.facts.job_type.is_block_job() {
            let point = self.point();
            let error = state.error.as_ref().map(error_text);
            let event = match state.is_cancelled {
                true => JobEvent::Cancelled(point),
                false => JobEvent::Completed { point, error },
            };
            self.events.emit(event);
        }
        self.transition(&mut state, JobStatus::Concluded);
    }

    /// Completes when it holds nothing any more and its id is free, if it dismisses itself.
    pub(crate) async fn wait(&self) -> Result<()> {
        self.changed
            .wait_for(|| {
                let state = self.lock();
                let result = || state.error.as_ref().map_or(Ok(()), |e| Err(e.duplicate()));
                let is_over = match state.status {
                    JobStatus::Concluded => !self.options.auto_dismiss,
                    status => status == JobStatus::Null,
                };
                is_over.then(result)
            })
            .await
    }
}

/// The error of a job that was cancelled.
pub(crate) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "Operation canceled")
}

/// The error as clients read it.
pub(crate) fn error_text(error: &Error) -> String {
    error.to_string()
}

pub(crate) fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
