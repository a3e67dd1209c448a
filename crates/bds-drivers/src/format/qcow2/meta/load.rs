//! Loads L2 slices and refcount blocks into memory, each once however many requests wait for it.
//!
//! A load runs in a task of its own, so it does not end when the request that started it is
//! dropped. The result is returned *pinned*: it cannot be evicted before the request has used it.

use std::sync::{Arc, OnceLock};

use bds_core::driver::BoxFuture;
use bds_core::error::Result;

use super::shared_load::{Load, Pinned};
use super::tables::{Slice, SliceId};
use crate::format::qcow2::layout::space::{MetaOffset, Offset};
use crate::format::qcow2::plan::MetaKey;
use crate::format::qcow2::state::Image;
use crate::format::qcow2::task::{Completion, detach_on_drop};

/// Removes a load from the list and wakes its waiters, also if its task was dropped with its
/// executor.
struct LoadGuard {
    image: Arc<Image>,
    what: MetaKey,
    load: Arc<Load>,
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.image.meta().loads.remove(&self.what);
        self.load.done.set();
    }
}

impl Image {
    /// Loads `what`, or waits for the load in progress.
    pub(crate) async fn load(self: &Arc<Self>, what: MetaKey) -> Result<Pinned> {
        let (load, is_new) = {
            let mut meta = self.meta();
            if let Some(load) = meta.loads.get(&what) {
                (Arc::clone(load), false)
            } else {
                let load = Arc::new(Load { done: Completion::new(), result: OnceLock::new() });
                meta.loads.insert(what, Arc::clone(&load));
                (load, true)
            }
        };
        if is_new {
            let guard = LoadGuard { image: Arc::clone(self), what, load: Arc::clone(&load) };
            let task_guard = self.tasks.begin();
            detach_on_drop(async move {
                let result = guard.image.load_uncached(what).await;
                // The first and only one to set it.
                let _ = guard.load.result.set(result);
                drop(guard);
                drop(task_guard);
            })
            .await;
        } else {
            load.done.wait().await;
        }
        match load.result.get() {
            Some(Ok(pinned)) => Ok(pinned.clone()),
            Some(Err(error)) => Err(error.duplicate()),
            None => Ok(Pinned::Gone),
        }
    }

    async fn load_uncached(self: &Arc<Self>, what: MetaKey) -> Result<Pinned> {
        match what {
            MetaKey::Slice(id) => self.read_slice(id).await,
            MetaKey::Table(table) => self.read_table(table).await,
            MetaKey::Block(index) => self.read_block(index).await,
        }
    }

    /// As [`Self::load`], boxed: loading a table loads its slices, so the future would contain
    /// itself.
    fn load_boxed(self: &Arc<Self>, what: MetaKey) -> BoxFuture<'_, Result<Pinned>> {
        Box::pin(self.load(what))
    }

    async fn read_table(self: &Arc<Self>, table: u32) -> Result<Pinned> {
        let pieces = self.tables.slices_per_table();
        let mut held = Vec::with_capacity(pieces);
        for piece in 0..u32::try_from(pieces).expect("at most 4096 pieces") {
            let id = SliceId { table, piece };
            // One that is in memory or on its way is not read again.
            let there = self.tables.hold(id);
            match there {
                Some(slice) => held.push(slice),
                None => match self.load_boxed(MetaKey::Slice(id)).await? {
                    Pinned::Slice(slice) => held.push(slice),
                    other => return Ok(other),
                },
            }
        }
        Ok(Pinned::Slices(held))
    }

    async fn read_slice(self: &Arc<Self>, id: SliceId) -> Result<Pinned> {
        let len = self.config.load().slice_len;
        let is_extended = self.geometry().has_extended_l2();
        let table = {
            let mut meta = self.meta();
            self.evict_unused_slices(&mut meta);
            meta.slices.evict(&self.tables, false);
            if let Some(slice) = self.tables.hold(id) {
                return Ok(Pinned::Slice(slice));
            }
            let table = match self.tables.l1(id.table).table(self.geometry()) {
                Ok(Some(table)) => table,
                Ok(None) => return Ok(Pinned::Gone),
                Err(bad) => {
                    drop(meta);
                    let guest = self.geometry().guest_offset(u64::from(id.table), 0);
                    return Err(self.bad_entry(bad, guest.0));
                }
            };
            if meta.slices.is_unlinked(id.table) {
                // The file does not have this table: what is not in memory is empty.
                let slice = Arc::new(Slice::empty(len, is_extended));
                return Ok(Pinned::Slice(meta.slices.add(&self.tables, id, slice)));
            }
            table
        };
        if !self.is_whole_table(table) {
            return Err(self.truncated_meta_error("an L2 table", table));
        }
        let bytes = self.read_file(table.plus(u64::from(id.piece) * len as u64), len).await?;
        let slice = Arc::new(Slice::decode(&bytes, is_extended));
        let mut meta = self.meta();
        Ok(Pinned::Slice(meta.slices.add(&self.tables, id, slice)))
    }

    async fn read_block(self: &Arc<Self>, index: u64) -> Result<Pinned> {
        let place = {
            let mut meta = self.meta();
            if let Some(block) = meta.counts.resident(index) {
                return Ok(Pinned::Block(Arc::clone(&block.pin)));
            }
            meta.counts.evict();
            match meta.counts.block_place(index) {
                Ok(Some(place)) => place,
                // The operation that runs again reports what is wrong.
                Ok(None) | Err(_) => return Ok(Pinned::Gone),
            }
        };
        if !self.is_whole_table(place) {
            return Err(self.truncated_meta_error("a refcount block", place));
        }
        let bytes = self.read_file(place, self.geometry().cluster_len()).await?;
        let pin = self.meta().counts.insert(index, place, bytes.into_boxed_slice());
        Ok(Pinned::Block(pin))
    }

    /// Reads bytes of metadata from the image file; zeros past its end.
    pub(crate) async fn read_file(&self, at: MetaOffset, len: usize) -> Result<Vec<u8>> {
        let iov = self.pool.take(len).iov();
        let read = self.file.read(at, iov.clone());
        read.await.map_err(|e| self.name_error(e))?;
        Ok(iov.to_vec(0..len))
    }
}
