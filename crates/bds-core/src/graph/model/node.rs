//! Nodes: identity, a driver instance, children and parents, limits, flags and the request tracker.
//!
//! Identity (id, name, edges, count) belongs to the arena's slot and never moves. A node never owns
//! a handle to its graph, so only users keep the graph alive.
//!
//! Children change only in a graph change, of which there is one at a time. Parents change with the
//! edges of others, under a lock of the node's own, which is taken last of all and never held
//! across an await.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arc_swap::{ArcSwap, Guard};
use bds_refcount::Handle;

use super::blockers::{BlockOps, Blockers};
use super::edge::{Edge, ShowsLength};
use super::flags::{FlagsCell, Given};
use super::limits::{self, LimitsCell};
use super::name::NodeName;
use super::threshold::Threshold;
use crate::driver::{Driver, Limits, OpenFlags, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::bitmaps::list::{BitmapList, BitmapSlot};
use crate::tracker::{DetachedCount, RequestTracker};

/// Identifies a node: `Copy`, 64 bits, never reused. Keeps nothing alive and never dangles:
/// [`crate::graph::Graph::acquire`] turns it into a reference, or says why it cannot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) Handle<Node>);

impl NodeId {
    /// The id as an opaque number, never 0.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::NodeId;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let number = disk.id().to_u64(); // for a C program, or a log
    /// assert_eq!(graph.acquire(NodeId::from_u64(number))?.name(), "disk");
    /// assert!(graph.acquire(NodeId::from_u64(12345)).is_err());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
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

/// A node of the graph. Reached through a [`crate::graph::NodeRef`] or, on the I/O path, through an
/// edge.
pub struct Node {
    id: NodeId,
    driver: Box<dyn Driver>,
    driver_name: &'static str,
    flags: FlagsCell,
    /// Options that were given for this node itself: a reopen of the parent does not change them.
    given: Given,
    limits: LimitsCell,
    tracker: RequestTracker,
    /// Live copy-on-read guards.
    copy_on_read: AtomicUsize,
    /// (device, inode) of the file a protocol node holds.
    identity: Option<(u64, u64)>,
    /// Read by requests, changed by graph changes only.
    children: ArcSwap<Children>,
    above: Arc<Above>,
    /// Reasons to be drained. Changed under the topology lock only, as are the next fields.
    quiesce: AtomicU32,
    /// How many of them are drained sections of this node itself (the others come from below).
    sections: AtomicU32,
    is_active: AtomicBool,
    /// The node whose options it inherited, while that is still above it; 0 for none.
    inherits_from: AtomicU64,
    is_poisoned: AtomicBool,
    pub(super) blockers: Blockers,
    pub(in crate::graph) bitmaps: BitmapList,
    pub(super) threshold: Threshold,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {})", self.name(), self.driver_name)
    }
}

/// The part of a node that is reached from below, by the edges to its children: who shows the
/// length of a node that is going to be resized?
struct Above {
    name: NodeName,
    /// Edges that point here. Owned by their parents, so dead entries are removed in passing.
    parents: Mutex<Vec<Weak<Edge>>>,
    bitmaps: BitmapSlot,
}

impl Above {
    fn lock_parents(&self) -> MutexGuard<'_, Vec<Weak<Edge>>> {
        self.parents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parents(&self) -> Vec<Arc<Edge>> {
        self.lock_parents().iter().filter_map(Weak::upgrade).collect()
    }
}

impl ShowsLength for Above {
    fn check_resize(&self, len: u64) -> Result<()> {
        self.bitmaps.check_resize(len).map_err(|error| error.node(self.name.as_str()))?;
        for edge in self.parents() {
            if let Some(shown) = edge.shown_by() {
                shown.check_resize(len)?;
            }
        }
        Ok(())
    }
}

