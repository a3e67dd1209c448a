//! Work that is inside a node on its own behalf and keeps it open: operations whose request may have gone.

use std::sync::atomic::Ordering;

use super::{ShardNumber, Traffic};

impl Traffic {
    /// As [`Traffic::enter`], for work that keeps its node open until [`Traffic::move_out`].
    pub(crate) fn move_in(&self) -> ShardNumber {
        self.lodgers.fetch_add(1, Ordering::SeqCst);
        self.enter()
    }

    /// Counts such work out.
    pub(crate) fn move_out(&self, number: ShardNumber) {
        self.lodgers.fetch_sub(1, Ordering::SeqCst);
        self.leave(number);
    }

    /// How many keep the node open on their own behalf.
    pub(crate) fn lodgers(&self) -> usize {
        self.lodgers.load(Ordering::SeqCst)
    }

    /// Waits until nobody does, or until those inside are given up.
    pub(crate) async fn wait_moved_out(&self) {
        self.wait_until(|| self.lodgers() == 0 || self.is_given_up()).await;
    }
}
