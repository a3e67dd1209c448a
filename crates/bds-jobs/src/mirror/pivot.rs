//! The end of a mirror: its edits in the change of its group, and giving back what it holds.
//!
//! The filter stays drained from the end of the work to the end of the change, and a user that
//! attaches to it meanwhile finds the gate closed; the change moves it like the others. The change
//! also points the filter itself to the target. So a write that reaches it later by whatever way
//! goes where the disk is by then.

use std::time::Duration;

use bds_core::graph::{Blocker, Change, EdgeFacts, JobSlot, NodeRef, Parent, Perm};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};

use super::Mirror;
use super::bitmaps;
use super::filter::Flavour;
use super::tracking::Mode;
use crate::JobContext;
use crate::chain::nodes::close_dead;
use crate::chain::take_out::{DROP_TIMEOUT, Deadline, take_out};

impl Mirror {
    /// Adds the job's edits to the change of its group.
    pub(super) async fn plan_end(&mut self, ctx: &JobContext, change: Change) -> Result<Change> {
        let replaced = if self.pivots { self.control.find_replaced()? } else { None };
        self.check_writers()?;
        let written = self.tracking.target()?;
        written.flush().await?;
        if let Some(content) = &self.content {
            content.show(ctx);
            content.complete_record(&written).await?;
            content.seal(&self.described()?).await?;
            // From the change on, the guest writes to the target.
            self.has_released = self.pivots && content.release_target().await?;
        }
        // Links that the change moves; nothing else changes the graph before it.
        self.frozen = None;
        let filter = self.filter.as_ref().expect("it lives until the job is retired");
        let drained = self.drained.as_ref().expect("the work has ended");
        let (source, target) = (&self.source, &self.target);
        let mut change = change.within(drained);
        change = match (self.pivots, &replaced) {
            (false, _) => change.drop_filter(filter),
            (true, None) => change.replace(filter, target).replace(source, target),
            (true, Some(replaced)) => change.drop_filter(filter).replace(replaced, target),
        };
        if self.pivots {
            change = bitmaps::hand_over(change, source, target, self.bitmaps)?;
        }
        let own = [&self.main, &written, &self.reader];
        let edges = own.into_iter().chain(self.between.iter().map(|(edge, _)| edge));
        Ok(edges.fold(change, Change::release_medium))
    }

    /// Checks that no other user writes the source past the filter. A mirror's filter refuses such
    /// users; that of a commit cannot, because the job itself writes below.
    fn check_writers(&self) -> Result<()> {
        let filter = self.filter.as_ref().map(|filter| filter.id());
        let is_other = |edge: &EdgeFacts| {
            edge.access.perm.intersects(Perm::WRITE | Perm::RESIZE)
                && !matches!(edge.parent, Some(Parent::Node(parent)) if Some(parent) == filter)
        };
        match self.source.edges_above().into_iter().find(is_other) {
            Some(edge) if self.flavour == Flavour::Commit => {
                let message = format!(
                    "{} writes to it beside the job's filter, so its writes were not tracked",
                    edge.holder
                );
                Err(Error::new(ErrorKind::InUse, message).node(self.source.name()))
            }
            _ => Ok(()),
        }
    }

    /// Ends the record, which is kept after a failure, and gives back everything.
    pub(super) async fn retire_as(&mut self, ctx: &JobContext, is_committed: bool) -> Result<()> {
        let ended = match &self.content {
            None => Ok(()),
            Some(content) if is_committed => content.end_record().await,
            Some(content) => {
                // The guest does not wait for it.
                self.tracking.set_mode(Mode::Off);
                self.drained = None;
                if self.has_released
                    && let Err(error) = content.reclaim_target().await
                {
                    tracing::warn!("the target will be read when the mirror goes on: {error}");
                }
                if let Ok(target) = self.tracking.target() {
                    content.save(&target).await;
                }
                content.show(ctx);
                Ok(())
            }
        };
        let timeout = ctx.0.options.cancel_timeout;
        self.give_back(is_committed, timeout).await.and(ended)
    }

