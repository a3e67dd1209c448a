//! Records flushes of a node: one at a time, which writes each covers, and a failure that later
//! ones repeat.

use std::sync::{Arc, Mutex, PoisonError};

use bds_io::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use crate::error::Error;

/// The flushes of one node.
#[derive(Default)]
pub(super) struct FlushLog {
    state: Arc<AsyncMutex<FlushState>>,
    failure: Mutex<Option<Error>>,
}

/// What the last successful flush covered.
#[derive(Debug, Default)]
struct FlushState {
    flushed: u64,
}

impl FlushLog {
    /// Begins a flush; one at a time, in order of arrival. `writes` counts the writes that ended,
    /// once its turn has come.
    pub(super) async fn begin(&self, writes: impl FnOnce() -> u64) -> Flushing {
        let state = Arc::clone(&self.state).lock_owned().await;
        Flushing { state, covers: writes() }
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
    state: OwnedMutexGuard<FlushState>,
    covers: u64,
}

impl Flushing {
    /// True if nothing was written since the last successful flush began.
    pub(crate) fn is_clean(&self) -> bool {
        self.state.flushed == self.covers
    }

    /// Records success: the medium holds every write that ended before this flush began.
    pub(crate) fn succeeded(&mut self) {
        self.state.flushed = self.covers;
    }
}
