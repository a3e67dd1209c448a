//! `NodeRef`: a counted reference to a node, held by name.

use std::fmt;
use std::ops::Deref;
use std::panic::Location;

use crate::holder_kind::HolderKind;
use bds_refcount::{Held, Holder, Release, Strong};

use super::Graph;
use super::node::{Node, NodeId};

/// Keeps a node open. Clone takes another reference, drop gives it up; neither does I/O nor blocks.
///
/// ```
/// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
/// # run(async |graph| {
/// let disk = open(&graph, "driver=memory,node-name=disk").await?;
/// let second = disk.clone();
/// drop(disk);
/// assert_eq!(graph.find("disk")?.id(), second.id(), "still open");
/// drop(second);
/// assert!(graph.find("disk").is_err(), "ended by its last reference");
/// # Ok(()) });
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

    /// The same reference under another holder's name, for "in use" messages and leak reports.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let disk = disk.held_as(Holder::new(HolderKind::User, "snapshot tool"));
    /// assert_eq!(disk.count(), 1, "the same reference");
    ///
    /// let error = graph.change().remove(disk.clone()).commit().await.unwrap_err();
    /// assert!(error.to_string().contains("in use by user 'snapshot tool'"), "{error}");
    /// # Ok(()) });
    /// ```
    #[must_use]
    #[track_caller]
    pub fn held_as(self, holder: Holder) -> Self {
        Self { held: self.held.pass_to(holder), graph: self.graph }
    }

    /// As [`NodeRef::held_as`], since the place where it was taken: for what the caller handed over.
    pub(super) fn kept_as(self, holder: Holder) -> Self {
        let since = self.held.since();
        Self { held: self.held.pass_since(holder, since), graph: self.graph }
    }

    /// Where in the program it was taken.
    pub(super) fn since(&self) -> &'static Location<'static> {
        self.held.since()
    }

    /// The same for a node that may be missing. (`Option::cloned` would be the place that is put down.)
    #[track_caller]
    pub(super) fn clone_of(node: Option<&Self>) -> Option<Self> {
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
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let second = disk.clone();
    /// assert_eq!(disk.count(), 2);
    /// drop(second);
    /// assert_eq!(disk.count(), 1);
    /// # Ok(()) });
    /// ```
    pub fn count(&self) -> usize {
        self.held.count()
    }

    /// The graph it belongs to.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Gives the reference up. [`Release::Last`]: this call gave up the last one, the node is unpublished and waits to be reaped.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let (id, second) = (disk.id(), disk.clone());
    /// assert_eq!(second.release(), Release::NotLast);
    /// assert!(graph.acquire(id).is_ok());
    ///
    /// assert_eq!(disk.release(), Release::Last);
    /// assert!(graph.acquire(id).is_err(), "at once, though it is closed later");
    /// assert!(graph.find("disk").is_err());
    /// # Ok(()) });
    /// ```
    pub fn release(self) -> Release {
        self.held.release()
    }

    pub(super) fn from_held(graph: &Graph, held: Held<Node>) -> Self {
        Self { held, graph: graph.clone() }
    }

    #[track_caller]
    pub(super) fn change(graph: &Graph, strong: Strong<Node>) -> Self {
        Self::new(graph, strong, Holder::new(HolderKind::Change, "change"))
    }

    pub(super) fn into_parts(self) -> (Graph, Held<Node>) {
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
