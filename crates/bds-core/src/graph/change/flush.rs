//! Flushes images that a change makes backing images of their users.
//!
//! A flush goes to the places of a node's own bytes, and not to its backing node. When an overlay
//! is put above an image, what the user wrote to the image before may not be durable yet. The
//! change notes that on the node (`RequestTracker::note_hidden`), and the user's next flush goes on
//! to it (`request/flush.rs`). The change itself flushes it when requests are let go: other
//! programs may copy the image from then on, and find what the driver held back.

use bds_refcount::Strong;

use crate::error::Error;
use crate::graph::Graph;
use crate::graph::drain::set::DriverWork;
use crate::graph::model::node::Node;

/// Flushes the nodes beside other requests, and returns what failed. A drained node is left to its
/// user's next flush.
pub(super) async fn flush_hidden(graph: &Graph, hidden: Vec<Strong<Node>>) -> Vec<Error> {
    let mut failed = Vec::new();
    for node in hidden {
        let work = DriverWork::enter_undrained(&graph.0.core.lock(), &node);
        if let Some(work) = work {
            failed.extend(graph.0.core.flush_node(&node).await.err());
            drop(work);
        }
    }
    failed
}
