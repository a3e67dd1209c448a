//! A driver before it is opened: its name, its options, how to open, create, probe and measure.

use std::ops::Range;
use std::path::Path;

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

    /// Protocols: makes the file (of length `size`, with the options it knows).
    fn create_file<'a>(
        &'a self,
        _fs: &'a Fs,
        _path: &'a Path,
        _options: &'a mut Options,
    ) -> BoxFuture<'a, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} cannot create files")))
        })
    }

    /// How large would an image made with these create options be?
    fn measure(&self, _options: &mut Options, _source: &MeasureSource) -> Result<MeasureReport> {
        Err(Error::new(
            ErrorKind::NotSupported,
            format!("{} images cannot be measured", self.name()),
        ))
    }
}
