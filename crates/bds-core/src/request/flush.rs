//! Making writes durable: once, in order, and honestly.
//!
//! Order: metadata to the children, own medium, then the children this node writes to. The medium is skipped if no write
//! ended since the last successful flush began; a write that ends during a flush is not covered by it. After a
//! medium failed to flush, nobody knows which of its bytes are durable: every later flush of the node fails too.
//!
//! Flushing the medium runs to its end even if the caller goes away, because its failure is told only once; the next flush
//! waits for that. The turn of a flush lies in its request's future, which a task polls: a caller that merely keeps the future that
//! it was given does not keep the turn.

use super::admit::{Entered, enter, named};
use super::detach_on_drop::RequestScope;
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Edge;
use crate::tracker::Flushing;

/// Makes every write durable that ended before.
pub(super) fn flush(edge: &Edge) -> BoxFuture<'_, Result<()>> {
    flush_below(edge, None)
}

/// As [`flush`], for a request that is inside other nodes too.
fn flush_below<'a>(
    edge: &'a Edge,
    above: Option<&'a RequestScope<'a>>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        flush_writable(&node, above).await
    })
}

/// As [`flush`], for a request that is inside already.
pub(super) async fn flush_inside(node: &Entered<'_>) -> Result<()> {
    flush_writable(node, None).await
}

async fn flush_writable(node: &Entered<'_>, above: Option<&RequestScope<'_>>) -> Result<()> {
    if !node.is_writable() {
        return Ok(());
    }
    // Its children's failures carry their own names.
    named(node, flush_node(node, above).await)
}

async fn flush_node(node: &Entered<'_>, above: Option<&RequestScope<'_>>) -> Result<()> {
    let inside = RequestScope::flush(node).below(above);
    let mut flushing = node.tracker().begin_flush().await;
    if let Some(error) = node.tracker().flush_failure() {
        return Err(error.context("an earlier flush failed, so bytes may be lost; reopen the node"));
    }
    inside.run(|node| node.driver().flush_to_os()).await?;
    if !node.flags().cache.no_flush && !flushing.is_clean() {
        let result;
        (flushing, result) = flush_medium(&inside, flushing).await;
        result?;
    }
    let mut first = Ok(());
    for child in node.children().iter().filter(|child| child.may_hold_writes()) {
        first = first.and(flush_below(child, Some(&inside)).await);
    }
    first?;
    flushing.succeeded();
    Ok(())
}

/// Asks the driver, and tells the node's tracker of a failure whether or not anyone still waits. No other flush begins meanwhile.
async fn flush_medium(inside: &RequestScope<'_>, flushing: Flushing) -> (Flushing, Result<()>) {
    let work = inside.run(move |node| {
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
    work.await
}

/// Errors that say the medium was not asked at all leave everything as it was.
fn is_lasting(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::NotSupported | ErrorKind::WouldWait | ErrorKind::Cancelled)
}
