//! `Tracking`: the state that a mirror job and its filter share: what is still to be copied, how
//! guest writes are treated, and failures of the target that guest writes met.
//!
//! ```text
//! mode        a guest write                                             who copies it
//! Background  writes the source, then marks                             the job, later
//! Synced      excludes copies, clears, writes the source, the target    the write itself
//! Off         writes the source                                         the job is over
//! ```
//!
//! **The order of one write decides.** A write marks after it has ended, so a copy that read the
//! old bytes is repeated. A synced write clears its bits *before* it writes the source: a mark that
//! another write sets after that stays, and one that was set before belongs to bytes that this
//! write replaces. So both kinds of writes may overlap, and the mode may change at any time.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bds_core::bitmap::HBitmap;
use bds_core::copy::{Content, CopyMap, CopyObserver, Examined, Exclusion, Observed};
use bds_core::driver::{Attempt, ZeroFlags};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::sync::Notify;

use crate::CopyMode;

/// How guest writes are treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Marked, and copied later.
    Background,
    /// Written to both sides.
    Synced,
    /// Passed on.
    Off,
}

/// A failure of the target that a guest write met. The write succeeds all the same.
#[derive(Debug)]
pub(super) struct TargetFailure {
    pub(super) range: Range<u64>,
    pub(super) error: Error,
}

/// See the module.
pub(super) struct Tracking {
    pub(super) map: CopyMap,
    /// Granules that were left alone because the target shows the same below (`skip_partial`).
    skipped: Option<HBitmap>,
    /// Written by the job and by synced writes. Taken out when the job is over: it keeps the graph,
    /// which keeps the filter, which keeps this.
    target: Mutex<Option<Backend>>,
    /// Sees what is written there.
    pub(super) observer: Option<Arc<dyn CopyObserver>>,
    /// Zero writes may deallocate.
    pub(super) unmap: bool,
    mode: AtomicU8,
    /// False after a failure of the target, until the job has dealt with it: writes are marked
    /// meanwhile, also in the mode `Synced`.
    is_target_well: AtomicBool,
    /// A synced write ended without both sides being equal: the target may hold anything there.
    is_spoiled: AtomicBool,
    failure: Mutex<Option<TargetFailure>>,
    /// Notified by a failure.
    pub(super) failed: Notify,
    /// The filter is drained: no write waits for anything but its own node.
    is_drained: AtomicBool,
    drained: Notify,
    /// How long each write waits before it begins.
    delay_us: AtomicU64,
    /// Synced writes in flight, in bytes; those that ended well so far.
    synced_in_flight: AtomicU64,
    synced_done: AtomicU64,
    /// Marking writes in flight that are not inline.
    marking: AtomicUsize,
}

/// Options of a new [`Tracking`].
pub(super) struct TrackingOptions {
    pub(super) map: CopyMap,
    pub(super) target: Backend,
    pub(super) observer: Option<Arc<dyn CopyObserver>>,
    pub(super) unmap: bool,
    pub(super) mode: CopyMode,
    /// The target will get its backing node later: parts of its clusters that are left alone must
    /// be left alone as a whole.
    pub(super) has_late_backing: bool,
}

impl Tracking {
    /// Begins with this map, whose bits are complete before the filter sees its first write.
    pub(super) fn new(options: TrackingOptions) -> Result<Self> {
        let TrackingOptions { map, target, observer, unmap, mode, has_late_backing } = options;
        let skipped = match has_late_backing {
            true => Some(HBitmap::new(map.len(), map.granularity())?),
            false => None,
        };
        Ok(Self {
            map,
            skipped,
            target: Mutex::new(Some(target)),
            observer,
            unmap,
            mode: AtomicU8::new(Mode::from(mode) as u8),
            is_target_well: AtomicBool::new(true),
            is_spoiled: AtomicBool::new(false),
            failure: Mutex::new(None),
            failed: Notify::new(),
            is_drained: AtomicBool::new(false),
            drained: Notify::new(),
            delay_us: AtomicU64::new(0),
            synced_in_flight: AtomicU64::new(0),
            synced_done: AtomicU64::new(0),
            marking: AtomicUsize::new(0),
        })
    }

    // ---- target

    /// The job's user of the target.
    ///
    /// # Errors
    /// `Cancelled`: the job is over.
    pub(super) fn target(&self) -> Result<Backend> {
        let over = || Error::new(ErrorKind::Cancelled, "the mirror is over");
        self.lock_target().clone().ok_or_else(over)
    }

