//! Describes an image to open, from the arguments of a command: name, format, open flags, cache
//! mode.

use std::ffi::OsStr;

use bds_core::driver::{CacheMode, OpenFlags};
use bds_core::{Error, ErrorKind, Result};

use crate::args::Source;

/// An image to open: name, format and flags.
#[derive(Clone, Debug)]
pub(crate) struct Spec<'a> {
    /// A file name, or options.
    pub(crate) name: &'a OsStr,
    pub(crate) is_options: bool,
    pub(crate) format: Option<&'a str>,
    pub(crate) flags: OpenFlags,
}

impl<'a> Spec<'a> {
    /// Describes an image to be read.
    pub(crate) fn read(name: &'a OsStr, source: &'a Source) -> Result<Self> {
        refuse_objects(&source.object)?;
        let flags =
            OpenFlags { read_only: true, force_share: source.force_share, ..OpenFlags::default() };
        let format = source.format.as_deref();
        Ok(Self { name, is_options: source.image_opts, format, flags })
    }

    /// Changes the flags to writing, with discards passed on.
    #[must_use]
    pub(crate) fn writable(mut self) -> Self {
        self.flags.read_only = false;
        self.flags.discard = true;
        self
    }

    #[must_use]
    pub(crate) fn cache(mut self, cache: CacheMode) -> Self {
        self.flags.cache = cache;
        self
    }
}

/// Refuses `--object`: secrets and other user-creatable objects are not supported.
pub(crate) fn refuse_objects(objects: &[String]) -> Result<()> {
    match objects.first() {
        None => Ok(()),
        Some(object) => Err(Error::new(
            ErrorKind::NotSupported,
            "--object is not supported: there are no user-creatable objects",
        )
        .field("object", object)),
    }
}

/// Parses qemu-img's name of a cache mode; `option` is named in the error.
pub(crate) fn cache_mode(option: &str, word: &str) -> Result<CacheMode> {
    CacheMode::parse(word).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("invalid cache mode for {option}: use none, writeback, writethrough, directsync or unsafe"),
        )
        .field("cache", word)
    })
}
