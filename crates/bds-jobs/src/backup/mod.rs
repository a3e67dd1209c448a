//! `Backup`: copies a disk as it was when the job began, while its guest writes on.
//!
//! ```text
//! before    guest ─► disk ─► …                      target
//! during    guest ─► filter ─file─► disk ─► …
//!                      └─target──────────────────► target ◄─ job (writes)      job (reads) ─► disk
//! after     as before
//! ```
//!
//! The filter is `copy-before-write`. It goes in by one graph change, and that change is the point
//! in time: no request is in flight in the disk then, and every later write passes the filter,
//! which keeps what it overwrites. A bitmap is split in the same change. Several disks and bitmaps
//! have one point in time if they share the change ([`Backup::stage`]).
//!
//! The job copies in the background what the guest does not touch. Filter and job claim granules in
//! one map, so each is copied once, from old data. `docs/jobs.md` has the argument why the copy is
//! complete and durable when the job says so.
//!
//! ```text
//! options  what is asked for, checked
//! setup    opens what the job needs; the change that begins it
//! spill    the file that takes old data which memory has no space for
//! work     copies; the end of the job
//! ```

mod options;
mod setup;
mod spill;
mod work;

use std::fmt;
use std::sync::Arc;

use bds_core::copy::RunOptions;
use bds_core::graph::{BitmapLease, Blocker, Frozen, JobSlot, NodeRef};
use bds_core::request::Backend;
use bds_drivers::filter::copy_before_write::Snapshot;

use crate::record::ContentTracker;

pub use bds_drivers::filter::copy_before_write::{AtLimit, OnCbwError};
pub use options::{BackupOptions, BackupSync, BitmapSync, Spill};

/// A backup, to be started with [`JobManager::start`](crate::JobManager::start).
///
/// ```
/// use bds_core::Options;
/// use bds_core::request::{Backend, BackendOptions};
/// use bds_jobs::backup::{Backup, BackupOptions};
/// use bds_jobs::{JobManager, JobOptions};
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
/// let copy = graph.open(Options::parse("driver=mem,node-name=copy,size=1M")?).await?;
/// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
/// guest.write_at(0, b"before")?;
///
/// let jobs = JobManager::new(&graph);
/// let backup = Backup::prepare(BackupOptions::new(&disk, &copy, "backup0")).await?;
/// guest.write_at(0, b"after ")?; // not part of the backup
/// let job = jobs.start(JobOptions::new("backup0"), Box::new(backup)).await?;
/// job.wait().await?;
///
/// let mut bytes = [0; 6];
/// Backend::new(&copy, BackendOptions::default())?.read_at(0, &mut bytes)?;
/// assert_eq!(&bytes, b"before");
/// # drop((guest, disk, copy));
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct Backup {
    source: NodeRef,
    target: NodeRef,
    /// `None` once it was given back.
    spill: Option<NodeRef>,
    sync: BackupSync,
    bitmap_mode: Option<BitmapSync>,
    /// `None` once it was given back.
    lease: Option<BitmapLease>,
    snapshot: Arc<Snapshot>,
    /// Old data is staged.
    is_staged: bool,
    /// `None` once it was removed.
    filter: Option<NodeRef>,
    /// `None` once they were given back.
    sides: Option<Sides>,
    copy: RunOptions,
    /// Hashes what is copied, for the record and the manifest.
    tracker: Option<ContentTracker>,
    frozen: Option<Frozen>,
    blockers: Vec<Blocker>,
    slots: Vec<JobSlot>,
}

/// The job's edges.
struct Sides {
    source: Backend,
    target: Backend,
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backup")
            .field("source", &self.source.name())
            .field("target", &self.target.name())
            .field("sync", &self.sync)
            .field("snapshot", &self.snapshot)
            .finish_non_exhaustive()
    }
}

impl Backup {
    /// The filter: the node that users of the disk use while the job runs.
    pub fn filter(&self) -> Option<&NodeRef> {
        self.filter.as_ref()
    }

    /// The snapshot that the filter keeps.
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }
}
