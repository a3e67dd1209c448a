//! The snapshot that a copy-before-write filter keeps of its node: which granules are still to be
//! kept, which may be changed, and whether it can still be read.
//!
//! ```text
//!              to be kept ──claim──► being copied ──► kept: in the stage, then in the target
//!  map         dirty                 busy             clean
//!  passed      -                     -                set: writes pass without looking
//! ```
//!
//! A granule that is not `passed` is as it was, so readers of the snapshot find it in the node. One
//! that is `passed` may have changed: they find it in the stage, or else in the target. The map is
//! shared with a backup job, which copies in the background what the guest does not touch.

use std::fmt;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bds_core::bitmap::HBitmap;
use bds_core::copy::{CopyMap, CopyObserver};
use bds_core::driver::WriteFlags;
use bds_core::event::{Event, EventSender};
use bds_core::graph::NodeId;
use bds_core::{Error, ErrorKind, Result};
use bds_io::sync::Notify;
use futures_util::future::{Either, select};

use super::frozen::FrozenReads;
use super::keep::Parts;
use super::stage::{AtLimit, Limits, MIN_GRANULES, Stage, StageFailure, StagingInfo};

/// What happens to a write whose old data cannot be kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// It fails, and the snapshot stays as it is.
    #[default]
    BreakGuestWrite,
    /// It goes on, and the snapshot can no longer be read.
    BreakSnapshot,
}

/// Options of a snapshot.
#[derive(Clone, Debug, Default)]
pub struct SnapshotOptions {
    /// What happens to a write whose old data cannot be kept.
    pub on_error: OnCbwError,
    /// Longest time that a write waits for its old data to be kept; then that counts as failed.
    /// `None`: no limit.
    pub timeout: Option<Duration>,
    /// Bytes of old data that may wait in memory for the target; 0: writes wait for the target.
    pub staging_len: u64,
    /// Bytes of old data that may wait in the spill file beside; 0: there is none.
    pub spill_len: u64,
    /// Policy when that much waits.
    pub at_limit: AtLimit,
    /// Flags of writes to the target.
    pub write_flags: WriteFlags,
    /// Write compressed clusters of this many bytes to the target.
    pub compress: Option<u64>,
    /// Only what the layers above this node hold belongs to the snapshot.
    pub above: Option<NodeId>,
    /// Sees what is written to the target.
    pub observer: Option<Arc<dyn CopyObserver>>,
}

/// Why a snapshot can no longer be read.
struct Broken {
    offset: u64,
    error: Error,
}

/// The snapshot that a copy-before-write filter keeps: shared by filter, readers, and a job.
pub struct Snapshot {
    pub(super) map: Arc<CopyMap>,
    /// What belongs to it.
    access: HBitmap,
    /// What writes may change without looking.
    passed: HBitmap,
    pub(super) frozen: FrozenReads,
    pub(super) stage: Stage,
    pub(super) options: SnapshotOptions,
    /// Broken or ended: everything passes.
    is_off: AtomicBool,
    /// A drained section of the filter: writes are not delayed, and a job does not copy.
    is_draining: AtomicBool,
    broken: OnceLock<Broken>,
    /// Notified when granules may pass, and when the snapshot is off.
    changed: Notify,
    /// The filter's name and its events.
    filter: OnceLock<(String, EventSender)>,
    /// The filter's children, while it is open.
    parts: OnceLock<Weak<Parts>>,
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("map", &self.map)
            .field("staging", &self.staging())
            .field("is_off", &self.is_off())
            .finish_non_exhaustive()
    }
}

