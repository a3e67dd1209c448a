//! Parses and encodes header extensions: the bytes between the header and the backing file's name.
//!
//! Each is `type u32, length u32, data, padding to 8`; type 0 ends the list, and so does the end of
//! the area. QEMU lets a later extension of one type win and cuts names at a NUL byte, so that two
//! readers can see two different files: duplicates of a known type and NUL bytes in names are
//! refused here. Unknown types are kept and written back in their order. Bytes only: names are
//! opaque, no offset is followed.

use bds_core::error::{Error, ErrorKind, Result};

use super::units::Geometry;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAMES: u32 = 0x6803_f857;
const CRYPTO: u32 = 0x0537_be77;
const BITMAPS: u32 = 0x2385_2875;
/// Ours ("bdsl").
const BITMAP_LOG: u32 = 0x6264_736c;
/// Says nothing: covers unused bytes for the time of a rewrite (`rewrite.rs`).
pub(super) const PADDING: u32 = 0x6264_735f;

/// Bytes of type and length.
const HEAD_LEN: usize = 8;
/// Longest backing format.
pub(crate) const MAX_BACKING_FORMAT_LEN: usize = 15;
/// Longest data file name; QEMU has no limit but the cluster.
pub(crate) const MAX_DATA_FILE_LEN: usize = 4095;
/// Most persistent bitmaps.
pub(crate) const MAX_BITMAPS: u32 = 65_535;
/// Largest bitmap directory in bytes.
pub(crate) const MAX_BITMAP_DIRECTORY_LEN: u64 = 65_535 * 1024;

/// Bytes of a feature name entry: type, bit, name padded with NUL.
const FEATURE_ENTRY_LEN: usize = 48;

/// The names of the features that exist, as QEMU writes them: (type, bit, name).
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Where the LUKS header lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CryptoPointer {
    pub offset: u64,
    pub len: u64,
}

/// Where the bitmap directory lies. Means nothing unless the header's bitmaps bit is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapsPointer {
    pub count: u32,
    pub reserved: u32,
    pub directory_len: u64,
    pub directory_offset: u64,
}

impl BitmapsPointer {
    /// Refuses a directory no reader could use. Call only if the header's bitmaps bit is set.
    pub(crate) fn validate(&self, geometry: &Geometry) -> Result<()> {
        if self.reserved != 0 {
            return Err(invalid("reserved field of the bitmaps extension is not zero")
                .field("bitmaps reserved", self.reserved));
        }
        if self.count == 0 || self.count > MAX_BITMAPS {
            return Err(invalid("the bitmaps extension must count 1 to 65535 bitmaps")
                .field("nb_bitmaps", self.count));
        }
        if self.directory_len == 0 || self.directory_len > MAX_BITMAP_DIRECTORY_LEN {
            return Err(invalid("the bitmap directory must have 1 byte to 65535 KiB")
                .field("bitmap_directory_size", self.directory_len));
        }
        if self.directory_offset == 0 || !geometry.is_cluster_aligned(self.directory_offset) {
            return Err(invalid("the bitmap directory does not begin at a cluster")
                .field("bitmap_directory_offset", self.directory_offset));
        }
        if self.directory_offset.checked_add(self.directory_len).is_none_or(|e| e > i64::MAX as u64)
        {
            return Err(invalid("the bitmap directory lies beyond any file")
                .field("bitmap_directory_offset", self.directory_offset));
        }
        Ok(())
    }
}

impl BitmapsPointer {
    /// The data of the extension.
    pub(crate) fn encode(&self) -> [u8; 24] {
        let mut data = [0; 24];
        data[..4].copy_from_slice(&self.count.to_be_bytes());
        data[4..8].copy_from_slice(&self.reserved.to_be_bytes());
        data[8..16].copy_from_slice(&self.directory_len.to_be_bytes());
        data[16..].copy_from_slice(&self.directory_offset.to_be_bytes());
        data
    }

    /// Where the extension's data lies in cluster 0, whose list of extensions begins at `start`.
    pub(crate) fn find(bytes: &[u8], start: usize) -> Option<usize> {
        find(bytes, start, |kind, _| kind == BITMAPS)
    }
}

/// Names the write-intent log of the bitmaps. Means nothing unless the header's bit for it is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BitmapLogId(pub [u8; 16]);

impl BitmapLogId {
    /// As [`BitmapsPointer::find`].
    pub(crate) fn find(bytes: &[u8], start: usize) -> Option<usize> {
        find(bytes, start, |kind, len| kind == BITMAP_LOG && len == 16)
    }
}

