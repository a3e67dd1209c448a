//! Drained sections: nobody inside, and nobody gets in.
//!
//! A drain is asked of a node and reaches everything above it, because what is on its way in a parent would still come. It
//! acts on gates: new requests wait at the roots (backends, jobs, exports), those that are under way finish and find
//! every door on their way open, and only when a node is empty are the doors behind it shut.
//!
//! ```text
//!   backend ─┤gate├─► filter ──► qcow2 ──► file        drain(file): 1 shut the backend's gate
//!                                                                  2 wait until filter is empty, shut its doors
//!                                                                  3 wait until qcow2 is empty, shut its doors
//!                                                                  4 wait until file is empty
//! ```
//! Counting: `quiesce(node)` = sections on the node + sections of everything + edges to drained children. An edge drains its
//! parent at most once. Sections nest and keep their node alive; whoever attaches during one finds the gate closed. Ending
//! a section neither waits nor changes the graph.
//!
//! **Queued is not in flight**: who waits at a gate is waited for by nobody. **A closing is**: a drain waits for closings that
//! write to its nodes, and none begins while it lasts (`reap`). **A poisoned node is not waited for.**

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::holder_kind::HolderKind;
use bds_refcount::{Held, Holder, HolderName, Strong};
use futures_util::future::{Either, select};

use super::edge::Edge;
use super::lock::GraphLockGuard;
use super::node::{Node, NodeId};
use super::{Graph, NodeRef, walk};
use crate::error::{Error, ErrorKind, Result};
use crate::tracker::ShardNumber;

/// The name under which the change that has its turn drains.
pub(super) const CHANGE: &str = "change";

pub(super) fn is_by_change(name: &HolderName) -> bool {
    matches!(name, HolderName::Text(text) if **text == *CHANGE)
}

/// Who drains, for "in use" texts.
fn holder(what: &str) -> Holder {
    Holder::new(HolderKind::Drain, what)
}

/// Some nodes, drained. Taken apart by nobody: gates open when it is dropped.
pub(super) struct DrainSet {
    graph: Graph,
    nodes: BTreeMap<NodeId, Held<Node>>,
    /// Sections of whoever asked for this one: they are not somebody else's.
    within: Vec<Arc<Section>>,
    /// Doors that were opened and not shut again.
    opened: Mutex<Vec<Weak<Edge>>>,
}

impl DrainSet {
    /// Closes the gates in front of these nodes and waits until nobody is inside any of them nor above them. Dropped while it
    /// waits: the gates open again.
    pub(super) async fn begin(graph: &Graph, nodes: Vec<Strong<Node>>, what: &str) -> Self {
        Self::begin_within(graph, nodes, what, &[]).await
    }

    /// As [`DrainSet::begin`], inside sections of one's own.
    pub(super) async fn begin_within(
        graph: &Graph,
        nodes: Vec<Strong<Node>>,
        what: &str,
        within: &[Arc<Section>],
    ) -> Self {
        let mut this = Self::new(graph);
        this.within = within.to_vec();
        this.extend(nodes, what).await;
        this
    }

    fn new(graph: &Graph) -> Self {
        let nodes = BTreeMap::new();
        Self { graph: graph.clone(), nodes, within: Vec::new(), opened: Mutex::default() }
    }

    /// Some more.
    pub(super) async fn extend(&mut self, nodes: Vec<Strong<Node>>, what: &str) {
        {
            let lock = self.graph.0.core.lock();
            for node in nodes {
                if let Entry::Vacant(place) = self.nodes.entry(node.id()) {
                    lock.begin_section(&node);
                    place.insert(node.held_by(holder(what)));
                }
            }
        }
        self.settle().await;
    }

    /// Waits until nobody is inside, and shuts all doors on the way.
    pub(super) async fn settle(&self) {
        let nodes: Vec<NodeId> = self.own_nodes().iter().map(|node| node.id()).collect();
        wait_idle(&self.graph, &nodes).await;
        self.lock_opened().clear();
    }

