//! Replaces zero clusters by what version 2 can express, before a downgrade.
//!
//! | entry | becomes |
//! |---|---|
//! | zeros, no cluster; no backing file | unallocated |
//! | zeros, no cluster; a backing file | a new cluster of zeros |
//! | zeros, a cluster that only this table has | that cluster, zeroed |
//! | zeros, a cluster that others have too | as without a cluster; it loses the references |
//!
//! An L2 table that snapshots share has several references, and each of them counts for its
//! clusters: a new cluster gets as many. A cluster that has more references than the table belongs
//! to another table as well, in which it may be data: it must not be zeroed.
//!
//! Per table: new clusters, counts and zeros; flush (O1, O3); entries; flush; then the old
//! references go (O2). The image is a valid one of version 3 at any time.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind, Result};

use super::l2_tables::{L2Table, L2Tables};
use super::options::AmendPlan;
use super::steps::Steps;
use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::Strictness;
use crate::format::qcow2::layout::entry::{COPIED, L2Entry, OFFSET_MASK, ZERO};
use crate::format::qcow2::layout::header::Compression;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset, Offset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::manage::snapshot::SnapshotTable;
use crate::format::qcow2::plan::MetaKey;
use crate::format::qcow2::state::Image;

/// What becomes of the zero clusters of one table.
struct TableChange {
    table: L2Table,
    /// L1 entries that point at the table, of the image and its snapshots.
    references: u64,
    /// The table, changed as far as no new cluster is needed.
    bytes: Vec<u8>,
    /// Entries that need a new cluster.
    need_cluster: Vec<usize>,
    /// Clusters that are kept, and zeroed.
    zeroed: Vec<MetaOffset>,
    /// Clusters that lose the references of this table.
    given_up: Vec<MetaOffset>,
}

impl Image {
    /// What stands against version 2 beside features of the header.
    pub(super) async fn check_downgrade(&self, plan: &AmendPlan) -> Result<()> {
        let header = &plan.old.header;
        let (at, count) = (header.snapshots_offset, header.snapshot_count);
        let snapshots = SnapshotTable::read(self.file.port(), at, count).await?;
        let fits = snapshots.entries.iter().all(|one| {
            one.vm_state_len <= u64::from(u32::MAX)
                && one.disk_size.is_none_or(|size| size == header.size)
        });
        if !fits {
            let words = "Internal snapshots prevent downgrade of image";
            return Err(Error::new(ErrorKind::NotSupported, words));
        }
        if header.compression == Compression::Deflate {
            return Ok(());
        }
        let mut tables = L2Tables::new(self, header).await?;
        while let Some(table) = tables.next(self).await? {
            let len = self.geometry().cluster_len();
            let bytes = read_bytes(self.file.port(), table.place.0, len).await?;
            let mut entries = (0..self.geometry().l2_entries())
                .map(|index| L2Entry::read(&bytes, index, self.geometry()));
            if entries.any(L2Entry::is_compressed) {
                let words = "Cannot downgrade an image with zstd compression type and existing \
                             compressed clusters";
                return Err(Error::new(ErrorKind::NotSupported, words).at(table.place.0));
            }
        }
        Ok(())
    }

    /// Leaves no zero cluster, in the active tables and in those of snapshots.
    ///
    /// # Errors
    /// The image reads as before; some tables may have no zero clusters any more.
    pub(super) async fn expand_zero_clusters(self: &Arc<Self>, steps: &mut Steps) -> Result<()> {
        let cluster0 = read_cluster0(self.file.port(), Strictness::Use).await?;
        let shows_below = self.shows_below();
        let mut tables = L2Tables::new(self, &cluster0.header).await?;
        steps.expect(tables.entries_left());
        while let Some(table) = tables.next(self).await? {
            if let Some(change) = self.plan_table_change(table, shows_below).await? {
                self.expand_table(change).await?;
            }
            steps.advance(tables.take_passed())?;
        }
        steps.advance(tables.take_passed())?;
        // Readers of block status that found an entry before it changed.
        self.srcu.synchronize().await;
        Ok(())
    }

    /// `None`: the table has no zero clusters.
    async fn plan_table_change(
        self: &Arc<Self>,
        table: L2Table,
        shows_below: bool,
    ) -> Result<Option<TableChange>> {
        let geometry = *self.geometry();
        let mut bytes = self.read_file(table.place, geometry.cluster_len()).await?;
        let (words, _) = bytes.as_chunks_mut::<8>();
        let is_zero = |word: u64| !L2Entry::standard(word).is_compressed() && word & ZERO != 0;
        if !words.iter().any(|word| is_zero(u64::from_be_bytes(*word))) {
            return Ok(None);
        }
        let references = self.count_of(table.place).await?;
        let (mut need_cluster, mut zeroed, mut given_up) = (Vec::new(), Vec::new(), Vec::new());
        for (index, word) in words.iter_mut().enumerate() {
            let old = u64::from_be_bytes(*word);
            if !is_zero(old) {
                continue;
            }
            let place = MetaOffset(old & OFFSET_MASK);
            let is_own = place.0 != 0 && self.count_for(place, references).await? == references;
            if is_own {
                zeroed.push(place);
                *word = entry_at(place, references).to_be_bytes();
                continue;
            }
            if place.0 != 0 {
                given_up.push(place);
            }
            if shows_below {
                need_cluster.push(index);
            } else {
                *word = [0; 8];
            }
        }
        Ok(Some(TableChange { table, references, bytes, need_cluster, zeroed, given_up }))
    }

