//! What an amendment asks for ([`AmendPlan`]), checked against the header that the image has.
//!
//! Names and refusals are those of `qemu-img amend`, so that scripts find the texts they look for.

use std::os::unix::ffi::OsStrExt;

use bds_core::driver::Amendment;
use bds_core::error::{Error, ErrorKind, Result};
use bds_core::options::{OptionKind, OptionSpec, Options};

use crate::format::qcow2::config::spec;
use crate::format::qcow2::layout::cluster0::Cluster0;
use crate::format::qcow2::layout::extension::{Extensions, MAX_DATA_FILE_LEN};
use crate::format::qcow2::layout::header::{
    Autoclear, Compatible, Compression, Header, Incompatible,
};
use crate::format::qcow2::manage::create_options::{CREATE_OPTIONS, FEATURE_NAMES_FROM_LEN};

const SECTOR_LEN: u64 = 512;

/// The options of `amend`, as qemu-img spells them.
pub(crate) const AMEND_OPTIONS: &[OptionSpec] = &[
    spec("backing_file", OptionKind::String, "File name of a base image (as it is)", None),
    spec("backing_fmt", OptionKind::String, "Image format of the base image (as it is)", None),
    spec("compat", OptionKind::String, "Compatibility level (v2 [0.10] or v3 [1.1])", None),
    spec("data_file", OptionKind::String, "File name of an external data file", None),
    spec(
        "data_file_raw",
        OptionKind::Bool,
        "The external data file must stay valid as a raw image (can only be cleared)",
        None,
    ),
    spec("lazy_refcounts", OptionKind::Bool, "Postpone refcount updates", None),
    spec("refcount_bits", OptionKind::Number, "Width of a reference count entry in bits", None),
    spec("size", OptionKind::Size, "Virtual disk size", None),
];

/// What is to change.
#[derive(Clone, Debug)]
pub(crate) struct AmendPlan {
    /// Cluster 0 as it is in the file.
    pub old: Cluster0,
    /// As it will be, but for places of tables that are not written yet.
    pub new: Cluster0,
    /// A new length of the disk.
    pub size: Option<u64>,
}

impl AmendPlan {
    /// # Errors
    /// `InvalidInput`, `NotSupported`: the change is not possible.
    pub(super) fn new(amendment: &Amendment, old: &Cluster0) -> Result<Self> {
        let mut options = amendment.options.clone();
        check_names(&options)?;
        check_backing(&mut options, old)?;
        let mut plan = Self { old: old.clone(), new: old.clone(), size: None };
        plan.set_version(options.take_str("compat")?.as_deref())?;
        plan.set_width(options.take_u64("refcount_bits")?)?;
        plan.set_lazy_refcounts(options.take_bool("lazy_refcounts")?)?;
        plan.set_data_file(&mut options)?;
        plan.size = options.take_size("size")?;
        if plan.size.is_some_and(|len| !len.is_multiple_of(SECTOR_LEN)) {
            return Err(wrong("The new size must be a multiple of 512"));
        }
        if plan.is_downgrade() {
            plan.check_features(amendment.has_persistent_bitmaps)?;
            plan.use_version_2();
        }
        Ok(plan)
    }

    pub(super) fn is_upgrade(&self) -> bool {
        self.old.header.version < self.new.header.version
    }

    pub(super) fn is_downgrade(&self) -> bool {
        self.old.header.version > self.new.header.version
    }

    pub(super) fn changes_width(&self) -> bool {
        self.old.header.geometry != self.new.header.geometry
    }

    fn set_version(&mut self, compat: Option<&str>) -> Result<()> {
        let version = match compat {
            None => return Ok(()),
            Some("1.1" | "v3") => 3,
            Some("0.10" | "v2") => 2,
            Some(other) => return Err(wrong(format!("Unknown compatibility level {other}"))),
        };
        let header = &mut self.new.header;
        if version == header.version {
            return Ok(());
        }
        let shape = Header::new(version, header.geometry);
        header.version = version;
        header.header_len = shape.header_len;
        header.tail = shape.tail;
        if version == 3 && header.geometry.cluster_size() > FEATURE_NAMES_FROM_LEN {
            self.new.extensions.feature_names = Some(Extensions::known_feature_names());
        }
        Ok(())
    }

