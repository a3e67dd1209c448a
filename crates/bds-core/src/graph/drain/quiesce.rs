//! Counts reasons to be drained and propagates them to parents, under the topology lock. Waiting
//! for nodes to be empty is in [`super::set`].

use std::sync::Arc;

use bds_refcount::Strong;

use crate::graph::core::LockedGraph;
use crate::graph::model::edge::{Edge, Parent};
use crate::graph::model::node::Node;

impl LockedGraph<'_> {
    /// The parent node of `edge`, if its parent is a node and lives.
    pub(in crate::graph) fn parent_node(&self, edge: &Edge) -> Option<Strong<Node>> {
        match edge.parent() {
            Some(Parent::Node(id)) => self.core.arena.acquire(id.0).ok(),
            Some(Parent::Root(_)) | None => None,
        }
    }

    /// Adds one reason for the node to be drained. The first one drains all parents too.
    fn quiesce(&self, node: &Strong<Node>) {
        let mut todo = vec![Strong::clone(node)];
        let mut begun = Vec::new();
        while let Some(node) = todo.pop() {
            if node.add_quiesce(1) > 0 {
                continue;
            }
            for edge in node.parents() {
                if edge.quiesce(self) {
                    #[cfg(test)]
                    self.lock_first(&edge);
                    match self.parent_node(&edge) {
                        Some(parent) => todo.push(parent),
                        None => self.close_root_gate(&edge),
                    }
                }
            }
            begun.push(node);
        }
        // Parents first: they may still send requests.
        begun.iter().rev().for_each(|node| node.driver().drain_begin());
    }

    /// The wrong order, for a test: closes the inner gate before the requests on their way to it
    /// have passed.
    #[cfg(test)]
    fn lock_first(&self, edge: &Edge) {
        if self.core.topology.lock_first.load(std::sync::atomic::Ordering::Relaxed) {
            edge.close_in_drain(self);
        }
    }

    /// Removes one reason.
    fn unquiesce(&self, node: &Strong<Node>) {
        let mut todo = vec![Strong::clone(node)];
        while let Some(node) = todo.pop() {
            if node.remove_quiesce(1) > 0 {
                continue;
            }
            node.driver().drain_end();
            for edge in node.parents() {
                if edge.unquiesce(self) {
                    todo.extend(self.parent_node(&edge));
                }
            }
        }
    }

    /// Closes the gate of an edge without a parent node. Not if the parent is a node that is being
    /// closed: a drain waits for that one.
    fn close_root_gate(&self, edge: &Arc<Edge>) {
        let is_dying = matches!(edge.parent(), Some(Parent::Node(_)));
        if !is_dying {
            edge.close_in_drain(self);
        }
    }

    /// An edge points to `node` from now on; its parent is empty, or does not exist yet.
    pub(in crate::graph) fn attach(&self, node: &Node, edge: &Arc<Edge>) {
        node.add_parent(edge);
        self.join_drain(node, edge);
    }

    /// An edge does not point to `node` any more.
    pub(in crate::graph) fn detach(&self, node: &Node, edge: &Arc<Edge>) {
        node.remove_parent(edge);
        self.leave_drain(edge);
    }

    /// An edge points to another node from now on. If both are drained, the parent stays drained
    /// throughout: were it let go in between, a request could enter it and then wait at a closed
    /// gate below.
    pub(in crate::graph) fn reattach(
        &self,
        from: Option<&Node>,
        to: Option<&Node>,
        edge: &Arc<Edge>,
    ) {
        if let Some(from) = from {
            from.remove_parent(edge);
        }
        if let Some(to) = to {
            to.add_parent(edge);
        }
        match to.filter(|to| to.quiesce_count() > 0) {
            Some(to) => self.join_drain(to, edge),
            None => self.leave_drain(edge),
        }
    }

    /// Drains the edge, and its parent, if the target is drained.
    fn join_drain(&self, target: &Node, edge: &Arc<Edge>) {
        if target.quiesce_count() > 0 && edge.quiesce(self) {
            edge.close_in_drain(self);
            if let Some(parent) = self.parent_node(edge) {
                self.quiesce(&parent);
            }
        }
    }

    /// Adds an edge of a node that is being closed. A drain of `node` waits for that node, so the
    /// gate stays open.
    pub(in crate::graph) fn attach_closing(&self, node: &Node, edge: &Arc<Edge>) {
        edge.set_parent_closing(self);
        node.add_parent(edge);
        if node.quiesce_count() > 0 {
            edge.quiesce(self);
        }
    }

    fn leave_drain(&self, edge: &Arc<Edge>) {
        if edge.unquiesce(self)
            && let Some(parent) = self.parent_node(edge)
        {
            self.unquiesce(&parent);
        }
    }

    /// A drained section of the node begins.
    pub(in crate::graph) fn begin_section(&self, node: &Strong<Node>) {
        node.begin_section();
        self.quiesce(node);
    }

    pub(in crate::graph) fn end_section(&self, node: &Strong<Node>) {
        node.end_section();
        self.unquiesce(node);
    }

    /// Initialises the drain state of a new node, whose edges were attached before it existed.
    pub(in crate::graph) fn node_added(&self, node: &Strong<Node>) {
        let below = node.children().iter().filter(|edge| edge.is_quiesced()).count();
        let count = self.state.drain_alls + u32::try_from(below).unwrap_or(u32::MAX);
        (0..self.state.drain_alls).for_each(|_| node.begin_section());
        if count > 0 {
            node.add_quiesce(count);
            node.driver().drain_begin();
        }
    }
}
