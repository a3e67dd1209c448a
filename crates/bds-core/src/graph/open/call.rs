//! One call of `Graph::open`: its budget of nodes and depth, at every level of it.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;

/// The state of one call of [`Graph::open`], at every level of it.
#[derive(Clone)]
pub(in crate::graph) struct Call {
    pub(in crate::graph) graph: Graph,
    opened: Arc<AtomicUsize>,
    /// Images above this one.
    pub(in crate::graph) depth: usize,
    /// The place in the caller's program that made the call.
    pub(in crate::graph) since: &'static Location<'static>,
    /// Files of the images above: opening one of them again would be a loop.
    pub(in crate::graph) files_above: Vec<(u64, u64)>,
}

impl Call {
    pub(super) fn new(graph: &Graph, since: &'static Location<'static>) -> Self {
        let files_above = Vec::new();
        Self { graph: graph.clone(), opened: Arc::default(), depth: 0, since, files_above }
    }

    /// Counts a node against the budget of the call.
    pub(super) fn count_node(&self) -> Result<()> {
        let limit = self.graph.config().max_nodes_per_image;
        if self.opened.fetch_add(1, Ordering::Relaxed) < limit {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("more than {limit} nodes would be opened at once (max_nodes_per_image)"),
        ))
    }
}
