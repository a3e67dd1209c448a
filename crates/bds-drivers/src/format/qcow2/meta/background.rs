//! Starts write-backs of dirty metadata in the background, and makes changes wait while too much of
//! it is dirty.
//!
//! *Pinned* are L2 slices and refcount blocks that cannot be evicted: dirty, being written, or
//! about to be changed by an allocation in flight.
//!
//! ```text
//! pinned bytes  0 ............. DirtyBudget::begin ............. DirtyBudget::full
//!                 no write-back     one task writes back,            a change that would pin more
//!                                   changes go on                    waits for that task
//! ```
//!
//! The levels are published in atomics whenever the lock of `Meta` is released, so a request that
//! finds them low takes no lock. There is at most one task an image ([`WriteBackTask`]); close,
//! reopen and inactivation wait for it. If it fails, everything is dirty as before; the error is
//! kept and reported once, by the next flush (or close). Until then only a change that has to wait
//! starts another task.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use bds_core::error::{Error, Result};

use super::budget::WriteBackTask;
use crate::format::qcow2::plan::{MetaResult, NeedMeta};
use crate::format::qcow2::state::{Image, Meta};
use crate::format::qcow2::task::Completion;

/// Freed runs that start a write-back: enough to share a flush, few enough to have the space back
/// soon.
const MAX_FREES: usize = 4096;
/// Freed runs at which requests that free more wait until they are released.
const FULL_FREES: usize = 4 * MAX_FREES;

/// Ends a [`WriteBackTask`], also if the task is dropped with its executor.
struct WriteBackGuard {
    image: Arc<Image>,
    task: Arc<WriteBackTask>,
}

impl WriteBackGuard {
    fn set_result(self, result: Result<()>) {
        if let Err(error) = &result {
            tracing::warn!(node = self.image.node_name, %error, "qcow2: metadata cannot be written back");
            self.image.meta().write_back_error.get_or_insert_with(|| error.duplicate());
        }
        // Set once: there is one guard for a task.
        let _ = self.task.result.set(result);
    }
}

impl Drop for WriteBackGuard {
    fn drop(&mut self) {
        self.image.meta().write_back_task = None;
        self.task.done.set();
    }
}

impl Image {
    /// Stops a change that would pin `more` bytes than the budget allows. A change that finds
    /// nothing pinned goes on, however much it needs.
    pub(crate) fn check_dirty_budget(&self, meta: &Meta, more: usize) -> MetaResult<()> {
        let pinned = meta.pinned_bytes();
        if pinned == 0 || pinned + more <= self.config.load().dirty.full {
            return Ok(());
        }
        if meta.pending_flush.is_writing || meta.slices.has_dirty() || meta.counts.has_dirty() {
            return Err(NeedMeta::WriteBack);
        }
        // A write-back would find nothing to do: what is pinned belongs to allocations in flight.
        meta.in_flight.first().map_or(Ok(()), |item| Err(NeedMeta::Wait(Arc::clone(item))))
    }

    /// Keeps pinned metadata and freed clusters within their budgets after a change: begins a
    /// write-back if they call for it, and waits only if too many freed clusters are pending.
    pub(crate) async fn keep_within_budgets(self: &Arc<Self>) -> Result<()> {
        let pinned_bytes = self.levels.pinned_bytes.load(Ordering::Relaxed);
        let frees = self.levels.frees.load(Ordering::Relaxed);
        if pinned_bytes <= self.config.load().dirty.begin && frees <= MAX_FREES {
            return Ok(());
        }
        if !self.is_writable() {
            return Ok(());
        }
        if frees + self.levels.frees_durable.load(Ordering::Relaxed) > FULL_FREES {
            self.wait_for_write_back().await?;
            return self.flush_and_release_frees().await;
        }
        if self.meta().write_back_error.is_none() {
            self.begin_write_back();
        }
        Ok(())
    }

    /// Waits for the write-back under way, or for one that begins now. The caller holds nothing
    /// that a write-back waits for.
    pub(crate) async fn wait_for_write_back(self: &Arc<Self>) -> Result<()> {
        let task = self.begin_write_back();
        task.done.wait().await;
        match task.result.get() {
            Some(Err(error)) => Err(error.duplicate()),
            // None: its executor was dropped. The caller looks again and begins another one.
            Some(Ok(())) | None => Ok(()),
        }
    }

    /// The write-back under way; begun if there is none.
    fn begin_write_back(self: &Arc<Self>) -> Arc<WriteBackTask> {
        let task = {
            let mut meta = self.meta();
            if let Some(task) = &meta.write_back_task {
                return Arc::clone(task);
            }
            let task = Arc::new(WriteBackTask { done: Completion::new(), result: OnceLock::new() });
            meta.write_back_task = Some(Arc::clone(&task));
            task
        };
        let guard = WriteBackGuard { image: Arc::clone(self), task: Arc::clone(&task) };
        let task_guard = self.tasks.begin();
        bds_io::spawn(async move {
            let result = guard.image.write_back_and_release().await;
            guard.set_result(result);
            // Last: close continues when it is dropped.
            drop(task_guard);
        })
        .detach();
        task
    }

    /// Writes dirty metadata back; with many freed clusters also makes their removal durable and
    /// gives them back.
    async fn write_back_and_release(self: &Arc<Self>) -> Result<()> {
        self.check_usable()?;
        self.write_back(true).await?;
        if self.meta().frees_written.len() > MAX_FREES && self.flush_frees().await? {
            self.spawn_release();
        }
        Ok(())
    }

    /// What a write-back in the background failed with, if no flush has reported it yet.
    pub(crate) fn take_write_back_error(&self) -> Result<()> {
        self.meta().write_back_error.take().map_or(Ok(()), |error: Error| {
            Err(error.context("an earlier write-back of metadata in the background failed"))
        })
    }
}

#[cfg(test)]
#[path = "tests/background.rs"]
mod tests;
