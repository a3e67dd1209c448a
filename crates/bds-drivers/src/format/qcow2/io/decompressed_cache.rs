//! A cache of decompressed clusters, so that a sequence of small reads decompresses each cluster
//! once.
//!
//! Keyed by the L2 entry, which names the bytes in the file. Freed bytes may be reused, so
//! `release.rs` removes their entry here first, after all readers that may still insert it have
//! finished (`srcu.rs`).
//!
//! The first read of a part of a cluster decompresses up to there, and nothing is kept: scattered
//! reads seldom repeat. A second read soon after decompresses all of it.
//!
//! Split into shards with a lock each, held for a lookup or a copy of a pointer. The budget is in
//! bytes, counting clusters only.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::Buf;

use crate::format::qcow2::task::Completion;

const MAX_SHARDS: usize = 16;
/// How many first requests a shard remembers.
const SEEN_ONCE: usize = 32;

#[derive(Debug)]
enum State {
    Ready {
        cluster: Buf,
        used: bool,
    },
    /// Being decompressed.
    Filling(Arc<Completion>),
}

#[derive(Debug, Default)]
struct Shard {
    clusters: HashMap<u64, State>,
    /// In clock order for eviction; only those that are ready.
    ring: VecDeque<u64>,
    /// Requested once, not kept; the oldest in front.
    seen_once: VecDeque<u64>,
}

/// The cache; see the module docs.
#[derive(Debug)]
pub(crate) struct DecompressedCache {
    shards: Box<[Mutex<Shard>]>,
    cluster_len: usize,
    clusters_per_shard: AtomicUsize,
}

/// The result of a request for a cluster.
pub(crate) enum CacheLookup {
    /// The cluster, or more of it than was requested.
    Ready(Buf),
    /// Wait, and call again.
    Wait(Arc<Completion>),
    /// Decompress all of it and insert it.
    Fill(FillGuard),
    /// Decompress as much as is needed, for this request alone.
    Once,
}

/// The right to decompress a cluster and insert it. If dropped without a result, the next request
/// gets it.
pub(crate) struct FillGuard {
    cache: Arc<DecompressedCache>,
    key: u64,
    done: Arc<Completion>,
}

impl DecompressedCache {
    pub(crate) fn new(cluster_len: usize, budget_bytes: usize) -> Self {
        let clusters = budget_bytes / cluster_len;
        let shards = (clusters / 4).clamp(1, MAX_SHARDS);
        Self {
            shards: (0..shards).map(|_| Mutex::default()).collect(),
            cluster_len,
            clusters_per_shard: AtomicUsize::new(clusters / shards),
        }
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, Shard> {
        // Neighbours in the file differ in the low bits at a distance of a compressed cluster: mix
        // them.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = usize::try_from(mixed).unwrap_or(0) % self.shards.len();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster, if it is cached.
    pub(crate) fn get(&self, key: u64) -> Option<Buf> {
        match self.shard(key).clusters.get_mut(&key) {
            Some(State::Ready { cluster, used }) => {
                *used = true;
                Some(cluster.clone())
            }
            _ => None,
        }
    }

    /// The first `needed_len` bytes of the cluster (or more), or what to do to get them.
    pub(crate) fn get_or_fill(self: &Arc<Self>, key: u64, needed_len: usize) -> CacheLookup {
        let mut guard = self.shard(key);
        let shard = &mut *guard;
        match shard.clusters.entry(key) {
            Entry::Occupied(mut entry) => match entry.get_mut() {
                State::Ready { cluster, used } => {
                    *used = true;
                    CacheLookup::Ready(cluster.clone())
                }
                State::Filling(done) => CacheLookup::Wait(Arc::clone(done)),
            },
            Entry::Vacant(entry) => {
                if needed_len < self.cluster_len && !shard.seen_once.contains(&key) {
                    if shard.seen_once.len() == SEEN_ONCE {
                        shard.seen_once.pop_front();
                    }
                    shard.seen_once.push_back(key);
                    return CacheLookup::Once;
                }
                let done = Arc::new(Completion::new());
                entry.insert(State::Filling(Arc::clone(&done)));
                CacheLookup::Fill(FillGuard { cache: Arc::clone(self), key, done })
            }
        }
    }

    /// Changes the budget. The excess is evicted as clusters are inserted.
    pub(crate) fn set_budget(&self, budget_bytes: usize) {
        let clusters = budget_bytes / self.cluster_len;
        self.clusters_per_shard.store(clusters.div_ceil(self.shards.len()), Ordering::Relaxed);
    }

    /// Removes all clusters. No request is in flight.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            *shard.lock().unwrap_or_else(PoisonError::into_inner) = Shard::default();
        }
    }