impl Snapshot {
    /// A snapshot of the granules that are dirty in the map now.
    ///
    /// # Errors
    /// As [`HBitmap::new`]. `InvalidInput`: there is a spill file, and its size or that of the
    /// memory is less than four granules.
    pub fn new(map: Arc<CopyMap>, options: SnapshotOptions) -> Result<Arc<Self>> {
        let access = HBitmap::new(map.len(), map.granularity())?;
        access.merge(map.bitmap())?;
        let limits = Limits {
            memory: options.staging_len,
            spill: options.spill_len,
            granule: map.granularity(),
            policy: options.at_limit,
        };
        check_spill(&options, map.granularity())?;
        Ok(Arc::new(Self {
            access,
            passed: HBitmap::new(map.len(), map.granularity())?,
            frozen: FrozenReads::default(),
            stage: Stage::new(limits),
            is_off: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            broken: OnceLock::new(),
            changed: Notify::new(),
            filter: OnceLock::new(),
            parts: OnceLock::new(),
            options,
            map,
        }))
    }

    /// The granules that are still to be kept.
    pub fn map(&self) -> &Arc<CopyMap> {
        &self.map
    }

    /// What the staging area holds now.
    pub fn staging(&self) -> StagingInfo {
        self.stage.info()
    }

    /// True once it is broken or has ended.
    pub fn is_off(&self) -> bool {
        self.is_off.load(Ordering::SeqCst)
    }

    /// Why it can no longer be read, if it is broken.
    pub fn failure(&self) -> Option<Error> {
        self.broken.get().map(Broken::error)
    }

    /// Waits until it is broken or has ended.
    pub async fn wait_off(&self) {
        self.changed.wait_until(|| self.is_off()).await;
    }

    /// Waits for a failed write of staged data to the target, which is tried again. Each failure is
    /// returned once.
    pub async fn next_stage_failure(&self) -> StageFailure {
        self.stage.next_failure().await
    }

    /// Lets failed writes of staged data be tried at once, and forgets failures until now.
    pub fn retry_stage(&self) {
        self.stage.forget_failure();
        self.stage.retry_now();
    }

    /// Ends it: guest writes pass, also those that wait, and staged data is dropped. For a job that
    /// was cancelled, and before the filter is removed.
    pub fn end(&self) {
        self.is_off.store(true, Ordering::SeqCst);
        self.stage.close();
        self.changed.notify_waiters();
    }

    /// Breaks it because of an error: as [`Snapshot::end`], and readers get the error.
    pub(super) fn break_off(&self, offset: u64, error: &Error) {
        let broken = Broken { offset, error: error.duplicate() };
        if !self.is_off() && self.broken.set(broken).is_ok() {
            self.end();
            if let Some((node, events)) = self.filter.get() {
                let (node, errno) = (node.clone(), error.errno());
                events.emit(Event::SnapshotBroken { node, offset, errno });
            }
        }
    }

    /// Names the filter that keeps it.
    pub(super) fn attach(&self, node: &str, events: EventSender) -> Result<()> {
        self.filter.set((node.to_owned(), events)).map_err(|_| {
            Error::new(ErrorKind::InUse, "the snapshot is kept by another filter already")
        })
    }

    /// Lets a job read what is staged: called once the filter has its children.
    pub(super) fn set_parts(&self, parts: &Arc<Parts>) {
        let _set_once = self.parts.set(Arc::downgrade(parts));
    }

    /// The filter's children; `None`: it is not open.
    pub(super) fn parts(&self) -> Option<Arc<Parts>> {
        self.parts.get()?.upgrade()
    }

    /// True if a change of the range needs nothing to be kept: no lock, no allocation.
    #[inline]
    pub(super) fn lets_pass(&self, range: &Range<u64>) -> bool {
        self.is_off.load(Ordering::SeqCst)
            || (self.passed.next_clean(range.clone()).is_none() && self.frozen.is_empty())
    }

    /// The first run of the range of which changes must still look.
    pub(super) fn next_unpassed(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let start = self.passed.next_clean(range.clone())?;
        let end = self.passed.next_dirty(start..range.end).unwrap_or(range.end);
        Some(start..end)
    }

    /// Lets changes of whole granules pass. What they held is kept, or need not be.
    pub(super) fn let_pass(&self, range: Range<u64>) {
        self.passed.set(range);
        self.changed.notify_waiters();
    }

