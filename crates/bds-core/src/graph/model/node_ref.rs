//! `NodeRef`: a counted reference to a node, with a holder name.

use std::fmt;
use std::ops::Deref;
use std::panic::Location;

use crate::holder_kind::HolderKind;
use bds_refcount::{Held, Holder, Release, Strong};

use super::blockers::{BlockOps, Blocker, JobSlot};
use super::node::{Node, NodeId};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;

/// Keeps a node open. Clone takes another reference, drop gives it up; neither does I/O nor blocks.
///
/// ```
/// use bds_core::Options;
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
/// let second = disk.clone();
/// drop(disk);
/// assert_eq!(graph.find("disk")?.id(), second.id(), "still open");
/// drop(second);
/// assert!(graph.find("disk").is_err(), "ended by its last reference");
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct NodeRef {
    held: Held<Node>,
    graph: Graph,
}

impl fmt::Debug for NodeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeRef({} {})", self.name(), self.id())
    }
}

impl NodeRef {
    #[track_caller]
    pub(crate) fn new(graph: &Graph, strong: Strong<Node>, holder: Holder) -> Self {
        Self { held: strong.held_by(holder), graph: graph.clone() }
    }

    #[track_caller]
    pub(crate) fn user(graph: &Graph, strong: Strong<Node>) -> Self {
        Self::new(graph, strong, Holder::new(HolderKind::User, "reference"))
    }

    #[track_caller]
    pub(crate) fn iterator(graph: &Graph, strong: Strong<Node>) -> Self {
        Self::new(graph, strong, Holder::new(HolderKind::Iterator, "walk"))
    }

    /// Gives the reference another holder name, for "in use" messages and leak reports.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::{Holder, HolderKind};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let disk = disk.held_as(Holder::new(HolderKind::User, "snapshot tool"));
    /// assert_eq!(disk.count(), 1, "the same reference");
    ///
    /// let error = graph.change().remove(disk.clone()).commit().await.unwrap_err();
    /// assert!(error.to_string().contains("in use by user 'snapshot tool'"), "{error}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[must_use]
    #[track_caller]
    pub fn held_as(self, holder: Holder) -> Self {
        Self { held: self.held.pass_to(holder), graph: self.graph }
    }

    /// As [`NodeRef::held_as`], but keeps the place where the caller took the reference.
    pub(in crate::graph) fn reheld_as(self, holder: Holder) -> Self {
        let since = self.held.since();
        Self { held: self.held.pass_since(holder, since), graph: self.graph }
    }

    /// The place in the program that took it.
    pub(in crate::graph) fn since(&self) -> &'static Location<'static> {
        self.held.since()
    }

    /// Clones an optional reference. (`Option::cloned` would be recorded as the place that took
    /// it.)
    #[track_caller]
    pub(in crate::graph) fn clone_of(node: Option<&Self>) -> Option<Self> {
        let node = node?;
        Some(node.clone())
    }

    /// The node's id.
    pub fn id(&self) -> NodeId {
        self.node().id()
    }

    /// How many references the node has, this one included. For diagnostics: outdated on return.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let second = disk.clone();
    /// assert_eq!(disk.count(), 2);
    /// drop(second);
    /// assert_eq!(disk.count(), 1);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn count(&self) -> usize {
        self.held.count()
    }

    /// The graph it belongs to.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Drops the reference. [`Release::Last`]: it was the last one; the node is unpublished and
    /// waits to be closed.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::Release;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let (id, second) = (disk.id(), disk.clone());
    /// assert_eq!(second.release(), Release::NotLast);
    /// assert!(graph.acquire(id).is_ok());
    ///
    /// assert_eq!(disk.release(), Release::Last);
    /// assert!(graph.acquire(id).is_err(), "at once, though it is closed later");
    /// assert!(graph.find("disk").is_err());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn release(self) -> Release {
        self.held.release()
    }

    /// Blocks these operations, with a reason, until the guard is dropped. Several guards may block
    /// the same operation.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BlockOps;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// graph.add(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let blocker = graph.find("disk")?.block(BlockOps::DELETE, "a backup runs");
    /// let error = graph.del("disk").await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': delete is not possible now: a backup runs");
    /// drop(blocker); // allowed again, and it kept no reference
    /// graph.del("disk").await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn block(&self, operations: BlockOps, reason: &str) -> Blocker {
        self.node().blockers.block(operations, reason)
    }

    /// Takes the slot for the one job on this node.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let slot = disk.claim_job("backup0")?;
    /// assert_eq!(disk.job().as_deref(), Some("backup0"));
    /// let error = disk.claim_job("mirror0").unwrap_err();
    /// assert_eq!(error.message(), "job 'backup0' works on it: wait for it, or cancel it");
    /// drop(slot);
    /// disk.claim_job("mirror0")?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InUse` names the job that holds it.
    pub fn claim_job(&self, job: &str) -> Result<JobSlot> {
        self.node().blockers.claim_job(job).map_err(|other| {
            let message = format!("job '{other}' works on it: wait for it, or cancel it");
            Error::new(ErrorKind::InUse, message).node(self.name())
        })
    }

    /// Sets the write threshold: the first write that ends beyond this many bytes emits
    /// [`Event::WriteThreshold`](crate::event::Event::WriteThreshold) and turns the threshold off.
    /// `None` or zero turns it off. It is checked when the write arrives, before it is done; zero
    /// writes and writes of parents inside the graph count, a change of length does not.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// disk.set_write_threshold(Some(512 << 10));
    /// assert_eq!(disk.write_threshold(), Some(512 << 10));
    /// disk.set_write_threshold(None);
    /// assert_eq!(disk.write_threshold(), None);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn set_write_threshold(&self, bytes: Option<u64>) {
        self.node().threshold.set(bytes, self.graph().event_hub());
    }

    /// The write threshold, if one is set and was not passed yet: QEMU's `write_threshold`.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::WriteFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let mut events = graph.events();
    /// disk.set_write_threshold(Some(4096));
    /// guest.write(4000, bds_io::Buf::zeroed(512, 512).iov(), WriteFlags::empty()).await?;
    ///
    /// let event = events.try_next().expect("it went 416 bytes past it");
    /// assert_eq!(event.to_json()["data"]["amount-exceeded"], 416);
    /// assert_eq!(disk.write_threshold(), None, "one event");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn write_threshold(&self) -> Option<u64> {
        self.node().threshold.get()
    }

    pub(in crate::graph) fn from_held(graph: &Graph, held: Held<Node>) -> Self {
        Self { held, graph: graph.clone() }
    }

    #[track_caller]
    pub(in crate::graph) fn change(graph: &Graph, strong: Strong<Node>) -> Self {
        Self::new(graph, strong, Holder::new(HolderKind::Change, "change"))
    }

    pub(in crate::graph) fn into_parts(self) -> (Graph, Held<Node>) {
        (self.graph, self.held)
    }

    pub(crate) fn node(&self) -> &Node {
        &self.held
    }

    pub(crate) fn strong(&self) -> &Strong<Node> {
        &self.held
    }
}

impl Deref for NodeRef {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.held
    }
}

impl Clone for NodeRef {
    #[track_caller]
    fn clone(&self) -> Self {
        Self { held: self.held.clone(), graph: self.graph.clone() }
    }
}
