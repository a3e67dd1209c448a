//! Sets of drained nodes: no request is inside them nor above them, and none can enter.
//!
//! A drain of a node reaches everything above it, because requests inside a parent would still
//! arrive. It acts on gates: new requests wait at the roots (backends, jobs, exports), those under
//! way finish and find every gate on their way open, and only when a node is empty are the gates of
//! its children's edges closed.
//!
//! ```text
//!   backend ─┤gate├─► filter ──► qcow2 ──► file        drain(file): 1 close the backend's gate
//!                                                                  2 wait until filter is empty, close its inner gates
//!                                                                  3 wait until qcow2 is empty, close its inner gates
//!                                                                  4 wait until file is empty
//! ```
//! `quiesce(node)` = sections on the node + sections of all nodes + edges to drained children. An
//! edge drains its parent at most once. Sections nest and keep their node alive; an edge that is
//! attached during one finds the gate closed. Ending a section neither waits nor changes the graph.
//!
//! **Queued is not in flight**: a drain does not wait for requests that wait at a gate. **A closing
//! is**: a drain waits for closings that write to its nodes, and none begins while it lasts
//! (`close`). **A poisoned node is not waited for.**

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::holder_kind::HolderKind;
use bds_refcount::{Held, Holder, HolderName, Strong};

use crate::graph::Graph;
use crate::graph::core::LockedGraph;
use crate::graph::lock::RepointProof;
use crate::graph::model::edge::Edge;
use crate::graph::model::node::{Node, NodeId};
use crate::tracker::ShardNumber;

/// The holder name of a change's own drain.
pub(in crate::graph) const CHANGE: &str = "change";

pub(in crate::graph) fn is_by_change(name: &HolderName) -> bool {
    matches!(name, HolderName::Text(text) if **text == *CHANGE)
}

/// The holder of a drained node, for "in use" messages.
fn holder(what: &str) -> Holder {
    Holder::new(HolderKind::Drain, what)
}

/// Some nodes, drained. The gates open when it is dropped.
pub(in crate::graph) struct DrainSet {
    graph: Graph,
    nodes: BTreeMap<NodeId, Held<Node>>,
    /// Sections around this one that belong to the same caller.
    within: Vec<Arc<Section>>,
    /// Gates that were opened for drivers and not closed again.
    opened: Mutex<Vec<Weak<Edge>>>,
}

impl DrainSet {
    /// Closes the gates in front of these nodes and waits until no request is inside them nor above
    /// them. Dropped while it waits: the gates open again.
    pub(in crate::graph) async fn begin(
        graph: &Graph,
        nodes: Vec<Strong<Node>>,
        what: &str,
    ) -> Self {
        Self::begin_within(graph, nodes, what, &[]).await
    }

    /// As [`DrainSet::begin`], inside other sections of the caller.
    pub(in crate::graph) async fn begin_within(
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

    pub(super) fn new(graph: &Graph) -> Self {
        let nodes = BTreeMap::new();
        Self { graph: graph.clone(), nodes, within: Vec::new(), opened: Mutex::default() }
    }

    /// Drains more nodes.
    pub(in crate::graph) async fn extend(&mut self, nodes: Vec<Strong<Node>>, what: &str) {
        {
            let lock = self.graph.0.core.lock();
            for node in nodes {
                if let Entry::Vacant(place) = self.nodes.entry(node.id()) {
                    lock.begin_section(&node);
                    place.insert(node.held_by(holder(what)));
                }
            }
        }
        self.wait_drained().await;
    }

    /// Waits until no request is inside, and closes all gates on the way.
    pub(in crate::graph) async fn wait_drained(&self) {
        let nodes: Vec<NodeId> = self.own_nodes().iter().map(|node| node.id()).collect();
        wait_idle(&self.graph, &nodes).await;
        self.lock_opened().clear();
    }

    fn lock_opened(&self) -> MutexGuard<'_, Vec<Weak<Edge>>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The nodes that this set and the sections around it have drained by name.
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

    /// How many of the node's sections belong to this set and those around it.
    fn own_sections(&self, id: NodeId) -> u32 {
        let around = |section: &Arc<Section>| match section.is_all {
            true => 1,
            false => section.set.own_sections(id),
        };
        u32::from(self.covers(id)) + self.within.iter().map(around).sum::<u32>()
    }

    /// Opens the gates between these nodes and their drained children, so that drivers can write
    /// out or read anew; roots stay closed. [`DrainSet::wait_drained`] closes them again, as does
    /// the drop of this set where a section goes on. While the drivers work, drains of nodes below
    /// wait for them as for a request. `Err`: another section drains a node below, and the driver
    /// could have to wait for its end.
    pub(in crate::graph) fn open_gates_for(
        &self,
        nodes: &[Strong<Node>],
    ) -> Result<DriverWork, DrainedBelow> {
        let lock = self.graph.0.core.lock();
        self.open_inner_gates(&lock);
        let is_shut = |node: &Strong<Node>| node.children().iter().any(|edge| edge.gate_blocked());
        if nodes.iter().any(is_shut) {
            return Err(DrainedBelow);
        }
        let enter = |node: &Strong<Node>| (Strong::clone(node), node.tracker().enter());
        Ok(DriverWork { inside: nodes.iter().map(enter).collect() })
    }

    fn open_inner_gates(&self, lock: &LockedGraph<'_>) {
        let mut seen = HashSet::new();
        let mut todo = self.own_nodes();
        while let Some(node) = todo.pop() {
            if !seen.insert(node.id()) || self.is_drained_by_others(&node) {
                continue;
            }
            for edge in node.parents() {
                if let Some(parent) = lock.parent_node(&edge) {
                    if edge.open_in_drain(lock) {
                        self.lock_opened().push(Arc::downgrade(&edge));
                    }
                    todo.push(parent);
                }
            }
        }
    }

    /// Is the node, or one below it, drained by another section?
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

    pub(in crate::graph) fn covers(&self, id: NodeId) -> bool {
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
            edge.close_in_drain(&lock);
        }
        drop(lock);
        self.graph.0.core.drain_ended();
    }
}

