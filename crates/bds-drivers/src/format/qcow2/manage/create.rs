//! A new image, written in an order that leaves no half image behind.
//!
//! A [`Layout`] is planned first, as numbers: header, refcount table, refcount blocks, L1 table and, with preallocation, L2
//! tables and data, one after the other, all with a refcount of one. For a plain image these are the bytes that `qemu-img create`
//! writes. The header is written last, behind a flush (rule O14 and its like): after a crash there is either a whole image or
//! a file that is none.
//!
//! Does not open references: the caller has opened the data file and found the backing image's length.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bds_core::driver::{
    Child, CreateContext, CreateFacts, Prealloc, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::error::{Error, ErrorKind, Result};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_io::Buf;

use crate::format::qcow2::layout::entry::{COPIED, ZERO, write_refcount};
use crate::format::qcow2::layout::extension::{
    Extensions, MAX_BACKING_FORMAT_LEN, MAX_DATA_FILE_LEN,
};
use crate::format::qcow2::layout::header::{
    Autoclear, Cluster0, Compatible, Compression, Header, Incompatible, MAX_DISK_SIZE, MAX_L1_LEN,
    MAX_REFTABLE_LEN,
};
use crate::format::qcow2::layout::units::{Geometry, HOST_OFFSET_END, MIN_EXTENDED_CLUSTER_BITS};

const SECTOR_LEN: u64 = 512;
/// Tables are written in pieces of about this length.
const BATCH_LEN: usize = 2 << 20;
/// QEMU writes the table of feature names only into clusters larger than this.
const FEATURE_NAMES_FROM_LEN: u64 = 4096;

/// The options of `create`, as qemu-img spells them.
pub(crate) const CREATE_OPTIONS: &[OptionSpec] = &[
    spec("backing_file", OptionKind::String, "File name of a base image", None),
    spec("backing_fmt", OptionKind::String, "Image format of the base image", None),
    spec("cluster_size", OptionKind::Size, "qcow2 cluster size", Some("65536")),
    spec("compat", OptionKind::String, "Compatibility level (v2 [0.10] or v3 [1.1])", Some("1.1")),
    spec(
        "compression_type",
        OptionKind::Choice(&["zlib", "zstd"]),
        "Compression method used for image cluster compression",
        Some("zlib"),
    ),
    spec("data_file", OptionKind::String, "File name of an external data file", None),
    spec(
        "data_file_raw",
        OptionKind::Bool,
        "The external data file must stay valid as a raw image",
        None,
    ),
    spec("extended_l2", OptionKind::Bool, "Extended L2 tables", Some("off")),
    spec("lazy_refcounts", OptionKind::Bool, "Postpone refcount updates", Some("off")),
    spec(
        "preallocation",
        OptionKind::Choice(&["off", "metadata", "falloc", "full"]),
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        None,
    ),
    spec(
        "refcount_bits",
        OptionKind::Number,
        "Width of a reference count entry in bits",
        Some("16"),
    ),
    spec("size", OptionKind::Size, "Virtual disk size", None),
];

const fn spec(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
) -> OptionSpec {
    OptionSpec { name, kind, help, default }
}

/// What a new image shall be, checked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub version: u32,
    pub geometry: Geometry,
    /// `None`: nobody said; a backing image's length will do.
    pub size: Option<u64>,
    pub prealloc: Prealloc,
    pub compression: Compression,
    pub lazy_refcounts: bool,
    pub backing_file: Option<OsString>,
    pub backing_format: Option<String>,
    pub data_file: Option<OsString>,
    pub data_file_raw: bool,
}

