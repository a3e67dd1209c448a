//! Job `amend`: changes format options of an image that is open (`x-blockdev-amend`), such as its
//! version or the width of its refcounts.
//!
//! The guest sees the same bytes before and after; its requests wait while the driver works. The
//! job's effect is the driver's, at one moment of its work: nothing is left for the end of its
//! group. A forced cancel lets the driver end at its next step, or complete a change that has begun
//! to take effect; the job is concluded when the driver is done.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use bds_core::driver::{Access, AmendControl, Amendment, BoxFuture, Perm};
use bds_core::graph::{Graph, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Options, Result};

use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::job::refused;
use crate::kinds::JobType;
use crate::options::JobOptions;

/// The work of a job `amend`.
///
/// ```
/// use bds_core::Options;
/// use bds_jobs::JobManager;
/// use bds_jobs::amend::Amend;
/// # use bds_jobs::create::Create;
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # config.fs = sim.fs();
/// # let graph = bds_core::graph::Graph::new(config);
/// # sim.block_on(async {
/// let jobs = JobManager::new(&graph);
/// # let file = Options::parse("driver=file,filename=disk.qcow2,size=0")?;
/// # let work = Create::prepare(&graph, file)?;
/// # jobs.start(Create::options("c0"), work.into()).await?.wait().await?;
/// # graph.add(Options::parse("driver=file,node-name=file,filename=disk.qcow2")?).await?;
/// # let format = Options::parse("driver=qcow2,file=file,size=1G")?;
/// # let work = Create::prepare(&graph, format)?;
/// # jobs.start(Create::options("c1"), work.into()).await?.wait().await?;
/// graph.add(Options::parse("driver=qcow2,node-name=disk,file=file")?).await?;
/// let change = Options::parse("driver=qcow2,refcount-bits=64")?;
/// let work = Amend::prepare(&graph, "a0", "disk", change, false)?;
/// jobs.start(Amend::options("a0"), work.into()).await?.wait().await?;
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct Amend {
    /// Its user of the image. Returned at the end.
    image: Option<Backend>,
    options: Options,
    force: bool,
}

impl fmt::Debug for Amend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Amend").field("options", &self.options).finish_non_exhaustive()
    }
}

impl From<Amend> for Box<dyn JobDriver> {
    fn from(job: Amend) -> Self {
        Box::new(job)
    }
}

impl Amend {
    /// Options of such a job: it takes effect by itself, and waits to be dismissed.
    pub fn options(id: impl Into<String>) -> JobOptions {
        JobOptions { auto_finalize: true, auto_dismiss: false, ..JobOptions::new(id) }
    }

    /// Sets the job `job` up for the node `node_name`. `options`: the driver of the node as
    /// `driver`, and what is to change, with `-` or `_` in names, `version` (`v2`, `v3`) or
    /// `compat`. `force` allows changes that may lose data; qcow2 has none.
    ///
    /// # Errors
    /// `InvalidInput`: no driver is given, or another than the node's; `NotSupported`: the driver
    /// has no options that can be changed; `NotFound`: no such node; `InUse`: another user of the
    /// node does not allow it. What is wrong with the options is the job's error.
    pub fn prepare(
        graph: &Graph,
        job: &str,
        node_name: &str,
        mut options: Options,
        force: bool,
    ) -> Result<Self> {
        let node = graph.find(node_name)?;
        let Some(driver) = options.take_str("driver")? else {
            return Err(refused("Parameter 'driver' is missing"));
        };
        graph
            .config()
            .registry
            .driver(&driver)
            .map_err(|_| refused(format!("Block driver '{driver}' not found or not supported")))?;
        if driver != node.driver_name() {
            return Err(refused("x-blockdev-amend doesn't support changing the block driver"));
        }
        Self::of_node(&node, job, with_our_names(options)?, force)
    }

    /// As [`Amend::prepare`], for an open node, with the names of
    /// [`amend_options`](bds_core::driver::DriverType::amend_options).
    ///
    /// # Errors
    /// As there.
    pub fn of_node(node: &NodeRef, job: &str, options: Options, force: bool) -> Result<Self> {
        let driver = node.graph().config().registry.driver(node.driver_name())?;
        if driver.amend_options().is_empty() {
            let message = "Driver does not support x-blockdev-amend";
            return Err(Error::new(ErrorKind::NotSupported, message));
        }
        let mut perm = Perm::WRITE_UNCHANGED;
        if options.contains("size") {
            perm |= Perm::WRITE | Perm::RESIZE;
        }
        let access = Access { perm, shared: Perm::all() };
        let image = Backend::new(node, BackendOptions::job(job, access))?;
        Ok(Self { image: Some(image), options, force })
    }
}

/// QAPI's names as those of create options: `_` for `-`, `compat` for `version`.
fn with_our_names(mut options: Options) -> Result<Options> {
    let mut spelled = Options::new();
    if let Some(version) = options.take_str("version")? {
        spelled.set("compat", version);
    }
    let keys: Vec<String> = options.keys().map(str::to_owned).collect();
    for key in keys {
        if let Some(value) = options.take(&key) {
            spelled.set(&key.replace('-', "_"), value);
        }
    }
    Ok(spelled)
}

impl JobDriver for Amend {
    fn job_type(&self) -> JobType {
        JobType::Amend
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            ctx.progress().set_remaining(1);
            let (job, seen) = (ctx.clone(), AtomicU64::new(0));
            let control = AmendControl::new(move |done, total| {
                let progress = job.progress();
                progress.advance(done.saturating_sub(seen.swap(done, Ordering::Relaxed)));
                progress.set_remaining(total.saturating_sub(done));
            });
            let amendment = Amendment {
                options: std::mem::take(&mut self.options),
                force: self.force,
                control,
                ..Amendment::default()
            };
            if let Some(image) = &self.image {
                image.amend(amendment).await?;
            }
            let left = ctx.progress().total() - ctx.progress().current();
            ctx.progress().advance(left);
            Ok(())
        })
    }

    fn retire<'a>(&'a mut self, _: &'a JobContext, _: Outcome<'a>) -> BoxFuture<'a, Result<()>> {
        let image = self.image.take();
        Box::pin(async {
            if let Some(image) = image {
                // A driver that was cancelled may still be on its way to the next step.
                drop(image.drain().await);
            }
            Ok(())
        })
    }
}
