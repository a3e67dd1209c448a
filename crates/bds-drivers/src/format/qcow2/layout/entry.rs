//! Parses and encodes entries of the L1, L2 and refcount tables.
//!
//! Decoding follows the tables of qcow2.txt ("Standard Cluster Descriptor", "Extended L2 Entries",
//! "Compressed Clusters Descriptor"). An entry that a reader must not follow is a [`BadEntry`];
//! reserved bits that a reader ignores but a check reports are available beside the decoded value.
//! No I/O, no allocation, no panic on any bits.

use std::fmt;

use super::space::{DataOffset, MetaOffset};
use super::units::{Geometry, HOST_OFFSET_END};

/// Bit 63: the refcount of the target is exactly one, so it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the rest is a compressed descriptor.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Low 9 bits of a refcount table entry.
pub(crate) const REFTABLE_RESERVED: u64 = 0x1ff;
const SECTOR_LEN: u64 = 512;

/// Why an entry cannot be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum BadEntry {
    /// An L1 entry's table does not begin at a cluster.
    UnalignedTable(u64),
    /// An L2 entry's data does not begin at a cluster.
    UnalignedData(u64),
    /// The zero flag in an image of version 2.
    ZeroFlagInV2,
    /// A compressed cluster in an image with a data file.
    CompressedWithDataFile,
    /// A compressed cluster that begins beyond the last possible offset.
    CompressedOffset(u64),
    /// Bits of a compressed cluster's subclusters are set.
    CompressedBitmap(u64),
    /// A subcluster is both data and zeros.
    SubclusterBoth(u64),
    /// Data subclusters of a cluster that has no place.
    SubclusterWithoutCluster(u64),
    /// The data file keeps guest bytes elsewhere than at their own offset.
    DataFileOffset(u64),
    /// A refcount block does not begin at a cluster.
    UnalignedRefblock(u64),
    /// A refcount block beyond the largest file offset.
    RefblockOffset(u64),
}

impl fmt::Display for BadEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnalignedTable(o) => write!(f, "l2 table offset {o:#x} is not at a cluster"),
            Self::UnalignedData(o) => write!(f, "data cluster offset {o:#x} is not at a cluster"),
            Self::ZeroFlagInV2 => f.write_str("zero flag in an image of version 2"),
            Self::CompressedWithDataFile => {
                f.write_str("compressed cluster in an image with a data file")
            }
            Self::CompressedOffset(o) => {
                write!(f, "compressed cluster begins at {o:#x}, beyond any file")
            }
            Self::CompressedBitmap(b) => {
                write!(f, "compressed cluster has a subcluster bitmap {b:#018x}")
            }
            Self::SubclusterBoth(b) => {
                write!(f, "subclusters are data and zeros at once (bitmap {b:#018x})")
            }
            Self::SubclusterWithoutCluster(b) => {
                write!(f, "data subclusters without a cluster (bitmap {b:#018x})")
            }
            Self::DataFileOffset(o) => {
                write!(f, "data file offset {o:#x} differs from the guest's offset")
            }
            Self::UnalignedRefblock(o) => {
                write!(f, "refcount block offset {o:#x} is not at a cluster")
            }
            Self::RefblockOffset(o) => write!(f, "refcount block offset {o:#x} is beyond any file"),
        }
    }
}

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L1Entry(pub u64);

impl L1Entry {
    /// Points at the table at `table`, whose refcount is one if `is_copied`.
    pub(crate) fn new(table: MetaOffset, is_copied: bool) -> Self {
        Self(table.0 | if is_copied { COPIED } else { 0 })
    }

    #[inline]
    pub(crate) fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Reserved bits that are set: a reader ignores them, a check reports them.
    pub(crate) fn reserved(self) -> u64 {
        self.0 & L1_RESERVED
    }

    /// The table's place; `None` if there is no table.
    #[inline]
    pub(crate) fn table(self, geometry: &Geometry) -> Result<Option<MetaOffset>, BadEntry> {
        match self.0 & OFFSET_MASK {
            0 => Ok(None),
            offset if geometry.is_cluster_aligned(offset) => Ok(Some(MetaOffset(offset))),
            offset => Err(BadEntry::UnalignedTable(offset)),
        }
    }
}

