//! Walks everything that refers to host clusters and counts the references: the first half of a
//! check.
//!
//! Every L2 table is read once, however many L1 entries point at it, and counts as often as it is
//! referred to: so the work is bounded by the size of the file, not by what a hostile image
//! claims. Counts and what counts as a corruption follow `qemu-img check`; what we find beyond it
//! is an *extra*, counted apart by [`Findings`].

use std::collections::BTreeMap;

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};

use super::findings::Findings;
use super::ref_map::{RefMap, Use};
use super::refcount_reader::RefcountReader;
use crate::format::qcow2::bitmap::directory::read_directory;
use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::bitmap_directory::BitsPlace;
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::entry::{EntryRules, L1Entry, L2Entry, OFFSET_MASK};
use crate::format::qcow2::layout::header::{Autoclear, MAX_L1_LEN};
use crate::format::qcow2::layout::units::GuestOffset;
use crate::format::qcow2::manage::snapshot::{MAX_EXTRA_LEN, MIN_V3_EXTRA_LEN, SnapshotTable};

/// Bytes of L1 tables read in all: 65,536 snapshots of a 1 TiB disk with 64-KiB clusters fit.
const MAX_L1_TOTAL_LEN: u64 = 1 << 30;
/// What a distinct L2 table costs in memory.
const TABLE_COST_LEN: u64 = 64;
/// Clusters that two guest ranges share, remembered by number.
pub(super) const MAX_COLLISIONS: usize = 4096;

/// L1 entries that point at one L2 table.
#[derive(Clone, Copy, Default)]
pub(super) struct TableRefs {
    pub active: u32,
    pub total: u32,
    /// The first active entry.
    l1_index: u64,
}

/// Counts the references to every cluster.
pub(crate) struct RefWalk<'a> {
    file: &'a dyn ChildPort,
    image: &'a Cluster0,
    pub(super) rules: EntryRules,
    file_len: u64,
    pub map: RefMap,
    pub findings: Findings,
    pub stored: RefcountReader<'a>,
    /// Clusters that a second active entry claimed: cluster number and that entry's guest offset.
    pub collisions: Vec<(u64, GuestOffset)>,
    tables: BTreeMap<u64, TableRefs>,
    l1_total_len: u64,
    /// Where the next data cluster would be if nothing were fragmented; 0 at the start of a table.
    pub(super) next_contiguous: u64,
    progress: &'a (dyn Fn(u64, u64) + Send + Sync),
    done_len: u64,
}

impl<'a> RefWalk<'a> {
    pub(crate) fn new(
        file: &'a dyn ChildPort,
        image: &'a Cluster0,
        stored: RefcountReader<'a>,
        memory_budget_len: u64,
        progress: &'a (dyn Fn(u64, u64) + Send + Sync),
    ) -> Self {
        let header = &image.header;
        let rules = header.entry_rules();
        let mut findings = Findings::default();
        findings.report.total_clusters = header.geometry.clusters(header.size);
        Self {
            file,
            image,
            rules,
            file_len: file.len(),
            map: RefMap::new(memory_budget_len),
            findings,
            stored,
            collisions: Vec::new(),
            tables: BTreeMap::new(),
            l1_total_len: 0,
            next_contiguous: 0,
            progress,
            done_len: 0,
        }
    }

    pub(crate) fn rules(&self) -> &EntryRules {
        &self.rules
    }

    /// Counts everything. An error means that the check could not continue (I/O, budget).
    pub(crate) async fn walk(&mut self) -> Result<()> {
        let header = &self.image.header;
        let cluster = header.geometry.cluster_size();
        self.count(0, cluster, 1, Use::Header, false)?;
        let l1_len = u64::from(header.l1_size) * 8;
        let active = self.read_l1("active l1 table", header.l1_offset, l1_len).await?;
        self.note_tables(&active, true)?;
        self.snapshots().await?;
        self.walk_tables(&active).await?;
        self.count(header.reftable_offset, header.reftable_len(), 1, Use::Refcounts, false)?;
        if let Some(crypto) = self.image.extensions.crypto {
            self.count(crypto.offset, crypto.len, 1, Use::Other, false)?;
        }
        self.bitmaps().await?;
        self.refblocks()
    }

