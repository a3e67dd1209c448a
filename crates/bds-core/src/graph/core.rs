//! What happens to a node after its last reference: flushed, closed, its children released, and reported, once.
//!
//! ```text
//! flush to the driver, to its medium, to children that others keep open ── driver.close ── drop driver ── release children
//!                                                                                             └─► die and are reaped in their turn
//! ```
//!
//! No closing begins while a node that it could write to is drained: it waits aside for the end of that section; and a drain waits for
//! closings that are under way. A node is closed before the children only it held, and never inside the closing of another: a chain of any length is a loop.
//! A child that dies too is flushed by its own closing, so a failed flush is in exactly one report. Once begun, closing runs to its end
//! whether or not anybody waits (see `detached`); a report that nobody waits for is kept for [`Graph::reports`] if something
//! failed, and is traced.

use std::collections::HashSet;
use std::fmt;
use std::panic::Location;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::holder_kind::HolderKind;
use bds_io::sync::Mutex as AsyncMutex;
use bds_refcount::{Arena, Dead, Handle, Holder, HolderInfo, Release, Strong};

use super::detached::to_the_end;
use super::edge::{Edge, EdgeParts, Parent};
use super::left_behind::wait_left_alone;
use super::lock::Topology;
use super::names::Claim;
use super::node::{Node, NodeId};
use super::node_ref::NodeRef;
use super::perm::Access;
use super::{Graph, MakePort, NameTable};
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventHub};

/// How a node ended.
#[derive(Debug)]
pub struct CloseReport {
    /// Its id, stale by now.
    pub node: NodeId,
    /// Its name, free by now.
    pub name: String,
    /// Its driver's name.
    pub driver: &'static str,
    /// Why data written earlier may not be durable.
    pub flush_error: Option<Error>,
    /// What its driver could not finish.
    pub close_error: Option<Error>,
    /// From [`NodeRef::close`]: nodes that ended because only this one held them, in the order of their closing.
    pub below: Vec<CloseReport>,
}

impl CloseReport {
    /// Nothing failed, here or below.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let layer = "driver=layer,file.driver=memory,file.size=1M,file.fail-flush=on";
    /// let disk = open(&graph, layer).await?;
    /// # let writer = BackendOptions { writable: true, ..Default::default() };
    /// # Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// let report = disk.close().await?;
    /// assert!(!report.is_clean(), "its file ended with it, and could not be flushed");
    /// assert_eq!((report.errors().count(), report.below.len()), (1, 1));
    /// # Ok(()) });
    /// ```
    pub fn is_clean(&self) -> bool {
        self.errors().next().is_none()
    }

    /// All that failed, here first, then below.
    pub fn errors(&self) -> Box<dyn Iterator<Item = &Error> + '_> {
        let own = self.flush_error.iter().chain(&self.close_error);
        Box::new(own.chain(self.below.iter().flat_map(Self::errors)))
    }

    /// The first failure, if there is one, as a result.
    pub fn into_result(self) -> Result<()> {
        let below = self.below.into_iter().map(Self::into_result);
        let own = [self.flush_error, self.close_error].into_iter().flatten().map(Err);
        own.chain(below).collect()
    }
}

