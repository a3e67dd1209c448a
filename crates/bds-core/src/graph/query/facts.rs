//! Edges as values: permissions, roles, parents and children. For tools, tests and bug reports.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::driver::Role;
use crate::driver::{Access, Perm};
use crate::graph::model::edge::{Edge, Parent};
use crate::graph::model::node::NodeId;
use crate::graph::{Graph, NodeRef};

/// A snapshot of an edge.
#[derive(Clone, Debug)]
pub struct EdgeFacts {
    /// The child's name in its parent ("file", "backing"); "root" for one whose parent is not a
    /// node.
    pub name: &'static str,
    /// The child's role for its parent; empty for a root.
    pub role: Role,
    /// The permissions that the parent uses, and those it shares.
    pub access: Access,
    /// The parent; `None` while it is being opened.
    pub parent: Option<Parent>,
    /// The name under which the child is held: "edge 'top.backing'", "backend 'guest'".
    pub holder: String,
    /// The child.
    pub child: NodeId,
    /// Its name.
    pub child_name: String,
    /// The holder that froze the edge.
    pub frozen_by: Option<String>,
    /// Do graph changes leave it where it is?
    pub is_fixed: bool,
    /// Is the child drained, so that requests through the edge wait, or will?
    pub is_drained: bool,
}

fn facts(edge: &Arc<Edge>) -> Option<EdgeFacts> {
    let target = edge.medium()?;
    Some(EdgeFacts {
        name: edge.name(),
        role: edge.role(),
        access: edge.access(),
        parent: edge.parent().cloned(),
        holder: edge.holder().to_string(),
        child: target.id(),
        child_name: target.name().to_owned(),
        frozen_by: edge.frozen().map(|freeze| freeze.to_string()),
        is_fixed: edge.is_fixed(),
        is_drained: edge.is_quiesced(),
    })
}

impl NodeRef {
    /// The edges from this node to its children, in the order in which the driver opened them.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::Role;
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
    /// let edges = top.edges_below();
    /// assert_eq!(edges[1].holder, "edge 'top.backing'");
    /// assert_eq!((edges[1].child, edges[1].role), (base.id(), Role::COW));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn edges_below(&self) -> Vec<EdgeFacts> {
        // Taking the lock recomputes stale permissions.
        let _lock = self.graph().0.core.lock();
        self.node().children().iter().filter_map(facts).collect()
    }

    /// The edges that lead to this node, sorted by holder.
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
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let guest = Backend::new(&base, BackendOptions::registered("guest"))?;
    /// let holders: Vec<String> = base.edges_above().into_iter().map(|edge| edge.holder).collect();
    /// assert_eq!(holders, ["backend 'guest'", "edge 'top.backing'"]);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn edges_above(&self) -> Vec<EdgeFacts> {
        let _lock = self.graph().0.core.lock();
        let mut all: Vec<EdgeFacts> = self.node().parents().iter().filter_map(facts).collect();
        all.sort_by(|a, b| (&a.holder, a.name).cmp(&(&b.holder, b.name)));
        all
    }

    /// The permissions that all users together use, and those that every one of them shares.
    ///
    /// ```
    /// use bds_core::graph::Perm;
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let one = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// assert!(disk.access().perm.contains(Perm::WRITE));
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let error = Backend::new(&disk, picky).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InUse, "it does not bear that");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn access(&self) -> Access {
        crate::graph::change::perm::cumulate(self.edges_above().iter().map(|edge| edge.access))
    }
}

/// Four letters, a dash where one is missing: r read, w write, u write the same again, s resize.
pub(in crate::graph) fn letters(perm: Perm) -> String {
    let all = [
        (Perm::CONSISTENT_READ, 'r'),
        (Perm::WRITE, 'w'),
        (Perm::WRITE_UNCHANGED, 'u'),
        (Perm::RESIZE, 's'),
    ];
    all.into_iter().map(|(bit, letter)| if perm.contains(bit) { letter } else { '-' }).collect()
}

impl Graph {
    /// Nodes and edges with permissions, in the manner of QEMU's `x-debug-query-block-graph`. The
    /// numbers hold within one answer only.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let all = graph.query_graph();
    /// assert_eq!(all["nodes"][1]["type"], "block-backend");
    /// assert_eq!(all["edges"][0]["perm"], serde_json::json!(["consistent-read"]));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn query_graph(&self) -> Value {
        let nodes = self.nodes();
        let number = |id: NodeId| nodes.iter().position(|node| node.id() == id);
        let mut described: Vec<Value> = nodes
            .iter()
            .enumerate()
            .map(|(id, node)| json!({"id": id, "type": "block-driver", "name": node.name()}))
            .collect();
        let mut edges = Vec::new();
        for (child, node) in nodes.iter().enumerate() {
            for edge in node.edges_above() {
                let parent = match edge.parent {
                    Some(Parent::Node(id)) => number(id),
                    Some(Parent::Root(name)) => {
                        let id = described.len();
                        let kind = edge.holder.split(' ').next().unwrap_or_default();
                        let kind = if kind == "job" { "block-job" } else { "block-backend" };
                        described.push(json!({"id": id, "type": kind, "name": &*name}));
                        Some(id)
                    }
                    None => None,
                };
                let words = |perm: Perm| perm.words().collect::<Vec<_>>();
                edges.push(json!({
                    "parent": parent,
                    "child": child,
                    "name": edge.name,
                    "perm": words(edge.access.perm),
                    "shared-perm": words(edge.access.shared),
                }));
            }
        }
        json!({"nodes": described, "edges": edges})
    }
}