    /// Gives back everything. Requests of the job to a base of a commit are waited for no longer
    /// than `timeout`.
    pub(super) async fn give_back(&mut self, is_committed: bool, timeout: Duration) -> Result<()> {
        match self.begin_giving_back(is_committed) {
            Some(rest) => rest.finish(timeout).await,
            None => Ok(()),
        }
    }

    /// Gives back what takes no time; `None` if the rest was given back already.
    fn begin_giving_back(&mut self, is_committed: bool) -> Option<Rest> {
        self.tracking.set_mode(Mode::Off);
        self.tracking.set_delay(Duration::ZERO);
        self.frozen = None;
        // The filter can only be closed outside of drained sections of its own.
        self.drained = None;
        let filter = self.filter.take()?;
        let mut edges: Vec<Backend> = self.between.drain(..).map(|(edge, _)| edge).collect();
        edges.extend([&self.main, &self.reader].map(Clone::clone));
        edges.extend(self.tracking.take_target());
        let is_read_only = self.restores_read_only && !(is_committed && self.pivots);
        Some(Rest {
            filter,
            edges,
            make_read_only: is_read_only.then(|| self.target.clone()),
            _blockers: std::mem::take(&mut self.blockers),
            _slots: std::mem::take(&mut self.slots),
        })
    }
}

/// A mirror that was never started, or whose set-up was dropped, is given back in the background.
impl Drop for Mirror {
    fn drop(&mut self) {
        let job = self.job.clone();
        let Some(rest) = self.begin_giving_back(false) else { return };
        let work = async move {
            if let Err(error) = rest.finish(DROP_TIMEOUT).await {
                tracing::warn!(%job, %error, "the filter of a dropped mirror stays in the graph");
            }
        };
        bds_io::spawn(work).detach();
    }
}

/// What takes time to be given back.
struct Rest {
    filter: NodeRef,
    edges: Vec<Backend>,
    make_read_only: Option<NodeRef>,
    _blockers: Vec<Blocker>,
    _slots: Vec<JobSlot>,
}

impl Rest {
    /// Edges with a request of the job that hangs, in the base of a commit, only give up their
    /// permissions. Ejecting them would drain the node that they lead to, with the guest's gates
    /// closed meanwhile.
    async fn finish(self, timeout: Duration) -> Result<()> {
        let Self { filter, edges, make_read_only, .. } = self;
        let graph = filter.graph().clone();
        let deadline = Deadline::after(timeout);
        let mut change = graph.change().drop_filter(&filter);
        for edge in &edges {
            change = match deadline.limit(edge.drain()).await {
                Some(idle) => {
                    drop(idle);
                    change.release_medium(edge)
                }
                None => edge.stage_access(change, Perm::empty(), Perm::all()),
            };
        }
        let taken_out = take_out(vec![filter], change, deadline).await;
        drop(edges);
        let mut result = taken_out.and(close_dead(&graph).await);
        if let Some(base) = make_read_only {
            result = result.and(restore_read_only(&base, deadline).await);
        }
        result
    }
}

/// Makes the base of a commit read-only again. The change drains it: with a request inside that
/// hangs, it stays writable.
async fn restore_read_only(base: &NodeRef, deadline: Deadline) -> Result<()> {
    let hangs = || {
        let words = "requests of the job hang in it: it stays writable";
        Err(Error::new(ErrorKind::InUse, words).node(base.name()))
    };
    deadline.limit(set_read_only(base, true)).await.unwrap_or_else(hangs)
}

/// Makes a node read-only, or writable.
pub(super) async fn set_read_only(node: &NodeRef, is_read_only: bool) -> Result<()> {
    let options = Options::new().with("read-only", is_read_only);
    node.graph().reopen(node, options).await
}
