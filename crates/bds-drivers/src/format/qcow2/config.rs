//! The open options of an image, as QEMU names them and some of ours, and the configuration they
//! result in.

use bds_core::driver::OpenFlags;
use bds_core::error::{Error, ErrorKind, Result};
use bds_core::options::{OptionKind, OptionSpec, Options};

use super::alloc::overlap::Class;
use super::layout::cluster0::Cluster0;
use super::layout::header::Compatible;
use super::meta::budget::DirtyBudget;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const DEFAULT_L2_CACHE_MAX: u64 = 32 * MIB;
/// L2 tables that may be dirty before changes wait if no cache size was chosen, however small the
/// image and its tables.
const MIN_DIRTY_L2: u64 = 16 * MIB;
const DEFAULT_DECOMPRESSED_CACHE: u64 = 16 * MIB;
/// When the L2 cache cannot hold all tables, small slices waste less of it.
const SMALL_SLICE_LEN: u64 = 4 * KIB;
const MIN_REFCOUNT_CACHE_CLUSTERS: u64 = 4;
const DEFAULT_CLEAN_INTERVAL_S: u64 = 600;
/// No option may ask for more memory than this.
const MAX_CACHE: u64 = 64 << 30;

pub(super) const fn spec(
    name: &'static str,
    kind: OptionKind,
    help: &'static str,
    default: Option<&'static str>,
) -> OptionSpec {
    OptionSpec { name, kind, help, default }
}

const TEMPLATES: OptionKind = OptionKind::Choice(&["none", "constant", "cached", "all"]);

/// What `open` understands.
pub(crate) const OPEN_OPTIONS: &[OptionSpec] = &[
    spec("file", OptionKind::Child, "the image file", None),
    spec("backing", OptionKind::Child, "what unallocated clusters show; null for nothing", None),
    spec("data-file", OptionKind::Child, "the external data file", None),
    spec("lazy-refcounts", OptionKind::Bool, "keep refcounts in memory until close", None),
    spec(
        "pass-discard-request",
        OptionKind::Bool,
        "discard on the host what the guest discards",
        None,
    ),
    spec(
        "pass-discard-snapshot",
        OptionKind::Bool,
        "discard on the host what a deleted snapshot held",
        Some("on"),
    ),
    spec(
        "pass-discard-other",
        OptionKind::Bool,
        "discard on the host all other freed space",
        Some("off"),
    ),
    spec("discard-no-unref", OptionKind::Bool, "discards keep their clusters", Some("off")),
    spec("overlap-check", TEMPLATES, "which metadata writes are checked against", Some("cached")),
    spec("overlap-check.template", TEMPLATES, "as overlap-check", None),
    spec("overlap-check.main-header", OptionKind::Bool, "check against the header", None),
    spec("overlap-check.active-l1", OptionKind::Bool, "check against the L1 table", None),
    spec("overlap-check.active-l2", OptionKind::Bool, "check against L2 tables", None),
    spec(
        "overlap-check.refcount-table",
        OptionKind::Bool,
        "check against the refcount table",
        None,
    ),
    spec("overlap-check.refcount-block", OptionKind::Bool, "check against refcount blocks", None),
    spec(
        "overlap-check.snapshot-table",
        OptionKind::Bool,
        "check against the snapshot table",
        None,
    ),
    spec("overlap-check.inactive-l1", OptionKind::Bool, "check against snapshots' L1 tables", None),
    spec("overlap-check.inactive-l2", OptionKind::Bool, "check against snapshots' L2 tables", None),
    spec(
        "overlap-check.bitmap-directory",
        OptionKind::Bool,
        "check against the bitmap directory",
        None,
    ),
    spec(
        "cache-size",
        OptionKind::Size,
        "bytes for L2 tables and refcount blocks together; as many of them, and four clusters, may be dirty",
        None,
    ),
    spec(
        "l2-cache-size",
        OptionKind::Size,
        "bytes for L2 tables (by default those of the image, at most 32M; of which, or of 16M if that is more, all may be dirty)",
        None,
    ),
    spec("l2-cache-entry-size", OptionKind::Size, "bytes of a piece of an L2 table", None),
    spec("refcount-cache-size", OptionKind::Size, "bytes for refcount blocks", None),
    spec("cache-clean-interval", OptionKind::Number, "seconds until unused tables go", Some("600")),
    spec(
        "decompressed-cache-size",
        OptionKind::Size,
        "bytes for decompressed clusters",
        Some("16M"),
    ),
    spec(
        "data-before-metadata",
        OptionKind::Bool,
        "new clusters become visible only with their data",
        Some("off"),
    ),
    spec(
        "backing-check",
        OptionKind::Bool,
        "refuse a backing file that is not what the image was made on, as far as that is noted",
        Some("on"),
    ),
    spec(
        "invalidate-bitmaps",
        OptionKind::Bool,
        "write though persistent bitmaps cannot be read and are lost",
        Some("off"),
    ),
];

