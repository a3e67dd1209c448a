//! Computes permissions over the graph: what each edge uses and shares, and which conflicts that
//! makes.
//!
//! A parent's permissions on a child follow from those of its own parents (`Driver::child_access`),
//! from roots down. They are never patched, always computed anew, parents before children, over the
//! part of the (staged) graph that can differ: so the same graph has the same permissions, however
//! it was reached.
//!
//! Rules: of two edges to one node, each shares what the other uses; a read-only or inactive node
//! has no writers; a writer without resize permission needs an aligned end. Taking fewer
//! permissions is not checked and cannot fail.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use bds_refcount::Strong;

use super::stage::{Accesses, Stage, key};
use crate::driver::{Access, Perm};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::core::{GraphCore, LockedGraph};
use crate::graph::lock::GraphLockGuard;
use crate::graph::model::edge::Edge;
use crate::graph::model::node::{Node, NodeId};

/// Whether conflicts are checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::graph) enum Strictness {
    /// An edge uses more or shares less than before.
    Checked,
    /// Edges only use less: what was allowed stays allowed.
    Loosening,
}

/// Computes the accesses that differ because of the staged edges, at and below these nodes.
///
/// # Errors
/// `InUse` names both sides of a conflict; `ReadOnly` and `Inactive` the edge that would write.
pub(in crate::graph) fn compute(
    stage: &Stage<'_>,
    starts: impl IntoIterator<Item = Strong<Node>>,
    strictness: Strictness,
) -> Result<Accesses> {
    let mut found = stage.requested();
    let mut queue = parents_first(stage, starts.into_iter().collect());
    let mut queued: HashSet<NodeId> = queue.iter().map(|node| node.id()).collect();
    let mut visited: BTreeMap<NodeId, Strong<Node>> = BTreeMap::new();
    while let Some(node) = queue.pop_front() {
        queued.remove(&node.id());
        let above = cumulate(stage.parents(&node).iter().map(|edge| access_of(&found, edge)));
        let node_use = stage.node_use(&node, above);
        let is_leaving = stage.is_leaving(&node);
        for edge in stage.children(&node) {
            let access = match is_leaving {
                true => Access::NONE,
                false => node.driver().child_access(edge.name(), edge.role(), &node_use),
            };
            if access == access_of(&found, &edge) {
                continue;
            }
            if let Some(target) = stage.target(&edge)
                && queued.insert(target.id())
            {
                queue.push_back(target);
            }
            found.insert(key(&edge), (edge, access));
        }
        visited.insert(node.id(), node);
    }
    if strictness == Strictness::Checked {
        for node in visited.values() {
            check_node(stage, node, &found)?;
        }
    }
    Ok(found)
}

/// Sorts a few nodes, those above others first: a child's access is then computed once, and not
/// first with its parents' old access, which could ripple down a long chain and back.
fn parents_first(stage: &Stage<'_>, mut left: Vec<Strong<Node>>) -> VecDeque<Strong<Node>> {
    const FEW: usize = 8;
    let mut sorted = VecDeque::new();
    while (2..=FEW).contains(&left.len()) {
        let is_top = |node: &Strong<Node>| {
            left.iter().all(|other| other.id() == node.id() || !stage.reaches(other, node))
        };
        let place = left.iter().position(is_top).unwrap_or(0);
        sorted.push_back(left.remove(place));
    }
    sorted.extend(left);
    sorted
}

/// The permissions that all edges use together, and those that all share.
pub(in crate::graph) fn cumulate(accesses: impl Iterator<Item = Access>) -> Access {
    accesses.fold(Access::NONE, Access::and)
}

fn access_of(found: &Accesses, edge: &Arc<Edge>) -> Access {
    found.get(&key(edge)).map_or_else(|| edge.access(), |(_, access)| *access)
}

