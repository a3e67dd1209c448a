//! Closes a dead node: flushes it, closes its driver, releases its children, reports once.
//!
//! ```text
//! flush: driver, medium, children that others hold ── driver.close ── drop driver ── release children
//!                                                                                      └─► dead ones are closed in turn
//! ```
//!
//! No closing begins while a node that it could write to is drained: the dead node is put aside
//! until that section ends. A drain waits for closings under way. A node is closed before the
//! children that only it held, and never inside the closing of another: a chain of any length is a
//! loop. A child that dies too is flushed by its own closing, so a failed flush is in exactly one
//! report. Once begun, closing runs to its end even if the caller's future is dropped
//! (`run_to_end`); a failed report without a waiter is kept for [`Graph::reports`], and traced.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Dead, Handle, Holder, HolderInfo, Release, Strong};

use super::detached_ops::{wait_detached_ops, wait_detached_ops_unless_held};
use super::report::CloseReport;
use super::run_to_end::run_to_end;
use crate::driver::Access;
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::graph::bitmaps::persist;
use crate::graph::core::{Graph, GraphCore};
use crate::graph::model::edge::{Edge, EdgeParts, Parent};
use crate::graph::model::node::{Node, NodeId};
use crate::graph::model::node_ref::NodeRef;
use crate::graph::name_table::Claim;

/// Why a node was not closed.
#[derive(Debug)]
pub enum CloseError {
    /// Other references exist. Nothing has changed.
    InUse {
        /// The reference that was to be closed.
        node: NodeRef,
        /// The other holders that have a name.
        holders: Vec<HolderInfo>,
    },
}

impl fmt::Display for CloseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::InUse { node, holders } = self;
        write!(f, "node '{}' is in use", node.name())?;
        for (index, holder) in holders.iter().enumerate() {
            write!(f, "{}{holder}", if index == 0 { " by " } else { ", " })?;
        }
        Ok(())
    }
}

impl std::error::Error for CloseError {}

impl From<CloseError> for Error {
    fn from(error: CloseError) -> Self {
        Error::new(ErrorKind::InUse, error.to_string())
    }
}

/// A dead node whose closing has begun.
pub(super) struct Closing(Dead<Node>);

/// The outcome of releasing a child of a node that is being closed.
enum Released {
    Died,
    Survived,
    /// It survived, and writes to it may not be durable: to be flushed through this edge.
    Unflushed(Arc<Edge>),
}

impl GraphCore {
    /// Marks the edges to the children, so that drains of them wait for the closing. `Err`: one of
    /// the children is drained.
    pub(super) fn begin_node_close(&self, dead: Dead<Node>) -> Result<Closing, Dead<Node>> {
        let lock = self.lock();
        let children = dead.children().to_vec();
        // Without children it writes to its own medium at most: that waits for the end of a drained
        // section of all nodes.
        if lock.state.drain_alls > 0 || children.iter().any(|edge| edge.is_quiesced()) {
            return Err(dead);
        }
        children.iter().for_each(|edge| edge.set_parent_closing(&lock));
        Ok(Closing(dead))
    }

    /// As [`GraphCore::begin_node_close`], after the drained sections that are in the way have
    /// ended.
    pub(super) async fn begin_node_close_when_undrained(&self, dead: Dead<Node>) -> Closing {
        let mut waiting = Some(dead);
        let begin = || match self.begin_node_close(waiting.take()?) {
            Ok(closing) => Some(closing),
            Err(dead) => {
                waiting = Some(dead);
                None
            }
        };
        self.topology.drain_progress.wait_for(begin).await
    }

    /// Closes one node. Also returns the children that died with it.
    pub(super) async fn close_node(&self, closing: Closing) -> (CloseReport, Vec<Handle<Node>>) {
        let Closing(dead) = closing;
        let name = dead.name().to_owned();
        let named = |error: Error| error.node(&*name);
        let (flushed, unflushed) = self.flush_dead(&dead).await;
        let mut flush_error = flushed.err().map(named);
        let stored = persist::store_at_close(&dead).await;
        let bitmaps = dead.bitmaps.close();
        let closed = dead.driver().close().await;
        let close_error = first_error([stored, closed, bitmaps]).map(named);
        let driver = dead.driver_name();
        let node = dead.id();
        let children = dead.children().to_vec();
        drop(dead);
        self.forget_name(&name, node);
        let mut died = Vec::new();
        for edge in children {
            let handle = edge.target().strong().handle();
            edge.target().clear_inherits_from(node);
            wait_detached_ops_unless_held(edge.target().strong(), 1).await;
            if edge.frozen().is_some() {
                self.detach_kept_edge(&edge);
            }
            match self.release_child(edge, node, unflushed.contains(&handle)).await {
                Released::Died => died.push(handle),
                Released::Survived => {}
                Released::Unflushed(edge) => {
                    let late = (self.make_port)(edge).flush().await;
                    flush_error = flush_error.or(late.err().map(|error| error.node(&*name)));
                }
            }
        }
        self.topology.drain_progress.notify_waiters();
        self.events.emit(|| Event::node_closed(&name, driver, &flush_error, &close_error));
        let below = Vec::new();
        (CloseReport { node, name, driver, flush_error, close_error, below }, died)
    }