/// Where the data of the extension lies whose type and length are wanted.
fn find(bytes: &[u8], start: usize, is_wanted: impl Fn(u32, u32) -> bool) -> Option<usize> {
    let mut at = start;
    loop {
        let data_at = at.checked_add(HEAD_LEN)?;
        let head = bytes.get(at..data_at)?;
        let (kind, len) = (be32(head, 0), be32(head, 4));
        match kind {
            END => return None,
            kind if is_wanted(kind, len) => return Some(data_at),
            _ => at = data_at.checked_add(usize::try_from(len).ok()?)?,
        }
        at = at.checked_next_multiple_of(8)?;
    }
}

/// An extension of an unknown type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnknownExtension {
    pub kind: u32,
    pub data: Vec<u8>,
}

/// All extensions of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    /// Format of the backing file.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    pub crypto: Option<CryptoPointer>,
    /// The feature name table as stored.
    pub feature_names: Option<Vec<u8>>,
    pub bitmaps: Option<BitmapsPointer>,
    pub bitmap_log: Option<BitmapLogId>,
    /// In the order they were found.
    pub unknown: Vec<UnknownExtension>,
}

/// What a look at the extension area gave.
#[derive(Debug)]
pub(crate) enum Scan {
    /// All extensions were seen.
    Complete(Extensions),
    /// More bytes are needed: this many in all.
    NeedMore(usize),
}

impl Extensions {
    /// Reads the extensions in `bytes[start..end]`. `bytes` may be shorter than `end` when not all
    /// of the cluster has been read yet.
    pub(crate) fn parse(bytes: &[u8], start: usize, end: usize) -> Result<Scan> {
        let mut found = Self::default();
        let mut at = start;
        while end.saturating_sub(at) >= HEAD_LEN {
            let data_at = at + HEAD_LEN;
            let Some(head) = bytes.get(at..data_at) else { return Ok(Scan::NeedMore(data_at)) };
            let kind = be32(head, 0);
            let len = be32(head, 4);
            if kind == END && len == 0 {
                break;
            }
            if kind == END {
                // Readers that skip by lengths would go on behind it, and see extensions that other
                // readers do not.
                return Err(invalid("the end mark of the header extensions has a length")
                    .field("extension length", len)
                    .at(offset(at)));
            }
            let data_end = usize::try_from(len)
                .ok()
                .and_then(|l| data_at.checked_add(l))
                .filter(|e| *e <= end);
            let Some(data_end) = data_end else {
                return Err(invalid(format!(
                    "header extension {kind:#010x} is longer than the area that holds it"
                ))
                .field("extension length", len)
                .at(offset(at)));
            };
            let Some(data) = bytes.get(data_at..data_end) else {
                return Ok(Scan::NeedMore(data_end));
            };
            found.take(kind, data).map_err(|e| e.at(offset(at)))?;
            at = data_end.next_multiple_of(8);
        }
        Ok(Scan::Complete(found))
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        match kind {
            BACKING_FORMAT => {
                let name = text("backing format", data, MAX_BACKING_FORMAT_LEN)?;
                once("backing format", &mut self.backing_format, name)
            }
            DATA_FILE => {
                let name = text("data file", data, MAX_DATA_FILE_LEN)?;
                once("data file", &mut self.data_file, name)
            }
            FEATURE_NAMES => once("feature name table", &mut self.feature_names, data.to_vec()),
            CRYPTO => {
                exactly("encryption header", data, 16)?;
                let pointer = CryptoPointer { offset: be64(data, 0), len: be64(data, 8) };
                once("encryption header", &mut self.crypto, pointer)
            }
            BITMAPS => {
                exactly("bitmaps", data, 24)?;
                let pointer = BitmapsPointer {
                    count: be32(data, 0),
                    reserved: be32(data, 4),
                    directory_len: be64(data, 8),
                    directory_offset: be64(data, 16),
                };
                once("bitmaps", &mut self.bitmaps, pointer)
            }
            // Of another length it is another program's.
            BITMAP_LOG if data.len() == 16 => {
                let id = BitmapLogId(data.try_into().expect("16 bytes"));
                once("bitmap log", &mut self.bitmap_log, id)
            }
            _ => {
                self.unknown.push(UnknownExtension { kind, data: data.to_vec() });
                Ok(())
            }
        }
    }