/// What of an image decides how its L2 entries are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryRules {
    pub geometry: Geometry,
    /// Version 3: bit 0 of a standard entry means zeros.
    pub has_zero_flag: bool,
    /// Data is in a file of its own, at the guest's offsets.
    pub has_data_file: bool,
}

/// What a subcluster (a cluster, without extended L2) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Nothing here: backing data or zeros, no place.
    Unallocated,
    /// Nothing here: backing data or zeros, but the cluster has a place (extended L2 only).
    UnallocatedAlloc,
    /// Zeros, no place.
    ZeroPlain,
    /// Zeros, and the cluster has a place.
    ZeroAlloc,
    /// Data at the cluster's place.
    Normal,
    /// Part of a compressed cluster.
    Compressed,
}

impl Kind {
    /// Has the cluster a whole place of its own?
    #[inline]
    pub(crate) fn has_place(self) -> bool {
        matches!(self, Self::UnallocatedAlloc | Self::ZeroAlloc | Self::Normal)
    }

    /// Does it read as zeros without regard to the backing node?
    #[inline]
    pub(crate) fn is_zero(self) -> bool {
        matches!(self, Self::ZeroPlain | Self::ZeroAlloc)
    }

    /// Does it show the backing node?
    #[inline]
    pub(crate) fn is_unallocated(self) -> bool {
        matches!(self, Self::Unallocated | Self::UnallocatedAlloc)
    }
}

/// Where an L2 entry's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere.
    None,
    /// A whole cluster.
    Cluster(DataOffset),
    /// A stretch of compressed bytes.
    Compressed(CompressedRange),
}

/// The bytes a compressed cluster is read from: up to the end of its last sector, so possibly more
/// than it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CompressedRange {
    pub offset: MetaOffset,
    /// Bytes to read; at least 1, at most two clusters.
    pub len: u64,
}

/// An entry of an L2 table. Without extended L2, `bitmap` is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    pub word: u64,
    /// Low half: subclusters with data; high half: subclusters of zeros.
    pub bitmap: u64,
}

impl L2Entry {
    /// Entry number `index` of the L2 table `table`; zero past its end.
    pub(crate) fn read(table: &[u8], index: usize, geometry: &Geometry) -> Self {
        let step = geometry.l2_entry_len() / 8;
        let word = read_u64(table, index * step).unwrap_or(0);
        let bitmap = if step == 2 { read_u64(table, index * 2 + 1).unwrap_or(0) } else { 0 };
        Self { word, bitmap }
    }

    /// An entry without subclusters, as stored.
    pub(crate) fn standard(word: u64) -> Self {
        Self { word, bitmap: 0 }
    }

    /// A cluster at `place`, its own if `is_copied`. The bitmap is the caller's.
    pub(crate) fn at_cluster(place: DataOffset, is_copied: bool, bitmap: u64) -> Self {
        Self { word: place.0 | if is_copied { COPIED } else { 0 }, bitmap }
    }

    /// A compressed cluster; `None` if the descriptor cannot hold it (offset too high, longer than
    /// a cluster can be).
    pub(crate) fn compressed(geometry: &Geometry, offset: MetaOffset, len: u64) -> Option<Self> {
        if len == 0 || offset.0 > geometry.max_compressed_offset() {
            return None;
        }
        let last = offset.0.checked_add(len - 1)?;
        let extra_sectors = last / SECTOR_LEN - offset.0 / SECTOR_LEN;
        let bits = geometry.compressed_offset_bits();
        if extra_sectors >= 1 << (62 - bits) {
            return None;
        }
        Some(Self::standard(COMPRESSED | extra_sectors << bits | offset.0))
    }