    /// Detaches an edge that is still referenced, by a freeze or a reader: that holder keeps the
    /// edge and its target, the graph does not see it any more, and no drain waits for it.
    fn detach_kept_edge(&self, edge: &Arc<Edge>) {
        let target = edge.target();
        self.lock().detach(&target, edge);
        self.topology.stale_perms.push(target.id());
    }

    /// Makes writes through this node durable, but for those to children that die next: these are
    /// returned.
    async fn flush_dead(&self, node: &Node) -> (Result<()>, Vec<Handle<Node>>) {
        if !node.is_writable() {
            return (Ok(()), Vec::new());
        }
        if let Some(error) = node.tracker().flush_failure() {
            return (Err(error.context("an earlier flush failed")), Vec::new());
        }
        let mut dying = Vec::new();
        let result = self.flush_layers(node, &mut dying).await;
        (result, dying)
    }

    async fn flush_layers(&self, node: &Node, dying: &mut Vec<Handle<Node>>) -> Result<()> {
        node.driver().flush_to_os().await?;
        if node.flags().cache.no_flush {
            return Ok(());
        }
        let mut flush = node.tracker().begin_flush().await;
        if !flush.is_clean() {
            node.driver().flush_to_disk().await?;
            flush.succeeded();
        }
        for edge in node.children().iter().filter(|edge| edge.may_hold_writes()) {
            let target = edge.target();
            if target.strong().count() > 1 {
                (self.make_port)(Arc::clone(edge)).flush().await?;
            } else {
                dying.push(target.strong().handle());
            }
        }
        Ok(())
    }

    /// Releases a child of `parent`, which is being closed.
    async fn release_child(
        &self,
        mut edge: Arc<Edge>,
        parent: NodeId,
        was_skipped: bool,
    ) -> Released {
        for _ in 0..1000 {
            match self.try_release_child(edge, parent, was_skipped) {
                Ok(released) => return released,
                // A reader has a reference to the edge just now.
                Err(back) => edge = back,
            }
            bds_io::yield_now().await;
        }
        // The reader keeps the child until it drops the edge.
        self.detach_kept_edge(&edge);
        Released::Survived
    }

    /// Releases the edge. A child that was not flushed because the parent seemed its last holder,
    /// but that has another one, is flushed after all: through a new edge, attached under the same
    /// lock, so that no drain ends in between.
    fn try_release_child(
        &self,
        edge: Arc<Edge>,
        parent: NodeId,
        was_skipped: bool,
    ) -> Result<Released, Arc<Edge>> {
        let handle = edge.target().strong().handle();
        let lock = self.lock();
        match Edge::release_target(edge)? {
            Release::Last => return Ok(Released::Died),
            Release::NotLast if !was_skipped => return Ok(Released::Survived),
            Release::NotLast => {}
        }
        let Ok(strong) = self.arena.acquire(handle) else { return Ok(Released::Survived) };
        let edge = self.flush_edge(&strong, Parent::Node(parent));
        lock.attach_closing(&strong, &edge);
        Ok(Released::Unflushed(edge))
    }

    /// Makes all writes through the node durable. For a caller that has it drained: no gate is
    /// passed.
    pub(in crate::graph) async fn flush_node(&self, node: &Strong<Node>) -> Result<()> {
        (self.make_port)(self.flush_edge(node, Parent::Root("flush".into()))).flush().await
    }

    fn flush_edge(&self, node: &Strong<Node>, parent: Parent) -> Arc<Edge> {
        let parts = EdgeParts {
            name: "flush",
            role: Role::empty(),
            access: Access::NONE,
            holder: Holder::new(HolderKind::Other("graph"), "flush"),
            since: Location::caller(),
            is_fixed: true,
            keep_alive: None,
            backend_in_flight: None,
        };
        let edge = Edge::new(parts, Some(Strong::clone(node)), &self.topology.stale_perms);
        edge.set_parent(parent);
        edge
    }

