//! The job `stream`: copies what an image shows of the images below it into the image, then cuts
//! them out of its chain.
//!
//! ```text
//! during   users ─► copy-on-read ─► top ─► … ─► bottom ─► base      job copies up through `top`
//! after    users ─► top ─► base
//! ```
//!
//! A range is copied by the request path of `top` (`Backend::copy_up`): the copy excludes guest
//! requests that overlap it and does not touch what the image holds by then, so a guest may write
//! meanwhile; it does not change what is read, so dirty bitmaps do not record it. The filter lets
//! reads of the guest copy too.
//!
//! Order at the end: all data and metadata of `top` durable, its header rewritten durably, then the
//! change of the graph. So a crash at any time finds a header whose backing file is needed or
//! superfluous, never one that is missing.

mod options;
mod sides;

use std::time::Duration;

use bds_core::copy::{self, CopyMap, ErrorVerdict, RunOptions};
use bds_core::driver::{BackingRecord, BoxFuture, OpenFlags};
use bds_core::graph::{
    Access, BlockOps, Blocker, Change, Frozen, Graph, JobSlot, NodeId, NodeRef, Perm,
};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};

use self::options::Plan;
pub use self::options::StreamOptions;
use self::sides::{CHUNK, CopyUp, SkipErrors};
use crate::beside_users::BesideUsers;
use crate::chain::headers::Headers;
use crate::chain::last_run::LastRun;
use crate::chain::names::BaseName;
use crate::chain::nodes::{claim_all, close_dead, freeze_link, image_below, node_below};
use crate::chain::take_out::{DROP_TIMEOUT, Deadline, take_out};
use crate::chain::writable::MadeWritable;
use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::kinds::JobType;

/// A stream job, set up and not started.
pub struct Stream {
    graph: Graph,
    job: String,
    plan: Plan,
    options: StreamOptions,
    writable: MadeWritable,
    headers: Headers,
    /// The filter, by id too: the change that ends the job takes the reference.
    filter: Option<NodeRef>,
    filter_id: Option<NodeId>,
    /// The job's user of `top`; `None` if there is nothing to do.
    top: Option<Backend>,
    held: Held,
    /// It was dropped already, and a task undoes its set-up.
    is_remnant: bool,
}

/// What the job holds while it runs.
#[derive(Default)]
struct Held {
    slots: Vec<JobSlot>,
    /// Keep other writers away from the images that are copied.
    edges: Vec<Backend>,
    frozen: Vec<Frozen>,
    blockers: Vec<Blocker>,
}

impl Stream {
    /// Sets the job up: checks the options, makes `top` writable, inserts the filter, freezes the
    /// chain. A `Stream` that is dropped undoes all of that in a task.
    ///
    /// # Errors
    /// Nothing has changed. `InvalidInput`: an option does not fit the chain; `InUse`: another job
    /// works on an image, or a link is frozen (both are named); `NotSupported`: `top` records no
    /// backing file; and what reopening and the change of the graph can fail with.
    pub async fn prepare(job: &str, options: StreamOptions) -> Result<Box<dyn JobDriver>> {
        let plan = Plan::of(&options)?;
        let mut this = Self {
            graph: options.device.graph().clone(),
            job: job.to_owned(),
            plan,
            options,
            writable: MadeWritable::default(),
            headers: Headers::default(),
            filter: None,
            filter_id: None,
            top: None,
            held: Held::default(),
            is_remnant: false,
        };
        match this.set_up().await {
            Ok(()) => Ok(Box::new(this)),
            Err(error) => Err(match this.give_back(DROP_TIMEOUT).await {
                Ok(()) => error,
                Err(undo) => error.context(format!("and its set-up cannot be undone ({undo})")),
            }),
        }
    }

    async fn set_up(&mut self) -> Result<()> {
        let Some(bottom) = self.plan.bottom().cloned() else { return Ok(()) };
        let top = self.plan.top.clone();
        let holder = format!("job '{}'", self.job);
        self.held.slots = claim_all(&self.plan.images, &self.job)?;
        top.check_allowed(BlockOps::STREAM)?;
        self.held.frozen.push(self.graph.freeze_chain(&top, &bottom, &holder)?);
        self.writable.make(&top).await?;
        let unchanged = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        let access = Access { perm: unchanged, shared: Perm::all() };
        let user = Backend::new(&top, BackendOptions::job(self.job.as_str(), access))?;
        user.check_backing_record(self.record().await?).await?;
        self.top = Some(user);
        for image in &self.plan.images[1..] {
            let access = Access { perm: Perm::empty(), shared: unchanged };
            self.held
                .edges
                .push(Backend::new(image, BackendOptions::job(self.job.as_str(), access))?);
        }
        let filter = self.open_filter(&top, &bottom).await?;
        self.filter_id = Some(filter.id());
        self.filter = Some(filter.clone());
        self.graph.insert_filter(&top, &filter).await?;
        self.held.frozen.push(self.graph.freeze_chain(&filter, &top, &holder)?);
        let reason = format!("{holder} streams into it");
        self.held.blockers =
            vec![top.block(BlockOps::RESIZE, &reason), filter.block(BlockOps::RESIZE, &reason)];
        Ok(())
    }

    async fn open_filter(&self, top: &NodeRef, bottom: &NodeRef) -> Result<NodeRef> {
        let mut options = Options::new()
            .with("driver", "copy-on-read")
            .with("file", top.name())
            .with("bottom", bottom.name());
        let name = self.options.filter_node_name.as_deref();
        if let Some(name) = name {
            options.set("node-name", name);
        }
        let flags = OpenFlags { is_implicit: name.is_none(), ..OpenFlags::default() };
        self.graph.open_with(options, flags).await
    }

