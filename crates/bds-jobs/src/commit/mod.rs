//! The job `commit` of images that are not written to: copies what they hold into the image below
//! them, then cuts them out of the chain.
//!
//! ```text
//! during   overlays ─► commit_top ─► top ─► … ─► lowest ─► commit_base ─► base      job reads top, writes base
//! after    overlays ─► base
//! ```
//!
//! What the job writes to the base is hidden by the images above it, so what the overlays show
//! stays the same at every moment. What the images in between show by themselves changes, and that
//! of other images on the base too: these are refused, unless the user insists.
//!
//! Order at the end: everything in the base durable, then the headers of all overlays rewritten,
//! each durably, then the change of the graph. An overlay shows the same through `top` and directly
//! on the base, so a crash between two headers does no harm; if one cannot be written, those before
//! it are written back.

mod options;
mod sides;

use std::sync::Arc;
use std::time::Duration;

use bds_core::copy::{self, CopyMap, RunOptions};
use bds_core::driver::{BoxFuture, Truncate, ZeroFlags};
use bds_core::graph::{
    Access, BlockOps, Blocker, Change, Frozen, Graph, JobSlot, NodeId, NodeRef, Perm,
};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};

pub use self::options::CommitOptions;
use self::options::Plan;
use self::sides::Shown;
use crate::beside_users::BesideUsers;
use crate::chain::headers::{Headers, forget_base};
use crate::chain::last_run::LastRun;
use crate::chain::names::BaseName;
use crate::chain::nodes::{Overlay, claim_all, close_dead, freeze_link, link_to, overlays};
use crate::chain::shield::Shield;
use crate::chain::take_out::{DROP_TIMEOUT, Deadline, take_out};
use crate::chain::writable::MadeWritable;
use crate::context::JobContext;
use crate::driver::{JobDriver, Outcome};
use crate::kinds::JobType;

/// Zeros written at once behind the end of `top`.
const ZEROS: u64 = 256 << 20;

/// A commit job, set up and not started.
pub struct Commit {
    graph: Graph,
    job: String,
    plan: Option<Plan>,
    options: CommitOptions,
    writable: MadeWritable,
    headers: Headers,
    /// The two filters, by id too: the change that ends the job takes the references.
    filters: Vec<NodeRef>,
    filter_ids: Vec<NodeId>,
    users: Option<Users>,
    /// Bytes of the base from its beginning that hold what they shall.
    covered: u64,
    held: Held,
    /// It was dropped already, and a task undoes its set-up.
    is_remnant: bool,
}

/// The job's users of the images.
struct Users {
    top: Backend,
    base: Backend,
    /// Keep users away that rely on the images in between.
    middle: Vec<Backend>,
}

/// What the job holds while it runs.
#[derive(Default)]
struct Held {
    slots: Vec<JobSlot>,
    frozen: Vec<Frozen>,
    blockers: Vec<Blocker>,
}

impl Commit {
    /// Sets the job up: checks the options, makes the base writable and long enough, inserts the
    /// filters, freezes the chain. A `Commit` that is dropped undoes all of that in a task, but the
    /// base stays as long as it was made.
    ///
    /// # Errors
    /// Nothing has changed, except that the base may be longer. `InvalidInput`: an option does not
    /// fit the chain; `InUse`: `top` has a writer, another image is backed by the base or by an
    /// image in between, another job works on an image, or a link is frozen (both are named);
    /// `NotSupported`: an overlay records no backing file; and what reopening, growing and the
    /// change of the graph can fail with.
    pub async fn prepare(job: &str, options: CommitOptions) -> Result<Box<dyn JobDriver>> {
        let plan = Plan::of(&options)?;
        let mut this = Self {
            graph: options.device.graph().clone(),
            job: job.to_owned(),
            plan: Some(plan.clone()),
            options,
            writable: MadeWritable::default(),
            headers: Headers::default(),
            filters: Vec::new(),
            filter_ids: Vec::new(),
            users: None,
            covered: 0,
            held: Held::default(),
            is_remnant: false,
        };
        match this.set_up(&plan).await {
            Ok(()) => Ok(Box::new(this)),
            Err(error) => Err(match this.give_back(DROP_TIMEOUT).await {
                Ok(()) => error,
                Err(undo) => error.context(format!("and its set-up cannot be undone ({undo})")),
            }),
        }
    }

