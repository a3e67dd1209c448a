//! Answers block status: what a range holds, for one layer and through a chain.
//!
//! A driver answers for its own layer, roughly or precisely, and may refer to a child ("the status
//! of my file there"). This module cuts its answer to the question, follows references and adds
//! facts that follow from the graph. A wrong "zero" or "not allocated" loses data, so anything
//! unclear counts as data; an error is an error.

use std::path::PathBuf;
use std::sync::Arc;

use super::admit::{enter, named};
use super::range::{self, round_down, round_up};
use crate::driver::{BoxFuture, HostMap, Precision, Role, StatusFlags, StatusRun};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, Node, NodeId, walk};

/// The node and file that hold the bytes of a run one to one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostBytes {
    /// The node that holds them.
    pub node: NodeId,
    /// Its file, if it has one.
    pub file: Option<PathBuf>,
    /// Byte offset there.
    pub offset: u64,
}

/// A run of bytes of one kind, seen through a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChainRun {
    /// Length in bytes; zero only at or past the end.
    pub len: u64,
    /// Facts about it. Without `ALLOCATED`: none of the layers in question decides it.
    pub flags: StatusFlags,
    /// Backing steps from the top to the layer that decides it (or to the last one in question).
    pub depth: usize,
    /// The layer that decides it (or the last one in question).
    pub node: NodeId,
    /// Its place on the host, if known.
    pub host: Option<HostBytes>,
}

/// How far down the chain a question goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// To the end of the chain.
    All,
    /// Only the layers above this one.
    Above(NodeId),
}

/// The answer of one layer, references followed.
struct Layer {
    len: u64,
    flags: StatusFlags,
    host: Option<HostBytes>,
    /// As the driver returned it, for drivers that ask for the status of a child.
    map: Option<HostMap>,
}

impl Layer {
    fn end() -> Self {
        Self { len: 0, flags: StatusFlags::EOF, host: None, map: None }
    }
}

/// Status of one layer, for drivers.
pub(super) async fn of_layer(
    edge: &Edge,
    offset: u64,
    len: u64,
    precision: Precision,
) -> Result<StatusRun> {
    let layer = layer(edge, offset, len, precision).await?;
    Ok(StatusRun { len: layer.len, flags: layer.flags, map: layer.map })
}

fn layer(edge: &Edge, offset: u64, len: u64, precision: Precision) -> BoxFuture<'_, Result<Layer>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        named(&node, layer_entered(&node, offset, len, precision).await)
    })
}

/// What one layer decides, for a request that has entered: length of the run (0 at the end) and its
/// flags.
pub(super) async fn run_entered(node: &Node, offset: u64, len: u64) -> Result<(u64, StatusFlags)> {
    let layer = layer_entered(node, offset, len, Precision::Cheap).await?;
    Ok((layer.len, layer.flags))
}

async fn layer_entered(node: &Node, offset: u64, len: u64, precision: Precision) -> Result<Layer> {
    let total = node.len();
    let end = range::check(offset, len)?.min(total);
    if offset >= total {
        return Ok(Layer::end());
    }
    if end <= offset {
        return Ok(Layer { len: 0, flags: StatusFlags::empty(), host: None, map: None });
    }
    let align = u64::from(node.limits().request_alignment);
    let first = round_down(offset, align);
    let run = node.driver().block_status(first, round_up(end, align) - first, precision).await?;
    let head = offset - first;
    if run.len <= head {
        return Err(Error::new(ErrorKind::Corrupt, "the driver's status answer makes no progress")
            .at(offset)
            .field("length", run.len));
    }
    let len = (run.len - head).min(end - offset);
    let map = match run.map {
        None => None,
        Some(map) => Some(HostMap { offset: range::check(map.offset, head)?, ..map }),
    };
    let mut layer = if run.flags.contains(StatusFlags::RAW) {
        pass_on(node, map, len, precision).await?
    } else {
        own_answer(node, StatusRun { len, flags: run.flags, map }, offset, precision).await?
    };
    if offset + layer.len == total {
        layer.flags |= StatusFlags::EOF;
    }
    Ok(layer)
}

