//! Target files of a new image: claimed, compared with all open files, and then emptied.
//!
//! A claim does not change an existing file. Dropping a target that was not kept removes the file
//! if the claim created it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bds_io::{Fs, shares_bytes};

use super::inspect::Inspected;
use crate::driver::{BoxFuture, ClaimedFile, DriverType};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::Graph;
use crate::graph::query::walk;
use crate::options::Options;

/// A file for a new image.
pub(in crate::graph) struct Target {
    path: PathBuf,
    protocol: &'static str,
    identity: (u64, u64),
    max_len: Option<u64>,
    /// Empties it; taken once that is done. The mutex is never waited for: it makes a target
    /// `Sync`, so that a task may hold one by reference.
    empty: Mutex<Option<BoxFuture<'static, Result<()>>>>,
    made: CreatedFile,
}

impl Target {
    /// Opens or creates the file and locks it. Refuses one that an open node shows, or that shares
    /// bytes with `others`: emptying it would destroy what is read from there.
    pub(in crate::graph) fn claim(
        graph: &Graph,
        path: &Path,
        options: &mut Options,
        others: &[(u64, u64)],
    ) -> Result<Self> {
        let config = graph.config();
        // Before it is locked: the locks of our own nodes would only report that the file is
        // locked.
        refuse_shared(graph, path, others)?;
        let protocol = protocol_of(&config.fs, path);
        let driver = config.registry.driver(protocol)?;
        let ClaimedFile { made_path, identity, max_len, empty } =
            driver.claim_file(&config.fs, path, options)?;
        let made = CreatedFile { fs: config.fs.clone(), path: made_path };
        check_rest(&**driver, options)?;
        let path = path.to_owned();
        Ok(Self { path, protocol, identity, max_len, empty: Mutex::new(Some(empty)), made })
    }

    pub(in crate::graph) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    pub(in crate::graph) fn path(&self) -> &Path {
        &self.path
    }

    pub(in crate::graph) fn protocol(&self) -> &'static str {
        self.protocol
    }

    /// Refuses what cannot become `len` bytes long.
    pub(in crate::graph) fn check_len(&self, len: u64) -> Result<()> {
        match self.max_len {
            Some(max_len) if max_len < len => {
                let message = format!("the device is too small: the image needs {len} bytes");
                Err(Error::new(ErrorKind::NoSpace, message).file(&self.path).field("size", max_len))
            }
            _ => Ok(()),
        }
    }

    /// From here on the old content is gone.
    pub(in crate::graph) async fn empty(mut self) -> Result<Self> {
        let empty = self.empty.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(empty) = empty {
            empty.await?;
        }
        Ok(self)
    }

    /// The image is complete: the file stays.
    pub(in crate::graph) fn keep(mut self) {
        self.made.path = None;
    }
}

fn refuse_shared(graph: &Graph, path: &Path, others: &[(u64, u64)]) -> Result<()> {
    let Ok(file) = Inspected::new(&graph.config().fs, path.to_owned()) else { return Ok(()) };
    let shares = |other: &(u64, u64)| shares_bytes(file.identity(), *other);
    let shown =
        graph.nodes().into_iter().find(|node| node.own_identity().as_ref().is_some_and(shares));
    let as_what = match shown {
        Some(node) => match walk::filename(&node) {
            Some(name) => format!(", as '{}'", name.display()),
            None => format!(", as node '{}'", node.name()),
        },
        None if others.iter().any(shares) => String::new(),
        None => return Ok(()),
    };
    let message = format!(
        "the file is a part of an image that is used here already{as_what}: writing a new image to it would \
         destroy that; name another file"
    );
    Err(Error::new(ErrorKind::InvalidInput, message).file(path))
}

/// The driver for a file of this name.
pub(in crate::graph) fn protocol_of(fs: &Fs, path: &Path) -> &'static str {
    Inspected::new(fs, path.to_owned()).map_or("file", |file| file.protocol())
}

/// A created file; removed again unless it is kept.
struct CreatedFile {
    fs: Fs,
    path: Option<PathBuf>,
}

impl Drop for CreatedFile {
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

/// Refuses options that were not taken.
pub(super) fn check_rest(driver: &dyn DriverType, options: &Options) -> Result<()> {
    match options.keys().next() {
        Some(key) => Err(unknown(driver, key)),
        None => Ok(()),
    }
}

pub(super) fn unknown(driver: &dyn DriverType, key: &str) -> Error {
    let known: Vec<&str> = driver.create_options().iter().map(|spec| spec.name).collect();
    let message = format!(
        "{} images have no option '{key}' (there are: {})",
        driver.name(),
        known.join(", ")
    );
    Error::new(ErrorKind::InvalidInput, message)
}
