//! The work of a mirror: scan, copy until both sides are equal, announce `ready`, keep them equal,
//! and end with the guest's writes held back.
//!
//! ```text
//! scan ─► copy ─► clean? flush ─► ready ─► copy … ─► complete or cancel ─► drain the filter
//!           ▲                                                                  │ copy the rest, flush
//!           └────────────────── error, and the policy says: again ◄────────────┴─► drained: the end
//! ```
//!
//! The filter alone is drained at the end, not the source: guest writes wait, and the job still
//! reads and writes. So the last bytes are copied with no race, in one attempt, and the guest waits
//! no longer than that takes.

use std::pin::pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bds_core::copy::{self, CopyControl, DiskUse, ErrorSite, ErrorVerdict, RunOptions, Side};
use bds_core::driver::BoxFuture;
use bds_core::graph::{Drained, NodeId, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::sync::Notify;
use futures_util::future::{Either, select};

use super::Mirror;
use super::governor::{Advice, Governor, Sample};
use super::options::MirrorSync;
use super::tracking::{Mode, Tracking};
use crate::JobContext;
use crate::record::ContentTracker;

/// How often a copy in progress is looked at, and a ready mirror looks for work.
const WINDOW: Duration = Duration::from_millis(100);
/// What a pivot may copy with guest writes held back, if no limit is given.
const DEFAULT_STALL: Duration = Duration::from_millis(100);
/// Failures of the target that a cancel without force puts up with.
const MAX_SOFT_FAILURES: u32 = 5;
/// Wait after the first of them; doubled after each further one.
const FIRST_SOFT_WAIT: Duration = Duration::from_millis(20);

/// What is copied at first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Initial {
    pub(super) sync: MirrorSync,
    pub(super) above: Option<NodeId>,
    pub(super) target_is_zero: bool,
}

/// Limits of the copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) memory: u64,
    pub(super) max_pivot_stall: Option<Duration>,
}

/// Why a copy returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// Both sides were equal at one moment.
    Clean,
    /// The rest can be copied while guest writes are held back.
    Close,
    /// Something else has to be done first.
    Interrupted,
}

/// What run and its parts share.
pub(super) struct Watched<'a> {
    ctx: &'a JobContext,
    tracking: &'a Tracking,
    /// The guest's requests.
    disk: Option<DiskUse>,
    /// Failures of the target since the cancel without force.
    soft_failures: AtomicU32,
    synced_shown: AtomicU64,
    /// The copy is to stop between two requests.
    is_stopping: AtomicBool,
    stop: Notify,
    /// It has stopped.
    is_stopped: AtomicBool,
}

impl<'a> Watched<'a> {
    fn new(ctx: &'a JobContext, tracking: &'a Tracking, filter: Option<&NodeRef>) -> Self {
        Self {
            ctx,
            tracking,
            disk: filter.map(|filter| DiskUse::new(filter.clone())),
            soft_failures: AtomicU32::new(0),
            synced_shown: AtomicU64::new(0),
            is_stopping: AtomicBool::new(false),
            stop: Notify::new(),
            is_stopped: AtomicBool::new(false),
        }
    }

    pub(super) async fn pause_point(&self) {
        self.ctx.pause_point().await;
    }

    pub(super) fn advance(&self, bytes: u64) {
        self.ctx.progress().advance(bytes);
    }

    /// Shows what is left, and synced writes as work that was done.
    pub(super) fn show_progress(&self) {
        let (synced_now, synced_done) = self.tracking.synced_bytes();
        let before = self.synced_shown.swap(synced_done, Relaxed);
        self.advance(synced_done.saturating_sub(before));
        let map = &self.tracking.map;
        self.ctx.progress().set_remaining(map.dirty_bytes() + map.in_flight_bytes() + synced_now);
        self.ctx.set_actively_synced(self.tracking.is_actively_synced());
    }

