//! An open image ([`Image`]), and the metadata that changes under its lock ([`Meta`]).
//!
//! ```text
//! Image      children, cluster size                never change
//!            backing, options, write_state, rules  change only while no request is in flight
//!            tables, metadata, srcu, decompressed  read without a lock (or with a short one of their own)
//!            meta: Mutex<Meta>                     everything that is changed to allocate, free, link
//! ```
//!
//! The lock of `Meta` is a plain mutex held for computation only, never across an await and never
//! during I/O. An operation that needs something that is not in memory returns [`NeedMeta`] before
//! it has changed anything that must not stand alone; [`Image::plan`] loads what is missing and
//! runs the operation again. What was loaded stays pinned until the operation succeeds, so it makes
//! progress even with the smallest cache.
//!
//! Lock order: `prepare_lock`, `release_lock`, `write_back_lock`, `meta`; inside `meta` only those
//! of `decompressed`.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use bds_core::driver::{Attempt, Child};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::{Buf, BufPool, IoVec};

use super::alloc::freed::FreedRun;
use super::alloc::in_flight::InFlight;
use super::alloc::overlap::MetadataMap;
use super::bitmap::mark::BitmapsInMemory;
use super::config::{Config, RequestedMode};
use super::io::backing::Backing;
use super::io::decompressed_cache::DecompressedCache;
use super::layout::cluster0::Cluster0;
use super::layout::entry::BadEntry;
use super::layout::header::{AUTOCLEAR_AT, Autoclear, INCOMPATIBLE_AT, Incompatible};
use super::layout::space::{MetaOffset, Space};
use super::layout::units::Geometry;
use super::live_rules::LiveRules;
use super::meta::budget::{DirtyLevels, WriteBackTask};
use super::meta::pending_flush::PendingFlush;
use super::meta::refcounts::Refcounts;
use super::meta::shared_load::{Load, Pinned};
use super::meta::slice_cache::SliceCache;
use super::meta::tables::{L1State, Tables};
use super::nodes::{DataNode, MetaNode};
use super::plan::{MetaKey, MetaResult, NeedMeta};
use super::srcu::Srcu;
use super::task::TaskCount;
use super::write_state::WriteState;

/// Header fields that change while the image is open.
#[derive(Debug)]
pub(crate) struct HeaderState {
    pub incompatible: Incompatible,
    pub autoclear: Autoclear,
    /// The dirty bit was set by this open image (lazy refcounts).
    pub is_dirty_marked: bool,
}

/// Everything that is changed to allocate, free and link.
#[derive(Debug)]
pub(crate) struct Meta {
    pub l1: L1State,
    pub slices: SliceCache,
    pub counts: Refcounts,
    pub pending_flush: PendingFlush,
    pub header: HeaderState,
    /// Freed references, by the state of the removal of the pointer: not written, written, durable.
    pub frees: Vec<FreedRun>,
    pub frees_written: Vec<FreedRun>,
    pub frees_durable: Vec<FreedRun>,
    pub in_flight: Vec<Arc<InFlight>>,
    pub loads: HashMap<MetaKey, Arc<Load>>,
    /// The write-back in the background, if one is under way.
    pub write_back_task: Option<Arc<WriteBackTask>>,
    /// The error of a background write-back that no flush has reported yet.
    pub write_back_error: Option<Error>,
    /// From this byte on the file was never written: it reads as zeros.
    pub zero_from: u64,
    /// Where the next compressed bytes are written; on a cluster boundary: not decided yet.
    pub compressed_at: u64,
    /// A length that is not in the header yet.
    pub new_size: Option<u64>,
    /// When unused slices were last evicted, in seconds.
    pub cleaned_at_s: u64,
}

impl Meta {
    /// Ends an allocation in flight and wakes the requests that wait for it.
    pub(crate) fn end_allocation(&mut self, item: &Arc<InFlight>) {
        item.leave(&mut self.in_flight, &mut self.slices);
    }

    /// Bytes of metadata that cannot be evicted.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.slices.pinned_bytes() + self.counts.pinned_bytes()
    }
}

/// The lock of [`Meta`], held. Publishes the levels of `budget.rs` when it is released.
pub(crate) struct MetaGuard<'a> {
    meta: MutexGuard<'a, Meta>,
    levels: &'a DirtyLevels,
}

impl Deref for MetaGuard<'_> {
    type Target = Meta;

    fn deref(&self) -> &Meta {
        &self.meta
    }
}

impl DerefMut for MetaGuard<'_> {
    fn deref_mut(&mut self) -> &mut Meta {
        &mut self.meta
    }
}

impl Drop for MetaGuard<'_> {
    fn drop(&mut self) {
        let meta = &self.meta;
        let frees = meta.frees.len() + meta.frees_written.len();
        self.levels.publish(meta.pinned_bytes(), frees, meta.frees_durable.len());
    }
}

