//! Checks the arguments of `convert` before any file is opened.

use std::ffi::{OsStr, OsString};

use bds_core::copy::MAX_WORKERS;
use bds_core::driver::CacheMode;
use bds_core::{Error, ErrorKind, Options, Result};

use crate::args::Convert;
use crate::cmd::create;
use crate::image_spec;

/// Largest -S: zeros are only detected within one buffer.
const MAX_SPARSE_LEN: u64 = 1 << 30;

/// The checked arguments of `convert`.
pub(crate) struct Plan<'a> {
    pub(crate) args: &'a Convert,
    pub(crate) inputs: &'a [OsString],
    pub(crate) output: &'a OsStr,
    /// Of a new output: everything but its size, unless the user gave one.
    pub(crate) options: Options,
    pub(crate) source_cache: CacheMode,
    pub(crate) target_cache: CacheMode,
    pub(crate) sparse_len: u64,
    /// Bytes a second.
    pub(crate) rate: Option<u64>,
}

impl<'a> Plan<'a> {
    /// Refuses contradictory combinations and options that are not supported.
    pub(crate) fn new(args: &'a Convert) -> Result<Self> {
        image_spec::refuse_objects(&args.object)?;
        super::refuse(
            args.snapshot.is_some(),
            "-l",
            "internal snapshots are not read; take it out with qemu-img convert -l",
        )?;
        let (output, inputs) = match args.filenames.split_last() {
            Some((output, inputs)) if !inputs.is_empty() => (output, inputs),
            _ => return Err(wrong("Must specify image file name")),
        };
        let mut options = create::format_options(&args.options)?;
        let (file, format) = (args.backing.as_deref(), args.backing_format.as_deref());
        create::set_backing(&mut options, file, format)?;
        let plan = Self {
            args,
            inputs,
            output,
            options,
            source_cache: image_spec::cache_mode("-T", &args.source_cache)?,
            target_cache: image_spec::cache_mode("-t", &args.target_cache)?,
            sparse_len: sparse_len(&args.sparse_size)?,
            rate: args.rate.as_deref().map(rate).transpose()?,
        };
        plan.refuse_combinations()?;
        Ok(plan)
    }

    /// Whether the output has a backing image.
    pub(crate) fn is_overlay(&self) -> bool {
        self.options.contains("backing_file")
    }

    pub(crate) fn format(&self) -> &'a str {
        create::stored_format(self.args.output_format.as_deref().unwrap_or("raw"))
    }

    fn refuse_combinations(&self) -> Result<()> {
        let Self { args, inputs, .. } = self;
        let preallocation = self.options.peek("preallocation");
        for (is_wrong, message) in [
            (
                args.target_image_opts && !args.no_create,
                "--target-image-opts requires use of -n flag",
            ),
            (args.target_is_zero && !args.no_create, "--target-is-zero requires use of -n flag"),
            (args.compress && args.copy_range, "Cannot enable copy offloading when -c is used"),
            (
                args.target_is_zero && self.is_overlay(),
                "Cannot use --target-is-zero when the target image has a backing file",
            ),
            (args.backing_format.is_some() && args.backing.is_none(), "-F needs -B"),
            (
                args.skip_broken_bitmaps && !args.bitmaps,
                "Use of --skip-broken-bitmaps requires --bitmaps",
            ),
            (args.bitmaps && inputs.len() > 1, "Copying bitmaps only possible with single source"),
            (
                !(1..=MAX_WORKERS).contains(&args.parallel),
                "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16",
            ),
            (
                args.no_create && !args.options.is_empty(),
                "-o has no effect when skipping image creation: leave out -o, or -n to make a new image",
            ),
            (
                inputs.len() > 1 && self.is_overlay(),
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ),
            (
                args.compress && preallocation.is_some_and(|mode| mode != "off"),
                "Compression and preallocation not supported at the same time",
            ),
        ] {
            if is_wrong {
                return Err(wrong(message));
            }
        }
        Ok(())
    }
}

fn wrong(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

fn sparse_len(text: &str) -> Result<u64> {
    let len = super::size("buffer size for sparse output", text)?;
    if len.is_multiple_of(512) && len <= MAX_SPARSE_LEN {
        return Ok(len);
    }
    let message =
        "Invalid buffer size for sparse output specified: use 0 or a multiple of 512 up to 1G";
    Err(wrong(message).field("sparse size", text))
}

fn rate(text: &str) -> Result<u64> {
    match super::size("rate limit", text)? {
        0 => Err(wrong("the rate limit must not be 0: leave out -r for none")),
        rate => Ok(rate),
    }
}