/// Why a node was not closed.
#[derive(Debug)]
pub enum CloseError {
    /// Others refer to it. Nothing has changed.
    InUse {
        /// The reference that was to be closed.
        node: NodeRef,
        /// Who else holds it by name.
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

/// Reports on their way to a caller. Dropped before they are delivered: kept for [`Graph::reports`].
pub(super) struct Undelivered {
    core: GraphCore,
    reports: Vec<CloseReport>,
}

impl Undelivered {
    pub(super) fn new(core: &GraphCore) -> Self {
        Self { core: core.clone(), reports: Vec::new() }
    }

    pub(super) fn push(&mut self, report: CloseReport) {
        self.reports.push(report);
    }

    pub(super) fn extend(&mut self, reports: Vec<CloseReport>) {
        self.reports.extend(reports);
    }

    pub(super) fn deliver(mut self) -> Vec<CloseReport> {
        std::mem::take(&mut self.reports)
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        self.core.keep(std::mem::take(&mut self.reports));
    }
}

/// A dead node whose closing has begun.
struct Closing(Dead<Node>);

/// What became of the child of a node that is being closed.
enum Released {
    Died,
    Survived,
    /// It survived, and what was written to it may not be durable: it is to be flushed through this edge.
    Unflushed(Arc<Edge>),
}

/// All it takes to close dead nodes, without the graph itself: the graph's own end reaps too.
#[derive(Clone)]
pub(crate) struct GraphCore {
    pub(super) arena: Arena<Node>,
    pub(super) plan: Arc<Mutex<NameTable>>,
    pub(super) make_port: MakePort,
    /// One sweep at a time, so that a close keeps its own dead together.
    sweeping: Arc<AsyncMutex<()>>,
    unasked: Arc<Mutex<Vec<CloseReport>>>,
    pub(super) topology: Arc<Topology>,
    pub(super) events: EventHub,
    /// Dead nodes whose closing waits for the end of a drained section below them.
    deferred: Arc<Mutex<Vec<Dead<Node>>>>,
}

impl GraphCore {
    pub(super) fn new(arena: Arena<Node>, make_port: MakePort) -> Self {
        Self {
            arena,
            plan: Arc::default(),
            make_port,
            sweeping: Arc::default(),
            unasked: Arc::default(),
            topology: Arc::default(),
            events: EventHub::default(),
            deferred: Arc::default(),
        }
    }

    pub(super) fn lock_plan(&self) -> MutexGuard<'_, NameTable> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The nodes that live now.
    pub(super) fn live(&self) -> Vec<Strong<Node>> {
        self.arena.snapshot().into_iter().filter_map(|id| self.arena.acquire(id).ok()).collect()
    }

    /// Closes everything dead that can be closed now, including what dies of that.
    pub(super) async fn sweep(self) -> Vec<CloseReport> {
        let _one_at_a_time = self.sweeping.lock().await;
        let mut reports = Vec::new();
        let mut waiting = std::mem::take(&mut *self.lock_deferred()).into_iter();
        while let Some(dead) =
            waiting.next().or_else(|| self.arena.reap_one().map(|(_, dead)| dead))
        {
            match self.begin_closing(dead) {
                Ok(closing) => reports.push(self.close_dead(closing).await.0),
                Err(dead) => self.lock_deferred().push(dead),
            }
        }
        reports
    }

    /// Closes one dead node and what dies of it. Others that lie dead meanwhile are closed too, but reported apart.
    async fn close_with_dependents(self, dead: Dead<Node>) -> CloseReport {
        let closing = self.begin_closing_patiently(dead).await;
        let _one_at_a_time = self.sweeping.lock().await;
        let (mut report, died) = self.close_dead(closing).await;
        let mut ours: HashSet<Handle<Node>> = died.into_iter().collect();
        while let Some((handle, dead)) = self.arena.reap_one() {
            let is_ours = ours.remove(&handle);
            let dead = match self.begin_closing(dead) {
                Ok(closing) => closing,
                Err(dead) => {
                    self.lock_deferred().push(dead);
                    continue;
                }
            };
            let (other, died) = self.close_dead(dead).await;
            if is_ours {
                ours.extend(died);
                report.below.push(other);
            } else {
                self.keep(vec![other]);
            }
        }
        report
    }

    /// From here on drains of the children wait for the closing; unless one of them is drained already.
    fn begin_closing(&self, dead: Dead<Node>) -> Result<Closing, Dead<Node>> {
        let lock = self.lock();
        let children = dead.children().to_vec();
        // Without children it writes to its own medium at most: that waits for the end of a drained section of everything.
        if lock.state.drain_alls > 0 || children.iter().any(|edge| edge.is_quiesced()) {
            return Err(dead);
        }
        children.iter().for_each(|edge| edge.begin_closing(&lock));
        Ok(Closing(dead))
    }

    /// As [`GraphCore::begin_closing`], after the end of the drained sections that are in the way.
    async fn begin_closing_patiently(&self, mut dead: Dead<Node>) -> Closing {
        loop {
            let mut eased = pin!(self.topology.eased.notified());
            eased.as_mut().enable();
            match self.begin_closing(dead) {
                Ok(closing) => return closing,
                Err(back) => dead = back,
            }
            eased.await;
        }
    }

    /// A drained section is over: what waited for that goes on.
    pub(super) fn drain_ended(&self) {
        self.topology.eased.notify_waiters();
        if !self.lock_deferred().is_empty() {
            self.sweep_now_in_background();
        }
    }

    fn lock_deferred(&self) -> MutexGuard<'_, Vec<Dead<Node>>> {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes one node. Returns the children that it was the last to hold, too.
    async fn close_dead(&self, closing: Closing) -> (CloseReport, Vec<Handle<Node>>) {
        let Closing(dead) = closing;
        let name = dead.name().to_owned();
        let named = |error: Error| error.node(&*name);
        let (flushed, unflushed) = self.flush_dead(&dead).await;
        let mut flush_error = flushed.err().map(named);
        let bitmaps = dead.leases.close();
        let close_error = dead.driver().close().await.and(bitmaps).err().map(named);
        let driver = dead.driver_name();
        let node = dead.id();
        let children = dead.children().to_vec();
        drop(dead);
        self.forget_name(&name, node);
        let mut died = Vec::new();
        for edge in children {
            let handle = edge.target().strong().handle();
            edge.target().forget_parent(node);
            wait_left_alone(edge.target().strong(), 1).await;
            if edge.frozen().is_some() {
                self.leave_behind(&edge);
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
        self.topology.eased.notify_waiters();
        self.events.emit(|| Event::node_closed(&name, driver, &flush_error, &close_error));
        let below = Vec::new();
        (CloseReport { node, name, driver, flush_error, close_error, below }, died)
    }

    /// Whoever froze the edge, or has it in hand, keeps it, and so its target; to everybody else it is gone, and no drain waits for it.
    fn leave_behind(&self, edge: &Arc<Edge>) {
        let target = edge.target();
        self.lock().detach(&target, edge);
        self.topology.loosened.push(target.id());
    }

    /// Makes what was written through this node durable, as far as it does not lie with children that die next. These are
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

    /// Gives a child up that `parent`, which is being closed, used through this edge.
    async fn release_child(
        &self,
        mut edge: Arc<Edge>,
        parent: NodeId,
        was_skipped: bool,
    ) -> Released {
        for _ in 0..1000 {
            match self.try_release(edge, parent, was_skipped) {
                Ok(released) => return released,
                // Somebody looks at the edge just now.
                Err(back) => edge = back,
            }
            bds_io::yield_now().await;
        }
        // He keeps it, and lets the child go when done.
        self.leave_behind(&edge);
        Released::Survived
    }

    /// A child that was not flushed because it looked as if it would die with the parent, but found another holder, is flushed
    /// after all: through an edge that takes the place of the other in one step, so that no drain ends in between.
    fn try_release(
        &self,
        edge: Arc<Edge>,
        parent: NodeId,
        was_skipped: bool,
    ) -> Result<Released, Arc<Edge>> {
        let handle = edge.target().strong().handle();
        let lock = self.lock();
        match Edge::release(edge)? {
            Release::Last => return Ok(Released::Died),
            Release::NotLast if !was_skipped => return Ok(Released::Survived),
            Release::NotLast => {}
        }
        let Ok(strong) = self.arena.acquire(handle) else { return Ok(Released::Survived) };
        let edge = self.flush_edge(&strong, Parent::Node(parent));
        lock.attach_closing(&strong, &edge);
        Ok(Released::Unflushed(edge))
    }

    /// Makes everything durable that was written through the node. For whoever has it drained: no gate is asked.
    pub(super) async fn flush_node(&self, node: &Strong<Node>) -> Result<()> {
        (self.make_port)(self.flush_edge(node, Parent::Root("flush".into()))).flush().await
    }

    fn flush_edge(&self, node: &Strong<Node>, parent: Parent) -> Arc<Edge> {
        let parts = EdgeParts {
            name: "flush",
            role: Role::empty(),
            access: Access::NONE,
            holder: Holder::new(HolderKind::Other("graph"), "flush"),
            since: Location::caller(),
            stays: true,
            graph: None,
            in_flight: None,
        };
        let edge = Edge::new(parts, Some(Strong::clone(node)), &self.topology.loosened);
        edge.set_parent(parent);
        edge
    }

    fn forget_name(&self, name: &str, id: NodeId) {
        let mut plan = self.lock_plan();
        if matches!(plan.names.get(name), Some(Claim::Node(known)) if *known == id) {
            plan.names.remove(name);
        }
    }

    /// Keeps what nobody waits for, if it tells of a failure.
    pub(super) fn keep(&self, reports: Vec<CloseReport>) {
        for report in reports {
            let name = &report.name;
            if report.is_clean() {
                tracing::debug!(node = %name, "node closed");
                continue;
            }
            for error in report.errors() {
                tracing::error!(node = %name, %error, "closing a node failed");
            }
            self.unasked.lock().unwrap_or_else(PoisonError::into_inner).push(report);
        }
    }

    fn take_kept(&self) -> Vec<CloseReport> {
        std::mem::take(&mut self.unasked.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Closes what is dead on nobody's behalf.
    pub(super) async fn sweep_unasked(&self) {
        if self.arena.has_dead() {
            let core = self.clone();
            let sweep = async move {
                let reports = core.clone().sweep().await;
                core.keep(reports);
                Vec::new()
            };
            drop(self.to_the_end(sweep).await);
        }
    }

    /// As [`GraphCore::sweep_unasked`], from where nobody can wait.
    pub(super) fn sweep_in_background(&self) {
        if self.arena.has_dead() {
            self.sweep_now_in_background();
        }
    }

    fn sweep_now_in_background(&self) {
        let core = self.clone();
        bds_io::spawn(async move {
            let reports = core.clone().sweep().await;
            core.keep(reports);
        })
        .detach();
    }

    async fn to_the_end(
        &self,
        work: impl Future<Output = Vec<CloseReport>> + Send + 'static,
    ) -> Option<Vec<CloseReport>> {
        let core = self.clone();
        to_the_end(work, move |reports| core.keep(reports)).await
    }
}

impl Graph {
    /// Closes all nodes whose last reference is gone, and reports them, a node before the children that only it held. Also
    /// returns reports of earlier failures that nobody has seen. Waits for operations whose requests were dropped, if
    /// nothing else keeps their node.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let layer = "driver=layer,node-name=top,file.driver=memory,file.node-name=file";
    /// let top = open(&graph, layer).await?;
    /// drop(top); // neither waits nor does I/O
    /// let names: Vec<String> = graph.reap().await.into_iter().map(|report| report.name).collect();
    /// assert_eq!(names, ["top", "file"]);
    /// assert!(graph.reap().await.is_empty(), "each is reported once");
    /// # Ok(()) });
    /// ```
    pub async fn reap(&self) -> Vec<CloseReport> {
        let core = self.0.core.clone();
        let sweep = async move {
            core.wait_for_lodgers().await;
            core.sweep().await
        };
        let swept = self.0.core.to_the_end(sweep).await;
        let mut reports = self.reports();
        reports.extend(swept.unwrap_or_default());
        reports
    }

    /// Reports of closings that failed while nobody waited for them: in passing, or by a caller that went away. Each is
    /// returned once.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,fail-flush=on").await?;
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// drop(disk); // something was written to it, and it will fail to flush
    /// let other = open(&graph, "driver=memory").await?; // closes what is dead, in passing
    ///
    /// let reports = graph.reports();
    /// let error = reports[0].flush_error.as_ref().expect("it was told to fail");
    /// assert_eq!(error.to_string(), "node 'disk': told to fail flushing");
    /// assert!(graph.reports().is_empty());
    /// # Ok(()) });
    /// ```
    pub fn reports(&self) -> Vec<CloseReport> {
        self.0.core.take_kept()
    }
}

impl NodeRef {
    /// Closes the node, if this is the only reference to it: flushes, closes, and closes what only it held. Says how that
    /// went; a failed flush is in the report. Runs to its end even if the future is dropped. Waits for operations whose requests were
    /// dropped, and for drained sections of the nodes below to end.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,fail-flush=on").await?;
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// let second = disk.clone().held_as(Holder::new(HolderKind::User, "my list"));
    ///
    /// let CloseError::InUse { node: disk, holders } = disk.close().await.unwrap_err();
    /// assert_eq!(holders[0].to_string().split(" (").next(), Some("user 'my list'"));
    /// drop(second);
    /// let report = disk.close().await?;
    /// assert_eq!(report.into_result().unwrap_err().message(), "told to fail flushing");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// [`CloseError::InUse`] gives the reference back and names the others.
    pub async fn close(self) -> Result<CloseReport, CloseError> {
        let core = self.graph().0.core.clone();
        let lost = Lost::of(self.strong());
        let work = async move {
            match self.end_patiently().await {
                Ok(ended) => Ok(ended.close().await),
                Err((node, holders)) => Err(CloseError::InUse { node, holders }),
            }
        };
        // A reference that comes back because the node is in use ends like any other.
        let orphaned = move |closed: Result<CloseReport, CloseError>| {
            drop(closed.map(|report| core.keep(vec![report])));
        };
        to_the_end(work, orphaned).await.unwrap_or_else(|| Ok(lost.report()))
    }

    /// Ends the node if this is the only reference; it cannot be acquired any more then. Does not wait.
    pub(super) fn end(self) -> Result<Ended, (NodeRef, Vec<HolderInfo>)> {
        let (graph, held) = self.into_parts();
        let holder = held.holder().clone();
        match held.into_strong().into_dead() {
            Ok(dead) => Ok(Ended { graph, dead }),
            Err(strong) => {
                let holders = strong.holders();
                Err((NodeRef::new(&graph, strong, holder), holders))
            }
        }
    }
}

/// A node that cannot be acquired any more and has not been closed yet.
pub(super) struct Ended {
    graph: Graph,
    dead: Dead<Node>,
}

impl Ended {
    pub(super) async fn close(self) -> CloseReport {
        let Self { graph, dead } = self;
        let lost = Lost::of(&dead);
        let core = graph.0.core.clone();
        let work = async move { vec![core.close_with_dependents(dead).await] };
        let reports = graph.0.core.to_the_end(work).await;
        reports.into_iter().flatten().next().unwrap_or_else(|| lost.report())
    }
}

/// A node whose closing may never be heard of.
struct Lost {
    node: NodeId,
    name: String,
    driver: &'static str,
}

impl Lost {
    fn of(node: &Node) -> Self {
        Self { node: node.id(), name: node.name().to_owned(), driver: node.driver_name() }
    }

    fn report(self) -> CloseReport {
        let Self { node, name, driver } = self;
        let words = "closing did not end: its executor is gone";
        let flush_error = Some(Error::new(ErrorKind::Cancelled, words));
        CloseReport { node, name, driver, flush_error, close_error: None, below: Vec::new() }
    }
}