const CLASSES: [(&str, &str, Class); 9] = [
    ("main-header", "overlap-check.main-header", Class::MAIN_HEADER),
    ("active-l1", "overlap-check.active-l1", Class::ACTIVE_L1),
    ("active-l2", "overlap-check.active-l2", Class::ACTIVE_L2),
    ("refcount-table", "overlap-check.refcount-table", Class::REFCOUNT_TABLE),
    ("refcount-block", "overlap-check.refcount-block", Class::REFCOUNT_BLOCK),
    ("snapshot-table", "overlap-check.snapshot-table", Class::SNAPSHOT_TABLE),
    ("inactive-l1", "overlap-check.inactive-l1", Class::INACTIVE_L1),
    ("inactive-l2", "overlap-check.inactive-l2", Class::INACTIVE_L2),
    ("bitmap-directory", "overlap-check.bitmap-directory", Class::BITMAP_DIRECTORY),
];

/// The options as given, before the header is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct RequestedOptions {
    lazy_refcounts: Option<bool>,
    pass_request: Option<bool>,
    pass_other: Option<bool>,
    discard_no_unref: Option<bool>,
    overlap: RequestedOverlap,
    total: Option<u64>,
    l2: Option<u64>,
    l2_entry: Option<u64>,
    refcount: Option<u64>,
    clean_interval_s: Option<u64>,
    /// At open alone.
    pub backing_check: Option<bool>,
    decompressed: Option<u64>,
    data_before_metadata: Option<bool>,
    invalidate_bitmaps: Option<bool>,
}

/// Which overlaps are checked: a template, and exceptions from it in the order of [`CLASSES`].
#[derive(Clone, Copy, Debug, Default)]
struct RequestedOverlap {
    template: Option<Class>,
    each: [Option<bool>; CLASSES.len()],
}

impl RequestedOverlap {
    fn or(self, earlier: Self) -> Self {
        let mut each = self.each;
        each.iter_mut().zip(earlier.each).for_each(|(new, old)| *new = new.or(old));
        Self { template: self.template.or(earlier.template), each }
    }

    fn classes(self) -> Class {
        let mut classes = self.template.unwrap_or(Class::CACHED);
        for ((_, _, class), is_on) in CLASSES.into_iter().zip(self.each) {
            if let Some(is_on) = is_on {
                classes.set(class, is_on);
            }
        }
        classes
    }
}

/// Options and flags an image was opened, or reopened, with.
#[derive(Clone, Debug)]
pub(crate) struct RequestedMode {
    pub options: RequestedOptions,
    pub flags: OpenFlags,
}

/// The configuration of an open image.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub lazy_refcounts: bool,
    pub pass_request: bool,
    pub pass_other: bool,
    pub discard_no_unref: bool,
    pub overlap: Class,
    pub l2_cache_bytes: usize,
    pub slice_len: usize,
    pub refcount_cache_bytes: usize,
    /// Of L2 tables and refcount blocks together.
    pub dirty: DirtyBudget,
    /// Zero: never.
    pub clean_interval_s: u64,
    pub decompressed_cache_bytes: usize,
    pub data_before_metadata: bool,
    pub invalidate_bitmaps: bool,
}

impl RequestedOptions {
    /// Takes the known options out of `options`.
    pub(crate) fn take(options: &mut Options) -> Result<Self> {
        // Decides whether deleted snapshots' space is discarded; none are deleted here, so both
        // values are accepted.
        options.take_bool("pass-discard-snapshot")?;
        Ok(Self {
            lazy_refcounts: options.take_bool("lazy-refcounts")?,
            pass_request: options.take_bool("pass-discard-request")?,
            pass_other: options.take_bool("pass-discard-other")?,
            discard_no_unref: options.take_bool("discard-no-unref")?,
            overlap: take_overlap(options)?,
            total: take_cache_size(options, "cache-size")?,
            l2: take_cache_size(options, "l2-cache-size")?,
            l2_entry: options.take_size("l2-cache-entry-size")?,
            refcount: take_cache_size(options, "refcount-cache-size")?,
            clean_interval_s: options.take_u64("cache-clean-interval")?,
            backing_check: options.take_bool("backing-check")?,
            decompressed: take_cache_size(options, "decompressed-cache-size")?,
            data_before_metadata: options.take_bool("data-before-metadata")?,
            invalidate_bitmaps: options.take_bool("invalidate-bitmaps")?,
        })
    }

