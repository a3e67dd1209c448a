//! Cluster 0: the header, its extensions and the backing file's name.
//!
//! Parsing checks every field against the format's rules and our limits before anything is allocated or followed; what is
//! accepted here may be used as it stands. Bytes of the header we do not know are kept and written back. No I/O.
//!
//! Sizes that are no multiple of 512 (finding F10: QEMU shows such a disk rounded down): a read-only open shows every
//! byte, a writable open is refused by [`Cluster0::check_writable`], because a writer must not choose between losing the tail and
//! inventing one.
//!
//! Invariant: cluster 0 is written as one write, and only if all of it fits.

use bds_core::error::{Error, ErrorKind, Result};

use super::extension::{Extensions, Scan, be32, be64};
use super::units::{Geometry, HOST_OFFSET_END};

/// "QFI" and 0xfb.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Header bytes of version 2, and the least a version 3 header may have.
const V2_LEN: usize = 72;
const V3_MIN_LEN: usize = 104;
/// Header bytes we write: up to and with the compression type and its padding.
const V3_LEN: u32 = 112;

/// Largest L1 table in bytes.
pub(crate) const MAX_L1_LEN: u64 = 32 << 20;
/// Largest refcount table in bytes, on every path (finding F9).
pub(crate) const MAX_REFTABLE_LEN: u64 = 8 << 20;
/// Most internal snapshots.
pub(crate) const MAX_SNAPSHOTS: u32 = 65_536;
/// Longest backing file name.
pub(crate) const MAX_BACKING_NAME_LEN: u32 = 1023;
/// Largest disk: the largest length QEMU's block layer works with.
pub(crate) const MAX_DISK_SIZE: u64 = (1 << 63) - (1 << 30);
const SECTOR_LEN: u64 = 512;

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
    /// A reader that does not know a bit must not touch the image.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Incompatible: u64 {
        /// Refcounts may be wrong.
        const DIRTY = 1;
        /// Something is broken: do not write.
        const CORRUPT = 2;
        /// Guest data is in a file of its own.
        const DATA_FILE = 4;
        /// The compression type is not deflate.
        const COMPRESSION = 8;
        /// L2 entries have subcluster bitmaps.
        const EXTENDED_L2 = 16;
        /// Not a feature: keeps bits we do not know.
        const _ = !0;
    }

    /// A reader may ignore these.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Compatible: u64 {
        /// Refcounts may be updated lazily.
        const LAZY_REFCOUNTS = 1;
        /// Not a feature: keeps bits we do not know.
        const _ = !0;
    }

    /// A writer must clear those it does not know.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) struct Autoclear: u64 {
        /// The bitmaps extension is in step with the data.
        const BITMAPS = 1;
        /// The data file reads like the disk, byte for byte.
        const RAW_DATA_FILE = 2;
        /// Not a feature: keeps bits we do not know.
        const _ = !0;
    }
}

impl Incompatible {
    const KNOWN: Self = Self::from_bits_retain(31);
}

impl Autoclear {
    /// What is left for a writer: the raw data file is maintained, unknown bits go. Bitmaps are a matter of their own.
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
    /// QEMU's word for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Deflate => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// From QEMU's word.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        [Self::Deflate, Self::Zstd].into_iter().find(|c| c.name() == word)
    }
}

/// How much of what is wrong is tolerated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// For use: everything must be right.
    Use,
    /// For `check` and `info`: fields that a check repairs (snapshots, refcount table) may be wrong.
    Inspect,
}

/// The header's numbers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    pub geometry: Geometry,
    /// Length of the disk in bytes; see the file's head for lengths that are no multiple of 512.
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
    /// Bytes from 105 to the header's length, or those after byte 104 we have no name for; kept as they are.
    pub tail: Vec<u8>,
    /// Bytes of the header as stored: 72 for version 2.
    pub header_len: u32,
}

/// Everything in cluster 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cluster0 {
    pub header: Header,
    pub extensions: Extensions,
    /// The backing file's name, as stored.
    pub backing_name: Option<Vec<u8>>,
}

/// What a look at the first bytes of a file gave.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// All of it.
    Complete(Box<Cluster0>),
    /// The bytes given end too early: call again with at least this many (never more than a cluster or the file).
    NeedMore(usize),
}

/// Is this the beginning of a qcow2 image of any version? Versions we cannot open are included so that their error can
/// name them.
pub(crate) fn is_qcow2(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && head.len() >= 8 && be32(head, 4) >= 2
}

impl Cluster0 {
    /// How many bytes to read first: enough for all but unusual images.
    pub(crate) const FIRST_READ_LEN: usize = 4096;

