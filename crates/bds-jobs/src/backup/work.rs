//! The work of a backup, and its end.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bds_core::bitmap::HBitmap;
use bds_core::copy::{
    self, CopyControl, CopyMap, CopyRead, DiskUse, ErrorSite, ErrorVerdict, Side,
};
use bds_core::driver::BoxFuture;
use bds_core::graph::{BitmapLease, Change, NodeId, NodeRef};
use bds_core::{Error, ErrorKind, Result};
use bds_drivers::filter::copy_before_write::{OldData, Snapshot, StageFailure};
use futures_util::future::{Either, select};

use super::options::{BackupSync, BitmapSync};
use super::{Backup, Sides};
use crate::chain::nodes::close_dead;
use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::kinds::JobType;

/// Longest flush of a target whose backup has failed.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// How often a stopped job looks whether it was resumed.
const PAUSE_STEP: Duration = Duration::from_millis(20);

/// Ends the snapshot unless the work has succeeded: a guest's write must not wait for a job that
/// has failed or was cancelled.
struct EndOnFailure<'s> {
    snapshot: &'s Snapshot,
    has_succeeded: bool,
}

impl Drop for EndOnFailure<'_> {
    fn drop(&mut self) {
        if !self.has_succeeded {
            self.snapshot.end();
        }
    }
}

/// The job's control of the copy, which counts what the guest's writes make the filter copy too.
struct Control<'c> {
    ctx: &'c JobContext,
    map: &'c CopyMap,
    counted: AtomicU64,
    disk: DiskUse,
}

impl Control<'_> {
    fn count(&self) {
        let done = self.map.done_bytes();
        let before = self.counted.fetch_max(done, Ordering::Relaxed);
        let progress = self.ctx.progress();
        progress.advance(done.saturating_sub(before));
        progress.set_remaining(self.map.dirty_bytes() + self.map.in_flight_bytes());
    }
}

impl CopyControl for Control<'_> {
    fn should_pause(&self) -> bool {
        self.ctx.should_pause()
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        CopyControl::pause_requested(self.ctx)
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        CopyControl::pause_point(self.ctx)
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        CopyControl::throttle(self.ctx, bytes)
    }

    fn is_disk_in_use(&self) -> bool {
        self.disk.is_used()
    }

    fn copied(&self, _bytes: u64) {
        self.count();
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        CopyControl::on_error(self.ctx, side, site, error)
    }
}

impl Backup {
    /// Takes out of the map what is not to be copied. Until then the filter keeps it all the same,
    /// so that no write between the change and this is missed.
    fn begin(&self) {
        let Some(lease) = self.lease.as_ref().filter(|_| self.sync == BackupSync::Bitmap) else {
            return;
        };
        let (map, bits) = (self.snapshot.map(), lease.bits());
        let mut at = 0;
        while at < map.len() {
            let end = bits.next_dirty(at..map.len()).unwrap_or(map.len());
            // Whole granules alone: one that is partly dirty is copied.
            let clean = whole_start(map, at)..end;
            if clean.start < clean.end {
                map.skip(clean);
            }
            at = match end < map.len() {
                true => bits.next_clean(end..map.len()).unwrap_or(map.len()),
                false => map.len(),
            };
        }
    }

    async fn copy(&self, ctx: &JobContext, sides: &Sides) -> Result<()> {
        self.begin();
        let map = self.snapshot.map();
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let counted = AtomicU64::new(map.done_bytes());
        let control = Control { ctx, map, counted, disk: DiskUse::new(filter.clone()) };
        control.count();
        let mut end = EndOnFailure { snapshot: &self.snapshot, has_succeeded: false };
        let watch = pin!(self.watch(ctx, sides));
        let done = if self.sync == BackupSync::None {
            match select(pin!(idle(ctx)), watch).await {
                Either::Left((never, _)) => match never {},
                Either::Right((failed, _)) => Err(failed),
            }
        } else {
            match select(pin!(self.copy_all(ctx, sides, &control)), watch).await {
                Either::Left((done, _)) => done,
                Either::Right((failed, _)) => Err(failed),
            }
        };
        control.count();
        end.has_succeeded = done.is_ok();
        done
    }

