//! Making an image, as `qemu-img create` does it.
//!
//! ```text
//! backing image opened read-only, for its length ─► file made ─► data file made
//!   ─► both opened for writing ─► format writes the image ─► flushed, closed
//! ```
//!
//! A failure, or dropping the future, removes the files that were made here, and only those: a file that was there before
//! stays, though it may have been emptied.

use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bds_io::{Fs, OpenOptions};
use bds_refcount::{Holder, HolderKind};

use super::gate::{self, GateDecision, GateQuestion, ReferenceFormat};
use super::inspect::{Inspected, file_options};
use super::open::SweepIfDropped;
use super::perm::{Access, Perm};
use super::{Graph, NodeRef, Root};
use crate::driver::{Child, CreateContext, DriverType, OpenFlags, ReferenceKind, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// What image to make.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The format's name.
    pub format: String,
    /// The file to hold it. Emptied if it is there.
    pub path: PathBuf,
    /// The format's create options (`size`, `backing_file`, `backing_fmt`, `data_file` and so on) and those of the protocol,
    /// if it knows them and the format does not.
    pub options: Options,
    /// Do not look at the backing image; then `size` must be given.
    pub skip_backing: bool,
}

/// What came of it.
#[derive(Debug)]
pub struct NewImageReport {
    /// Why the backing image could not be opened, if it could not and `size` was given.
    pub backing_error: Option<Error>,
}

impl Graph {
    /// Makes an image file. A relative `backing_file` starts at the image's directory, a relative `data_file` at the
    /// working directory, here as when it is opened; the backing image is opened through the gate.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let image = NewImage {
    ///     format: "layer".into(),
    ///     path: "disk.img".into(),
    ///     options: Options::parse("size=1G")?,
    ///     skip_backing: false,
    /// };
    /// // With a driver that can, the file would be there now.
    /// let error = graph.create_image(image).await.unwrap_err();
    /// assert_eq!(error.to_string(), "disk.img: layer images cannot be created");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// No file that was not there before remains.
    pub async fn create_image(&self, image: NewImage) -> Result<NewImageReport> {
        let NewImage { format, path, mut options, skip_backing } = image;
        let registry = Arc::clone(&self.config().registry);
        let format = Arc::clone(registry.format(&format)?);
        if format.create_options().is_empty() {
            let words = format!("{} images cannot be created", format.name());
            return Err(Error::new(ErrorKind::NotSupported, words).file(&path));
        }
        let protocol_name = protocol_of(&self.config().fs, &path);
        let protocol = Arc::clone(registry.driver(protocol_name)?);
        let mut file_options = split_options(&*format, &*protocol, &mut options)?;
        let (backing_len, backing_error) = match skip_backing {
            true => (None, None),
            false => self.look_at_backing(&path, &options).await?,
        };
        let made = self.make_file(&*protocol, &path, &mut file_options).await?;
        check_rest(&*protocol, &file_options)?;
        let mut guard = SweepIfDropped { graph: self, is_over: false };
        let written = self.write_image(&*format, protocol_name, &path, options, backing_len).await;
        if written.is_err() {
            self.0.reaper.sweep_unasked().await;
        }
        guard.is_over = true;
        written.map_err(|error| error.file(&path))?;
        made.keep();
        Ok(NewImageReport { backing_error })
    }

    /// Opens what was made, lets the format write, closes.
    async fn write_image(
        &self,
        format: &dyn DriverType,
        protocol: &str,
        path: &Path,
        mut options: Options,
        backing_len: Option<u64>,
    ) -> Result<()> {
        let data_path = data_path(path, &options);
        let mut made_data = None;
        if let Some(data_path) = &data_path {
            let driver = Arc::clone(self.config().registry.driver("file")?);
            made_data = Some(self.make_file(&*driver, data_path, &mut Options::new()).await?);
        }
        let metadata =
            if data_path.is_some() { Role::METADATA } else { Role::METADATA | Role::DATA };
        let file = self.open_made(protocol, path, metadata | Role::PRIMARY).await?;
        let data_file = match &data_path {
            Some(data_path) => Some(self.open_made("file", data_path, Role::DATA).await?),
            None => None,
        };
        let context = CreateContext {
            file: self.child_for_create("file", &file)?,
            data_file: match &data_file {
                Some(node) => Some(self.child_for_create("data-file", node)?),
                None => None,
            },
            backing_len,
            options: &mut options,
        };
        format.create(context).await?;
        check_rest(format, &options)?;
        for node in data_file.into_iter().chain([file]) {
            let report = node.close().await.map_err(Error::from)?;
            report.into_result()?;
        }
        if let Some(made) = made_data {
            made.keep();
        }
        Ok(())
    }

    async fn open_made(&self, protocol: &str, path: &Path, role: Role) -> Result<NodeRef> {
        let flags = OpenFlags { role, ..OpenFlags::default() };
        let node = self.open_as(file_options(protocol, path), flags, Location::caller()).await?;
        Ok(node.held_as(Holder::new(HolderKind::Owner, "create")))
    }

    fn child_for_create(&self, name: &'static str, node: &NodeRef) -> Result<Child> {
        let access = Access { perm: Perm::all(), shared: Perm::CONSISTENT_READ };
        let root =
            Root { kind: HolderKind::Owner, name: "create", access, stays: true, is_hall: false };
        let edge = self.attach_root(Some(node), &root)?;
        Ok(Child::new(name, (self.0.reaper.make_port)(edge)))
    }

