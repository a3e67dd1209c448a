//! Making writes durable: once, in order, and honestly.
//!
//! Order: metadata to the children, own medium, then the children this node writes to. The medium is skipped if no write
//! ended since the last successful flush began; a write that ends during a flush is not covered by it. After a
//! medium failed to flush, nobody knows which of its bytes are durable: every later flush of the node fails too.
//!
//! Flushing the medium runs to its end even if the caller goes away, because its failure is told only once.

use std::future::poll_fn;
use std::task::Poll;

use super::enter::{Entered, enter, named};
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Edge;

/// Makes every write durable that ended before.
pub(super) fn flush(edge: &Edge) -> BoxFuture<'_, Result<()>> {
    Box::pin(async move {
        let node = enter(edge).await?;
        flush_inside(&node).await
    })
}

/// As [`flush`], for a request that is inside already.
pub(super) async fn flush_inside(node: &Entered<'_>) -> Result<()> {
    if !node.is_writable() {
        return Ok(());
    }
    named(node, flush_node(node).await)?;
    // Its own children's failures carry their own names.
    Ok(())
}

async fn flush_node(node: &Entered<'_>) -> Result<()> {
    let mut flushing = node.traffic().begin_flush().await;
    if let Some(error) = node.traffic().flush_failure() {
        return Err(error.context("an earlier flush failed, so bytes may be lost; reopen the node"));
    }
    node.driver().flush_to_os().await?;
    if !node.flags().cache.no_flush && !flushing.is_clean() {
        flush_medium(node).await?;
    }
    let mut first = Ok(());
    for child in node.children().iter().filter(|child| child.may_hold_writes()) {
        first = first.and(flush(child).await);
    }
    first?;
    flushing.succeeded();
    Ok(())
}

/// Polls the driver here; what does not finish at once moves into a task of its own, which reports to the node's
/// traffic whether or not anyone still waits.
async fn flush_medium(node: &Entered<'_>) -> Result<()> {
    let inside = node.again();
    let mut work: BoxFuture<'static, Result<()>> = Box::pin(async move {
        let result = inside.driver().flush_to_disk().await;
        if let Err(error) = &result
            && is_lasting(error)
        {
            inside.traffic().flush_failed(error);
        }
        result
    });
    let first = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
    match first {
        Poll::Ready(result) => result,
        Poll::Pending => Unstoppable::new(bds_io::spawn(work)).finish().await,
    }
}

/// Errors that say the medium was not asked at all leave everything as it was.
fn is_lasting(error: &Error) -> bool {
    !matches!(error.kind(), ErrorKind::NotSupported | ErrorKind::WouldWait | ErrorKind::Cancelled)
}

/// A task that runs on when nobody waits for it any more.
pub(super) struct Unstoppable<T>(Option<bds_io::Task<T>>);

impl<T> Unstoppable<T> {
    pub(super) fn new(task: bds_io::Task<T>) -> Self {
        Self(Some(task))
    }

    /// Its output.
    pub(super) async fn finish(mut self) -> T {
        let task = self.0.as_mut().expect("only `drop` and the line below take it");
        let result = task.await;
        self.0 = None;
        result
    }
}

impl<T> Drop for Unstoppable<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}
