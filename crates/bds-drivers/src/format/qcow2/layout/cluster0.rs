//! Cluster 0: parses and encodes the header, its extensions and the backing file's name together.
//!
//! Parsing checks every field against the format's rules and our limits before anything is
//! allocated or followed; what is accepted here may be used as it stands. No I/O.
//!
//! Sizes that are no multiple of 512 (QEMU shows such a disk rounded down): a
//! read-only open shows every byte, a writable open is refused by [`Cluster0::check_writable`],
//! because a writer must not choose between losing the tail and inventing one.
//!
//! Invariant: cluster 0 is written as one write, and only if all of it fits.

use bds_core::error::{Error, ErrorKind, Result};

use super::extension::{Extensions, Scan, be32, be64};
use super::header::{
    AUTOCLEAR_AT, Autoclear, CryptMethod, Header, INCOMPATIBLE_AT, Incompatible, MAGIC,
    MAX_BACKING_NAME_LEN, MAX_SNAPSHOTS, REFTABLE_AT, SIZE_AT, V2_LEN, header_len, invalid, limit,
    put,
};

const SECTOR_LEN: u64 = 512;

/// How much of what is wrong is tolerated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// For use: everything must be right.
    Use,
    /// For `check` and `info`: fields that a check repairs (snapshots, refcount table) may be
    /// wrong.
    Inspect,
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
    /// More bytes are needed: call again with at least this many (never more than a cluster or the
    /// file).
    NeedMore(usize),
}

/// Is this the beginning of a qcow2 image of any version? Versions we cannot open are included so
/// that their error can name them.
pub(crate) fn is_qcow2(head: &[u8]) -> bool {
    head.starts_with(&MAGIC) && head.len() >= 8 && be32(head, 4) >= 2
}

impl Cluster0 {
    /// How many bytes to read first: enough for all but unusual images.
    pub(crate) const FIRST_READ_LEN: usize = 4096;

    /// Parses the beginning of a file of `file_len` bytes. `bytes` is what was read so far, from
    /// offset 0.
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

    /// Refuses unknown features, by the names the image gives them.
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

    /// Rules for writing beyond those for reading: the disk's length, and a refcount table inside
    /// the file.
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

    /// Where the backing file's name lies in `bytes`, which this was parsed from.
    pub(super) fn name_range(&self, bytes: &[u8]) -> Option<std::ops::Range<usize>> {
        backing_range(bytes, &self.header).ok().flatten()
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

#[cfg(test)]
#[path = "tests/cluster0.rs"]
mod tests;
