//! Changing edges: append, replace, set backing, insert and drop a filter.
//!
//! One change at a time. Each goes the same way: drain the node whose parents or children change, check everything, then re-point
//! edges, all of it in one step that cannot wait and, once it moves the first edge, cannot fail. A change that fails, or whose future is
//! dropped, leaves everything as it was. Identity stays: every id and reference denotes the node it did before, and
//! the caller's references are neither taken nor given.
//!
//! Permissions over the whole graph and changes of several nodes at once belong to transactions, which are not here.

use std::collections::HashSet;
use std::sync::Arc;

use bds_io::sync::MutexGuard;
use bds_refcount::Strong;

use super::drain::Drained;
use super::edge::{Edge, Parent};
use super::node::{Node, NodeId};
use super::perm::Access;
use super::walk;
use super::{Graph, NodeRef};
use crate::driver::{Child, Role};
use crate::error::{Error, ErrorKind, Result};

impl Graph {
    /// Puts `overlay` on top: everyone who used `top` uses `overlay` from now on, and `overlay` has `top` as its backing
    /// node. The overlay was opened either on `top` already, or without a backing node (then its driver must be able to
    /// take one while it is open).
    ///
    /// # Errors
    /// Nothing has changed. `InvalidInput`: it has another backing node, or the graph would become a loop; `ReadOnly`:
    /// somebody writes to `top` and `overlay` cannot be written; `InUse`: a node is just being opened on `top`;
    /// `NotSupported`: the overlay's driver cannot have, or take, a backing node.
    pub async fn append(&self, top: &NodeRef, overlay: &NodeRef) -> Result<()> {
        self.check_ours(&[top, overlay])?;
        let _one = self.begin_change().await;
        let _top_drained = Drained::begin(Strong::clone(top.strong())).await;
        let _overlay_drained = Drained::begin(Strong::clone(overlay.strong())).await;
        let moved = self.append_drained(top, overlay)?;
        moved.settle().await;
        Ok(())
    }

    fn append_drained(&self, top: &NodeRef, overlay: &NodeRef) -> Result<Moved> {
        let attached = match overlay.node().cow_child() {
            Some(edge) if edge.target().id() == top.id() => true,
            Some(edge) => {
                let target = edge.target().name().to_owned();
                return Err(refuse(overlay, format!("it has the backing node '{target}' already")));
            }
            None => false,
        };
        check_no_loop(overlay, top)?;
        let mut stay = below(overlay.strong());
        stay.extend(below(top.strong()));
        let moves = movable(top, overlay, &stay)?;
        if !attached {
            self.attach_backing(overlay, top)?;
        }
        let moved = Moved::new(moves, overlay.strong());
        self.refresh_limits_upwards(overlay.strong());
        Ok(moved)
    }

    /// Everyone who used `from` uses `to` from now on, except those below `to`: their edges would close a loop. So a
    /// filter opened on `from` stays there and takes over its users.
    ///
    /// # Errors
    /// Nothing has changed. `ReadOnly`: somebody writes to `from` and `to` cannot be written; `InUse`: a node is just
    /// being opened on `from`.
    pub async fn replace(&self, from: &NodeRef, to: &NodeRef) -> Result<()> {
        self.check_ours(&[from, to])?;
        if from.id() == to.id() {
            return Ok(());
        }
        let _one = self.begin_change().await;
        let _drained = Drained::begin(Strong::clone(from.strong())).await;
        let moves = movable(from, to, &below(to.strong()))?;
        let moved = Moved::new(moves, to.strong());
        self.refresh_limits_upwards(to.strong());
        moved.settle().await;
        Ok(())
    }

    /// Gives a node another backing node, or none.
    ///
    /// # Errors
    /// Nothing has changed. `InvalidInput`: the graph would become a loop; `NotSupported`: the driver cannot have a
    /// backing node, or cannot get its first or lose its only one while it is open.
    pub async fn set_backing(&self, node: &NodeRef, backing: Option<&NodeRef>) -> Result<()> {
        self.check_ours(&[node])?;
        backing.map_or(Ok(()), |backing| self.check_ours(&[backing]))?;
        let _one = self.begin_change().await;
        let _drained = Drained::begin(Strong::clone(node.strong())).await;
        let mut moved = None;
        match (node.node().cow_child(), backing) {
            (None, None) => {}
            (Some(edge), Some(backing)) => {
                check_no_loop(node, backing)?;
                moved = Some(Moved::new(vec![edge], backing.strong()));
            }
            (None, Some(backing)) => {
                check_no_loop(node, backing)?;
                self.attach_backing(node, backing)?;
            }
            (Some(edge), None) => detach_backing(node, &edge)?,
        }
        self.refresh_limits_upwards(node.strong());
        if let Some(moved) = moved {
            moved.settle().await;
        }
        Ok(())
    }

    /// Lets `filter`, which was opened on `node`, take over everyone else who uses `node`.
    ///
    /// # Errors
    /// As [`Graph::replace`]; `InvalidInput` if it is not a filter on this node.
    pub async fn insert_filter(&self, node: &NodeRef, filter: &NodeRef) -> Result<()> {
        if filtered(filter)?.id() != node.id() {
            return Err(refuse(filter, format!("it is not a filter on '{}'", node.name())));
        }
        self.replace(node, filter).await
    }