    /// Counts the clusters of `len` bytes at `offset`, `times` over. A range that ends a cluster or
    /// more past the end of the file is a corruption and not counted.
    pub(super) fn count(
        &mut self,
        offset: u64,
        len: u64,
        times: u32,
        purpose: Use,
        is_active: bool,
    ) -> Result<bool> {
        if len == 0 {
            return Ok(false);
        }
        let geometry = self.rules.geometry;
        let end = offset.checked_add(len);
        let past = end.map_or(u64::MAX, |e| e.saturating_sub(self.file_len));
        let (Some(end), true) = (end, past < geometry.cluster_size()) else {
            self.findings.corruption(
                times,
                format!(
                    "a reference of {len} bytes at {offset:#x} ends beyond the file ({} bytes)",
                    self.file_len
                ),
            );
            return Ok(false);
        };
        let max = geometry.refcount_max();
        let mut collided = false;
        for cluster in geometry.cluster_index(offset)..=geometry.cluster_index(end - 1) {
            let added = self.map.add(cluster, times, purpose, is_active)?;
            collided |= added.is_shared_by_active;
            let over = added.count.saturating_sub(max).min(u64::from(times));
            if over > 0 {
                self.findings.corruption(
                    u32::try_from(over).unwrap_or(u32::MAX),
                    format!(
                        "cluster {cluster} ({:#x}) has more references than a refcount of {} bits \
                         can hold",
                        cluster << geometry.cluster_bits(),
                        geometry.refcount_bits()
                    ),
                );
            }
        }
        Ok(collided)
    }

