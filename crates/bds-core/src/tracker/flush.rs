//! Records flushes of a node: one at a time, which writes each covers, and a failure that later ones repeat.

use std::sync::{Arc, PoisonError};

use bds_io::sync::OwnedMutexGuard;

use super::RequestTracker;
use crate::error::Error;

/// What the last successful flush covered.
#[derive(Debug, Default)]
pub(super) struct FlushState {
    flushed: u64,
}

impl RequestTracker {
    /// Begins a flush; one at a time, in order of arrival.
    pub(crate) async fn begin_flush(&self) -> Flushing {
        let state = Arc::clone(&self.flush).lock_owned().await;
        let covers = self.writes();
        Flushing { state, covers }
    }

    /// The failure that every later flush of this node must report, if there was one.
    pub(crate) fn flush_failure(&self) -> Option<Error> {
        let failure = self.flush_failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(Error::duplicate)
    }

    /// Records a failure: the medium may have lost writes, and every later flush reports it.
    pub(crate) fn flush_failed(&self, error: &Error) {
        let mut failure = self.flush_failure.lock().unwrap_or_else(PoisonError::into_inner);
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
