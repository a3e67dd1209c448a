//! A stage: changes of edges and nodes laid over the graph, which stays as it is.
//!
//! A stage is used under the topology lock, read like the graph itself, and dropped without a
//! trace: there is no rollback. `commit` applies a checked stage by swapping the staged edges in,
//! in one step that cannot fail.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bds_refcount::{Arena, Strong};

use crate::driver::{Access, NodeUse, OpenFlags, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::model::edge::{Edge, Freeze, Parent, check_role};
use crate::graph::model::node::{Node, NodeId};

/// A map by node id. Walked in an order that a replay repeats.
pub(in crate::graph) type ById<T> = BTreeMap<NodeId, T>;

/// An edge's identity while a reference to it exists.
pub(in crate::graph) fn key(edge: &Arc<Edge>) -> usize {
    Arc::as_ptr(edge).addr()
}

/// Accesses that edges are going to have, by [`key`], where they differ.
pub(in crate::graph) type Accesses = HashMap<usize, (Arc<Edge>, Access)>;

/// New facts about a node, where they differ.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::graph) struct Facts {
    pub(in crate::graph) flags: Option<OpenFlags>,
    /// Whether the node is writable with these flags.
    pub(in crate::graph) is_writable: Option<bool>,
    pub(in crate::graph) is_active: Option<bool>,
    pub(in crate::graph) request_alignment: Option<u32>,
}

/// A node and its new facts.
pub(in crate::graph) type NewFacts = (Strong<Node>, Facts);

/// A staged move of an edge to another node, or to none.
pub(in crate::graph) struct Move {
    pub(in crate::graph) edge: Arc<Edge>,
    pub(in crate::graph) from: Option<Strong<Node>>,
    pub(in crate::graph) to: Option<Strong<Node>>,
    /// The number of the edit: edges are moved in the order of the edits.
    pub(in crate::graph) number: usize,
}

/// A staged removal of an edge.
struct Dropped {
    parent: Strong<Node>,
    edge: Arc<Edge>,
    number: usize,
}

/// A staged new edge.
pub(in crate::graph) struct Attach {
    /// `None`: a root, or a node that is just being opened.
    pub(in crate::graph) parent: Option<Strong<Node>>,
    pub(in crate::graph) edge: Arc<Edge>,
    pub(in crate::graph) to: Strong<Node>,
}

/// Changes laid over the graph.
pub(in crate::graph) struct Stage<'g> {
    arena: &'g Arena<Node>,
    moves: HashMap<usize, Move>,
    attached: Vec<Attach>,
    /// Edges that are removed from their parents' lists.
    dropped: HashMap<usize, Dropped>,
    /// Edits so far.
    count: usize,
    /// Staged edges by target.
    incoming: ById<Vec<Arc<Edge>>>,
    requested: Accesses,
    facts: ById<Facts>,
    leaving: ById<Strong<Node>>,
    /// Staged entries and removals of the monitor's list.
    owned: ById<bool>,
    starts: ById<Strong<Node>>,
    /// Freezes that do not hold back this change.
    thawed: Vec<Arc<Freeze>>,
    /// Nodes of which something else changes than edges and permissions.
    drained: ById<Strong<Node>>,
}

impl<'g> Stage<'g> {
    pub(in crate::graph) fn new(arena: &'g Arena<Node>) -> Self {
        Self {
            arena,
            moves: HashMap::new(),
            attached: Vec::new(),
            dropped: HashMap::new(),
            count: 0,
            incoming: ById::new(),
            requested: HashMap::new(),
            facts: ById::new(),
            leaving: ById::new(),
            owned: ById::new(),
            starts: ById::new(),
            thawed: Vec::new(),
            drained: ById::new(),
        }
    }

    // ---- read