    fn forget_name(&self, name: &str, id: NodeId) {
        let mut names = self.lock_names();
        if matches!(names.claims.get(name), Some(Claim::Node(known)) if *known == id) {
            names.claims.remove(name);
        }
    }
}

/// The first error, caused by the others.
fn first_error<const N: usize>(results: [Result<()>; N]) -> Option<Error> {
    let errors = results.into_iter().filter_map(Result::err);
    errors.reduce(|first, next| match first.cause() {
        None => first.caused_by(next),
        Some(_) => first.context(next),
    })
}

impl NodeRef {
    /// Closes the node, if this is the only reference to it: flushes, closes, and closes what only
    /// it held. A failed flush is in the report. Runs to its end even if the future is dropped.
    /// Waits for operations whose requests were dropped, and for drained sections of the nodes
    /// below to end.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::{CloseError, Holder, HolderKind};
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let text = "driver=blkdebug,node-name=disk,image.driver=mem,image.size=1M,\
    ///     inject-error.0.iotype=flush";
    /// let disk = graph.open(Options::parse(text)?).await?;
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// let second = disk.clone().held_as(Holder::new(HolderKind::User, "my list"));
    ///
    /// let CloseError::InUse { node: disk, holders } = disk.close().await.unwrap_err();
    /// assert_eq!(holders[0].to_string().split(" (").next(), Some("user 'my list'"));
    /// drop(second);
    /// let report = disk.close().await?;
    /// assert_eq!(report.into_result().unwrap_err().message(), "injected error");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`CloseError::InUse`] returns the reference and names the other holders.
    pub async fn close(self) -> Result<CloseReport, CloseError> {
        let core = self.graph().0.core.clone();
        let lost = LostClose::of(self.strong());
        let work = async move {
            match self.end_after_detached_ops().await {
                Ok(ended) => Ok(ended.close().await),
                Err((node, holders)) => Err(CloseError::InUse { node, holders }),
            }
        };
        // A reference that is returned because the node is in use is dropped.
        let orphaned = move |closed: Result<CloseReport, CloseError>| {
            drop(closed.map(|report| core.keep_reports(vec![report])));
        };
        run_to_end(work, orphaned).await.unwrap_or_else(|| Ok(lost.report()))
    }

    /// As [`NodeRef::try_end`], after detached operations have ended, if nothing else keeps the
    /// node open.
    pub(in crate::graph) async fn end_after_detached_ops(
        self,
    ) -> Result<DeadNode, (NodeRef, Vec<HolderInfo>)> {
        let mut this = self;
        loop {
            let (node, holders) = match this.try_end() {
                Ok(ended) => return Ok(ended),
                Err(others) => others,
            };
            let is_kept = node.node().tracker().detached() > 0 && !node.is_poisoned();
            if !is_kept || !holders.is_empty() {
                return Err((node, holders));
            }
            wait_detached_ops(node.strong()).await;
            this = node;
        }
    }

    /// Takes the node out of the graph if this is the only reference; it cannot be acquired any
    /// more then. Does not wait.
    pub(in crate::graph) fn try_end(self) -> Result<DeadNode, (NodeRef, Vec<HolderInfo>)> {
        let (graph, held) = self.into_parts();
        let holder = held.holder().clone();
        match held.into_strong().into_dead() {
            Ok(dead) => Ok(DeadNode { graph, dead }),
            Err(strong) => {
                let holders = strong.holders();
                Err((NodeRef::new(&graph, strong, holder), holders))
            }
        }
    }
}

/// A node that cannot be acquired any more and has not been closed yet.
pub(in crate::graph) struct DeadNode {
    graph: Graph,
    dead: Dead<Node>,
}

impl DeadNode {
    pub(in crate::graph) async fn close(self) -> CloseReport {
        let Self { graph, dead } = self;
        let lost = LostClose::of(&dead);
        let core = graph.0.core.clone();
        let work = async move { vec![core.close_with_dependents(dead).await] };
        let reports = graph.0.core.run_to_end(work).await;
        reports.into_iter().flatten().next().unwrap_or_else(|| lost.report())
    }
}

/// Facts for the report of a closing whose task was lost.
struct LostClose {
    node: NodeId,
    name: String,
    driver: &'static str,
}

impl LostClose {
    fn of(node: &Node) -> Self {
        Self { node: node.id(), name: node.name().to_owned(), driver: node.driver_name() }
    }

    fn report(self) -> CloseReport {
        let Self { node, name, driver } = self;
        let message = "closing did not end: its executor is gone";
        let flush_error = Some(Error::new(ErrorKind::Cancelled, message));
        CloseReport { node, name, driver, flush_error, close_error: None, below: Vec::new() }
    }
}