    async fn set_up(&mut self, plan: &Plan) -> Result<()> {
        let (top, base) = (plan.top(), plan.base());
        let holder = format!("job '{}'", self.job);
        self.held.slots = claim_all(&plan.images, &self.job)?;
        top.check_allowed(BlockOps::COMMIT_SOURCE)?;
        base.check_allowed(BlockOps::COMMIT_TARGET)?;
        // Before anything is changed: conflicts with other jobs.
        drop(self.graph.freeze_chain(top, base, &holder)?);
        let name = BaseName::of(base, plan.lowest(), &self.options.given_name()).await?;
        for overlay in overlays(top) {
            let record = name.record_in(&overlay.image)?;
            let access = Access { perm: Perm::empty(), shared: Perm::all() };
            let user =
                Backend::new(&overlay.image, BackendOptions::job(self.job.as_str(), access))?;
            user.check_backing_record(Some(record)).await?;
        }
        forget_base(plan.lowest(), &self.job).await;
        self.writable.make(base).await?;
        self.insert_filters(plan).await?;
        let above = self.filters.first().expect("both were inserted");
        self.held.frozen.push(self.graph.freeze_chain(above, base, &holder)?);
        let users = self.attach(plan)?;
        if users.base.len() < users.top.len() {
            users.base.truncate(Truncate::to(users.top.len())).await?;
        }
        self.users = Some(users);
        self.held.blockers = plan
            .images
            .iter()
            .map(|image| image.block(BlockOps::RESIZE, &format!("{holder} commits it")))
            .collect();
        Ok(())
    }

    async fn insert_filters(&mut self, plan: &Plan) -> Result<()> {
        let (parent, child) =
            link_to(plan.lowest(), plan.base()).expect("the base lies below the lowest image");
        let name = self.options.filter_node_name.clone();
        let upper = self.open_filter("commit_top", plan.top(), name.as_deref()).await?;
        let lower = self.open_filter("commit_base", plan.base(), None).await?;
        let change = self.graph.change().insert_filter(plan.top(), &upper);
        change.replace_child(&parent, child, &lower).commit().await.map(drop)
    }

    async fn open_filter(
        &mut self,
        driver: &'static str,
        node: &NodeRef,
        name: Option<&str>,
    ) -> Result<NodeRef> {
        let mut options = Options::new().with("file", node.name()).with("read-only", true);
        if let Some(name) = name {
            options.set("node-name", name);
        }
        let filter = self.graph.open_driver(Arc::new(Shield(driver)), options).await?;
        self.filter_ids.push(filter.id());
        self.filters.push(filter.clone());
        Ok(filter)
    }

    fn attach(&self, plan: &Plan) -> Result<Users> {
        let mut shared = Perm::WRITE_UNCHANGED;
        // Users that are there in spite of what they will see.
        shared.set(Perm::CONSISTENT_READ, self.options.force);
        let user = |node: &NodeRef, access| {
            Backend::new(node, BackendOptions::job(self.job.as_str(), access))
        };
        let kept = Perm::WRITE_UNCHANGED | Perm::CONSISTENT_READ;
        let base = Access { perm: Perm::changes() | Perm::WRITE_UNCHANGED, shared };
        Ok(Users {
            top: user(plan.top(), Access { perm: Perm::empty(), shared: kept })?,
            base: user(plan.base(), base)?,
            middle: plan
                .middle()
                .iter()
                .map(|image| user(image, Access { perm: Perm::empty(), shared }))
                .collect::<Result<_>>()?,
        })
    }

    async fn copy(&mut self, ctx: &JobContext) -> Result<()> {
        let (Some(plan), Some(users)) = (&self.plan, &self.users) else { return Ok(()) };
        let above = overlays(plan.top());
        let longest = above.iter().map(|overlay| overlay.image.len()).max().unwrap_or(0);
        let len = users.top.len().max(longest.min(users.base.len()));
        let unit = u32::max(4096, plan.base().limits().zero_alignment).next_power_of_two();
        let map = CopyMap::new(len, unit)?;
        map.mark_all();
        ctx.progress().set_remaining(map.dirty_bytes());
        let options =
            RunOptions { above: Some(plan.base().id()), may_unmap: true, ..RunOptions::default() };
        let shown = Shown(users.top.clone(), LastRun::default());
        let control = BesideUsers::new(ctx, &self.options.device);
        copy::run(&map, &shown, &users.base, &options, &control).await?;
        self.covered = len;
        Ok(())
    }

