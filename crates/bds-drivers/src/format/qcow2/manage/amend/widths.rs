//! Writes all refcounts once more in another width, beside those that hold.
//!
//! The new blocks and their table lie behind everything that is in use, in clusters that the old
//! counts call free. The new counts count the new structure and leave the old one out. So whichever
//! of the two the header names, its counts are exact: a crash leaks nothing, and nothing has to be
//! freed after the switch.
//!
//! The counts must not change meanwhile (`Image::freeze`).

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use bds_core::error::{Error, ErrorKind, Result};

use super::steps::Steps;
use crate::format::qcow2::alloc::overlap::Class;
use crate::format::qcow2::check::refcount_reader::RefcountReader;
use crate::format::qcow2::file_read::read_cluster0;
use crate::format::qcow2::layout::cluster0::Strictness;
use crate::format::qcow2::layout::entry::{read_refcount, write_refcount};
use crate::format::qcow2::layout::header::{Header, MAX_REFTABLE_LEN};
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::layout::units::{Geometry, HOST_OFFSET_END, mem_len};
use crate::format::qcow2::state::Image;

/// A second refcount structure.
#[derive(Debug)]
pub(super) struct NewCounts {
    /// The slots of the table, up to the last block.
    pub table: Vec<u64>,
    /// Where the table is.
    pub place: Clusters<MetaOffset>,
    /// All clusters of the new structure, and of the old one.
    new: Range<u64>,
    old: Vec<u64>,
}

/// Where everything of the new structure goes, in clusters.
struct Layout {
    table: Range<u64>,
    /// Slot by slot, right behind the table.
    slots: Vec<u64>,
}

impl Layout {
    fn end(&self) -> u64 {
        self.table.end + self.slots.len() as u64
    }

    /// Plans a structure from cluster `first` on that has blocks for the slots `used`, and for
    /// itself.
    fn plan(geometry: &Geometry, used: &BTreeSet<u64>, first: u64) -> Result<Self> {
        let (mut table_len, mut blocks) = (1, used.len() as u64);
        loop {
            let end = first + table_len + blocks;
            let last = geometry.reftable_index(end - 1);
            let own = geometry.reftable_index(first)..=last;
            let mut slots = used.clone();
            slots.extend(own);
            let bytes = (slots.last().copied().unwrap_or(0) + 1).saturating_mul(8);
            if bytes > MAX_REFTABLE_LEN || end > HOST_OFFSET_END >> geometry.cluster_bits() {
                let words = "refcounts of this width would need a table of more than 8 MiB: use \
                             narrower ones";
                return Err(Error::new(ErrorKind::LimitExceeded, words)
                    .field("refcount_bits", geometry.refcount_bits()));
            }
            let is_enough = geometry.clusters(bytes) <= table_len && slots.len() as u64 <= blocks;
            if is_enough {
                let table = first..first + table_len;
                return Ok(Self { table, slots: slots.into_iter().collect() });
            }
            table_len = table_len.max(geometry.clusters(bytes));
            blocks = blocks.max(slots.len() as u64);
        }
    }
}

impl Image {
    /// Checks that every count fits the new width.
    pub(super) async fn check_counts_fit(&self, steps: &mut Steps, new: &Geometry) -> Result<()> {
        let now = read_cluster0(self.file.port(), Strictness::Use).await?;
        self.for_counts(&now.header, steps, |cluster, count| fits(new, cluster, count)).await
    }

    /// Calls `visit` with the number and the count of every cluster whose count is not zero.
    async fn for_counts(
        &self,
        header: &Header,
        steps: &mut Steps,
        mut visit: impl FnMut(u64, u64) -> Result<()> + Send,
    ) -> Result<()> {
        let geometry = header.geometry;
        let mut stored = RefcountReader::open(self.file.port(), header).await?;
        let slots = used_slots(&stored)?;
        steps.expect(slots.len() as u64);
        for (slot, _) in slots {
            let Some(block) = stored.block(slot).await? else { continue };
            let first = slot << geometry.refblock_bits();
            for cluster in first..first + geometry.refblock_entries() {
                let index = geometry.refblock_index(cluster);
                match read_refcount(block, geometry.refcount_order(), index).unwrap_or(0) {
                    0 => {}
                    count => visit(cluster, count)?,
                }
            }
            steps.advance(1)?;
        }
        Ok(())
    }

    /// Writes the counts of the image `header` in the width of `new`. Not durable yet; nothing
    /// points there. The counts do not change meanwhile.
    pub(super) async fn write_counts(
        self: &Arc<Self>,
        header: &Header,
        new: &Geometry,
        steps: &mut Steps,
    ) -> Result<NewCounts> {
        let geometry = header.geometry;
        let old = old_structure(self, header).await?;
        let mut used = BTreeSet::new();
        let mut highest = 0;
        self.for_counts(header, steps, |cluster, count| {
            highest = highest.max(cluster);
            let left = count_without(&old, cluster, count);
            fits(new, cluster, left)?;
            if left > 0 {
                used.insert(new.reftable_index(cluster));
            }
            Ok(())
        })
        .await?;
        let first = (highest + 1).max(geometry.clusters(self.file.len()));
        let layout = Layout::plan(new, &used, first)?;
        {
            // What is written there is no zeros any more, even if the change fails.
            let mut meta = self.meta();
            meta.zero_from = meta.zero_from.max(layout.end() << geometry.cluster_bits());
        }
        steps.expect(layout.slots.len() as u64);
        self.write_structure(header, new, &layout, &old, steps).await
    }

