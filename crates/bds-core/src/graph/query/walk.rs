//! Walks through the graph: down a chain, past filters, to the file.
//!
//! Every walk is a loop, never a recursion, and returns counted references. The graph may change
//! during a walk; each node on it was part of it at some moment.
//!
//! What a walk returns is held by an iterator: the node lives as long as the reference, but
//! [`Change::remove`](crate::graph::Change::remove) does not take it for a user. To keep it for
//! longer than a query takes, give it a holder name ([`NodeRef::held_as`]).

use std::collections::HashSet;
use std::path::PathBuf;

use bds_refcount::Strong;

use crate::driver::Role;
use crate::graph::model::node::{Node, NodeId};
use crate::graph::model::node_ref::NodeRef;

/// The longest walk to a file: filters and formats on top of each other.
const MAX_STEPS: usize = 1 << 20;

fn child_in(node: &Node, role: Role) -> Option<Strong<Node>> {
    node.child_in_role(role).map(|edge| Strong::clone(edge.target().strong()))
}

fn as_ref(beside: &NodeRef, strong: Strong<Node>) -> NodeRef {
    NodeRef::iterator(beside.graph(), strong)
}

/// The first node from here down that is not a filter.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::walk;
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
/// let filter = graph.open(Options::parse("driver=raw,node-name=filter,file=disk")?).await?;
/// let two = graph.open(Options::parse("driver=raw,node-name=two,file=filter")?).await?;
/// assert_eq!(walk::skip_filters(&two).name(), "disk");
/// assert_eq!(walk::skip_filters(&disk).name(), "disk");
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn skip_filters(node: &NodeRef) -> NodeRef {
    let mut at = Strong::clone(node.strong());
    while let Some(below) = at.driver().is_filter().then(|| filtered(&at)).flatten() {
        at = below;
    }
    as_ref(node, at)
}

/// The first node from here down that a job did not insert for itself: a device's images are listed
/// from there.
///
/// ```
/// use bds_core::Options;
/// use bds_core::driver::OpenFlags;
/// use bds_core::graph::walk;
///
/// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # let graph = bds_core::graph::Graph::new(config);
/// # bds_io::block_on(async {
/// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
/// let filter = graph.open(Options::parse("driver=raw,node-name=filter,file=disk")?).await?;
/// let flags = OpenFlags { is_implicit: true, ..OpenFlags::default() };
/// let jobs = graph.open_with(Options::parse("driver=raw,file=filter")?, flags).await?;
/// assert_eq!(walk::skip_implicit(&jobs).name(), "filter", "which is a filter, but a user's");
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # bds_io::block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn skip_implicit(node: &NodeRef) -> NodeRef {
    let mut at = Strong::clone(node.strong());
    while let Some(below) = at.flags().is_implicit.then(|| filtered(&at)).flatten() {
        at = below;
    }
    as_ref(node, at)
}

fn filtered(node: &Node) -> Option<Strong<Node>> {
    child_in(node, Role::FILTERED).or_else(|| child_in(node, Role::PRIMARY))
}

/// The next image below: the backing child, or the filtered one.
fn below(node: &Node) -> Option<Strong<Node>> {
    if node.driver().is_filter() { filtered(node) } else { child_in(node, Role::COW) }
}

/// The node directly below in the chain: the backing node, or the filtered one.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::walk;
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
/// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base";
/// let top = graph.open(Options::parse(layer)?).await?;
/// assert_eq!(walk::next_below(&top).map(|node| node.id()), Some(base.id()));
/// assert!(walk::next_below(&base).is_none());
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn next_below(node: &NodeRef) -> Option<NodeRef> {
    below(node).map(|strong| as_ref(node, strong))
}

/// The images of a chain from here down, filters left out.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::walk;
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
/// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base";
/// let top = graph.open(Options::parse(layer)?).await?;
/// let filter = graph.open(Options::parse("driver=raw,node-name=filter,file=top")?).await?;
/// let names: Vec<String> =
///     walk::backing_chain(&filter).iter().map(|node| node.name().to_owned()).collect();
/// assert_eq!(names, ["top", "base"]);
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn backing_chain(node: &NodeRef) -> Vec<NodeRef> {
    let mut chain = Vec::new();
    let mut at = Some(Strong::clone(node.strong()));
    while let Some(strong) = at {
        at = below(&strong);
        if !strong.driver().is_filter() {
            chain.push(as_ref(node, strong));
        }
    }
    chain
}

/// The first image that lies in both chains.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::walk;
///
/// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
/// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
/// # config.fs = sim.fs();
/// # let graph = bds_core::graph::Graph::new(config);
/// # sim.block_on(async {
/// # for path in ["top.qcow2", "image1.qcow2"] {
/// #     let options = bds_core::Options::parse("size=1M")?;
/// #     let (format, path) = ("qcow2".into(), path.into());
/// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
/// #     graph.create_image(image).await?;
/// # }
/// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
/// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base";
/// let top = graph.open(Options::parse(layer)?).await?;
/// let options = "driver=qcow2,file.driver=file,file.filename=image1.qcow2,backing=base";
/// let other = graph.open(Options::parse(options)?).await?;
/// let common = walk::common_backing(&top, &other);
/// assert_eq!(common.map(|node| node.id()), Some(base.id()));
/// let alone = graph.open(Options::parse("driver=mem")?).await?;
/// assert!(walk::common_backing(&top, &alone).is_none());
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn common_backing(a: &NodeRef, b: &NodeRef) -> Option<NodeRef> {
    let in_b: HashSet<NodeId> = backing_chain(b).iter().map(|node| node.id()).collect();
    backing_chain(a).into_iter().find(|node| in_b.contains(&node.id()))
}