    /// Where the edge leads.
    pub(in crate::graph) fn target(&self, edge: &Arc<Edge>) -> Option<Strong<Node>> {
        match self.moves.get(&key(edge)) {
            Some(staged) => staged.to.clone(),
            None => edge.medium().map(|target| Strong::clone(target.strong())),
        }
    }

    /// The edges that lead to the node.
    pub(in crate::graph) fn parents(&self, node: &Node) -> Vec<Arc<Edge>> {
        let mut parents = node.parents();
        parents.retain(|edge| {
            !self.moves.contains_key(&key(edge)) && !self.dropped.contains_key(&key(edge))
        });
        parents.extend(self.incoming.get(&node.id()).into_iter().flatten().cloned());
        parents
    }

    /// The edges that lead from the node.
    pub(in crate::graph) fn children(&self, node: &Node) -> Vec<Arc<Edge>> {
        let mut children = node.children().to_vec();
        children.retain(|edge| !self.dropped.contains_key(&key(edge)));
        let is_its = |attach: &&Attach| attach.parent.as_ref().is_some_and(|p| p.id() == node.id());
        children.extend(self.attached.iter().filter(is_its).map(|attach| Arc::clone(&attach.edge)));
        children
    }

    /// The edge that has one of these roles.
    pub(in crate::graph) fn child_in_role(&self, node: &Node, role: Role) -> Option<Arc<Edge>> {
        self.children(node).into_iter().find(|edge| edge.role().intersects(role))
    }

    /// The facts that the node's use of its children follows from.
    pub(in crate::graph) fn node_use(&self, node: &Node, above: Access) -> NodeUse {
        let facts = self.facts.get(&node.id()).copied().unwrap_or_default();
        NodeUse {
            above,
            is_writable: facts.is_writable.unwrap_or_else(|| node.could_write()),
            is_active: facts.is_active.unwrap_or_else(|| node.is_active()),
            force_share: facts.flags.unwrap_or_else(|| node.flags()).force_share,
        }
    }

    /// The alignment of requests to the node.
    pub(in crate::graph) fn request_alignment(&self, node: &Node) -> u64 {
        let facts = self.facts.get(&node.id()).copied().unwrap_or_default();
        u64::from(facts.request_alignment.unwrap_or_else(|| node.limits().request_alignment))
    }

    /// Accesses requested for roots.
    pub(in crate::graph) fn requested(&self) -> Accesses {
        let copy = |(key, (edge, access)): (&usize, &(Arc<Edge>, Access))| {
            (*key, (Arc::clone(edge), *access))
        };
        self.requested.iter().map(copy).collect()
    }

    /// Is the node removed, so that its use of children does not count?
    pub(in crate::graph) fn is_leaving(&self, node: &Node) -> bool {
        self.leaving.contains_key(&node.id()) && node.driver().is_filter()
    }

    /// Is `goal` the node itself, or below it? Searches from both ends, so it is as quick as the
    /// shorter search.
    pub(in crate::graph) fn reaches(&self, start: &Strong<Node>, goal: &Strong<Node>) -> bool {
        if start.id() == goal.id() {
            return true;
        }
        let mut down = Search::new(start);
        let mut up = Search::new(goal);
        loop {
            let below = |node: &Node| -> Vec<Strong<Node>> {
                self.children(node).iter().filter_map(|edge| self.target(edge)).collect()
            };
            match down.step(goal.id(), below) {
                Step::Found => return true,
                Step::Exhausted => return false,
                Step::On => {}
            }
            match up.step(start.id(), |node| self.parent_nodes(node)) {
                Step::Found => return true,
                Step::Exhausted => return false,
                Step::On => {}
            }
        }
    }

    fn parent_nodes(&self, node: &Node) -> Vec<Strong<Node>> {
        let parents = self.parents(node);
        parents.iter().filter_map(|edge| self.parent_node(edge)).collect()
    }

