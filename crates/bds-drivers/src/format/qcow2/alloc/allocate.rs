//! Allocates host clusters for data, metadata and compressed bytes.
//!
//! Next fit: nothing below the cursor is free, and a cluster that becomes free moves the cursor
//! back. A missing refcount block is placed in front of the clusters it counts, so it describes
//! itself; the refcount table moves when it has outgrown its place: new clusters, counted by blocks
//! that the new table lists, so that the new structure describes itself too. Nothing here does I/O;
//! `write_back.rs` decides the order in which all this reaches the file (O6, O7: blocks and table,
//! flush, header; the old clusters are released after that).

use super::freed::FreedRun;
use super::overlap::{Class, Refused};
use crate::format::qcow2::layout::space::{Clusters, MetaOffset, Offset};
use crate::format::qcow2::layout::units::HOST_OFFSET_END;
use crate::format::qcow2::plan::{MetaResult, NeedMeta};
use crate::format::qcow2::state::{Image, Meta};

/// Adjacent host clusters, new and counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub offset: MetaOffset,
    pub clusters: u64,
    /// They lie behind the highest cluster ever used in the file: they read as zeros until written.
    pub is_fresh: bool,
}

impl Allocated {
    /// The clusters alone.
    pub(crate) fn range(&self) -> Clusters<MetaOffset> {
        Clusters { start: self.offset, count: self.clusters }
    }
}

impl Image {
    /// Up to `want` adjacent clusters for data; at least one.
    pub(crate) fn alloc_data(&self, meta: &mut Meta, want: u64) -> MetaResult<Allocated> {
        loop {
            let (first, has_block) = meta.counts.next_free(meta.counts.cursor)?;
            if !has_block {
                self.add_block(meta, first)?;
                continue;
            }
            let mut count = 1;
            // A run ends with its block; the next request goes on there.
            while count < want
                && self.geometry().refblock_index(first + count) != 0
                && meta.counts.count(first + count)? == 0
            {
                count += 1;
            }
            if meta.counts.table_needs_space() {
                self.move_table(meta)?;
                continue;
            }
            return self.mark_used(meta, first, count);
        }
    }

    /// Exactly `clusters` adjacent clusters for metadata, entered among the metadata.
    pub(crate) fn alloc_metadata(
        &self,
        meta: &mut Meta,
        clusters: u64,
        class: Class,
    ) -> MetaResult<Allocated> {
        let got = self.alloc_adjacent(meta, clusters)?;
        for i in 0..clusters {
            self.insert_metadata(got.offset.plus(i << self.geometry().cluster_bits()), class)?;
        }
        Ok(got)
    }

    /// Exactly `clusters` adjacent clusters.
    pub(crate) fn alloc_adjacent(&self, meta: &mut Meta, clusters: u64) -> MetaResult<Allocated> {
        loop {
            let first = self.find_hole(meta, clusters)?;
            if !self.add_missing_blocks(meta, first, clusters)? {
                return self.mark_used(meta, first, clusters);
            }
            // Blocks were added; they may have taken what was found.
        }
    }

    /// The first run of free clusters that is long enough. Clusters no block counts are free.
    fn find_hole(&self, meta: &mut Meta, clusters: u64) -> MetaResult<u64> {
        let geometry = self.geometry();
        let mut first = meta.counts.next_free(meta.counts.cursor)?.0;
        let mut end = first;
        while end - first < clusters {
            let (free, has_block) = meta.counts.next_free(end)?;
            if free != end {
                first = free;
                end = free;
            }
            if has_block {
                end += 1;
            } else {
                // Nothing is counted up to the next block.
                end = (geometry.reftable_index(end) + 1) << geometry.refblock_bits();
            }
        }
        Ok(first)
    }

    /// Adds missing refcount blocks for the clusters of a hole, behind the hole. True if any was
    /// added.
    fn add_missing_blocks(&self, meta: &mut Meta, first: u64, clusters: u64) -> MetaResult<bool> {
        let geometry = *self.geometry();
        let last_index = geometry.reftable_index(first + clusters - 1);
        let mut is_changed = false;
        let mut place = first + clusters;
        for index in geometry.reftable_index(first)..=last_index {
            while meta.counts.block_place(index)?.is_none() {
                is_changed = true;
                let (free, has_block) = meta.counts.next_free(place)?;
                let home = if has_block { index } else { geometry.reftable_index(free) };
                self.put_block(meta, home, free)?;
                place = free + 1;
            }
        }
        Ok(is_changed)
    }

    /// Adds the missing block that counts cluster `at`, and puts it there.
    fn add_block(&self, meta: &mut Meta, at: u64) -> MetaResult<()> {
        self.put_block(meta, self.geometry().reftable_index(at), at)
    }