/// Waits until no request is inside these drained nodes nor above them, closing gates on the way
/// down. Holds only the node that it waits for just now, so other nodes can be closed.
pub(super) async fn wait_idle(graph: &Graph, nodes: &[NodeId]) {
    let core = &graph.0.core;
    // New parents may be attached meanwhile: checked again at the end. Their gates are closed, so
    // this ends.
    let mut visited: HashSet<NodeId> = HashSet::new();
    loop {
        let mut pending = above(&core.lock(), nodes);
        pending.retain(|id| visited.insert(*id));
        if pending.is_empty() {
            return;
        }
        for id in pending {
            // A node that died meanwhile is closed outside of the section, or waited for at its
            // children.
            if let Ok(node) = core.arena.acquire(id.0) {
                wait_empty(graph, &node).await;
            }
        }
    }
}

/// Waits until no request is inside a node whose parents are empty, and closes its inner gates.
async fn wait_empty(graph: &Graph, node: &Strong<Node>) {
    loop {
        wait_node(graph, node).await;
        let lock = graph.0.core.lock();
        // Its driver may have begun work of its own: that counts in under the lock (`DriverWork`).
        if node.is_poisoned() || node.tracker().in_flight() == 0 {
            let children = node.children();
            children
                .iter()
                .filter(|edge| edge.is_quiesced())
                .for_each(|edge| edge.close_in_drain(&lock));
            return;
        }
    }
}

/// Waits until no child of these nodes is drained.
pub(in crate::graph) async fn wait_undrained_below(graph: &Graph, nodes: &[Strong<Node>]) {
    let topology = &graph.0.core.topology;
    let is_drained = |node: &Strong<Node>| node.children().iter().any(|edge| edge.is_quiesced());
    topology.drain_progress.wait_until(|| !nodes.iter().any(is_drained)).await;
}

/// Another section drains a node below.
#[derive(Debug)]
pub(in crate::graph) struct DrainedBelow;

/// Work of drivers on nodes, drained or not, counted like a request.
pub(in crate::graph) struct DriverWork {
    inside: Vec<(Strong<Node>, ShardNumber)>,
}

impl DriverWork {
    /// Work on a node that is not drained: drains wait for it from now on. `None`: it is drained.
    pub(in crate::graph) fn enter_undrained(
        _lock: &LockedGraph<'_>,
        node: &Strong<Node>,
    ) -> Option<Self> {
        let enter = || (Strong::clone(node), node.tracker().enter());
        (node.quiesce_count() == 0).then(|| Self { inside: vec![enter()] })
    }
}

impl Drop for DriverWork {
    fn drop(&mut self) {
        self.inside.iter().for_each(|(node, number)| node.tracker().leave(*number));
    }
}

/// Waits until no request is inside one node whose parents are empty, and no closing writes to it.
async fn wait_node(graph: &Graph, node: &Strong<Node>) {
    node.tracker().wait_idle().await;
    graph
        .0
        .core
        .topology
        .drain_progress
        .wait_until(|| node.is_poisoned() || !has_closing(graph, node))
        .await;
}

/// Does a node that is being closed still use this one? Read under the lock, under which such a
/// node exchanges its edges.
fn has_closing(graph: &Graph, node: &Strong<Node>) -> bool {
    let _lock = graph.0.core.lock();
    node.parents().iter().any(|edge| edge.parent_closing())
}

/// These nodes and all above them, each after all of its parents.
fn above(lock: &LockedGraph<'_>, nodes: &[NodeId]) -> Vec<NodeId> {
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

/// Guard of a drained section: no request is inside the nodes, nor above them, until this is
/// dropped.
///
/// Keeps the node open. Nests: the gates open when the last section ends. Closing a node that
/// writes to a drained one waits for the end of the section.
#[must_use = "the gates open when this is dropped"]
pub struct Drained(Arc<Section>);

/// The state behind a [`Drained`]. A change made within the section keeps it until the change is
/// done.
pub(in crate::graph) struct Section {
    set: DrainSet,
    /// Of [`Graph::drain_all`].
    is_all: bool,
}

impl Drained {
    pub(super) fn new(set: DrainSet, is_all: bool) -> Self {
        Self(Arc::new(Section { set, is_all }))
    }

    pub(in crate::graph) fn section(&self) -> Arc<Section> {
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

/// Proof that edges at some nodes may be re-pointed, and children changed: the nodes are drained
/// and the lock is held.
///
/// Drain first, then lock. QEMU 10.0 locks first and drains then, and deadlocks: a reader that is
/// inside waits for the lock, and the drain waits for the reader. Here the other order cannot be
/// written, because the proof is made of a [`DrainSet`].
pub(in crate::graph) struct DrainedEdit<'a> {
    pub(in crate::graph) lock: &'a LockedGraph<'a>,
    _drained: &'a DrainSet,
}

impl<'a> DrainedEdit<'a> {
    pub(in crate::graph) fn new(drained: &'a DrainSet, lock: &'a LockedGraph<'a>) -> Self {
        Self { lock, _drained: drained }
    }
}

impl RepointProof for DrainedEdit<'_> {}