    fn lock_opened(&self) -> MutexGuard<'_, Vec<Weak<Edge>>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that this and the sections around it have drained by name.
    fn own_nodes(&self) -> Vec<Strong<Node>> {
        let mut all: Vec<Strong<Node>> =
            self.nodes.values().map(|held| Strong::clone(held)).collect();
        for section in &self.within {
            match section.is_all {
                true => all.extend(self.graph.0.core.live()),
                false => all.extend(section.set.own_nodes()),
            }
        }
        all
    }

    /// How many of the node's sections are of this and those around it.
    fn own_sections(&self, id: NodeId) -> u32 {
        let around = |section: &Arc<Section>| match section.is_all {
            true => 1,
            false => section.set.own_sections(id),
        };
        u32::from(self.covers(id)) + self.within.iter().map(around).sum::<u32>()
    }

    /// Lets drivers reach their children although these are drained, so that they can write out or read anew; roots stay
    /// shut. [`DrainSet::settle`] shuts the doors again, as does the end of this where a section goes on. While the drivers of these nodes work, drains of what lies below wait for
    /// them as for a request. `Err`: others have drained something below, so they may have to wait for the end of that.
    pub(super) fn open_doors_for(&self, nodes: &[Strong<Node>]) -> Result<Work, DrainedBelow> {
        let lock = self.graph.0.core.lock();
        self.unshut(&lock);
        let is_shut = |node: &Strong<Node>| node.children().iter().any(|edge| edge.is_closed());
        if nodes.iter().any(is_shut) {
            return Err(DrainedBelow);
        }
        let enter = |node: &Strong<Node>| (Strong::clone(node), node.tracker().enter());
        Ok(Work { inside: nodes.iter().map(enter).collect() })
    }

    fn unshut(&self, lock: &GraphLockGuard<'_>) {
        let mut seen = HashSet::new();
        let mut todo = self.own_nodes();
        while let Some(node) = todo.pop() {
            if !seen.insert(node.id()) || self.is_drained_by_others(&node) {
                continue;
            }
            for edge in node.parents() {
                if let Some(parent) = lock.parent_node(&edge) {
                    if edge.unshut(lock) {
                        self.lock_opened().push(Arc::downgrade(&edge));
                    }
                    todo.push(parent);
                }
            }
        }
    }

    /// Has somebody else drained the node or something below it?
    fn is_drained_by_others(&self, node: &Strong<Node>) -> bool {
        let mut seen = HashSet::new();
        let mut todo = vec![Strong::clone(node)];
        while let Some(node) = todo.pop() {
            if !seen.insert(node.id()) {
                continue;
            }
            if node.sections() > self.own_sections(node.id()) {
                return true;
            }
            let children = node.children();
            let drained = children.iter().filter(|edge| edge.is_quiesced());
            todo.extend(drained.map(|edge| Strong::clone(edge.target().strong())));
        }
        false
    }

    pub(super) fn covers(&self, id: NodeId) -> bool {
        self.nodes.contains_key(&id)
    }
}

impl Drop for DrainSet {
    fn drop(&mut self) {
        let lock = self.graph.0.core.lock();
        for node in self.nodes.values() {
            lock.end_section(node);
        }
        let opened = std::mem::take(&mut *self.lock_opened());
        for edge in opened.iter().filter_map(Weak::upgrade).filter(|edge| edge.is_quiesced()) {
            edge.shut(&lock);
        }
        drop(lock);
        self.graph.0.core.drain_ended();
    }
}

