//! The directory of persistent dirty bitmaps, and the tables of their clusters: parsed, checked and
//! encoded.
//!
//! ```text
//! directory   one entry a bitmap: where its table lies, flags, granularity, name; padded to 8 bytes
//! table       one word a cluster of bits: where the cluster lies, or that all its bits are equal
//! ```
//!
//! Extra data, whose meaning is not known here, is kept. Bytes only, no I/O.

use bds_core::bitmap::StreamState;
use bds_core::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::entry::OFFSET_MASK;
use super::extension::{MAX_BITMAP_DIRECTORY_LEN, MAX_BITMAPS, be32, be64};
use super::space::MetaOffset;
use super::units::Geometry;

/// Bytes of an entry before its extra data.
const FIXED_LEN: usize = 24;
/// Byte offset of an entry's flags in it.
const FLAGS_AT: u64 = 12;
/// The bits may be wrong: a writer had the bitmap and has not stored it.
pub(crate) const IN_USE: u32 = 1;
/// The bitmap records every write.
pub(crate) const AUTO: u32 = 2;
/// The bitmap may be used by readers that do not know its extra data.
const EXTRA_COMPATIBLE: u32 = 4;
/// Most entries of a bitmap's table.
const MAX_TABLE_ENTRIES: u64 = 0x800_0000;
/// Most bytes of a bitmap, rounded up to clusters.
const MAX_BITMAP_LEN: u64 = 512 << 20;
/// Longest name in bytes.
pub(crate) const MAX_NAME_LEN: usize = 1023;
/// log2 of the smallest and of the largest granularity.
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The only type of bitmap: dirty tracking.
const DIRTY_TRACKING: u8 = 1;
/// Reserved bits of a table entry: bits 56 to 63 and 1 to 8.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Table entry of a cluster whose bits are all one.
const ALL_ONES: u64 = 1;

/// One bitmap, without its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BitmapEntry {
    /// Where its table begins: at a cluster.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_size: u32,
    pub flags: u32,
    pub granularity_bits: u8,
    pub extra: Vec<u8>,
    pub name: Vec<u8>,
}

/// Takes a directory apart; it must hold exactly `count` entries.
pub(crate) fn parse_directory(
    bytes: &[u8],
    count: u32,
    geometry: &Geometry,
    disk_size: u64,
) -> Result<Vec<BitmapEntry>> {
    let mut rest = bytes;
    let mut entries: Vec<BitmapEntry> = Vec::new();
    for _ in 0..count {
        let (entry, used) = parse_entry(rest)
            .ok_or_else(|| invalid("an entry of the bitmap directory is cut off"))?;
        entry.check(geometry, disk_size)?;
        rest = &rest[used..];
        entries.push(entry);
    }
    if !rest.is_empty() {
        return Err(invalid("the bitmap directory is longer than its entries")
            .field("bitmap_directory_size", bytes.len()));
    }
    let mut names: Vec<&[u8]> = entries.iter().map(|entry| &entry.name[..]).collect();
    names.sort_unstable();
    if let Some(two) = names.windows(2).find(|two| two[0] == two[1]) {
        return Err(invalid("two bitmaps have one name").field("bitmap", two[0].escape_ascii()));
    }
    Ok(entries)
}

