//! Nodes that the monitor owns, and the walk over everything that stands at the top.
//!
//! Membership is the reference: the monitor's list holds the node, and taking it off the list is giving the reference up. There is no
//! second bookkeeping that could disagree.

use std::future::Future;
use std::panic::Location;

use crate::holder_kind::HolderKind;
use bds_refcount::{Held, Holder};

use super::claims::Operations;
use super::core::CloseReport;
use super::edge::Parent;
use super::node::{Node, NodeId};
use super::{Graph, NodeRef};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// A node on the monitor's list.
pub(super) struct Owned {
    pub(super) node: Held<Node>,
    /// The list is walked in the order in which nodes came.
    pub(super) order: u64,
}

fn holder() -> Holder {
    Holder::new(HolderKind::Monitor, "node list")
}

impl Graph {
    /// Opens a node and lets the monitor own it: QEMU's `blockdev-add`. It lives until [`Graph::del`], whoever else uses it.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let id = graph.add(Options::parse("driver=memory,node-name=disk")?).await?;
    /// assert!(graph.is_owned(id), "it stays open although we hold nothing");
    /// assert_eq!(graph.find("disk")?.id(), id);
    ///
    /// let error = graph.add(Options::parse("driver=memory")?).await.unwrap_err();
    /// assert!(error.to_string().starts_with("'node-name' must be given"), "{error}");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// As [`Graph::open`]; `InvalidInput` if `node-name` is missing, because nobody could delete the node then.
    #[track_caller]
    pub fn add(&self, options: Options) -> impl Future<Output = Result<NodeId>> + Send + '_ {
        let since = Location::caller();
        async move {
            if !options.contains("node-name") {
                let words = "'node-name' must be given for a node that is added by name";
                return Err(Error::new(ErrorKind::InvalidInput, words));
            }
            let node = self.open(options).await?;
            let id = node.id();
            self.own_since(node, since)?;
            Ok(id)
        }
    }

    /// Lets the monitor own a node that is open already.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// graph.own(disk)?; // the list has the reference now
    /// let error = graph.own(graph.find("disk")?).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': the monitor owns the node already");
    /// graph.del("disk").await?;
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `AlreadyExists`: it owns it. The reference is given up.
    #[track_caller]
    pub fn own(&self, node: NodeRef) -> Result<()> {
        self.own_since(node, Location::caller())
    }

    fn own_since(&self, node: NodeRef, since: &'static Location<'static>) -> Result<()> {
        let id = node.id();
        let name = node.name().to_owned();
        let (_, held) = node.into_parts();
        let held = held.into_strong().held_since(holder(), since);
        let mut plan = self.plan();
        if plan.monitor.contains_key(&id) {
            let error = Error::new(ErrorKind::AlreadyExists, "the monitor owns the node already");
            return Err(error.node(name));
        }
        plan.monitor_order += 1;
        let order = plan.monitor_order;
        plan.monitor.insert(id, Owned { node: held, order });
        Ok(())
    }

    /// Closes a node that the monitor owns: QEMU's `blockdev-del`. The report tells of a failed flush.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// graph.add(Options::parse("driver=memory,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&graph.find("disk")?, BackendOptions::registered("guest"))?;
    /// let error = graph.del("disk").await.unwrap_err();
    /// assert!(error.to_string().starts_with("node 'disk': node is in use by backend 'guest'"));
    ///
    /// drop(guest);
    /// assert!(graph.del("disk").await?.is_clean());
    /// assert_eq!(graph.del("disk").await.unwrap_err().kind(), ErrorKind::NotFound);
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `NotFound`: no such node; `InvalidInput`: the monitor does not own it; `InUse`: somebody else
    /// refers to it (the holders are named), or a [`super::Blocker`] stands in the way.
    pub async fn del(&self, name: &str) -> Result<CloseReport> {
        // What is dead does not count as a holder.
        self.0.core.sweep_unasked().await;
        let id = self.find(name)?.id();
        let taken = self.take_owned(id, name)?;
        let refuse = |node: NodeRef, order: u64, error: Error| {
            self.put_back(node, order);
            Err(error)
        };
        let (node, order) = taken;
        if let Err(error) = node.check_allowed(Operations::DELETE) {
            return refuse(node, order, error);
        }
        match node.end() {
            Ok(ended) => Ok(ended.close().await),
            Err((node, holders)) => {
                let holders = holders.iter().filter(|info| info.kind != HolderKind::Monitor);
                let words: Vec<String> = holders.map(ToString::to_string).collect();
                let who =
                    if words.is_empty() { "an unnamed reference".into() } else { words.join(", ") };
                let error =
                    Error::new(ErrorKind::InUse, format!("node is in use by {who}")).node(name);
                refuse(node, order, error)
            }
        }
    }

    /// The monitor's reference, taken off the list.
    pub(super) fn take_owned(&self, id: NodeId, name: &str) -> Result<(NodeRef, u64)> {
        let Some(Owned { node, order }) = self.plan().monitor.remove(&id) else {
            let words = "the monitor does not own the node: it goes with the last reference to it";
            return Err(Error::new(ErrorKind::InvalidInput, words).node(name));
        };
        Ok((NodeRef::from_held(self, node), order))
    }

    pub(super) fn put_back(&self, node: NodeRef, order: u64) {
        let id = node.id();
        let (_, node) = node.into_parts();
        self.plan().monitor.insert(id, Owned { node, order });
    }

    /// Does the monitor own the node?
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let id = disk.id();
    /// assert!(!graph.is_owned(id));
    /// graph.own(disk)?;
    /// assert!(graph.is_owned(id));
    /// # Ok(()) });
    /// ```
    pub fn is_owned(&self, id: NodeId) -> bool {
        self.plan().monitor.contains_key(&id)
    }

    /// What stands at the top: the node of every backend with a medium, then the monitor's nodes that no backend has at its
    /// root. Each once. What ends meanwhile is left out; what comes is not seen. Holds a reference to the node it stands at
    /// and to no other, so it may be left at any time.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// graph.add(Options::parse("driver=memory,node-name=spare")?).await?;
    /// let top = open(&graph, "driver=layer,node-name=top,file.driver=memory,file.size=1M").await?;
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    ///
    /// let names: Vec<String> = graph.top_level().map(|node| node.name().to_owned()).collect();
    /// assert_eq!(names, ["top", "spare"], "not the file of 'top'");
    /// # Ok(()) });
    /// ```
    pub fn top_level(&self) -> TopLevel {
        let lock = self.0.core.lock();
        let mut roots: Vec<(String, NodeId)> = Vec::new();
        for node in self.0.core.live() {
            for edge in node.parents() {
                if let (Some(Parent::Root(name)), HolderKind::Backend) =
                    (edge.parent(), HolderKind::from(edge.holder().kind))
                {
                    roots.push((name.to_string(), node.id()));
                }
            }
        }
        drop(lock);
        roots.sort();
        let mut owned: Vec<(u64, NodeId)> =
            self.plan().monitor.iter().map(|(id, owned)| (owned.order, *id)).collect();
        owned.sort_unstable();
        let all = roots.into_iter().map(|(_, id)| id).chain(owned.into_iter().map(|(_, id)| id));
        let mut seen = std::collections::HashSet::new();
        let ids: Vec<NodeId> = all.filter(|id| seen.insert(*id)).collect();
        TopLevel { graph: self.clone(), ids: ids.into_iter() }
    }
}

/// See [`Graph::top_level`].
#[derive(Debug)]
pub struct TopLevel {
    graph: Graph,
    ids: std::vec::IntoIter<NodeId>,
}

impl Iterator for TopLevel {
    type Item = NodeRef;

    fn next(&mut self) -> Option<NodeRef> {
        let arena = &self.graph.0.core.arena;
        let strong = self.ids.by_ref().find_map(|id| arena.acquire(id.0).ok())?;
        Some(NodeRef::iterator(&self.graph, strong))
    }
}