impl Plan {
    /// Takes the options that create and measure share. Combinations that QEMU refuses are refused.
    pub(crate) fn take(options: &mut Options) -> Result<Self> {
        if let Some(key) = options.keys().find(|k| k.starts_with("encrypt")) {
            return Err(Error::new(
                ErrorKind::NotSupported,
                format!("option '{key}': encrypted images cannot be made by this build"),
            ));
        }
        let version = match options.take_str("compat")?.as_deref() {
            None | Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => {
                return Err(wrong("compat must be v2 (0.10) or v3 (1.1)").field("compat", other));
            }
        };
        let extended_l2 = options.take_bool("extended_l2")?.unwrap_or(false);
        let geometry = take_geometry(options, extended_l2)?;
        let compression = match options.take_str("compression_type")? {
            None => Compression::Deflate,
            Some(word) => Compression::parse(&word).ok_or_else(|| {
                wrong("compression_type must be zlib or zstd").field("compression_type", &word)
            })?,
        };
        let prealloc = match options.take_str("preallocation")? {
            None => Prealloc::Off,
            Some(word) => Prealloc::parse(&word).ok_or_else(|| {
                wrong("preallocation must be off, metadata, falloc or full")
                    .field("preallocation", &word)
            })?,
        };
        let mut plan = Self {
            version,
            geometry,
            size: options.take_size("size")?,
            prealloc,
            compression,
            lazy_refcounts: options.take_bool("lazy_refcounts")?.unwrap_or(false),
            backing_file: options.take_path("backing_file")?.map(PathBuf::into_os_string),
            backing_format: options.take_str("backing_fmt")?,
            data_file: options.take_path("data_file")?.map(PathBuf::into_os_string),
            data_file_raw: options.take_bool("data_file_raw")?.unwrap_or(false),
        };
        plan.check_version()?;
        plan.check_combinations()?;
        if plan.data_file_raw && plan.prealloc == Prealloc::Off {
            // Every byte must be found in the data file, so every cluster must be mapped.
            plan.prealloc = Prealloc::Metadata;
        }
        Ok(plan)
    }

    fn check_version(&self) -> Result<()> {
        let needs_v3 = if self.geometry.has_extended_l2() {
            "extended L2 entries are"
        } else if self.lazy_refcounts {
            "lazy refcounts are"
        } else if self.geometry.refcount_bits() != 16 {
            "refcount widths other than 16 bits are"
        } else if self.compression != Compression::Deflate {
            "compression types other than zlib are"
        } else if self.data_file.is_some() {
            "external data files are"
        } else {
            return Ok(());
        };
        if self.version >= 3 {
            return Ok(());
        }
        Err(wrong(format!(
            "{needs_v3} only supported with compatibility level 1.1 and above \
             (use compat=v3 or greater)"
        ))
        .field("compat", "0.10"))
    }

    fn check_combinations(&self) -> Result<()> {
        let has_backing = self.backing_file.is_some();
        if self.backing_format.is_some() && !has_backing {
            return Err(wrong("backing format cannot be used without backing file"));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(wrong("data_file_raw requires data_file"));
        }
        if self.data_file_raw && has_backing {
            return Err(wrong("backing file and data_file_raw cannot be used at the same time"));
        }
        if has_backing && self.prealloc != Prealloc::Off && !self.geometry.has_extended_l2() {
            return Err(wrong(
                "backing file and preallocation can only be used at the same time \
                 if extended_l2 is on",
            ));
        }
        let long =
            |name: Option<&[u8]>, max: usize| name.is_some_and(|n| n.len() > max || n.contains(&0));
        if long(self.backing_format.as_deref().map(str::as_bytes), MAX_BACKING_FORMAT_LEN) {
            return Err(wrong("the backing format's name is too long or holds a NUL byte"));
        }
        if long(self.data_file.as_ref().map(|name| name.as_bytes()), MAX_DATA_FILE_LEN) {
            return Err(wrong("the data file's name is too long or holds a NUL byte"));
        }
        if long(self.backing_file.as_ref().map(|name| name.as_bytes()), usize::MAX) {
            return Err(wrong("the backing file's name holds a NUL byte"));
        }
        Ok(())
    }

    /// Do all L2 tables exist from the start?
    fn is_mapped(&self) -> bool {
        self.prealloc != Prealloc::Off
    }

    /// The disk's length in bytes, rounded up to sectors as QEMU does.
    fn disk_size(&self, backing_len: Option<u64>) -> Result<u64> {
        let size = self.size.or(backing_len).ok_or_else(|| {
            wrong("image creation needs a size parameter, or a backing file that can be opened")
        })?;
        size.checked_next_multiple_of(SECTOR_LEN).filter(|s| *s <= MAX_DISK_SIZE).ok_or_else(|| {
            Error::new(ErrorKind::LimitExceeded, "the disk is larger than 2^63 - 2^30 bytes")
                .field("size", size)
        })
    }

