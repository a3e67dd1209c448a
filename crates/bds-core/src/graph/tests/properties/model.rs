//! The model: a graph as maps, with everything else computed from scratch each time.
//!
//! It shares no code with the product. Counts, permissions, quiesce counts, limits and names are
//! derived from the edges; the one exception is the permissions of a dead node, which stay as they
//! were when it died.

use std::collections::{BTreeMap, BTreeSet};

/// Identifies a node; never reused.
pub(super) type Key = u32;

/// Permissions as bits: consistent read, write, write unchanged, resize.
pub(super) const READ: u8 = 1;
pub(super) const WRITE: u8 = 2;
pub(super) const SAME: u8 = 4;
pub(super) const RESIZE: u8 = 8;
pub(super) const ALL: u8 = 15;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Access {
    pub(super) perm: u8,
    pub(super) shared: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    File,
    Filter,
    Image,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    /// The name it was opened with.
    pub(super) first_name: String,
    pub(super) kind: Kind,
    pub(super) ro: bool,
    pub(super) is_ro_given: bool,
    pub(super) discard: bool,
    pub(super) level: u64,
    pub(super) is_active: bool,
    pub(super) is_poisoned: bool,
    pub(super) inherits_from: Option<Key>,
    pub(super) fail_flush: bool,
    pub(super) fail_close: bool,
    pub(super) refuses_backing: bool,
    pub(super) has_odd_len: bool,
    pub(super) transfer: u64,
    pub(super) is_dead: bool,
    /// A sweep deferred it to the end of a drained section.
    pub(super) is_deferred: bool,
    pub(super) bitmaps: Vec<Bitmap>,
    pub(super) last_bitmap: u64,
    /// Numbers of blocker guards, and the operations they refuse, as bits.
    pub(super) blocks: Vec<(u32, u32)>,
    pub(super) job: Option<u32>,
}

