//! Decompressed clusters, kept so that a sequence of small reads decompresses each cluster once.
//!
//! Keyed by the L2 entry, which names the bytes in the file. Freed bytes may be used again, so whoever frees them takes their entry out
//! first, after everybody who may still add it has left (`srcu.rs`, `release.rs`).
//!
//! The first one who asks for a part of a cluster gets it decompressed up to there, and nothing is kept: scattered reads seldom come back.
//! Whoever asks again soon makes all of it.
//!
//! Split into shards with a lock each, held for a look or a copy of a pointer. The budget is in bytes, counting clusters only.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::Buf;

use crate::format::qcow2::task::Done;

const MAX_SHARDS: usize = 16;
/// How many first questions a shard remembers.
const ASKED_ONCE: usize = 32;

#[derive(Debug)]
enum State {
    Ready {
        cluster: Buf,
        used: bool,
    },
    /// Somebody is at it.
    Coming(Arc<Done>),
}

#[derive(Debug, Default)]
struct Shard {
    clusters: HashMap<u64, State>,
    /// In the order of the evicting hand; only those that are ready.
    ring: VecDeque<u64>,
    /// Asked for once, not kept; the oldest in front.
    asked_once: VecDeque<u64>,
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Inflated {
    shards: Box<[Mutex<Shard>]>,
    cluster_len: usize,
    clusters_per_shard: AtomicUsize,
}

/// What somebody who wants a cluster shall do.
pub(crate) enum Wanted {
    /// Here it is.
    Ready(Buf),
    /// Wait, and ask again.
    Wait(Arc<Done>),
    /// Make it.
    Make(Making),
    /// Decompress as much as is needed, for this request alone.
    Once,
}

/// The right and duty to make a cluster. Dropped without a result, the next one who asks makes it.
pub(crate) struct Making {
    cache: Arc<Inflated>,
    key: u64,
    done: Arc<Done>,
}

impl Inflated {
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
        // Neighbours in the file differ in the low bits at a distance of a compressed cluster: mix them.
        let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let index = usize::try_from(mixed).unwrap_or(0) % self.shards.len();
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster, if it is here now.
    pub(crate) fn look(&self, key: u64) -> Option<Buf> {
        match self.shard(key).clusters.get_mut(&key) {
            Some(State::Ready { cluster, used }) => {
                *used = true;
                Some(cluster.clone())
            }
            _ => None,
        }
    }

    /// The first `needed_len` bytes of the cluster (or more), or what to do to get them.
    pub(crate) fn want(self: &Arc<Self>, key: u64, needed_len: usize) -> Wanted {
        let mut guard = self.shard(key);
        let shard = &mut *guard;
        match shard.clusters.entry(key) {
            Entry::Occupied(mut entry) => match entry.get_mut() {
                State::Ready { cluster, used } => {
                    *used = true;
                    Wanted::Ready(cluster.clone())
                }
                State::Coming(done) => Wanted::Wait(Arc::clone(done)),
            },
            Entry::Vacant(entry) => {
                if needed_len < self.cluster_len && !shard.asked_once.contains(&key) {
                    if shard.asked_once.len() == ASKED_ONCE {
                        shard.asked_once.pop_front();
                    }
                    shard.asked_once.push_back(key);
                    return Wanted::Once;
                }
                let done = Arc::new(Done::new());
                entry.insert(State::Coming(Arc::clone(&done)));
                Wanted::Make(Making { cache: Arc::clone(self), key, done })
            }
        }
    }

    /// Another budget. What is too much goes as the next clusters come.
    pub(crate) fn set_budget(&self, budget_bytes: usize) {
        let clusters = budget_bytes / self.cluster_len;
        self.clusters_per_shard.store(clusters.div_ceil(self.shards.len()), Ordering::Relaxed);
    }

    /// Forgets all clusters. Nobody is inside.
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

impl Making {
    /// Here it is: keeps it, within the budget.
    pub(crate) fn finish(self, cluster: &Buf) {
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

impl Drop for Making {
    fn drop(&mut self) {
        let mut shard = self.cache.shard(self.key);
        if let Some(State::Coming(_)) = shard.clusters.get(&self.key) {
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
    fn one_makes_and_the_others_wait() {
        let cache = Arc::new(Inflated::new(512, 4096));
        let Wanted::Make(making) = cache.want(7, 512) else { panic!("nobody makes it yet") };
        assert!(matches!(cache.want(7, 512), Wanted::Wait(_)));
        drop(making);
        let Wanted::Make(making) = cache.want(7, 512) else { panic!("the maker gave up") };
        making.finish(&Buf::from_slice(&[1; 512]));
        assert!(matches!(cache.want(7, 512), Wanted::Ready(_)));
        cache.forget(7);
        assert!(cache.look(7).is_none());
    }

    #[test]
    fn a_part_is_made_once_for_whoever_asks_first_and_kept_for_the_second() {
        let cache = Arc::new(Inflated::new(512, 4096));
        assert!(matches!(cache.want(7, 100), Wanted::Once));
        let Wanted::Make(making) = cache.want(7, 100) else { panic!("asked for again") };
        making.finish(&Buf::from_slice(&[1; 512]));
        assert!(matches!(cache.want(7, 100), Wanted::Ready(_)));
        for other in 100..1000 {
            assert!(matches!(cache.want(other, 1), Wanted::Once));
        }
        assert!(matches!(cache.want(100, 1), Wanted::Once), "long forgotten");
    }

    #[test]
    fn stays_within_its_budget() {
        let cache = Arc::new(Inflated::new(512, 4 * 512));
        for key in 0..100 {
            let Wanted::Make(making) = cache.want(key, 512) else { panic!("not there yet") };
            making.finish(&Buf::from_slice(&[1; 512]));
        }
        assert_eq!((0..100).filter(|key| cache.look(*key).is_some()).count(), 4);
        let none = Arc::new(Inflated::new(65536, 4096));
        let Wanted::Make(making) = none.want(1, 65536) else { panic!("not there yet") };
        making.finish(&Buf::from_slice(&[1; 512]));
        assert!(matches!(none.want(1, 65536), Wanted::Make(_)));
    }
}
