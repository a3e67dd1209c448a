//! A driver before it is opened: its name, its options, how to open, create, probe and measure.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bds_io::Fs;

use super::{BoxFuture, CreateContext, Driver, OpenContext};
use crate::error::{Error, ErrorKind, Result};
use crate::options::{OptionSpec, Options};

/// Where a driver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// Holds the bytes.
    Protocol,
    /// Gives bytes a shape.
    Format,
    /// Changes when or whether, never what.
    Filter,
}

/// What a new image would have to hold.
#[derive(Clone, Debug, Default)]
pub struct MeasureSource {
    /// Virtual size in bytes.
    pub virtual_len: u64,
    /// Ranges that hold data, in order, not touching. `None`: unknown, all of it.
    pub data: Option<Vec<Range<u64>>>,
}

/// How large a new image would be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeasureReport {
    /// For the source's data.
    pub required: u64,
    /// If every byte were written.
    pub fully_allocated: u64,
    /// For persistent bitmaps, where the format can hold them.
    pub bitmaps: Option<u64>,
}

/// What create options lead to, found out without touching a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateFacts {
    /// Virtual size in bytes.
    pub len: u64,
    /// The file has at least this many bytes once the image is made.
    pub min_file_len: u64,
    /// Bytes of one compressed cluster; `None` if the image cannot hold any.
    pub compressed_unit: Option<u32>,
}

/// A file that was opened, or made, for a new image, and is locked. What it holds is still there; dropping the claim leaves it so.
pub struct ClaimedFile {
    /// Its name, links followed, if the claim made it: to be removed if the image does not come to be.
    pub made_path: Option<PathBuf>,
    /// Which file it is.
    pub identity: (u64, u64),
    /// The longest it can be, for what cannot grow.
    pub max_len: Option<u64>,
    /// Polled for the first time, this empties the file and does with it what the options say. At its end the locks are gone.
    pub empty: BoxFuture<'static, Result<()>>,
}

impl fmt::Debug for ClaimedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClaimedFile")
            .field("made_path", &self.made_path)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// A kind of driver, as the registry knows it.
pub trait DriverType: Send + Sync + 'static {
    /// Its name as QEMU spells it.
    fn name(&self) -> &'static str;

    /// Where it stands.
    fn category(&self) -> Category;

    /// What it is for, in one line for a person, without a full stop.
    fn help(&self) -> &'static str {
        ""
    }

    /// Options `open` understands beside the common ones (children included).
    fn open_options(&self) -> &'static [OptionSpec];

    /// Opens a node. Whatever fails, nothing remains open and nothing was written.
    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>>;

    /// How sure is it that `head` (the first bytes, up to 64 KiB) begins one of its images? 0 = no, 100 = certainly.
    fn probe(&self, _head: &[u8], _file_len: u64) -> u8 {
        0
    }

    /// Options `create` understands; empty if it cannot create.
    fn create_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Formats: writes a new image into `context.file`.
    fn create<'a>(&'a self, _context: CreateContext<'a>) -> BoxFuture<'a, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} images cannot be created")))
        })
    }

    /// Formats: checks everything about create options that can be checked before a file is touched, and takes them as `create`
    /// does. `backing_len`: length of the backing image, if one is named and is looked at.
    fn check_create(
        &self,
        _options: &mut Options,
        _backing_len: Option<u64>,
    ) -> Result<CreateFacts> {
        let words = format!("{} images cannot be created", self.name());
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// Protocols: opens the file for a new image, or makes it, takes the options it knows and locks the file. What the file
    /// holds stays until [`ClaimedFile::empty`] runs (then it has the length `size`).
    fn claim_file(&self, _fs: &Fs, _path: &Path, _options: &mut Options) -> Result<ClaimedFile> {
        let words = format!("{} cannot create files", self.name());
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// How large would an image made with these create options be?
    fn measure(&self, _options: &mut Options, _source: &MeasureSource) -> Result<MeasureReport> {
        Err(Error::new(
            ErrorKind::NotSupported,
            format!("{} images cannot be measured", self.name()),
        ))
    }
}
