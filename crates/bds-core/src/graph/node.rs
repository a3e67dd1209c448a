//! A node: identity, a driver's instance, and who is inside.
//!
//! Identity (id, name, edges in, count) belongs to the arena's slot and never moves; the driver is content. A node never
//! owns a handle to its graph, so nothing keeps the graph alive but its users.
//!
//! Children change only in a graph change, of which there is one at a time; parents come and go with the edges of others, under a
//! lock of the node's own. It is taken last of all and never held across an await.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::{ArcSwap, Guard};
use bds_refcount::Handle;

use super::edge::Edge;
use super::limits::{self, LimitsCell};
use crate::driver::{Driver, Limits, OpenFlags, Role};
use crate::traffic::Traffic;

/// Names a node for ever: `Copy`, 64 bits, keeps nothing alive, never dangles. [`super::Graph::acquire`] is the only
/// way from here to the node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) Handle<Node>);

impl NodeId {
    /// The id as an opaque number, never 0.
    pub fn to_u64(self) -> u64 {
        self.0.to_u64()
    }

    /// Any number as an id; one that no graph gave out resolves nowhere.
    pub fn from_u64(bits: u64) -> Self {
        Self(Handle::from_u64(bits))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({})", self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The edges to a node's children, in the order in which its driver opened them.
pub(crate) type Children = Vec<Arc<Edge>>;

/// A node of the graph. Reached through a [`super::NodeRef`] or, on the I/O path, through an edge.
pub struct Node {
    id: NodeId,
    name: Arc<str>,
    driver: Box<dyn Driver>,
    driver_name: &'static str,
    flags: OpenFlags,
    limits: LimitsCell,
    traffic: Traffic,
    /// Guards that ask for copy-on-read.
    copy_on_read: AtomicUsize,
    /// (device, inode) of the file a protocol node holds.
    identity: Option<(u64, u64)>,
    /// Read by requests, changed by graph changes only.
    children: ArcSwap<Children>,
    /// Edges that point here. They are owned by their parents, so dead ones are struck off in passing.
    parents: Mutex<Parents>,
}

/// The edges into a node, and how often their gates are closed on its behalf. An edge that comes takes part, one
/// that goes takes its share along, so gates and count always agree.
#[derive(Default)]
struct Parents {
    edges: Vec<Weak<Edge>>,
    drains: u32,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {})", self.name, self.driver_name)
    }
}

