//! Root edges: nodes used by backends, jobs and exports. A backend's edge moves with graph changes,
//! a job's is fixed.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use crate::driver::Access;
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::change::perm::{self, Strictness};
use crate::graph::change::stage::Stage;
use crate::graph::model::blockers::BlockOps;
use crate::graph::model::edge::{Edge, EdgeParts, Parent};
use crate::graph::model::node::{Node, NodeId};
use crate::graph::{Graph, NodeRef};

/// Arguments of [`Graph::attach_root`].
#[derive(Clone, Debug)]
pub(crate) struct Root<'a> {
    pub(crate) kind: HolderKind,
    pub(crate) name: &'a str,
    pub(crate) access: Access,
    /// Do graph changes leave it where it is?
    pub(crate) is_fixed: bool,
    /// Is it a backend's? Then its requests are counted, and its owner keeps the graph.
    pub(crate) is_backend: bool,
}

/// The target that a root must have for a move to make sense.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// Any.
    Anything,
    /// None: a medium is inserted.
    Nothing,
    /// This node: it is ejected.
    Node(NodeId),
}

/// A staged move of a root to another node, or to none.
#[derive(Debug)]
pub(crate) struct RootMove {
    pub(in crate::graph) edge: Arc<Edge>,
    /// The edge's graph.
    pub(in crate::graph) graph: Graph,
    pub(in crate::graph) to: Option<NodeRef>,
    blockers: BlockOps,
    expected: Expected,
}

impl RootMove {
    /// A move, refused if [`BlockOps::EJECT`] is blocked on the current target.
    #[track_caller]
    pub(crate) fn new(graph: &Graph, edge: &Arc<Edge>, to: Option<&NodeRef>) -> Self {
        let (edge, graph, to) = (Arc::clone(edge), graph.clone(), NodeRef::clone_of(to));
        Self { edge, graph, to, blockers: BlockOps::EJECT, expected: Expected::Anything }
    }

    /// Refused unless the current target is this.
    pub(crate) fn from(self, expected: Expected) -> Self {
        Self { expected, ..self }
    }

    /// Refused if these are blocked, instead.
    pub(crate) fn unless(self, blockers: BlockOps) -> Self {
        Self { blockers, ..self }
    }

    /// Changes how the reference is held.
    pub(in crate::graph) fn held_by(self, take: impl FnOnce(NodeRef) -> NodeRef) -> Self {
        Self { to: self.to.map(take), ..self }
    }

    /// Checks that the move is allowed from the current target.
    pub(in crate::graph) fn check(&self, now: Option<&Node>) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::InUse, message));
        let holder = self.edge.holder();
        match (self.expected, now) {
            (Expected::Nothing, Some(now)) => {
                let name = now.name();
                refuse(format!("{holder} has the medium '{name}': eject it first, or replace it"))
            }
            (Expected::Node(id), Some(now)) if now.id() != id => {
                refuse(format!("{holder} has another medium by now, '{}'", now.name()))
            }
            (Expected::Node(_), None) => refuse(format!("the medium of {holder} is out already")),
            (_, Some(now)) if !self.blockers.is_empty() => now.check_allowed(self.blockers),
            _ => Ok(()),
        }
    }
}

impl Graph {
    /// Makes a root edge to `node`, or to nothing yet. It ends when its last owner drops it.
    ///
    /// # Errors
    /// Nothing has changed: the permissions clash with others' (both are named), or the node cannot
    /// be written.
    #[track_caller]
    pub(crate) fn attach_root(&self, node: Option<&NodeRef>, root: &Root<'_>) -> Result<Arc<Edge>> {
        let parts = EdgeParts {
            name: "root",
            role: Role::empty(),
            access: root.access,
            holder: Holder::new(root.kind, root.name),
            since: Location::caller(),
            is_fixed: root.is_fixed,
            keep_alive: (!root.is_backend).then(|| self.keep_alive()),
            backend_in_flight: root.is_backend.then(Arc::default),
        };
        let target = node.map(|node| Strong::clone(node.strong()));
        let edge = Edge::new(parts, target, &self.0.core.topology.stale_perms);
        edge.set_parent(Parent::Root(root.name.into()));
        if let Some(node) = node {
            let lock = self.0.core.lock();
            let mut stage = Stage::new(&self.0.core.arena);
            stage.attach(None, &edge, node.strong())?;
            let accesses = perm::compute(&stage, stage.starts(), Strictness::Checked)?;
            perm::apply(&lock, accesses);
            lock.attach(node.node(), &edge);
        }
        Ok(edge)
    }

    /// Drops all permissions of the root, and shares all. At once, and cannot fail.
    pub(crate) fn release_root_access(&self, edge: &Edge) {
        let lock = self.0.core.lock();
        edge.set_access(&lock, Access::NONE);
        if let Some(node) = edge.medium() {
            self.0.core.topology.stale_perms.push(node.id());
            perm::recompute_stale(&lock);
        }
    }

    /// Lets a job use a node: keeps it open, with permissions; graph changes leave the edge in
    /// place. To read and write, the job uses a [`crate::request`] backend.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::{Access, Perm};
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let read = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
    /// let job = graph.attach_job(&disk, "backup0", read)?;
    ///
    /// let writer = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
    /// let error = Backend::new(&disk, writer.clone()).unwrap_err();
    /// assert!(error.to_string().contains("which job 'backup0' does not allow"), "{error}");
    /// drop(job);
    /// Backend::new(&disk, writer)?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed: the permissions clash with others' (both are named), or the node cannot
    /// be written.
    #[track_caller]
    pub fn attach_job(&self, node: &NodeRef, job: &str, access: Access) -> Result<JobEdge> {
        let root =
            Root { kind: HolderKind::Job, name: job, access, is_fixed: true, is_backend: false };
        let edge = self.attach_root(Some(node), &root)?;
        Ok(JobEdge { edge, graph: self.clone() })
    }
}

/// A job's edge: see [`Graph::attach_job`]. Dropping it releases the node.
pub struct JobEdge {
    edge: Arc<Edge>,
    graph: Graph,
}

impl fmt::Debug for JobEdge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobEdge({})", self.edge.target().name())
    }
}

impl JobEdge {
    /// The node.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::Access;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let job = graph.attach_job(&disk, "backup0", Access::READ)?;
    /// drop(disk);
    /// assert_eq!(job.node().name(), "disk", "the job keeps it open");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[track_caller]
    pub fn node(&self) -> NodeRef {
        NodeRef::user(&self.graph, self.edge.target().strong().clone())
    }

    /// The permissions that the job uses, and those it shares.
    pub fn access(&self) -> Access {
        self.edge.access()
    }

    /// Changes the permissions.
    ///
    /// ```
    /// use bds_core::graph::{Access, Perm};
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let job = graph.attach_job(&disk, "commit0", Access::READ)?;
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let guest = Backend::new(&disk, picky)?;
    ///
    /// let error = job.set_access(Access::ALL).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InUse);
    /// assert_eq!(job.access(), Access::READ, "nothing has changed");
    /// drop(guest);
    /// job.set_access(Access::ALL).await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed: see [`Graph::attach_job`]. Asking for less cannot fail.
    pub async fn set_access(&self, access: Access) -> Result<()> {
        self.graph.change().set_access(&self.edge, access).commit().await.map(drop)
    }
}