    /// The edge's parent node, if its parent is a node and lives.
    pub(in crate::graph) fn parent_node(&self, edge: &Arc<Edge>) -> Option<Strong<Node>> {
        match edge.parent() {
            Some(Parent::Node(id)) => self.arena.acquire(id.0).ok(),
            Some(Parent::Root(_)) => None,
            // Staged edges get their parent when they are applied.
            None => {
                let staged = self.attached.iter().find(|attach| Arc::ptr_eq(&attach.edge, edge));
                staged.and_then(|attach| attach.parent.clone())
            }
        }
    }

    /// Is the edge's parent just being opened?
    pub(in crate::graph) fn is_opening(&self, edge: &Arc<Edge>) -> bool {
        edge.parent().is_none() && self.parent_node(edge).is_none()
    }

    // ---- change

    /// Moves the edge to `to`. Refused for frozen edges; a loop is refused where the parent is a
    /// node.
    pub(in crate::graph) fn repoint(
        &mut self,
        edge: &Arc<Edge>,
        to: Option<&Strong<Node>>,
    ) -> Result<()> {
        self.check_frozen(edge)?;
        let now = self.target(edge);
        if now.as_ref().map(|node| node.id()) == to.map(|node| node.id()) {
            return Ok(());
        }
        let parent = self.parent_node(edge);
        if let (Some(to), Some(parent)) = (to, &parent) {
            self.check_child(parent, edge.name(), to)?;
        }
        self.touch(parent.as_ref());
        self.touch(now.as_ref());
        self.touch(to);
        let found = self.moves.remove(&key(edge));
        let from = match found {
            Some(before) => before.from,
            None => edge.medium().map(|target| Strong::clone(target.strong())),
        };
        self.leave(now.as_ref(), edge);
        if let Some(to) = to {
            self.incoming.entry(to.id()).or_default().push(Arc::clone(edge));
        }
        let number = self.count_edit();
        let staged = Move { edge: Arc::clone(edge), from, to: to.cloned(), number };
        self.moves.insert(key(edge), staged);
        Ok(())
    }

    /// Adds an edge of `parent` (or of a root).
    pub(in crate::graph) fn attach(
        &mut self,
        parent: Option<&Strong<Node>>,
        edge: &Arc<Edge>,
        to: &Strong<Node>,
    ) -> Result<()> {
        if let Some(parent) = parent {
            self.check_child(parent, edge.name(), to)?;
            let others = self.children(parent);
            check_role(others.iter().map(|edge| edge.role()), edge.name(), edge.role())
                .map_err(|error| error.node(parent.name()))?;
        }
        self.touch(Some(to));
        self.touch(parent);
        self.incoming.entry(to.id()).or_default().push(Arc::clone(edge));
        self.attached.push(Attach {
            parent: parent.cloned(),
            edge: Arc::clone(edge),
            to: Strong::clone(to),
        });
        Ok(())
    }

    /// Removes an edge of `parent`.
    pub(in crate::graph) fn drop_edge(
        &mut self,
        parent: &Strong<Node>,
        edge: &Arc<Edge>,
    ) -> Result<()> {
        self.check_frozen(edge)?;
        let now = self.target(edge);
        self.touch(now.as_ref());
        self.touch(Some(parent));
        self.leave(now.as_ref(), edge);
        match self.attached.iter().position(|attach| Arc::ptr_eq(&attach.edge, edge)) {
            Some(place) => {
                self.attached.remove(place);
                self.moves.remove(&key(edge));
            }
            None => {
                let (parent, edge, number) =
                    (Strong::clone(parent), Arc::clone(edge), self.count_edit());
                self.dropped.insert(key(&edge), Dropped { parent, edge, number });
            }
        }
        Ok(())
    }

    /// Lets later edits move edges that are frozen by this freeze.
    pub(in crate::graph) fn thaw(&mut self, freeze: &Arc<Freeze>) {
        self.thawed.push(Arc::clone(freeze));
    }

