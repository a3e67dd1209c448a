//! Checks one L2 entry: what it refers to, its flags, and statistics of fragmentation.

use bds_core::error::Result;

use super::ref_map::Use;
use super::ref_walk::{MAX_COLLISIONS, RefWalk, TableRefs};
use crate::format::qcow2::layout::entry::{COPIED, L2Entry, OFFSET_MASK, ZERO};
use crate::format::qcow2::layout::units::GuestOffset;

impl RefWalk<'_> {
    pub(super) async fn entry(
        &mut self,
        entry: L2Entry,
        guest: GuestOffset,
        refs: TableRefs,
    ) -> Result<()> {
        let rules = self.rules;
        let times = refs.total;
        let L2Entry { word, bitmap } = entry;
        if entry.is_compressed() {
            return self.compressed(entry, refs);
        }
        if entry.reserved(&rules) != 0 {
            self.findings.corruption(
                times,
                format!("l2 entry has reserved bits set: {word:#018x} ({guest})"),
            );
        }
        let offset = word & OFFSET_MASK;
        let extended = rules.geometry.has_extended_l2();
        let is_zero = !extended && word & ZERO != 0;
        if is_zero && !rules.has_zero_flag {
            self.findings
                .corruption(times, format!("zero flag in an image of version 2 ({guest})"));
        }
        let has_place = offset != 0 || (rules.has_data_file && word & COPIED != 0 && !is_zero);
        if !has_place {
            if entry.alloc_bits() != 0 {
                let what = format!("data subclusters without a cluster: {bitmap:#018x} ({guest})");
                self.findings.corruption(times, what);
            }
            return Ok(());
        }
        self.statistics(offset, refs.active);
        if entry.alloc_bits() & entry.zero_bits() != 0 {
            let what = format!("subclusters are data and zeros at once: {bitmap:#018x} ({guest})");
            self.findings.corruption(times, what);
        }
        if !rules.geometry.is_cluster_aligned(offset) {
            let what = format!("data cluster at {offset:#x} does not begin at a cluster ({guest})");
            self.findings.corruption(times, what);
        }
        if rules.has_data_file {
            if offset != guest.0 && refs.active > 0 {
                // Finding F7: reads of this entry fail, and QEMU's check is silent.
                let what = format!("data file offset {offset:#x} differs from {guest}");
                self.findings.corruption(times, what);
            }
        } else {
            let cluster = rules.geometry.cluster_size();
            let collided = self.count(offset, cluster, times, Use::Data, refs.active > 0)?;
            if collided && self.collisions.len() < MAX_COLLISIONS {
                self.collisions.push((rules.geometry.cluster_index(offset), guest));
            }
        }
        self.check_l2_copied(entry, offset, guest, refs.active).await;
        Ok(())
    }

    fn compressed(&mut self, entry: L2Entry, refs: TableRefs) -> Result<()> {
        let range = entry.compressed_range(&self.rules.geometry);
        let at = range.offset;
        if entry.is_copied() {
            let what = format!("compressed cluster is marked COPIED ({at})");
            self.findings.corruption(refs.total, what);
        }
        if self.rules.has_data_file {
            let what = format!("compressed cluster in an image with a data file ({at})");
            self.findings.corruption(refs.total, what);
            return Ok(());
        }
        if entry.bitmap != 0 {
            let what = format!("compressed cluster has a subcluster bitmap ({at})");
            self.findings.corruption(refs.total, what);
            return Ok(());
        }
        self.count(at.0, range.len, refs.total, Use::Compressed, false)?;
        let report = &mut self.findings.report;
        let active = u64::from(refs.active);
        report.allocated_clusters += active;
        report.compressed_clusters += active;
        report.fragmented_clusters += active;
        Ok(())
    }

    fn statistics(&mut self, offset: u64, active: u32) {
        if active == 0 {
            return;
        }
        let report = &mut self.findings.report;
        report.allocated_clusters += u64::from(active);
        if self.next_contiguous != 0 && offset != self.next_contiguous {
            report.fragmented_clusters += u64::from(active);
        }
        self.next_contiguous = offset + self.rules.geometry.cluster_size();
    }

    /// Only the active tree must be exact.
    async fn check_l2_copied(
        &mut self,
        entry: L2Entry,
        offset: u64,
        guest: GuestOffset,
        active: u32,
    ) {
        if active == 0 {
            return;
        }
        let stored = if self.rules.has_data_file {
            Some(1)
        } else {
            self.stored.count(self.rules.geometry.cluster_index(offset)).await
        };
        if let Some(stored) = stored.filter(|count| (*count == 1) != entry.is_copied()) {
            let what = format!(
                "l2 entry {:#018x} ({guest}): COPIED does not fit refcount {stored}",
                entry.word
            );
            self.findings.corruption(active, what);
        }
    }
}