    async fn copy_all(&self, ctx: &JobContext, sides: &Sides, control: &Control<'_>) -> Result<()> {
        if let Some(tracker) = &self.tracker {
            let map = self.snapshot.map();
            tracker.begin(ctx, &sides.target).await;
            tracker.skip_unchanged(map, &sides.target, || ctx.should_pause()).await?;
        }
        let old_data = OldData::new(&self.snapshot, &sides.source);
        // With staging the guest does not wait for the copy of what it changes.
        let source: &dyn CopyRead = match self.is_staged {
            true => &old_data,
            false => &sides.source,
        };
        self.copy_between_drains(source, sides, control).await
    }

    /// Waits for a failure beside the copy: of the filter, or of a flush of the target.
    async fn watch(&self, ctx: &JobContext, sides: &Sides) -> Error {
        let Some(tracker) = &self.tracker else { return self.watch_filter(ctx).await };
        let keep = tracker.keep(ctx, &sides.target);
        select(pin!(keep), pin!(self.watch_filter(ctx))).await.factor_first().0
    }

    /// Copies until the map is clean. While the filter is drained there is no copy: its requests
    /// would wait at their gates, writes inside the filter for what they have claimed, and the
    /// drained section for these writes. What is dropped in between is copied again.
    async fn copy_between_drains(
        &self,
        source: &dyn CopyRead,
        sides: &Sides,
        control: &Control<'_>,
    ) -> Result<()> {
        let map = self.snapshot.map();
        loop {
            self.snapshot.wait_draining(false).await;
            let copying = pin!(copy::run(map, source, &sides.target, &self.copy, control));
            let drained = pin!(self.wait_drained(control.ctx));
            if let Either::Left((done, _)) = select(copying, drained).await {
                return done;
            }
        }
    }

    /// Waits until the filter is drained and the job is not paused: a pause has nothing in flight,
    /// and would have to be announced again.
    async fn wait_drained(&self, ctx: &JobContext) {
        loop {
            self.snapshot.wait_draining(true).await;
            ctx.wait_not_paused().await;
            if self.snapshot.is_draining() {
                return;
            }
        }
    }

    /// Waits for a failure of the filter: the snapshot broke, or staged data cannot be written and
    /// the policy says that the job fails.
    async fn watch_filter(&self, ctx: &JobContext) -> Error {
        loop {
            let off = pin!(self.snapshot.wait_off());
            let failed = match select(off, pin!(self.snapshot.next_stage_failure())).await {
                Either::Left(_) => {
                    return self.snapshot.failure().unwrap_or_else(|| {
                        Error::new(ErrorKind::Cancelled, "the snapshot is no longer kept")
                    });
                }
                Either::Right((failed, _)) => failed,
            };
            let StageFailure { offset, len, error } = failed;
            let node = error.node_name().unwrap_or(self.target.name()).to_owned();
            let site = ErrorSite { offset, len, node };
            match ctx.on_error(Side::Target, site, &error).await {
                ErrorVerdict::Fail => return error.context("cannot write the target").at(offset),
                ErrorVerdict::Retry | ErrorVerdict::Skip => {
                    // Stopped by the policy: further failures of the stage are no news.
                    while ctx.should_pause() {
                        bds_io::sleep(PAUSE_STEP).await;
                    }
                    self.snapshot.retry_stage();
                }
            }
        }
    }

    /// Removes the filter and gives all edges back. The snapshot has ended.
    pub(super) async fn give_back(&mut self) -> Result<()> {
        self.snapshot.end();
        self.sides = None;
        self.spill = None;
        self.lease = None;
        self.frozen = None;
        self.blockers.clear();
        self.slots.clear();
        let Some(filter) = self.filter.take() else { return Ok(()) };
        let graph = filter.graph().clone();
        drop(filter);
        close_dead(&graph).await
    }

