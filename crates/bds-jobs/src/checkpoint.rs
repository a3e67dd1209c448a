//! `Checkpoint`: one point in time over many disks: snapshots, backups and bitmaps in one change.
//!
//! ```text
//! backups are set up, nothing inserted ─► their jobs get their ids ─► one change: overlays, bitmap
//!   edits, filters ─► jobs run
//! ```
//! Everything that can fail comes before the change or is the change, which takes effect as a whole
//! or not at all. After a failure at any position the graph, the bitmaps and the list of jobs are
//! what they were.
//!
//! Why it is one moment: the change closes the gates of all disks in one step, waits until no
//! request is inside, applies all edits, and opens the gates in one step. A guest that writes disk
//! B after its write to disk A was completed is seen with neither, with A, or with both.

use std::time::Duration;

use bds_core::graph::{Access, BitmapOptions, Change, ChangeReport, NodeRef, Perm};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, Result};

use crate::backup::{Backup, BackupOptions};
use crate::chain::nodes::close_dead;
use crate::driver::JobDriver;
use crate::handle::JobHandle;
use crate::manager::{JobManager, NewJob};
use crate::options::JobOptions;

/// A point in time over many disks, in preparation. Edits of the same disk are made in the order
/// snapshots, bitmaps, backups; of each kind in the order of the calls.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::BitmapOptions;
/// use bds_core::request::{Backend, BackendOptions};
/// use bds_jobs::backup::BackupOptions;
/// use bds_jobs::{Checkpoint, JobManager, JobOptions};
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let mut nodes = Vec::new();
/// for name in ["log", "data", "log-copy", "data-copy"] {
///     let options = format!("driver=mem,node-name={name},size=1M");
///     nodes.push(graph.open(Options::parse(&options)?).await?);
/// }
/// let [log, data, log_copy, data_copy] = &nodes[..] else { unreachable!() };
///
/// let jobs = JobManager::new(&graph);
/// let taken = Checkpoint::new(&jobs)
///     .backup(BackupOptions::new(log, log_copy, "log"), JobOptions::new("log"))
///     .backup(BackupOptions::new(data, data_copy, "data"), JobOptions::new("data"))
///     .add_bitmap(log, BitmapOptions::named("since-monday"))
///     .add_bitmap(data, BitmapOptions::named("since-monday"))
///     .take()
///     .await?;
/// assert_eq!(taken.holds.len(), 2);
/// for job in &taken.jobs {
///     job.wait().await?;
/// }
/// # drop((nodes, taken));
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
#[must_use = "a checkpoint does nothing until it is taken"]
#[derive(Debug)]
pub struct Checkpoint {
    jobs: JobManager,
    is_grouped: bool,
    /// Every disk that is named, once, in the order of the calls.
    disks: Vec<NodeRef>,
    snapshots: Vec<(NodeRef, NodeRef)>,
    bitmaps: Vec<BitmapStep>,
    backups: Vec<(BackupOptions, JobOptions)>,
}

/// An edit of a bitmap.
#[derive(Debug)]
enum BitmapStep {
    Add(NodeRef, BitmapOptions),
    Remove(NodeRef, String),
    Clear(NodeRef, String),
    Enable(NodeRef, String),
    Disable(NodeRef, String),
    Merge(NodeRef, String, Vec<(NodeRef, String)>),
}

/// What a checkpoint has begun.
#[derive(Debug)]
pub struct CheckpointReport {
    /// The jobs of the backups, in the order of the calls.
    pub jobs: Vec<JobHandle>,
    /// How long writes of each disk had to wait, in the order in which the disks were named.
    pub holds: Vec<WriteHold>,
    /// What the end of the change could not do in order. Does not change what was taken.
    pub left_over: Vec<Error>,
}

/// How long the writes of a disk had to wait for a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteHold {
    /// The disk's node.
    pub node: String,
    /// From the moment at which its gate was closed until it was open again. The gates of all disks
    /// of a checkpoint close and open together.
    pub held: Duration,
}