/// The node's child of this name ("file", "backing"), and its role.
///
/// ```
/// use bds_core::Options;
/// use bds_core::driver::Role;
/// use bds_core::graph::walk;
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
/// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base";
/// let top = graph.open(Options::parse(layer)?).await?;
/// let (child, role) = walk::child(&top, "backing").expect("it was opened with one");
/// assert_eq!((child.id(), role), (base.id(), Role::COW));
/// assert!(walk::child(&top, "data-file").is_none());
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn child(node: &NodeRef, name: &str) -> Option<(NodeRef, Role)> {
    let edge = node.node().child(name)?;
    Some((as_ref(node, Strong::clone(edge.target().strong())), edge.role()))
}

/// All children with their names and roles, in the order in which the driver opened them.
///
/// ```
/// use bds_core::Options;
/// use bds_core::graph::walk;
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
/// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,backing=base";
/// let top = graph.open(Options::parse(layer)?).await?;
/// let names: Vec<&str> = walk::children(&top).into_iter().map(|(name, _, _)| name).collect();
/// assert_eq!(names, ["file", "backing"]);
/// # Ok::<(), bds_core::Error>(())
/// # })?;
/// # sim.block_on(graph.shutdown()).check_leaks()?;
/// # Ok::<(), bds_core::Error>(())
/// ```
pub fn children(node: &NodeRef) -> Vec<(&'static str, Role, NodeRef)> {
    let edges = node.node().children();
    let child = |edge: &std::sync::Arc<crate::graph::model::edge::Edge>| {
        (edge.name(), edge.role(), as_ref(node, Strong::clone(edge.target().strong())))
    };
    edges.iter().map(child).collect()
}

/// The name of the file at the end of the primary and filtered children, if there is one.
pub fn filename(node: &Node) -> Option<PathBuf> {
    if let Some(name) = node.own_filename() {
        return Some(name);
    }
    file_node(node)?.own_filename()
}

/// (device, inode) of that file.
pub fn identity(node: &Node) -> Option<(u64, u64)> {
    if let Some(identity) = node.own_identity() {
        return Some(identity);
    }
    file_node(node)?.own_identity()
}

/// The node at the end of the primary and filtered children; `None` if that is the node itself.
fn file_node(node: &Node) -> Option<Strong<Node>> {
    let mut at = child_in(node, Role::PRIMARY | Role::FILTERED)?;
    for _ in 0..MAX_STEPS {
        match child_in(&at, Role::PRIMARY | Role::FILTERED) {
            Some(next) => at = next,
            None => break,
        }
    }
    Some(at)
}

/// (device, inode) of the files of this image and of all images below it.
pub fn files_of_chain(node: &NodeRef) -> Vec<(u64, u64)> {
    let mut files = Vec::new();
    each_below(node.strong(), &mut |node| files.extend(node.own_identity()));
    files
}

/// (device, inode) of all files that make up this one image: its own and its data file's, not its
/// backing's.
pub fn files_of_image(node: &Node) -> Vec<(u64, u64)> {
    let mut files: Vec<(u64, u64)> = node.own_identity().into_iter().collect();
    let mut todo: Vec<Strong<Node>> = parts(node);
    while let Some(part) = todo.pop() {
        files.extend(part.own_identity());
        todo.extend(parts(&part));
    }
    files
}

fn parts(node: &Node) -> Vec<Strong<Node>> {
    let children = node.children();
    let edges = children.iter().filter(|edge| !edge.role().contains(Role::COW));
    edges.map(|edge| Strong::clone(edge.target().strong())).collect()
}

/// A node and, if it is a filter, the filtered node, and so on down to the first that is no filter.
pub(crate) fn through_filters(node: &Strong<Node>) -> Vec<Strong<Node>> {
    let mut way = vec![Strong::clone(node)];
    while let Some(last) = way.last().filter(|last| last.driver().is_filter())
        && let Some(next) = filtered(last)
    {
        way.push(next);
    }
    way
}

/// The nodes directly below.
pub(crate) fn children_strong(node: &Node) -> Vec<Strong<Node>> {
    node.children().iter().map(|edge| Strong::clone(edge.target().strong())).collect()
}

/// Visits `start` and every node below it once.
pub(crate) fn each_below(start: &Strong<Node>, visit: &mut dyn FnMut(&Node)) {
    each_below_strong(start, &mut |node| visit(node));
}

/// As [`each_below`], with references.
pub(crate) fn each_below_strong(start: &Strong<Node>, visit: &mut dyn FnMut(&Strong<Node>)) {
    let mut seen = HashSet::new();
    let mut todo = vec![Strong::clone(start)];
    while let Some(node) = todo.pop() {
        if !seen.insert(node.id()) {
            continue;
        }
        visit(&node);
        todo.extend(children_strong(&node));
    }
}

/// These nodes and all below them, each after all of its parents that are among them.
pub(in crate::graph) fn parents_first(tops: &[Strong<Node>]) -> Vec<Strong<Node>> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let mut todo: Vec<(Strong<Node>, bool)> =
        tops.iter().map(|node| (Strong::clone(node), false)).collect();
    while let Some((node, is_done)) = todo.pop() {
        if is_done {
            order.push(node);
        } else if seen.insert(node.id()) {
            todo.push((Strong::clone(&node), true));
            todo.extend(children_strong(&node).into_iter().map(|child| (child, false)));
        }
    }
    order.reverse();
    order
}