    /// Whether the granule at `offset` may have changed, and up to where that holds.
    pub(super) fn passed_run(&self, offset: u64, end: u64) -> (bool, u64) {
        let (passed, len) = self.passed.status(offset, end);
        (passed, offset + len)
    }

    /// Sleeps, but not while the node is drained or once the snapshot is off.
    pub(super) async fn delay(&self, time: Duration) {
        let goes = || self.is_off() || self.is_draining();
        select(pin!(self.changed.wait_until(goes)), pin!(bds_io::sleep(time))).await;
    }

    /// Waits until a drained section of the filter begins, or until there is none.
    pub async fn wait_draining(&self, is_draining: bool) {
        self.changed.wait_until(|| self.is_draining() == is_draining).await;
    }

    /// Whether a drained section of the filter is in force.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    pub(super) fn set_draining(&self, is_draining: bool) {
        self.is_draining.store(is_draining, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Runs the keeping of old data: until it is done, or the snapshot is off, or its time is over.
    pub(super) async fn in_time(&self, keep: impl Future<Output = Result<()>>) -> Result<()> {
        let off_or_kept = async {
            match select(pin!(keep), pin!(self.wait_off())).await {
                Either::Left((kept, _)) => kept,
                Either::Right(_) => Ok(()),
            }
        };
        let Some(timeout) = self.options.timeout else { return off_or_kept.await };
        match select(pin!(off_or_kept), pin!(bds_io::sleep(timeout))).await {
            Either::Left((kept, _)) => kept,
            Either::Right(_) => {
                let errno = std::io::Error::from_raw_os_error(libc::ETIMEDOUT);
                let words = format!("old data was not kept within {} ms", timeout.as_millis());
                Err(Error::io(errno, words))
            }
        }
    }

    /// Refuses what cannot be read.
    ///
    /// # Errors
    /// `PermissionDenied`: a part does not belong to it. Else what broke it.
    pub(super) fn check_access(&self, range: &Range<u64>) -> Result<()> {
        self.check_whole()?;
        match self.access.next_clean(range.clone()) {
            None => Ok(()),
            Some(at) => {
                let words = "the snapshot does not hold this range, or it was discarded";
                Err(Error::new(ErrorKind::PermissionDenied, words).at(at))
            }
        }
    }

    /// # Errors
    /// What broke it; `Cancelled` if it has ended.
    pub(super) fn check_whole(&self) -> Result<()> {
        if let Some(broken) = self.broken.get() {
            return Err(broken.error());
        }
        match self.is_off() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Cancelled, "the snapshot is no longer kept")),
        }
    }

    /// Gives up whole granules. Returns them.
    pub(super) fn give_up(&self, range: &Range<u64>) -> Range<u64> {
        let granule = u64::from(self.map.granularity());
        let end = match range.end >= self.map.len() {
            true => self.map.len(),
            false => range.end - range.end % granule,
        };
        let whole = range.start.next_multiple_of(granule)..end;
        if whole.start < whole.end {
            self.access.clear(whole.clone());
            self.map.skip(whole.clone());
        }
        whole
    }
}

impl Broken {
    fn error(&self) -> Error {
        self.error.duplicate().context("the snapshot is broken").at(self.offset)
    }
}

/// Writes to the target take up to half of the memory; the rest must hold a run for a guest.
fn check_spill(options: &SnapshotOptions, granule: u32) -> Result<()> {
    let least = u64::from(granule) * MIN_GRANULES;
    let short = |field, len: u64| {
        let words = format!("with a spill file it must be {least} bytes at least");
        Err(Error::new(ErrorKind::InvalidInput, words).field(field, len))
    };
    match (options.spill_len, options.staging_len) {
        (0, _) => Ok(()),
        (_, memory) if memory < least => short("staging-size", memory),
        (spill, _) if spill < least => short("spill-size", spill),
        _ => Ok(()),
    }
}