/// The bytes of a directory.
///
/// # Errors
/// `LimitExceeded`: too many bitmaps, or too long names.
pub(crate) fn encode_directory(entries: &[BitmapEntry]) -> Result<Vec<u8>> {
    check_count(entries.len())?;
    check_directory_len(directory_len(entries))?;
    let mut out = Vec::new();
    for entry in entries {
        out.extend(entry.table_offset.to_be_bytes());
        out.extend(entry.table_size.to_be_bytes());
        out.extend(entry.flags.to_be_bytes());
        out.extend([DIRTY_TRACKING, entry.granularity_bits]);
        out.extend(u16::try_from(entry.name.len()).expect("at most 1023").to_be_bytes());
        out.extend(u32::try_from(entry.extra.len()).expect("it was in a directory").to_be_bytes());
        out.extend(&entry.extra);
        out.extend(&entry.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    Ok(out)
}

/// Bytes of a directory of these entries.
pub(crate) fn directory_len(entries: &[BitmapEntry]) -> u64 {
    entries.iter().map(BitmapEntry::encoded_len).sum()
}

/// Bytes that an entry without extra data takes in a directory.
pub(crate) fn entry_len(name_len: usize) -> u64 {
    (FIXED_LEN + name_len).next_multiple_of(8) as u64
}

/// Refuses more bitmaps than an image can hold.
pub(crate) fn check_count(count: usize) -> Result<()> {
    match u32::try_from(count) {
        Ok(count) if count <= MAX_BITMAPS => Ok(()),
        _ => Err(limit("Maximum number of persistent bitmaps is already reached")),
    }
}

/// Refuses a longer directory than an image can hold.
pub(crate) fn check_directory_len(len: u64) -> Result<()> {
    match len > MAX_BITMAP_DIRECTORY_LEN {
        true => Err(limit("Not enough space in the bitmap directory")),
        false => Ok(()),
    }
}

/// Entries of the table of a bitmap for a disk of `disk_size` bytes.
///
/// # Errors
/// `InvalidInput`: the granularity cannot be stored. `LimitExceeded`: the bitmap is too large.
pub(crate) fn table_size(geometry: &Geometry, disk_size: u64, granularity: u32) -> Result<u32> {
    let bits = u8::try_from(granularity.trailing_zeros()).expect("at most 32");
    if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
        let words = "a stored bitmap's granularity is a power of two from 512 to 2147483648 bytes";
        return Err(Error::new(ErrorKind::InvalidInput, words).field("granularity", granularity));
    }
    let len = disk_size.div_ceil(u64::from(granularity)).div_ceil(8);
    // An empty table would not be accepted.
    let clusters = geometry.clusters(len).max(1);
    let is_storable = len <= MAX_BITMAP_LEN
        && clusters <= MAX_TABLE_ENTRIES
        && clusters << geometry.cluster_bits() <= MAX_BITMAP_LEN;
    if !is_storable {
        let words = "Too much space will be occupied by the bitmap. Use larger granularity";
        return Err(limit(words).field("granularity", granularity));
    }
    Ok(u32::try_from(clusters).expect("at most 2^27"))
}

fn parse_entry(bytes: &[u8]) -> Option<(BitmapEntry, usize)> {
    let fixed = bytes.get(..FIXED_LEN)?;
    let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
    let extra_len = usize::try_from(be32(fixed, 20)).ok()?;
    let name_at = FIXED_LEN.checked_add(extra_len)?;
    let name_end = name_at.checked_add(name_len)?;
    let used = name_end.checked_next_multiple_of(8).filter(|u| *u <= bytes.len())?;
    let entry = BitmapEntry {
        table_offset: be64(fixed, 0),
        table_size: be32(fixed, 8),
        flags: be32(fixed, 12),
        granularity_bits: if fixed[16] == DIRTY_TRACKING { fixed[17] } else { 0 },
        extra: bytes[FIXED_LEN..name_at].to_vec(),
        name: bytes[name_at..name_end].to_vec(),
    };
    Some((entry, used))
}

impl BitmapEntry {
    fn check(&self, geometry: &Geometry, disk_size: u64) -> Result<()> {
        let bytes = u64::from(self.table_size) << geometry.cluster_bits();
        let problem = if self.name.is_empty() || self.name.len() > MAX_NAME_LEN {
            "its name must have 1 to 1023 bytes"
        } else if self.table_size == 0 || u64::from(self.table_size) > MAX_TABLE_ENTRIES {
            "its table is empty or too large"
        } else if self.table_offset == 0 || !geometry.is_cluster_aligned(self.table_offset) {
            "its table does not begin at a cluster"
        } else if self.table_offset > i64::MAX as u64 - (1 << 31) {
            "its table lies beyond any file"
        } else if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            "its type or granularity is unknown"
        } else if self.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            "it has unknown flags"
        } else if bytes > MAX_BITMAP_LEN {
            "it is larger than 512 MiB"
        } else if !self.is_in_use()
            && u128::from(disk_size) > u128::from(bytes * 8) << self.granularity_bits
        {
            "it is shorter than the disk"
        } else {
            return Ok(());
        };
        Err(invalid(format!("a bitmap is damaged: {problem}"))
            .field("bitmap", self.name.escape_ascii()))
    }

    fn encoded_len(&self) -> u64 {
        entry_len(self.extra.len() + self.name.len())
    }

    /// Was it not stored by its last writer?
    pub(crate) fn is_in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Does it record every write?
    pub(crate) fn is_auto(&self) -> bool {
        self.flags & AUTO != 0
    }

    /// May its bits be used, as far as the directory says?
    pub(crate) fn is_usable(&self) -> bool {
        !self.is_in_use() && (self.extra.is_empty() || self.flags & EXTRA_COMPATIBLE != 0)
    }

    pub(crate) fn granularity(&self) -> u32 {
        1 << self.granularity_bits
    }

    /// Bytes of its table.
    pub(crate) fn table_len(&self) -> u64 {
        u64::from(self.table_size) * 8
    }

    /// As QEMU shows it in `info`.
    pub(crate) fn to_json(&self) -> Value {
        let names = [(IN_USE, "in-use"), (AUTO, "auto")];
        let flags: Vec<&str> =
            names.iter().filter(|(bit, _)| self.flags & bit != 0).map(|(_, name)| *name).collect();
        json!({
            "flags": flags,
            "name": String::from_utf8_lossy(&self.name),
            "granularity": 1u64 << self.granularity_bits,
        })
    }
}