/// Waits until nobody is inside these drained nodes nor above them, shutting doors on the way down. Holds only the node that it waits
/// for just now: whoever wants to close another one is not kept from it.
async fn wait_idle(graph: &Graph, nodes: &[NodeId]) {
    let core = &graph.0.core;
    // Parents may come meanwhile: asked again at the end. They find their gates closed, so that ends.
    let mut settled: HashSet<NodeId> = HashSet::new();
    loop {
        let mut pending = above(&core.lock(), nodes);
        pending.retain(|id| settled.insert(*id));
        if pending.is_empty() {
            return;
        }
        for id in pending {
            // One that has died meanwhile is closed outside of the section, or waited for at its children.
            if let Ok(node) = core.arena.acquire(id.0) {
                empty(graph, &node).await;
            }
        }
    }
}

/// Waits until nobody is inside a node whose parents are empty, and shuts its doors.
async fn empty(graph: &Graph, node: &Strong<Node>) {
    loop {
        wait_node(graph, node).await;
        let lock = graph.0.core.lock();
        // Its driver may have begun to work on its own account: it counts in under the lock (`Work`).
        if node.is_poisoned() || node.tracker().in_flight() == 0 {
            let children = node.children();
            children.iter().filter(|edge| edge.is_quiesced()).for_each(|edge| edge.shut(&lock));
            return;
        }
    }
}

/// Waits until nobody drains what lies below these nodes.
pub(super) async fn wait_undrained_below(graph: &Graph, nodes: &[Strong<Node>]) {
    let topology = &graph.0.core.topology;
    loop {
        let mut eased = pin!(topology.eased.notified());
        eased.as_mut().enable();
        let is_drained =
            |node: &Strong<Node>| node.children().iter().any(|edge| edge.is_quiesced());
        if !nodes.iter().any(is_drained) {
            return;
        }
        eased.await;
    }
}

/// Somebody else has drained what lies below.
#[derive(Debug)]
pub(super) struct DrainedBelow;

/// Drivers at work on drained nodes of theirs: counted in like a request.
pub(super) struct Work {
    inside: Vec<(Strong<Node>, ShardNumber)>,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.inside.iter().for_each(|(node, number)| node.tracker().leave(*number));
    }
}

/// Waits until nobody is inside one node whose parents are empty, and no closing writes to it.
async fn wait_node(graph: &Graph, node: &Strong<Node>) {
    node.tracker().wait_idle().await;
    loop {
        let mut eased = pin!(graph.0.core.topology.eased.notified());
        eased.as_mut().enable();
        if node.is_poisoned() || !has_closing(graph, node) {
            return;
        }
        eased.await;
    }
}

/// Does a node that is being closed still use this one? Asked under the lock, under which such a node exchanges its edges.
fn has_closing(graph: &Graph, node: &Strong<Node>) -> bool {
    let _lock = graph.0.core.lock();
    node.parents().iter().any(|edge| edge.is_closing())
}

/// These nodes and all above them, each after all of its parents.
fn above(lock: &GraphLockGuard<'_>, nodes: &[NodeId]) -> Vec<NodeId> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let acquire = |id: &NodeId| lock.core.arena.acquire(id.0).ok();
    let mut todo: Vec<(Strong<Node>, bool)> =
        nodes.iter().filter_map(acquire).map(|node| (node, false)).collect();
    while let Some((node, is_done)) = todo.pop() {
        if is_done {
            order.push(node.id());
        } else if seen.insert(node.id()) {
            todo.push((Strong::clone(&node), true));
            let parents = node.parents();
            todo.extend(parents.iter().filter_map(|e| lock.parent_node(e)).map(|p| (p, false)));
        }
    }
    order
}

/// Nobody is inside the node, nor inside what lies above it, until this is dropped.
///
/// Keeps the node open. Nests: the gates open when the last section ends. Closing a node that writes to a drained one waits
/// for the end of the section.
#[must_use = "the gates open when this is dropped"]
pub struct Drained(Arc<Section>);

/// What a [`Drained`] stands for. A change that is made within it keeps it until the change is done.
pub(super) struct Section {
    set: DrainSet,
    /// Of [`Graph::drain_all`].
    is_all: bool,
}