    /// Applies the policy to a failure. A job that was cancelled without force repeats a few times
    /// and fails then, whatever the policy: it must not go on for ever.
    async fn verdict(&self, side: Side, site: ErrorSite, error: &Error) -> ErrorVerdict {
        if !self.ctx.soft_cancel_requested() {
            return self.ctx.on_error(side, site, error).await;
        }
        let failures = self.soft_failures.fetch_add(1, Relaxed);
        if failures + 1 >= MAX_SOFT_FAILURES {
            return ErrorVerdict::Fail;
        }
        bds_io::sleep(FIRST_SOFT_WAIT * (1 << failures)).await;
        ErrorVerdict::Retry
    }

    fn begin_copy(&self) {
        self.is_stopping.store(false, Relaxed);
        self.is_stopped.store(false, Relaxed);
    }

    fn stop_copy(&self) {
        self.is_stopping.store(true, Relaxed);
        self.stop.notify_waiters();
    }

    /// True if the job is to end in order.
    fn is_to_end(&self) -> bool {
        self.ctx.complete_requested() || self.ctx.soft_cancel_requested()
    }
}

impl CopyControl for Watched<'_> {
    fn should_pause(&self) -> bool {
        self.is_stopping.load(Relaxed) || self.ctx.should_pause()
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let stopping = self.stop.wait_until(|| self.is_stopping.load(Relaxed));
            select(pin!(stopping), pin!(self.ctx.wait_should_pause())).await;
        })
    }

    /// A stop is a pause without an end: the copy is dropped in it, with nothing in flight.
    fn pause_point(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.ctx.pause_point().await;
            if self.is_stopping.load(Relaxed) {
                self.is_stopped.store(true, Relaxed);
                self.stop.notify_waiters();
                std::future::pending::<()>().await;
            }
        })
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let stopping = self.stop.wait_until(|| self.is_stopping.load(Relaxed));
            select(pin!(stopping), pin!(self.ctx.throttle(bytes))).await;
        })
    }

    fn is_disk_in_use(&self) -> bool {
        self.disk.as_ref().is_some_and(DiskUse::is_used)
    }

    fn copied(&self, bytes: u64) {
        self.advance(bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        Box::pin(async move {
            match self.verdict(side, site, error).await {
                // Nothing may be left out.
                ErrorVerdict::Skip => ErrorVerdict::Retry,
                verdict => verdict,
            }
        })
    }
}

/// The last copy, with guest writes held back: no pause, and the first failure ends it.
struct Last<'a, 'c> {
    watched: &'a Watched<'c>,
    failure: Mutex<Option<(Side, ErrorSite)>>,
}

impl CopyControl for Last<'_, '_> {
    fn copied(&self, bytes: u64) {
        self.watched.advance(bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        _error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some((side, site));
        Box::pin(async { ErrorVerdict::Fail })
    }
}

/// A failure with its place.
type Failed = (Side, ErrorSite, Error);

impl Mirror {
    /// See [`crate::JobDriver::run`].
    pub(super) async fn work(&mut self, ctx: &JobContext) -> Result<()> {
        let Some(content) = self.content.clone() else { return self.mirror(ctx, None).await };
        let target = self.tracking.target()?;
        let keep = pin!(content.keep(ctx, &target));
        match select(pin!(self.mirror(ctx, Some(&content))), keep).await {
            Either::Left((done, _)) => done,
            Either::Right((failed, _)) => Err(failed),
        }
    }

