//! Records flushes of a node: one at a time, which writes each covers, and a failure that later
//! ones repeat.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bds_io::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::error::Error;

/// The flushes of one node.
#[derive(Default)]
pub(super) struct FlushLog {
    /// Held by the flush under way.
    turn: Arc<AsyncMutex<()>>,
    flushed: Arc<AtomicU64>,
    /// Writes that flushes from above have to cover, though the node is below as a backing node.
    hidden: AtomicU64,
    failure: Mutex<Option<Error>>,
}

impl FlushLog {
    /// Begins a flush; one at a time, in order of arrival. `writes` counts the writes that ended,
    /// once its turn has come.
    pub(super) async fn begin(&self, writes: impl FnOnce() -> u64) -> Flushing {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        Flushing { _turn: turn, flushed: Arc::clone(&self.flushed), covers: writes() }
    }

    /// These writes are hidden from the flushes of the node's users from now on.
    pub(super) fn note_hidden(&self, writes: u64) {
        self.hidden.store(writes, Ordering::Release);
    }

    /// Whether there are hidden writes that no successful flush has covered.
    #[inline]
    pub(super) fn has_hidden(&self) -> bool {
        self.hidden.load(Ordering::Acquire) > self.flushed.load(Ordering::Acquire)
    }

    /// The failure that was recorded, if any.
    pub(super) fn failure(&self) -> Option<Error> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(Error::duplicate)
    }

    /// Records the first failure.
    pub(super) fn record_failure(&self, error: &Error) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| error.duplicate());
    }
}

/// A flush under way, which excludes others.
pub(crate) struct Flushing {
    _turn: OwnedMutexGuard<()>,
    /// Writes that the last successful flush covered.
    flushed: Arc<AtomicU64>,
    covers: u64,
}

impl Flushing {
    /// True if nothing was written since the last successful flush began.
    pub(crate) fn is_clean(&self) -> bool {
        self.flushed.load(Ordering::Acquire) == self.covers
    }

    /// Records success: the medium holds every write that ended before this flush began.
    pub(crate) fn succeeded(&mut self) {
        self.flushed.store(self.covers, Ordering::Release);
    }
}
