//! Copies bytes between two files on the host, without reading them here (copy offload).
//!
//! Both sides are followed down to the nodes that hold the bytes one to one: the source through
//! every layer that points to where its data lies, the target only through layers that merely pass
//! on, since every other driver must see each write. Where that fails the answer is `Unsupported`,
//! and the caller uses buffers. Encrypted and compressed runs point nowhere, so they are never
//! copied here.
//!
//! A copy is in flight at two nodes, and a drain waits for both. So it never waits for one of them
//! while it is in flight at the other: the gate in front of the target may be closed until a drain
//! of the source has ended, and so may a request that excludes it there wait for it here. Where the
//! target is not free at once, the copy leaves the source, waits for the target alone, and starts
//! anew.

use bds_refcount::Strong;

use super::admit::{Admission, Entered, RequestScope, enter, enter_now, named};
use super::range;
use crate::driver::{Attempt, BoxFuture, HostMap, Precision, StatusFlags};
use crate::error::{ErrorKind, Result};
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

/// What became of an attempt.
enum Outcome {
    Ended(Attempt),
    /// The target was not free: nothing was copied.
    Busy,
}

impl Outcome {
    const UNSUPPORTED: Self = Self::Ended(Attempt::Unsupported);
}

/// The node that holds the source's bytes, and where.
type Reader<'a> = (&'a Strong<Node>, u64);

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
    let (target, path) = (Target { edge: target, offset, len }, (None, MAX_STEPS));
    loop {
        if let Outcome::Ended(attempt) = follow_source(source, source_offset, target, path).await? {
            return Ok(attempt);
        }
        // The way down, without a reader: waits until it is free.
        follow_target(None, target, path).await?;
    }
}

/// Follows the source down, in flight at every node on the way.
fn follow_source<'a>(
    edge: &'a Edge,
    offset: u64,
    target: Target<'a>,
    (above, steps): Path<'a>,
) -> BoxFuture<'a, Result<Outcome>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        if !fits(&node, offset, target.len) {
            return Ok(Outcome::UNSUPPORTED);
        }
        let admission = Admission::read(offset..offset + target.len);
        let scope = node.admit(admission).await?.below(above);
        if node.children().is_empty() {
            let reader = Some((node.strong(), offset));
            return follow_target(reader, target, (Some(&scope), MAX_STEPS)).await;
        }
        let data = StatusFlags::DATA | StatusFlags::OFFSET_VALID;
        match below(&node, offset, target.len, data).await? {
            Some((child, at)) if steps > 0 => {
                follow_source(&child, at, target, (Some(&scope), steps - 1)).await
            }
            _ => Ok(Outcome::UNSUPPORTED),
        }
    })
}

/// Follows the target down, and copies at its end. Without a reader it only waits on the way; with
/// one it waits nowhere.
fn follow_target<'a>(
    reader: Option<Reader<'a>>,
    target: Target<'a>,
    (above, steps): Path<'a>,
) -> BoxFuture<'a, Result<Outcome>> {
    Box::pin(async move {
        let Target { edge, offset, len } = target;
        let node = match reader {
            None => enter(edge).await?,
            Some(_) => match enter_now(edge) {
                Some(node) => node?,
                None => return Ok(Outcome::Busy),
            },
        };
        named(&node, range::check_write(edge, &node, offset + len, Perm::WRITE))?;
        let is_read = reader.is_some_and(|(source, _)| node.strong().ptr_eq(source));
        if node.driver().must_see_writes() || !fits(&node, offset, len) || is_read {
            return Ok(Outcome::UNSUPPORTED);
        }
        let Some(scope) = admit(&node, offset, len, reader.is_some()).await? else {
            return Ok(Outcome::Busy);
        };
        let scope = scope.below(above);
        if node.children().is_empty() {
            return match reader {
                None => Ok(Outcome::Busy),
                Some(reader) => copy_here(&node, &scope, reader, (offset, len)).await,
            };
        }
        // A driver that does more than pass on must see every write.
        match below(&node, offset, len, StatusFlags::RAW).await? {
            Some((child, at)) if steps > 0 => {
                let target = Target { edge: &child, offset: at, len };
                follow_target(reader, target, (Some(&scope), steps - 1)).await
            }
            _ => Ok(Outcome::UNSUPPORTED),
        }
    })
}

/// Admits the copy at a node of the target. `None`: another request excludes it, and it must not
/// wait.
async fn admit<'n>(
    node: &'n Entered<'_>,
    offset: u64,
    len: u64,
    is_copy: bool,
) -> Result<Option<RequestScope<'n>>> {
    let range = offset..offset + len;
    // A write also where bytes only pass through: a flush must come down to where they are.
    let admission = match is_copy {
        true => Admission::write(range).no_wait_if(true),
        false => Admission::read(range),
    };
    match node.admit(admission).await {
        Ok(scope) => Ok(Some(scope)),
        Err(error) if is_copy && error.kind() == ErrorKind::WouldWait => Ok(None),
        Err(error) => Err(error),
    }
}

/// Copies at the node that holds the target's bytes.
async fn copy_here(
    node: &Entered<'_>,
    scope: &RequestScope<'_>,
    (source, source_offset): Reader<'_>,
    (offset, len): (u64, u64),
) -> Result<Outcome> {
    let source = source.clone();
    let copied = scope.run(move |node| {
        Box::pin(async move {
            node.driver().copy_range_from(source.driver(), source_offset, offset, len).await
        })
    });
    Ok(Outcome::Ended(named(node, copied.await)?))
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
