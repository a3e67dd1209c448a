//! Closing waits for what dropped requests left behind.
//!
//! An operation whose request has gone keeps its node open until it ends (`request::begun`). Nobody can know it by name, so
//! whoever closes waits for it instead of finding the node in use.

use bds_refcount::Strong;

use crate::graph::core::GraphCore;
use crate::graph::model::node::Node;

impl GraphCore {
    /// Waits for operations whose requests have gone, where nothing but they keeps a node open.
    pub(in crate::graph) async fn wait_all_detached_ops(&self) {
        // One at a time: others may want to close the rest meanwhile.
        for handle in self.arena.snapshot() {
            if let Ok(node) = self.arena.acquire(handle) {
                wait_detached_ops_unless_held(&node, 0).await;
            }
        }
    }
}

/// As [`wait_detached_ops`], if operations keep the node open beside so many who do by name. Whoever means to keep it does so.
pub(in crate::graph) async fn wait_detached_ops_unless_held(node: &Strong<Node>, named: usize) {
    if node.tracker().detached() > 0 && node.holders().len() <= named {
        wait_detached_ops(node).await;
    }
}

/// Waits until no operation keeps the node open on its own behalf. Their references go right after that.
pub(super) async fn wait_detached_ops(node: &Strong<Node>) {
    node.tracker().wait_moved_out().await;
    for _ in 0..1000 {
        if node.count() <= 1 {
            return;
        }
        bds_io::yield_now().await;
    }
}