    fn cluster0(&self, layout: &Layout, size: u64) -> Cluster0 {
        let mut header = Header::new(self.version, self.geometry);
        header.size = size;
        header.l1_size = layout.l1_entries;
        header.l1_offset = layout.l1_offset;
        header.reftable_offset = layout.reftable_offset;
        header.reftable_clusters = layout.reftable_clusters;
        header.compression = self.compression;
        header.compatible.set(Compatible::LAZY_REFCOUNTS, self.lazy_refcounts);
        let incompatible = &mut header.incompatible;
        incompatible.set(Incompatible::DATA_FILE, self.data_file.is_some());
        incompatible.set(Incompatible::COMPRESSION, self.compression != Compression::Deflate);
        incompatible.set(Incompatible::EXTENDED_L2, self.geometry.has_extended_l2());
        header.autoclear.set(Autoclear::RAW_DATA_FILE, self.data_file_raw);
        let has_names = self.version >= 3 && self.geometry.cluster_size() > FEATURE_NAMES_FROM_LEN;
        let bytes = |name: &Option<OsString>| name.as_ref().map(|n| n.as_bytes().to_vec());
        let extensions = Extensions {
            backing_format: self.backing_format.clone().map(String::into_bytes),
            data_file: bytes(&self.data_file),
            feature_names: has_names.then(Extensions::known_feature_names),
            ..Extensions::default()
        };
        Cluster0 { header, extensions, backing_name: bytes(&self.backing_file) }
    }
}

fn take_geometry(options: &mut Options, extended_l2: bool) -> Result<Geometry> {
    let size = options.take_size("cluster_size")?.unwrap_or(65536);
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return Err(wrong("cluster size must be a power of two between 512 and 2048k")
            .field("cluster_size", size));
    }
    let bits = options.take_u64("refcount_bits")?.unwrap_or(16);
    if !bits.is_power_of_two() || bits > 64 {
        return Err(wrong("refcount width must be a power of two and may not exceed 64 bits")
            .field("refcount_bits", bits));
    }
    Geometry::new(size.ilog2(), extended_l2, bits.ilog2()).ok_or_else(|| {
        wrong(format!(
            "extended L2 entries are only supported with cluster sizes of at least {} bytes",
            1 << MIN_EXTENDED_CLUSTER_BITS
        ))
        .field("cluster_size", size)
    })
}

/// Where the parts of a new image lie, in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub reftable_offset: u64,
    pub reftable_clusters: u32,
    pub refblocks_offset: u64,
    pub refblocks: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
    /// Tables that exist from the start.
    pub l2_offset: u64,
    pub l2_tables: u64,
    /// Data clusters that exist from the start, in this file.
    pub data_offset: u64,
    pub data_clusters: u64,
    /// Clusters in use, from the first on.
    pub clusters: u64,
}

impl Layout {
    /// Plans an image of `size` bytes. `mapped`: L2 tables exist. `with_data`: so do the clusters they point at, in this file.
    pub(crate) fn plan(
        geometry: &Geometry,
        size: u64,
        mapped: bool,
        with_data: bool,
    ) -> Result<Self> {
        let too_large = || {
            Error::new(
                ErrorKind::LimitExceeded,
                "the image size is too large for file format 'qcow2' \
                 (try using a larger cluster size)",
            )
            .field("size", size)
        };
        let l1_entries = geometry.l1_entries(size);
        let l1_len =
            l1_entries.checked_mul(8).filter(|l| *l <= MAX_L1_LEN).ok_or_else(too_large)?;
        let l2_tables = if mapped { l1_entries } else { 0 };
        let data_clusters = if with_data { geometry.clusters(size) } else { 0 };
        let fixed = 1 + geometry.clusters(l1_len) + l2_tables + data_clusters;
        let (reftable_clusters, refblocks) = refcount_clusters(geometry, fixed);
        let cluster = geometry.cluster_size();
        let clusters = fixed + reftable_clusters + refblocks;
        if clusters.checked_mul(cluster).is_none_or(|end| end > HOST_OFFSET_END)
            || reftable_clusters * cluster > MAX_REFTABLE_LEN
        {
            return Err(too_large());
        }
        let refblocks_offset = (1 + reftable_clusters) * cluster;
        let l1_offset = refblocks_offset + refblocks * cluster;
        let l2_offset = l1_offset + geometry.clusters(l1_len) * cluster;
        Ok(Self {
            reftable_offset: cluster,
            reftable_clusters: u32::try_from(reftable_clusters).expect("at most 8 MiB"),
            refblocks_offset,
            refblocks,
            l1_offset,
            l1_entries: u32::try_from(l1_entries).expect("at most 32 MiB"),
            l2_offset,
            l2_tables,
            data_offset: l2_offset + l2_tables * cluster,
            data_clusters,
            clusters,
        })
    }

    /// First byte behind the L1 table, which need not fill its cluster.
    fn l1_end(&self) -> u64 {
        self.l1_offset + u64::from(self.l1_entries) * 8
    }
}

