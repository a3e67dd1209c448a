//! Letting the host copy bytes between two files, without reading them here.
//!
//! Both sides are followed down to the nodes that hold the bytes one to one: the source through every layer that
//! points to where its data lies, the target only through layers that merely pass on, since everything else must
//! learn of a write. What cannot be followed is `Unsupported`, and the caller uses buffers. Never for encrypted or
//! compressed data: such runs point nowhere.

use bds_refcount::Strong;

use super::admit::{Entered, enter, named};
use super::detach_on_drop::RequestScope;
use super::range;
use crate::driver::{Attempt, BoxFuture, HostMap, StatusFlags};
use crate::error::Result;
use crate::graph::{Edge, Node};

/// Where the copy is inside already, and how many steps down it may take.
type Way<'a> = (Option<&'a RequestScope<'a>>, usize);

/// Longest way down that is followed on each side.
const MAX_STEPS: usize = 16;

/// Where the bytes go.
#[derive(Clone, Copy)]
struct Goal<'a> {
    edge: &'a Edge,
    offset: u64,
    len: u64,
}

/// Copies all `len` bytes, or says `Unsupported` (part of them may have been copied then).
pub(super) async fn copy(
    source: &Edge,
    source_offset: u64,
    target: &Edge,
    offset: u64,
    len: u64,
) -> Result<Attempt> {
    range::check(source_offset, len)?;
    range::check(offset, len)?;
    if len == 0 {
        return Ok(Attempt::Done);
    }
    from(source, source_offset, Goal { edge: target, offset, len }, (None, MAX_STEPS)).await
}

/// Down the source's side, inside every node on the way.
fn from<'a>(
    edge: &'a Edge,
    offset: u64,
    goal: Goal<'a>,
    (above, steps): Way<'a>,
) -> BoxFuture<'a, Result<Attempt>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        if !fits(&node, offset, goal.len) {
            return Ok(Attempt::Unsupported);
        }
        let tracked = node.track(offset..offset + goal.len, false).await;
        let inside = RequestScope::new(&node, &tracked).below(above);
        if node.children().is_empty() {
            return to((node.strong(), offset), goal, (Some(&inside), MAX_STEPS)).await;
        }
        let data = StatusFlags::DATA | StatusFlags::OFFSET_VALID;
        match below(&node, offset, goal.len, data).await? {
            Some((child, at)) if steps > 0 => {
                from(&child, at, goal, (Some(&inside), steps - 1)).await
            }
            _ => Ok(Attempt::Unsupported),
        }
    })
}

/// Down the target's side.
fn to<'a>(
    reader: (&'a Strong<Node>, u64),
    goal: Goal<'a>,
    (above, steps): Way<'a>,
) -> BoxFuture<'a, Result<Attempt>> {
    Box::pin(async move {
        let Goal { edge, offset, len } = goal;
        let node = enter(edge).await?;
        named(&node, range::check_write(edge, &node, offset + len, false))?;
        if !fits(&node, offset, len) || node.strong().ptr_eq(reader.0) {
            return Ok(Attempt::Unsupported);
        }
        let tracked = node.track(offset..offset + len, false).await;
        let inside = RequestScope::new(&node, &tracked).below(above);
        // Also where bytes only pass through: a flush must come down to where they are.
        let _writing = node.writing();
        if node.children().is_empty() {
            let (source, source_offset) = (reader.0.clone(), reader.1);
            let copied = inside.run(move |node| {
                Box::pin(async move {
                    let source = source.driver();
                    node.driver().copy_range_from(source, source_offset, offset, len).await
                })
            });
            return named(&node, copied.await);
        }
        // Whoever does more than pass on must learn of every write.
        match below(&node, offset, len, StatusFlags::RAW).await? {
            Some((child, at)) if steps > 0 => {
                let goal = Goal { edge: &child, offset: at, len };
                to(reader, goal, (Some(&inside), steps - 1)).await
            }
            _ => Ok(Attempt::Unsupported),
        }
    })
}

fn fits(node: &Node, offset: u64, len: u64) -> bool {
    let align = u64::from(node.limits().request_alignment);
    (offset | len) & (align - 1) == 0 && offset + len <= node.len()
}

/// The child that holds all of the range one to one, if the answer has `wanted` or is passed on.
async fn below(
    node: &Entered<'_>,
    offset: u64,
    len: u64,
    wanted: StatusFlags,
) -> Result<Option<(std::sync::Arc<Edge>, u64)>> {
    let answer = node.driver().block_status(offset, len, false).await;
    let run = named(node, answer)?;
    let is_plain = run.flags.contains(StatusFlags::RAW)
        || run.flags.contains(wanted) && !run.flags.contains(StatusFlags::COMPRESSED);
    let Some(HostMap { child, offset: at }) = run.map.filter(|_| is_plain && run.len >= len) else {
        return Ok(None);
    };
    range::check(at, len)?;
    Ok(node.child(child).map(|edge| (edge, at)))
}
