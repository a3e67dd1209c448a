//! Sets a backup up: checks, edges, the filter, and the change that begins it.

use std::sync::Arc;

use bds_core::copy::{CopyMap, MAX_REQUESTS, RunOptions};
use bds_core::driver::{Access, Perm, WriteFlags};
use bds_core::graph::{BlockOps, Blocker, Change, Frozen, JobSlot, NodeId, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_drivers::filter::copy_before_write::{
    MIN_GRANULE, SharedCopyBeforeWrite, Snapshot, SnapshotOptions, check_target_above, granule,
};

use super::options::{BackupOptions, BackupSync, wrong};
use super::{Backup, Sides, spill};
use crate::chain::nodes::close_dead;
use crate::record::{ContentTracker, TrackerOptions};

impl Backup {
    /// Checks the options, opens what the job needs, and inserts the filter above the source: from
    /// then on the copy is of that moment.
    ///
    /// # Errors
    /// Nothing has changed. `InvalidInput`: the options (the message says which); `NotFound`: the
    /// bitmap; `NotSupported`: the target cannot be compressed; `ReadOnly`: the target; `InUse`:
    /// source, target or bitmap are used in a way that does not go with it.
    pub async fn prepare(options: BackupOptions) -> Result<Self> {
        let mut backup = Self::prepare_staged(options).await?;
        match backup.stage(backup.source.graph().change()).commit().await {
            Ok(_) => Ok(backup),
            Err(error) => {
                // Nothing was inserted, so the first error is the one that matters.
                undo(backup.tracker.as_ref()).await;
                let _closed = backup.give_back().await;
                Err(error)
            }
        }
    }

    /// As [`Backup::prepare`], without the insertion: the caller adds [`Backup::stage`] to a change
    /// of its own, or calls [`Backup::discard`] if that failed.
    ///
    /// # Errors
    /// As [`Backup::prepare`].
    pub async fn prepare_staged(options: BackupOptions) -> Result<Self> {
        let options = options.checked()?;
        let (source, target) = (&options.source, &options.target);
        let (slots, blockers) = keep_others_away(&options)?;
        let sides = open_sides(&options)?;
        let shape = Shape::choose(&options, &sides.target).await?;
        let lease = match &options.bitmap {
            Some(name) => Some(source.lease_bitmap(name, &format!("job '{}'", options.job))?),
            None => None,
        };
        let (above, frozen) = freeze_base(&options)?;
        let map = Arc::new(CopyMap::new(source.len(), shape.granule)?);
        map.mark_all();
        let tracker = ContentTracker::prepare(TrackerOptions {
            job: format!("backup '{}'", options.job),
            source,
            target,
            record: options.record.as_ref(),
            manifest: options.manifest.as_ref(),
        })
        .await?;
        let mut copy = shape.copy(&options, above);
        if let Some(tracker) = &tracker {
            copy.observer = Some(tracker.observer());
            // An interrupted copy has left bytes there.
            copy.target_is_zero &= !tracker.is_continued();
        }
        let (snapshot, spill, filter) = match open_snapshot(&options, map, &copy).await {
            Ok(opened) => opened,
            Err(error) => {
                undo(tracker.as_ref()).await;
                return Err(error);
            }
        };
        Ok(Self {
            source: options.source,
            target: options.target,
            spill,
            sync: options.sync,
            bitmap_mode: options.bitmap_mode,
            lease,
            snapshot,
            is_staged: options.staging_len != 0,
            filter: Some(filter),
            sides: Some(sides),
            copy,
            tracker,
            frozen,
            blockers,
            slots,
        })
    }

    /// Adds the beginning of the backup to a change: its point in time.
    pub fn stage(&self, change: Change) -> Change {
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let sides = self.sides.as_ref().expect("they live until the job is retired");
        // Inserted with the filter: by then the disk's users, which may resize it, are above.
        let change = change.insert_filter(&self.source, filter).insert(&sides.source, &self.source);
        match &self.lease {
            Some(lease) => change.split_bitmap(lease),
            None => change,
        }
    }

    /// Gives everything back after the change failed.
    ///
    /// # Errors
    /// Of the filter's close; everything was given back all the same.
    pub async fn discard(mut self) -> Result<()> {
        undo(self.tracker.as_ref()).await;
        self.give_back().await
    }
}

/// How the target is written.
struct Shape {
    compress: Option<u64>,
    /// Bytes that are copied together.
    granule: u32,
    /// Longest request.
    max_chunk: u64,
    write_flags: WriteFlags,
}

impl Shape {
    async fn choose(options: &BackupOptions, target: &Backend) -> Result<Self> {
        let compress = compressed_unit(options, target)?;
        let granule = choose_granule(options, target, compress).await?;
        let max_chunk = max_chunk(options, granule)?;
        let write_flags = match is_below(&options.target, &options.source) {
            // A reader of the target must not fall through to what is overwritten just then.
            true => {
                check_target_above(options.staging_len)?;
                WriteFlags::SERIALISING
            }
            false => WriteFlags::empty(),
        };
        Ok(Self { compress, granule, max_chunk, write_flags })
    }

    fn copy(&self, options: &BackupOptions, above: Option<NodeId>) -> RunOptions {
        RunOptions {
            max_requests: usize::try_from(options.max_workers)
                .map_or(MAX_REQUESTS, |workers| workers.min(MAX_REQUESTS)),
            max_chunk: self.max_chunk,
            above,
            sparse_len: options.sparse_len,
            may_unmap: true,
            target_is_zero: options.target_is_zero,
            write_flags: self.write_flags,
            compress: self.compress,
            offload: options.offload && self.compress.is_none(),
            discard_source: options.discard_source,
            ..RunOptions::default()
        }
    }
}

/// Removes a record that was made for a backup that does not begin.
async fn undo(tracker: Option<&ContentTracker>) {
    if let Some(tracker) = tracker {
        tracker.undo().await;
    }
}

/// Takes the job slots, and blocks what would change source or target under the job.
fn keep_others_away(options: &BackupOptions) -> Result<(Vec<JobSlot>, Vec<Blocker>)> {
    let (source, target) = (&options.source, &options.target);
    let slots = vec![source.claim_job(&options.job)?, target.claim_job(&options.job)?];
    let blockers = vec![
        // An overlay may be put on the disk meanwhile.
        source.block(BlockOps::RESIZE, &format!("job '{}' copies it", options.job)),
        target.block(BlockOps::all(), &format!("job '{}' writes it", options.job)),
    ];
    Ok((slots, blockers))
}

fn open_sides(options: &BackupOptions) -> Result<Sides> {
    let mut reads = Perm::CONSISTENT_READ;
    reads.set(Perm::WRITE, options.discard_source);
    // Compared with the record, and read for the manifest.
    let mut writes = Perm::WRITE;
    writes.set(Perm::CONSISTENT_READ, options.record.is_some() || options.manifest.is_some());
    let shared = Perm::all() - Perm::RESIZE;
    let side = |perm| BackendOptions::job(&*options.job, Access { perm, shared });
    Ok(Sides {
        source: Backend::empty(options.source.graph(), side(reads))?,
        target: Backend::new(&options.target, side(writes))?,
    })
}

/// The base of a backup of the disk's own layer, and the guard that keeps it there.
fn freeze_base(options: &BackupOptions) -> Result<(Option<NodeId>, Option<Frozen>)> {
    let source = &options.source;
    let base = match options.sync {
        BackupSync::Top => walk::next_below(&walk::skip_filters(source)),
        _ => None,
    };
    let Some(base) = base else { return Ok((None, None)) };
    let holder = format!("job '{}'", options.job);
    let frozen = source.graph().freeze_chain(source, &base, &holder)?;
    Ok((Some(base.id()), Some(frozen)))
}

fn compressed_unit(options: &BackupOptions, target: &Backend) -> Result<Option<u64>> {
    match (options.compress, target.compressed_unit()) {
        (false, _) => Ok(None),
        (true, Some(unit)) => Ok(Some(u64::from(unit))),
        (true, None) => {
            let name = options.target.name();
            let words = format!("Compression is not supported for this drive {name}");
            Err(Error::new(ErrorKind::NotSupported, words))
        }
    }
}

fn max_chunk(options: &BackupOptions, granule: u32) -> Result<u64> {
    match u64::try_from(options.max_chunk).unwrap_or(0) {
        0 => Ok(u64::MAX),
        chunk if chunk < u64::from(granule) => wrong(format!(
            "Required max-chunk ({chunk}) is less than backup cluster size ({granule})"
        )),
        chunk => Ok(chunk),
    }
}

/// Bytes that are copied together. Whole clusters of the target, unless every byte of it is written
/// in the end: then a cluster may be written in parts, and a guest's write keeps less at once.
async fn choose_granule(
    options: &BackupOptions,
    target: &Backend,
    compress: Option<u64>,
) -> Result<u32> {
    let is_full = options.sync == BackupSync::Full && compress.is_none();
    let info = target.info().await.map_err(|error| {
        let words = "Couldn't determine the cluster size of the target image";
        error.context(words)
    })?;
    let cluster = info.cluster_size.filter(|_| !is_full).max(compress);
    granule(options.min_cluster_size.max(u64::from(MIN_GRANULE)), cluster)
}

/// True if `node` is in the chain below `top`.
fn is_below(top: &NodeRef, node: &NodeRef) -> bool {
    let mut at = Some(top.clone());
    while let Some(here) = at {
        if here.id() == node.id() {
            return true;
        }
        at = walk::next_below(&here);
    }
    false
}

/// The snapshot of the filter, which copies as the job does; the spill node, if one is wanted; and
/// the filter.
async fn open_snapshot(
    options: &BackupOptions,
    map: Arc<CopyMap>,
    copy: &RunOptions,
) -> Result<(Arc<Snapshot>, Option<NodeRef>, NodeRef)> {
    let kept = SnapshotOptions {
        on_error: options.on_cbw_error,
        timeout: options.cbw_timeout,
        staging_len: options.staging_len,
        spill_len: options.spill_len,
        at_limit: options.staging_policy,
        write_flags: copy.write_flags,
        compress: copy.compress,
        above: copy.above,
        observer: copy.observer.clone(),
    };
    let snapshot = Snapshot::new(map, kept)?;
    let (spill, filter) = open_spill_and_filter(options, &snapshot).await?;
    Ok((snapshot, spill, filter))
}

async fn open_filter(
    options: &BackupOptions,
    snapshot: &Arc<Snapshot>,
    spill: Option<&NodeRef>,
) -> Result<NodeRef> {
    let source = &options.source;
    // Whether discards have an effect is the source's choice.
    let mut filter = Options::new()
        .with("file", source.name())
        .with("target", options.target.name())
        .with("discard", "unmap");
    if let Some(spill) = spill {
        filter = filter.with("spill", spill.name());
    }
    if !source.is_writable() {
        filter = filter.with("read-only", true);
    }
    if let Some(name) = &options.filter_node_name {
        filter = filter.with("node-name", &**name);
    }
    let driver = SharedCopyBeforeWrite::new(Arc::clone(snapshot), options.discard_source);
    source.graph().open_driver(Arc::new(driver), filter).await
}

/// Opens the spill node, if one is wanted, and the filter.
async fn open_spill_and_filter(
    options: &BackupOptions,
    snapshot: &Arc<Snapshot>,
) -> Result<(Option<NodeRef>, NodeRef)> {
    let graph = options.source.graph();
    let spill = match &options.spill {
        Some(spill) => Some(spill::open(graph, spill, options.spill_len).await?),
        None => None,
    };
    match open_filter(options, snapshot, spill.as_ref()).await {
        Ok(filter) => Ok((spill, filter)),
        Err(error) => {
            drop(spill);
            // The first error is the one that matters.
            let _closed = close_dead(graph).await;
            Err(error)
        }
    }
}