    /// Parses the beginning of a file of `file_len` bytes. `bytes` is what was read so far, from offset 0.
    pub(crate) fn parse(bytes: &[u8], file_len: u64, mode: Strictness) -> Result<Parsed> {
        if !bytes.starts_with(&MAGIC) && bytes.len() >= MAGIC.len() {
            return Err(invalid("image is not in qcow2 format")
                .field("magic", bytes[..MAGIC.len()].escape_ascii())
                .at(0));
        }
        let is_whole_file = u64::try_from(bytes.len()).is_ok_and(|n| n >= file_len);
        let need = |n: usize| {
            if is_whole_file {
                let found = bytes.len();
                return Err(invalid(format!(
                    "the file ends inside the header, which has {n} bytes"
                ))
                .field("file length", found)
                .at(u64::try_from(found).unwrap_or(u64::MAX)));
            }
            Ok(Parsed::NeedMore(n))
        };
        if bytes.len() < V2_LEN {
            return need(V2_LEN);
        }
        let header_len = header_len(bytes)?;
        let header_end = usize::try_from(header_len).expect("at most a cluster");
        if bytes.len() < header_end.max(V2_LEN) {
            return need(header_end);
        }
        let header = Header::parse(bytes, header_len)?;
        let name = backing_range(bytes, &header)?;
        let cluster_len = header.geometry.cluster_len();

        // Bytes past the end of the file read as zeros, which end the list.
        let area_end = name.as_ref().map_or(cluster_len, |r| r.start);
        let available = if is_whole_file { bytes.len() } else { usize::MAX };
        let scan_end = area_end.min(available.max(header_end));
        let more =
            |n: usize| Parsed::NeedMore(n.max(bytes.len().saturating_mul(2)).min(cluster_len));
        let extensions = match Extensions::parse(bytes, header_end, scan_end)? {
            Scan::Complete(extensions) => extensions,
            Scan::NeedMore(n) => return Ok(more(n)),
        };
        let backing_name = match name.map(|r| (r.end, bytes.get(r))) {
            None => None,
            Some((_, Some(name))) => Some(name.to_vec()),
            Some((_, None)) if is_whole_file => {
                return Err(invalid("the file ends inside the backing file's name")
                    .field("file length", bytes.len())
                    .at(8));
            }
            Some((end, None)) => return Ok(more(end)),
        };
        if backing_name.as_ref().is_some_and(|n| n.contains(&0)) {
            return Err(invalid("the backing file's name holds a NUL byte")
                .field("backing_file", backing_name.unwrap_or_default().escape_ascii())
                .at(8));
        }
        let this = Self { header, extensions, backing_name };
        this.check_known()?;
        this.header.check_limits()?;
        this.check_features()?;
        if mode == Strictness::Use {
            this.check_tables(file_len)?;
        }
        Ok(Parsed::Complete(Box::new(this)))
    }