    /// The bytes behind this entry are freed.
    pub(crate) fn forget(&self, key: u64) {
        let mut shard = self.shard(key);
        if let Some(State::Ready { .. }) = shard.clusters.get(&key) {
            shard.clusters.remove(&key);
            shard.ring.retain(|other| *other != key);
        }
    }
}

impl FillGuard {
    /// Inserts the cluster, within the budget.
    pub(crate) fn insert(self, cluster: &Buf) {
        let allowed = self.cache.clusters_per_shard.load(Ordering::Relaxed);
        if allowed == 0 {
            return;
        }
        let mut guard = self.cache.shard(self.key);
        let shard = &mut *guard;
        while shard.ring.len() >= allowed {
            let Some(key) = shard.ring.pop_front() else { break };
            match shard.clusters.get_mut(&key) {
                Some(State::Ready { used: used @ true, .. }) => {
                    *used = false;
                    shard.ring.push_back(key);
                }
                _ => drop(shard.clusters.remove(&key)),
            }
        }
        shard.clusters.insert(self.key, State::Ready { cluster: cluster.clone(), used: false });
        shard.ring.push_back(self.key);
    }
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        let mut shard = self.cache.shard(self.key);
        if let Some(State::Filling(_)) = shard.clusters.get(&self.key) {
            shard.clusters.remove(&self.key);
        }
        drop(shard);
        self.done.set();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_decompresses_and_others_wait() {
        let cache = Arc::new(DecompressedCache::new(512, 4096));
        let CacheLookup::Fill(fill) = cache.get_or_fill(7, 512) else {
            panic!("no request decompresses it yet")
        };
        assert!(matches!(cache.get_or_fill(7, 512), CacheLookup::Wait(_)));
        drop(fill);
        let CacheLookup::Fill(fill) = cache.get_or_fill(7, 512) else {
            panic!("the guard was dropped")
        };
        fill.insert(&Buf::from_slice(&[1; 512]));
        assert!(matches!(cache.get_or_fill(7, 512), CacheLookup::Ready(_)));
        cache.forget(7);
        assert!(cache.get(7).is_none());
    }

    #[test]
    fn first_partial_read_is_not_cached_and_second_is() {
        let cache = Arc::new(DecompressedCache::new(512, 4096));
        assert!(matches!(cache.get_or_fill(7, 100), CacheLookup::Once));
        let CacheLookup::Fill(fill) = cache.get_or_fill(7, 100) else { panic!("requested again") };
        fill.insert(&Buf::from_slice(&[1; 512]));
        assert!(matches!(cache.get_or_fill(7, 100), CacheLookup::Ready(_)));
        for other in 100..1000 {
            assert!(matches!(cache.get_or_fill(other, 1), CacheLookup::Once));
        }
        assert!(matches!(cache.get_or_fill(100, 1), CacheLookup::Once), "long forgotten");
    }

    #[test]
    fn stays_within_its_budget() {
        let cache = Arc::new(DecompressedCache::new(512, 4 * 512));
        for key in 0..100 {
            let CacheLookup::Fill(fill) = cache.get_or_fill(key, 512) else {
                panic!("not there yet")
            };
            fill.insert(&Buf::from_slice(&[1; 512]));
        }
        assert_eq!((0..100).filter(|key| cache.get(*key).is_some()).count(), 4);
        let none = Arc::new(DecompressedCache::new(65536, 4096));
        let CacheLookup::Fill(fill) = none.get_or_fill(1, 65536) else { panic!("not there yet") };
        fill.insert(&Buf::from_slice(&[1; 512]));
        assert!(matches!(none.get_or_fill(1, 65536), CacheLookup::Fill(_)));
    }
}