/// An open image.
pub(crate) struct Image {
    pub node_name: String,
    pub file: MetaNode,
    pub data_file: Option<Child>,
    pub backing: Backing,
    /// The node that was opened because the image names it, if it was.
    pub named_backing: Option<String>,
    /// False: the backing node is not what the image's note says (`manage/base_mark.rs`). The first
    /// write drops the note.
    pub keeps_base_mark: AtomicBool,
    /// As it was read.
    pub cluster0: ArcSwap<Cluster0>,
    pub rules: LiveRules,
    pub config: ArcSwap<Config>,
    /// Options and flags of the last open or reopen.
    pub requested: Mutex<RequestedMode>,
    pub write_state: WriteState,
    /// False: opened for inspection or check only; no tables are in memory.
    pub serves_io: bool,
    pub len: AtomicU64,
    pub tables: Tables,
    pub metadata: MetadataMap,
    pub srcu: Arc<Srcu>,
    pub decompressed: Arc<DecompressedCache>,
    pub pool: BufPool,
    /// A cluster of zeros, made when first needed. Never written to.
    pub zeros: OnceLock<Buf>,
    pub meta: Mutex<Meta>,
    pub levels: DirtyLevels,
    /// One write-back at a time.
    pub write_back_lock: bds_io::sync::Mutex<()>,
    pub release_lock: bds_io::sync::Mutex<()>,
    /// Tasks that may outlive their callers.
    pub tasks: Arc<TaskCount>,
    /// Held to prepare for the first write, and to change what is stored of bitmaps.
    pub prepare_lock: bds_io::sync::Mutex<()>,
    pub bitmaps: BitmapsInMemory,
    /// Cached end of the file that holds data, rounded up to a cluster (`offset_check.rs`).
    pub data_end: AtomicU64,
    /// Does the file hold less than its length? Looked up once.
    pub is_sparse: AtomicU8,
    /// Set once: metadata contradicted itself; all later requests fail.
    pub broken: OnceLock<Error>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("node_name", &self.node_name).finish_non_exhaustive()
    }
}