    /// Takes it out, at the end of the job.
    pub(super) fn take_target(&self) -> Option<Backend> {
        self.lock_target().take()
    }

    fn lock_target(&self) -> MutexGuard<'_, Option<Backend>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- modes

    pub(super) fn mode(&self) -> Mode {
        match self.mode.load(Ordering::SeqCst) {
            0 => Mode::Background,
            1 => Mode::Synced,
            _ => Mode::Off,
        }
    }

    /// Changes the mode for writes that begin later. `Off` is final.
    pub(super) fn set_mode(&self, mode: Mode) {
        let keeps_off = |old| (old != Mode::Off as u8).then_some(mode as u8);
        let _old = self.mode.fetch_update(Ordering::SeqCst, Ordering::SeqCst, keeps_off);
    }

    /// True if a write is to go to both sides now.
    pub(super) fn is_synced(&self) -> bool {
        self.mode() == Mode::Synced && self.is_target_well.load(Ordering::SeqCst)
    }

    /// True if a write that waits for nothing may be done and marked inline.
    pub(super) fn is_inline(&self) -> bool {
        match self.mode() {
            Mode::Background => self.delay_us.load(Ordering::Relaxed) == 0,
            Mode::Synced => false,
            Mode::Off => true,
        }
    }

    /// True if both sides are equal and every write keeps them so.
    pub(super) fn is_actively_synced(&self) -> bool {
        self.is_synced()
            && self.marking.load(Ordering::SeqCst) == 0
            && self.synced_in_flight.load(Ordering::SeqCst) == 0
            && self.map.is_clean()
    }

    // ---- marks

    /// Marks a range that was written, or may have been.
    #[inline]
    pub(super) fn mark(&self, range: Range<u64>) {
        if self.mode() != Mode::Off {
            self.map.mark(range);
        }
    }

