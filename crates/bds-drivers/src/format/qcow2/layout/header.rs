//! The header of an image: its fields as typed values, parsed, checked against limits, and encoded.
//!
//! Nothing is allocated or followed before a field is checked; what is accepted here may be used as
//! it stands. Bytes of the header that are not known are kept and written back. What else lies in
//! cluster 0, and rules that join it to the header: `cluster0.rs`.

use bds_core::error::{Error, ErrorKind, Result};

use super::entry::EntryRules;
use super::extension::{be32, be64};
use super::units::{Geometry, HOST_OFFSET_END};

/// "QFI" and 0xfb.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header bytes of version 2, and the least a version 3 header may have.
pub(super) const V2_LEN: usize = 72;
const V3_MIN_LEN: usize = 104;
/// Header bytes we write: up to and with the compression type and its padding.
const V3_LEN: u32 = 112;

/// Largest L1 table in bytes.
pub(crate) const MAX_L1_LEN: u64 = 32 << 20;
/// Largest refcount table in bytes, on every path.
pub(crate) const MAX_REFTABLE_LEN: u64 = 8 << 20;
/// Most internal snapshots.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest backing file name.
pub(crate) const MAX_BACKING_NAME_LEN: u32 = 1023;
/// Largest disk: the largest length QEMU's block layer works with.
pub(crate) const MAX_DISK_SIZE: u64 = (1 << 63) - (1 << 30);

/// Byte offset of `size`, for updating it alone.
pub(crate) const SIZE_AT: u64 = 24;
/// Byte offset of `l1_size` and `l1_table_offset`, which change together.
pub(crate) const L1_AT: u64 = 36;
/// Byte offset of `refcount_table_offset` and `refcount_table_clusters`, which change together.
pub(crate) const REFTABLE_AT: u64 = 48;
/// Byte offset of `incompatible_features`.
pub(crate) const INCOMPATIBLE_AT: u64 = 72;
/// Byte offset of `autoclear_features`.
pub(crate) const AUTOCLEAR_AT: u64 = 88;

bitflags::bitflags! {
    /// Features that a reader must know to use the image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Incompatible: u64 {
        /// Counts may be wrong.
        const DIRTY = 1;
        /// Something is broken: do not write.
        const CORRUPT = 2;
        /// Guest data is in a file of its own.
        const DATA_FILE = 4;
        /// The compression type is not deflate.
        const COMPRESSION = 8;
        /// L2 entries have subcluster bitmaps.
        const EXTENDED_L2 = 16;
        /// Not a feature: keeps unknown bits.
        const _ = !0;
    }

    /// Features that a reader may ignore.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Compatible: u64 {
        /// Counts may be updated lazily.
        const LAZY_REFCOUNTS = 1;
        /// Not a feature: keeps unknown bits.
        const _ = !0;
    }

    /// Features whose bits a writer must clear if it does not maintain them.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Autoclear: u64 {
        /// The bitmaps extension is in step with the data.
        const BITMAPS = 1;
        /// Ours: the extension of `manage/base_mark.rs` is in step with the backing file. Far from
        /// the bits that the specification may give out next. A writer keeps it above that file.
        const BASE_MARK = 1 << 61;
        /// The data file reads like the disk, byte for byte.
        const RAW_DATA_FILE = 2;
        /// Not a feature: keeps unknown bits.
        const _ = !0;
    }
}

impl Incompatible {
    pub(super) const KNOWN: Self = Self::from_bits_retain(31);
}

impl Autoclear {
    /// The bits a writer keeps: the raw data file is maintained, unknown bits are cleared. Bitmaps
    /// are handled apart.
    pub(crate) fn kept_by_writer(self) -> Self {
        self & (Self::RAW_DATA_FILE | Self::BITMAPS)
    }
}

/// How the payload is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CryptMethod {
    None,
    Aes,
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Raw deflate (qemu-img calls it zlib).
    #[default]
    Deflate,
    /// zstd frames.
    Zstd,
}

impl Compression {
    /// QEMU's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// From QEMU's name.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Deflate, Self::Zstd].into_iter().find(|c| c.name() == word)
    }
}

/// The header's numbers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    pub geometry: Geometry,
    /// Length of the disk in bytes; see `cluster0.rs` for lengths that are no multiple of 512.
    pub size: u64,
    pub crypt: CryptMethod,
    /// Entries of the L1 table.
    pub l1_size: u32,
    pub l1_offset: u64,
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub snapshot_count: u32,
    pub snapshots_offset: u64,
    pub incompatible: Incompatible,
    pub compatible: Compatible,
    pub autoclear: Autoclear,
    pub compression: Compression,
    /// Bytes from 105 to the header's length, or those after byte 104 we have no name for; kept as
    /// they are.
    pub tail: Vec<u8>,
    /// Bytes of the header as stored: 72 for version 2.
    pub header_len: u32,
}