impl Node {
    /// Writable, active, without faults.
    pub(super) fn new(name: &str, kind: Kind) -> Self {
        Self {
            name: name.to_owned(),
            first_name: name.to_owned(),
            kind,
            ro: false,
            is_ro_given: false,
            discard: false,
            level: 0,
            is_active: true,
            is_poisoned: false,
            inherits_from: None,
            fail_flush: false,
            fail_close: false,
            refuses_backing: false,
            has_odd_len: false,
            transfer: 0,
            is_dead: false,
            is_deferred: false,
            bitmaps: Vec::new(),
            last_bitmap: 0,
            blocks: Vec::new(),
            job: None,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bitmap {
    pub(super) number: u64,
    pub(super) name: Option<String>,
    pub(super) leased: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Edge {
    /// `None`: a root.
    pub(super) parent: Option<Key>,
    pub(super) name: &'static str,
    pub(super) holder: String,
    pub(super) child: Option<Key>,
    pub(super) access: Access,
    pub(super) frozen: Option<u32>,
    pub(super) stays: bool,
}

impl Edge {
    pub(super) fn is_backing(&self) -> bool {
        self.name == "backing"
    }
}

#[derive(Clone, Debug)]
pub(super) struct Drain {
    pub(super) number: u32,
    pub(super) nodes: BTreeSet<Key>,
    pub(super) is_all: bool,
}

#[derive(Clone, Default, Debug)]
pub(super) struct Model {
    /// Live nodes, and dead ones that are not closed yet.
    pub(super) nodes: BTreeMap<Key, Node>,
    pub(super) edges: BTreeMap<u32, Edge>,
    /// References of the test, in step with the real ones.
    pub(super) refs: Vec<Key>,
    pub(super) monitor: Vec<Key>,
    pub(super) drains: Vec<Drain>,
    /// Dead nodes in the order of their death.
    pub(super) graveyard: Vec<Key>,
    pub(super) epoch: u64,
    pub(super) is_shut: bool,
    /// Names of nodes closed since the last look, and of those that failed.
    pub(super) closed: Vec<String>,
    pub(super) unclean: Vec<String>,
    pub(super) last: u32,
}

impl Model {
    pub(super) fn fresh(&mut self) -> u32 {
        self.last += 1;
        self.last
    }

    // ---- derived values

    pub(super) fn is_live(&self, key: Key) -> bool {
        self.nodes.get(&key).is_some_and(|node| !node.is_dead)
    }

    pub(super) fn live(&self) -> Vec<Key> {
        self.nodes.keys().copied().filter(|key| self.is_live(*key)).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<Key> {
        self.live().into_iter().find(|key| self.nodes[key].name == name)
    }

    /// P6: the count is the number of live holders.
    pub(super) fn count(&self, key: Key) -> usize {
        let refs = self.refs.iter().filter(|held| **held == key).count();
        let monitor = self.monitor.iter().filter(|held| **held == key).count();
        let drains = self.drains.iter().filter(|drain| drain.nodes.contains(&key)).count();
        let edges = self.edges.values().filter(|edge| edge.child == Some(key)).count();
        refs + monitor + drains + edges
    }

    /// Edges to the node, without frozen edges of closed parents, which hold the node but are no
    /// parents.
    pub(super) fn parents(&self, key: Key) -> Vec<u32> {
        let is_used =
            |edge: &Edge| edge.parent.is_none_or(|parent| self.nodes.contains_key(&parent));
        let to = |edge: &&u32| self.edges[*edge].child == Some(key) && is_used(&self.edges[*edge]);
        self.edges.keys().filter(to).copied().collect()
    }

    /// Edges from the node.
    pub(super) fn children(&self, key: Key) -> Vec<u32> {
        let from = |edge: &&u32| self.edges[*edge].parent == Some(key);
        self.edges.keys().filter(from).copied().collect()
    }

    pub(super) fn child(&self, key: Key, name: &str) -> Option<u32> {
        self.children(key).into_iter().find(|edge| self.edges[edge].name == name)
    }

    /// Live nodes above.
    pub(super) fn parent_nodes(&self, key: Key) -> Vec<Key> {
        let parents = self.parents(key).into_iter().filter_map(|edge| self.edges[&edge].parent);
        parents.filter(|parent| self.is_live(*parent)).collect()
    }

    /// The node and all below it.
    pub(super) fn below(&self, key: Key) -> BTreeSet<Key> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![key];
        while let Some(key) = todo.pop() {
            if seen.insert(key) {
                todo.extend(self.children(key).iter().filter_map(|edge| self.edges[edge].child));
            }
        }
        seen
    }

    /// P35: sections on the node, sections of everything, drained children.
    pub(super) fn quiesce(&self, key: Key) -> usize {
        let drained =
            |edge: &u32| self.edges[edge].child.is_some_and(|child| self.quiesce(child) > 0);
        self.sections(key) + self.children(key).iter().filter(|edge| drained(edge)).count()
    }

    pub(super) fn sections(&self, key: Key) -> usize {
        self.drains.iter().filter(|drain| drain.is_all || drain.nodes.contains(&key)).count()
    }

    pub(super) fn transfer(&self, key: Key) -> u64 {
        let below = self.children(key).into_iter().filter_map(|edge| self.edges[&edge].child);
        let own = self.nodes[&key].transfer;
        let all = below.map(|child| self.transfer(child)).chain([own]);
        all.filter(|len| *len > 0).min().unwrap_or(0)
    }

    /// The node whose options it inherited, if that is above it.
    pub(super) fn inherits_from(&self, key: Key) -> Option<Key> {
        let parent = self.nodes[&key].inherits_from?;
        (self.is_live(parent) && self.below(parent).contains(&key)).then_some(parent)
    }

    /// The union of the parents' permissions, and the intersection of what they share.
    fn above(&self, key: Key) -> Access {
        let parents = self.parents(key);
        let all = parents.iter().map(|edge| self.edges[edge].access);
        all.fold(Access { perm: 0, shared: ALL }, |a, b| Access {
            perm: a.perm | b.perm,
            shared: a.shared & b.shared,
        })
    }

    /// Recomputes permissions of live nodes on their children, parents before children.
    pub(super) fn recompute(&mut self) {
        let mut done = BTreeSet::new();
        let live = self.live();
        while done.len() < live.len() {
            let ready = |key: &Key| {
                !done.contains(key) && self.parent_nodes(*key).iter().all(|p| done.contains(p))
            };
            let key = *live.iter().find(|key| ready(key)).expect("P17: no loops");
            let above = self.above(key);
            for edge in self.children(key) {
                let access = of_child(&self.nodes[&key], &self.edges[&edge], above);
                self.edges.get_mut(&edge).unwrap().access = access;
            }
            done.insert(key);
        }
    }

    /// True if this state is allowed (P24, P27, P47).
    pub(super) fn is_legal(&self) -> bool {
        self.live().into_iter().all(|key| self.is_legal_at(key))
    }

    fn is_legal_at(&self, key: Key) -> bool {
        let node = &self.nodes[&key];
        let uses: Vec<Access> = self.parents(key).iter().map(|e| self.edges[e].access).collect();
        let is_bearable = |(place, user): (usize, &Access)| {
            let others = uses.iter().enumerate().filter(|(other, _)| *other != place);
            others.map(|(_, other)| other.shared).all(|shared| user.perm & !shared == 0)
        };
        let may_write = !node.ro && node.is_active;
        let is_within = |user: &Access| {
            (user.perm & (WRITE | SAME | RESIZE) == 0 || may_write)
                && (user.perm & (WRITE | RESIZE) != WRITE || !node.has_odd_len)
        };
        let children = self.children(key);
        let are_children_fit = children.iter().all(|edge| {
            let edge = &self.edges[edge];
            let child = &self.nodes[&edge.child.expect("a node's edge leads somewhere")];
            (node.ro || edge.is_backing() || !child.ro) && (!node.is_active || child.is_active)
        });
        uses.iter().enumerate().all(is_bearable) && uses.iter().all(is_within) && are_children_fit
    }

    // ---- life and death

    /// Marks nodes without references as dead; their permissions below stay until they are closed.
    pub(super) fn mark_dead(&mut self) {
        for key in self.live() {
            if self.count(key) == 0 {
                self.nodes.get_mut(&key).unwrap().is_dead = true;
                self.graveyard.push(key);
            }
        }
    }

    /// Brings deaths and permissions up to date.
    pub(super) fn update(&mut self) {
        self.mark_dead();
        self.recompute();
    }

    pub(super) fn can_close(&self, key: Key) -> bool {
        let is_drained = |edge: &u32| self.quiesce(self.edges[edge].child.unwrap()) > 0;
        !self.drains.iter().any(|drain| drain.is_all) && !self.children(key).iter().any(is_drained)
    }

    pub(super) fn has_deferred(&self) -> bool {
        self.nodes.values().any(|node| node.is_deferred)
    }

    /// The model after a sweep.
    pub(super) fn swept(&self) -> Self {
        let mut swept = self.clone();
        swept.sweep();
        swept
    }

    /// Closes dead nodes, except those that write to drained nodes.
    pub(super) fn sweep(&mut self) {
        self.update();
        let (deferred, fresh) = std::mem::take(&mut self.graveyard)
            .into_iter()
            .partition(|key| self.nodes[key].is_deferred);
        self.graveyard = fresh;
        let mut todo: Vec<Key> = deferred;
        todo.reverse();
        let mut waiting = Vec::new();
        loop {
            let next = todo
                .pop()
                .or_else(|| (!self.graveyard.is_empty()).then(|| self.graveyard.remove(0)));
            let Some(key) = next else { break };
            if self.can_close(key) {
                self.close(key);
            } else {
                self.nodes.get_mut(&key).unwrap().is_deferred = true;
                waiting.push(key);
            }
        }
        self.graveyard = waiting;
    }

    /// Closes one node.
    pub(super) fn close(&mut self, key: Key) {
        let is_clean = self.closes_clean(key);
        self.graveyard.retain(|dead| *dead != key);
        let node = self.nodes.remove(&key).unwrap();
        if !is_clean {
            self.unclean.push(node.name);
        }
        self.closed.push(node.first_name);
        // A frozen edge is kept by its freeze guard.
        self.edges.retain(|_, edge| edge.parent != Some(key) || edge.frozen.is_some());
        self.update();
    }

    fn closes_clean(&self, key: Key) -> bool {
        let node = &self.nodes[&key];
        let is_left = |bitmap: &Bitmap| bitmap.leased || bitmap.name.is_none();
        if node.fail_close || node.bitmaps.iter().any(is_left) {
            return false;
        }
        if node.ro || !node.is_active {
            return true;
        }
        let is_lost = |edge: &u32| {
            let edge = &self.edges[edge];
            let child = edge.child.unwrap();
            // A child that dies too is flushed by its own close.
            let is_flushed = !edge.is_backing() && !self.nodes[&child].ro && self.count(child) > 1;
            is_flushed && self.nodes[&child].fail_flush
        };
        !node.fail_flush && !self.children(key).iter().any(is_lost)
    }
}

/// A node's use of a child, by the table of the contract.
fn of_child(node: &Node, edge: &Edge, above: Access) -> Access {
    let may_write = !node.ro && node.is_active;
    let harmless = READ | SAME;
    let mut access = match (node.kind, edge.is_backing()) {
        (_, true) => {
            let borne = if above.shared & WRITE != 0 { WRITE | RESIZE } else { 0 };
            Access { perm: above.perm & READ, shared: borne | harmless }
        }
        (Kind::Image, false) => {
            // Data and metadata: always reads, writes and resizes if it can, shares only reading
            // and unchanged writes.
            let perm = above.perm | READ | if may_write { WRITE | RESIZE } else { 0 };
            Access { perm, shared: harmless }
        }
        (_, false) => Access { perm: above.perm, shared: above.shared | harmless },
    };
    if !may_write {
        access.perm &= READ;
    }
    if !node.is_active {
        access.shared = ALL;
    }
    access
}
