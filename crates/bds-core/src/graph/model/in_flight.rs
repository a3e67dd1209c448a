//! In-flight count of a backend, apart from the node's count, because a backend may have no node.
//!
//! **Queued is not in flight**: requests that wait at the gate, or are held after an error, are not
//! counted here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::tracker::{RequestTracker, ShardNumber};

/// The in-flight count of a backend's edge.
#[derive(Default)]
pub(crate) struct BackendInFlight {
    tracker: RequestTracker,
    /// The graph was shut down: requests that wait at the gate fail.
    is_ended: AtomicBool,
}

impl BackendInFlight {
    /// Counts one request in until the guard is dropped. The gate is checked *after* this.
    #[inline]
    pub(crate) fn enter(self: &Arc<Self>) -> InFlightGuard<'_> {
        InFlightGuard { in_flight: self, number: self.tracker.enter() }
    }

    /// The number of requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.tracker.in_flight()
    }

    /// Waits until no request is in flight.
    pub(crate) async fn wait_idle(&self) {
        self.tracker.wait_idle().await;
    }

    /// Makes requests that wait at the gate fail when it opens.
    pub(crate) fn end(&self) {
        self.is_ended.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended.load(Ordering::SeqCst)
    }
}

/// Counts one request of a backend as in flight.
pub(crate) struct InFlightGuard<'a> {
    in_flight: &'a Arc<BackendInFlight>,
    number: ShardNumber,
}

impl InFlightGuard<'_> {
    /// Counts in once more, for a driver operation that outlives its request.
    pub(crate) fn again(&self) -> OwnedInFlight {
        OwnedInFlight {
            in_flight: Arc::clone(self.in_flight),
            number: self.in_flight.tracker.enter(),
        }
    }
}

/// Counts a detached operation of a backend as in flight.
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
