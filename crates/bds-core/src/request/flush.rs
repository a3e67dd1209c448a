//! Flushes a node: makes its completed writes durable, once and in order.
//!
//! Order: metadata to the children, the node's own medium, then the children this node writes to,
//! and at last backing images that were written to by the users above (`graph/change/flush.rs`).
//! The medium is skipped if no write ended since the last successful flush began; a write that ends
//! during a flush is not covered by it. After a medium failed to flush it is unknown which of its
//! bytes are durable: every later flush of the node fails too.
//!
//! Flushing the medium runs to completion even if its caller is dropped, because the host reports a
//! failure only once; the next flush waits for that. The turn of a flush is held by its request's
//! task, so a caller that keeps its future without polling it does not hold up later flushes.

use super::admit::{Entered, RequestScope, enter, named};
use super::status::below;
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, Node};
use crate::tracker::Flushing;

/// Makes every write durable that ended before.
pub(super) fn flush(edge: &Edge) -> BoxFuture<'_, Result<()>> {
    flush_below(edge, None)
}

/// As [`flush`], for a request that is in flight at other nodes too.
fn flush_below<'a>(
    edge: &'a Edge,
    above: Option<&'a RequestScope<'a>>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        flush_writable(&node, above).await
    })
}

/// As [`flush`], for a request that has entered.
pub(super) async fn flush_entered(node: &Entered<'_>) -> Result<()> {
    flush_writable(node, None).await
}

async fn flush_writable(node: &Entered<'_>, above: Option<&RequestScope<'_>>) -> Result<()> {
    let mut first = Ok(());
    if node.is_writable() {
        // Failures of its children carry their own names.
        first = named(node, flush_node(node, above).await);
    }
    // What was written to images that became backing images since.
    if let Some(edge) = below(node)
        && leads_to_hidden_writes(&edge)
    {
        let scope = node.scope().below(above);
        first = first.and(flush_below(&edge, Some(&scope)).await);
    }
    first
}

/// Whether writes of users above wait in this image or in one below to be made durable.
fn leads_to_hidden_writes(edge: &Edge) -> bool {
    let Some(target) = edge.medium() else { return false };
    let node: &Node = &target;
    node.tracker().has_hidden_writes()
        || below(node).is_some_and(|edge| leads_to_hidden_writes(&edge))
}

async fn flush_node(node: &Entered<'_>, above: Option<&RequestScope<'_>>) -> Result<()> {
    let scope = node.scope().below(above);
    let mut flushing = node.tracker().begin_flush().await;
    if let Some(error) = node.tracker().flush_failure() {
        return Err(error.context("an earlier flush failed, so bytes may be lost; reopen the node"));
    }
    scope.run(|node| node.driver().flush_to_os()).await?;
    if !node.flags().cache.no_flush && !flushing.is_clean() {
        let result;
        (flushing, result) = flush_medium(&scope, flushing).await;
        result?;
    }
    let mut first = Ok(());
    for child in node.children().iter().filter(|child| child.may_hold_writes()) {
        first = first.and(flush_below(child, Some(&scope)).await);
    }
    first?;
    flushing.succeeded();
    Ok(())
}

/// Flushes the driver's medium and records a failure in the tracker even if the caller is gone.
/// Excludes other flushes.
async fn flush_medium(scope: &RequestScope<'_>, flushing: Flushing) -> (Flushing, Result<()>) {
    let flushed = scope.run(move |node| {
        Box::pin(async move {
            let result = node.driver().flush_to_disk().await;
            if let Err(error) = &result
                && is_lasting(error)
            {
                node.tracker().flush_failed(error);
            }
            (flushing, result)
        })
    });
    flushed.await
}

/// False for errors after which the medium is as before: it was not reached.
fn is_lasting(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::NotSupported | ErrorKind::WouldWait | ErrorKind::Cancelled)
}
