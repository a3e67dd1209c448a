//! Changes a node's length.

use super::admit::{Admission, Entered, RequestScope, enter, named};
use super::range::{self, MAX_LEN};
use crate::driver::{BoxFuture, Truncate};
use crate::error::{ErrorKind, Result};
use crate::graph::{BlockOps, Edge};

/// Changes the length. Excludes requests to bytes behind the shorter of both lengths meanwhile.
pub(super) fn truncate(edge: &Edge, change: Truncate) -> BoxFuture<'_, Result<()>> {
    truncate_below(edge, change, None)
}

/// As [`truncate`], for a request that is in flight at other nodes too.
fn truncate_below<'a>(
    edge: &'a Edge,
    change: Truncate,
    above: Option<&'a RequestScope<'a>>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        named(&node, truncate_entered(edge, &node, change, above).await)
    })
}

/// As [`truncate`], for a backend's request, which a resize blocker refuses.
pub(super) async fn truncate_for_user(edge: &Edge, change: Truncate) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, node.check_allowed(BlockOps::RESIZE))?;
    named(&node, truncate_entered(edge, &node, change, None).await)
}

/// As [`truncate`], for a request that has entered.
pub(super) async fn truncate_entered(
    edge: &Edge,
    node: &Entered<'_>,
    mut change: Truncate,
    above: Option<&RequestScope<'_>>,
) -> Result<()> {
    range::check(0, change.len)?;
    range::check_resize(edge, node)?;
    node.check_bitmaps_resize(change.len)?;
    let stable = node.len().min(change.len);
    let scope = node.admit(Admission::resize(stable..MAX_LEN)).await?.below(above);
    let old_len = node.len();
    if change.len > old_len {
        // Bytes of a longer backing node must not become visible in the grown part.
        let backing = node.cow_child().map_or(0, |child| child.target().len());
        change.zero_new |= backing > old_len;
    }
    match scope.run(move |node| node.driver().truncate(change)).await {
        Err(error) if error.kind() == ErrorKind::NotSupported && node.driver().is_filter() => {
            match node.filtered_child() {
                Some(child) => truncate_below(&child, change, Some(&scope)).await,
                None => Err(error),
            }
        }
        result => result,
    }
}