    async fn write_structure(
        &self,
        header: &Header,
        new: &Geometry,
        layout: &Layout,
        old: &[u64],
        steps: &mut Steps,
    ) -> Result<NewCounts> {
        let bits = new.cluster_bits();
        let mut stored = RefcountReader::open(self.file.port(), header).await?;
        let slots = layout.slots.last().map_or(0, |last| mem_len(last + 1));
        let mut table = vec![0; slots];
        for (slot, at) in layout.slots.iter().zip(layout.table.end..) {
            let mut block = vec![0; new.cluster_len()];
            let range = slot << new.refblock_bits()..(slot + 1) << new.refblock_bits();
            copy_counts(&mut stored, &header.geometry, new, &mut block, range.clone(), old).await?;
            for cluster in range.start.max(layout.table.start)..range.end.min(layout.end()) {
                write_refcount(&mut block, new.refcount_order(), new.refblock_index(cluster), 1);
            }
            table[mem_len(*slot)] = at << bits;
            self.write_file(MetaOffset(at << bits), block).await?;
            steps.advance(1)?;
        }
        let count = layout.table.end - layout.table.start;
        let place = Clusters { start: MetaOffset(layout.table.start << bits), count };
        let mut bytes: Vec<u8> = table.iter().copied().flat_map(u64::to_be_bytes).collect();
        bytes.resize(mem_len(count << bits), 0);
        self.write_file(place.start, bytes).await?;
        let new = layout.table.start..layout.end();
        Ok(NewCounts { table, place, new, old: old.to_vec() })
    }

    /// Protects the new structure against writes, before it is used.
    pub(super) async fn protect_new_counts(self: &Arc<Self>, counts: &NewCounts) -> Result<()> {
        let bits = self.geometry().cluster_bits();
        let table =
            counts.place.start.0 >> bits..(counts.place.start.0 >> bits) + counts.place.count;
        self.plan(|image, _| {
            for cluster in counts.new.clone() {
                let is_table = table.contains(&cluster);
                let class = if is_table { Class::REFCOUNT_TABLE } else { Class::REFCOUNT_BLOCK };
                let entered = image.insert_metadata(MetaOffset(cluster << bits), class);
                if entered.is_err() {
                    image.unprotect(counts.new.start..cluster);
                    return entered;
                }
            }
            Ok(())
        })
        .await
    }

    /// Ends the protection of the structure that no header points at: the old one, or the new one.
    pub(super) fn unprotect_counts(&self, counts: &NewCounts, has_switched: bool) {
        if has_switched {
            self.unprotect(counts.old.iter().copied());
        } else {
            self.unprotect(counts.new.clone());
        }
    }

    fn unprotect(&self, clusters: impl IntoIterator<Item = u64>) {
        let bits = self.geometry().cluster_bits();
        clusters.into_iter().for_each(|at| self.metadata.remove(MetaOffset(at << bits)));
    }
}

/// Copies the counts of the clusters `range` into a block of the new width, those of the old
/// structure left out.
async fn copy_counts(
    stored: &mut RefcountReader<'_>,
    from: &Geometry,
    to: &Geometry,
    block: &mut [u8],
    range: Range<u64>,
    old: &[u64],
) -> Result<()> {
    for slot in from.reftable_index(range.start)..=from.reftable_index(range.end - 1) {
        if slot >= stored.slots() {
            break;
        }
        let Some(counts) = stored.block(slot).await? else { continue };
        let first = slot << from.refblock_bits();
        let here = range.start.max(first)..range.end.min(first + from.refblock_entries());
        for cluster in here {
            let index = from.refblock_index(cluster);
            let count = read_refcount(counts, from.refcount_order(), index).unwrap_or(0);
            if count == 0 {
                continue;
            }
            let left = count_without(old, cluster, count);
            let is_written =
                write_refcount(block, to.refcount_order(), to.refblock_index(cluster), left);
            debug_assert!(is_written, "all counts were checked against the width");
        }
    }
    Ok(())
}

/// Clusters of the refcount table and its blocks, in ascending order.
async fn old_structure(image: &Image, header: &Header) -> Result<Vec<u64>> {
    let bits = header.geometry.cluster_bits();
    let stored = RefcountReader::open(image.file.port(), header).await?;
    let table = header.reftable_offset >> bits;
    let mut clusters: Vec<u64> = (table..table + u64::from(header.reftable_clusters)).collect();
    clusters.extend(used_slots(&stored)?.into_iter().map(|(_, place)| place >> bits));
    clusters.sort_unstable();
    Ok(clusters)
}

/// Slots that have a block, with its place.
fn used_slots(stored: &RefcountReader<'_>) -> Result<Vec<(u64, u64)>> {
    let mut used = Vec::new();
    for slot in 0..stored.slots() {
        let place = stored.slot(slot).map_err(|bad| {
            let words =
                format!("refcount table entry {slot}: {bad}; repair the image with a check");
            Error::new(ErrorKind::InvalidImage, words)
        })?;
        used.extend(place.map(|place| (slot, place)));
    }
    Ok(used)
}

/// What is left of a count without the reference of the old structure.
fn count_without(old: &[u64], cluster: u64, count: u64) -> u64 {
    count - u64::from(old.binary_search(&cluster).is_ok())
}

fn fits(new: &Geometry, cluster: u64, count: u64) -> Result<()> {
    if count <= new.refcount_max() {
        return Ok(());
    }
    let (bits, at) = (new.refcount_bits(), cluster << new.cluster_bits());
    Err(Error::new(
        ErrorKind::NotSupported,
        format!(
            "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {at:#x} has a \
             refcount of {count}"
        ),
    ))
}
