//! Asserts the invariants that hold between any two steps, and those that hold at rest.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::program::Scenario;
use crate::graph::model::edge::Parent;
use crate::graph::tests::properties::check_permissions;
use crate::graph::{Graph, NodeId, NodeRef};
use crate::test_kit::forwarding::{Forwarder, block};

/// Asserts between two steps that the reasons for being drained, the gates and the permissions
/// agree.
pub(super) fn audit(graph: &Graph, is_threaded: bool) {
    let core = &graph.0.core;
    let lock = core.lock();
    for node in core.live() {
        let drained_children = node.children().iter().filter(|edge| edge.is_quiesced()).count();
        let reasons = node.sections() as usize + drained_children;
        assert_eq!(
            node.quiesce_count() as usize,
            reasons,
            "{}: reasons to be drained",
            node.name()
        );
        let is_drained = reasons > 0;
        assert_eq!(
            Forwarder::of_node(&node).is_drained(),
            is_drained,
            "{}: the driver's state",
            node.name()
        );
        for edge in node.parents() {
            assert_eq!(edge.is_quiesced(), is_drained, "{}: state of the edge", edge.holder());
            if is_drained && matches!(edge.parent(), Some(Parent::Root(_)) | None) {
                assert!(edge.gate_blocked(), "{}: gate of a root", edge.holder());
            }
        }
        for edge in node.children().iter() {
            let parents = edge.target().parents();
            let found = parents.iter().filter(|parent| Arc::ptr_eq(parent, edge)).count();
            assert_eq!(found, 1, "{}: once among its target's parents", edge.holder());
        }
    }
    if is_threaded {
        return; // an edge may be dropped just now; permissions are loosened later
    }
    // A model that shares no code with the product computes the permissions.
    check_permissions(&core.live());
    drop(lock);
}

/// Asserts at rest that nothing is drained, all gates are open and all counts are right; then
/// closes everything.
pub(super) async fn check_at_rest(scenario: &Scenario) {
    let graph = &scenario.graph;
    assert!(graph.reap().await.iter().all(|report| report.is_clean()));
    if scenario.is_threaded {
        until(|| graph.nodes().iter().all(is_idle)).await;
    }
    audit(graph, false);
    let mut in_pool: HashMap<NodeId, usize> = HashMap::new();
    for node in scenario.pool.lock().unwrap().iter() {
        *in_pool.entry(node.id()).or_default() += 1;
    }
    for node in graph.nodes() {
        let name = node.name().to_owned();
        assert_eq!((node.quiesce_count(), node.sections()), (0, 0), "{name}: drained at rest");
        assert_eq!(node.in_flight(), 0, "{name}: a request is inside at rest");
        let parents = node.parents();
        assert!(
            parents.iter().all(|edge| !edge.gate_blocked()),
            "{name}: a gate is closed at rest"
        );
        let users = in_pool.get(&node.id()).copied().unwrap_or(0);
        let expected = parents.len() + users + usize::from(graph.is_owned(node.id()));
        assert_eq!(node.count() - 1, expected, "{name}: count of holders");
    }
    let backends = std::mem::take(&mut *scenario.backends.lock().unwrap());
    for backend in backends {
        backend.read(0, block()).await.unwrap();
    }
    scenario.pool.lock().unwrap().clear();
    let report = graph.shutdown().await;
    assert!(report.closed.iter().all(|report| report.is_clean()));
    assert!(report.leaked.is_empty(), "{:?}", report.leaked);
    assert_eq!(graph.dump(), "");
    assert!(graph.reports().is_empty());
    let drivers = &scenario.drivers;
    let balance = || drivers.opens.load(Ordering::Relaxed) - drivers.closes.load(Ordering::Relaxed);
    if scenario.is_threaded {
        until(|| balance() == 0).await;
    }
    assert_eq!(balance(), 0, "drivers closed");
}

fn is_idle(node: &NodeRef) -> bool {
    node.in_flight() == 0
        && node.quiesce_count() == 0
        && !node.parents().iter().any(|e| e.parent_closing())
}

/// Waits for background tasks. If they never end, the next assertion fails.
async fn until(is_over: impl Fn() -> bool) {
    for _ in 0..20_000 {
        if is_over() {
            return;
        }
        bds_io::sleep(std::time::Duration::from_millis(1)).await;
    }
}

/// Prints the state of every gate when a run fails.
pub(super) struct DumpOnPanic<'a>(pub(super) &'a Scenario);

impl Drop for DumpOnPanic<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for node in self.0.graph.nodes() {
            let (name, inside) = (node.name(), node.in_flight());
            println!("{name}: quiesce {}, inside {inside}", node.quiesce_count());
            for edge in node.parents() {
                let gate = if edge.gate_blocked() { "closed" } else { "open" };
                let closing = if edge.parent_closing() { ", closing" } else { "" };
                println!("  from {}: {gate}{closing}", edge.holder());
            }
        }
    }
}