/// Where the flags of each entry lie in a directory, in order.
pub(crate) fn flags_at(entries: &[BitmapEntry]) -> impl Iterator<Item = u64> + '_ {
    entries.iter().scan(0, |at, entry| {
        let flags_at = *at + FLAGS_AT;
        *at += entry.encoded_len();
        Some(flags_at)
    })
}

/// What a bitmap's table says about one cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitsPlace {
    /// All bits are zero; nothing is stored.
    Zeros,
    /// All bits are one; nothing is stored.
    Ones,
    /// They lie in this cluster.
    Cluster(MetaOffset),
}

impl BitsPlace {
    /// Reads an entry of a table.
    pub(crate) fn parse(entry: u64, geometry: &Geometry) -> Result<Self> {
        let offset = entry & OFFSET_MASK;
        let is_bad = entry & TABLE_RESERVED != 0
            || offset != 0 && entry & ALL_ONES != 0
            || !geometry.is_cluster_aligned(offset);
        if is_bad {
            return Err(invalid("an entry of a bitmap's table is damaged")
                .field("entry", format!("{entry:#x}")));
        }
        Ok(match (offset, entry & ALL_ONES) {
            (0, 0) => Self::Zeros,
            (0, _) => Self::Ones,
            (offset, _) => Self::Cluster(MetaOffset(offset)),
        })
    }

    /// The form of bits that need no cluster. `None`: they need one.
    pub(crate) fn without_cluster(state: StreamState) -> Option<Self> {
        match state {
            StreamState::Clean => Some(Self::Zeros),
            StreamState::Dirty => Some(Self::Ones),
            StreamState::Mixed => None,
        }
    }

    /// The entry in a table.
    pub(crate) fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => ALL_ONES,
            Self::Cluster(at) => at.0,
        }
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

fn limit(message: &str) -> Error {
    Error::new(ErrorKind::LimitExceeded, message)
}

#[cfg(test)]
#[path = "tests/bitmap_directory.rs"]
mod tests;