/// Clusters of refcount table and refcount blocks that count `others` clusters and themselves.
pub(crate) fn refcount_clusters(geometry: &Geometry, others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        // Both only ever grow, by less than a cluster in 64, so this ends.
        let need_blocks = (others + table + blocks).div_ceil(geometry.refblock_entries());
        let need_table = (need_blocks * 8).div_ceil(geometry.cluster_size());
        if need_blocks <= blocks && need_table <= table {
            return (table, blocks);
        }
        (table, blocks) = (table.max(need_table), blocks.max(need_blocks));
    }
}

/// A new image, as numbers and bytes, before any file is touched.
struct Whole {
    plan: Plan,
    size: u64,
    layout: Layout,
    cluster0: Vec<u8>,
}

impl Whole {
    fn plan(options: &mut Options, backing_len: Option<u64>) -> Result<Self> {
        let plan = Plan::take(options)?;
        let size = plan.disk_size(backing_len)?;
        let mapped = plan.is_mapped();
        let with_data = mapped && plan.data_file.is_none();
        let layout = Layout::plan(&plan.geometry, size, mapped, with_data)?;
        let cluster0 = plan.cluster0(&layout, size).encode()?;
        Ok(Self { plan, size, layout, cluster0 })
    }
}

/// Says what would be made, or why it cannot be. Touches nothing.
pub(crate) fn check(options: &mut Options, backing_len: Option<u64>) -> Result<CreateFacts> {
    let Whole { plan, size, layout, .. } = Whole::plan(options, backing_len)?;
    let geometry = &plan.geometry;
    let end = layout.clusters * geometry.cluster_size();
    let cluster_len = u32::try_from(geometry.cluster_size()).expect("at most 2 MiB");
    Ok(CreateFacts {
        len: size,
        min_file_len: if plan.is_mapped() { end } else { layout.l1_end() },
        compressed_unit: plan.data_file.is_none().then_some(cluster_len),
    })
}

/// Writes a new image as `context` says.
pub(crate) async fn create(context: CreateContext<'_>) -> Result<()> {
    let CreateContext { file, data_file, backing_len, options } = context;
    let Whole { plan, size, layout, cluster0 } = Whole::plan(options, backing_len)?;
    let data_file = check_data_file(&plan, &file, data_file)?;
    let mapped = plan.is_mapped();

    let old_len = file.len();
    let guest_clusters = plan.geometry.clusters(size);
    let mut writer =
        Writer { file: &file, plan: &plan, layout: &layout, guest_clusters, zero_data: false };
    if old_len > 0 {
        // An old header must not describe the new tables.
        writer.zero(0, plan.geometry.cluster_size().min(old_len), false).await?;
        file.flush().await?;
    }
    writer.grow(layout.l1_end(), Prealloc::Off).await?;
    if let Some(data_file) = &data_file {
        let forwarded = match plan.prealloc {
            Prealloc::Off | Prealloc::Metadata => Prealloc::Off,
            other => other,
        };
        // Old bytes of a data file count only if it is to be read as it is.
        writer.zero_data = data_file.len() > 0 && !plan.data_file_raw;
        let change = Truncate { len: size, exact: true, prealloc: forwarded, zero_new: true };
        data_file.truncate(change).await.map_err(|e| e.context("cannot make the data file"))?;
    } else if mapped {
        writer.make_data(old_len).await?;
    }
    writer.refcounts().await?;
    writer.l1().await?;
    writer.l2().await?;
    if let Some(data_file) = &data_file {
        data_file.flush().await?;
    }
    file.flush().await?;
    writer.put(0, cluster0).await?;
    file.flush().await
}

fn check_data_file(plan: &Plan, file: &Child, data_file: Option<Child>) -> Result<Option<Child>> {
    match (&plan.data_file, data_file) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(wrong("the data file that data_file names was not opened")),
        (None, Some(_)) => Err(wrong("a data file was given, but option data_file names none")),
        (Some(name), Some(child)) => {
            if child.identity().is_some() && child.identity() == file.identity() {
                return Err(
                    wrong("the data file is the image itself").field("data_file", name.display())
                );
            }
            Ok(Some(child))
        }
    }
}

struct Writer<'a> {
    file: &'a Child,
    plan: &'a Plan,
    layout: &'a Layout,
    /// Clusters of the disk.
    guest_clusters: u64,
    /// The data clusters may hold old bytes: entries must say that they are zeros.
    zero_data: bool,
}

