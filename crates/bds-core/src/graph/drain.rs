//! Nobody inside: the gates in front of a node are closed, and whoever was inside has left.
//!
//! A drain is asked of the node but acts on its edges: all there are, and all that come while it lasts, whoever
//! they belong to. Queued is not in flight: a request that waits at a gate is waited for by nobody. Drains nest and
//! keep their node alive; ending one neither waits nor changes the graph.

use bds_refcount::{Held, Holder, HolderKind, Strong};

use super::node::Node;

/// Nobody is inside the node until this is dropped.
#[must_use = "the gates open when this is dropped"]
pub(super) struct Drained {
    node: Held<Node>,
}

impl Drained {
    /// Closes the gates and waits until nobody is inside. Dropped while it waits: the gates open again.
    pub(super) async fn begin(node: Strong<Node>) -> Self {
        let this = Self { node: node.held_by(Holder::new(HolderKind::Drain, "change")) };
        this.node.close_gates();
        this.node.traffic().wait_idle().await;
        this
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.node.open_gates();
    }
}
