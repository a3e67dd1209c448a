//! Nodes that the monitor owns (`blockdev-add`, `blockdev-del`), and a walk over all top-level
//! nodes.
//!
//! The list holds the reference: taking a node off the list releases it. There is no second record
//! that could disagree.

use std::future::Future;
use std::panic::Location;

use crate::holder_kind::HolderKind;
use bds_refcount::Holder;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::close::report::CloseReport;
use crate::graph::model::blockers::BlockOps;
use crate::graph::model::edge::Parent;
use crate::graph::model::node::NodeId;
use crate::graph::name_table::OwnedNode;
use crate::graph::{Graph, NodeRef};
use crate::options::Options;

fn holder() -> Holder {
    Holder::new(HolderKind::Monitor, "node list")
}

impl Graph {
    /// Opens a node and lets the monitor own it: QEMU's `blockdev-add`. It lives until
    /// [`Graph::del`].
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let id = graph.add(Options::parse("driver=mem,node-name=disk")?).await?;
    /// assert!(graph.is_owned(id), "it stays open although we hold nothing");
    /// assert_eq!(graph.find("disk")?.id(), id);
    ///
    /// let error = graph.add(Options::parse("driver=mem")?).await.unwrap_err();
    /// assert!(error.to_string().starts_with("'node-name' must be given"), "{error}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Graph::open`]; `InvalidInput` if `node-name` is missing, because the node could not be
    /// deleted then.
    #[track_caller]
    pub fn add(&self, options: Options) -> impl Future<Output = Result<NodeId>> + Send + '_ {
        let since = Location::caller();
        async move {
            if !options.contains("node-name") {
                let message = "'node-name' must be given for a node that is added by name";
                return Err(Error::new(ErrorKind::InvalidInput, message));
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
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// graph.own(disk)?; // the list has the reference now
    /// let error = graph.own(graph.find("disk")?).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': the monitor owns the node already");
    /// graph.del("disk").await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `AlreadyExists`: it owns it already. The reference is dropped.
    #[track_caller]
    pub fn own(&self, node: NodeRef) -> Result<()> {
        self.own_since(node, Location::caller())
    }

    fn own_since(&self, node: NodeRef, since: &'static Location<'static>) -> Result<()> {
        let id = node.id();
        let name = node.name().to_owned();
        let (_, held) = node.into_parts();
        let held = held.into_strong().held_since(holder(), since);
        let mut names = self.lock_names();
        if names.monitor.contains_key(&id) {
            let error = Error::new(ErrorKind::AlreadyExists, "the monitor owns the node already");
            return Err(error.node(name));
        }
        names.monitor_order += 1;
        let order = names.monitor_order;
        names.monitor.insert(id, OwnedNode { node: held, order });
        Ok(())
    }

    /// Closes a node that the monitor owns: QEMU's `blockdev-del`. A failed flush is in the report.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// graph.add(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&graph.find("disk")?, BackendOptions::registered("guest"))?;
    /// let error = graph.del("disk").await.unwrap_err();
    /// assert!(error.to_string().starts_with("node 'disk': node is in use by backend 'guest'"));
    ///
    /// drop(guest);
    /// assert!(graph.del("disk").await?.is_clean());
    /// assert_eq!(graph.del("disk").await.unwrap_err().kind(), ErrorKind::NotFound);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `NotFound`: no such node; `InvalidInput`: the monitor does not own it;
    /// `InUse`: there are other references (the holders are named), or a [`crate::graph::Blocker`].
    pub async fn del(&self, name: &str) -> Result<CloseReport> {
        // A dead node must not count as a holder.
        self.0.core.sweep_and_keep().await;
        let id = self.find(name)?.id();
        let taken = self.take_owned(id, name)?;
        let refuse = |node: NodeRef, order: u64, error: Error| {
            self.put_back(node, order);
            Err(error)
        };
        let (node, order) = taken;
        if let Err(error) = node.check_allowed(BlockOps::DELETE) {
            return refuse(node, order, error);
        }
        match node.try_end() {
            Ok(ended) => Ok(ended.close().await),
            Err((node, holders)) => {
                let holders = holders.iter().filter(|info| info.kind != HolderKind::Monitor);
                let message: Vec<String> = holders.map(ToString::to_string).collect();
                let users = if message.is_empty() {
                    "an unnamed reference".into()
                } else {
                    message.join(", ")
                };
                let error =
                    Error::new(ErrorKind::InUse, format!("node is in use by {users}")).node(name);
                refuse(node, order, error)
            }
        }
    }

    /// The monitor's reference, taken off the list.
    pub(in crate::graph) fn take_owned(&self, id: NodeId, name: &str) -> Result<(NodeRef, u64)> {
        let Some(OwnedNode { node, order }) = self.lock_names().monitor.remove(&id) else {
            let message =
                "the monitor does not own the node: it goes with the last reference to it";
            return Err(Error::new(ErrorKind::InvalidInput, message).node(name));
        };
        Ok((NodeRef::from_held(self, node), order))
    }

    pub(in crate::graph) fn put_back(&self, node: NodeRef, order: u64) {
        let id = node.id();
        let (_, node) = node.into_parts();
        self.lock_names().monitor.insert(id, OwnedNode { node, order });
    }

    /// Does the monitor own the node?
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let id = disk.id();
    /// assert!(!graph.is_owned(id));
    /// graph.own(disk)?;
    /// assert!(graph.is_owned(id));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn is_owned(&self, id: NodeId) -> bool {
        self.lock_names().monitor.contains_key(&id)
    }

    /// Top-level nodes: the node of every backend with a medium, then the monitor's nodes that are
    /// no backend's medium. Each once. Nodes that end during the walk are left out, new ones are
    /// not seen. Holds a reference to the current node only.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
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
    /// graph.add(Options::parse("driver=mem,node-name=spare")?).await?;
    /// let options = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2";
    /// let top = graph.open(Options::parse(options)?).await?;
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    ///
    /// let names: Vec<String> = graph.top_level().map(|node| node.name().to_owned()).collect();
    /// assert_eq!(names, ["top", "spare"], "not the file of 'top'");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
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
            self.lock_names().monitor.iter().map(|(id, owned)| (owned.order, *id)).collect();
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
