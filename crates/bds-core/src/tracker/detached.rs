//! Counts detached operations: work that keeps a node open and may outlive its request.

use std::sync::atomic::Ordering;

use super::{RequestTracker, ShardNumber};

impl RequestTracker {
    /// As [`RequestTracker::enter`], for an operation that keeps its node open until
    /// [`RequestTracker::dec_detached`].
    pub(crate) fn inc_detached(&self) -> ShardNumber {
        self.detached.fetch_add(1, Ordering::SeqCst);
        self.enter()
    }

    /// Counts such an operation out.
    pub(crate) fn dec_detached(&self, number: ShardNumber) {
        self.detached.fetch_sub(1, Ordering::SeqCst);
        self.leave(number);
    }

    /// Number of detached operations.
    pub(crate) fn detached(&self) -> usize {
        self.detached.load(Ordering::SeqCst)
    }

    /// Waits until there is none, or until they are given up.
    pub(crate) async fn wait_no_detached(&self) {
        self.wait_until(|| self.detached() == 0 || self.is_given_up()).await;
    }
}
