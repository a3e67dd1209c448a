//! Sleepable RCU: lets a freed cluster be reused only after all readers that may still know its
//! offset have finished.
//!
//! Readers and in-place writers follow L2 entries without a lock. One of them may hold the offset
//! of a cluster while a discard or an overwrite removes the entry. If the cluster were reused at
//! once, the reader would see other data, and the in-place writer would destroy it. So each of them
//! takes a read lock ([`SrcuGuard`]) before it loads the entry and keeps it until its I/O at that
//! offset is over; the task that frees removes the entry and then calls [`Srcu::synchronize`].
//!
//! Readers are counted in two phases, so that a stream of new readers cannot hold up `synchronize`:
//! new readers enter the current phase, `synchronize` switches the phase and waits for the other
//! one to become empty. A reader may have read the phase before the switch and enter the old phase
//! after `synchronize` looked; the *next* `synchronize` would then wait for the wrong phase.
//! Switching twice, so that both phases are seen empty, closes that gap.
//!
//! Why a reader that enters late is harmless: entering and looking are both read-modify-writes of
//! the same counter. If the look comes first, the reader reads a value written by it (or later in
//! its release sequence), so everything that preceded `synchronize`, the removal of the entry
//! included, is visible to it. If the reader comes first, `synchronize` sees it and waits.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bds_core::driver::own_shard;
use bds_io::sync::{Mutex, Notify};

/// Threads spread over this many counters, so that they do not fight for one cache line.
const SHARDS: usize = 16;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard {
    readers: [AtomicUsize; 2],
}

/// Counts readers that follow entries now.
#[derive(Debug, Default)]
pub(crate) struct Srcu {
    phase: AtomicUsize,
    shards: [Shard; SHARDS],
    /// One `synchronize` at a time.
    synchronize_lock: Mutex<()>,
    is_waited_for: AtomicBool,
    reader_left: Notify,
}

/// A read lock: offsets from entries loaded under it stay valid until it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct SrcuGuard<G: Deref<Target = Srcu>> {
    srcu: G,
    shard: usize,
    phase: usize,
}

impl Srcu {
    /// Takes a read lock: entries loaded from now on stay valid until the guard is dropped.
    #[inline]
    pub(crate) fn read_lock(&self) -> SrcuGuard<&Self> {
        let (shard, phase) = self.enter();
        SrcuGuard { srcu: self, shard, phase }
    }

    /// As [`Self::read_lock`], for work that may outlive its caller.
    pub(crate) fn read_lock_owned(self: &Arc<Self>) -> SrcuGuard<Arc<Self>> {
        let (shard, phase) = self.enter();
        SrcuGuard { srcu: Arc::clone(self), shard, phase }
    }

    #[inline]
    fn enter(&self) -> (usize, usize) {
        let shard = own_shard(SHARDS);
        let phase = self.phase.load(Ordering::Acquire) & 1;
        self.shards[shard].readers[phase].fetch_add(1, Ordering::SeqCst);
        (shard, phase)
    }

    /// Waits until all read locks taken before have been released.
    pub(crate) async fn synchronize(&self) {
        let _one_at_a_time = self.synchronize_lock.lock().await;
        for _ in 0..2 {
            let old = self.phase.fetch_add(1, Ordering::SeqCst) & 1;
            self.wait_empty(old).await;
        }
    }

    async fn wait_empty(&self, phase: usize) {
        loop {
            if self.is_empty(phase) {
                return;
            }
            // Announce, then look again: a reader that leaves after this look sees the
            // announcement.
            self.is_waited_for.store(true, Ordering::SeqCst);
            if !self.is_empty(phase) {
                // The one waiter; a permit given before we wait is kept.
                self.reader_left.notified().await;
            }
            self.is_waited_for.store(false, Ordering::SeqCst);
        }
    }

    fn is_empty(&self, phase: usize) -> bool {
        // A read-modify-write on purpose: see the module docs.
        self.shards.iter().all(|s| s.readers[phase].fetch_add(0, Ordering::SeqCst) == 0)
    }
}

impl<G: Deref<Target = Srcu>> Drop for SrcuGuard<G> {
    #[inline]
    fn drop(&mut self) {
        self.srcu.shards[self.shard].readers[self.phase].fetch_sub(1, Ordering::SeqCst);
        if self.srcu.is_waited_for.load(Ordering::SeqCst) {
            self.srcu.reader_left.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn synchronize_waits_for_earlier_readers_only() {
        let srcu = Srcu::default();
        let early = srcu.read_lock();
        let mut wait = pin!(srcu.synchronize());
        assert!(poll(wait.as_mut()).is_pending());
        let late = srcu.read_lock();
        assert!(poll(wait.as_mut()).is_pending());
        drop(early);
        // The late one entered the second phase before its turn: it is waited for as well, once.
        assert!(poll(wait.as_mut()).is_pending());
        let later = srcu.read_lock();
        drop(late);
        assert!(poll(wait.as_mut()).is_ready());
        drop(later);
    }

    #[test]
    fn synchronize_without_readers_returns_at_once() {
        let srcu = Srcu::default();
        assert!(poll(pin!(srcu.synchronize())).is_ready());
        drop(srcu.read_lock());
        assert!(poll(pin!(srcu.synchronize())).is_ready());
    }
}