/// What a node is made of.
pub(crate) struct NodeParts {
    pub(crate) id: NodeId,
    pub(crate) name: Arc<str>,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) flags: OpenFlags,
    pub(crate) identity: Option<(u64, u64)>,
    pub(crate) children: Children,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Self {
        let NodeParts { id, name, driver, mut flags, identity, children } = parts;
        // With auto-read-only a file may have turned out read-only, and then so is what lies in it.
        let holds = Role::DATA | Role::METADATA | Role::FILTERED;
        let is_stuck =
            |edge: &Arc<Edge>| edge.role().intersects(holds) && !edge.target().is_writable();
        flags.read_only |= children.iter().any(is_stuck);
        let node = Self {
            id,
            name,
            driver_name: driver.name(),
            flags,
            limits: LimitsCell::new(driver.limits()),
            traffic: Traffic::new(),
            copy_on_read: AtomicUsize::new(0),
            identity,
            children: ArcSwap::from_pointee(children),
            parents: Mutex::default(),
            driver,
        };
        node.refresh_limits();
        node
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The node's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver's name ("qcow2").
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// Length in bytes as a reader sees it.
    pub fn len(&self) -> u64 {
        self.driver.len()
    }

    /// True if the node holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How it was opened.
    pub fn flags(&self) -> OpenFlags {
        self.flags
    }

    /// May it be written?
    pub fn is_writable(&self) -> bool {
        !self.flags.read_only && !self.driver.is_read_only()
    }

    /// What requests to it must look like, narrowed by its children's.
    #[inline]
    pub fn limits(&self) -> Limits {
        self.limits.load()
    }

    /// The driver. Calling it is the corridor's business (and, for closing and graph changes, the graph's).
    #[inline]
    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Who is inside.
    #[inline]
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Does a read copy what it finds below into this node?
    #[inline]
    pub fn copies_on_read(&self) -> bool {
        self.copy_on_read.load(Ordering::Relaxed) != 0
    }

    /// How many ask for copy-on-read. Changed by their guards only.
    pub(crate) fn copy_on_read(&self) -> &AtomicUsize {
        &self.copy_on_read
    }

    /// The edges to the children. Lock-free.
    #[inline]
    pub(crate) fn children(&self) -> Guard<Arc<Children>> {
        self.children.load()
    }

    /// The edge to the child of this name.
    pub(crate) fn child(&self, name: &str) -> Option<Arc<Edge>> {
        self.children().iter().find(|edge| edge.name() == name).cloned()
    }

    /// The edge to the child that has one of these roles.
    pub(crate) fn child_in_role(&self, role: Role) -> Option<Arc<Edge>> {
        self.children().iter().find(|edge| edge.role().intersects(role)).cloned()
    }

    /// The backing child.
    pub(crate) fn cow_child(&self) -> Option<Arc<Edge>> {
        self.child_in_role(Role::COW)
    }

    /// The child that a filter shows.
    pub(crate) fn filtered_child(&self) -> Option<Arc<Edge>> {
        self.child_in_role(Role::FILTERED)
    }

    /// (device, inode) of the file this very node holds, if it holds one.
    pub(crate) fn own_identity(&self) -> Option<(u64, u64)> {
        self.identity
    }

    /// The name of the file this very node holds, if it holds one.
    pub(crate) fn own_filename(&self) -> Option<PathBuf> {
        self.driver.filename()
    }

    /// Exchanges the list of children. Only in a graph change, with nobody inside.
    pub(crate) fn set_children(&self, children: Children) {
        self.children.store(Arc::new(children));
    }

    /// The edges that point here now.
    pub(crate) fn parents(&self) -> Vec<Arc<Edge>> {
        self.lock_parents().edges.iter().filter_map(Weak::upgrade).collect()
    }

    /// An edge points here from now on. While the node is drained its gate is closed.
    pub(crate) fn add_parent(&self, edge: &Arc<Edge>) {
        let mut parents = self.lock_parents();
        parents.edges.retain(|known| known.strong_count() > 0);
        (0..parents.drains).for_each(|_| edge.close());
        parents.edges.push(Arc::downgrade(edge));
    }

    /// An edge does not point here any more.
    pub(crate) fn remove_parent(&self, edge: &Arc<Edge>) {
        let mut parents = self.lock_parents();
        let before = parents.edges.len();
        parents.edges.retain(|known| known.as_ptr() != Arc::as_ptr(edge));
        if parents.edges.len() < before {
            (0..parents.drains).for_each(|_| edge.open());
        }
    }

    pub(super) fn close_gates(&self) {
        let mut parents = self.lock_parents();
        parents.drains += 1;
        parents.edges.iter().filter_map(Weak::upgrade).for_each(|edge| edge.close());
    }

    pub(super) fn open_gates(&self) {
        let mut parents = self.lock_parents();
        parents.drains -= 1;
        parents.edges.iter().filter_map(Weak::upgrade).for_each(|edge| edge.open());
    }

    fn lock_parents(&self) -> MutexGuard<'_, Parents> {
        self.parents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the driver and the children again. True if anything changed.
    pub(crate) fn refresh_limits(&self) -> bool {
        let data = Role::DATA | Role::COW | Role::FILTERED;
        let mut merged = self.driver.limits();
        for edge in self.children().iter().filter(|edge| edge.role().intersects(data)) {
            merged = limits::merge(merged, edge.target().limits());
        }
        let merged = limits::sane(merged);
        let changed = merged != self.limits();
        self.limits.store(merged);
        changed
    }
}