    async fn mirror(&mut self, ctx: &JobContext, content: Option<&ContentTracker>) -> Result<()> {
        let tracking = Arc::clone(&self.tracking);
        let watched = Watched::new(ctx, &tracking, self.filter.as_ref());
        let mut governor = Governor::new(self.limits.max_pivot_stall);
        watched.show_progress();
        ctx.pause_point().await;
        if let Some(content) = content {
            let target = tracking.target()?;
            content.begin(ctx, &target).await;
            let is_to_stop = || ctx.should_pause() || tracking.has_failure();
            content.skip_unchanged(&tracking.map, &target, is_to_stop).await?;
        }
        self.scan(&watched).await?;
        let (mut is_ready, mut is_flushed) = (false, false);
        loop {
            ctx.pause_point().await;
            self.deal_with_failure(&watched).await?;
            let may_end = !is_ready || watched.is_to_end();
            let round = self.copy(&watched, &mut governor, may_end).await?;
            watched.show_progress();
            if round == Round::Interrupted {
                continue;
            }
            if !is_ready {
                if !self.flush_target(&watched).await? {
                    continue;
                }
                ctx.ready().await;
                is_ready = true;
            }
            if !ctx.should_pause() && watched.is_to_end() {
                // Before guest writes are held back, so that the flush after it has little to do.
                if !is_flushed {
                    is_flushed = self.flush_target(&watched).await?;
                    if let Some(content) = content.filter(|_| is_flushed) {
                        content.read_unknown(&self.described()?, Some(&tracking.map)).await?;
                    }
                    continue;
                }
                if let Some(drained) = self.finish(&watched).await? {
                    self.pivots = ctx.complete_requested() && !ctx.soft_cancel_requested();
                    self.drained = Some(drained);
                    watched.show_progress();
                    return Ok(());
                }
                is_flushed = false;
                continue;
            }
            self.wait_for_work(&watched).await;
            if self.tracking.map.is_clean() {
                self.follow(governor.won());
            }
        }
    }

    /// The image that a manifest describes where it was not seen while it was copied: the source,
    /// so that the target is proved against it, unless the target is to hold something else.
    pub(super) fn described(&self) -> Result<Backend> {
        match self.initial.sync {
            MirrorSync::None => self.tracking.target(),
            MirrorSync::Full | MirrorSync::Top => Ok(self.reader.clone()),
        }
    }

    /// Copies until both sides are equal, or until the rest is small enough if that suffices.
    async fn copy(
        &self,
        watched: &Watched<'_>,
        governor: &mut Governor,
        may_end: bool,
    ) -> Result<Round> {
        let map = &self.tracking.map;
        if map.is_clean() {
            return Ok(Round::Clean);
        }
        let options = self.run_options();
        let target = self.tracking.target()?;
        let copy = copy::run(map, &self.reader, &target, &options, watched);
        watched.begin_copy();
        let watch = self.watch(watched, governor, may_end);
        let (copy, watch) = (pin!(copy), pin!(watch));
        let (round, copy) = match select(copy, watch).await {
            Either::Left((copied, _)) => return copied.map(|()| Round::Clean),
            Either::Right(left) => left,
        };
        watched.stop_copy();
        let stopped = watched.stop.wait_until(|| watched.is_stopped.load(Relaxed));
        match select(copy, pin!(stopped)).await {
            Either::Left((copied, _)) => copied.map(|()| Round::Clean),
            Either::Right(_) => Ok(round),
        }
    }

    fn run_options(&self) -> RunOptions {
        RunOptions {
            memory: self.limits.memory,
            may_unmap: self.tracking.unmap,
            observer: self.tracking.observer.clone(),
            ..RunOptions::default()
        }
    }

    /// Looks at a copy in progress, window by window: shows progress, slows guest writes down if
    /// they win, and says when the copy has to be left.
    async fn watch(&self, watched: &Watched<'_>, governor: &mut Governor, may_end: bool) -> Round {
        let map = &self.tracking.map;
        let mut before = (bds_io::now(), map.done_bytes());
        governor.begin(map.dirty_bytes() + map.in_flight_bytes());
        loop {
            let failed = self.tracking.failed.wait_until(|| self.tracking.has_failure());
            let asked = async {
                match may_end {
                    false => watched.ctx.wait_complete().await,
                    true => std::future::pending().await,
                }
            };
            let (failed, asked) = (pin!(failed), pin!(asked));
            select(select(failed, asked), pin!(bds_io::sleep(WINDOW))).await;
            watched.show_progress();
            if self.tracking.has_failure() {
                return Round::Interrupted;
            }
            if !may_end && watched.is_to_end() {
                return Round::Interrupted;
            }
            let (now, done) = (bds_io::now(), map.done_bytes());
            let sample = Sample {
                elapsed: now.saturating_sub(before.0),
                copied: done - before.1,
                left: map.dirty_bytes() + map.in_flight_bytes(),
            };
            before = (now, done);
            if watched.ctx.should_pause() {
                continue;
            }
            self.follow(governor.advise(&sample));
            if may_end && governor.is_close(&sample, DEFAULT_STALL) {
                return Round::Close;
            }
        }
    }

