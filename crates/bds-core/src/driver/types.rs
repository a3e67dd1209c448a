//! Driver types: name and options of a driver, and how it opens, creates, probes and measures
//! images.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bds_io::Fs;

use super::{BitmapSpec, BoxFuture, CreateContext, Driver, OpenContext};
use crate::error::{Error, ErrorKind, Result};
use crate::options::{OptionSpec, Options};

/// Position of a driver in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Category {
    /// Accesses storage.
    Protocol,
    /// Interprets the bytes of a file as a disk.
    Format,
    /// Passes requests on; may delay, refuse or observe them, but shows its child's bytes.
    Filter,
}

/// Contents that a new image would have to hold.
#[derive(Clone, Debug, Default)]
pub struct MeasureSource {
    /// Virtual size in bytes.
    pub virtual_len: u64,
    /// Ranges that hold data, in order, not touching. `None`: unknown, all of it.
    pub data: Option<Vec<Range<u64>>>,
}

/// Size of a new image in bytes, as `measure` computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeasureReport {
    /// With the source's data.
    pub required: u64,
    /// With every byte written.
    pub fully_allocated: u64,
    /// For persistent bitmaps, where the format can hold them.
    pub bitmaps: Option<u64>,
}

/// Facts about an image to be created, computed from its options without touching a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateFacts {
    /// Virtual size in bytes.
    pub len: u64,
    /// The file has at least this many bytes once the image is made.
    pub min_file_len: u64,
    /// Bytes of one compressed cluster; `None` if the image cannot hold any.
    pub compressed_unit: Option<u32>,
}

/// A file opened or made for a new image, and locked. Its old contents are still there; dropping
/// the claim leaves them.
pub struct ClaimedFile {
    /// Its name, links followed, if the claim made it: to be removed if creation fails.
    pub made_path: Option<PathBuf>,
    /// Identity of the file: (device, inode).
    pub identity: (u64, u64),
    /// Its maximal length, if it cannot grow.
    pub max_len: Option<u64>,
    /// Empties the file and applies the options, from the first poll on. Releases the locks when
    /// done.
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

/// A type of driver, as the registry lists it.
pub trait DriverType: Send + Sync + 'static {
    /// Its name as QEMU spells it.
    fn name(&self) -> &'static str;

    /// Its position in a chain.
    fn category(&self) -> Category;

    /// One line of help, without a full stop.
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

    /// Confidence that `head` (the first bytes, up to 64 KiB) begins one of its images: 0 = no, 100
    /// = certain.
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

    /// Formats: checks create options as far as possible before a file is touched, and takes them
    /// as `create` does. `backing_len`: length of the backing image, if one is named and was
    /// opened.
    fn check_create(
        &self,
        _options: &mut Options,
        _backing_len: Option<u64>,
    ) -> Result<CreateFacts> {
        let words = format!("{} images cannot be created", self.name());
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// Protocols: opens or makes the file for a new image, takes the options it knows and locks the
    /// file. Its contents stay until [`ClaimedFile::empty`] runs (then it has the length `size`).
    fn claim_file(&self, _fs: &Fs, _path: &Path, _options: &mut Options) -> Result<ClaimedFile> {
        let words = format!("{} cannot create files", self.name());
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// Options of an image that can be changed later ([`Driver::amend`]); empty if there are none.
    fn amend_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Computes the size of an image made with these create options.
    fn measure(&self, _options: &mut Options, _source: &MeasureSource) -> Result<MeasureReport> {
        Err(Error::new(
            ErrorKind::NotSupported,
            format!("{} images cannot be measured", self.name()),
        ))
    }

    /// Bytes that an image made with these create options needs in addition for persistent bitmaps.
    /// `None`: it can hold none.
    ///
    /// # Errors
    /// `LimitExceeded`, `InvalidInput`: one of them cannot be stored.
    fn measure_bitmaps(&self, _options: &Options, _bitmaps: &[BitmapSpec]) -> Result<Option<u64>> {
        Ok(None)
    }
}
