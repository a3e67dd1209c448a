//! Limits of dirty metadata ([`DirtyBudget`]), the current levels, and the handle of the task that
//! writes it back.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use bds_core::error::Result;

use crate::format::qcow2::task::Completion;

/// Bytes of metadata that may be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyBudget {
    /// From here on metadata is written back in the background.
    pub begin: usize,
    /// From here on changes wait. A single change may exceed it by four clusters: the refcount
    /// blocks it may touch.
    pub full: usize,
}

/// How much is pinned and waiting, as of the last release of the lock of `Meta`.
#[derive(Debug, Default)]
pub(crate) struct DirtyLevels {
    pub(super) pinned_bytes: AtomicUsize,
    /// Freed runs that a write-back makes progress on.
    pub(super) frees: AtomicUsize,
    /// Freed runs whose removal is durable, and that are not released yet.
    pub(super) frees_durable: AtomicUsize,
    #[cfg(test)]
    pub peak_bytes: AtomicUsize,
}

impl DirtyLevels {
    /// Publishes the levels. Under the lock of `Meta`.
    pub(crate) fn publish(&self, pinned_bytes: usize, frees: usize, frees_durable: usize) {
        self.pinned_bytes.store(pinned_bytes, Ordering::Relaxed);
        self.frees.store(frees, Ordering::Relaxed);
        self.frees_durable.store(frees_durable, Ordering::Relaxed);
        #[cfg(test)]
        self.peak_bytes.fetch_max(pinned_bytes, Ordering::Relaxed);
    }
}

/// A write-back in a task of its own.
#[derive(Debug)]
pub(crate) struct WriteBackTask {
    pub(super) done: Completion,
    pub(super) result: OnceLock<Result<()>>,
}