    /// After a failure: takes the filter out and lets the bitmap keep what was not copied.
    async fn abort(&mut self, ctx: &JobContext) -> Result<()> {
        self.snapshot.end();
        if let (Some(tracker), Some(sides)) = (&self.tracker, &self.sides) {
            tracker.save(&sides.target).await;
            tracker.show(ctx);
        }
        let removed = match (&self.filter, &self.sides) {
            (Some(filter), Some(sides)) if sides.source.node().is_some() => {
                let change = ctx.graph().change().drop_filter(filter).release_medium(&sides.source);
                change.commit().await.map(drop)
            }
            // It was not begun.
            _ => Ok(()),
        };
        if let Some(lease) = self.lease.take() {
            self.end_lease(lease).await;
        }
        let closed = self.give_back().await;
        removed.and(closed)
    }

    /// After a failure, with the filter out. Advances the bitmap over what was copied only if that
    /// is durable; else dropping the lease keeps all of it.
    async fn end_lease(&self, lease: BitmapLease) {
        let is_split = lease.successor().is_some();
        if self.bitmap_mode != Some(BitmapSync::Always) || !is_split || self.target.is_poisoned() {
            return;
        }
        let Some(sides) = &self.sides else { return };
        let flush = pin!(sides.target.flush());
        let flushed = match select(flush, pin!(bds_io::sleep(FLUSH_TIME))).await {
            Either::Left((flushed, _)) => flushed,
            Either::Right(_) => Err(Error::new(ErrorKind::Io, "its flush takes too long")),
        };
        match flushed {
            Ok(()) => {
                if let Err(error) = lease.abdicate_keeping(self.snapshot.map().bitmap()) {
                    tracing::warn!(node = self.source.name(), "a bitmap was not advanced: {error}");
                }
            }
            Err(error) => {
                let node = self.target.name();
                tracing::warn!(node, "a bitmap was not advanced, the target failed: {error}");
            }
        }
    }
}

/// The start of the first granule that begins at or behind `at`.
fn whole_start(map: &CopyMap, at: u64) -> u64 {
    at.checked_next_multiple_of(u64::from(map.granularity()))
        .map_or(map.len(), |start| start.min(map.len()))
}

/// Pauses when it is asked to, for ever.
async fn idle(ctx: &JobContext) -> std::convert::Infallible {
    loop {
        CopyControl::pause_requested(ctx).await;
        ctx.pause_point().await;
        bds_io::yield_now().await;
    }
}

impl JobDriver for Backup {
    fn job_type(&self) -> JobType {
        JobType::Backup
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let sides = self.sides.as_ref().expect("they live until the job is retired");
            self.copy(ctx, sides).await
        })
    }

    /// The copy is complete and nothing is in flight: makes it durable, before anything says so.
    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        Box::pin(async move {
            let sides = self.sides.as_ref().expect("they live until the job is retired");
            sides.target.flush().await.map_err(|error| error.context("cannot flush the target"))?;
            if let Some(tracker) = &self.tracker {
                tracker.show(ctx);
                tracker.complete_record(&sides.target).await?;
                tracker.seal(&sides.target).await?;
            }
            let filter = self.filter.as_ref().expect("it lives until the job is retired");
            // With the job's edge, which refuses what the disk's users may do again.
            let change = change.drop_filter(filter).release_medium(&sides.source);
            let advances =
                matches!(self.bitmap_mode, Some(BitmapSync::OnSuccess | BitmapSync::Always));
            Ok(match &self.lease {
                Some(lease) if advances => change.abdicate_bitmap(lease, None::<Arc<HBitmap>>),
                _ => change,
            })
        })
    }

    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            match outcome {
                Outcome::Committed => {
                    let removed = match &self.tracker {
                        Some(tracker) => tracker.end_record().await,
                        None => Ok(()),
                    };
                    self.give_back().await.and(removed)
                }
                Outcome::Aborted(_) => self.abort(ctx).await,
            }
        })
    }

    fn target_nodes(&self) -> Vec<NodeId> {
        std::iter::once(&self.target).chain(&self.spill).map(NodeRef::id).collect()
    }
}
