//! The graph's lock, as types: drain first, then lock.
//!
//! ```text
//! GraphLockGuard   the plan of the rooms, mine alone for a moment: who points where, who is drained, who may do what
//! Edit    GraphLockGuard in the hands of somebody who has drained: only with it can an edge be re-pointed
//! ```
//! `GraphLockGuard` is a plain mutex, held for computation only: never across an await, never while foreign code runs that could come back here.
//! No request takes it. Lock order: the turn of graph changes (`Graph::begin_change`), `GraphLockGuard`, names and monitor (`NameTable`), a node's parents, a
//! slot's side.
//!
//! QEMU 10.0 locks first and drains then, and deadlocks: a reader that is inside waits for the lock, and the drain waits for the
//! reader. Here the other order has no expression: [`Edit`] is made of [`Drained`] nodes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::queue::SegQueue;

use bds_io::sync::Notify;

use crate::graph::change::perm;
use crate::graph::close::close_node::GraphCore;
use crate::graph::drain::set::DrainSet;
use crate::graph::model::node::NodeId;

/// Nodes of which an edge has gone: what was done through it may not matter any more. Edges tell on their way out,
/// without a lock; whoever takes the lock next sees to it.
pub(crate) type Loosened = Arc<SegQueue<NodeId>>;

/// What the lock is about.
#[derive(Default)]
pub(crate) struct Topology {
    state: Mutex<State>,
    pub(in crate::graph) loosened: Loosened,
    /// A closing ended, or a drained section did.
    pub(in crate::graph) eased: Notify,
    /// Re-creates the order that deadlocks, for the test that must find it.
    #[cfg(test)]
    pub(in crate::graph) lock_first: std::sync::atomic::AtomicBool,
}

/// What the lock keeps beside nodes and edges.
#[derive(Default)]
pub(in crate::graph) struct State {
    /// Drained sections of everything that are open.
    pub(in crate::graph) drain_alls: u32,
}

/// The graph's lock, held.
pub(crate) struct GraphLockGuard<'a> {
    pub(in crate::graph) core: &'a GraphCore,
    pub(in crate::graph) state: MutexGuard<'a, State>,
}

impl GraphCore {
    /// Takes the lock. Permissions are exact from here on.
    pub(in crate::graph) fn lock(&self) -> GraphLockGuard<'_> {
        let state = self.topology.state.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = GraphLockGuard { core: self, state };
        perm::loosen(&lock);
        lock
    }

    /// Does nobody hold the lock just now?
    #[cfg(test)]
    pub(in crate::graph) fn lock_is_free(&self) -> bool {
        self.topology.state.try_lock().is_ok()
    }
}

/// The right to re-point edges at the drained nodes, and to change what hangs below them.
pub(in crate::graph) struct Edit<'a> {
    pub(in crate::graph) lock: &'a GraphLockGuard<'a>,
    _drained: &'a DrainSet,
}

impl<'a> Edit<'a> {
    pub(in crate::graph) fn new(drained: &'a DrainSet, lock: &'a GraphLockGuard<'a>) -> Self {
        Self { lock, _drained: drained }
    }
}
