//! Finds what an image lost that was truncated, before it is opened for writing.
//!
//! A file that was truncated must not be written: it would grow again, and what was lost would then
//! read as zeros, silently and for ever. Tables behind the end are found at once. Lost data is
//! looked for only if refcounts count clusters behind the end (after a crash they may, harmlessly:
//! new clusters are counted before the file has them), or if a data file is shorter than the disk;
//! then every L2 table is read, each of them once.

use bds_core::driver::ChildPort;
use bds_core::error::{Error, ErrorKind, Result};

use crate::format::qcow2::file_read::{for_words, read_bytes};
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::entry::{L1Entry, L2Entry, Place, read_refcount, refblock_place};
use crate::format::qcow2::layout::header::MAX_L1_LEN;
use crate::format::qcow2::manage::snapshot::SnapshotTable;

/// Bytes of snapshots' L1 tables that are read.
const MAX_L1_TOTAL_LEN: u64 = 1 << 30;

/// Looks for tables and data behind the end of the files.
pub(crate) struct TruncationCheck<'a> {
    pub file: &'a dyn ChildPort,
    pub cluster0: &'a Cluster0,
    /// Length of the external data file.
    pub data_len: Option<u64>,
}

impl TruncationCheck<'_> {
    /// An error if the image has lost something.
    pub(crate) async fn run(&self, l1: &[(u32, L1Entry)], reftable: &[u64]) -> Result<()> {
        let geometry = &self.cluster0.header.geometry;
        for slot in reftable {
            // One that cannot be followed is reported when it is used.
            if let Ok(Some(place)) = refblock_place(*slot, geometry) {
                self.check_table("a refcount block", place.0)?;
            }
        }
        for (_, entry) in l1 {
            if let Ok(Some(place)) = entry.table(geometry) {
                self.check_table("an L2 table", place.0)?;
            }
        }
        let is_suspicious = match self.data_len {
            Some(len) => len < self.cluster0.header.size,
            None => self.counts_reach_past_end(reftable).await?,
        };
        if !is_suspicious {
            return Ok(());
        }
        let mut tables: Vec<u64> = l1.iter().filter_map(|(_, entry)| self.table(*entry)).collect();
        self.add_snapshots(&mut tables).await?;
        tables.sort_unstable();
        tables.dedup();
        for table in tables {
            self.check_l2_table(table).await?;
        }
        Ok(())
    }

    fn table(&self, entry: L1Entry) -> Option<u64> {
        entry.table(&self.cluster0.header.geometry).ok().flatten().map(|place| place.0)
    }

    /// Refuses a table that is not all in the image file: writers write whole ones.
    fn check_table(&self, what: &str, place: u64) -> Result<()> {
        let cluster = self.cluster0.header.geometry.cluster_size();
        match place.checked_add(cluster).is_some_and(|end| end <= self.file.len()) {
            true => Ok(()),
            false => Err(truncated_error(what, place, self.file.len())),
        }
    }

    /// Refuses something that begins behind the end of the image file.
    fn check(&self, what: &str, place: u64) -> Result<()> {
        if place < self.file.len() {
            return Ok(());
        }
        Err(truncated_error(what, place, self.file.len()))
    }

    /// Do the refcounts say that clusters behind the end of the file are in use?
    async fn counts_reach_past_end(&self, reftable: &[u64]) -> Result<bool> {
        let geometry = &self.cluster0.header.geometry;
        let end = geometry.clusters(self.file.len());
        let first = geometry.reftable_index(end);
        for (slot, entry) in (0u64..).zip(reftable).skip_while(|(slot, _)| *slot < first) {
            let Ok(Some(place)) = refblock_place(*entry, geometry) else { continue };
            if slot > first {
                return Ok(true);
            }
            let block = read_bytes(self.file, place.0, geometry.cluster_len()).await?;
            let counts = geometry.refblock_index(end)..;
            let mut counts =
                counts.map_while(|i| read_refcount(&block, geometry.refcount_order(), i));
            if counts.any(|count| count > 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Adds the tables that only snapshots have.
    async fn add_snapshots(&self, tables: &mut Vec<u64>) -> Result<()> {
        let header = &self.cluster0.header;
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let (start, count) = (header.snapshots_offset, header.snapshot_count);
        let mut left = MAX_L1_TOTAL_LEN;
        for snapshot in SnapshotTable::read(self.file, start, count).await?.entries {
            let len = u64::from(snapshot.l1_size) * 8;
            let is_inside =
                snapshot.l1_offset.checked_add(len).is_some_and(|e| e <= self.file.len());
            left = left.checked_sub(len).filter(|_| is_inside && len <= MAX_L1_LEN).ok_or_else(
                || {
                    truncated_error(
                        "the L1 table of a snapshot",
                        snapshot.l1_offset,
                        self.file.len(),
                    )
                },
            )?;
            for_words(self.file, snapshot.l1_offset, len, |_, word| {
                tables.extend(self.table(L1Entry(word)));
                Ok(())
            })
            .await?;
            tables.sort_unstable();
            tables.dedup();
        }
        tables.iter().try_for_each(|table| self.check_table("an L2 table of a snapshot", *table))
    }

    /// Refuses an L2 table with an entry whose data is lost.
    async fn check_l2_table(&self, table: u64) -> Result<()> {
        let header = &self.cluster0.header;
        let geometry = header.geometry;
        let rules = header.entry_rules();
        let data_len = self.data_len.unwrap_or(self.file.len());
        let bytes = read_bytes(self.file, table, geometry.cluster_len()).await?;
        for index in 0..geometry.l2_entries() {
            let entry = L2Entry::read(&bytes, index, &geometry);
            // What cannot be followed at all is reported when it is used.
            match entry.place(&rules) {
                Ok(Place::Cluster(place)) if place.0 >= data_len => {
                    let holds_data = match geometry.has_extended_l2() {
                        true => entry.alloc_bits() != 0,
                        false => entry.kind(0, &rules).is_ok_and(|(kind, _)| !kind.is_zero()),
                    };
                    // A cluster of a data file without data in it need not be there yet.
                    if holds_data || self.data_len.is_none() {
                        return Err(truncated_error("a data cluster", place.0, data_len));
                    }
                }
                Ok(Place::Compressed(range)) => {
                    self.check("a compressed cluster", range.offset.0)?
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn truncated_error(what: &str, place: u64, file_len: u64) -> Error {
    Error::new(
        ErrorKind::InvalidImage,
        format!(
            "{what} at host offset {place:#x} reaches behind the end of the file ({file_len} bytes): the file was cut short and \
             must not be written; fetch a whole copy, or open it read-only and save what is left with convert --salvage"
        ),
    )
    .at(place)
}