    fn check_frozen(&self, edge: &Arc<Edge>) -> Result<()> {
        let Some(freeze) = edge.frozen() else { return Ok(()) };
        if self.thawed.iter().any(|thawed| Arc::ptr_eq(thawed, &freeze)) {
            return Ok(());
        }
        let message = format!("{} is frozen by {freeze}: it cannot be changed now", edge.holder());
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// Changes a root's access.
    pub(in crate::graph) fn request_access(&mut self, edge: &Arc<Edge>, access: Access) {
        self.touch(self.target(edge).as_ref());
        self.requested.insert(key(edge), (Arc::clone(edge), access));
    }

    /// Sets new facts of a node.
    pub(in crate::graph) fn set_facts(&mut self, node: &Strong<Node>, facts: Facts) {
        self.touch(Some(node));
        // Its parents may conflict with that, and other parents of its children.
        for edge in self.parents(node) {
            self.touch(self.parent_node(&edge).as_ref());
        }
        for edge in self.children(node) {
            self.touch(self.target(&edge).as_ref());
        }
        self.facts.insert(node.id(), facts);
    }

    /// Removes the node: it must have no users then.
    pub(in crate::graph) fn leave_graph(&mut self, node: &Strong<Node>) {
        self.touch(Some(node));
        self.leaving.insert(node.id(), Strong::clone(node));
    }

    /// Puts the node on the monitor's list, or removes it. Returns what an earlier edit staged.
    pub(in crate::graph) fn own(&mut self, node: NodeId, is_owned: bool) -> Option<bool> {
        self.owned.insert(node, is_owned)
    }

    fn count_edit(&mut self) -> usize {
        self.count += 1;
        self.count
    }

    fn leave(&mut self, node: Option<&Strong<Node>>, edge: &Arc<Edge>) {
        let Some(edges) = node.and_then(|node| self.incoming.get_mut(&node.id())) else { return };
        edges.retain(|known| !Arc::ptr_eq(known, edge));
    }

    fn touch(&mut self, node: Option<&Strong<Node>>) {
        if let Some(node) = node {
            self.starts.insert(node.id(), Strong::clone(node));
        }
    }

    /// A node's child must not lie above the node, nor be inactive below an active one.
    fn check_child(&self, parent: &Strong<Node>, name: &str, child: &Strong<Node>) -> Result<()> {
        if self.reaches(child, parent) {
            let message =
                format!("'{}' lies above it: as its '{name}' it would close a loop", child.name());
            return Err(Error::new(ErrorKind::InvalidInput, message).node(parent.name()));
        }
        let is_active = |node: &Node| self.node_use(node, Access::NONE).is_active;
        if is_active(parent) && !is_active(child) {
            let message = format!("'{}' is inactive: activate it first", child.name());
            return Err(Error::new(ErrorKind::Inactive, message).node(parent.name()));
        }
        Ok(())
    }

    // ---- hand over

    /// The node is to be drained, whatever else changes.
    pub(in crate::graph) fn drain(&mut self, node: &Strong<Node>) {
        self.drained.insert(node.id(), Strong::clone(node));
    }

    /// Nodes at which permissions can differ.
    pub(in crate::graph) fn starts(&self) -> Vec<Strong<Node>> {
        self.starts.values().cloned().collect()
    }

    /// Nodes that must be drained before this is applied: those that edges leave, and those whose
    /// children change.
    pub(in crate::graph) fn to_drain(&self) -> Vec<Strong<Node>> {
        let left = self
            .moves
            .values()
            .filter(|staged| staged.is_real())
            .filter_map(|staged| staged.from.clone());
        let parents = self.attached.iter().filter_map(|attach| attach.parent.clone());
        let dropped = self.dropped.values().flat_map(|Dropped { parent, edge, .. }| {
            let target = edge.medium().map(|target| Strong::clone(target.strong()));
            [Some(Strong::clone(parent)), target].into_iter().flatten()
        });
        let others = self.facts.keys().chain(self.leaving.keys());
        let others = others.filter_map(|id| self.starts.get(id).cloned());
        let others = others.chain(self.drained.values().cloned());
        let all = left.chain(parents).chain(dropped).chain(others);
        all.map(|node| (node.id(), node)).collect::<ById<_>>().into_values().collect()
    }

    /// Nodes that become backing nodes of what takes their place: the flushes of their users end
    /// above them. With a filter also what it shows.
    pub(in crate::graph) fn hidden(&self) -> Vec<Strong<Node>> {
        let moves = self.moves.values().filter(|staged| staged.is_real());
        let hidden = moves.filter_map(|Move { from, to, .. }| {
            let (from, to) = (from.as_ref()?, to.as_ref()?);
            let is_hidden = self.reaches(to, from) && !self.flush_reaches(to, from.id());
            is_hidden.then_some(from)
        });
        let layers = hidden.flat_map(|from| {
            std::iter::successors(Some(Strong::clone(from)), |node| self.shown_by(node))
        });
        let writable = layers.filter(|node| node.could_write());
        writable.map(|node| (node.id(), node)).collect::<ById<_>>().into_values().collect()
    }

    /// What a filter shows.
    fn shown_by(&self, node: &Node) -> Option<Strong<Node>> {
        let edge = self.child_in_role(node, Role::FILTERED).filter(|_| node.driver().is_filter());
        edge.and_then(|edge| self.target(&edge))
    }

    /// Does a flush of `start` come to `goal`?
    fn flush_reaches(&self, start: &Strong<Node>, goal: NodeId) -> bool {
        start.id() == goal
            || self
                .children(start)
                .iter()
                .filter(|edge| edge.holds_bytes())
                .filter_map(|edge| self.target(edge))
                .any(|child| self.flush_reaches(&child, goal))
    }

    /// All that differs, to be applied.
    pub(in crate::graph) fn into_parts(self) -> Staged {
        let mut moves: Vec<Move> = self.moves.into_values().filter(Move::is_real).collect();
        moves.sort_by_key(|staged| staged.number);
        let mut dropped: Vec<Dropped> = self.dropped.into_values().collect();
        dropped.sort_by_key(|staged| staged.number);
        Staged {
            moves,
            attached: self.attached,
            dropped: dropped.into_iter().map(|staged| (staged.parent, staged.edge)).collect(),
            facts: self.facts,
            leaving: self.leaving,
        }
    }
}

impl Move {
    /// Does the target differ in the end?
    fn is_real(&self) -> bool {
        self.from.as_ref().map(|node| node.id()) != self.to.as_ref().map(|node| node.id())
    }
}

/// The outcome of a stage.
pub(in crate::graph) struct Staged {
    pub(in crate::graph) moves: Vec<Move>,
    pub(in crate::graph) attached: Vec<Attach>,
    pub(in crate::graph) dropped: Vec<(Strong<Node>, Arc<Edge>)>,
    pub(in crate::graph) facts: ById<Facts>,
    pub(in crate::graph) leaving: ById<Strong<Node>>,
}

/// A search in one direction, one node a step.
struct Search {
    seen: HashSet<NodeId>,
    todo: Vec<Strong<Node>>,
}

enum Step {
    Found,
    Exhausted,
    On,
}

impl Search {
    fn new(start: &Strong<Node>) -> Self {
        Self { seen: HashSet::from([start.id()]), todo: vec![Strong::clone(start)] }
    }

    fn step(&mut self, goal: NodeId, next: impl Fn(&Node) -> Vec<Strong<Node>>) -> Step {
        let Some(node) = self.todo.pop() else { return Step::Exhausted };
        for node in next(&node) {
            if node.id() == goal {
                return Step::Found;
            }
            if self.seen.insert(node.id()) {
                self.todo.push(node);
            }
        }
        Step::On
    }
}
