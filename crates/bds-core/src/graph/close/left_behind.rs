//! Closing waits for what dropped requests left behind.
//!
//! An operation whose request has gone keeps its node open until it ends (`request::begun`). Nobody can know it by name, so
//! whoever closes waits for it instead of finding the node in use.

use bds_refcount::{HolderInfo, Strong};

use super::close_node::{Ended, GraphCore};
use crate::graph::model::node::Node;
use crate::graph::model::node_ref::NodeRef;

impl GraphCore {
    /// Waits for operations whose requests have gone, where nothing but they keeps a node open.
    pub(in crate::graph) async fn wait_for_lodgers(&self) {
        // One at a time: others may want to close the rest meanwhile.
        for handle in self.arena.snapshot() {
            if let Ok(node) = self.arena.acquire(handle) {
                wait_left_alone(&node, 0).await;
            }
        }
    }

    /// The graph is gone: closes what is dead and what dies when the last operation ends.
    pub(in crate::graph) fn sweep_for_good(&self) {
        let is_held = self.live().iter().any(|node| node.tracker().detached() > 0);
        if !is_held {
            return self.sweep_in_background();
        }
        let core = self.clone();
        bds_io::spawn(async move {
            core.wait_for_lodgers().await;
            let reports = core.clone().sweep().await;
            core.keep(reports);
        })
        .detach();
    }
}

impl NodeRef {
    /// As [`NodeRef::end`], after the operations that keep the node open, if nobody else does.
    pub(in crate::graph) async fn end_patiently(self) -> Result<Ended, (NodeRef, Vec<HolderInfo>)> {
        let mut this = self;
        loop {
            let (node, holders) = match this.end() {
                Ok(ended) => return Ok(ended),
                Err(others) => others,
            };
            let is_kept = node.node().tracker().detached() > 0 && !node.is_poisoned();
            if !is_kept || !holders.is_empty() {
                return Err((node, holders));
            }
            left_alone(node.strong()).await;
            this = node;
        }
    }
}

/// As [`left_alone`], if operations keep the node open beside so many who do by name. Whoever means to keep it does so.
pub(in crate::graph) async fn wait_left_alone(node: &Strong<Node>, named: usize) {
    if node.tracker().detached() > 0 && node.holders().len() <= named {
        left_alone(node).await;
    }
}

/// Waits until no operation keeps the node open on its own behalf. Their references go right after that.
async fn left_alone(node: &Strong<Node>) {
    node.tracker().wait_moved_out().await;
    for _ in 0..1000 {
        if node.count() <= 1 {
            return;
        }
        bds_io::yield_now().await;
    }
}
