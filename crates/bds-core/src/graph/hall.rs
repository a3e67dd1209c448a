//! Who came in through a backend: counted apart from who else is inside the node, because a backend may have no node.
//!
//! **Queued is not in flight**: who waits at the gate, or is stopped after an error, is not counted here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::traffic::{ShardNumber, Traffic};

/// A backend's edge's book.
#[derive(Default)]
pub(crate) struct Hall {
    traffic: Traffic,
    /// The graph was shut down: nobody waits at the gate any more.
    is_ended: AtomicBool,
}

impl Hall {
    /// Counts one request in until the answer is dropped. The gate is looked at *after* this.
    #[inline]
    pub(crate) fn lodge(self: &Arc<Self>) -> Lodged<'_> {
        Lodged { hall: self, number: self.traffic.enter() }
    }

    /// How many are inside that may wait.
    pub(crate) fn in_flight(&self) -> usize {
        self.traffic.in_flight()
    }

    /// Waits until none is.
    pub(crate) async fn wait_idle(&self) {
        self.traffic.wait_idle().await;
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
pub(crate) struct Lodged<'a> {
    hall: &'a Arc<Hall>,
    number: ShardNumber,
}

impl Lodged<'_> {
    /// Counts in once more, for what goes on without its request.
    pub(crate) fn again(&self) -> Straggler {
        Straggler { hall: Arc::clone(self.hall), number: self.hall.traffic.enter() }
    }
}

/// What is in flight for its backend after its request has gone.
pub(crate) struct Straggler {
    hall: Arc<Hall>,
    number: ShardNumber,
}

impl Drop for Straggler {
    fn drop(&mut self) {
        self.hall.traffic.leave(self.number);
    }
}

impl Drop for Lodged<'_> {
    fn drop(&mut self) {
        self.hall.traffic.leave(self.number);
    }
}