    /// Appends all extensions and the end mark, in QEMU's order: known ones first, then unknown
    /// ones as found.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        self.encode_ordered(out, false);
    }

    /// As [`Extensions::encode`], the backing format first or last: readers take it anywhere.
    pub(super) fn encode_ordered(&self, out: &mut Vec<u8>, format_last: bool) {
        let format = self.backing_format.as_ref();
        if let Some(name) = format.filter(|_| !format_last) {
            put(out, BACKING_FORMAT, name);
        }
        if let Some(name) = &self.data_file {
            put(out, DATA_FILE, name);
        }
        if let Some(CryptoPointer { offset, len }) = self.crypto {
            put(out, CRYPTO, &[offset.to_be_bytes(), len.to_be_bytes()].concat());
        }
        if let Some(table) = &self.feature_names {
            put(out, FEATURE_NAMES, table);
        }
        if let Some(pointer) = self.bitmaps {
            put(out, BITMAPS, &pointer.encode());
        }
        if let Some(BitmapLogId(id)) = &self.bitmap_log {
            put(out, BITMAP_LOG, id);
        }
        for UnknownExtension { kind, data } in &self.unknown {
            put(out, *kind, data);
        }
        if let Some(name) = format.filter(|_| format_last) {
            put(out, BACKING_FORMAT, name);
        }
        put(out, END, &[]);
    }

    /// The table of feature names that new images get.
    pub(crate) fn known_feature_names() -> Vec<u8> {
        let mut table = Vec::with_capacity(FEATURES.len() * FEATURE_ENTRY_LEN);
        for (kind, bit, name) in FEATURES {
            let end = table.len() + FEATURE_ENTRY_LEN;
            table.extend([kind, bit]);
            table.extend(name.as_bytes());
            table.resize(end, 0);
        }
        table
    }

    /// What the image itself calls incompatible feature `bit`, for a message.
    pub(crate) fn incompatible_name(&self, bit: u32) -> Option<String> {
        let table = self.feature_names.as_deref()?;
        table.chunks_exact(FEATURE_ENTRY_LEN).find_map(|entry| match entry {
            [0, b, name @ ..] if u32::from(*b) == bit => {
                let name = name.split(|c| *c == 0).next()?;
                Some(String::from_utf8_lossy(name).escape_debug().collect())
            }
            _ => None,
        })
    }
}

/// Type and length of an extension that covers the next `len` bytes and says nothing.
pub(super) fn padding(len: usize) -> [u8; HEAD_LEN] {
    let len = u32::try_from(len).expect("an extension fits a cluster");
    let mut head = [0; HEAD_LEN];
    head[..4].copy_from_slice(&PADDING.to_be_bytes());
    head[4..].copy_from_slice(&len.to_be_bytes());
    head
}

/// Where the list of extensions that begins at `start` ends, its end mark included. The list was
/// parsed before.
pub(super) fn end_of_list(bytes: &[u8], start: usize, area_end: usize) -> usize {
    let mut at = start;
    while area_end.saturating_sub(at) >= HEAD_LEN {
        let (kind, len) = (be32(bytes, at), be32(bytes, at + 4));
        at += HEAD_LEN;
        if kind == END {
            break;
        }
        at = at.saturating_add(len as usize).next_multiple_of(8);
    }
    at.min(area_end)
}

fn put(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    let len = u32::try_from(data.len()).expect("an extension fits a cluster");
    out.extend(kind.to_be_bytes());
    out.extend(len.to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn once<T>(what: &str, slot: &mut Option<T>, value: T) -> Result<()> {
    if slot.is_some() {
        return Err(invalid(format!(
            "the {what} extension occurs twice: which one counts would depend on the reader"
        )));
    }
    *slot = Some(value);
    Ok(())
}

fn text(what: &str, data: &[u8], max_len: usize) -> Result<Vec<u8>> {
    if data.len() > max_len {
        return Err(invalid(format!("the {what} extension is longer than {max_len} bytes"))
            .field("extension length", data.len()));
    }
    if data.contains(&0) {
        return Err(invalid(format!("the {what} extension holds a NUL byte"))
            .field("extension data", data.escape_ascii()));
    }
    Ok(data.to_vec())
}

fn exactly(what: &str, data: &[u8], len: usize) -> Result<()> {
    if data.len() != len {
        return Err(invalid(format!("the {what} extension must have {len} bytes"))
            .field("extension length", data.len()));
    }
    Ok(())
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

fn offset(at: usize) -> u64 {
    u64::try_from(at).unwrap_or(u64::MAX)
}

/// The big-endian number at `at`; the caller has checked the length.
pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_be_bytes(*b))
}

/// The big-endian number at `at`; the caller has checked the length.
pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_be_bytes(*b))
}

#[cfg(test)]
#[path = "tests/extension.rs"]
mod tests;
