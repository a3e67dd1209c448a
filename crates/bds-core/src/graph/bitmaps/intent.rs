//! The write-intent log of a node's persistent bitmaps: makes regions durable in it before the
//! first change of their data, and what was edited after edits. The log itself is
//! [`crate::bitmap::intent_log`]; its file is the driver's ([`IntentStore`]).
//!
//! ```text
//! change of data   range registered ─► [needed? start, log] ─► driver ─► bitmaps marked ─► range free
//! checkpoint       all ranges registered ─► next epoch ─► all free ─► copy bitmaps, flush disk, store
//! edit             stored copy marked ─► bitmaps edited ─► checkpoint
//! ```
//!
//! A change is logged while its range is registered with the tracker, and an epoch begins while all
//! ranges are: so each change that was logged in the old epoch has marked the bitmaps before they
//! are copied. The wait is that for requests in flight; storing holds up no request.
//!
//! If the log cannot be written, the disk stays usable: the driver makes what is stored count as
//! nothing, durably, and changes go on without a log. Only if that fails too, the change fails.
//!
//! Order: ranges of requests, then `store_turn`.

use std::ops::Range;
use std::pin::pin;

use bds_refcount::Strong;
use futures_util::future::select;

use super::persist;
use crate::bitmap::intent_log::IntentLog;
use crate::driver::IntentStore;
use crate::error::{Error, Result};
use crate::graph::NodeRef;
use crate::graph::model::node::Node;

/// A checkpoint is made when this much of the disk was logged since the last one: one part in …
const CHECKPOINT_PART: u64 = 8;
/// … but not for less than this many bytes …
const CHECKPOINT_MIN_LEN: u64 = 256 << 20;
/// … and no sooner than this long after the last one.
const CHECKPOINT_AGE_MS: u64 = 30_000;

impl Node {
    /// Whether a change of the range must wait for [`log_change`] first.
    #[inline]
    pub(crate) fn must_log(&self, range: &Range<u64>) -> bool {
        self.bitmaps.must_log(range)
    }

    /// The store of its log, and the log.
    fn intent(&self) -> Option<(&dyn IntentStore, &IntentLog)> {
        let store = self.driver().bitmap_store()?.intent()?;
        Some((store, store.log()))
    }

    /// The write-intent log, for a node that was just opened.
    pub(in crate::graph) fn take_intent_log(&self) {
        self.bitmaps.set_intent(self.intent().map(|(_, log)| log.clone()));
    }
}

/// Makes the regions of a range durable in the log, before data changes in it. The range is
/// registered, and its turn has come.
///
/// # Errors
/// The data must not be changed: neither could the log be written, nor what is stored be
/// invalidated.
pub(crate) async fn log_change(node: &Strong<Node>, range: Range<u64>) -> Result<()> {
    let Some((_, log)) = node.intent() else { return Ok(()) };
    while log.needs(&range) {
        let done = match log.is_started() {
            true => log.log(range.clone()).await,
            false => start(node).await,
        };
        if let Err(error) = done {
            give_up(node, error).await?;
        }
    }
    Ok(())
}

/// Whether so much was logged that the caller makes a [`checkpoint`] now, which no other is about
/// to make.
pub(crate) fn claim_checkpoint(node: &Node) -> bool {
    let bound = (node.len() / CHECKPOINT_PART).max(CHECKPOINT_MIN_LEN);
    let is_due =
        |log: &IntentLog| log.logged_bytes() >= bound && log.claim_checkpoint(CHECKPOINT_AGE_MS);
    node.intent().is_some_and(|(_, log)| is_due(log))
}

/// Starts the log, unless it is. No change that needs it is under way.
async fn start(node: &Node) -> Result<()> {
    let _turn = node.bitmaps.shared().store_turn.lock().await;
    start_in_turn(node).await
}

async fn start_in_turn(node: &Node) -> Result<()> {
    match node.intent() {
        Some((store, log)) if !log.is_started() && !log.is_given_up() => {
            store.start(&persist::copies_to_store(node)?).await
        }
        _ => Ok(()),
    }
}

/// Before the stored bitmaps are marked in use for another reason than a change of data. The caller
/// has the store's turn.
///
/// # Errors
/// As [`log_change`].
pub(super) async fn start_before_mark(node: &Node) -> Result<()> {
    match start_in_turn(node).await {
        Ok(()) => Ok(()),
        Err(error) => give_up_in_turn(node, error).await,
    }
}

/// As [`start_before_mark`], for a change of the image that is none of the disk's data.
pub(crate) async fn start_before_change(node: &Node) -> Result<()> {
    match node.intent() {
        Some((_, log)) if log.needs_start() => {
            let _turn = node.bitmaps.shared().store_turn.lock().await;
            start_before_mark(node).await
        }
        _ => Ok(()),
    }
}

/// Goes on without the log, after this error.
async fn give_up(node: &Node, cause: Error) -> Result<()> {
    let _turn = node.bitmaps.shared().store_turn.lock().await;
    give_up_in_turn(node, cause).await
}

async fn give_up_in_turn(node: &Node, cause: Error) -> Result<()> {
    let Some((store, log)) = node.intent() else { return Ok(()) };
    if log.is_given_up() {
        return Ok(());
    }
    let (name, error) = (node.name(), &cause);
    tracing::warn!(node = name, %error, "the log of the dirty bitmaps is lost; a crash will lose the bitmaps");
    store.invalidate().await.map_err(|error| {
        error
            .context(format!("the dirty bitmaps could neither be logged ({cause}) nor invalidated"))
    })?;
    log.give_up().await;
    Ok(())
}

/// Stores the bitmaps as they are now in the log, durably, and empties it. Nothing to do for nodes
/// without a log, without persistent bitmaps, or that cannot be written.
///
/// # Errors
/// Those of the driver: what a crash leaves is right, but older.
pub(crate) async fn checkpoint(node: &Node) -> Result<()> {
    let Some((store, log)) = node.intent() else { return Ok(()) };
    let has_persistent = node.bitmaps.get().is_some_and(|locked| locked.has_persistent());
    if !node.is_writable() || log.is_given_up() || (!has_persistent && !log.is_started()) {
        return Ok(());
    }
    let named = |error: Error| {
        error.context("cannot make the dirty bitmaps durable in their log").node(node.name())
    };
    let mut all_ranges = node.tracker().track_all();
    {
        let given_up = pin!(node.tracker().wait_given_up());
        select(pin!(all_ranges.wait_turn()), given_up).await;
    }
    let _turn = node.bitmaps.shared().store_turn.lock().await;
    if !log.is_started() {
        return start_in_turn(node).await.map_err(named);
    }
    log.begin_epoch().await.map_err(named)?;
    drop(all_ranges);
    let all = persist::copies_to_store(node)?;
    store.checkpoint(&all).await.map_err(named)
}

/// [`checkpoint`] of nodes whose bitmaps a change has edited. Returns what failed.
pub(in crate::graph) async fn checkpoint_all(nodes: Vec<NodeRef>) -> Vec<Error> {
    let mut failed = Vec::new();
    for node in nodes {
        failed.extend(checkpoint(&node).await.err());
    }
    failed
}
