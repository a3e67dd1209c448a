//! Changing a node's length.

use super::begun::Inside;
use super::enter::{Entered, enter, named};
use super::range::{self, MAX_LEN};
use crate::driver::{BoxFuture, Truncate};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{BlockOps, Edge, Perm};

/// Changes the length. Nothing else touches bytes behind the shorter of both lengths meanwhile.
pub(super) fn truncate(edge: &Edge, change: Truncate) -> BoxFuture<'_, Result<()>> {
    truncate_below(edge, change, None)
}

/// As [`truncate`], for a request that is inside other nodes too.
fn truncate_below<'a>(
    edge: &'a Edge,
    change: Truncate,
    above: Option<&'a Inside<'a>>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        named(&node, truncate_inside(edge, &node, change, above).await)
    })
}

/// As [`truncate`], for a user, who can be told to leave the length alone.
pub(super) async fn truncate_for_user(edge: &Edge, change: Truncate) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, node.check_allowed(BlockOps::RESIZE))?;
    named(&node, truncate_inside(edge, &node, change, None).await)
}

async fn truncate_inside(
    edge: &Edge,
    node: &Entered<'_>,
    mut change: Truncate,
    above: Option<&Inside<'_>>,
) -> Result<()> {
    range::check(0, change.len)?;
    if !node.is_writable() {
        return Err(Error::new(ErrorKind::PermissionDenied, "a read-only node cannot be resized"));
    }
    if !edge.access().perm.contains(Perm::RESIZE) {
        return Err(Error::new(
            ErrorKind::ReadOnly,
            format!("{} did not ask to resize this node", edge.holder()),
        ));
    }
    let stable = node.len().min(change.len);
    let tracked = node.track(stable..MAX_LEN, true).await;
    let old_len = node.len();
    if change.len > old_len {
        // Bytes of a longer backing node must not shine through where nobody ever wrote.
        let backing = node.cow_child().map_or(0, |child| child.target().len());
        change.zero_new |= backing > old_len;
    }
    let _writing = node.writing();
    let inside = Inside::new(node, &tracked).below(above);
    match inside.carry_out(move |node| node.driver().truncate(change)).await {
        Err(error) if error.kind() == ErrorKind::NotSupported && node.driver().is_filter() => {
            match node.filtered_child() {
                Some(child) => truncate_below(&child, change, Some(&inside)).await,
                None => Err(error),
            }
        }
        result => result,
    }
}