    /// Makes the base and the headers of all overlays durable, and adds the cut to the change.
    async fn plan_end(&mut self, ctx: &JobContext, change: Change) -> Result<Change> {
        let (Some(plan), Some(users)) = (self.plan.clone(), self.users.as_ref()) else {
            return Ok(change);
        };
        let above = freeze_overlays(plan.top(), ctx, &mut self.held.frozen).await?;
        for overlay in &above {
            // It may have grown, or be a new one.
            let end = overlay.image.len().min(users.base.len());
            self.covered = zero_up_to(&users.base, self.covered, end).await?;
        }
        users.base.flush().await?;
        let name = BaseName::of(plan.base(), plan.lowest(), &self.options.given_name()).await?;
        for Overlay { image, .. } in &above {
            self.headers.rewrite(image, Some(name.record_in(image)?), &self.job).await?;
        }
        let mut change = self.held.frozen.iter().fold(change, Change::thaw);
        for Overlay { image, backing } in &above {
            // Overlays that were attached to `top` itself meanwhile.
            if backing.id() == plan.top().id() {
                change = change.set_backing(image, Some(plan.base()));
            }
        }
        for user in users.middle.iter().chain([&users.top, &users.base]) {
            change = user.stage_access(change, Perm::empty(), Perm::all());
        }
        let mut filters = std::mem::take(&mut self.filters).into_iter();
        if let (Some(upper), Some(lower)) = (filters.next(), filters.next()) {
            // They die with their last references: a removal in the change would fail if a query
            // looked at them just now.
            change = change.replace(&upper, plan.base()).drop_filter(&lower);
        }
        Ok(change)
    }

    /// Undoes the set-up: after a failure, or as far as the end of the job has left it.
    async fn give_back(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Deadline::after(timeout);
        let written_back = self.headers.write_back(&self.job).await;
        self.users = None;
        let filters_removed = self.remove_filters(deadline).await;
        self.held = Held::default();
        self.plan = None;
        let restored = self.writable.restore(deadline).await;
        written_back.and(filters_removed).and(restored).and(close_dead(&self.graph).await)
    }

    async fn remove_filters(&mut self, deadline: Deadline) -> Result<()> {
        let ids = std::mem::take(&mut self.filter_ids);
        let mut filters = std::mem::take(&mut self.filters);
        if filters.is_empty() {
            // The change that ends the job took the references, and may have removed them.
            filters.extend(ids.iter().filter_map(|id| self.graph.acquire(*id).ok()));
        }
        if filters.is_empty() {
            return Ok(());
        }
        let mut change = self.held.frozen.iter().fold(self.graph.change(), Change::thaw);
        for filter in &filters {
            change = change.drop_filter(filter);
        }
        take_out(filters, change, deadline).await
    }

    fn holds_something(&self) -> bool {
        !self.filter_ids.is_empty() || !self.headers.is_empty() || !self.writable.is_empty()
    }
}

/// Freezes the links of all overlays to what is below them, and returns the overlays. While their
/// links are frozen none can go away; a new one is found in the next round.
async fn freeze_overlays(
    top: &NodeRef,
    ctx: &JobContext,
    frozen: &mut Vec<Frozen>,
) -> Result<Vec<Overlay>> {
    let mut known: Vec<NodeId> = Vec::new();
    loop {
        let found = overlays(top);
        let Some(new) = found.iter().find(|overlay| !known.contains(&overlay.image.id())) else {
            return Ok(found);
        };
        known.push(new.image.id());
        frozen.extend(freeze_link(&new.image, ctx).await?);
    }
}

/// Writes zeros from `start` to `end`; returns where they end.
async fn zero_up_to(base: &Backend, start: u64, end: u64) -> Result<u64> {
    let mut at = start;
    while at < end {
        let len = ZEROS.min(end - at);
        let _done = base.write_zeroes(at, len, ZeroFlags::MAY_UNMAP).await?;
        at += len;
    }
    Ok(at)
}

impl JobDriver for Commit {
    fn job_type(&self) -> JobType {
        JobType::Commit
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.copy(ctx))
    }

    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        Box::pin(self.plan_end(ctx, change))
    }

    /// Those of the overlays.
    fn relinked_images(&self) -> Vec<NodeRef> {
        let above = self.plan.iter().flat_map(|plan| overlays(plan.top()));
        above.map(|overlay| overlay.image).collect()
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
}

impl Drop for Commit {
    fn drop(&mut self) {
        if self.is_remnant || !self.holds_something() {
            return;
        }
        let mut rest = Self {
            graph: self.graph.clone(),
            job: std::mem::take(&mut self.job),
            plan: self.plan.take(),
            options: self.options.clone(),
            writable: std::mem::take(&mut self.writable),
            headers: std::mem::take(&mut self.headers),
            filters: std::mem::take(&mut self.filters),
            filter_ids: std::mem::take(&mut self.filter_ids),
            users: self.users.take(),
            covered: 0,
            held: std::mem::take(&mut self.held),
            is_remnant: true,
        };
        bds_io::spawn(async move {
            if let Err(error) = rest.give_back(DROP_TIMEOUT).await {
                tracing::error!(job = rest.job, %error, "commit: the set-up cannot be undone");
            }
        })
        .detach();
    }
}
