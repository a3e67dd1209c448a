//! How an image records another one as its backing file: its name and format.
//!
//! A name that is relative to the directory of the image stays relative: it is what the image above
//! the base recorded, if that lies in the same directory. Otherwise the absolute path of the base's
//! file is recorded. Whatever the user gives is recorded as it is.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bds_core::driver::BackingRecord;
use bds_core::graph::{NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, ErrorKind, Result};

/// What the user wants recorded, if not what follows from the graph.
#[derive(Clone, Debug, Default)]
pub(crate) struct GivenName {
    pub(crate) backing_file: Option<OsString>,
    /// A protocol node as base is recorded as a raw image.
    pub(crate) mask_protocol: bool,
}

/// The record of `base` for images above it. `lowest` is the image directly above it now.
pub(crate) struct BaseName {
    format: String,
    given: Option<OsString>,
    file: Option<PathBuf>,
    /// As `lowest` recorded it, and the directory that this is relative to.
    relative: Option<(OsString, PathBuf)>,
    base: String,
}

impl BaseName {
    pub(crate) async fn of(base: &NodeRef, lowest: &NodeRef, given: &GivenName) -> Result<Self> {
        let is_protocol = base.edges_below().is_empty();
        let masked = is_protocol && given.mask_protocol;
        let format = if masked { "raw" } else { base.driver_name() }.to_owned();
        let file = walk::filename(base).map(|path| std::path::absolute(&path).unwrap_or(path));
        let relative = match (&given.backing_file, &file) {
            (None, Some(file)) => recorded_relative(lowest, file).await?,
            _ => None,
        };
        let given = given.backing_file.clone();
        Ok(Self { format, given, file, relative, base: base.name().to_owned() })
    }

    /// What `image` is to record.
    ///
    /// # Errors
    /// `NotSupported`: the base has no file name, and none is given.
    pub(crate) fn record_in(&self, image: &NodeRef) -> Result<BackingRecord> {
        let name = match (&self.given, &self.relative) {
            (Some(given), _) => given.clone(),
            (None, Some((name, dir))) if directory(image).as_ref() == Some(dir) => name.clone(),
            _ => match &self.file {
                Some(file) => file.clone().into_os_string(),
                None => {
                    let words =
                        "it has no file name that an image could record: give 'backing-file'";
                    return Err(Error::new(ErrorKind::NotSupported, words).node(&self.base));
                }
            },
        };
        Ok(BackingRecord { name, format: Some(self.format.clone()) })
    }
}

/// The directory that names recorded in the image are relative to.
fn directory(image: &NodeRef) -> Option<PathBuf> {
    let path = walk::filename(image)?;
    let path = std::path::absolute(&path).unwrap_or(path);
    path.parent().map(Path::to_owned)
}

/// The relative name under which `image` records `file`, if it does.
async fn recorded_relative(image: &NodeRef, file: &Path) -> Result<Option<(OsString, PathBuf)>> {
    let (Some(dir), Some(name)) = (directory(image), recorded(image).await?) else {
        return Ok(None);
    };
    let is_it = Path::new(&name.name).is_relative() && dir.join(&name.name) == file;
    Ok(is_it.then_some((name.name, dir)))
}

/// What the image records now.
pub(crate) async fn recorded(image: &NodeRef) -> Result<Option<BackingRecord>> {
    let options =
        BackendOptions { perm: Some(bds_core::graph::Perm::empty()), ..Default::default() };
    let info = Backend::new(image, options)?.info().await?;
    let format = info.backing_format;
    Ok(info.backing_file.map(|name| BackingRecord { name, format }))
}