impl Header {
    /// A header of version 2 or 3 as we write it, with no tables and no features yet.
    pub(crate) fn new(version: u32, geometry: Geometry) -> Self {
        let header_len = if version == 2 { 72 } else { V3_LEN };
        Self {
            version,
            geometry,
            size: 0,
            crypt: CryptMethod::None,
            l1_size: 0,
            l1_offset: 0,
            reftable_offset: 0,
            reftable_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            compression: Compression::Deflate,
            tail: if version == 2 { Vec::new() } else { vec![0; 7] },
            header_len,
        }
    }

    /// What is wrong with the place of the snapshot table, also of an empty one.
    pub(crate) fn snapshots_problem(&self) -> Option<&'static str> {
        let place = self.snapshots_offset;
        if !self.geometry.is_cluster_aligned(place) || place >= HOST_OFFSET_END {
            Some("the snapshot table does not begin at a cluster of any file")
        } else if self.snapshot_count > 0 && place == 0 {
            Some("the snapshot table overlaps the header")
        } else {
            None
        }
    }

    /// The rules by which this image's L2 entries are read.
    pub(crate) fn entry_rules(&self) -> EntryRules {
        EntryRules {
            geometry: self.geometry,
            has_zero_flag: self.version >= 3,
            has_data_file: self.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    pub(crate) fn l1_len(&self) -> u64 {
        u64::from(self.l1_size) * 8
    }

    /// Length of the refcount table in bytes.
    pub(crate) fn reftable_len(&self) -> u64 {
        u64::from(self.reftable_clusters) << self.geometry.cluster_bits()
    }

    /// The 12 bytes that belong at [`L1_AT`].
    pub(crate) fn encode_l1(l1_size: u32, l1_offset: u64) -> [u8; 12] {
        let mut out = [0; 12];
        out[..4].copy_from_slice(&l1_size.to_be_bytes());
        out[4..].copy_from_slice(&l1_offset.to_be_bytes());
        out
    }

    /// The 12 bytes that belong at [`REFTABLE_AT`].
    pub(crate) fn encode_reftable(offset: u64, clusters: u32) -> [u8; 12] {
        let mut out = [0; 12];
        out[..8].copy_from_slice(&offset.to_be_bytes());
        out[8..].copy_from_slice(&clusters.to_be_bytes());
        out
    }

    /// `bytes` holds at least `header_len` bytes. Limits are checked once it is clear that all
    /// features are known.
    pub(super) fn parse(bytes: &[u8], header_len: u32) -> Result<Self> {
        let version = be32(bytes, 4);
        let cluster_bits = be32(bytes, 20);
        let is_v3 = version >= 3;
        let incompatible = Incompatible::from_bits_retain(if is_v3 { be64(bytes, 72) } else { 0 });
        let refcount_order = if is_v3 { be32(bytes, 96) } else { 4 };
        let is_extended = incompatible.contains(Incompatible::EXTENDED_L2);
        let has_unknown = !(incompatible & !Incompatible::KNOWN).is_empty();
        let geometry = geometry(cluster_bits, is_extended && !has_unknown, refcount_order)?;
        let crypt = match be32(bytes, 32) {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            other => {
                return Err(invalid("unknown encryption method")
                    .field("crypt_method", other)
                    .at(32));
            }
        };
        let compression_byte = if header_len > 104 { bytes.get(104).copied() } else { None };
        Ok(Self {
            version,
            geometry,
            size: be64(bytes, 24),
            crypt,
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            reftable_offset: be64(bytes, 48),
            reftable_clusters: be32(bytes, 56),
            snapshot_count: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible,
            compatible: Compatible::from_bits_retain(if is_v3 { be64(bytes, 80) } else { 0 }),
            autoclear: Autoclear::from_bits_retain(if is_v3 { be64(bytes, 88) } else { 0 }),
            compression: if has_unknown {
                Compression::Deflate // refused below, by the name of the unknown feature
            } else {
                compression(compression_byte.unwrap_or(0), incompatible)?
            },
            tail: bytes.get(105..usize::try_from(header_len).unwrap_or(0)).unwrap_or(&[]).to_vec(),
            header_len,
        })
    }

    pub(super) fn check_limits(&self) -> Result<()> {
        let g = &self.geometry;
        if self.size > MAX_DISK_SIZE {
            return Err(limit("the disk is larger than 2^63 - 2^30 bytes")
                .field("size", self.size)
                .at(SIZE_AT));
        }
        if self.l1_len() > MAX_L1_LEN {
            return Err(limit("the l1 table is larger than 32 MiB")
                .field("l1_size", self.l1_size)
                .at(L1_AT));
        }
        if u64::from(self.l1_size) < g.l1_entries(self.size) {
            return Err(invalid(format!(
                "the l1 table is too small: a disk of {} bytes needs {} entries",
                self.size,
                g.l1_entries(self.size)
            ))
            .field("l1_size", self.l1_size)
            .at(L1_AT));
        }
        check_place(g, "l1_table_offset", 40, self.l1_offset, self.l1_len())?;
        if self.reftable_len() > MAX_REFTABLE_LEN {
            return Err(limit("the refcount table is larger than 8 MiB")
                .field("refcount_table_clusters", self.reftable_clusters)
                .at(56));
        }
        let len = self.reftable_len();
        check_place(g, "refcount_table_offset", REFTABLE_AT, self.reftable_offset, len)
    }

    /// The header's own bytes, without place and length of a backing name.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; V3_MIN_LEN + 1];
        let g = &self.geometry;
        put(&mut out, 0, &MAGIC);
        put(&mut out, 4, &self.version.to_be_bytes());
        put(&mut out, 20, &g.cluster_bits().to_be_bytes());
        put(&mut out, 24, &self.size.to_be_bytes());
        let crypt = match self.crypt {
            CryptMethod::None => 0u32,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
        };
        put(&mut out, 32, &crypt.to_be_bytes());
        put(&mut out, 36, &Self::encode_l1(self.l1_size, self.l1_offset));
        put(&mut out, 48, &Self::encode_reftable(self.reftable_offset, self.reftable_clusters));
        put(&mut out, 60, &self.snapshot_count.to_be_bytes());
        put(&mut out, 64, &self.snapshots_offset.to_be_bytes());
        put(&mut out, 72, &self.incompatible.bits().to_be_bytes());
        put(&mut out, 80, &self.compatible.bits().to_be_bytes());
        put(&mut out, 88, &self.autoclear.bits().to_be_bytes());
        put(&mut out, 96, &g.refcount_order().to_be_bytes());
        put(&mut out, 100, &self.header_len.to_be_bytes());
        put(&mut out, 104, &[if self.compression == Compression::Zstd { 1 } else { 0 }]);
        out.extend(&self.tail);
        // Cuts what this version, or this length of header, does not have.
        out.resize(usize::try_from(self.header_len).expect("at most a cluster"), 0);
        out
    }
}