    fn set_width(&mut self, bits: Option<u64>) -> Result<()> {
        let header = &mut self.new.header;
        let is_given = bits.is_some();
        let bits = bits.unwrap_or(u64::from(header.geometry.refcount_bits()));
        if !bits.is_power_of_two() || bits > 64 {
            return Err(wrong("Refcount width must be a power of two and may not exceed 64 bits")
                .field("refcount_bits", bits));
        }
        if header.version < 3 && bits != 16 {
            return Err(wrong(match is_given {
                true => {
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                     (use compat=1.1 or greater)"
                }
                false => "compat=0.10 requires refcount_bits=16",
            }));
        }
        header.geometry = header.geometry.with_refcount_order(bits.ilog2());
        Ok(())
    }

    fn set_lazy_refcounts(&mut self, is_lazy: Option<bool>) -> Result<()> {
        let Some(is_lazy) = is_lazy else { return Ok(()) };
        if is_lazy && self.new.header.version < 3 {
            return Err(wrong(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            ));
        }
        self.new.header.compatible.set(Compatible::LAZY_REFCOUNTS, is_lazy);
        Ok(())
    }

    fn set_data_file(&mut self, options: &mut Options) -> Result<()> {
        let has_data_file = self.old.header.incompatible.contains(Incompatible::DATA_FILE);
        if let Some(name) = options.take_path("data_file")? {
            let name = name.as_os_str().as_bytes();
            if !has_data_file {
                return Err(wrong(
                    "data-file can only be set for images that use an external data file",
                ));
            }
            if name.len() > MAX_DATA_FILE_LEN || name.contains(&0) {
                return Err(wrong("the data file's name is too long or holds a NUL byte"));
            }
            self.new.extensions.data_file = (!name.is_empty()).then(|| name.to_vec());
        }
        if let Some(is_raw) = options.take_bool("data_file_raw")? {
            if is_raw && !self.old.header.autoclear.contains(Autoclear::RAW_DATA_FILE) {
                return Err(wrong("data-file-raw cannot be set on existing images"));
            }
            self.new.header.autoclear.set(Autoclear::RAW_DATA_FILE, is_raw);
        }
        Ok(())
    }

    /// Refuses to give up features that version 2 does not have and that are in use.
    fn check_features(&self, has_persistent_bitmaps: bool) -> Result<()> {
        let refused = |words: String| Err(Error::new(ErrorKind::NotSupported, words));
        let old = &self.old.header;
        if old.incompatible.contains(Incompatible::DATA_FILE) {
            return refused("Cannot downgrade an image with a data file".into());
        }
        let droppable = Incompatible::DIRTY | Incompatible::COMPRESSION;
        let kept = old.incompatible - droppable;
        if !kept.is_empty() {
            let bits = kept.bits();
            return refused(format!(
                "Cannot downgrade an image with incompatible features {bits:#x} set"
            ));
        }
        if has_persistent_bitmaps || self.old.extensions.bitmaps.is_some() {
            return refused(
                "Cannot downgrade an image with persistent bitmaps: remove them first, version 2 has none"
                    .into(),
            );
        }
        Ok(())
    }

    fn use_version_2(&mut self) {
        let header = &mut self.new.header;
        header.incompatible = Incompatible::empty();
        header.compatible = Compatible::empty();
        header.autoclear = Autoclear::empty();
        header.compression = Compression::Deflate;
        self.new.extensions.feature_names = None;
    }
}

/// Refuses names that are no options of `amend`.
fn check_names(options: &Options) -> Result<()> {
    for key in options.keys() {
        let is_known = |known: &[OptionSpec]| known.iter().any(|option| option.name == key);
        if is_known(AMEND_OPTIONS) {
            continue;
        }
        let mut words = format!("Invalid parameter '{key}'");
        if is_known(CREATE_OPTIONS) || key.starts_with("encrypt") {
            words.push_str("\nThis option is only supported for image creation");
        }
        return Err(wrong(words));
    }
    Ok(())
}

/// The backing file may be given as it is, and cannot be changed.
fn check_backing(options: &mut Options, old: &Cluster0) -> Result<()> {
    let name = options.take_path("backing_file")?;
    let format = options.take_str("backing_fmt")?;
    if name.is_none() && format.is_none() {
        return Ok(());
    }
    let name = name.as_ref().map(|name| name.as_os_str().as_bytes());
    let is_same = name == old.backing_name.as_deref()
        && format.as_deref().map(str::as_bytes) == old.extensions.backing_format.as_deref();
    if is_same {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::NotSupported,
        "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
    ))
}

fn wrong(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
