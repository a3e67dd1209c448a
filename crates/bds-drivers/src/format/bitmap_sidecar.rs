//! The sidecar: a file beside an image for the write-intent log of its dirty bitmaps
//! (`bds_core::bitmap::intent_log`). Finds, opens, creates and removes it; drivers tie it to their
//! images.
//!
//! Nothing is created before a bitmap needs it. A file that is no log is never overwritten. One
//! open writer at a time: it holds a lock on the first byte of the file.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bds_core::bitmap::intent_log::{Facts, Found, IntentLog, RecoveredBitmap, Shape, Snapshot};
use bds_core::driver::{BitmapToStore, StoredBitmap};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::{ByteLock, File, Fs, OpenOptions};
use serde_json::{Value, json};

/// Appended to an image's name.
const SUFFIX: &str = ".bds-cbt";
/// What a writer locks.
const LOCK: ByteLock = ByteLock { offset: 0, len: 1 };

/// The value of the option that names a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) enum SidecarOption {
    /// Beside the image, if that is a file.
    #[default]
    Auto,
    /// None.
    Off,
    /// This file.
    At(PathBuf),
}

impl SidecarOption {
    /// Reads the option's text.
    ///
    /// # Errors
    /// `InvalidInput`: it is empty.
    pub(crate) fn parse(name: &str, text: Option<String>) -> Result<Self> {
        match text.as_deref() {
            None | Some("auto") => Ok(Self::Auto),
            Some("off") => Ok(Self::Off),
            Some("") => {
                let words = format!("option '{name}' is auto, off, or the name of a file");
                Err(Error::new(ErrorKind::InvalidInput, words))
            }
            Some(path) => Ok(Self::At(path.into())),
        }
    }

    /// The file's name, for an image of this name; `None`: no log is kept.
    pub(crate) fn path(&self, image: Option<&Path>) -> Option<PathBuf> {
        match self {
            Self::Off => None,
            Self::At(path) => Some(path.clone()),
            Self::Auto => image.map(|image| {
                let mut name = OsString::from(image);
                name.push(SUFFIX);
                name.into()
            }),
        }
    }
}

/// The sidecar of an open image.
#[derive(Debug)]
pub(crate) struct Sidecar {
    fs: Fs,
    path: PathBuf,
    pub(crate) log: IntentLog,
}

impl Sidecar {
    /// For a disk of `disk_len` bytes. Does no I/O.
    pub(crate) fn new(fs: &Fs, path: PathBuf, disk_len: u64) -> Self {
        let log = IntentLog::new(Shape::for_disk(disk_len));
        Self { fs: fs.clone(), path, log }
    }

    /// What the file holds; `None`: there is none, or it was not finished.
    ///
    /// # Errors
    /// `InvalidImage`: it is no log, or is damaged. Those of the file.
    pub(crate) async fn read(&self) -> Result<Option<Found>> {
        match self.fs.open(&self.path, &OpenOptions::default()) {
            Ok(file) => Found::read(&file).await.map_err(|error| self.named(error)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.named(Error::io(error, "cannot open the log of bitmaps"))),
        }
    }

    /// Starts the log with these bitmaps. `accept` says whether what the file holds belongs to this
    /// disk and is continued; otherwise the file is made empty. `facts` gets what is continued.
    ///
    /// # Errors
    /// `InUse`: another program, or another node, uses the file. `InvalidImage`: it is no log.
    pub(crate) async fn start(
        &self,
        all: &[BitmapToStore],
        accept: impl FnOnce(&Found) -> bool,
        facts: impl FnOnce(Option<&Found>) -> Facts,
    ) -> Result<()> {
        let started = async {
            let file = self.open_to_write()?;
            let found = Found::read(&file).await?.filter(accept);
            let facts = facts(found.as_ref());
            self.log.start(file, found, facts, &snapshots(all)).await
        };
        started.await.map_err(|error| self.named(error))
    }

    fn open_to_write(&self) -> Result<File> {
        let cannot = |error: io::Error| Error::io(error, "cannot open the log of bitmaps to write");
        let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
        let file = self.fs.open(&self.path, &options).map_err(cannot)?;
        file.lock_shared(LOCK).map_err(cannot)?;
        if file.is_locked_by_others(LOCK).map_err(cannot)? {
            let words = "the log of bitmaps is used by another program or another node";
            return Err(Error::new(ErrorKind::InUse, words));
        }
        Ok(file)
    }

    /// Stores exact bitmaps in the log, which is started.
    pub(crate) async fn checkpoint(&self, disk_len: u64, all: &[BitmapToStore]) -> Result<()> {
        let done = self.log.checkpoint(disk_len, &snapshots(all)).await;
        done.map_err(|error| self.named(error))
    }

    /// Removes the file, if there is one.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn remove(&self) -> Result<()> {
        match self.fs.remove(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(self.named(Error::io(error, "cannot remove the log of bitmaps")))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn named(&self, error: Error) -> Error {
        error.field("bitmap log", self.path.display())
    }
}

/// Bitmaps as the log takes them. Those that are inconsistent have nothing to be logged.
pub(crate) fn snapshots(all: &[BitmapToStore]) -> Vec<Snapshot> {
    let snapshot = |bitmap: &BitmapToStore| {
        let bits = Arc::clone(bitmap.bits.as_ref()?);
        Some(Snapshot { name: Arc::clone(&bitmap.name), is_enabled: bitmap.is_enabled, bits })
    };
    all.iter().filter_map(snapshot).collect()
}

/// The bitmaps of a log without one of them.
pub(crate) fn without(all: Vec<RecoveredBitmap>, name: &str) -> Vec<BitmapToStore> {
    let kept = all.into_iter().filter(|bitmap| *bitmap.name != *name);
    kept.map(|bitmap| BitmapToStore {
        name: bitmap.name,
        granularity: bitmap.bits.granularity(),
        is_enabled: bitmap.is_enabled,
        bits: Some(Arc::new(bitmap.bits)),
    })
    .collect()
}

/// A bitmap of a log, for the graph. `is_exact`: the disk was closed.
pub(crate) fn stored(bitmap: RecoveredBitmap, is_exact: bool) -> StoredBitmap {
    StoredBitmap {
        name: bitmap.name.to_string(),
        granularity: bitmap.bits.granularity(),
        is_enabled: bitmap.is_enabled,
        recovered_bytes: (!is_exact).then_some(bitmap.added_bytes),
        bits: Some(bitmap.bits),
    }
}

/// A bitmap of a log, for `info`. `is_exact`: the disk was closed.
pub(crate) fn to_json(bitmap: &RecoveredBitmap, is_exact: bool) -> Value {
    let flags: &[&str] = if bitmap.is_enabled { &["auto"] } else { &[] };
    let mut value = json!({
        "name": *bitmap.name,
        "granularity": bitmap.bits.granularity(),
        "flags": flags,
        "count": bitmap.bits.dirty_bytes(),
    });
    if !is_exact {
        value["recovered-bytes"] = bitmap.added_bytes.into();
    }
    value
}