    /// Refuses features we do not know, by the names the image gives them.
    fn check_known(&self) -> Result<()> {
        let incompatible = &self.header.incompatible;
        let unknown = *incompatible & !Incompatible::KNOWN;
        if !unknown.is_empty() {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown.bits() >> bit & 1 == 1)
                .map(|bit| {
                    let name = self.extensions.incompatible_name(bit);
                    name.unwrap_or_else(|| format!("unknown incompatible feature bit {bit}"))
                })
                .collect();
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("unsupported qcow2 feature(s): {}", names.join(", ")),
            )
            .field("incompatible_features", format!("{:#x}", incompatible.bits()))
            .at(INCOMPATIBLE_AT));
        }
        Ok(())
    }

    /// Rules that join header and extensions.
    fn check_features(&self) -> Result<()> {
        let Header { incompatible, autoclear, geometry, .. } = &self.header;
        let has_data_file = incompatible.contains(Incompatible::DATA_FILE);
        if autoclear.contains(Autoclear::RAW_DATA_FILE) {
            if !has_data_file {
                return Err(invalid(
                    "data_file_raw needs an external data file, and there is none",
                )
                .field("autoclear_features", format!("{:#x}", autoclear.bits()))
                .at(AUTOCLEAR_AT));
            }
            if self.backing_name.is_some() {
                return Err(invalid("a raw data file and a backing file exclude each other")
                    .field("autoclear_features", format!("{:#x}", autoclear.bits()))
                    .at(AUTOCLEAR_AT));
            }
        }
        if let Some(crypto) = self.extensions.crypto {
            if self.header.crypt != CryptMethod::Luks {
                return Err(invalid("an encryption header without LUKS encryption")
                    .field("crypt_method", format!("{:?}", self.header.crypt))
                    .at(32));
            }
            let end = crypto.offset.checked_add(crypto.len).filter(|e| *e <= i64::MAX as u64);
            if end.is_none() || !geometry.is_cluster_aligned(crypto.offset) {
                return Err(invalid(
                    "the encryption header does not begin at a cluster of the file",
                )
                .field("encryption header offset", crypto.offset));
            }
        }
        if let Some(bitmaps) =
            self.extensions.bitmaps.filter(|_| autoclear.contains(Autoclear::BITMAPS))
        {
            bitmaps.validate(geometry)?;
        }
        Ok(())
    }

    /// Rules about what the header points at, for use (a check reports them instead).
    fn check_tables(&self, file_len: u64) -> Result<()> {
        let h = &self.header;
        if h.reftable_clusters == 0 {
            return Err(invalid("the image has no refcount table; repair it with a check")
                .field("refcount_table_clusters", 0)
                .at(56));
        }
        if h.snapshot_count > MAX_SNAPSHOTS {
            return Err(limit(format!("more than {MAX_SNAPSHOTS} snapshots"))
                .field("nb_snapshots", h.snapshot_count)
                .at(60));
        }
        if let Some(problem) = h.snapshots_problem() {
            return Err(invalid(problem).field("snapshots_offset", h.snapshots_offset).at(64));
        }
        let l1 = h.l1_offset..h.l1_offset + h.l1_len();
        if h.l1_size > 0 && l1.start == 0 {
            return Err(invalid("the l1 table overlaps the header")
                .field("l1_table_offset", h.l1_offset)
                .at(40));
        }
        if h.reftable_offset == 0 {
            return Err(invalid("the refcount table overlaps the header")
                .field("refcount_table_offset", h.reftable_offset)
                .at(REFTABLE_AT));
        }
        if h.l1_size > 0 && l1.end > file_len {
            return Err(invalid(format!(
                "the l1 table ({} entries) reaches past the end of the file ({file_len} bytes): \
                 the image is truncated",
                h.l1_size
            ))
            .field("l1_table_offset", h.l1_offset)
            .at(40));
        }
        let reftable_end = h.reftable_offset + h.reftable_len();
        if h.l1_size > 0 && l1.start < reftable_end && h.reftable_offset < l1.end {
            return Err(invalid("the l1 table overlaps the refcount table")
                .field("l1_table_offset", h.l1_offset)
                .at(40));
        }
        Ok(())
    }

    /// Rules for writing beyond those for reading: the disk's length, and a refcount table inside the file.
    pub(crate) fn check_writable(&self, file_len: u64) -> Result<()> {
        let h = &self.header;
        if !h.size.is_multiple_of(SECTOR_LEN) {
            return Err(invalid(
                "the disk's length is not a multiple of 512 bytes: open it read-only and convert it",
            )
            .field("size", h.size)
            .at(SIZE_AT));
        }
        if h.reftable_offset + h.reftable_len() > file_len {
            return Err(invalid(format!(
                "the refcount table reaches past the end of the file ({file_len} bytes): \
                 the image is truncated"
            ))
            .field("refcount_table_offset", h.reftable_offset)
            .at(REFTABLE_AT));
        }
        Ok(())
    }

    /// All of cluster 0. `NoSpace` if header, extensions and name do not fit.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let cluster_len = self.header.geometry.cluster_len();
        let mut out = self.header.encode();
        self.extensions.encode(&mut out);
        if let Some(name) = &self.backing_name {
            let place = u64::try_from(out.len()).unwrap_or(u64::MAX);
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            if len > MAX_BACKING_NAME_LEN {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("the backing file's name is longer than {MAX_BACKING_NAME_LEN} bytes"),
                )
                .field("backing_file", name.escape_ascii()));
            }
            out.extend(name);
            put(&mut out, 8, &place.to_be_bytes());
            put(&mut out, 16, &len.to_be_bytes());
        }
        if out.len() > cluster_len {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "header, extensions and names need {} bytes, a cluster has {cluster_len}: \
                     use larger clusters or shorter names",
                    out.len()
                ),
            ));
        }
        out.resize(cluster_len, 0);
        Ok(out)
    }
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

    /// `bytes` holds at least `header_len` bytes. Limits are checked once it is clear that all features are known.
    fn parse(bytes: &[u8], header_len: u32) -> Result<Self> {
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
                Compression::Deflate // refused below, by the name of the feature we do not know
            } else {
                compression(compression_byte.unwrap_or(0), incompatible)?
            },
            tail: bytes.get(105..usize::try_from(header_len).unwrap_or(0)).unwrap_or(&[]).to_vec(),
            header_len,
        })
    }

    fn check_limits(&self) -> Result<()> {
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
    fn encode(&self) -> Vec<u8> {
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
fn header_len(bytes: &[u8]) -> Result<u32> {
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

/// Where in cluster 0 the backing file's name lies.
fn backing_range(bytes: &[u8], header: &Header) -> Result<Option<std::ops::Range<usize>>> {
    let (offset, len) = (be64(bytes, 8), be32(bytes, 16));
    if offset == 0 {
        return Ok(None);
    }
    let cluster = header.geometry.cluster_size();
    if offset > cluster || offset < u64::from(header.header_len) {
        return Err(invalid("the backing file's name does not lie in cluster 0 behind the header")
            .field("backing_file_offset", offset)
            .at(8));
    }
    if len > MAX_BACKING_NAME_LEN || u64::from(len) > cluster - offset {
        return Err(invalid(format!(
            "the backing file's name is longer than {MAX_BACKING_NAME_LEN} bytes or than cluster 0"
        ))
        .field("backing_file_size", len)
        .at(16));
    }
    let start = usize::try_from(offset).expect("inside a cluster");
    let len = usize::try_from(len).expect("inside a cluster");
    Ok(Some(start..start + len))
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

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidImage, message)
}

fn limit(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::LimitExceeded, message)
}

#[cfg(test)]
#[path = "tests/header.rs"]
mod tests;
