//! Checks the arguments of `mirror` before any file is opened.

use std::ffi::OsStr;

use bds_core::driver::CacheMode;
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::CopyMode;
use bds_jobs::mirror::{MirrorSync, check_granularity};
use bds_jobs::record::{CheckTarget, ManifestOptions, RecordOptions};

use crate::args::{Mirror as Args, MirrorCopyMode, MirrorSync as SyncWord, RecordCheck};
use crate::cmd::{create, job, size};
use crate::image_spec;

/// The checked arguments of `mirror`.
pub(super) struct Plan<'a> {
    pub(super) args: &'a Args,
    pub(super) target: &'a OsStr,
    /// Of a new target: everything but its size.
    pub(super) options: Options,
    pub(super) source_cache: CacheMode,
    pub(super) target_cache: CacheMode,
    pub(super) granularity: Option<u32>,
    /// 0: the job's default.
    pub(super) buf_size: u64,
    pub(super) record: Option<RecordOptions>,
    pub(super) settings: job::Settings,
}

impl<'a> Plan<'a> {
    /// Refuses what contradicts itself.
    pub(super) fn new(args: &'a Args) -> Result<Self> {
        image_spec::refuse_objects(&args.object)?;
        let Some(target) = args.target.as_deref() else {
            return Err(wrong("Must specify the name of the copy"));
        };
        let mut options = create::format_options(&args.options)?;
        let (file, format) = (args.backing.as_deref(), args.backing_format.as_deref());
        create::set_backing(&mut options, file, format)?;
        if options.contains("size") {
            let message = "a mirror has the size of its source: leave out the option 'size'";
            return Err(wrong(message));
        }
        let has_backing = options.contains("backing_file");
        match (args.sync, has_backing) {
            (SyncWord::Top, false) if !args.no_create => {
                let message = "--sync=top leaves out what the backing file holds: name it with -B \
                               and -F, or use -n with an overlay of it";
                return Err(wrong(message));
            }
            (SyncWord::Full | SyncWord::None, true) => {
                let message = "a copy with a backing file needs --sync=top; 'bds convert -B' \
                               copies what differs from any other image";
                return Err(wrong(message));
            }
            _ => {}
        }
        Ok(Self {
            args,
            target,
            options,
            source_cache: image_spec::cache_mode("-T", &args.source_cache)?,
            target_cache: image_spec::cache_mode("-t", &args.target_cache)?,
            granularity: args.granularity.as_deref().map(granularity).transpose()?,
            buf_size: args
                .buffer_size
                .as_deref()
                .map_or(Ok(0), |text| size("buffer size", text))?,
            record: args.record.is_some().then(|| record(args)).transpose()?,
            settings: job::Settings::new(&args.display, args.rate.as_deref(), args.quiet)?,
        })
    }

    pub(super) fn format(&self) -> &'a str {
        create::stored_format(self.args.output_format.as_deref().unwrap_or("raw"))
    }

    /// True if an earlier run has left a record and a target: they are used.
    pub(super) fn goes_on(&self) -> bool {
        let exists = |path: &std::path::Path| std::fs::symlink_metadata(path).is_ok();
        self.record.as_ref().is_some_and(|record| exists(&record.path))
            && create::path(self.target).is_ok_and(|path| exists(&path))
    }

    pub(super) fn manifest(&self) -> Option<ManifestOptions> {
        let path = self.args.manifest.as_ref()?;
        let note = self.args.note.clone().unwrap_or_default();
        Some(ManifestOptions { note, ..ManifestOptions::new(path) })
    }

    pub(super) fn sync(&self) -> MirrorSync {
        match self.args.sync {
            SyncWord::Full => MirrorSync::Full,
            SyncWord::Top => MirrorSync::Top,
            SyncWord::None => MirrorSync::None,
        }
    }

    pub(super) fn copy_mode(&self) -> CopyMode {
        match self.args.copy_mode {
            MirrorCopyMode::Background => CopyMode::Background,
            MirrorCopyMode::WriteBlocking => CopyMode::WriteBlocking,
        }
    }
}

fn record(args: &Args) -> Result<RecordOptions> {
    let path = args.record.as_deref().unwrap_or(std::path::Path::new(""));
    let check_target = check_target(args.check_target);
    let interval = args.record_interval.as_deref();
    let interval_bytes = interval.map_or(Ok(0), |text| size("record interval", text))?;
    Ok(RecordOptions { check_target, interval_bytes, ..RecordOptions::new(path) })
}

/// What the argument says, as the library has it.
pub(crate) fn check_target(check: RecordCheck) -> CheckTarget {
    match check {
        RecordCheck::Full => CheckTarget::Full,
        RecordCheck::Sample => CheckTarget::Sample,
        RecordCheck::None => CheckTarget::None,
    }
}

fn granularity(text: &str) -> Result<u32> {
    let bytes = u32::try_from(size("granularity", text)?).unwrap_or(u32::MAX);
    check_granularity(Some(bytes)).map(|()| bytes)
}

fn wrong(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