    #[inline]
    pub(crate) fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    #[inline]
    pub(crate) fn is_copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// Subclusters with data, bit i for subcluster i.
    #[inline]
    pub(crate) fn alloc_bits(self) -> u32 {
        u32::try_from(self.bitmap & 0xffff_ffff).expect("masked to 32 bits")
    }

    /// Subclusters of zeros, bit i for subcluster i.
    #[inline]
    pub(crate) fn zero_bits(self) -> u32 {
        u32::try_from(self.bitmap >> 32).expect("shifted to 32 bits")
    }

    /// Reserved bits of a cluster entry that are set: a reader ignores them, a check reports them.
    pub(crate) fn reserved(self, rules: &EntryRules) -> u64 {
        let mask = if self.is_compressed() {
            0
        } else if rules.geometry.has_extended_l2() {
            L2_RESERVED | ZERO
        } else {
            L2_RESERVED
        };
        self.word & mask
    }

    /// The place of a compressed cluster, whatever else is wrong with the entry.
    #[inline]
    pub(crate) fn compressed_range(self, geometry: &Geometry) -> CompressedRange {
        let bits = geometry.compressed_offset_bits();
        let offset = self.word & ((1 << bits) - 1);
        let extra_sectors = (self.word & (COMPRESSED - 1)) >> bits;
        let len = (extra_sectors + 1) * SECTOR_LEN - offset % SECTOR_LEN;
        CompressedRange { offset: MetaOffset(offset), len }
    }

    /// Where the bytes are. Refuses what no reader may follow, except wrong subcluster bits (see
    /// [`Self::kind`]).
    #[inline]
    pub(crate) fn place(self, rules: &EntryRules) -> Result<Place, BadEntry> {
        if self.is_compressed() {
            let range = self.compressed_range(&rules.geometry);
            if rules.has_data_file {
                return Err(BadEntry::CompressedWithDataFile);
            }
            if range.offset.0 >= HOST_OFFSET_END {
                return Err(BadEntry::CompressedOffset(range.offset.0));
            }
            return Ok(Place::Compressed(range));
        }
        let offset = self.word & OFFSET_MASK;
        if !rules.geometry.is_cluster_aligned(offset) {
            return Err(BadEntry::UnalignedData(offset));
        }
        // In a data file, byte 0 of the guest is at byte 0 of the file: only COPIED distinguishes
        // it from an unallocated cluster.
        let is_at_0 = rules.has_data_file
            && self.is_copied()
            && (rules.geometry.has_extended_l2() || self.word & ZERO == 0);
        if offset != 0 || is_at_0 {
            Ok(Place::Cluster(DataOffset(offset)))
        } else {
            Ok(Place::None)
        }
    }

    /// What subcluster `index` is, and how many from `index` on are the same (1 without extended
    /// L2).
    #[inline]
    pub(crate) fn kind(self, index: u32, rules: &EntryRules) -> Result<(Kind, u32), BadEntry> {
        let place = self.place(rules)?;
        if rules.geometry.has_extended_l2() {
            return self.extended_kind(index, place);
        }
        let is_zero = self.word & ZERO != 0;
        let kind = match place {
            Place::Compressed(_) => Kind::Compressed,
            _ if is_zero && !rules.has_zero_flag => return Err(BadEntry::ZeroFlagInV2),
            Place::Cluster(_) if is_zero => Kind::ZeroAlloc,
            Place::Cluster(_) => Kind::Normal,
            Place::None if is_zero => Kind::ZeroPlain,
            Place::None => Kind::Unallocated,
        };
        Ok((kind, 1))
    }