impl Drained {
    fn new(set: DrainSet, is_all: bool) -> Self {
        Self(Arc::new(Section { set, is_all }))
    }

    pub(super) fn section(&self) -> Arc<Section> {
        Arc::clone(&self.0)
    }
}

impl fmt::Debug for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.set.nodes.values().map(|node| node.name());
        f.debug_list().entries(names).finish()
    }
}

impl Graph {
    /// Waits until no request is inside `node` nor above it, and keeps new ones waiting at the gates until the answer is
    /// dropped. Requests that wait there are not failed; they go on afterwards.
    ///
    /// Never blocks the thread. Waits as long as the slowest request inside: see [`Graph::drain_within`] and [`NodeRef::poison`].
    ///
    /// The section begins with the first poll and lasts until the future, or its answer, is dropped. A future that is kept without
    /// being polled is a section that is being taken and then held: requests for the node wait, everything else goes on.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let base = open(&graph, "driver=memory,node-name=base,size=1M").await?;
    /// let layer = "driver=layer,node-name=top,file.driver=memory,file.size=1M,backing=base";
    /// let top = open(&graph, layer).await?;
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    /// let drained = graph.drain(&base).await;
    /// assert_eq!(top.in_flight(), 0, "what lies above is drained too");
    ///
    /// let (late, iov) = (guest.clone(), bds_io::Buf::zeroed(512, 512).iov());
    /// let read = bds_io::spawn(async move { late.read(0, iov).await });
    /// assert_eq!(guest.in_flight(), 0, "it waits at the gate: queued is not in flight");
    /// drop(drained);
    /// read.await?; // and was not failed
    /// # Ok(()) });
    /// ```
    pub async fn drain(&self, node: &NodeRef) -> Drained {
        self.drain_nodes(vec![Strong::clone(node.strong())]).await
    }

    /// In a task, so that what it holds on its way (references, places in queues) goes also while its future is not polled.
    async fn drain_nodes(&self, nodes: Vec<Strong<Node>>) -> Drained {
        let graph = self.clone();
        let drain = async move {
            Drained::new(DrainSet::begin(&graph, nodes, "drained section").await, false)
        };
        bds_io::spawn_now(drain).await
    }

    /// As [`Graph::drain`], for the node and everything below it.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let base = open(&graph, "driver=memory,node-name=base,size=1M").await?;
    /// let layer = "driver=layer,node-name=top,file.driver=memory,file.size=1M,backing=base";
    /// let top = open(&graph, layer).await?;
    /// let beside = Backend::new(&base, BackendOptions::registered("beside"))?;
    /// let drained = graph.drain_subtree(&top).await;
    /// assert_eq!((top.quiesce_count() > 0, base.quiesce_count() > 0), (true, true));
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// assert!(beside.try_read(0, &iov).is_none(), "'drain(&top)' would have let it in");
    /// drop(drained);
    /// assert!(beside.try_read(0, &iov).is_some());
    /// # Ok(()) });
    /// ```
    pub async fn drain_subtree(&self, node: &NodeRef) -> Drained {
        let mut nodes = Vec::new();
        walk::each_below_strong(node.strong(), &mut |node| nodes.push(Strong::clone(node)));
        self.drain_nodes(nodes).await
    }

    /// As [`Graph::drain`], for every node there is and every one that comes meanwhile. Keeps no node open: what dies during
    /// the section is closed after it.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let drained = graph.drain_all().await;
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// assert_eq!(disk.quiesce_count(), 1, "born drained");
    /// drop(drained);
    /// assert_eq!(disk.quiesce_count(), 0);
    /// # Ok(()) });
    /// ```
    pub async fn drain_all(&self) -> Drained {
        let graph = self.clone();
        bds_io::spawn_now(async move { drain_all(&graph).await }).await
    }