/// `RAW`: the child's answer is this node's. What a filter shows may lie further down the chain,
/// which the walk goes on to; for any other node the child with all that is below it is its own
/// content.
async fn pass_on(
    node: &Node,
    map: Option<HostMap>,
    len: u64,
    precision: Precision,
) -> Result<Layer> {
    let below = map.and_then(|map| Some((node.child(map.child)?, map.offset)));
    let Some((child, at)) = below else {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "the driver points to a child it does not have",
        ));
    };
    let mut passed = if node.driver().is_filter() {
        layer(&child, at, len, precision).await?
    } else {
        let run = of_chain(&child, Depth::All, at, len, precision).await?;
        let unclear = !run.flags.intersects(StatusFlags::DATA | StatusFlags::ZERO);
        let data = if unclear { StatusFlags::DATA } else { StatusFlags::empty() };
        let flags = run.flags | data | StatusFlags::ALLOCATED;
        Layer { len: run.len, flags, host: run.host, map: None }
    };
    if passed.len == 0 {
        // The child is shorter than what is shown of it; what is not there reads as zeros.
        passed = Layer { len, flags: StatusFlags::ZERO | StatusFlags::ALLOCATED, ..Layer::end() };
    }
    passed.flags.remove(StatusFlags::EOF);
    passed.map = None;
    Ok(passed)
}

async fn own_answer(
    node: &Node,
    run: StatusRun,
    offset: u64,
    precision: Precision,
) -> Result<Layer> {
    let StatusRun { mut len, mut flags, map } = run;
    let recurses =
        flags.contains(StatusFlags::RECURSE | StatusFlags::DATA | StatusFlags::OFFSET_VALID);
    flags.remove(StatusFlags::RECURSE | StatusFlags::EOF);
    if flags.intersects(StatusFlags::DATA | StatusFlags::ZERO) {
        flags |= StatusFlags::ALLOCATED;
    } else if node.driver().supports_backing() && !flags.contains(StatusFlags::ALLOCATED) {
        match node.cow_child() {
            None => flags |= StatusFlags::ZERO,
            Some(backing) if precision == Precision::Exact && backing.target().len() <= offset => {
                flags |= StatusFlags::ZERO;
            }
            Some(_) => {}
        }
    }
    let child = map.and_then(|map| Some((node.child(map.child)?, map.offset)));
    if let (true, true, Some((child, at))) = (recurses, precision == Precision::Exact, &child) {
        // Only adds a fact; if the file fails to answer, the answer stands as it is.
        if let Ok(below) = layer(child, *at, len, precision).await {
            let zero_below = below.flags & StatusFlags::ZERO;
            if below.flags.contains(StatusFlags::EOF) && (below.len == 0 || !zero_below.is_empty())
            {
                flags |= StatusFlags::ZERO;
            } else if below.len > 0 {
                len = below.len;
                flags |= zero_below;
            }
        }
    }
    let host = host_bytes(node, flags, map, child);
    Ok(Layer { len, flags, host, map })
}

fn host_bytes(
    node: &Node,
    flags: StatusFlags,
    map: Option<HostMap>,
    child: Option<(Arc<Edge>, u64)>,
) -> Option<HostBytes> {
    if !flags.contains(StatusFlags::OFFSET_VALID) {
        return None;
    }
    match child {
        Some((edge, offset)) => {
            let target = edge.target();
            Some(HostBytes { node: target.id(), file: walk::filename(&target), offset })
        }
        // A protocol node points at itself.
        None => map.map(|map| HostBytes {
            node: node.id(),
            file: walk::filename(node),
            offset: map.offset,
        }),
    }
}

/// Status of `offset..`, seen through the layers down to `depth`.
pub(super) fn of_chain(
    edge: &Arc<Edge>,
    depth: Depth,
    offset: u64,
    len: u64,
    precision: Precision,
) -> BoxFuture<'_, Result<ChainRun>> {
    Box::pin(walk_chain(edge, depth, offset, len, precision))
}