    fn extended_kind(self, index: u32, place: Place) -> Result<(Kind, u32), BadEntry> {
        let (alloc, zero) = (self.alloc_bits(), self.zero_bits());
        let (on_data, on_zero, on_none) = match place {
            Place::Compressed(_) if self.bitmap != 0 => {
                return Err(BadEntry::CompressedBitmap(self.bitmap));
            }
            Place::Compressed(_) => {
                return Ok((Kind::Compressed, super::units::SUBCLUSTERS.saturating_sub(index)));
            }
            Place::Cluster(_) if alloc & zero != 0 => {
                return Err(BadEntry::SubclusterBoth(self.bitmap));
            }
            Place::Cluster(_) => (Kind::Normal, Kind::ZeroAlloc, Kind::UnallocatedAlloc),
            Place::None if alloc != 0 => {
                return Err(BadEntry::SubclusterWithoutCluster(self.bitmap));
            }
            Place::None => (Kind::Unallocated, Kind::ZeroPlain, Kind::Unallocated),
        };
        let run = |bits: u32| bits.checked_shr(index).unwrap_or(0).trailing_ones();
        let (data_run, zero_run) = (run(alloc), run(zero));
        Ok(if data_run > 0 {
            (on_data, data_run)
        } else if zero_run > 0 {
            (on_zero, zero_run)
        } else {
            let left = super::units::SUBCLUSTERS.saturating_sub(index);
            (on_none, run(!(alloc | zero)).min(left))
        })
    }
}

/// An entry of the refcount table: the place of a block, `None` if all its counts are zero.
pub(crate) fn refblock_place(
    entry: u64,
    geometry: &Geometry,
) -> Result<Option<MetaOffset>, BadEntry> {
    match entry & !REFTABLE_RESERVED {
        0 => Ok(None),
        offset if geometry.is_cluster_aligned(offset) => Ok(Some(MetaOffset(offset))),
        offset => Err(BadEntry::UnalignedRefblock(offset)),
    }
}

/// Refcount number `index` of a block of counts `2^order` bits wide; `None` past its end.
#[inline]
pub(crate) fn read_refcount(block: &[u8], order: u32, index: usize) -> Option<u64> {
    Some(match order {
        // Narrow counts fill a byte from its least significant bit.
        0..=2 => {
            let per_byte = 8usize >> order;
            let width = 1u32 << order;
            let byte = *block.get(index / per_byte)?;
            let shift = u32::try_from(index % per_byte).ok()? * width;
            u64::from(byte >> shift) & ((1 << width) - 1)
        }
        3 => u64::from(*block.get(index)?),
        4 => u64::from(u16::from_be_bytes(*block.as_chunks().0.get(index)?)),
        5 => u64::from(u32::from_be_bytes(*block.as_chunks().0.get(index)?)),
        6 => u64::from_be_bytes(*block.as_chunks().0.get(index)?),
        _ => return None,
    })
}

/// Stores refcount number `index`; false (and nothing changed) past the end of the block or if
/// `count` does not fit.
#[inline]
pub(crate) fn write_refcount(block: &mut [u8], order: u32, index: usize, count: u64) -> bool {
    fn put<const N: usize>(block: &mut [u8], index: usize, bytes: Option<[u8; N]>) -> bool {
        match (block.as_chunks_mut().0.get_mut(index), bytes) {
            (Some(slot), Some(bytes)) => {
                *slot = bytes;
                true
            }
            _ => false,
        }
    }
    match order {
        0..=2 => {
            let per_byte = 8usize >> order;
            let width = 1u32 << order;
            let mask = (1u8 << width) - 1;
            let Some(byte) = block.get_mut(index / per_byte) else { return false };
            let (Ok(count), Ok(slot)) = (u8::try_from(count), u32::try_from(index % per_byte))
            else {
                return false;
            };
            if count > mask {
                return false;
            }
            let shift = slot * width;
            *byte = *byte & !(mask << shift) | count << shift;
            true
        }
        3 => put(block, index, u8::try_from(count).ok().map(|c| [c])),
        4 => put(block, index, u16::try_from(count).ok().map(u16::to_be_bytes)),
        5 => put(block, index, u32::try_from(count).ok().map(u32::to_be_bytes)),
        6 => put(block, index, Some(count.to_be_bytes())),
        _ => false,
    }
}

/// The big-endian entry number `index` of a table; `None` past its end.
#[inline]
pub(crate) fn read_u64(table: &[u8], index: usize) -> Option<u64> {
    table.as_chunks().0.get(index).map(|bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
#[path = "tests/entry.rs"]
mod tests;
