//! Zero writes and discards: changes of L2 entries, without data.
//!
//! Whole clusters (with extended L2: whole subclusters) become zeros by their entry. A discard
//! leaves zeros too where the cluster was allocated or a backing node would show through. Clusters
//! that the entries no longer need are released (`release.rs`).

use std::sync::Arc;

use bds_core::driver::{Attempt, ZeroFlags};
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::alloc::freed::FreeReason;
use crate::format::qcow2::layout::entry::{BadEntry, COPIED, Kind, L2Entry, OFFSET_MASK, ZERO};
use crate::format::qcow2::layout::header::Autoclear;
use crate::format::qcow2::plan::{MetaResult, corrupt_entry};
use crate::format::qcow2::state::{Image, Meta};
use crate::format::qcow2::task::detach_on_drop;

/// What happens to whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Zeros; the cluster is kept.
    Zero,
    /// Zeros; the cluster is freed.
    Unmap,
    /// As `Unmap`, but unallocated clusters stay unallocated.
    Discard,
    /// Unallocated: the backing node shows through.
    Empty,
}

impl Image {
    /// Makes a range read as zeros. `Unsupported`: a part of a cluster would have to be written.
    pub(crate) async fn write_zeroes(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<Attempt> {
        let image = Arc::clone(self);
        let task_guard = self.tasks.begin();
        detach_on_drop(async move {
            image.prepare_to_write().await?;
            let done = image.zero(offset, len, flags).await?;
            image.keep_within_budgets().await?;
            drop(task_guard);
            Ok(done)
        })
        .await
    }

    async fn zero(self: &Arc<Self>, offset: u64, len: u64, flags: ZeroFlags) -> Result<Attempt> {
        let has_zero_flag = self.rules.has_zero_flag;
        if !has_zero_flag && self.shows_below() {
            return Ok(Attempt::Unsupported);
        }
        let unit = self.geometry().subcluster_size();
        let end = offset + len;
        // The last cluster may reach past the disk; that part is never read.
        let cluster = self.geometry().cluster_size();
        let reach = if end == self.disk_len() { end.next_multiple_of(cluster) } else { end };
        let (first, last) = (offset.next_multiple_of(unit), reach / unit * unit);
        // Parts of a unit cannot be described by an entry: fine if they are zeros already.
        let (head, tail) = if first <= last {
            (offset..first, last..reach.max(last))
        } else {
            (offset..end, end..end)
        };
        for part in [head, tail] {
            if !self.reads_as_zeros(part.start, part.end.min(end.max(part.start))).await? {
                return Ok(Attempt::Unsupported);
            }
        }
        if first >= last {
            return Ok(Attempt::Done);
        }
        if let Some(place) = self.space().at_guest(first).filter(|_| self.has_raw_data_file()) {
            let zeroed = self.data().write_zeroes(place, last.min(end) - first, flags).await;
            if zeroed.map_err(|e| self.name_error(e))? == Attempt::Unsupported {
                return Ok(Attempt::Unsupported);
            }
        }
        let unmaps = flags.contains(ZeroFlags::MAY_UNMAP) && !self.has_raw_data_file();
        let change = if unmaps || !has_zero_flag { Change::Unmap } else { Change::Zero };
        self.zero_units(first, last, change).await
    }

    /// True if unallocated clusters show a backing node, or will once the recorded one is attached:
    /// zeros must not be left to them.
    pub(crate) fn shows_below(&self) -> bool {
        self.backing.is_some() || self.cluster0.load().backing_name.is_some()
    }

    /// True if the data file must read like the disk.
    pub(crate) fn has_raw_data_file(&self) -> bool {
        self.cluster0.load().header.autoclear.contains(Autoclear::RAW_DATA_FILE)
    }

    /// Discards a range. Parts of clusters are left alone.
    pub(crate) async fn discard(self: &Arc<Self>, offset: u64, len: u64) -> Result<Attempt> {
        if !self.rules.has_zero_flag && self.shows_below() {
            return Ok(Attempt::Unsupported);
        }
        let image = Arc::clone(self);
        let task_guard = self.tasks.begin();
        detach_on_drop(async move {
            let geometry = *image.geometry();
            let end = offset + len;
            let end = if end == image.disk_len() {
                geometry.cluster_ceil(end).unwrap_or(end)
            } else {
                geometry.cluster_floor(end)
            };
            let start = geometry.cluster_ceil(offset).unwrap_or(end);
            if start >= end {
                return Ok(Attempt::Unsupported);
            }
            image.prepare_to_write().await?;
            let done = if image.has_raw_data_file() {
                // The data file must read like the disk, so it has to show zeros too.
                let fast = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
                image.zero(start, end.min(image.disk_len()) - start, fast).await?
            } else {
                image.zero_units(start, end, Change::Discard).await?
            };
            image.keep_within_budgets().await?;
            drop(task_guard);
            Ok(done)
        })
        .await
    }

    /// Makes all clusters unallocated: see [`bds_core::Driver::make_empty`].
    pub(crate) async fn make_empty(self: &Arc<Self>) -> Result<()> {
        if self.has_raw_data_file() {
            let words = "a raw data file shows all of the disk: the image cannot be emptied";
            return Err(self.name_error(Error::new(ErrorKind::NotSupported, words)));
        }
        self.prepare_to_write().await?;
        let end = self.disk_len().next_multiple_of(self.geometry().cluster_size());
        let _done = self.zero_units(0, end, Change::Empty).await?;
        self.keep_within_budgets().await
    }

    /// Does the range read as zeros by its entries?
    async fn reads_as_zeros(self: &Arc<Self>, start: u64, end: u64) -> Result<bool> {
        let mut at = start;
        while at < end {
            let run = self.find(at, end - at).await?;
            let is_zero = run.kind.is_zero()
                || run.kind.is_unallocated() && self.backing.available_len(at, run.len) == 0;
            if !is_zero {
                return Ok(false);
            }
            at += run.len;
        }
        Ok(true)
    }

    /// Changes whole units, slice by slice. Nothing was changed if it is not supported: only the
    /// first slice can find that.
    async fn zero_units(self: &Arc<Self>, start: u64, end: u64, change: Change) -> Result<Attempt> {
        let mut at = start;
        while at < end {
            let done = self.plan(|image, meta| image.zero_in_slice(meta, at, end, change)).await?;
            match done {
                Some(len) => at += len,
                None => return Ok(Attempt::Unsupported),
            }
            // A long range: other requests get the lock, and the caches keep their limits.
            self.keep_within_budgets().await?;
        }
        Ok(Attempt::Done)
    }

    /// Makes the rest of a cluster that the disk did not reach so far read as zeros, and whole
    /// clusters up to `end`. For growing: the backing node must not show through.
    pub(crate) async fn zero_clusters(self: &Arc<Self>, start: u64, end: u64) -> Result<Attempt> {
        self.zero_units(start, end, Change::Unmap).await
    }

    /// Changes units from `start` on, up to the end of the slice. Returns how many bytes that were;
    /// `None`: not supported.
    fn zero_in_slice(
        &self,
        meta: &mut Meta,
        start: u64,
        end: u64,
        change: Change,
    ) -> MetaResult<Option<u64>> {
        let geometry = self.geometry();
        let span = self.tables.slice_span();
        let max = (end - start).min(span - (start & (span - 1)));
        let max = self.before_in_flight(meta, start, max)?;
        let has_table = self.has_table(start)?;
        let stays = match change {
            Change::Empty => true,
            Change::Discard => !self.shows_below(),
            Change::Zero | Change::Unmap => false,
        };
        if !has_table && stays {
            return Ok(Some(max));
        }
        if !has_table && !self.rules.has_zero_flag {
            return Ok(Some(max));
        }
        let (id, slice) = self.slice_to_write(meta, start)?;
        self.check_dirty_budget(meta, meta.slices.bytes_to_pin(id))?;
        let entry_len = geometry.l2_entry_len();
        let mut at = start;
        while at < start + max {
            let index = self.index_in_slice(at);
            let old = slice.entry(index);
            let next = (geometry.cluster_floor(at) + geometry.cluster_size()).min(start + max);
            let is_whole = geometry.is_cluster_aligned(at) && geometry.is_cluster_aligned(next);
            let new = if is_whole {
                Some(self.zeroed(old, change).map_err(|b| corrupt_entry(b, at))?)
            } else {
                self.zeroed_part(old, at, next).map_err(|b| corrupt_entry(b, at))?
            };
            let Some(new) = new else {
                // A part of a compressed cluster: the caller has to write zeros there.
                return if at == start { Ok(None) } else { Ok(Some(at - start)) };
            };
            if new != old {
                if !slice.is_checked(index) {
                    self.check_old(meta, old, at)?;
                }
                slice.set_entry(index, new);
                meta.slices.mark(id, index * entry_len, entry_len);
                let is_given_up = old.is_compressed()
                    || (new.word ^ old.word) & OFFSET_MASK != 0
                    || self.data_file.is_some() && new.word & COPIED == 0;
                if is_given_up {
                    self.free_entry(meta, old, FreeReason::Request);
                }
            }
            at = next;
        }
        Ok(Some(max))
    }

    fn has_table(&self, guest: u64) -> MetaResult<bool> {
        let Some(id) = self.tables.slice_id(guest) else { return Ok(false) };
        let table = self.tables.l1(id.table).table(self.geometry());
        table.map(|t| t.is_some()).map_err(|b| corrupt_entry(b, guest))
    }

    /// The entry of a whole cluster of zeros.
    fn zeroed(&self, old: L2Entry, change: Change) -> std::result::Result<L2Entry, BadEntry> {
        let is_extended = self.geometry().has_extended_l2();
        let (kind, count) = old.kind(0, &self.rules)?;
        let is_nothing =
            kind == Kind::Unallocated && (!is_extended || count == self.geometry().subclusters());
        if change == Change::Discard && is_nothing && !self.shows_below() {
            return Ok(old);
        }
        if !self.rules.has_zero_flag || change == Change::Empty {
            return Ok(L2Entry::default());
        }
        let keeps_discarded = change == Change::Discard && self.config.load().discard_no_unref;
        let keeps = (change == Change::Zero || keeps_discarded) && !old.is_compressed();
        let place = if keeps { old.word & (OFFSET_MASK | COPIED) } else { 0 };
        Ok(if is_extended {
            L2Entry { word: place, bitmap: 0xffff_ffff << 32 }
        } else {
            L2Entry::standard(place | ZERO)
        })
    }

    /// The entry after some subclusters became zeros; `None` if an entry cannot express it.
    fn zeroed_part(
        &self,
        old: L2Entry,
        start: u64,
        end: u64,
    ) -> std::result::Result<Option<L2Entry>, BadEntry> {
        let geometry = self.geometry();
        old.kind(0, &self.rules)?;
        if !geometry.has_extended_l2() || old.is_compressed() {
            return Ok(None);
        }
        let bits = geometry.subcluster_bits();
        let first = geometry.offset_in_cluster(start) >> bits;
        let count = (end - start) >> bits;
        let mask = ((1u64 << count) - 1) << first;
        let alloc = u64::from(old.alloc_bits()) & !mask;
        let zero = u64::from(old.zero_bits()) | mask;
        Ok(Some(L2Entry { word: old.word, bitmap: alloc | zero << 32 }))
    }
}