impl Image {
    #[inline]
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.rules.geometry
    }

    /// The disk's length in bytes.
    #[inline]
    pub(crate) fn disk_len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    pub(crate) fn set_disk_len(&self, len: u64) {
        self.len.store(len, Ordering::Release);
    }

    /// True if the image is open for writing and active.
    #[inline]
    pub(crate) fn is_writable(&self) -> bool {
        self.write_state.allows_changes()
    }

    pub(crate) fn requested(&self) -> MutexGuard<'_, RequestedMode> {
        self.requested.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that holds guest data.
    #[inline]
    pub(crate) fn data(&self) -> DataNode<'_> {
        DataNode::of(&self.file, self.data_file.as_ref())
    }

    /// Where data clusters are.
    #[inline]
    pub(crate) fn space(&self) -> Space {
        if self.data_file.is_some() { Space::External } else { Space::Image }
    }

    pub(crate) fn meta(&self) -> MetaGuard<'_> {
        // A panic under the lock is a bug that is reported by itself; the data may be used to
        // report it.
        let meta = self.meta.lock().unwrap_or_else(PoisonError::into_inner);
        MetaGuard { meta, levels: &self.levels }
    }

    /// A cluster of zeros to write from.
    pub(crate) fn zeros(&self) -> &Buf {
        self.zeros.get_or_init(|| Buf::zeroed(self.geometry().cluster_len(), 4096))
    }

    /// Names the node in an error from below.
    pub(crate) fn name_error(&self, error: Error) -> Error {
        error.node(&self.node_name)
    }

    /// Names the node and the file in an error about the image as a whole.
    pub(crate) fn name_file(&self, error: Error) -> Error {
        let error = self.name_error(error);
        match self.file.filename() {
            Some(path) => error.file(path),
            None => error,
        }
    }

    /// An error if metadata of the image contradicted itself before.
    #[inline]
    pub(crate) fn check_usable(&self) -> Result<()> {
        match self.broken.get() {
            None => Ok(()),
            Some(error) => Err(error.duplicate().context("the image is out of use")),
        }
    }

    /// Runs `step` under the lock until it succeeds, loading what it finds missing.
    pub(crate) async fn plan<T: Send>(
        self: &Arc<Self>,
        mut step: impl FnMut(&Image, &mut Meta) -> MetaResult<T> + Send,
    ) -> Result<T> {
        let mut held: Vec<Pinned> = Vec::new();
        loop {
            let need = {
                let mut meta = self.meta();
                match step(self, &mut meta) {
                    Ok(value) => return Ok(value),
                    Err(need) => need,
                }
            };
            held.extend(self.resolve(need).await?);
        }
    }

    /// Provides what a stopped operation needs. What was loaded must be held until it succeeds.
    pub(crate) async fn resolve(self: &Arc<Self>, need: NeedMeta) -> Result<Option<Pinned>> {
        match need {
            NeedMeta::Load(what) => self.load(what).await.map(Some),
            NeedMeta::Wait(item) => {
                item.done.wait().await;
                Ok(None)
            }
            NeedMeta::WriteBack => {
                self.wait_for_write_back().await?;
                Ok(None)
            }
            NeedMeta::Fail(error) => Err(self.name_error(error)),
            NeedMeta::Corrupt { what, at } => Err(self.fatal(&what, at)),
        }
    }

    /// An entry that cannot be followed, found at `guest`.
    pub(crate) fn bad_entry(self: &Arc<Self>, bad: BadEntry, guest: u64) -> Error {
        self.fatal(&format!("{bad}, for guest offset {guest:#x}"), guest)
    }

    /// The error of metadata that contradicts itself. A writable image is marked corrupt and fails
    /// all later requests; a read-only one only fails this request.
    pub(crate) fn fatal(self: &Arc<Self>, what: &str, at: u64) -> Error {
        let mut error = Error::new(
            ErrorKind::Corrupt,
            format!("image is corrupt: {what}; repair it with a check"),
        )
        .node(&self.node_name)
        .at(at);
        if let Some(path) = self.file.filename() {
            error = error.file(path);
        }
        if self.is_writable() && self.broken.set(error.duplicate()).is_ok() {
            tracing::error!(node = self.node_name, at, "qcow2: {what}; the image is out of use");
            let image = Arc::clone(self);
            let task_guard = self.tasks.begin();
            bds_io::spawn(async move {
                image.mark_corrupt().await;
                drop(task_guard);
            })
            .detach();
        }
        error
    }

    /// Sets the corrupt bit. Best effort: the image is out of use anyway.
    async fn mark_corrupt(&self) {
        if self.cluster0.load().header.version < 3 {
            return;
        }
        // A rewrite of cluster 0 must not write back the bits it has read before.
        let _lock = self.write_back_lock.lock().await;
        let bits = {
            let mut meta = self.meta();
            meta.header.incompatible |= Incompatible::CORRUPT;
            meta.header.incompatible.bits()
        };
        let written =
            self.write_file(MetaOffset(INCOMPATIBLE_AT), bits.to_be_bytes().to_vec()).await;
        let result = match written {
            Ok(()) => self.file.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::error!(node = self.node_name, %error, "qcow2: cannot set the corrupt bit");
        }
    }

    /// Writes bytes of metadata to the image file.
    pub(crate) async fn write_file(&self, at: MetaOffset, bytes: Vec<u8>) -> Result<()> {
        let write = self.file.write(at, IoVec::from(bytes));
        write.await.map_err(|e| self.name_error(e))
    }

    /// Makes a range of the image file read as zeros.
    pub(crate) async fn zero_file(&self, at: MetaOffset, len: u64) -> Result<()> {
        let zeroed = self.file.write_zeroes(at, len).await;
        match zeroed.map_err(|e| self.name_error(e))? {
            Attempt::Done => Ok(()),
            Attempt::Unsupported => {
                let len = usize::try_from(len).expect("at most a cluster");
                self.write_file(at, vec![0; len]).await
            }
        }
    }

    /// Before the first change, durably: marks bitmaps that become stale (O10), and clears the
    /// autoclear bits of features that are not maintained (O13).
    pub(crate) async fn prepare_to_write(&self) -> Result<()> {
        self.check_usable()?;
        if self.write_state.may_write() {
            return Ok(());
        }
        self.write_state.check().map_err(|e| e.node(&self.node_name))?;
        let _lock = self.prepare_lock.lock().await;
        if self.write_state.may_write() {
            return Ok(());
        }
        let loses_bitmaps = !self.mark_bitmaps().await?;
        self.clear_unmaintained(loses_bitmaps).await?;
        self.write_state.writes_may_begin();
        Ok(())
    }

    /// Clears the autoclear bits of features that are not maintained, durably; also that of bitmaps
    /// if they are lost.
    pub(crate) async fn clear_unmaintained(&self, loses_bitmaps: bool) -> Result<()> {
        let _lock = self.write_back_lock.lock().await;
        let old = self.meta().header.autoclear;
        let mut kept = old.kept_by_writer();
        if self.keeps_base_mark.load(Ordering::Acquire) {
            kept |= old & Autoclear::BASE_MARK;
        }
        if loses_bitmaps {
            kept -= Autoclear::BITMAPS;
        }
        if kept == old {
            return Ok(());
        }
        let lost = format!("{:#x}", (old & !kept).bits());
        tracing::warn!(
            node = self.node_name,
            bits = lost,
            "qcow2: writing makes features that are not maintained stale; their bits are cleared"
        );
        self.write_file(MetaOffset(AUTOCLEAR_AT), kept.bits().to_be_bytes().to_vec()).await?;
        self.file.flush().await.map_err(|e| self.name_error(e))?;
        self.meta().header.autoclear = kept;
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.header.autoclear = kept;
        self.cluster0.store(Arc::new(known));
        Ok(())
    }

    /// Evicts slices that were not used for a while (cache-clean-interval).
    pub(crate) fn evict_unused_slices(&self, meta: &mut Meta) {
        let now_s = bds_io::now().as_secs();
        let interval_s = self.config.load().clean_interval_s;
        if interval_s > 0 && now_s >= meta.cleaned_at_s.saturating_add(interval_s) {
            meta.cleaned_at_s = now_s;
            meta.slices.evict(&self.tables, true);
        }
    }
}