    fn follow(&self, advice: Advice) {
        match advice {
            Advice::Delay(delay) if self.tracking.mode() == Mode::Background => {
                self.tracking.set_delay(delay);
            }
            Advice::Delay(_) => {}
            Advice::Synced => {
                self.tracking.set_mode(Mode::Synced);
                self.tracking.set_delay(Duration::ZERO);
            }
        }
    }

    /// Waits until there may be something to do.
    async fn wait_for_work(&self, watched: &Watched<'_>) {
        watched.show_progress();
        let failed = self.tracking.failed.wait_until(|| self.tracking.has_failure());
        let asked = watched.ctx.wait_complete();
        let (failed, asked) = (pin!(failed), pin!(asked));
        select(select(failed, asked), pin!(bds_io::sleep(WINDOW))).await;
    }

    /// Deals with a failure of the target that a guest write met.
    pub(super) async fn deal_with_failure(&self, watched: &Watched<'_>) -> Result<()> {
        let Some(failure) = self.tracking.take_failure() else { return Ok(()) };
        let site = self.site(failure.range.start, failure.range.end - failure.range.start);
        match watched.verdict(Side::Target, site, &failure.error).await {
            ErrorVerdict::Fail => Err(failure.error),
            ErrorVerdict::Retry | ErrorVerdict::Skip => {
                // The policy may have paused the job: synced writes wait for its end too.
                watched.ctx.pause_point().await;
                self.tracking.target_is_well();
                Ok(())
            }
        }
    }

    fn site(&self, offset: u64, len: u64) -> ErrorSite {
        ErrorSite { offset, len, node: self.target.name().to_owned() }
    }

    /// Flushes the target. `false`: it failed, and the policy says to try again.
    async fn flush_target(&self, watched: &Watched<'_>) -> Result<bool> {
        let Err(error) = self.tracking.target()?.flush().await else {
            watched.ctx.flushed(Side::Target);
            return Ok(true);
        };
        match watched.verdict(Side::Target, self.site(0, 0), &error).await {
            ErrorVerdict::Fail => Err(error.context("cannot flush the target")),
            ErrorVerdict::Retry | ErrorVerdict::Skip => Ok(false),
        }
    }

    /// Holds guest writes back, copies the rest, and flushes the target. `None`: something failed,
    /// guest writes go on, and the policy says to try again.
    async fn finish(&self, watched: &Watched<'_>) -> Result<Option<Drained>> {
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let drained = filter.graph().drain(filter).await;
        let (side, site, error) = match self.copy_rest(watched).await {
            Ok(()) => return Ok(Some(drained)),
            Err(failed) => failed,
        };
        // The guest does not wait for the policy.
        drop(drained);
        match watched.verdict(side, site, &error).await {
            ErrorVerdict::Fail => Err(error),
            ErrorVerdict::Retry | ErrorVerdict::Skip => Ok(None),
        }
    }

    async fn copy_rest(&self, watched: &Watched<'_>) -> Result<(), Failed> {
        let map = &self.tracking.map;
        let last = Last { watched, failure: Mutex::new(None) };
        // The guest waits for its end.
        let options = RunOptions { is_urgent: true, ..self.run_options() };
        let target = self.tracking.target().map_err(|e| (Side::Target, self.site(0, 0), e))?;
        let copied = copy::run(map, &self.reader, &target, &options, &last).await;
        if let Err(error) = copied {
            let failure = last.failure.into_inner().unwrap_or_else(|e| e.into_inner());
            let (side, site) = failure.unwrap_or((Side::Target, self.site(0, 0)));
            return Err((side, site, error));
        }
        if !map.is_clean() {
            let message = "guest writes went on while they were held back";
            let error = Error::new(ErrorKind::InUse, message).node(self.source.name());
            return Err((Side::Source, self.site(0, 0), error));
        }
        let flushed = target.flush().await;
        flushed.map_err(|error| (Side::Target, self.site(0, 0), error))
    }
}