    /// Makes the file, of length 0.
    async fn make_file(
        &self,
        protocol: &dyn DriverType,
        path: &Path,
        options: &mut Options,
    ) -> Result<MadeFile> {
        let fs = self.config().fs.clone();
        let was_there = match fs.open(path, &OpenOptions::default()) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        };
        let made = MadeFile { fs, path: (!was_there).then(|| path.to_owned()) };
        protocol.create_file(&made.fs, path, options).await?;
        Ok(made)
    }

    /// The backing image's length, if one is named; or why it is not known, if a size is given.
    async fn look_at_backing(
        &self,
        path: &Path,
        options: &Options,
    ) -> Result<(Option<u64>, Option<Error>)> {
        let Some(stored) = options.peek_path("backing_file") else { return Ok((None, None)) };
        let looked = self.backing_len(path, &stored, text(options, "backing_fmt")).await;
        match looked {
            Ok(len) => Ok((Some(len), None)),
            // That it would back itself is wrong whatever its size.
            Err(error) if options.contains("size") && error.kind() != ErrorKind::InvalidInput => {
                Ok((None, Some(error)))
            }
            Err(error) => Err(error),
        }
    }

    async fn backing_len(&self, path: &Path, stored: &Path, format: Option<&str>) -> Result<u64> {
        let resolved = gate::resolve(ReferenceKind::Backing, stored, Some(path));
        let question = GateQuestion {
            kind: ReferenceKind::Backing,
            stored_name: stored.as_os_str(),
            stored_format: format,
            depth: 0,
            parent_node: "create",
            parent_file: Some(path),
            resolved: &resolved,
            fs: &self.config().fs,
        };
        let named = |error: Error| {
            error.context(format_args!("cannot open backing file '{}'", stored.display()))
        };
        let (backing, wanted) = match self.config().gate.decide(&question) {
            GateDecision::Open { path, format } => (path, format),
            GateDecision::Node(name) => return Ok(self.find(&name).map_err(named)?.len()),
            GateDecision::Refuse(why) => {
                let words = format!("{why}; give a size and do not look at it, or allow it");
                return Err(named(Error::new(ErrorKind::ReferenceRefused, words)));
            }
        };
        let file = Inspected::new(&self.config().fs, backing).map_err(named)?;
        let own = Inspected::new(&self.config().fs, path.to_owned());
        if own.is_ok_and(|own| own.identity() == file.identity()) {
            let words = "an image cannot be its own backing file";
            return Err(Error::new(ErrorKind::InvalidInput, words).file(path));
        }
        let format = match (wanted, format) {
            (ReferenceFormat::Named(name), _) => name,
            (_, Some(stored)) => stored.to_owned(),
            (_, None) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "a backing file needs its format: give 'backing_fmt'",
                )
                .file(path));
            }
        };
        self.config().registry.format(&format)?;
        let tree = Options::new().with("driver", format).with("file", file.options().into_json());
        let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
        let node = self.open_as(tree, flags, Location::caller()).await.map_err(named)?;
        let len = node.len();
        node.close().await.map_err(Error::from)?.into_result()?;
        Ok(len)
    }
}

/// A file that was not there before; removed again unless it is kept.
struct MadeFile {
    fs: Fs,
    path: Option<PathBuf>,
}

impl MadeFile {
    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for MadeFile {
    fn drop(&mut self) {
        let Some(path) = &self.path else { return };
        match self.fs.remove(path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a half-made file");
            }
        }
    }
}

fn protocol_of(fs: &Fs, path: &Path) -> &'static str {
    Inspected::new(fs, path.to_owned()).map_or("file", |file| file.protocol())
}

fn data_path(path: &Path, options: &Options) -> Option<PathBuf> {
    let name = options.peek_path("data_file")?;
    Some(gate::resolve(ReferenceKind::DataFile, name, Some(path)))
}

fn text<'a>(options: &'a Options, key: &str) -> Option<&'a str> {
    options.peek(key).and_then(|value| value.as_str())
}

/// Takes out what only the protocol knows. The rest is the format's; what nobody knows is refused.
fn split_options(
    format: &dyn DriverType,
    protocol: &dyn DriverType,
    options: &mut Options,
) -> Result<Options> {
    let knows = |driver: &dyn DriverType, key: &str| {
        driver.create_options().iter().any(|spec| {
            spec.name == key || spec.name.split_once('.').is_some_and(|(group, _)| group == key)
        })
    };
    let keys: Vec<String> = options.keys().map(str::to_owned).collect();
    let mut taken = Options::new();
    for key in keys {
        if knows(format, &key) {
            continue;
        }
        if !knows(protocol, &key) {
            return Err(unknown(format, &key));
        }
        if let Some(value) = options.take(&key) {
            taken.set(&key, value);
        }
    }
    Ok(taken)
}

fn check_rest(driver: &dyn DriverType, options: &Options) -> Result<()> {
    match options.keys().next() {
        Some(key) => Err(unknown(driver, key)),
        None => Ok(()),
    }
}

fn unknown(driver: &dyn DriverType, key: &str) -> Error {
    let known: Vec<&str> = driver.create_options().iter().map(|spec| spec.name).collect();
    let words = format!(
        "{} images have no option '{key}' (there are: {})",
        driver.name(),
        known.join(", ")
    );
    Error::new(ErrorKind::InvalidInput, words)
}
