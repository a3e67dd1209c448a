//! Roots: edges of those who are not nodes. A backend's moves with graph changes, a job's stays at its node.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use super::claims::Operations;
use super::edge::{Edge, EdgeParts, Parent};
use super::node::{Node, NodeId};
use super::perm::{self, Access, Strictness};
use super::transaction::Stage;
use super::{Graph, NodeRef};
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};

/// Who comes in.
#[derive(Clone, Debug)]
pub(crate) struct Root<'a> {
    pub(crate) kind: HolderKind,
    pub(crate) name: &'a str,
    pub(crate) access: Access,
    /// Do graph changes leave it where it is?
    pub(crate) stays: bool,
    /// Is it a backend's? Then its requests are counted, and its owner keeps the graph.
    pub(crate) is_backend: bool,
}

/// What a root must lead to for a change of it to make sense.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expected {
    /// Whatever it is.
    Anything,
    /// Nothing: somebody puts a medium in.
    Nothing,
    /// This very node: somebody takes it out.
    Node(NodeId),
}

/// A root that is to lead elsewhere, or nowhere.
#[derive(Debug)]
pub(crate) struct RootMove {
    pub(super) edge: Arc<Edge>,
    /// The edge's graph.
    pub(super) graph: Graph,
    pub(super) to: Option<NodeRef>,
    blockers: Operations,
    expected: Expected,
}

impl RootMove {
    /// Of an edge of this graph, unless [`Operations::EJECT`] is blocked on what it leads to.
    #[track_caller]
    pub(crate) fn new(graph: &Graph, edge: &Arc<Edge>, to: Option<&NodeRef>) -> Self {
        let (edge, graph, to) = (Arc::clone(edge), graph.clone(), NodeRef::clone_of(to));
        Self { edge, graph, to, blockers: Operations::EJECT, expected: Expected::Anything }
    }

    /// Only if it leads there.
    pub(crate) fn from(self, expected: Expected) -> Self {
        Self { expected, ..self }
    }

    /// Unless these are blocked, instead.
    pub(crate) fn unless(self, blockers: Operations) -> Self {
        Self { blockers, ..self }
    }

    /// The same, with its reference held otherwise.
    pub(super) fn held_by(self, take: impl FnOnce(NodeRef) -> NodeRef) -> Self {
        Self { to: self.to.map(take), ..self }
    }

    /// The former target, if the move is allowed from there.
    pub(super) fn check(&self, now: Option<&Node>) -> Result<()> {
        let refuse = |words: String| Err(Error::new(ErrorKind::InUse, words));
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
    /// A root edge to `node`, or to nothing yet. It ends when its last owner drops it.
    ///
    /// # Errors
    /// Nothing has changed: the permissions clash with others' (both are named), or the node cannot be written.
    #[track_caller]
    pub(crate) fn attach_root(&self, node: Option<&NodeRef>, root: &Root<'_>) -> Result<Arc<Edge>> {
        let parts = EdgeParts {
            name: "root",
            role: Role::empty(),
            access: root.access,
            holder: Holder::new(root.kind, root.name),
            since: Location::caller(),
            stays: root.stays,
            graph: (!root.is_backend).then(|| self.clone()),
            in_flight: root.is_backend.then(Arc::default),
        };
        let target = node.map(|node| Strong::clone(node.strong()));
        let edge = Edge::new(parts, target, &self.0.core.topology.loosened);
        edge.set_parent(Parent::Root(root.name.into()));
        if let Some(node) = node {
            let lock = self.0.core.lock();
            let mut stage = Stage::new(&self.0.core);
            stage.attach(None, &edge, node.strong())?;
            let accesses = perm::settle(&stage, stage.starts(), Strictness::Checked)?;
            perm::apply(&lock, accesses);
            lock.attach(node.node(), &edge);
        }
        Ok(edge)
    }

    /// The root does nothing with its node and bears everything from now on. At once, and cannot fail.
    pub(crate) fn loosen_root(&self, edge: &Edge) {
        let lock = self.0.core.lock();
        edge.set_access(&lock, Access::NONE);
        if let Some(node) = edge.medium() {
            self.0.core.topology.loosened.push(node.id());
            perm::loosen(&lock);
        }
    }

    /// A job's hold on a node: keeps it open, with permissions, and stays there whatever the graph becomes. For what a job reads
    /// and writes it uses a [`crate::request`] backend.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let read = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
    /// let job = graph.attach_job(&disk, "backup0", read)?;
    ///
    /// let writer = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
    /// let error = Backend::new(&disk, writer.clone()).unwrap_err();
    /// assert!(error.to_string().contains("which job 'backup0' does not allow"), "{error}");
    /// drop(job);
    /// Backend::new(&disk, writer)?;
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Nothing has changed: the permissions clash with others' (both are named), or the node cannot be written.
    #[track_caller]
    pub fn attach_job(&self, node: &NodeRef, job: &str, access: Access) -> Result<JobEdge> {
        let root =
            Root { kind: HolderKind::Job, name: job, access, stays: true, is_backend: false };
        let edge = self.attach_root(Some(node), &root)?;
        Ok(JobEdge { edge, graph: self.clone() })
    }
}

/// See [`Graph::attach_job`]. Dropping it gives the node up.
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
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let job = graph.attach_job(&disk, "backup0", Access::READ)?;
    /// drop(disk);
    /// assert_eq!(job.node().name(), "disk", "the job keeps it open");
    /// # Ok(()) });
    /// ```
    #[track_caller]
    pub fn node(&self) -> NodeRef {
        NodeRef::user(&self.graph, self.edge.target().strong().clone())
    }

    /// What the job does there, and lets others do.
    pub fn access(&self) -> Access {
        self.edge.access()
    }

    /// Asks for something else.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let job = graph.attach_job(&disk, "commit0", Access::READ)?;
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let guest = Backend::new(&disk, picky)?;
    ///
    /// let error = job.set_access(Access::ALL).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InUse);
    /// assert_eq!(job.access(), Access::READ, "nothing has changed");
    /// drop(guest);
    /// job.set_access(Access::ALL).await?;
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Nothing has changed: see [`Graph::attach_job`]. Asking for less cannot fail.
    pub async fn set_access(&self, access: Access) -> Result<()> {
        self.graph.change().set_access(&self.edge, access).commit().await.map(drop)
    }
}
