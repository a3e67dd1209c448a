//! What a job's work sees of its job: pauses, speed, progress, readiness, error policy.

use std::pin::pin;
use std::sync::Arc;

use bds_core::copy::{CopyControl, ErrorSite, ErrorVerdict, Side};
use bds_core::driver::BoxFuture;
use bds_core::graph::{Graph, NodeRef};
use bds_core::{Error, ErrorKind};
use futures_util::future;

use crate::errors::is_flush;
use crate::event::JobEvent;
use crate::job::{Cancel, Job};
use crate::policy::JobErrorAction;
use crate::progress::Progress;
use crate::state::JobStatus;

/// A job's view of itself. Clones are the same job.
#[derive(Clone, Debug)]
pub struct JobContext(pub(crate) Arc<Job>);

impl JobContext {
    /// The job's id.
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// The name under which it freezes links of chains.
    pub(crate) fn holder(&self) -> String {
        holder_of(self.id())
    }

    /// Ids of the others of its group.
    pub(crate) fn other_members(&self) -> impl Iterator<Item = &String> {
        let members = self.0.group.members.get().into_iter().flatten();
        members.filter(|id| *id != self.id())
    }

    /// The graph it works on.
    pub fn graph(&self) -> &Graph {
        &self.0.graph
    }

    /// True if it is to stop at its next pause point. One load.
    pub fn should_pause(&self) -> bool {
        self.0.should_pause()
    }

    /// Returns at once unless the job is to pause; else announces `paused` or `standby`, waits
    /// until it is resumed, and announces `running` or `ready`. Call it with none of the job's own
    /// requests in flight.
    pub async fn pause_point(&self) {
        if !self.should_pause() {
            return;
        }
        let job = &self.0;
        {
            let mut state = job.lock();
            if !state.user_paused {
                return;
            }
            let stopped =
                if state.status.is_ready() { JobStatus::Standby } else { JobStatus::Paused };
            if !state.status.may_become(stopped) {
                return;
            }
            job.transition(&mut state, stopped);
        }
        job.changed
            .wait_until(|| {
                let mut state = job.lock();
                let is_over = !state.user_paused;
                if is_over {
                    job.leave_pause(&mut state);
                }
                is_over
            })
            .await;
    }

    /// Waits until it does not stand at a pause point.
    pub(crate) async fn wait_not_paused(&self) {
        let is_paused = || {
            let status = self.0.lock().status;
            matches!(status, JobStatus::Paused | JobStatus::Standby)
        };
        self.0.changed.wait_until(|| !is_paused()).await;
    }

    /// Completes when it is to pause.
    pub async fn wait_should_pause(&self) {
        self.0.changed.wait_until(|| self.should_pause()).await;
    }

    /// Waits until `bytes` may go at the job's speed, and charges them. Wakes when the speed
    /// changes. Returns early, with the bytes charged, if the job is to pause: check
    /// [`should_pause`](Self::should_pause) before going on.
    pub async fn throttle(&self, bytes: u64) {
        self.wait_speed().await;
        self.0.speed.charge(bds_io::now(), bytes);
    }

    /// Waits until what was charged is paid for, or the job is to pause.
    async fn wait_speed(&self) {
        let job = &self.0;
        loop {
            let mut changed = pin!(job.changed.notified());
            changed.as_mut().enable();
            let wait = job.speed.wait(bds_io::now());
            if wait.is_zero() || job.should_pause() {
                return;
            }
            future::select(pin!(bds_io::sleep(wait)), changed).await;
        }
    }

    /// Its progress.
    pub fn progress(&self) -> &Progress {
        &self.0.progress
    }

    /// Announces that source and target are in sync: running → ready, and the event. Once.
    pub async fn ready(&self) {
        let mut state = self.0.lock();
        if state.status != JobStatus::Running {
            return;
        }
        self.0.transition(&mut state, JobStatus::Ready);
        self.0.events.emit(JobEvent::Ready(self.0.point()));
    }

    /// True if a user completed it.
    pub fn complete_requested(&self) -> bool {
        self.0.lock().complete_requested
    }

