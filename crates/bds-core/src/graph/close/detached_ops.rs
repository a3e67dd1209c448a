//! Waits for detached operations: driver operations that go on after their requests were dropped.
//!
//! Such an operation keeps its node open until it ends, without a holder name. Closing waits for it
//! instead of reporting the node as in use.

use bds_refcount::Strong;

use crate::graph::core::GraphCore;
use crate::graph::model::node::Node;

impl GraphCore {
    /// Waits for the detached operations of all nodes that nothing else keeps open.
    pub(in crate::graph) async fn wait_all_detached_ops(&self) {
        // Nodes are acquired for it, and their last holder, if it releases just then, finds another
        // one: not without need.
        if !self.detached.has_any() {
            return;
        }
        // One node at a time: the others can be closed meanwhile.
        for handle in self.arena.snapshot() {
            if let Ok(node) = self.arena.acquire(handle) {
                wait_detached_ops_unless_held(&node, 0).await;
            }
        }
    }
}

/// As [`wait_detached_ops`], unless the node has more than `named` holders: those keep it open
/// anyway.
pub(in crate::graph) async fn wait_detached_ops_unless_held(node: &Strong<Node>, named: usize) {
    if node.tracker().detached() > 0 && node.holders().len() <= named {
        wait_detached_ops(node).await;
    }
}

/// Waits until no detached operation keeps the node open. Their references go right after their
/// counts.
pub(super) async fn wait_detached_ops(node: &Strong<Node>) {
    node.tracker().wait_no_detached().await;
    for _ in 0..1000 {
        if node.count() <= 1 {
            return;
        }
        bds_io::yield_now().await;
    }
}