    /// The count of a cluster that is in use.
    async fn count_of(self: &Arc<Self>, place: MetaOffset) -> Result<u64> {
        self.count_for(place, 1).await
    }

    /// The count of a cluster that has at least so many references.
    async fn count_for(self: &Arc<Self>, place: MetaOffset, references: u64) -> Result<u64> {
        let geometry = *self.geometry();
        let cluster = geometry.cluster_index(place.0);
        let count = self.plan(|_, meta| meta.counts.count(cluster)).await?;
        if count < references || !geometry.is_cluster_aligned(place.0) {
            let words = format!(
                "a cluster has refcount {count} and {references} references or more, or does not \
                 begin at a cluster; repair the image with a check"
            );
            return Err(Error::new(ErrorKind::InvalidImage, words).at(place.0));
        }
        Ok(count)
    }

    async fn expand_table(self: &Arc<Self>, mut change: TableChange) -> Result<()> {
        let mut new = Vec::new();
        let prepared = self.prepare_clusters(&mut change, &mut new).await;
        if let Err(error) = prepared {
            // Nothing points at them.
            let mut meta = self.meta();
            for run in new {
                (0..change.references).for_each(|_| self.release_unused(&mut meta, run));
            }
            return Err(error);
        }
        let TableChange { table, references, bytes, given_up, .. } = change;
        let written = self.write_file(table.place, bytes).await;
        if let Some(number) = table.active {
            // Also after a failure: a part may be written.
            self.forget_table(number).await;
        }
        written?;
        self.flush_meta().await?;
        if given_up.is_empty() {
            return Ok(());
        }
        {
            let mut meta = self.meta();
            for start in given_up {
                let freed = FreedRun::unused(Clusters { start, count: 1 });
                (0..references).for_each(|_| meta.frees_durable.push(freed.clone()));
            }
        }
        self.release().await
    }

    /// Provides clusters of zeros, durably and counted. `new` gets what was allocated.
    async fn prepare_clusters(
        self: &Arc<Self>,
        change: &mut TableChange,
        new: &mut Vec<Clusters<MetaOffset>>,
    ) -> Result<()> {
        let cluster_bits = self.geometry().cluster_bits();
        let references = change.references;
        let mut left = &change.need_cluster[..];
        let (words, _) = change.bytes.as_chunks_mut::<8>();
        while !left.is_empty() {
            let run = self.allocate_counted(left.len() as u64, references).await?;
            new.push(run);
            let (now, later) = left.split_at(mem_len(run.count));
            left = later;
            for (i, index) in now.iter().enumerate() {
                let place = run.start.plus((i as u64) << cluster_bits);
                words[*index] = entry_at(place, references).to_be_bytes();
            }
            let host = self.space().allocated(run.start);
            self.zero_data(host, run.count << cluster_bits).await?;
        }
        for place in &change.zeroed {
            self.zero_data(self.space().allocated(*place), 1 << cluster_bits).await?;
        }
        self.write_back(true).await?;
        self.flush_meta().await
    }

    /// Up to `most` adjacent new clusters, each with this count.
    async fn allocate_counted(
        self: &Arc<Self>,
        most: u64,
        references: u64,
    ) -> Result<Clusters<MetaOffset>> {
        let geometry = *self.geometry();
        let allocated = self.plan(|image, meta| {
            image.check_dirty_budget(meta, geometry.cluster_len())?;
            let got = image.alloc_data(meta, most)?;
            let first = geometry.cluster_index(got.offset.0);
            for cluster in first..first + got.clusters {
                // The table has this count itself, and the block was changed just now: it cannot
                // fail.
                meta.counts.raise_by(cluster, references - 1)?;
            }
            Ok(got)
        });
        allocated.await.map(|got| got.range())
    }

    /// Removes the slices of an L2 table from memory, after loads of them that are under way.
    async fn forget_table(&self, number: u32) {
        loop {
            let load = {
                let mut meta = self.meta();
                let load = meta.loads.iter().find(|(what, _)| match what {
                    MetaKey::Slice(id) => id.table == number,
                    MetaKey::Table(table) => *table == number,
                    MetaKey::Block(_) => false,
                });
                let Some((_, load)) = load else {
                    meta.slices.forget(&self.tables, number);
                    return;
                };
                Arc::clone(load)
            };
            load.done.wait().await;
        }
    }
}

/// An entry for a cluster at `place` with so many references.
fn entry_at(place: MetaOffset, references: u64) -> u64 {
    place.0 | if references == 1 { COPIED } else { 0 }
}