/// Length of the header in `bytes`, which hold at least a header of version 2.
pub(super) fn header_len(bytes: &[u8]) -> Result<u32> {
    let cluster_bits = be32(bytes, 20);
    match be32(bytes, 4) {
        2 => Ok(72),
        3 => {
            let cluster = geometry(cluster_bits, false, 4)?.cluster_size();
            let Some(raw) = bytes.get(100..104) else { return Ok(104) };
            let len = be32(raw, 0);
            if len < 104 || u64::from(len) > cluster || !len.is_multiple_of(8) {
                return Err(invalid(format!(
                    "the header's length must be a multiple of 8 from 104 to {cluster}"
                ))
                .field("header_length", len)
                .at(100));
            }
            Ok(len)
        }
        other => Err(Error::new(ErrorKind::NotSupported, "unsupported qcow2 version")
            .field("version", other)
            .at(4)),
    }
}

fn geometry(cluster_bits: u32, extended: bool, refcount_order: u32) -> Result<Geometry> {
    Geometry::new(cluster_bits, extended, refcount_order).ok_or_else(|| {
        if Geometry::new(cluster_bits, false, 4).is_none() {
            invalid("cluster size must be 2^9 to 2^21 bytes")
                .field("cluster_bits", cluster_bits)
                .at(20)
        } else if refcount_order > super::units::MAX_REFCOUNT_ORDER {
            invalid("refcounts must be 1 to 64 bits wide")
                .field("refcount_order", refcount_order)
                .at(96)
        } else {
            invalid("extended l2 entries need clusters of at least 16 KiB")
                .field("cluster_bits", cluster_bits)
                .at(20)
        }
    })
}

fn compression(byte: u8, incompatible: Incompatible) -> Result<Compression> {
    let kind = match byte {
        0 => Compression::Deflate,
        1 => Compression::Zstd,
        other => {
            return Err(Error::new(ErrorKind::NotSupported, "unknown compression type")
                .field("compression_type", other)
                .at(104));
        }
    };
    if incompatible.contains(Incompatible::COMPRESSION) != (byte != 0) {
        return Err(invalid(
            "the compression type and its incompatible feature bit contradict each other",
        )
        .field("compression_type", byte)
        .at(104));
    }
    Ok(kind)
}

/// A table begins at a cluster and ends below 2^63.
fn check_place(g: &Geometry, name: &'static str, at: u64, offset: u64, len: u64) -> Result<()> {
    if !g.is_cluster_aligned(offset) {
        return Err(invalid("a table does not begin at a cluster").field(name, offset).at(at));
    }
    if offset.checked_add(len).is_none_or(|end| end > i64::MAX as u64) {
        return Err(invalid("a table lies beyond any file").field(name, offset).at(at));
    }
    Ok(())
}

pub(super) fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

pub(super) fn limit(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::LimitExceeded, message)
}
