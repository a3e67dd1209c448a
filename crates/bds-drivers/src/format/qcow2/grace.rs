//! When may a freed cluster be used again? Only after everybody who may still know its old place has left.
//!
//! Readers and in-place writers follow L2 entries without a lock. One of them may hold the place of a cluster while
//! a discard or an overwrite removes the entry. If the cluster were handed out at once, the reader would see somebody else's bytes,
//! and the in-place writer would destroy them. So whoever follows an entry is counted *inside* before it loads the entry and until its I/O
//! on that place is over; whoever frees waits, after removing the entry, until those who were inside have left.
//!
//! Counts come in two phases, so that a stream of newcomers cannot hold up a freer: newcomers enter the current phase, the freer turns
//! the phase and waits for the other one to empty. Somebody may have read the phase before the turn and enter the old one after the
//! freer looked; the freer of the *next* round would then wait for the wrong phase. Turning twice, so that both phases are seen
//! empty, closes that (as in sleepable RCU).
//!
//! Why a late-comer is harmless: entering and looking are both read-modify-writes of the same counter. If the freer's look comes
//! first, the entering one reads a value written by it (or later in its release sequence), so everything the freer did before,
//! the removal of the entry included, is visible to it. If the entering comes first, the freer sees it and waits.

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
    inside: [AtomicUsize; 2],
}

/// Counts who follows entries now.
#[derive(Debug, Default)]
pub(crate) struct Grace {
    phase: AtomicUsize,
    shards: [Shard; SHARDS],
    /// One freer waits at a time.
    turn: Mutex<()>,
    is_awaited: AtomicBool,
    left: Notify,
}

/// Somebody who may follow entries. Leaves when dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Inside<G: Deref<Target = Grace>> {
    grace: G,
    shard: usize,
    phase: usize,
}

impl Grace {
    /// Enters: entries loaded from now on stay good until the guard is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Inside<&Self> {
        let (shard, phase) = self.count_in();
        Inside { grace: self, shard, phase }
    }

    /// As [`Self::enter`], for work that may outlive its caller.
    pub(crate) fn enter_owned(self: &Arc<Self>) -> Inside<Arc<Self>> {
        let (shard, phase) = self.count_in();
        Inside { grace: Arc::clone(self), shard, phase }
    }

    #[inline]
    fn count_in(&self) -> (usize, usize) {
        let shard = own_shard(SHARDS);
        let phase = self.phase.load(Ordering::Acquire) & 1;
        self.shards[shard].inside[phase].fetch_add(1, Ordering::SeqCst);
        (shard, phase)
    }

    /// Waits until everybody who is inside now has left.
    pub(crate) async fn wait(&self) {
        let _turn = self.turn.lock().await;
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
            // Announce, then look again: whoever leaves after this look sees the announcement.
            self.is_awaited.store(true, Ordering::SeqCst);
            if !self.is_empty(phase) {
                // The one waiter; a permit given before we wait is kept.
                self.left.notified().await;
            }
            self.is_awaited.store(false, Ordering::SeqCst);
        }
    }

    fn is_empty(&self, phase: usize) -> bool {
        // A read-modify-write on purpose: see the file's head.
        self.shards.iter().all(|s| s.inside[phase].fetch_add(0, Ordering::SeqCst) == 0)
    }
}

impl<G: Deref<Target = Grace>> Drop for Inside<G> {
    #[inline]
    fn drop(&mut self) {
        self.grace.shards[self.shard].inside[self.phase].fetch_sub(1, Ordering::SeqCst);
        if self.grace.is_awaited.load(Ordering::SeqCst) {
            self.grace.left.notify_one();
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
    fn waits_for_those_inside_but_not_for_newcomers() {
        let grace = Grace::default();
        let early = grace.enter();
        let mut wait = pin!(grace.wait());
        assert!(poll(wait.as_mut()).is_pending());
        let late = grace.enter();
        assert!(poll(wait.as_mut()).is_pending());
        drop(early);
        // The late one entered the second phase before its turn: it is waited for as well, once.
        assert!(poll(wait.as_mut()).is_pending());
        let later = grace.enter();
        drop(late);
        assert!(poll(wait.as_mut()).is_ready());
        drop(later);
    }

    #[test]
    fn an_empty_house_is_not_waited_for() {
        let grace = Grace::default();
        assert!(poll(pin!(grace.wait())).is_ready());
        drop(grace.enter());
        assert!(poll(pin!(grace.wait())).is_ready());
    }
}
