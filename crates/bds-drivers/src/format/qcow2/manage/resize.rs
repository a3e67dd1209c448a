//! Grows the disk of an image.
//!
//! In order: space in the L1 table (a longer one is moved: rule O5), what must read as zeros,
//! preallocation; then all of that durably, and only then the header's size (O14). Whatever fails
//! on the way, the disk keeps its old length; what was allocated beyond it is a longer L1 table,
//! and clusters behind the end of the disk.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bds_core::driver::{Attempt, Prealloc, Truncate, ZeroFlags};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::snapshot::SnapshotTable;
use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::layout::header::{MAX_DISK_SIZE, MAX_L1_LEN};
use crate::format::qcow2::layout::space::{Clusters, DataOffset, Offset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::plan::MetaResult;
use crate::format::qcow2::state::{Image, Meta};

impl Image {
    /// Changes the disk's length. Runs in a task of its own.
    pub(crate) async fn resize(self: &Arc<Self>, change: Truncate) -> Result<()> {
        let old = self.disk_len();
        let new = change.len;
        self.check_len(old, new)?;
        if new == old {
            return Ok(());
        }
        self.check_snapshots(self.cluster0.load().header.version).await?;
        self.prepare_to_write().await?;
        self.mark_bitmaps_to_grow().await?;
        self.plan(|image, meta| image.grow_l1(meta, new)).await?;
        if let Some(data) = &self.data_file {
            let to = Truncate { prealloc: data_prealloc(change.prealloc), ..change };
            if data.len() < new {
                data.truncate(Truncate { exact: false, zero_new: false, ..to })
                    .await
                    .map_err(|e| self.name_error(e))?;
            }
        }
        // How long a backing file is that is recorded and not open is not known.
        let may_show_below = match self.backing.is_some() {
            true => self.backing.len() > old,
            false => self.shows_below(),
        };
        self.clear_new_area(old, new, change.zero_new || may_show_below).await?;
        let prealloc = match change.prealloc {
            Prealloc::Off if self.has_raw_data_file() => Prealloc::Metadata,
            prealloc => prealloc,
        };
        if prealloc != Prealloc::Off {
            self.preallocate(old, new, prealloc).await?;
        }
        self.meta().new_size = Some(new);
        let written = match self.write_back(true).await {
            Ok(()) => self.file.flush().await.map_err(|e| self.name_error(e)),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            // The old length stays. The header may have the new one already: the next write-back
            // corrects that.
            self.meta().new_size = Some(old);
            return Err(error);
        }
        self.len.store(new, Ordering::Release);
        Ok(())
    }

    pub(super) fn check_len(&self, old: u64, new: u64) -> Result<()> {
        let refused = |kind, words: &str| {
            Err(Error::new(kind, words).node(&self.node_name).field("size", new))
        };
        if new < old {
            return refused(ErrorKind::NotSupported, "a qcow2 disk cannot be made shorter");
        }
        if !new.is_multiple_of(512) {
            return refused(ErrorKind::InvalidInput, "the size must be a multiple of 512 bytes");
        }
        let entries = self.geometry().l1_entries(new);
        if new > MAX_DISK_SIZE || entries.saturating_mul(8) > MAX_L1_LEN {
            return refused(
                ErrorKind::LimitExceeded,
                "the disk would need an L1 table of more than 32 MiB; use larger clusters",
            );
        }
        Ok(())
    }

    /// Refuses to leave a snapshot without a size of its own: going back to it would give the
    /// longer disk. `version`: that of the image once the disk is resized; an upgrade gives every
    /// snapshot a size.
    pub(super) async fn check_snapshots(&self, version: u32) -> Result<()> {
        let header = &self.cluster0.load_full().header;
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let refused = |words: &str| {
            // Where the header counts them.
            Err(self.name_file(Error::new(ErrorKind::NotSupported, words).at(60)))
        };
        if version < 3 {
            return refused(
                "an image of version 2 with internal snapshots cannot be resized, as they could not be gone back to: upgrade it \
                 first (amend -o compat=1.1), or delete its snapshots",
            );
        }
        if header.version < version {
            return Ok(());
        }
        let (start, count) = (header.snapshots_offset, header.snapshot_count);
        let table = SnapshotTable::read(self.file.port(), start, count).await;
        let table = table.map_err(|error| self.name_file(error))?;
        if table.entries.iter().any(|snapshot| snapshot.disk_size.is_none()) {
            return refused(
                "an internal snapshot has no size of its own, so the disk cannot be resized: repair the image with a check, or \
                 delete the snapshot",
            );
        }
        Ok(())
    }

    /// Makes the L1 table long enough for a disk of `len` bytes.
    fn grow_l1(&self, meta: &mut Meta, len: u64) -> MetaResult<()> {
        let geometry = self.geometry();
        let entries = u32::try_from(geometry.l1_entries(len)).expect("checked against the limit");
        if entries <= meta.l1.entries {
            return Ok(());
        }
        let clusters = geometry.clusters(u64::from(entries) * 8);
        let place = self.alloc_metadata(meta, clusters, Class::ACTIVE_L1)?;
        let old_count = geometry.clusters(u64::from(meta.l1.entries) * 8);
        let old = Clusters { start: meta.l1.offset, count: old_count };
        meta.l1.offset = place.offset;
        meta.l1.entries = entries;
        meta.l1.is_moved = true;
        if old.count > 0 {
            meta.frees.push(FreedRun::metadata(old));
        }
        Ok(())
    }

    /// The rest of the last cluster reads as zeros in any case, the whole new area if it `must`.
    async fn clear_new_area(self: &Arc<Self>, old: u64, new: u64, must: bool) -> Result<()> {
        let geometry = *self.geometry();
        let tail_end = geometry.cluster_ceil(old).unwrap_or(new);
        if old < tail_end {
            let run = self.find(old, tail_end.min(new) - old).await?;
            let is_zero = run.kind.is_zero() || (run.kind.is_unallocated() && !must);
            if !is_zero || run.len < tail_end.min(new) - old {
                let len = mem_len(tail_end.min(new) - old);
                self.write_all(old, &self.zeros().slice(0..len)).await?;
            }
        }
        let end = geometry.cluster_ceil(new).unwrap_or(new);
        if !must || tail_end >= end {
            return Ok(());
        }
        if self.zero_clusters(tail_end, end).await? == Attempt::Done && self.rules.has_zero_flag {
            return Ok(());
        }
        // Version 2 cannot say "zeros" over a backing node: they are written.
        let mut at = tail_end;
        while self.shows_below() && at < new {
            let len = geometry.cluster_size().min(new - at);
            self.write_all(at, &self.zeros().slice(0..mem_len(len))).await?;
            self.keep_within_budgets().await?;
            at += len;
        }
        Ok(())
    }

    /// Gives every cluster of the new area a place, also the one that the old area ends in.
    async fn preallocate(self: &Arc<Self>, old: u64, new: u64, how: Prealloc) -> Result<()> {
        let tail_end = self.geometry().cluster_ceil(old).unwrap_or(new).min(new);
        if old < tail_end && !self.find(old, tail_end - old).await?.kind.has_place() {
            self.write_all(old, &self.zeros().slice(0..mem_len(tail_end - old))).await?;
        }
        let end = self.geometry().cluster_ceil(new).unwrap_or(new);
        let mut at = self.geometry().cluster_ceil(old).unwrap_or(end);
        while at < end {
            let from = at;
            let planned = self.plan(|image, meta| image.plan_prealloc(meta, from, end)).await?;
            let Some(work) = planned else {
                at = self.next_unplaced(at, end).await?;
                continue;
            };
            let guard = self.guard_allocation(work);
            let (host, len) = (guard.work.host, guard.work.end - guard.work.start);
            at += len;
            match how {
                Prealloc::Full => self.write_zeros(host, len).await?,
                Prealloc::Falloc => self.zero_data(host, len).await?,
                _ if !guard.work.is_fresh => self.zero_data(host, len).await?,
                _ => self.lengthen_file(host, len).await?,
            }
            guard.link_empty();
            self.keep_within_budgets().await?;
        }
        Ok(())
    }

    /// Metadata only: the file must have the clusters all the same, and before anything points
    /// there.
    async fn lengthen_file(&self, host: DataOffset, len: u64) -> Result<()> {
        let end = self.space().counted(host).map_or(0, |start| start.0 + len);
        if self.file.len() >= end {
            return Ok(());
        }
        let change = Truncate { len: end, exact: false, prealloc: Prealloc::Off, zero_new: false };
        self.file.truncate(change).await.map_err(|e| self.name_error(e))
    }

    /// The first byte from `at` on whose cluster has no place.
    async fn next_unplaced(self: &Arc<Self>, at: u64, end: u64) -> Result<u64> {
        let run = self.find(at, end - at).await?;
        Ok(at + run.len)
    }

    pub(super) async fn zero_data(&self, host: DataOffset, len: u64) -> Result<()> {
        let zeroed = self.data().write_zeroes(host, len, ZeroFlags::empty()).await;
        match zeroed.map_err(|e| self.name_error(e))? {
            Attempt::Done => Ok(()),
            Attempt::Unsupported => self.write_zeros(host, len).await,
        }
    }

    async fn write_zeros(&self, host: DataOffset, len: u64) -> Result<()> {
        let mut at = 0;
        while at < len {
            let piece = self.geometry().cluster_size().min(len - at);
            let zeros: IoVec = self.zeros().slice(0..mem_len(piece));
            let write = self.data().write(host.plus(at), zeros);
            write.await.map_err(|e| self.name_error(e))?;
            at += piece;
        }
        Ok(())
    }
}

fn data_prealloc(prealloc: Prealloc) -> Prealloc {
    match prealloc {
        Prealloc::Metadata => Prealloc::Off,
        other => other,
    }
}
