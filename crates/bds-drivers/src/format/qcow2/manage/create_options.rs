//! Parses the options of a new image and checks them against each other as QEMU does.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use bds_core::driver::Prealloc;
use bds_core::error::{Error, ErrorKind, Result};
use bds_core::options::{OptionKind, OptionSpec, Options};

use super::create_layout::Layout;
use crate::format::qcow2::config::spec;
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::extension::{
    Extensions, MAX_BACKING_FORMAT_LEN, MAX_DATA_FILE_LEN,
};
use crate::format::qcow2::layout::header::{
    Autoclear, Compatible, Compression, Header, Incompatible, MAX_DISK_SIZE,
};
use crate::format::qcow2::layout::units::{Geometry, MIN_EXTENDED_CLUSTER_BITS};

const SECTOR_LEN: u64 = 512;
/// QEMU writes the table of feature names only into clusters larger than this.
pub(super) const FEATURE_NAMES_FROM_LEN: u64 = 4096;

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

/// The checked options of a new image.
#[derive(Clone, Debug)]
pub(crate) struct CreateOptions {
    pub version: u32,
    pub geometry: Geometry,
    /// `None`: not given; the backing image's length is used.
    pub size: Option<u64>,
    pub prealloc: Prealloc,
    pub compression: Compression,
    pub lazy_refcounts: bool,
    pub backing_file: Option<OsString>,
    pub backing_format: Option<String>,
    pub data_file: Option<OsString>,
    pub data_file_raw: bool,
}

impl CreateOptions {
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
    pub(super) fn is_mapped(&self) -> bool {
        self.prealloc != Prealloc::Off
    }

    /// The disk's length in bytes, rounded up to sectors as QEMU does.
    pub(super) fn disk_size(&self, backing_len: Option<u64>) -> Result<u64> {
        let size = self.size.or(backing_len).ok_or_else(|| {
            wrong("image creation needs a size parameter, or a backing file that can be opened")
        })?;
        size.checked_next_multiple_of(SECTOR_LEN).filter(|s| *s <= MAX_DISK_SIZE).ok_or_else(|| {
            Error::new(ErrorKind::LimitExceeded, "the disk is larger than 2^63 - 2^30 bytes")
                .field("size", size)
        })
    }

    pub(super) fn cluster0(&self, layout: &Layout, size: u64) -> Cluster0 {
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

pub(super) fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