impl Writer<'_> {
    async fn put(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let iov = Buf::from_slice(&bytes).iov();
        self.file.write(offset, iov, WriteFlags::empty()).await.map_err(|e| e.at(offset))
    }

    async fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        let flags = if may_unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
        // Without NO_FALLBACK it is always done.
        self.file.write_zeroes(offset, len, flags).await.map(|_| ()).map_err(|e| e.at(offset))
    }

    /// Makes the file at least `len` bytes long.
    async fn grow(&self, len: u64, prealloc: Prealloc) -> Result<()> {
        if self.file.len() >= len {
            return Ok(());
        }
        let change = Truncate { len, exact: false, prealloc, zero_new: true };
        let said = |e: Error| e.context(format!("cannot make the file {len} bytes long"));
        self.file.truncate(change).await.map_err(said)
    }

    /// Provides the data clusters. What was in the file before must not show through.
    async fn make_data(&mut self, old_len: u64) -> Result<()> {
        let Layout { l2_offset, data_offset, clusters, .. } = *self.layout;
        let end = clusters * self.plan.geometry.cluster_size();
        // The tables are written, not reserved: only what lies behind them is preallocated.
        self.grow(data_offset.max(l2_offset), Prealloc::Off).await?;
        let prealloc = match self.plan.prealloc {
            Prealloc::Metadata => Prealloc::Off,
            other => other,
        };
        let old_end = old_len.min(end);
        if old_end > data_offset {
            if self.plan.prealloc == Prealloc::Metadata && self.plan.version >= 3 {
                self.zero_data = true;
            } else {
                self.zero(data_offset, old_end - data_offset, false).await?;
            }
        }
        self.grow(end, prealloc).await
    }

    /// Refcount blocks, then the table that points at them: every cluster in use is used once.
    async fn refcounts(&self) -> Result<()> {
        let Layout { refblocks, refblocks_offset, clusters, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let order = geometry.refcount_order();
        let cluster = geometry.cluster_len();
        let mut full = vec![0; cluster];
        let mut last = full.clone();
        let entries = geometry.refblock_entries();
        for index in 0..entries {
            let at = geometry.refblock_index(index);
            write_refcount(&mut full, order, at, 1);
            if (refblocks - 1) * entries + index < clusters {
                write_refcount(&mut last, order, at, 1);
            }
        }
        let batch = (BATCH_LEN / cluster).max(1) as u64;
        let mut done = 0;
        while done < refblocks {
            let count = batch.min(refblocks - done);
            let mut bytes = Vec::with_capacity(BATCH_LEN);
            for block in done..done + count {
                bytes.extend(if block + 1 == refblocks { &last } else { &full });
            }
            self.put(refblocks_offset + done * geometry.cluster_size(), bytes).await?;
            done += count;
        }
        let mut table: Vec<u8> = (0..refblocks)
            .flat_map(|block| (refblocks_offset + block * geometry.cluster_size()).to_be_bytes())
            .collect();
        table.resize(table.len().next_multiple_of(cluster), 0);
        self.put(self.layout.reftable_offset, table).await
    }

    async fn l1(&self) -> Result<()> {
        let Layout { l1_entries, l1_offset, l2_offset, l2_tables, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let table: Vec<u8> =
            (0..u64::from(l1_entries))
                .map(|i| {
                    if l2_tables > 0 {
                        (l2_offset + i * geometry.cluster_size()) | COPIED
                    } else {
                        0
                    }
                })
                .flat_map(u64::to_be_bytes)
                .collect();
        self.put(l1_offset, table).await
    }

    /// L2 tables of a preallocated image, in order, in large pieces.
    async fn l2(&self) -> Result<()> {
        let Layout { l2_offset, l2_tables, data_offset, .. } = *self.layout;
        let geometry = &self.plan.geometry;
        let cluster = geometry.cluster_size();
        let in_data_file = self.plan.data_file.is_some();
        let extended = geometry.has_extended_l2();
        let flag = if self.zero_data && !extended { ZERO } else { 0 };
        let bitmap = if self.zero_data && extended { u64::from(u32::MAX) << 32 } else { 0 };
        let base = if in_data_file { 0 } else { data_offset };
        let per_table = geometry.l2_entries() as u64;
        let batch = (BATCH_LEN / geometry.cluster_len()).max(1) as u64;
        let mut done = 0;
        while done < l2_tables {
            let count = batch.min(l2_tables - done);
            let mut bytes = Vec::with_capacity(BATCH_LEN);
            let first = done * per_table;
            for index in first..(first + count * per_table).min(self.guest_clusters) {
                bytes.extend(((base + index * cluster) | COPIED | flag).to_be_bytes());
                if extended {
                    bytes.extend(bitmap.to_be_bytes());
                }
            }
            bytes.resize(bytes.len().next_multiple_of(geometry.cluster_len()), 0);
            self.put(l2_offset + done * cluster, bytes).await?;
            done += count;
        }
        Ok(())
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
#[path = "tests/create.rs"]
mod tests;