    /// These options, and those of `earlier` that are not among them.
    pub(crate) fn or(self, earlier: &Self) -> Self {
        Self {
            lazy_refcounts: self.lazy_refcounts.or(earlier.lazy_refcounts),
            pass_request: self.pass_request.or(earlier.pass_request),
            pass_other: self.pass_other.or(earlier.pass_other),
            discard_no_unref: self.discard_no_unref.or(earlier.discard_no_unref),
            overlap: self.overlap.or(earlier.overlap),
            total: self.total.or(earlier.total),
            l2: self.l2.or(earlier.l2),
            l2_entry: self.l2_entry.or(earlier.l2_entry),
            refcount: self.refcount.or(earlier.refcount),
            clean_interval_s: self.clean_interval_s.or(earlier.clean_interval_s),
            backing_check: self.backing_check.or(earlier.backing_check),
            decompressed: self.decompressed.or(earlier.decompressed),
            data_before_metadata: self.data_before_metadata.or(earlier.data_before_metadata),
            invalidate_bitmaps: self.invalidate_bitmaps.or(earlier.invalidate_bitmaps),
        }
    }

    /// What holds for an image that is open: tables are cached in pieces of `slice_len` already.
    pub(crate) fn config_at_reopen(
        &self,
        cluster0: &Cluster0,
        flags: &OpenFlags,
        slice_len: usize,
    ) -> Result<Config> {
        let config = self.config_at_open(cluster0, flags)?;
        if self.l2_entry.is_some() && config.slice_len != slice_len {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "l2-cache-entry-size cannot change while the image is open",
            )
            .field("l2-cache-entry-size", config.slice_len));
        }
        Ok(Config { slice_len, ..config })
    }

    /// What holds for this image.
    pub(crate) fn config_at_open(&self, cluster0: &Cluster0, flags: &OpenFlags) -> Result<Config> {
        let header = &cluster0.header;
        let cluster_size = header.geometry.cluster_size();
        let is_v3 = header.version >= 3;
        if self.lazy_refcounts == Some(true) && !is_v3 {
            return Err(invalid("lazy refcounts need an image of version 3").field("version", 2));
        }
        let discard_no_unref = self.discard_no_unref.unwrap_or(false);
        if discard_no_unref && !is_v3 {
            return Err(invalid("discard-no-unref needs an image of version 3").field("version", 2));
        }
        let (l2_bytes, refcount_bytes) = self.cache_sizes(cluster0)?;
        let refcount_bytes = refcount_bytes.max(MIN_REFCOUNT_CACHE_CLUSTERS * cluster_size);
        let slice_len = self.slice_len(cluster0, l2_bytes)?;
        Ok(Config {
            lazy_refcounts: is_v3
                && self
                    .lazy_refcounts
                    .unwrap_or(header.compatible.contains(Compatible::LAZY_REFCOUNTS)),
            pass_request: self.pass_request.unwrap_or(flags.discard),
            pass_other: self.pass_other.unwrap_or(false),
            discard_no_unref,
            overlap: self.overlap.classes(),
            l2_cache_bytes: bytes(l2_bytes),
            slice_len,
            refcount_cache_bytes: bytes(refcount_bytes),
            dirty: self.dirty_budget(cluster0, l2_bytes, refcount_bytes),
            clean_interval_s: self.clean_interval_s.unwrap_or(DEFAULT_CLEAN_INTERVAL_S),
            decompressed_cache_bytes: bytes(
                self.decompressed.unwrap_or(DEFAULT_DECOMPRESSED_CACHE),
            ),
            data_before_metadata: self.data_before_metadata.unwrap_or(false),
            invalidate_bitmaps: self.invalidate_bitmaps.unwrap_or(false),
        })
    }

    /// Bytes for L2 tables and for refcount blocks.
    fn cache_sizes(&self, cluster0: &Cluster0) -> Result<(u64, u64)> {
        let header = &cluster0.header;
        let min_refcount = MIN_REFCOUNT_CACHE_CLUSTERS * header.geometry.cluster_size();
        let all_l2 = all_l2(cluster0);
        let (l2, refcount) = match (self.total, self.l2, self.refcount) {
            (Some(_), Some(_), Some(_)) => {
                return Err(invalid(
                    "give at most two of cache-size, l2-cache-size and refcount-cache-size",
                ));
            }
            (Some(total), Some(part), None) | (Some(total), None, Some(part)) if part > total => {
                return Err(
                    invalid("a cache may not be larger than cache-size").field("size", part)
                );
            }
            (Some(total), Some(l2), None) => (l2, total - l2),
            (Some(total), None, Some(refcount)) => (total - refcount, refcount),
            (Some(total), None, None) => {
                let l2 = all_l2.min(total.saturating_sub(min_refcount));
                (l2, total - l2)
            }
            (None, l2, refcount) => (
                l2.unwrap_or_else(|| all_l2.min(DEFAULT_L2_CACHE_MAX)),
                refcount.unwrap_or(min_refcount),
            ),
        };
        Ok((l2, refcount))
    }

    /// How much may be dirty. A chosen size is kept. Without one small images get more than their
    /// tables take, so that they are not written back one by one.
    fn dirty_budget(&self, cluster0: &Cluster0, l2: u64, refcount: u64) -> DirtyBudget {
        let is_chosen = self.total.or(self.l2).or(self.refcount).is_some();
        let space = if is_chosen { l2 } else { l2.max(MIN_DIRTY_L2) };
        // Tables that all fit never have to go: to write them early gains nothing.
        let covers = l2 >= all_l2(cluster0);
        let spare = if covers { (space + refcount / 2).min(MIN_DIRTY_L2 / 2) } else { 0 };
        DirtyBudget { begin: bytes(spare.max(space / 2)), full: bytes(space + refcount) }
    }

    fn slice_len(&self, cluster0: &Cluster0, l2_bytes: u64) -> Result<usize> {
        let geometry = cluster0.header.geometry;
        let cluster_size = geometry.cluster_size();
        if let Some(len) = self.l2_entry {
            if !len.is_power_of_two() || !(512..=cluster_size).contains(&len) {
                return Err(invalid(format!(
                    "l2-cache-entry-size must be a power of two from 512 to the cluster size ({cluster_size})"
                ))
                .field("l2-cache-entry-size", len));
            }
            return Ok(bytes(len));
        }
        let covers = l2_bytes >= all_l2(cluster0);
        Ok(bytes(if covers { cluster_size } else { SMALL_SLICE_LEN.min(cluster_size) }))
    }
}