    fn put_block(&self, meta: &mut Meta, index: u64, place: u64) -> MetaResult<()> {
        self.check_place(place, 1)?;
        meta.counts.add_block(index, place)?;
        if meta.counts.cursor == place {
            meta.counts.cursor += 1;
        }
        let offset = place << self.geometry().cluster_bits();
        meta.zero_from = meta.zero_from.max(offset + self.geometry().cluster_size());
        self.insert_metadata(MetaOffset(offset), Class::REFCOUNT_BLOCK)
    }

    /// Marks free clusters as used.
    fn mark_used(&self, meta: &mut Meta, first: u64, clusters: u64) -> MetaResult<Allocated> {
        self.check_place(first, clusters)?;
        meta.counts.mark_used(first, clusters)?;
        let bits = self.geometry().cluster_bits();
        let offset = first << bits;
        let is_fresh = offset >= meta.zero_from;
        meta.zero_from = meta.zero_from.max(offset + (clusters << bits));
        Ok(Allocated { offset: MetaOffset(offset), clusters, is_fresh })
    }

    /// The refcounts say that these clusters are free: may that be true?
    fn check_place(&self, first: u64, clusters: u64) -> MetaResult<()> {
        let bits = self.geometry().cluster_bits();
        if first + clusters > HOST_OFFSET_END >> bits {
            return Err(NeedMeta::too_large(
                "the image file has reached the format's largest size",
            ));
        }
        if first == 0 {
            return Err(NeedMeta::Corrupt {
                what: "the header's cluster has refcount 0".into(),
                at: 0,
            });
        }
        self.check_overlap(MetaOffset(first << bits), clusters << bits)
    }

    /// Refuses to write data (or new metadata) at a place that holds metadata.
    pub(crate) fn check_overlap(&self, at: MetaOffset, len: u64) -> MetaResult<()> {
        match self.metadata.hit(at, len) {
            None => Ok(()),
            Some(at) => Err(NeedMeta::Corrupt {
                what: "a write would hit the image's own metadata, which has refcount 0 or is data too"
                    .into(),
                at: at.0,
            }),
        }
    }

    /// Enters the cluster at `at` among the metadata, if overlaps with its class are checked.
    pub(crate) fn insert_metadata(&self, at: MetaOffset, class: Class) -> MetaResult<()> {
        if !self.config.load().overlap.contains(class) {
            return Ok(());
        }
        match self.metadata.insert(at) {
            Ok(()) => Ok(()),
            Err(Refused::Taken) => {
                Err(NeedMeta::Corrupt { what: "two tables share a cluster".into(), at: at.0 })
            }
            Err(Refused::TooFar) => {
                Err(NeedMeta::too_large("the image's metadata is scattered too widely"))
            }
        }
    }

    /// Space for `len` compressed bytes: where they begin. They may share their first cluster with
    /// other compressed clusters.
    pub(crate) fn alloc_bytes(&self, meta: &mut Meta, len: u64) -> MetaResult<MetaOffset> {
        let geometry = *self.geometry();
        let at = meta.compressed_at;
        let left = geometry.cluster_size() - geometry.offset_in_cluster(at);
        let is_inside = !geometry.is_cluster_aligned(at);
        if is_inside && len <= left && self.may_share(meta, at)? {
            meta.counts.raise(geometry.cluster_index(at))?;
            return Ok(self.advance(meta, at, len));
        }
        let next = self.alloc_data(meta, 1)?;
        let old_end = at + left;
        // The datum may run into the new cluster if that is the next one and the old one can be
        // shared. `raise` comes last and its block was just found in memory, so nothing is
        // half-done.
        if is_inside && next.offset.0 == old_end {
            let shared = self.may_share(meta, at).unwrap_or(false)
                && meta.counts.raise(geometry.cluster_index(at)).is_ok();
            if shared {
                return Ok(self.advance(meta, at, len));
            }
        }
        Ok(self.advance(meta, next.offset.0, len))
    }

    fn may_share(&self, meta: &mut Meta, at: u64) -> MetaResult<bool> {
        let count = meta.counts.count(self.geometry().cluster_index(at))?;
        Ok(count > 0 && count < self.geometry().refcount_max())
    }

    fn advance(&self, meta: &mut Meta, from: u64, len: u64) -> MetaOffset {
        meta.compressed_at = from + len;
        MetaOffset(from)
    }

    /// Moves the refcount table to a larger range. Allocating it may make the table grow again,
    /// hence the loop; the range is half as large again as needed, so it ends soon.
    pub(crate) fn move_table(&self, meta: &mut Meta) -> MetaResult<()> {
        while meta.counts.table_needs_space() {
            let wanted = meta.counts.wanted_table_clusters();
            let place = self.alloc_metadata(meta, wanted, Class::REFCOUNT_TABLE)?;
            let old = meta.counts.move_table(place.range());
            let bits = self.geometry().cluster_bits();
            for i in 0..old.count {
                self.metadata.remove(old.start.plus(i << bits));
            }
            meta.frees.push(FreedRun::metadata(old));
        }
        Ok(())
    }
}