/// Arguments of [`Node::new`].
pub(crate) struct NodeParts {
    pub(crate) id: NodeId,
    pub(crate) name: Arc<str>,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) flags: OpenFlags,
    pub(crate) given: Given,
    pub(crate) identity: Option<(u64, u64)>,
    pub(crate) children: Children,
    pub(crate) detached: Arc<DetachedCount>,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Self {
        let NodeParts { id, name, driver, mut flags, given, identity, children, detached } = parts;
        // With auto-read-only a file may have been opened read-only; then the node is read-only
        // too.
        let is_stuck = |edge: &Arc<Edge>| edge.holds_bytes() && !edge.target().could_write();
        flags.read_only |= children.iter().any(is_stuck);
        let bitmaps = BitmapList::default();
        let above = Arc::new(Above {
            name: NodeName::new(name),
            parents: Mutex::default(),
            bitmaps: bitmaps.slot(),
        });
        for edge in children.iter().filter(|edge| edge.role().contains(Role::FILTERED)) {
            let above: Arc<dyn ShowsLength> = above.clone();
            edge.set_shown_by(&above);
        }
        let node = Self {
            id,
            driver_name: driver.name(),
            flags: FlagsCell::new(flags),
            given,
            limits: LimitsCell::new(driver.limits()),
            tracker: RequestTracker::counted_in(detached),
            copy_on_read: AtomicUsize::new(0),
            identity,
            children: ArcSwap::from_pointee(children),
            above,
            quiesce: AtomicU32::new(0),
            sections: AtomicU32::new(0),
            is_active: AtomicBool::new(true),
            inherits_from: AtomicU64::new(0),
            is_poisoned: AtomicBool::new(false),
            blockers: Blockers::default(),
            bitmaps,
            threshold: Threshold::default(),
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
        self.above.name.as_str()
    }

    pub(in crate::graph) fn name_arc(&self) -> Arc<str> {
        self.above.name.as_arc()
    }

    pub(in crate::graph) fn names(&self) -> &NodeName {
        &self.above.name
    }

    /// Its driver's name ("qcow2").
    pub fn driver_name(&self) -> &'static str {
        self.driver_name
    }

    /// Length in bytes as a reader sees it.
    pub fn len(&self) -> u64 {
        self.driver.len()
    }

    /// True if the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flags in force.
    #[inline]
    pub fn flags(&self) -> OpenFlags {
        self.flags.load()
    }

    pub(in crate::graph) fn set_flags(&self, flags: OpenFlags) {
        self.flags.store(flags);
    }

    pub(in crate::graph) fn given(&self) -> Given {
        self.given
    }

    /// May it be written now?
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.could_write() && self.is_active()
    }

    /// Was it opened for writing? An inactive node cannot be written even so.
    #[inline]
    pub fn could_write(&self) -> bool {
        !self.flags.is_read_only() && !self.driver.is_read_only()
    }

    /// Is it active? An inactive node is only read, while another process writes.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.is_active.load(Ordering::Relaxed)
    }

    pub(in crate::graph) fn set_active(&self, is_active: bool) {
        self.is_active.store(is_active, Ordering::Relaxed);
    }

    /// Was it poisoned? See [`crate::graph::NodeRef::poison`].
    #[inline]
    pub fn is_poisoned(&self) -> bool {
        self.is_poisoned.load(Ordering::Relaxed)
    }

    pub(in crate::graph) fn set_poisoned(&self) {
        self.is_poisoned.store(true, Ordering::SeqCst);
        self.tracker.give_up();
    }

    /// The node whose options it inherited, while that is still above it.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let file = graph.find("#block001")?;
    /// assert_eq!(file.inherits_from(), Some(top.id()));
    /// assert_eq!(base.inherits_from(), None, "it was opened for itself");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn inherits_from(&self) -> Option<NodeId> {
        let bits = self.inherits_from.load(Ordering::Relaxed);
        (bits != 0).then(|| NodeId::from_u64(bits))
    }

    pub(in crate::graph) fn set_inherits_from(&self, id: Option<NodeId>) {
        self.inherits_from.store(id.map_or(0, NodeId::to_u64), Ordering::Relaxed);
    }

    /// `parent` is not above this node any more.
    pub(in crate::graph) fn clear_inherits_from(&self, parent: NodeId) {
        let (known, none) = (parent.to_u64(), 0);
        // Err: it inherits from another node, or none.
        let _ =
            self.inherits_from.compare_exchange(known, none, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Limits of requests: the driver's, narrowed by the children's.
    #[inline]
    pub fn limits(&self) -> Limits {
        self.limits.load()
    }

    /// The driver. Called by the request path, and by the graph for closing and changes.
    #[inline]
    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// The requests inside.
    #[inline]
    pub(crate) fn tracker(&self) -> &RequestTracker {
        &self.tracker
    }

    /// Does a read copy data of the backing node into this node?
    #[inline]
    pub fn copies_on_read(&self) -> bool {
        self.copy_on_read.load(Ordering::Relaxed) != 0
    }

    /// The number of copy-on-read guards. Changed by the guards only.
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

    /// The filtered child.
    pub(crate) fn filtered_child(&self) -> Option<Arc<Edge>> {
        self.child_in_role(Role::FILTERED)
    }

    /// (device, inode) of the file that this node itself holds, if any.
    pub(crate) fn own_identity(&self) -> Option<(u64, u64)> {
        self.identity
    }

    /// The name of the file that this node itself holds, if any.
    pub(crate) fn own_filename(&self) -> Option<PathBuf> {
        self.driver.filename()
    }

    /// Exchanges the list of children. Only in a graph change, with the node drained.
    pub(crate) fn set_children(&self, children: Children) {
        self.children.store(Arc::new(children));
    }

    /// The edges that point here now.
    pub(crate) fn parents(&self) -> Vec<Arc<Edge>> {
        self.above.parents()
    }

    /// Adds a parent edge. See `LockedGraph::attach`.
    pub(in crate::graph) fn add_parent(&self, edge: &Arc<Edge>) {
        let mut parents = self.above.lock_parents();
        // Dead entries are removed whenever the list would have to grow: constant time on average.
        if parents.len() == parents.capacity() {
            parents.retain(|known| known.strong_count() > 0);
        }
        parents.push(Arc::downgrade(edge));
    }

    /// Removes a parent edge. See `LockedGraph::detach`.
    pub(in crate::graph) fn remove_parent(&self, edge: &Arc<Edge>) {
        self.above.lock_parents().retain(|known| known.as_ptr() != Arc::as_ptr(edge));
    }

    /// The number of reasons to be drained.
    pub(in crate::graph) fn quiesce_count(&self) -> u32 {
        self.quiesce.load(Ordering::SeqCst)
    }

    /// Returns the count before.
    pub(in crate::graph) fn add_quiesce(&self, count: u32) -> u32 {
        self.quiesce.fetch_add(count, Ordering::SeqCst)
    }

    /// Returns the count after.
    pub(in crate::graph) fn remove_quiesce(&self, count: u32) -> u32 {
        let before = self.quiesce.fetch_sub(count, Ordering::SeqCst);
        debug_assert!(before >= count, "a drain ended that had not begun");
        before.wrapping_sub(count)
    }

    /// Drained sections of this node itself.
    pub(in crate::graph) fn sections(&self) -> u32 {
        self.sections.load(Ordering::SeqCst)
    }

    pub(in crate::graph) fn begin_section(&self) {
        self.sections.fetch_add(1, Ordering::SeqCst);
    }

    pub(in crate::graph) fn end_section(&self) {
        self.sections.fetch_sub(1, Ordering::SeqCst);
    }

    /// Checks that no [`crate::graph::Blocker`] blocks this operation.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BlockOps;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let blocker = disk.block(BlockOps::RESIZE, "a backup runs");
    /// disk.check_allowed(BlockOps::EJECT)?;
    /// let error = disk.check_allowed(BlockOps::RESIZE).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': resize is not possible now: a backup runs");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InUse` with the first reason.
    pub fn check_allowed(&self, operation: BlockOps) -> Result<()> {
        match self.blocked(operation).into_iter().next() {
            None => Ok(()),
            Some(reason) => {
                let message = format!("{operation} is not possible now: {reason}");
                Err(Error::new(ErrorKind::InUse, message).node(self.name()))
            }
        }
    }

    /// The reasons why any of these operations is blocked.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BlockOps;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let one = disk.block(BlockOps::RESIZE, "a backup runs");
    /// let two = disk.block(BlockOps::RESIZE | BlockOps::DELETE, "it is exported");
    /// let reasons = disk.blocked(BlockOps::all());
    /// assert_eq!((reasons.len(), &*reasons[1]), (2, "it is exported"));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn blocked(&self, operations: BlockOps) -> Vec<Arc<str>> {
        self.blockers.reasons(operations)
    }

    /// The job whose main node this is.
    pub fn job(&self) -> Option<Arc<str>> {
        self.blockers.job()
    }

    /// Marks a range that a request has changed, or may have changed, in the node's bitmaps. Called
    /// after the driver is done and the write was counted, before its completion is reported.
    #[inline]
    pub(crate) fn record_change(&self, range: &Range<u64>) {
        self.bitmaps.record(range, || self.len());
    }

    /// Whether a bitmap of the node is read-only: then writes are refused.
    #[inline]
    pub(crate) fn has_readonly_bitmap(&self) -> bool {
        self.bitmaps.is_readonly()
    }

    /// The error of such a write.
    #[cold]
    pub(crate) fn refuse_write_for_bitmap(&self) -> Result<()> {
        self.bitmaps.refuse_write()
    }

    /// Whether the node has a persistent bitmap, stored in its image or not yet.
    pub(crate) fn has_persistent_bitmaps(&self) -> bool {
        self.bitmaps.has_persistent()
    }

    /// Makes persistent bitmaps read-only, or not, whatever the node is.
    #[cfg(test)]
    pub(crate) fn set_bitmaps_readonly(&self, is_readonly: bool) {
        self.bitmaps.set_readonly(is_readonly);
    }

    /// Checks that the bitmaps of this node, and of the filters above that show its length, can
    /// follow it to this length.
    pub(crate) fn check_bitmaps_resize(&self, len: u64) -> Result<()> {
        self.above.check_resize(len)
    }

    /// The length has changed, or may have: bitmaps follow. No request to what lies behind the
    /// shorter of both lengths is in flight.
    pub(crate) fn follow_len(&self) {
        self.bitmaps.follow(|| self.len());
    }

    /// The write threshold in bytes; beyond every write if there is none.
    #[inline]
    pub(crate) fn write_threshold_or_max(&self) -> u64 {
        self.threshold.bytes_or_max()
    }

    /// A write is going to end at `end`, beyond the threshold as it was a moment ago.
    #[cold]
    pub(crate) fn pass_threshold(&self, end: u64) {
        self.threshold.pass(end, self.name());
    }

    /// Recomputes the limits from the driver and the children. True if anything changed.
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