/// Bytes of all L2 tables the image may have.
fn all_l2(cluster0: &Cluster0) -> u64 {
    let geometry = cluster0.header.geometry;
    geometry.l1_entries(cluster0.header.size) * geometry.cluster_size()
}

fn take_cache_size(options: &mut Options, key: &'static str) -> Result<Option<u64>> {
    let size = options.take_size(key)?;
    match size {
        Some(size) if size > MAX_CACHE => {
            Err(Error::new(ErrorKind::LimitExceeded, format!("{key} may not exceed 64 GiB"))
                .field(key, size))
        }
        _ => Ok(size),
    }
}

fn take_overlap(options: &mut Options) -> Result<RequestedOverlap> {
    let template = |word: String| {
        Class::template(&word).ok_or_else(|| {
            invalid("overlap-check must be none, constant, cached or all")
                .field("overlap-check", word)
        })
    };
    let mut requested = RequestedOverlap::default();
    match options.take("overlap-check") {
        None => {}
        Some(serde_json::Value::String(word)) => requested.template = Some(template(word)?),
        Some(tree) => {
            let mut tree = Options::from_json(tree)?;
            if let Some(word) = tree.take_str("template")? {
                requested.template = Some(template(word)?);
            }
            for ((name, _, _), is_on) in CLASSES.into_iter().zip(&mut requested.each) {
                *is_on = tree.take_bool(name)?;
            }
            tree.finish("overlap-check")?;
        }
    }
    if let Some(word) = options.take_str("overlap-check.template")? {
        requested.template = Some(template(word)?);
    }
    for ((_, name, _), slot) in CLASSES.into_iter().zip(&mut requested.each) {
        if let Some(is_on) = options.take_bool(name)? {
            *slot = Some(is_on);
        }
    }
    Ok(requested)
}

fn bytes(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
