//! Snapshots: everything visible of a graph as comparable values, taken from the graph and from the
//! model.

use std::collections::BTreeMap;

use super::model::{Key, Kind, Model};
use crate::graph::{Edge, Graph, NodeRef, Parent};
use crate::test_kit::stepwise;

/// An edge, from either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct EdgeView {
    name: &'static str,
    holder: String,
    to: String,
    perm: u32,
    shared: u32,
    is_frozen: bool,
    is_quiesced: bool,
    stays: bool,
    /// True if the gate is closed. `None` for edges of dead parents.
    is_closed: Option<bool>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct NodeView {
    driver: &'static str,
    count: usize,
    quiesce: usize,
    sections: usize,
    ro: bool,
    discard: bool,
    level: u64,
    is_active: bool,
    is_poisoned: bool,
    is_owned: bool,
    inherits_from: Option<String>,
    transfer: u64,
    children: Vec<EdgeView>,
    parents: Vec<EdgeView>,
    blocked: u32,
    job: Option<String>,
    bitmaps: Vec<(Option<String>, bool)>,
}

/// All nodes by name, and the epoch.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct GraphSnapshot {
    pub(super) nodes: BTreeMap<String, NodeView>,
    pub(super) epoch: u64,
}

/// Takes a snapshot of the graph.
pub(super) fn of_graph(graph: &Graph) -> GraphSnapshot {
    // Taking the lock recomputes stale permissions.
    drop(graph.0.core.lock());
    let nodes = graph.nodes();
    let view = |node: &NodeRef| (node.name().to_owned(), node_view(graph, node));
    let snapshot = GraphSnapshot { nodes: nodes.iter().map(view).collect(), epoch: graph.epoch() };
    assert_eq!(snapshot.nodes.len(), nodes.len(), "P42: names are unique");
    snapshot
}

fn node_view(graph: &Graph, node: &NodeRef) -> NodeView {
    let mut children: Vec<EdgeView> =
        node.node().children().iter().map(|edge| edge_view(graph, edge)).collect();
    let mut parents: Vec<EdgeView> =
        node.node().parents().iter().map(|edge| edge_view(graph, edge)).collect();
    for edge in node.node().parents() {
        let target = edge.medium().map(|target| target.id());
        assert_eq!(target, Some(node.id()), "P16: an edge lies with the node it leads to");
    }
    children.sort();
    parents.sort();
    let all = crate::graph::BlockOps::all();
    let blocked = all.iter().filter(|operation| node.check_allowed(*operation).is_err());
    let inherits_from = node.inherits_from().and_then(|id| graph.acquire(id).ok());
    NodeView {
        driver: node.driver_name(),
        // Without the reference that looks.
        count: node.count() - 1,
        quiesce: node.quiesce_count() as usize,
        sections: node.node().sections() as usize,
        ro: node.flags().read_only,
        discard: node.flags().discard,
        level: stepwise::level(node.node().driver()),
        is_active: node.is_active(),
        is_poisoned: node.is_poisoned(),
        is_owned: graph.is_owned(node.id()),
        inherits_from: inherits_from.map(|inherits_from| inherits_from.name().to_owned()),
        transfer: node.limits().max_transfer,
        children,
        parents,
        blocked: blocked.fold(0, |bits, operation| bits | operation.bits()),
        job: node.job().map(|job| job.to_string()),
        bitmaps: node
            .bitmaps()
            .into_iter()
            .map(|info| (info.name.map(|name| name.to_string()), info.leased_by.is_some()))
            .collect(),
    }
}

fn edge_view(graph: &Graph, edge: &Edge) -> EdgeView {
    let is_parent_gone = match edge.parent() {
        Some(Parent::Node(id)) => graph.acquire(*id).is_err(),
        Some(Parent::Root(_)) => false,
        None => panic!("P16: an edge has a parent once it is seen"),
    };
    EdgeView {
        name: edge.name(),
        holder: edge.holder().to_string(),
        to: edge.medium().map(|to| to.name().to_owned()).unwrap_or_default(),
        perm: edge.access().perm.bits(),
        shared: edge.access().shared.bits(),
        is_frozen: edge.frozen().is_some(),
        is_quiesced: edge.is_quiesced(),
        stays: edge.is_fixed(),
        is_closed: (!is_parent_gone).then(|| edge.gate_blocked()),
    }
}

/// Only the edges, from both ends, and the quiesce counts.
pub(super) fn edges(snapshot: &GraphSnapshot) -> Vec<(&str, usize, &[EdgeView], &[EdgeView])> {
    let nodes = snapshot.nodes.iter();
    nodes.map(|(name, node)| (&**name, node.quiesce, &*node.children, &*node.parents)).collect()
}

/// Takes a snapshot of the model.
pub(super) fn of_model(model: &Model) -> GraphSnapshot {
    let view = |key: Key| (model.nodes[&key].name.clone(), model_node(model, key));
    GraphSnapshot { nodes: model.live().into_iter().map(view).collect(), epoch: model.epoch }
}

fn model_node(model: &Model, key: Key) -> NodeView {
    let node = &model.nodes[&key];
    let views = |edges: Vec<u32>| {
        let mut views: Vec<EdgeView> =
            edges.into_iter().map(|edge| model_edge(model, edge)).collect();
        views.sort();
        views
    };
    NodeView {
        driver: match node.kind {
            Kind::File => "file",
            Kind::Filter => "pass",
            Kind::Image => "cow",
        },
        count: model.count(key),
        quiesce: model.quiesce(key),
        sections: model.sections(key),
        ro: node.ro,
        discard: node.discard,
        level: node.level,
        is_active: node.is_active,
        is_poisoned: node.is_poisoned,
        is_owned: model.monitor.contains(&key),
        inherits_from: model.inherits_from(key).map(|key| model.nodes[&key].name.clone()),
        transfer: model.transfer(key),
        children: views(model.children(key)),
        parents: views(model.parents(key)),
        blocked: node.blocks.iter().fold(0, |bits, (_, blocked)| bits | blocked),
        job: node.job.map(|job| format!("job{job}")),
        bitmaps: node.bitmaps.iter().map(|it| (it.name.clone(), it.leased)).collect(),
    }
}

fn model_edge(model: &Model, edge: u32) -> EdgeView {
    let edge = &model.edges[&edge];
    // P35: an edge is quiesced exactly if its child is.
    let is_quiesced = edge.child.is_some_and(|child| model.quiesce(child) > 0);
    let is_parent_gone = edge.parent.is_some_and(|parent| !model.is_live(parent));
    EdgeView {
        name: edge.name,
        holder: edge.holder.clone(),
        to: edge.child.map(|child| model.nodes[&child].name.clone()).unwrap_or_default(),
        perm: edge.access.perm.into(),
        shared: edge.access.shared.into(),
        is_frozen: edge.frozen.is_some(),
        is_quiesced,
        stays: edge.stays,
        // P34: the gate of a drained node's edge is closed.
        is_closed: (!is_parent_gone).then_some(is_quiesced),
    }
}
