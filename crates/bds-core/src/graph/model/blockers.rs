//! BlockOps blocked on a node, with reasons, and the slot for the one job that works on it.
//!
//! A reference keeps a node open, it never means "busy". A user that needs a node left alone blocks
//! operations, with a reason that the next user reads. Guards end their block when dropped, so none
//! can be forgotten; they hold no reference, so none keeps the node open.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use slab::Slab;

bitflags::bitflags! {
    /// BlockOps on a whole node that can be blocked. See [`crate::graph::NodeRef::block`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct BlockOps: u32 {
        /// Being copied by a backup job.
        const BACKUP_SOURCE = 1;
        /// Being written by a backup job.
        const BACKUP_TARGET = 1 << 1;
        /// Being committed into the node below.
        const COMMIT_SOURCE = 1 << 2;
        /// Being committed into.
        const COMMIT_TARGET = 1 << 3;
        /// Being deleted by name.
        const DELETE = 1 << 4;
        /// Being taken out of a backend, or another one put in its place.
        const EJECT = 1 << 5;
        /// Getting an overlay.
        const EXTERNAL_SNAPSHOT = 1 << 6;
        /// Getting an internal snapshot, or losing one.
        const INTERNAL_SNAPSHOT = 1 << 7;
        /// Being copied by a mirror job.
        const MIRROR_SOURCE = 1 << 8;
        /// Being written by a mirror job.
        const MIRROR_TARGET = 1 << 9;
        /// Changing its length for a user.
        const RESIZE = 1 << 10;
        /// Being filled from below.
        const STREAM = 1 << 11;
        /// Giving its place to another node.
        const REPLACE = 1 << 12;
    }
}

impl fmt::Display for BlockOps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<String> =
            self.iter_names().map(|(name, _)| name.to_lowercase().replace('_', "-")).collect();
        f.write_str(&words.join(", "))
    }
}

struct Block {
    operations: BlockOps,
    reason: Arc<str>,
}

#[derive(Default)]
struct State {
    blocks: Slab<Block>,
    job: Option<Arc<str>>,
}

/// A node's blocked operations and job slot. Allocates nothing before the first use.
#[derive(Default)]
pub(super) struct Blockers(OnceLock<Arc<Mutex<State>>>);

impl Blockers {
    fn state(&self) -> &Arc<Mutex<State>> {
        self.0.get_or_init(Arc::default)
    }

    /// Blocks operations until the guard is dropped.
    pub(super) fn block(&self, operations: BlockOps, reason: &str) -> Blocker {
        let state = Arc::clone(self.state());
        let index = lock(&state).blocks.insert(Block { operations, reason: reason.into() });
        Blocker { state, index }
    }

    /// The reasons why any of these operations is blocked.
    pub(super) fn reasons(&self, operations: BlockOps) -> Vec<Arc<str>> {
        let Some(state) = self.0.get() else { return Vec::new() };
        let state = lock(state);
        let blocks = state.blocks.iter().map(|(_, block)| block);
        let hits = blocks.filter(|block| block.operations.intersects(operations));
        hits.map(|block| Arc::clone(&block.reason)).collect()
    }

    /// Takes the job slot. `Err`: the job that has it.
    pub(super) fn claim_job(&self, job: &str) -> Result<JobSlot, Arc<str>> {
        let state = self.state();
        let mut guard = lock(state);
        if let Some(other) = &guard.job {
            return Err(Arc::clone(other));
        }
        guard.job = Some(job.into());
        drop(guard);
        Ok(JobSlot { state: Arc::clone(state) })
    }

    pub(super) fn job(&self) -> Option<Arc<str>> {
        self.0.get().and_then(|state| lock(state).job.clone())
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some operations are blocked on a node until this is dropped.
#[must_use = "the operations are allowed again when this is dropped"]
pub struct Blocker {
    state: Arc<Mutex<State>>,
    index: usize,
}

impl fmt::Debug for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = lock(&self.state);
        let block = &state.blocks[self.index];
        write!(f, "Blocker({}: {})", block.operations, block.reason)
    }
}

impl Drop for Blocker {
    fn drop(&mut self) {
        lock(&self.state).blocks.remove(self.index);
    }
}

/// The slot for one job on its main node, taken until this is dropped.
#[must_use = "the slot is free again when this is dropped"]
pub struct JobSlot {
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for JobSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobSlot({})", lock(&self.state).job.as_deref().unwrap_or_default())
    }
}

impl Drop for JobSlot {
    fn drop(&mut self) {
        lock(&self.state).job = None;
    }
}
