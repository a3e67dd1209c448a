//! Rewrites the backing file that an image records, as a request of a backend.
//!
//! The node is flushed first: a header that no longer names the old backing file must never become
//! durable before what was copied out of it.

use super::admit::{RequestScope, enter, named};
use super::{flush, range};
use crate::driver::BackingRecord;
use crate::error::Result;
use crate::graph::{Edge, intent};

/// Flushes the node, then rewrites its record durably.
pub(super) async fn set(edge: &Edge, record: Option<BackingRecord>) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, range::may_write(edge, &node, 0, range::write_perms(true)))?;
    named(&node, node.driver().check_backing_record(record.clone()).await)?;
    flush::flush_entered(&node).await?;
    // It marks the image's bitmaps as in use: a crash must find their log.
    named(&node, intent::start_before_change(&node).await)?;
    let scope: RequestScope<'_> = node.scope();
    named(&node, scope.run(move |node| node.driver().set_backing_record(record)).await)
}

/// Checks whether the record could be written now.
pub(super) async fn check(edge: &Edge, record: Option<BackingRecord>) -> Result<()> {
    let node = enter(edge).await?;
    named(&node, node.driver().check_backing_record(record).await)
}

/// Notes what the backing node shows, or that it is not known.
pub(super) async fn mark_base(edge: &Edge, is_known: bool) -> Result<bool> {
    let node = enter(edge).await?;
    named(&node, range::may_write(edge, &node, 0, range::write_perms(true)))?;
    let scope: RequestScope<'_> = node.scope();
    named(&node, scope.run(move |node| node.driver().mark_base(is_known)).await)
}
