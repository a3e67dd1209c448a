//! The job `mirror`: copies a disk to a target and keeps the copy equal while the disk is in use;
//! at the end the target takes the disk's place (`complete`), or stays a copy of that moment
//! (`cancel` without force). And the active commit, which is a mirror into the chain's base.
//!
//! ```text
//! during:  guest ─► mirror_top ─file─► source ◄─ job (reads)      target ◄─ job and filter (write)
//! after:   guest ─► target             source                     complete
//!          guest ─► source             target                     cancel, failure
//!
//! options   what a user asks for       setup     opens and inserts the filter
//! tracking  state of job and filter    filter    sees every write       synced   writes both sides
//! pass      what the job does          scan      leaves out what need not be copied
//! governor  keeps guest writes slower than copies
//! pivot     the end of the job         bitmaps   handed over with it    active   the active commit
//! ```
//!
//! Why no write is lost is argued in docs/jobs.md.

mod active;
mod bitmaps;
mod filter;
mod governor;
mod options;
mod pass;
mod pivot;
mod scan;
mod setup;
mod synced;
mod tracking;

use std::fmt;
use std::sync::Arc;

use bds_core::Result;
use bds_core::driver::BoxFuture;
use bds_core::graph::{Blocker, Change, Drained, Frozen, JobSlot, NodeId, NodeRef};
use bds_core::request::Backend;

use crate::{JobContext, JobControl, JobDriver, JobType, Outcome};

pub use self::active::{ActiveCommit, ActiveCommitOptions};
use self::filter::Flavour;
pub use self::options::{
    BitmapTransfer, DEFAULT_BUF_SIZE, MAX_GRANULARITY, MIN_GRANULARITY, MirrorOptions, MirrorSync,
    check_granularity,
};
use self::pass::{Initial, Limits};
use self::setup::Control;
use self::tracking::Tracking;

/// The work of a mirror, or of an active commit.
///
/// ```
/// use bds_core::Options;
/// use bds_core::request::{Backend, BackendOptions};
/// use bds_jobs::mirror::{Mirror, MirrorOptions};
/// use bds_jobs::{JobManager, JobOptions, JobStatus};
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # config.fs = sim.fs();
/// # let graph = bds_core::graph::Graph::new(config);
/// # sim.block_on(async {
/// let old = graph.open(Options::parse("driver=mem,node-name=old,size=1M")?).await?;
/// let new = graph.open(Options::parse("driver=mem,node-name=new,size=1M")?).await?;
/// let guest = Backend::new(&old, BackendOptions { writable: true, ..Default::default() })?;
///
/// let manager = JobManager::new(&graph);
/// let mirror = Mirror::prepare(MirrorOptions::new(&old, &new, "mirror0")).await?;
/// let job = manager.start(JobOptions::new("mirror0"), Box::new(mirror)).await?;
/// job.wait_status(JobStatus::Ready).await?;
/// job.complete()?;
/// job.wait().await?;
/// assert_eq!(guest.node().map(|node| node.id()), Some(new.id()));
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct Mirror {
    job: String,
    flavour: Flavour,
    source: NodeRef,
    target: NodeRef,
    tracking: Arc<Tracking>,
    control: Arc<Control>,
    initial: Initial,
    limits: Limits,
    bitmaps: BitmapTransfer,
    /// Reads the source, below the filter.
    reader: Backend,
    /// Keeps the filter in use, so that it refuses other writers of the source.
    main: Backend,
    /// Keeps other users of the nodes between source and target away (active commit).
    between: Vec<(Backend, NodeRef)>,
    filter: Option<NodeRef>,
    frozen: Option<Frozen>,
    blockers: Vec<Blocker>,
    slots: Vec<JobSlot>,
    /// The target was read-only before: it is again if the commit fails.
    restores_read_only: bool,
    /// Keeps guest writes out from the end of the work to the end of the job.
    drained: Option<Drained>,
    /// The target takes the source's place.
    pivots: bool,
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("job", &self.job)
            .field("source", &self.source.name())
            .field("target", &self.target.name())
            .field("map", &self.tracking.map)
            .finish_non_exhaustive()
    }
}

impl Mirror {
    /// The filter: the node that users of the disk use while the job runs.
    pub fn filter(&self) -> Option<&NodeRef> {
        self.filter.as_ref()
    }

    /// The granularity in bytes.
    pub fn granularity(&self) -> u32 {
        self.tracking.map.granularity()
    }
}

impl JobDriver for Mirror {
    fn job_type(&self) -> JobType {
        match self.flavour {
            Flavour::Mirror => JobType::Mirror,
            Flavour::Commit => JobType::Commit,
        }
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.work(ctx))
    }

    fn plan<'a>(
        &'a mut self,
        _ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        Box::pin(self.plan_end(change))
    }

    fn retire<'a>(
        &'a mut self,
        _ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.give_back(matches!(outcome, Outcome::Committed)))
    }

    fn target_nodes(&self) -> Vec<NodeId> {
        match self.flavour {
            Flavour::Mirror => vec![self.target.id()],
            // The disk of the guest lies on it.
            Flavour::Commit => Vec::new(),
        }
    }

    fn supports_complete(&self) -> bool {
        true
    }

    fn supports_soft_cancel(&self) -> bool {
        true
    }

    fn control(&self) -> Option<Arc<dyn JobControl>> {
        Some(Arc::clone(&self.control) as Arc<dyn JobControl>)
    }
}
