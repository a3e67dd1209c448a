//! Copies bytes between two files on the host, without reading them here (copy offload).
//!
//! Both sides are followed down to the nodes that hold the bytes one to one: the source through
//! every layer that points to where its data lies, the target only through layers that merely pass
//! on, since every other driver must see each write. Where that fails the answer is `Unsupported`,
//! and the caller uses buffers. Encrypted and compressed runs point nowhere, so they are never
//! copied here.

use bds_refcount::Strong;

use super::admit::{Admission, Entered, RequestScope, enter, named};
use super::range;
use crate::driver::{Attempt, BoxFuture, HostMap, Precision, StatusFlags};
use crate::error::Result;
use crate::graph::{Edge, Node, Perm};

/// The scope above, and how many steps down the copy may still take.
type Path<'a> = (Option<&'a RequestScope<'a>>, usize);

/// Most steps down that are followed on each side.
const MAX_STEPS: usize = 16;

/// Where the bytes go.
#[derive(Clone, Copy)]
struct Target<'a> {
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
    follow_source(source, source_offset, Target { edge: target, offset, len }, (None, MAX_STEPS))
        .await
}

/// Follows the source down, in flight at every node on the way.
fn follow_source<'a>(
    edge: &'a Edge,
    offset: u64,
    target: Target<'a>,
    (above, steps): Path<'a>,
) -> BoxFuture<'a, Result<Attempt>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        if !fits(&node, offset, target.len) {
            return Ok(Attempt::Unsupported);
        }
        let admission = Admission::read(offset..offset + target.len);
        let scope = node.admit(admission).await?.below(above);
        if node.children().is_empty() {
            return follow_target((node.strong(), offset), target, (Some(&scope), MAX_STEPS)).await;
        }
        let data = StatusFlags::DATA | StatusFlags::OFFSET_VALID;
        match below(&node, offset, target.len, data).await? {
            Some((child, at)) if steps > 0 => {
                follow_source(&child, at, target, (Some(&scope), steps - 1)).await
            }
            _ => Ok(Attempt::Unsupported),
        }
    })
}

/// Follows the target down.
fn follow_target<'a>(
    reader: (&'a Strong<Node>, u64),
    target: Target<'a>,
    (above, steps): Path<'a>,
) -> BoxFuture<'a, Result<Attempt>> {
    Box::pin(async move {
        let Target { edge, offset, len } = target;
        let node = enter(edge).await?;
        named(&node, range::check_write(edge, &node, offset + len, Perm::WRITE))?;
        let must_see = node.driver().must_see_writes();
        if must_see || !fits(&node, offset, len) || node.strong().ptr_eq(reader.0) {
            return Ok(Attempt::Unsupported);
        }
        // A write also where bytes only pass through: a flush must come down to where they are.
        let scope = node.admit(Admission::write(offset..offset + len)).await?.below(above);
        if node.children().is_empty() {
            let (source, source_offset) = (reader.0.clone(), reader.1);
            let copied = scope.run(move |node| {
                Box::pin(async move {
                    let source = source.driver();
                    node.driver().copy_range_from(source, source_offset, offset, len).await
                })
            });
            return named(&node, copied.await);
        }
        // A driver that does more than pass on must see every write.
        match below(&node, offset, len, StatusFlags::RAW).await? {
            Some((child, at)) if steps > 0 => {
                let target = Target { edge: &child, offset: at, len };
                follow_target(reader, target, (Some(&scope), steps - 1)).await
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
    let answer = node.driver().block_status(offset, len, Precision::Cheap).await;
    let run = named(node, answer)?;
    let is_plain = run.flags.contains(StatusFlags::RAW)
        || run.flags.contains(wanted) && !run.flags.contains(StatusFlags::COMPRESSED);
    let Some(HostMap { child, offset: at }) = run.map.filter(|_| is_plain && run.len >= len) else {
        return Ok(None);
    };
    range::check(at, len)?;
    Ok(node.child(child).map(|edge| (edge, at)))
}