/// Checks the accesses of a node's parents against each other and against the node.
fn check_node(stage: &Stage<'_>, node: &Node, found: &Accesses) -> Result<()> {
    let parents = stage.parents(node);
    let uses: Vec<Access> = parents.iter().map(|edge| access_of(found, edge)).collect();
    let facts = stage.node_use(node, Access::NONE);
    if facts.is_writable {
        check_bytes_are_writable(stage, node)?;
    }
    if facts.is_active {
        check_children_are_active(stage, node)?;
    }
    for (edge, access) in parents.iter().zip(&uses) {
        let changes = access.perm - Perm::CONSISTENT_READ;
        if !changes.is_empty() && !facts.is_active {
            let message =
                format!("{} would write to it ({changes}), and it is inactive", edge.holder());
            return Err(Error::new(ErrorKind::Inactive, message).node(node.name()));
        }
        if !changes.is_empty() && !facts.is_writable {
            let message =
                format!("{} writes to it ({changes}), and it is read-only", edge.holder());
            return Err(Error::new(ErrorKind::ReadOnly, message).node(node.name()));
        }
        let align = stage.request_alignment(node);
        if access.perm & Perm::changes() == Perm::WRITE && !node.len().is_multiple_of(align) {
            let message = format!(
                "{} writes without resizing, and the node's end is not a multiple of {align} bytes",
                edge.holder()
            );
            return Err(Error::new(ErrorKind::InvalidInput, message).node(node.name()));
        }
    }
    match find_clash(&uses) {
        Some((user, objector)) => {
            Err(conflict(node, (&parents[user], uses[user]), (&parents[objector], uses[objector])))
        }
        None => Ok(()),
    }
}

/// Checks that a writable node's own bytes are in writable nodes.
fn check_bytes_are_writable(stage: &Stage<'_>, node: &Node) -> Result<()> {
    for edge in stage.children(node).iter().filter(|edge| edge.holds_bytes()) {
        let Some(target) = stage.target(edge) else { continue };
        if !stage.node_use(&target, Access::NONE).is_writable {
            let message = format!(
                "'{}' is node '{}', which is read-only; make it writable, or this node read-only",
                edge.name(),
                target.name()
            );
            return Err(Error::new(ErrorKind::ReadOnly, message).node(node.name()));
        }
    }
    Ok(())
}

/// Checks that an active node's children are active.
fn check_children_are_active(stage: &Stage<'_>, node: &Node) -> Result<()> {
    for edge in stage.children(node) {
        let Some(target) = stage.target(&edge) else { continue };
        if !stage.node_use(&target, Access::NONE).is_active {
            let message = format!(
                "'{}' is node '{}', which is inactive: activate it first",
                edge.name(),
                target.name()
            );
            return Err(Error::new(ErrorKind::Inactive, message).node(node.name()));
        }
    }
    Ok(())
}

/// Finds two parents of which the first uses what the second does not share. Looks at each parent
/// once or twice.
fn find_clash(uses: &[Access]) -> Option<(usize, usize)> {
    let together = cumulate(uses.iter().copied());
    if (together.perm - together.shared).is_empty() {
        return None;
    }
    let clashes = |user: usize, objector: usize| {
        user != objector && !uses[user].clash(uses[objector]).is_empty()
    };
    // First an objector to anything that is used: there are few, and most clash with a particular
    // user.
    (0..uses.len()).filter(|&objector| !together.clash(uses[objector]).is_empty()).find_map(
        |objector| {
            (0..uses.len()).find(|&user| clashes(user, objector)).map(|user| (user, objector))
        },
    )
}

fn conflict(node: &Node, user: (&Arc<Edge>, Access), objector: (&Arc<Edge>, Access)) -> Error {
    let clash = user.1.clash(objector.1);
    let message = format!(
        "{} uses it for '{clash}', which {} does not allow (it allows: {}); let one of them go, or let the \
         second share more",
        user.0.holder(),
        objector.0.holder(),
        objector.1.shared,
    );
    Error::new(ErrorKind::InUse, message).node(node.name())
}

impl GraphCore {
    /// Takes the topology lock. Permissions are exact from here on: those of nodes that lost an
    /// edge are recomputed first.
    pub(in crate::graph) fn lock(&self) -> LockedGraph<'_> {
        let lock = self.lock_stale();
        recompute_stale(&lock);
        lock
    }
}

/// Recomputes permissions of nodes that lost a parent edge, and of all nodes below: they may be
/// used for less now.
pub(in crate::graph) fn recompute_stale(lock: &LockedGraph<'_>) {
    let mut starts = BTreeMap::new();
    while let Some(id) = lock.core.topology.stale_perms.pop() {
        if let Ok(node) = lock.core.arena.acquire(id.0) {
            starts.insert(id, node);
        }
    }
    if starts.is_empty() {
        return;
    }
    let stage = Stage::new(&lock.core.arena);
    let found = compute(&stage, starts.into_values(), Strictness::Loosening);
    apply(lock, found.expect("what is not checked cannot fail"));
}

/// Stores computed accesses in their edges.
pub(in crate::graph) fn apply(lock: &GraphLockGuard<'_>, accesses: Accesses) {
    for (edge, access) in accesses.into_values() {
        edge.set_access(lock, access);
    }
}
