//! Roots: edges of those who are not nodes. A backend's moves with graph changes, a job's stays at its node.

use std::fmt;
use std::sync::Arc;

use bds_refcount::{Holder, HolderKind, Strong};

use super::edge::{Edge, EdgeParts, Parent};
use super::perm::{self, Access, Strictness};
use super::transaction::Stage;
use super::{Graph, NodeRef};
use crate::driver::Role;
use crate::error::Result;

/// Who comes in.
#[derive(Clone, Debug)]
pub(crate) struct Root<'a> {
    pub(crate) kind: HolderKind,
    pub(crate) name: &'a str,
    pub(crate) access: Access,
    /// Do graph changes leave it where it is?
    pub(crate) stays: bool,
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
            stays: root.stays,
            graph: Some(self.clone()),
        };
        let target = node.map(|node| Strong::clone(node.strong()));
        let edge = Edge::new(parts, target, &self.0.reaper.topology.loosened);
        edge.set_parent(Parent::Root(root.name.into()));
        if let Some(node) = node {
            let walls = self.0.reaper.walls();
            let mut stage = Stage::new(&self.0.reaper);
            stage.attach(None, &edge, node.strong())?;
            let accesses = perm::settle(&stage, stage.starts(), Strictness::Checked)?;
            perm::apply(&walls, accesses);
            walls.attach(node.node(), &edge);
        }
        Ok(edge)
    }

    /// A job's hold on a node: keeps it open, with permissions, and stays there whatever the graph becomes. For what a job reads
    /// and writes it uses a [`crate::request`] backend.
    ///
    /// # Errors
    /// Nothing has changed: the permissions clash with others' (both are named), or the node cannot be written.
    #[track_caller]
    pub fn attach_job(&self, node: &NodeRef, job: &str, access: Access) -> Result<JobEdge> {
        let root = Root { kind: HolderKind::Job, name: job, access, stays: true };
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
    /// # Errors
    /// Nothing has changed: see [`Graph::attach_job`]. Asking for less cannot fail.
    pub async fn set_access(&self, access: Access) -> Result<()> {
        self.graph.change().set_access(&self.edge, access).commit().await.map(drop)
    }
}