impl CheckpointReport {
    /// The longest of the holds.
    pub fn longest_hold(&self) -> Duration {
        self.holds.iter().map(|hold| hold.held).max().unwrap_or_default()
    }
}

impl Checkpoint {
    /// A checkpoint without any disk, whose backups are one group: they succeed together, or all
    /// end as cancelled and no bitmap advances.
    pub fn new(jobs: &JobManager) -> Self {
        Self {
            jobs: jobs.clone(),
            is_grouped: true,
            disks: Vec::new(),
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            backups: Vec::new(),
        }
    }

    /// With `false` each backup is a group of its own: one that fails leaves the others alone. They
    /// begin at the same moment in any case.
    pub fn grouped(mut self, is_grouped: bool) -> Self {
        self.is_grouped = is_grouped;
        self
    }

    /// Puts an overlay, opened without a backing node or with `disk` as one, above a disk.
    pub fn snapshot(mut self, disk: &NodeRef, overlay: &NodeRef) -> Self {
        self.name_disk(disk);
        self.snapshots.push((disk.clone(), overlay.clone()));
        self
    }

    /// Starts a backup. The bitmap that it uses, if any, exists already.
    pub fn backup(mut self, options: BackupOptions, job: JobOptions) -> Self {
        self.name_disk(&options.source);
        self.backups.push((options, job));
        self
    }

    /// Adds a bitmap: it records what changes after the checkpoint, unless it is disabled.
    pub fn add_bitmap(self, disk: &NodeRef, options: BitmapOptions) -> Self {
        self.bitmap(disk, BitmapStep::Add(disk.clone(), options))
    }

    /// Removes a bitmap.
    pub fn remove_bitmap(self, disk: &NodeRef, name: &str) -> Self {
        self.bitmap(disk, BitmapStep::Remove(disk.clone(), name.to_owned()))
    }

    /// Resets a bitmap: it forgets what it has recorded before the checkpoint.
    pub fn reset_bitmap(self, disk: &NodeRef, name: &str) -> Self {
        self.bitmap(disk, BitmapStep::Clear(disk.clone(), name.to_owned()))
    }

    /// Lets a bitmap record what changes after the checkpoint.
    pub fn enable_bitmap(self, disk: &NodeRef, name: &str) -> Self {
        self.bitmap(disk, BitmapStep::Enable(disk.clone(), name.to_owned()))
    }

    /// Lets a bitmap keep what it has recorded up to the checkpoint, and record no more.
    pub fn disable_bitmap(self, disk: &NodeRef, name: &str) -> Self {
        self.bitmap(disk, BitmapStep::Disable(disk.clone(), name.to_owned()))
    }

    /// Marks in the bitmap `target` of a disk what others have recorded up to the checkpoint.
    pub fn merge_bitmaps(self, disk: &NodeRef, target: &str, from: &[(&NodeRef, &str)]) -> Self {
        let from = from.iter().map(|(node, name)| ((*node).clone(), (*name).to_owned())).collect();
        self.bitmap(disk, BitmapStep::Merge(disk.clone(), target.to_owned(), from))
    }

    fn bitmap(mut self, disk: &NodeRef, step: BitmapStep) -> Self {
        self.name_disk(disk);
        self.bitmaps.push(step);
        self
    }

    fn name_disk(&mut self, disk: &NodeRef) {
        if !self.disks.iter().any(|known| known.id() == disk.id()) {
            self.disks.push(disk.clone());
        }
    }

    /// Takes the checkpoint, and starts its jobs. Runs to its end also if the future is dropped.
    ///
    /// # Errors
    /// Nothing has changed: no overlay, no bitmap, no job. Those of [`Backup::prepare`] and of
    /// [`Change::commit`]; `AlreadyExists`, `InvalidInput`: a job's id.
    pub async fn take(self) -> Result<CheckpointReport> {
        bds_io::spawn_now(self.run()).detach_on_drop().await
    }