async fn walk_chain(
    edge: &Arc<Edge>,
    depth: Depth,
    offset: u64,
    len: u64,
    precision: Precision,
) -> Result<ChainRun> {
    let mut edge = Arc::clone(edge);
    let mut steps = 0;
    let mut len = len;
    let mut top: Option<ChainRun> = None;
    let mut end = None;
    loop {
        let (node, found) = step(&edge, depth, offset, len, precision).await?;
        let Some(Step { layer, is_filter, next }) = found else {
            // Nothing above decides it.
            let flags = StatusFlags::empty();
            let run = top.unwrap_or(ChainRun { len, flags, depth: steps, node, host: None });
            return Ok(finish(run, offset, end));
        };
        let mut run =
            ChainRun { len: layer.len, flags: layer.flags, depth: steps, node, host: layer.host };
        let is_top = top.is_none();
        if is_top {
            end = layer.flags.contains(StatusFlags::EOF).then_some(offset + layer.len);
            if run.len == 0 {
                return Ok(run);
            }
        } else if run.len == 0 {
            // This layer is shorter than those above: what is behind its end is zeros that it
            // decides.
            run.len = len;
            run.flags = StatusFlags::ZERO | StatusFlags::ALLOCATED;
            return Ok(finish(run, offset, end));
        }
        run.flags.remove(StatusFlags::EOF);
        if run.flags.contains(StatusFlags::ALLOCATED) {
            return Ok(finish(run, offset, end));
        }
        steps += usize::from(!is_filter);
        len = run.len;
        // What an upper layer knows (zeros behind a short backing node) stays true further down.
        if let Some(above) = &top {
            run.flags |= above.flags & StatusFlags::ZERO;
        }
        match next {
            None => return Ok(finish(run, offset, end)),
            Some(next) => edge = next,
        }
        top = Some(run);
    }
}

/// The edge to the next layer: what a filter shows, or the backing node.
pub(super) fn below(node: &Node) -> Option<Arc<Edge>> {
    if node.driver().is_filter() {
        node.filtered_child().or_else(|| node.child_in_role(Role::PRIMARY))
    } else {
        node.cow_child()
    }
}

/// Status of `offset..` in the layers down to the node named `bottom`, this one included.
pub(super) async fn down_to(
    edge: &Arc<Edge>,
    bottom: &str,
    offset: u64,
    len: u64,
) -> Result<StatusRun> {
    let mut at = Some(Arc::clone(edge));
    let depth = loop {
        let Some(here) = at else {
            let top = edge.target().name().to_owned();
            let words = format!("node '{bottom}' is not in the chain of '{top}'");
            return Err(Error::new(ErrorKind::NotFound, words));
        };
        let target = here.target();
        at = below(&target);
        if target.name() == bottom {
            break at.map_or(Depth::All, |next| Depth::Above(next.target().id()));
        }
    };
    let run = of_chain(edge, depth, offset, len, Precision::Cheap).await?;
    Ok(StatusRun { len: run.len, flags: run.flags, map: None })
}

/// The answer of one layer of a chain, and the edge to the next.
struct Step {
    layer: Layer,
    is_filter: bool,
    next: Option<Arc<Edge>>,
}

/// Gets the status of the node behind the edge and the edge to the next layer from the same node:
/// the edge may be moved a moment later. `None`: the node is the one to stop at, or shows it.
fn step(
    edge: &Edge,
    depth: Depth,
    offset: u64,
    len: u64,
    precision: Precision,
) -> BoxFuture<'_, Result<(NodeId, Option<Step>)>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        if let Depth::Above(base) = depth
            && shows(&node, base)
        {
            return Ok((node.id(), None));
        }
        let layer = named(&node, layer_entered(&node, offset, len, precision).await)?;
        let is_filter = node.driver().is_filter();
        Ok((node.id(), Some(Step { layer, is_filter, next: below(&node) })))
    })
}

/// Whether the node is `base`, or filters show it: they would answer for its bytes.
fn shows(node: &Node, base: NodeId) -> bool {
    if node.id() == base || !node.driver().is_filter() {
        return node.id() == base;
    }
    below(node).is_some_and(|edge| shows(&edge.target(), base))
}

fn finish(mut run: ChainRun, offset: u64, end: Option<u64>) -> ChainRun {
    run.flags.set(StatusFlags::EOF, end == Some(offset + run.len));
    run
}

/// True if the range is known to read as zeros through the whole chain. A cheap answer. Past the
/// end is zeros.
pub(super) async fn is_zero(edge: &Arc<Edge>, offset: u64, len: u64) -> Result<bool> {
    let end = range::check(offset, len)?;
    let mut at = offset;
    while at < end {
        let run = of_chain(edge, Depth::All, at, end - at, Precision::Cheap).await?;
        if run.len == 0 {
            return Ok(true);
        }
        if !run.flags.contains(StatusFlags::ZERO) {
            return Ok(false);
        }
        at += run.len;
    }
    Ok(true)
}
