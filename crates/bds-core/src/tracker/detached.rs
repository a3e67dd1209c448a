//! Work that is inside a node on its own behalf and keeps it open: operations whose request may have gone.

use std::sync::atomic::Ordering;

use super::{RequestTracker, ShardNumber};

impl RequestTracker {
    /// As [`RequestTracker::enter`], for work that keeps its node open until [`RequestTracker::dec_detached`].
    pub(crate) fn inc_detached(&self) -> ShardNumber {
        self.detached.fetch_add(1, Ordering::SeqCst);
        self.enter()
    }

    /// Counts such work out.
    pub(crate) fn dec_detached(&self, number: ShardNumber) {
        self.detached.fetch_sub(1, Ordering::SeqCst);
        self.leave(number);
    }

    /// How many keep the node open on their own behalf.
    pub(crate) fn detached(&self) -> usize {
        self.detached.load(Ordering::SeqCst)
    }

    /// Waits until nobody does, or until those inside are given up.
    pub(crate) async fn wait_no_detached(&self) {
        self.wait_until(|| self.detached() == 0 || self.is_given_up()).await;
    }
}
