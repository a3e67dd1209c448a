//! Compressed writes: one cluster at a time, packed behind each other in the file.
//!
//! Compress without a lock, allocate space for the bytes under it, write them, link. The entry
//! becomes visible only after the bytes are written; if that fails the space is released. A cluster
//! that does not get smaller is written as a normal cluster.

use std::sync::Arc;

use bds_core::driver::{Prealloc, Truncate};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::compress;
use crate::format::qcow2::alloc::freed::FreeReason;
use crate::format::qcow2::alloc::in_flight::InFlight;
use crate::format::qcow2::layout::entry::L2Entry;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::meta::tables::{Slice, SliceId};
use crate::format::qcow2::plan::NeedMeta;
use crate::format::qcow2::state::Image;

const SECTOR_LEN: u64 = 512;

/// Space for compressed bytes whose entry is not linked yet. If dropped before that, the space is
/// released.
struct CompressedAlloc {
    image: Arc<Image>,
    item: Arc<InFlight>,
    id: SliceId,
    slice: Arc<Slice>,
    index: usize,
    entry: L2Entry,
    offset: MetaOffset,
    len: u64,
    is_writing: bool,
    is_over: bool,
}

impl Image {
    /// Writes whole clusters (the last one may end with the disk) compressed. Without bytes: pads
    /// the file to whole sectors.
    pub(crate) async fn write_compressed(self: &Arc<Self>, offset: u64, iov: IoVec) -> Result<()> {
        self.prepare_to_write().await?;
        if self.data_file.is_some() {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "images with an external data file have no compressed clusters",
            )
            .node(&self.node_name));
        }
        let len = iov.len() as u64;
        if len == 0 {
            return self.pad_file().await;
        }
        let end = offset + len;
        let cluster_size = self.geometry().cluster_size();
        if !offset.is_multiple_of(cluster_size)
            || !(len.is_multiple_of(cluster_size) || end == self.disk_len())
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("compressed writes are whole clusters of {cluster_size} bytes"),
            )
            .node(&self.node_name)
            .field("length", len)
            .at(offset));
        }
        let mut at = 0;
        while at < len {
            let piece = iov.slice(mem_len(at)..mem_len((at + cluster_size).min(len)));
            self.write_compressed_cluster(offset + at, piece).await?;
            at += cluster_size;
        }
        self.keep_within_budgets().await
    }

    async fn write_compressed_cluster(self: &Arc<Self>, guest: u64, iov: IoVec) -> Result<()> {
        let cluster_len = self.geometry().cluster_len();
        let mut cluster = self.pool.take(cluster_len);
        // A copy: the guest may change its bytes during compression.
        let bytes = cluster.get_mut().expect("just taken");
        iov.copy_to(0, &mut bytes[..iov.len()]);
        bytes[iov.len()..].fill(0);
        let out = self.pool.take(cluster_len - 1);
        let kind = self.cluster0.load().header.compression;
        let (_, out, packed) =
            compress::encode_buf(kind, cluster, out).await.map_err(|e| self.name_error(e))?;
        let Some(packed) = packed else {
            return self.write_all(guest, &iov).await;
        };
        let mut alloc = self.alloc_compressed(guest, packed as u64).await?;
        alloc.is_writing = true;
        let write = self.file.write(alloc.offset, out.slice(0..packed)).await;
        alloc.is_writing = false;
        write.map_err(|e| self.name_error(e))?;
        alloc.link();
        Ok(())
    }

    async fn alloc_compressed(self: &Arc<Self>, guest: u64, len: u64) -> Result<CompressedAlloc> {
        let image = Arc::clone(self);
        self.plan(move |this, meta| {
            this.before_in_flight(meta, guest, 1)?;
            let (id, slice) = this.slice_to_write(meta, guest)?;
            this.check_dirty_budget(meta, meta.slices.bytes_to_pin(id))?;
            let offset = this.alloc_bytes(meta, len)?;
            let item = this.begin_allocation(meta, guest, 1, Some(id));
            let entry = L2Entry::compressed(this.geometry(), offset, len);
            let index = this.index_in_slice(guest);
            let image = Arc::clone(&image);
            let alloc = CompressedAlloc {
                image,
                item,
                id,
                slice,
                index,
                entry: entry.unwrap_or_default(),
                offset,
                len,
                is_writing: false,
                is_over: false,
            };
            if entry.is_none() {
                alloc.give_up(meta);
                return Err(NeedMeta::too_large(
                    "the file is too long for compressed clusters at this cluster size",
                ));
            }
            Ok(alloc)
        })
        .await
    }

    /// Pads the file to whole sectors, as readers of compressed clusters read whole sectors.
    async fn pad_file(&self) -> Result<()> {
        let len = self.file.len();
        if len.is_multiple_of(SECTOR_LEN) {
            return Ok(());
        }
        let change = Truncate {
            len: len.next_multiple_of(SECTOR_LEN),
            exact: false,
            prealloc: Prealloc::Off,
            zero_new: false,
        };
        self.file.truncate(change).await.map_err(|e| self.name_error(e))
    }
}

impl CompressedAlloc {
    fn link(mut self) {
        let image = Arc::clone(&self.image);
        let mut meta = image.meta();
        let old = self.slice.entry(self.index);
        self.slice.set_entry(self.index, self.entry);
        let entry_len = image.geometry().l2_entry_len();
        meta.slices.mark(self.id, self.index * entry_len, entry_len);
        image.free_entry(&mut meta, old, FreeReason::Reuse);
        // A part of compressed bytes is not a part of the cluster: it could not be read at all.
        meta.pending_flush.data_flush = true;
        self.is_over = true;
        meta.end_allocation(&self.item);
    }

    /// Releases the space.
    fn give_up(mut self, meta: &mut crate::format::qcow2::state::Meta) {
        self.is_over = true;
        self.undo(meta);
    }

    fn undo(&self, meta: &mut crate::format::qcow2::state::Meta) {
        let geometry = self.image.geometry();
        let first = geometry.cluster_index(self.offset.0);
        let last = geometry.cluster_index(self.offset.0 + self.len - 1);
        // If bytes may still be on their way (the executor was dropped), the clusters stay counted:
        // a leak is harmless.
        if !self.is_writing {
            let start = MetaOffset(first << geometry.cluster_bits());
            self.image.release_unused(meta, Clusters { start, count: last - first + 1 });
        }
        meta.end_allocation(&self.item);
    }
}

impl Drop for CompressedAlloc {
    fn drop(&mut self) {
        if !self.is_over {
            let image = Arc::clone(&self.image);
            self.undo(&mut image.meta());
        }
    }
}
