//! Decompressed clusters, kept so that a sequence of small reads decompresses each cluster once.
//!
//! Keyed by the L2 entry, which names the bytes in the file. Freed bytes may be used again, so whoever frees them takes their entry out
//! first, after everybody who may still add it has left (`grace.rs`, `release.rs`).
//!
//! Split into shards with a lock each, held for a look or a copy of a pointer. The budget is in bytes, counting clusters only.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::Buf;

use super::task::Done;

const MAX_SHARDS: usize = 16;

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
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Inflated {
    shards: Box<[Mutex<Shard>]>,
    clusters_per_shard: usize,
}

/// What somebody who wants a cluster shall do.
pub(crate) enum Wanted {
    /// Here it is.
    Ready(Buf),
    /// Wait, and ask again.
    Wait(Arc<Done>),
    /// Make it.
    Make(Making),
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
            clusters_per_shard: clusters / shards,
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

    /// The cluster, or what to do to get it.
    pub(crate) fn want(self: &Arc<Self>, key: u64) -> Wanted {
        match self.shard(key).clusters.entry(key) {
            Entry::Occupied(mut entry) => match entry.get_mut() {
                State::Ready { cluster, used } => {
                    *used = true;
                    Wanted::Ready(cluster.clone())
                }
                State::Coming(done) => Wanted::Wait(Arc::clone(done)),
            },
            Entry::Vacant(entry) => {
                let done = Arc::new(Done::new());
                entry.insert(State::Coming(Arc::clone(&done)));
                Wanted::Make(Making { cache: Arc::clone(self), key, done })
            }
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
        if self.cache.clusters_per_shard == 0 {
            return;
        }
        let mut guard = self.cache.shard(self.key);
        let shard = &mut *guard;
        while shard.ring.len() >= self.cache.clusters_per_shard {
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
        let Wanted::Make(making) = cache.want(7) else { panic!("nobody makes it yet") };
        assert!(matches!(cache.want(7), Wanted::Wait(_)));
        drop(making);
        let Wanted::Make(making) = cache.want(7) else { panic!("the maker gave up") };
        making.finish(&Buf::from_slice(&[1; 512]));
        assert!(matches!(cache.want(7), Wanted::Ready(_)));
        cache.forget(7);
        assert!(cache.look(7).is_none());
    }

    #[test]
    fn stays_within_its_budget() {
        let cache = Arc::new(Inflated::new(512, 4 * 512));
        for key in 0..100 {
            let Wanted::Make(making) = cache.want(key) else { panic!("not there yet") };
            making.finish(&Buf::from_slice(&[1; 512]));
        }
        assert_eq!((0..100).filter(|key| cache.look(*key).is_some()).count(), 4);
        let none = Arc::new(Inflated::new(65536, 4096));
        let Wanted::Make(making) = none.want(1) else { panic!("not there yet") };
        making.finish(&Buf::from_slice(&[1; 512]));
        assert!(matches!(none.want(1), Wanted::Make(_)));
    }
}
