//! The topology lock as a token: proof that the caller alone may change which edge points where.
//!
//! A plain mutex, held for computation only: never across an await, and never while driver code
//! runs that could call back into the graph. No request takes it. It is taken with
//! `GraphCore::lock`.
//!
//! Lock order: the turn of graph changes (`Graph::begin_change`), this lock, the name table, a
//! node's parents, a slot's side.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What the lock protects beside nodes and edges.
#[derive(Default)]
pub(super) struct LockState {
    /// Open drained sections of all nodes (`Graph::drain_all`).
    pub(super) drain_alls: u32,
}

/// The topology lock of one graph.
#[derive(Default)]
pub(super) struct GraphLock(Mutex<LockState>);

impl GraphLock {
    pub(super) fn lock(&self) -> GraphLockGuard<'_> {
        GraphLockGuard { state: self.0.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    #[cfg(test)]
    pub(super) fn is_free(&self) -> bool {
        self.0.try_lock().is_ok()
    }
}

/// The topology lock, held. Methods that change the topology take it as proof.
pub(crate) struct GraphLockGuard<'a> {
    pub(super) state: MutexGuard<'a, LockState>,
}

/// Proof that an edge may be re-pointed: its nodes are drained and the lock is held. Implemented by
/// `drain::set::DrainedEdit` and by nothing else.
pub(super) trait RepointProof {}