    async fn run(self) -> Result<CheckpointReport> {
        let Self { jobs, is_grouped, disks, snapshots, bitmaps, backups } = self;
        let backups = prepare_all(backups).await?;
        let mut change = jobs.graph().change();
        for (disk, overlay) in &snapshots {
            change = change.append(disk, overlay);
        }
        change = bitmaps.iter().fold(change, |change, step| step.add_to(change));
        change = backups.iter().fold(change, |change, (_, backup)| backup.stage(change));
        let boxed = backups
            .into_iter()
            .map(|(options, backup)| (options, Box::new(backup) as Box<dyn JobDriver>));
        let groups = into_groups(boxed.collect(), is_grouped);
        // The ids are taken before the change: nothing can fail after it.
        let entered = match jobs.enter(groups).await {
            Ok(entered) => entered,
            Err(error) => {
                // It holds the filters.
                drop(change);
                return Err(match close_dead(jobs.graph()).await {
                    Ok(()) => error,
                    Err(left) => error.caused_by(left),
                });
            }
        };
        match change.commit().await {
            Ok(report) => {
                let (jobs, holds) = (entered.begin(), holds(&disks, report.held));
                let mut left_over = left_over(report);
                for (_, overlay) in &snapshots {
                    left_over.extend(mark_base(overlay).await.err());
                }
                Ok(CheckpointReport { jobs, holds, left_over })
            }
            Err(error) => {
                entered.abandon().await;
                Err(error)
            }
        }
    }
}

impl BitmapStep {
    fn add_to(&self, change: Change) -> Change {
        match self {
            Self::Add(disk, options) => change.add_bitmap(disk, options.clone()),
            Self::Remove(disk, name) => change.remove_bitmap(disk, name),
            Self::Clear(disk, name) => change.clear_bitmap(disk, name),
            Self::Enable(disk, name) => change.enable_bitmap(disk, name),
            Self::Disable(disk, name) => change.disable_bitmap(disk, name),
            Self::Merge(disk, target, from) => {
                let from: Vec<_> = from.iter().map(|(node, name)| (node, &**name)).collect();
                change.merge_bitmaps(disk, target, &from)
            }
        }
    }
}

/// Sets all backups up, or none.
async fn prepare_all(
    wanted: Vec<(BackupOptions, JobOptions)>,
) -> Result<Vec<(JobOptions, Backup)>> {
    let mut prepared: Vec<(JobOptions, Backup)> = Vec::with_capacity(wanted.len());
    for (options, job) in wanted {
        match Backup::prepare_staged(options).await {
            Ok(backup) => prepared.push((job, backup)),
            Err(mut error) => {
                for (_, backup) in prepared.into_iter().rev() {
                    if let Err(left) = backup.discard().await {
                        error = error.context(format!("and a filter was not closed: {left}"));
                    }
                }
                return Err(error);
            }
        }
    }
    Ok(prepared)
}

/// Notes in an overlay what is below it, which is not written any more.
async fn mark_base(overlay: &NodeRef) -> Result<()> {
    let access = Access { perm: Perm::WRITE_UNCHANGED, shared: Perm::all() };
    let marked = async {
        Backend::new(overlay, BackendOptions::job("checkpoint", access))?.mark_base().await
    };
    let words = "the overlay does not note what its backing file holds";
    marked.await.map(drop).map_err(|error| error.context(words))
}

fn into_groups(jobs: Vec<NewJob>, is_grouped: bool) -> Vec<Vec<NewJob>> {
    match is_grouped {
        true if jobs.is_empty() => Vec::new(),
        true => vec![jobs],
        false => jobs.into_iter().map(|job| vec![job]).collect(),
    }
}

fn holds(disks: &[NodeRef], held: Duration) -> Vec<WriteHold> {
    disks.iter().map(|disk| WriteHold { node: disk.name().to_owned(), held }).collect()
}

fn left_over(report: ChangeReport) -> Vec<Error> {
    let closed = report.closed.into_iter().filter_map(|closed| closed.into_result().err());
    closed.chain(report.stored_bitmaps_left).chain(report.not_flushed).collect()
}