    /// Lets everyone who uses `filter` use the node it filters. The filter itself lives until its last reference goes.
    ///
    /// # Errors
    /// As [`Graph::replace`]; `InvalidInput` if it is not a filter.
    pub async fn drop_filter(&self, filter: &NodeRef) -> Result<()> {
        let below = filtered(filter)?;
        self.replace(filter, &below).await
    }

    fn check_ours(&self, nodes: &[&NodeRef]) -> Result<()> {
        match nodes.iter().find(|node| !Arc::ptr_eq(&node.graph().0, &self.0)) {
            Some(node) => Err(refuse(node, "it belongs to another graph".to_owned())),
            None => Ok(()),
        }
    }

    /// Lets everyone above `start` see its limits.
    fn refresh_limits_upwards(&self, start: &Strong<Node>) {
        let mut todo = vec![Strong::clone(start)];
        while let Some(node) = todo.pop() {
            node.refresh_limits();
            for edge in node.parents() {
                let Some(Parent::Node(parent)) = edge.parent() else { continue };
                // A parent that is gone by now needs no limits.
                let Ok(parent) = self.0.reaper.arena.acquire(parent.0) else { continue };
                if parent.refresh_limits() {
                    todo.push(parent);
                }
            }
        }
    }

    /// One change at a time; what is dead goes first, so that it does not stand in the way.
    async fn begin_change(&self) -> MutexGuard<'_, ()> {
        self.0.reaper.sweep_unasked().await;
        self.0.changes.lock().await
    }

    /// Gives a drained node its first backing node.
    fn attach_backing(&self, node: &NodeRef, backing: &NodeRef) -> Result<()> {
        if !node.driver().supports_backing() {
            let driver = node.driver_name();
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("{driver} nodes have no backing node"),
            )
            .node(node.name()));
        }
        let access = Access::of_child(Role::COW, &node.node().use_from(Access::READ));
        let holder = format!("{}.backing", node.name());
        let target = Strong::clone(backing.strong());
        let edge = Edge::new("backing", Role::COW, access, &holder, target, None);
        edge.set_parent(Parent::Node(node.id()));
        let port = (self.0.reaper.make_port)(Arc::clone(&edge));
        node.driver()
            .set_backing(Some(Child::new("backing", port)))
            .map_err(|error| error.node(node.name()))?;
        backing.node().add_parent(&edge);
        let mut children = node.node().children().to_vec();
        children.push(edge);
        node.node().set_children(children);
        Ok(())
    }
}

/// Takes a drained node's backing node away.
fn detach_backing(node: &NodeRef, edge: &Arc<Edge>) -> Result<()> {
    let taken = node.driver().set_backing(None).map_err(|error| error.node(node.name()))?;
    let mut children = node.node().children().to_vec();
    children.retain(|known| !Arc::ptr_eq(known, edge));
    node.node().set_children(children);
    edge.target().remove_parent(edge);
    drop(taken);
    Ok(())
}

/// What a filter filters.
fn filtered(filter: &NodeRef) -> Result<NodeRef> {
    let child = filter.driver().is_filter().then(|| walk::next_below(filter)).flatten();
    child.ok_or_else(|| refuse(filter, "it is not a filter".to_owned()))
}

/// `node` must not be `child` nor lie below it.
fn check_no_loop(node: &NodeRef, child: &NodeRef) -> Result<()> {
    if below(child.strong()).contains(&node.id()) {
        return Err(refuse(
            node,
            format!("'{}' lies above it: the graph would be a loop", child.name()),
        ));
    }
    Ok(())
}

/// A node and all below it.
fn below(node: &Strong<Node>) -> HashSet<NodeId> {
    let mut ids = HashSet::new();
    walk::each_below(node, &mut |node| {
        ids.insert(node.id());
    });
    ids
}

/// The edges into `from` that are to point to `to`, checked. Those of parents in `stay` are not among them.
fn movable(from: &NodeRef, to: &NodeRef, stay: &HashSet<NodeId>) -> Result<Vec<Arc<Edge>>> {
    let mut moves = Vec::new();
    for edge in from.node().parents() {
        match edge.parent() {
            None => {
                return Err(Error::new(
                    ErrorKind::InUse,
                    "a node is just being opened on it; try again when that is done",
                )
                .node(from.name()));
            }
            Some(Parent::Node(parent)) if stay.contains(parent) => continue,
            Some(Parent::Node(_) | Parent::Root(_)) => {}
        }
        if edge.access().writes() && !to.is_writable() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "'{}' is written through '{}', and '{}' is read-only",
                    from.name(),
                    edge.name(),
                    to.name()
                ),
            )
            .node(to.name()));
        }
        moves.push(edge);
    }
    Ok(moves)
}

/// Edges that have been re-pointed. Their gates stay closed until this is dropped.
pub(super) struct Moved(Vec<Arc<Edge>>);

impl Moved {
    /// Re-points edges at whose target nobody is inside. Cannot fail.
    pub(super) fn new(edges: Vec<Arc<Edge>>, to: &Strong<Node>) -> Self {
        for edge in &edges {
            // On the edge's own behalf: its share of the drain goes when it leaves the old node.
            edge.close();
            edge.target().remove_parent(edge);
            edge.swap(Strong::clone(to));
            to.add_parent(edge);
        }
        Self(edges)
    }

    /// Waits, behind the closed gates, until the references to the old target are given up.
    pub(super) async fn settle(&self) {
        for edge in &self.0 {
            edge.settle().await;
        }
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        self.0.iter().for_each(|edge| edge.open());
    }
}

fn refuse(node: &NodeRef, why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, why).node(node.name())
}