    async fn read_l1(&mut self, what: &str, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.count(offset, len, 1, Use::L1, false)?;
        self.l1_total_len += len;
        if self.l1_total_len > MAX_L1_TOTAL_LEN {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                "the l1 tables of all snapshots are larger than 1 GiB together",
            )
            .at(offset));
        }
        let len = usize::try_from(len).expect("at most 32 MiB");
        match read_bytes(self.file, offset, len).await {
            Ok(table) => Ok(table),
            Err(error) => {
                self.findings.unreadable(1, format!("cannot read the {what}: {error}"));
                Ok(Vec::new())
            }
        }
    }

    /// Counts the tables an L1 table points at.
    fn note_tables(&mut self, l1: &[u8], is_active: bool) -> Result<()> {
        for (index, entry) in entries(l1).map(L1Entry).enumerate() {
            let offset = entry.0 & OFFSET_MASK;
            if offset == 0 {
                if entry.0 != 0 {
                    let what = format!("l1 entry {index} ({:#018x}) points at no table", entry.0);
                    self.findings.corruption(1, what);
                }
                continue;
            }
            if entry.reserved() != 0 {
                self.findings.corruption(
                    1,
                    format!("l1 entry {index} has reserved bits set: {:#018x}", entry.0),
                );
            }
            if !self.rules.geometry.is_cluster_aligned(offset) {
                self.findings.corruption(
                    1,
                    format!("l1 entry {index}: table at {offset:#x} does not begin at a cluster"),
                );
            }
            if !self.tables.contains_key(&offset) {
                self.map.reserve(TABLE_COST_LEN)?;
            }
            let refs = self.tables.entry(offset).or_default();
            refs.total = refs.total.saturating_add(1);
            if is_active {
                if refs.active == 0 {
                    refs.l1_index = index as u64;
                }
                refs.active = refs.active.saturating_add(1);
            }
        }
        Ok(())
    }

    async fn snapshots(&mut self) -> Result<()> {
        let header = &self.image.header;
        let problem = header.snapshots_problem();
        if header.snapshot_count == 0 {
            if let Some(problem) = problem {
                self.findings.corruption(1, problem);
            }
            return Ok(());
        }
        let geometry = header.geometry;
        if header.snapshot_count > crate::format::qcow2::layout::header::MAX_SNAPSHOTS
            || problem.is_some()
        {
            self.findings.unreadable(1, "the header's fields for the snapshot table are damaged");
            return Ok(());
        }
        let (offset, count) = (header.snapshots_offset, header.snapshot_count);
        let table = match SnapshotTable::read(self.file, offset, count).await {
            Ok(table) => table,
            Err(error) => {
                self.findings.unreadable(1, format!("cannot read the snapshot table: {error}"));
                return Ok(());
            }
        };
        self.check_snapshot_entries(&table);
        if self.rules.has_data_file {
            self.findings.corruption(1, "snapshots in an image with a data file");
        } else {
            for snapshot in &table.entries {
                let name = snapshot.name.escape_ascii();
                let len = u64::from(snapshot.l1_size) * 8;
                if !geometry.is_cluster_aligned(snapshot.l1_offset) {
                    let place = snapshot.l1_offset;
                    self.findings.corruption(
                        1,
                        format!("snapshot '{name}': l1 table at {place:#x} is not at a cluster"),
                    );
                } else if len > MAX_L1_LEN {
                    self.findings.corruption(
                        1,
                        format!("snapshot '{name}': l1 table of {} entries", snapshot.l1_size),
                    );
                } else {
                    let what = format!("l1 table of snapshot '{name}'");
                    let l1 = self.read_l1(&what, snapshot.l1_offset, len).await?;
                    self.note_tables(&l1, false)?;
                }
            }
        }
        self.count(offset, table.len, 1, Use::Other, false)?;
        Ok(())
    }

    fn check_snapshot_entries(&mut self, table: &SnapshotTable) {
        let mut ids: Vec<&[u8]> = table.entries.iter().map(|s| s.id.as_slice()).collect();
        ids.sort_unstable();
        for pair in ids.windows(2).filter(|pair| pair[0] == pair[1]) {
            self.findings.remark(format!("two snapshots have the id '{}'", pair[0].escape_ascii()));
        }
        for snapshot in &table.entries {
            let name = snapshot.name.escape_ascii();
            if snapshot.extra_len > MAX_EXTRA_LEN {
                self.findings
                    .corruption(1, format!("snapshot '{name}' has more than 1024 bytes extra"));
            } else if self.image.header.version >= 3 && snapshot.extra_len < MIN_V3_EXTRA_LEN {
                self.findings.corruption(1, format!("snapshot '{name}' lacks extra data"));
            }
        }
    }

    /// Reads every L2 table once: those of the active tree in its order, then those only snapshots
    /// have.
    async fn walk_tables(&mut self, active: &[u8]) -> Result<()> {
        let tables = std::mem::take(&mut self.tables);
        let cluster = self.rules.geometry.cluster_size();
        let total_len = tables.len() as u64 * cluster;
        for (index, entry) in entries(active).map(L1Entry).enumerate() {
            let offset = entry.0 & OFFSET_MASK;
            let Some(refs) = tables.get(&offset).filter(|_| offset != 0) else { continue };
            self.check_l1_copied(index, entry).await;
            if refs.l1_index == index as u64 {
                self.walk_table(offset, *refs).await?;
                (self.progress)(self.done_len, total_len);
            }
        }
        for (offset, refs) in tables.iter().filter(|(_, refs)| refs.active == 0) {
            self.walk_table(*offset, *refs).await?;
            (self.progress)(self.done_len, total_len);
        }
        Ok(())
    }

    async fn check_l1_copied(&mut self, index: usize, entry: L1Entry) {
        let cluster = self.rules.geometry.cluster_index(entry.0 & OFFSET_MASK);
        let Some(stored) = self.stored.count(cluster).await else { return };
        if (stored == 1) != entry.is_copied() {
            self.findings.corruption(
                1,
                format!(
                    "l1 entry {index} ({:#018x}): COPIED does not fit refcount {stored}",
                    entry.0
                ),
            );
        }
    }

    async fn walk_table(&mut self, offset: u64, refs: TableRefs) -> Result<()> {
        let geometry = self.rules.geometry;
        self.count(offset, geometry.cluster_size(), refs.total, Use::L2, false)?;
        self.done_len += geometry.cluster_size();
        self.next_contiguous = 0;
        let table = match read_bytes(self.file, offset, geometry.cluster_len()).await {
            Ok(table) => table,
            Err(error) => {
                let times = u64::from(refs.total);
                self.findings.unreadable(times, format!("cannot read an l2 table: {error}"));
                return Ok(());
            }
        };
        for index in 0..geometry.l2_entries() {
            let entry = L2Entry::read(&table, index, &geometry);
            if entry != L2Entry::default() {
                let guest = geometry.guest_offset(refs.l1_index, index);
                self.entry(entry, guest, refs).await?;
            }
        }
        Ok(())
    }

    async fn bitmaps(&mut self) -> Result<()> {
        let header = &self.image.header;
        let valid = header.autoclear.contains(Autoclear::BITMAPS);
        let Some(pointer) = self.image.extensions.bitmaps.filter(|_| valid) else { return Ok(()) };
        let geometry = header.geometry;
        self.count(pointer.directory_offset, pointer.directory_len, 1, Use::Other, false)?;
        let list = match read_directory(self.file, &pointer, &geometry, header.size).await {
            Ok(list) => list,
            Err(error) => {
                self.findings.corruption(1, format!("cannot use the bitmap directory: {error}"));
                return Ok(());
            }
        };
        for entry in list {
            let len = entry.table_len();
            self.count(entry.table_offset, len, 1, Use::Other, false)?;
            if entry.table_offset + len > self.file_len.next_multiple_of(geometry.cluster_size()) {
                continue; // reported by the count
            }
            // The table lies inside the file, whatever the directory claims.
            let mut at = 0;
            while at < len {
                let step = (len - at).min(1 << 20);
                let size = usize::try_from(step).expect("at most 1 MiB");
                let table = read_bytes(self.file, entry.table_offset + at, size).await?;
                for word in entries(&table) {
                    match BitsPlace::parse(word, &geometry) {
                        Ok(BitsPlace::Zeros | BitsPlace::Ones) => {}
                        Ok(BitsPlace::Cluster(place)) => {
                            self.count(place.0, geometry.cluster_size(), 1, Use::Other, false)?;
                        }
                        Err(error) => self.findings.corruption(1, error.to_string()),
                    }
                }
                at += step;
            }
        }
        Ok(())
    }

    /// Counts the refcount blocks; a block counted twice, or by anything else, is broken.
    fn refblocks(&mut self) -> Result<()> {
        let geometry = self.rules.geometry;
        let clusters = geometry.clusters(self.file_len);
        for slot in 0..self.stored.slots() {
            let raw = self.stored.raw(slot);
            if raw & crate::format::qcow2::layout::entry::REFTABLE_RESERVED != 0 {
                let what = format!("refcount table entry {slot} has reserved bits set: {raw:#x}");
                self.findings.corruption(1, what);
                continue;
            }
            let offset = match self.stored.slot(slot) {
                Ok(None) => continue,
                Ok(Some(offset)) => offset,
                Err(bad) => {
                    self.findings.corruption(1, format!("refcount table entry {slot}: {bad}"));
                    continue;
                }
            };
            let cluster = geometry.cluster_index(offset);
            if cluster >= clusters {
                let what = format!("refcount block {slot} at {offset:#x} lies outside the file");
                self.findings.corruption(1, what);
                continue;
            }
            self.count(offset, geometry.cluster_size(), 1, Use::Refcounts, false)?;
            // More than fits was reported as such.
            let count = self.map.count(cluster).min(geometry.refcount_max());
            if count != 1 {
                let what = format!("refcount block {slot} at {offset:#x} is used {count} times");
                self.findings.corruption(1, what);
            }
        }
        Ok(())
    }
}

fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes))
}
