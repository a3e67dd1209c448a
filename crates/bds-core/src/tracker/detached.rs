//! Counts detached operations: work that keeps a node open and may outlive its request.

use std::sync::atomic::{AtomicUsize, Ordering};

use bds_refcount::shard_count;
use crossbeam::utils::CachePadded;

use super::{RequestTracker, ShardNumber};

/// Number of detached operations of many nodes, in shards: threads do not share a cache line.
pub(crate) struct DetachedCount(Box<[CachePadded<AtomicUsize>]>);

impl Default for DetachedCount {
    fn default() -> Self {
        Self((0..shard_count()).map(|_| CachePadded::default()).collect())
    }
}

impl DetachedCount {
    /// True if there is one that began before this call and has not ended.
    pub(crate) fn has_any(&self) -> bool {
        self.0.iter().any(|shard| shard.load(Ordering::SeqCst) != 0)
    }
}

impl RequestTracker {
    /// As [`RequestTracker::enter`], for an operation that keeps its node open until
    /// [`RequestTracker::dec_detached`].
    pub(crate) fn inc_detached(&self) -> ShardNumber {
        self.detached.fetch_add(1, Ordering::SeqCst);
        let number = self.enter();
        if let Some(all) = &self.all_detached {
            all.0[number.0].fetch_add(1, Ordering::SeqCst);
        }
        number
    }

    /// Counts such an operation out.
    pub(crate) fn dec_detached(&self, number: ShardNumber) {
        self.detached.fetch_sub(1, Ordering::SeqCst);
        if let Some(all) = &self.all_detached {
            all.0[number.0].fetch_sub(1, Ordering::SeqCst);
        }
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