    /// As [`Graph::drain`], but gives up when `patience` is over; the gates are open again then.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,stuck=on").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// let read = bds_io::spawn(async move { guest.read(0, iov).await });
    /// # while disk.in_flight() == 0 { bds_io::yield_now().await }
    /// let error = graph.drain_within(&disk, std::time::Duration::from_millis(5)).await.unwrap_err();
    /// assert!(error.to_string().contains("1 requests are still inside after 5 ms"), "{error}");
    /// assert_eq!(disk.quiesce_count(), 0, "given up: the gates are open");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `WouldWait` names the node and how many requests are still inside.
    pub async fn drain_within(&self, node: &NodeRef, patience: Duration) -> Result<Drained> {
        let (graph, node) = (self.clone(), Strong::clone(node.strong()));
        bds_io::spawn_now(async move { drain_within(&graph, &node, patience).await }).await
    }
}

async fn drain_all(graph: &Graph) -> Drained {
    let set = DrainSet::new(graph);
    let all = {
        let mut lock = graph.0.core.lock();
        lock.state.drain_alls += 1;
        let all = graph.0.core.live();
        all.iter().for_each(|node| lock.begin_section(node));
        all.iter().map(|node| node.id()).collect::<Vec<NodeId>>()
    };
    let drained = Drained::new(set, true);
    wait_idle(graph, &all).await;
    drained
}

async fn drain_within(graph: &Graph, node: &Strong<Node>, patience: Duration) -> Result<Drained> {
    let drain = pin!(graph.drain_nodes(vec![Strong::clone(node)]));
    let end = pin!(bds_io::sleep(patience));
    match select(drain, end).await {
        Either::Left((drained, _)) => Ok(drained),
        Either::Right(_) => {
            let count = node.tracker().in_flight();
            let words = format!(
                "{count} requests are still inside after {} ms; wait longer, or poison the node \
                 if they will never end",
                patience.as_millis()
            );
            Err(Error::new(ErrorKind::WouldWait, words).node(node.name()))
        }
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        if self.is_all {
            let core = &self.set.graph.0.core;
            let mut lock = core.lock();
            lock.state.drain_alls -= 1;
            core.live().iter().for_each(|node| lock.end_section(node));
        }
    }
}

impl NodeRef {
    /// Gives the requests up that are inside the node now and never end (a device that is gone): no drain waits for them any
    /// more, and new requests fail. A poisoned node can only be replaced and closed. The memory of what is stuck stays theirs.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,stuck=on").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// let read = bds_io::spawn(async move { guest.read(0, iov).await });
    /// # while disk.in_flight() == 0 { bds_io::yield_now().await }
    /// disk.poison();
    /// drop(graph.drain(&disk).await); // does not wait for the request that is stuck
    /// let late = Backend::new(&disk, BackendOptions::registered("late"))?;
    /// let error = late.read_at(0, &mut [0; 512]).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Io);
    /// # Ok(()) });
    /// ```
    pub fn poison(&self) {
        self.node().set_poisoned();
    }

    /// How many reasons there are for the node to be drained now. For diagnostics: outdated on return.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let base = open(&graph, "driver=memory,node-name=base,size=1M").await?;
    /// let layer = "driver=layer,node-name=top,file.driver=memory,file.size=1M,backing=base";
    /// let top = open(&graph, layer).await?;
    /// let (first, second) = (graph.drain(&base).await, graph.drain(&base).await);
    /// assert_eq!((base.quiesce_count(), top.quiesce_count()), (2, 1), "once per edge");
    /// drop((first, second));
    /// assert_eq!((base.quiesce_count(), top.quiesce_count()), (0, 0));
    /// # Ok(()) });
    /// ```
    pub fn quiesce_count(&self) -> u32 {
        self.node().quiesce_count()
    }

    /// Requests inside the node now. For diagnostics: outdated on return. Of a drained node it is 0, but for a moment in which a request
    /// on another thread counts itself in and out again because it finds the gate shut.
    pub fn in_flight(&self) -> usize {
        self.node().tracker().in_flight()
    }
}
