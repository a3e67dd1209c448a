//! Reads refcounts as they are stored in the file, for a check: read only, a few blocks cached.

use bds_core::driver::ChildPort;
use bds_core::error::Result;

use crate::format::qcow2::file_read::read_bytes;
use crate::format::qcow2::layout::entry::{BadEntry, read_refcount, read_u64, refblock_place};
use crate::format::qcow2::layout::header::Header;
use crate::format::qcow2::layout::units::Geometry;

/// Memory for kept blocks.
const KEPT_LEN: usize = 8 << 20;

/// The refcount table in memory, and the blocks read last.
pub(crate) struct RefcountReader<'a> {
    file: &'a dyn ChildPort,
    geometry: Geometry,
    table: Vec<u8>,
    /// Blocks by slot of the table, the latest last.
    kept: Vec<(u64, Vec<u8>)>,
}

/// What a slot of the refcount table points at.
pub(crate) type Slot = Result<Option<u64>, BadEntry>;

impl<'a> RefcountReader<'a> {
    /// Reads the table, whose length the header's limits bound.
    pub(crate) async fn open(file: &'a dyn ChildPort, header: &Header) -> Result<Self> {
        let len = usize::try_from(header.reftable_len()).expect("at most 8 MiB");
        let table = read_bytes(file, header.reftable_offset, len).await?;
        Ok(Self { file, geometry: header.geometry, table, kept: Vec::new() })
    }

    /// Slots of the table.
    pub(crate) fn slots(&self) -> u64 {
        self.table.len() as u64 / 8
    }

    /// The raw entry of a slot; zero past the table's end.
    pub(crate) fn raw(&self, slot: u64) -> u64 {
        usize::try_from(slot).ok().and_then(|i| read_u64(&self.table, i)).unwrap_or(0)
    }

    /// Host offset of the block of a slot.
    pub(crate) fn slot(&self, slot: u64) -> Slot {
        match refblock_place(self.raw(slot), &self.geometry)? {
            Some(place) if place.0 > i64::MAX as u64 - self.geometry.cluster_size() => {
                Err(BadEntry::RefblockOffset(place.0))
            }
            place => Ok(place.map(|p| p.0)),
        }
    }

    /// The block of a slot; `None` if it has none or its entry is bad.
    pub(crate) async fn block(&mut self, slot: u64) -> Result<Option<&[u8]>> {
        let Ok(Some(offset)) = self.slot(slot) else { return Ok(None) };
        if let Some(index) = self.kept.iter().position(|(s, _)| *s == slot) {
            let last = self.kept.len() - 1;
            self.kept.swap(index, last);
        } else {
            let len = self.geometry.cluster_len();
            let block = read_bytes(self.file, offset, len).await?;
            if self.kept.len() >= (KEPT_LEN / len).clamp(2, 32) {
                self.kept.remove(0);
            }
            self.kept.push((slot, block));
        }
        Ok(self.kept.last().map(|(_, block)| block.as_slice()))
    }

    /// The count of a cluster; `None` if it cannot be known (its block's entry is bad, or the block
    /// cannot be read).
    pub(crate) async fn count(&mut self, cluster: u64) -> Option<u64> {
        let slot = self.geometry.reftable_index(cluster);
        self.slot(slot).ok()?;
        let (order, index) =
            (self.geometry.refcount_order(), self.geometry.refblock_index(cluster));
        let block = self.block(slot).await.ok()?;
        Some(block.and_then(|b| read_refcount(b, order, index)).unwrap_or(0))
    }
}
