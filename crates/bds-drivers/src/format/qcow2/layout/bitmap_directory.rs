//! The directory of persistent dirty bitmaps, and entries of a bitmap's table: parsed and checked.

use bds_core::error::{Error, ErrorKind, Result};
use serde_json::{Value, json};

use super::entry::OFFSET_MASK;
use super::extension::{be32, be64};
use super::units::Geometry;

/// Bytes of an entry before its extra data.
const FIXED_LEN: usize = 24;
pub(crate) const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const EXTRA_COMPATIBLE: u32 = 4;
/// Most entries of a bitmap's table.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// Most bytes of a bitmap.
const MAX_BITMAP_LEN: u64 = 512 << 20;
/// Reserved bits of a table entry: bits 56 to 63 and 1 to 8.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// One bitmap, without its bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BitmapEntry {
    /// Where the entry begins in the directory.
    pub at: u64,
    pub table_offset: u64,
    /// Entries of its table.
    pub table_size: u32,
    pub flags: u32,
    pub granularity_bits: u8,
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
        let at = (bytes.len() - rest.len()) as u64;
        let (entry, used) = parse_entry(rest, at)
            .ok_or_else(|| invalid("an entry of the bitmap directory is cut off"))?;
        entry.check(geometry, disk_size)?;
        if be32(rest, 20) != 0 {
            return Err(invalid("a bitmap has extra data, whose meaning is not known")
                .field("bitmap", entry.name.escape_ascii()));
        }
        if entries.iter().any(|e| e.name == entry.name) {
            return Err(
                invalid("two bitmaps have one name").field("bitmap", entry.name.escape_ascii())
            );
        }
        rest = &rest[used..];
        entries.push(entry);
    }
    if !rest.is_empty() {
        return Err(invalid("the bitmap directory is longer than its entries")
            .field("bitmap_directory_size", bytes.len()));
    }
    Ok(entries)
}

fn parse_entry(bytes: &[u8], at: u64) -> Option<(BitmapEntry, usize)> {
    let fixed = bytes.get(..FIXED_LEN)?;
    let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
    let extra_len = usize::try_from(be32(fixed, 20)).ok()?;
    let name_at = FIXED_LEN.checked_add(extra_len)?;
    let name_end = name_at.checked_add(name_len)?;
    let used = name_end.checked_next_multiple_of(8).filter(|u| *u <= bytes.len())?;
    let entry = BitmapEntry {
        at,
        table_offset: be64(fixed, 0),
        table_size: be32(fixed, 8),
        flags: be32(fixed, 12),
        granularity_bits: if fixed[16] == 1 { fixed[17] } else { 0 },
        name: bytes[name_at..name_end].to_vec(),
    };
    Some((entry, used))
}

impl BitmapEntry {
    fn check(&self, geometry: &Geometry, disk_size: u64) -> Result<()> {
        let bytes = u64::from(self.table_size) << geometry.cluster_bits();
        let problem = if self.name.is_empty() || self.name.len() > 1023 {
            "its name must have 1 to 1023 bytes"
        } else if self.table_size == 0 || self.table_size > MAX_TABLE_ENTRIES {
            "its table is empty or too large"
        } else if self.table_offset == 0 || !geometry.is_cluster_aligned(self.table_offset) {
            "its table does not begin at a cluster"
        } else if self.table_offset > i64::MAX as u64 - (1 << 31) {
            "its table lies beyond any file"
        } else if !(9..=31).contains(&self.granularity_bits) {
            "its type or granularity is unknown"
        } else if self.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            "it has unknown flags"
        } else if bytes > MAX_BITMAP_LEN {
            "it is larger than 512 MiB"
        } else if self.flags & IN_USE == 0
            && u128::from(disk_size) > u128::from(bytes * 8) << self.granularity_bits
        {
            "it is shorter than the disk"
        } else {
            return Ok(());
        };
        Err(invalid(format!("a bitmap is damaged: {problem}"))
            .field("bitmap", self.name.escape_ascii()))
    }

    /// Would it be wrong after a write, or, if the disk `grows`, too short?
    pub(crate) fn goes_stale(&self, grows: bool) -> bool {
        self.flags & IN_USE == 0 && (grows || self.flags & AUTO != 0)
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

/// An entry of a bitmap's table: the cluster of bits, `None` if all are equal.
pub(crate) fn table_entry(entry: u64, geometry: &Geometry) -> Result<Option<u64>> {
    let offset = entry & OFFSET_MASK;
    let is_bad = entry & TABLE_RESERVED != 0
        || offset != 0 && entry & 1 != 0
        || !geometry.is_cluster_aligned(offset);
    if is_bad {
        return Err(invalid("an entry of a bitmap's table is damaged")
            .field("entry", format!("{entry:#x}")));
    }
    Ok((offset != 0).then_some(offset))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}