    /// Waits until a user completes it, or cancels it without force.
    pub async fn wait_complete(&self) {
        let is_ending = || {
            let state = self.0.lock();
            state.complete_requested || state.cancel == Cancel::Soft
        };
        self.0.changed.wait_until(is_ending).await;
    }

    /// True if a user cancelled it without force: it is to end in order, without its effect on the
    /// graph.
    pub fn soft_cancel_requested(&self) -> bool {
        self.0.lock().cancel == Cancel::Soft
    }

    /// Whether a mirror's target has every completed guest write; shown by queries.
    pub fn set_actively_synced(&self, is_synced: bool) {
        self.0.lock().actively_synced = Some(is_synced);
    }

    /// Bytes that needed no copy because an earlier job has copied them; shown by queries.
    pub fn set_resumed(&self, bytes: u64) {
        self.0.lock().resumed_bytes = Some(bytes);
    }

    /// A flush of this side succeeded: see [`JobContext::on_error`].
    pub fn flushed(&self, side: Side) {
        self.0.lock().errors.forget_flushes(side);
    }

    /// Applies the job's policy to a failed request: emits the event, and waits before a
    /// repetition. A request of no bytes is a flush, which the policy `ignore` repeats until
    /// [`MAX_FLUSH_ATTEMPTS`](crate::MAX_FLUSH_ATTEMPTS).
    ///
    /// After [`ErrorVerdict::Retry`] check [`should_pause`](Self::should_pause): the policy `stop`
    /// has paused the job. The wait ends early if it is to pause.
    pub async fn on_error(&self, side: Side, site: ErrorSite, error: &Error) -> ErrorVerdict {
        let job = &self.0;
        let policy = match side {
            Side::Source => job.options.on_source_error,
            Side::Target => job.options.on_target_error,
        };
        let (action, wait) = {
            let mut state = job.lock();
            let attempts = state.errors.count_attempt(side, &site);
            let mut action = policy.action(error);
            let retry = &state.errors.retry;
            let is_exhausted = match is_flush(&site) {
                true => retry.is_flush_exhausted(attempts),
                false => retry.is_exhausted(attempts),
            };
            if action == JobErrorAction::Ignore && is_exhausted {
                action = JobErrorAction::Report;
            }
            let failed = (side, &site, error);
            let event = state.errors.event(bds_io::now(), job.id(), failed, (action, attempts));
            if let Some(event) = event {
                job.events.emit(event);
            }
            if action == JobErrorAction::Stop {
                state.io_status = state.io_status.after(error);
                // A job that was cancelled does not stop for an error.
                if state.cancel != Cancel::Forced {
                    job.set_user_paused(&mut state, true);
                }
            }
            (action, state.errors.retry.wait(attempts))
        };
        match action {
            JobErrorAction::Report => ErrorVerdict::Fail,
            JobErrorAction::Stop => ErrorVerdict::Retry,
            JobErrorAction::Ignore if job.facts.ignored_error == ErrorVerdict::Skip => {
                ErrorVerdict::Skip
            }
            JobErrorAction::Ignore => {
                let pause = pin!(self.wait_should_pause());
                future::select(pause, pin!(bds_io::sleep(wait))).await;
                ErrorVerdict::Retry
            }
        }
    }

    /// Emits an event of the job's own.
    pub fn emit(&self, event: JobEvent) {
        self.0.events.emit(event);
    }
}

/// The name under which a job freezes links of chains.
pub(crate) fn holder_of(job: &str) -> String {
    format!("job '{job}'")
}

/// The error for two jobs of one group that end at the same link of a chain.
pub(crate) fn shared_link(image: &NodeRef, job: &str, other: &str) -> Error {
    let why = format!(
        "jobs '{other}' and '{job}' are of one group and both end at its link to the image below: \
         start the second one when the first has ended"
    );
    Error::new(ErrorKind::InUse, why).node(image.name())
}

/// The engine charges a request that has begun.
impl CopyControl for JobContext {
    fn should_pause(&self) -> bool {
        self.should_pause()
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.wait_should_pause())
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.pause_point())
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        self.0.speed.charge(bds_io::now(), bytes);
        Box::pin(self.wait_speed())
    }

    fn copied(&self, bytes: u64) {
        self.progress().advance(bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        Box::pin(self.on_error(side, site, error))
    }
}