    /// The duty to mark a range once the write that begins now has ended, however it ends.
    pub(super) fn begin_marking(&self, range: Range<u64>) -> Marking<'_> {
        self.marking.fetch_add(1, Ordering::SeqCst);
        Marking { tracking: self, range }
    }

    /// Begins a synced write: waits for copies and synced writes that overlap, then clears its
    /// bits. `None`: the filter is drained, so the write must not wait; it is to be marked.
    pub(super) async fn begin_synced(&self, range: Range<u64>) -> Option<Synced<'_>> {
        let excluded = self.map.exclude(range.clone());
        let exclusion = self.unless_drained(excluded).await?;
        self.synced_in_flight.fetch_add(range.end - range.start, Ordering::SeqCst);
        self.map.skip(range.clone());
        Some(Synced { tracking: self, range, is_equal: false, _exclusion: exclusion })
    }

    /// Bytes of synced writes in flight, and of those that ended well so far.
    pub(super) fn synced_bytes(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::SeqCst);
        (load(&self.synced_in_flight), load(&self.synced_done))
    }

    /// Lets the observer examine what is about to be written to the target.
    ///
    /// # Errors
    /// As [`CopyObserver::examine`].
    pub(super) async fn observe(&self, offset: u64, content: Content<'_>) -> Result<Observed> {
        let target = self.target()?;
        let request = Examined { offset, content, is_unit: false, target: &target };
        Observed::new(self.observer.as_ref(), request).await
    }

    /// Zeroes a range of the target.
    ///
    /// # Errors
    /// Those of the write, and as [`Tracking::observe`].
    pub(super) async fn zero_target(&self, range: Range<u64>, flags: ZeroFlags) -> Result<Attempt> {
        let target = self.target()?;
        let seen = self.observe(range.start, Content::Zeros(range.end - range.start)).await?;
        for part in seen.missing() {
            let zeroed = target.write_zeroes(part.start, part.end - part.start, flags).await?;
            if zeroed == Attempt::Unsupported {
                return Ok(Attempt::Unsupported);
            }
        }
        seen.written();
        Ok(Attempt::Done)
    }

    // ---- granules that were skipped

    /// Records that the target's own bytes of these granules were left alone.
    pub(super) fn skipped(&self, range: Range<u64>) {
        if let Some(skipped) = &self.skipped {
            skipped.set(range);
        }
    }

    /// True if a write of this range would leave a cluster of the target of which the rest is not
    /// known: it has to be copied as whole granules.
    pub(super) fn needs_whole_granules(&self, range: &Range<u64>) -> bool {
        let around = self.map.granules_around(range.clone());
        let is_partial = around != *range;
        is_partial && self.skipped.as_ref().is_some_and(|s| s.next_dirty(around).is_some())
    }

    /// Records that the granules of a range were copied as a whole.
    pub(super) fn copied_whole(&self, range: Range<u64>) {
        if let Some(skipped) = &self.skipped {
            skipped.clear(range);
        }
    }

    // ---- failures of the target

    /// Records a failure that a guest write met: writes are marked from now on, until the job has
    /// dealt with it.
    pub(super) fn target_failed(&self, range: Range<u64>, error: Error) {
        self.is_target_well.store(false, Ordering::SeqCst);
        self.lock_failure().get_or_insert(TargetFailure { range, error });
        self.failed.notify_waiters();
    }

    /// True once the target may hold anything in a range that is, or was, marked for that reason.
    pub(super) fn is_spoiled(&self) -> bool {
        self.is_spoiled.load(Ordering::SeqCst)
    }

    /// Takes the failure, if there is one.
    pub(super) fn take_failure(&self) -> Option<TargetFailure> {
        self.lock_failure().take()
    }

    /// True if there is a failure that the job has not dealt with.
    pub(super) fn has_failure(&self) -> bool {
        self.lock_failure().is_some()
    }

    /// Synced writes may use the target again.
    pub(super) fn target_is_well(&self) {
        self.is_target_well.store(true, Ordering::SeqCst);
    }

    fn lock_failure(&self) -> MutexGuard<'_, Option<TargetFailure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- drained sections and delays

    pub(super) fn drain_begin(&self) {
        self.is_drained.store(true, Ordering::SeqCst);
        self.drained.notify_waiters();
    }

    pub(super) fn drain_end(&self) {
        self.is_drained.store(false, Ordering::SeqCst);
    }

    /// Awaits `work`, or gives up when the filter is drained: what `work` waits for (a copy at a
    /// closed gate, the target) may not go on before the end of the drained section, which waits
    /// for this write.
    pub(super) async fn unless_drained<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let work = std::pin::pin!(work);
        let drained = self.drained.wait_until(|| self.is_drained.load(Ordering::SeqCst));
        match futures_util::future::select(work, std::pin::pin!(drained)).await {
            futures_util::future::Either::Left((done, _)) => Some(done),
            futures_util::future::Either::Right(((), _)) => None,
        }
    }

    pub(super) fn delay(&self) -> Duration {
        Duration::from_micros(self.delay_us.load(Ordering::Relaxed))
    }

    pub(super) fn set_delay(&self, delay: Duration) {
        let us = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.delay_us.store(us, Ordering::Relaxed);
    }
}

impl From<CopyMode> for Mode {
    fn from(mode: CopyMode) -> Self {
        match mode {
            CopyMode::Background => Self::Background,
            CopyMode::WriteBlocking => Self::Synced,
        }
    }
}

/// A write in flight whose range is marked when this is dropped.
#[must_use = "the range is marked when this is dropped"]
pub(super) struct Marking<'t> {
    tracking: &'t Tracking,
    range: Range<u64>,
}

impl Drop for Marking<'_> {
    fn drop(&mut self) {
        self.tracking.mark(self.range.clone());
        self.tracking.marking.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A synced write in flight: no copy of its range is under way and none begins. Its range is marked
/// when this is dropped, unless both sides are [equal](Synced::equal).
#[must_use = "the range is marked when this is dropped"]
pub(super) struct Synced<'t> {
    tracking: &'t Tracking,
    range: Range<u64>,
    is_equal: bool,
    /// Ends after the marks were set.
    _exclusion: Exclusion<'t>,
}

impl Synced<'_> {
    /// Ends it: both sides hold the same bytes.
    pub(super) fn equal(mut self) {
        self.is_equal = true;
    }
}

impl Drop for Synced<'_> {
    fn drop(&mut self) {
        let Self { tracking, range, is_equal, .. } = self;
        let len = range.end - range.start;
        match is_equal {
            true => _ = tracking.synced_done.fetch_add(len, Ordering::SeqCst),
            false => {
                // Before the mark: a scan that claims it must know.
                tracking.is_spoiled.store(true, Ordering::SeqCst);
                tracking.mark(range.clone());
            }
        }
        tracking.synced_in_flight.fetch_sub(len, Ordering::SeqCst);
    }
}
