//! Who came in through a backend: counted apart from who else is inside the node, because a backend may have no node.
//!
//! **Queued is not in flight**: who waits at the gate, or is stopped after an error, is not counted here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::tracker::{RequestTracker, ShardNumber};

/// A backend's edge's book.
#[derive(Default)]
pub(crate) struct BackendInFlight {
    tracker: RequestTracker,
    /// The graph was shut down: nobody waits at the gate any more.
    is_ended: AtomicBool,
}

impl BackendInFlight {
    /// Counts one request in until the answer is dropped. The gate is looked at *after* this.
    #[inline]
    pub(crate) fn enter(self: &Arc<Self>) -> InFlightGuard<'_> {
        InFlightGuard { in_flight: self, number: self.tracker.enter() }
    }

    /// How many are inside that may wait.
    pub(crate) fn in_flight(&self) -> usize {
        self.tracker.in_flight()
    }

    /// Waits until none is.
    pub(crate) async fn wait_idle(&self) {
        self.tracker.wait_idle().await;
    }

    /// Who still waits at the gate fails when it opens.
    pub(crate) fn end(&self) {
        self.is_ended.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::SeqCst)
    }
}

/// A request that is in flight for its backend.
pub(crate) struct InFlightGuard<'a> {
    in_flight: &'a Arc<BackendInFlight>,
    number: ShardNumber,
}

impl InFlightGuard<'_> {
    /// Counts in once more, for what goes on without its request.
    pub(crate) fn again(&self) -> OwnedInFlight {
        OwnedInFlight {
            in_flight: Arc::clone(self.in_flight),
            number: self.in_flight.tracker.enter(),
        }
    }
}

/// What is in flight for its backend after its request has gone.
pub(crate) struct OwnedInFlight {
    in_flight: Arc<BackendInFlight>,
    number: ShardNumber,
}

impl Drop for OwnedInFlight {
    fn drop(&mut self) {
        self.in_flight.tracker.leave(self.number);
    }
}

impl Drop for InFlightGuard<'_> {
    fn drop(&mut self) {
        self.in_flight.tracker.leave(self.number);
    }
}
