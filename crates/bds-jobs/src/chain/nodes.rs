//! Images of a chain, the overlays of an image, and the links between them.
//!
//! An image is a node that is no filter, or a `raw` node on a protocol node: for the graph that is
//! a filter, for the user it is the format of a file.

use std::collections::HashSet;
use std::time::Duration;

use bds_core::driver::Role;
use bds_core::graph::{EdgeFacts, Frozen, Graph, JobSlot, NodeId, NodeRef, Parent, walk};
use bds_core::{ErrorKind, Result};

use crate::context::{JobContext, holder_of, shared_link};

/// How long a job that ends waits for another one that ends beside it, and between two attempts.
const LINK_PATIENCE: Duration = Duration::from_secs(30);
const LINK_PAUSE: Duration = Duration::from_millis(5);

/// The node that an edge leads to from above; `None` for users that are no nodes.
fn parent(graph: &Graph, edge: &EdgeFacts) -> Option<NodeRef> {
    match edge.parent {
        Some(Parent::Node(id)) => graph.acquire(id).ok(),
        _ => None,
    }
}

/// An image that is backed by another one: directly, or through filters.
#[derive(Debug)]
pub(crate) struct Overlay {
    pub(crate) image: NodeRef,
    /// Its backing node: the image in question, or the topmost filter above that.
    pub(crate) backing: NodeRef,
}

/// All images that `node` backs, also through filters above it, sorted by name.
pub(crate) fn overlays(node: &NodeRef) -> Vec<Overlay> {
    let graph = node.graph();
    let mut found = Vec::new();
    let mut seen: HashSet<NodeId> = HashSet::new();
    let mut todo = vec![node.clone()];
    while let Some(at) = todo.pop() {
        if !seen.insert(at.id()) {
            continue;
        }
        for edge in at.edges_above() {
            let Some(above) = parent(graph, &edge) else { continue };
            if edge.role.contains(Role::COW) {
                found.push(Overlay { image: above, backing: at.clone() });
            } else if edge.role.contains(Role::FILTERED) {
                todo.push(above);
            }
        }
    }
    found.sort_by(|a, b| a.image.name().cmp(b.image.name()));
    found
}

/// The image that a node shows: the node itself, or what lies below filters.
pub(crate) fn image_of(node: &NodeRef) -> NodeRef {
    let bottom = walk::skip_filters(node);
    if bottom.edges_below().is_empty() {
        let mut at = node.clone();
        let mut raw = None;
        while at.id() != bottom.id() {
            let next = walk::next_below(&at).expect("the bottom lies below");
            if at.driver_name() == "raw" {
                raw = Some(at);
            }
            at = next;
        }
        return raw.unwrap_or(bottom);
    }
    bottom
}

/// The node directly below an image in its chain: its backing node.
pub(crate) fn node_below(image: &NodeRef) -> Option<NodeRef> {
    let is_filter = walk::skip_filters(image).id() != image.id();
    if is_filter { None } else { walk::next_below(image) }
}

/// The next image below.
pub(crate) fn image_below(image: &NodeRef) -> Option<NodeRef> {
    node_below(image).map(|below| image_of(&below))
}

/// The images of a node's chain.
pub(crate) fn images_from(node: &NodeRef) -> Vec<NodeRef> {
    std::iter::successors(Some(image_of(node)), image_below).collect()
}

/// The images from `top` down to `bottom`, both included; `None` if `bottom` is not among them.
pub(crate) fn images_between(top: &NodeRef, bottom: &NodeRef) -> Option<Vec<NodeRef>> {
    let mut chain = images_from(top);
    let end = chain.iter().position(|image| image.id() == bottom.id())?;
    chain.truncate(end + 1);
    Some(chain)
}

/// The node directly above `below` in the chain that begins at `image`, and the name of its child.
pub(crate) fn link_to(image: &NodeRef, below: &NodeRef) -> Option<(NodeRef, &'static str)> {
    let mut at = image.clone();
    loop {
        let next = walk::next_below(&at)?;
        if next.id() == below.id() {
            let link = at.edges_below().into_iter().find(|edge| edge.child == below.id())?;
            return Some((at, link.name));
        }
        at = next;
    }
}

/// Takes the job slots of all images, or of none.
pub(crate) fn claim_all(images: &[NodeRef], job: &str) -> Result<Vec<JobSlot>> {
    images.iter().map(|image| image.claim_job(job)).collect()
}

/// Freezes the link from an image to the node directly below it, for the end of a job. Another job
/// that ends at the same link is waited for, but for one of the same group, which ends with it.
pub(crate) async fn freeze_link(image: &NodeRef, ctx: &JobContext) -> Result<Option<Frozen>> {
    let began = bds_io::now();
    let holder = ctx.holder();
    loop {
        let Some(below) = node_below(image) else { return Ok(None) };
        match image.graph().freeze_chain(image, &below, &holder) {
            Ok(frozen) => return Ok(Some(frozen)),
            // `InvalidInput`: another node is below it by now.
            Err(error) if matches!(error.kind(), ErrorKind::InUse | ErrorKind::InvalidInput) => {
                if let Some(other) = frozen_by_group(image, &below, ctx) {
                    return Err(shared_link(image, ctx.id(), &other));
                }
                if bds_io::now().saturating_sub(began) > LINK_PATIENCE {
                    return Err(error);
                }
                bds_io::sleep(LINK_PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The member of the job's group that froze the link.
fn frozen_by_group(image: &NodeRef, below: &NodeRef, ctx: &JobContext) -> Option<String> {
    let mut links = image.edges_below().into_iter().filter(|edge| edge.child == below.id());
    let frozen_by = links.find_map(|edge| edge.frozen_by)?;
    ctx.other_members().find(|id| holder_of(id) == frozen_by).cloned()
}

/// Closes the nodes whose last reference is gone: a job's filters, images that were cut out.
pub(crate) async fn close_dead(graph: &Graph) -> Result<()> {
    let mut first = Ok(());
    for report in graph.reap().await {
        let failed = report.flush_error.or(report.close_error);
        first = first.and(failed.map_or(Ok(()), |error| Err(error.node(report.name))));
    }
    first
}