    /// What `top` is to record in the end, as the chain is now.
    async fn record(&self) -> Result<Option<BackingRecord>> {
        let Some(bottom) = self.plan.bottom() else { return Ok(None) };
        match image_below(bottom) {
            None => Ok(None),
            Some(base) => {
                let name = BaseName::of(&base, bottom, &self.options.given_name()).await?;
                name.record_in(&self.plan.top).map(Some)
            }
        }
    }

    async fn copy(&self, ctx: &JobContext, top: &Backend, bottom: &NodeRef) -> Result<()> {
        let unit = u32::max(4096, self.plan.top.limits().zero_alignment).next_power_of_two();
        let map = CopyMap::new(top.len(), unit)?;
        map.mark_all();
        ctx.progress().set_remaining(map.dirty_bytes());
        let sides = CopyUp { top: top.clone(), bottom: bottom.clone(), last: LastRun::default() };
        let options = RunOptions { max_chunk: CHUNK, ..RunOptions::default() };
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let control = SkipErrors::new(BesideUsers::new(ctx, filter));
        copy::run(&map, &sides, &sides, &options, &control).await?;
        match control.into_first() {
            None => Ok(()),
            Some(error) => {
                Err(error.context("parts were not copied: the image keeps its backing file"))
            }
        }
    }

    /// Makes `top` independent of what is cut out, durably, and adds the cut to the change.
    async fn plan_end(&mut self, ctx: &JobContext, change: Change) -> Result<Change> {
        let Some(bottom) = self.plan.bottom().cloned() else { return Ok(change) };
        // From here on the node below is the one that the header names.
        let link = freeze_link(&bottom, ctx).await?;
        let record = self.record().await?;
        self.headers.rewrite(&self.plan.top, record, &self.job).await?;
        let below = node_below(&bottom);
        self.held.frozen.extend(link);
        let mut change = self.held.frozen.iter().fold(change, Change::thaw);
        change = change.set_backing(&self.plan.top, below.as_ref());
        for user in self.held.edges.iter().chain(&self.top) {
            change = user.stage_access(change, Perm::empty(), Perm::all());
        }
        // Not removed with the change, which would fail if a query looked at it just now: it dies
        // with its last reference.
        if let Some(filter) = self.filter.take() {
            change = change.drop_filter(&filter);
        }
        Ok(change)
    }

    /// Undoes the set-up: after a failure, or as far as the end of the job has left it.
    async fn give_back(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Deadline::after(timeout);
        let filter_removed = self.remove_filter(deadline).await;
        let written_back = self.headers.write_back(&self.job).await;
        self.top = None;
        self.held = Held::default();
        self.plan.images.truncate(1);
        let restored = self.writable.restore(deadline).await;
        filter_removed.and(written_back).and(restored).and(close_dead(&self.graph).await)
    }

    async fn remove_filter(&mut self, deadline: Deadline) -> Result<()> {
        let Some(id) = self.filter_id.take() else { return Ok(()) };
        // The change that ends the job took the reference, and may have removed the filter.
        let found = self.filter.take().or_else(|| self.graph.acquire(id).ok());
        let Some(filter) = found else { return Ok(()) };
        let blockers = std::mem::take(&mut self.held.blockers);
        let change = self.held.frozen.iter().fold(self.graph.change(), Change::thaw);
        // Not removed in the change: that would fail while a query holds the node. The job's is the
        // last reference that stays.
        let change = change.drop_filter(&filter);
        let removed = take_out(vec![filter], change, deadline).await;
        drop(blockers);
        removed
    }

    fn holds_something(&self) -> bool {
        self.filter_id.is_some() || !self.headers.is_empty() || !self.writable.is_empty()
    }
}

impl JobDriver for Stream {
    fn job_type(&self) -> JobType {
        JobType::Stream
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            match (&self.top, self.plan.bottom()) {
                (Some(top), Some(bottom)) => self.copy(ctx, top, bottom).await,
                _ => Ok(()),
            }
        })
    }

    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        Box::pin(self.plan_end(ctx, change))
    }

    /// The new link of `top` is that of the lowest image that goes.
    fn relinked_images(&self) -> Vec<NodeRef> {
        self.plan.bottom().cloned().into_iter().collect()
    }

    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        let timeout = ctx.0.options.cancel_timeout;
        Box::pin(async move {
            let kept = match outcome {
                Outcome::Committed => self.headers.finish().await,
                Outcome::Aborted(_) => Ok(()),
            };
            kept.and(self.give_back(timeout).await)
        })
    }

    /// What was skipped would have to be found again: the job fails at its end.
    fn ignored_error(&self) -> ErrorVerdict {
        ErrorVerdict::Skip
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_remnant || !self.holds_something() {
            return;
        }
        let mut rest = Self {
            graph: self.graph.clone(),
            job: std::mem::take(&mut self.job),
            plan: self.plan.clone(),
            options: self.options.clone(),
            writable: std::mem::take(&mut self.writable),
            headers: std::mem::take(&mut self.headers),
            filter: self.filter.take(),
            filter_id: self.filter_id.take(),
            top: self.top.take(),
            held: std::mem::take(&mut self.held),
            is_remnant: true,
        };
        bds_io::spawn(async move {
            if let Err(error) = rest.give_back(DROP_TIMEOUT).await {
                tracing::error!(job = rest.job, %error, "stream: the set-up cannot be undone");
            }
        })
        .detach();
    }
}
