//! Persistent dirty bitmaps of raw images: in a sidecar file, with a write-intent log.
//!
//! The image has no place for an id, so the sidecar is tied to the file by its inode, its length,
//! and, after a clean close, by the time of its last change: if that is another one now, a program
//! that keeps no bitmaps has written to the file, and every bitmap that records becomes dirty as a
//! whole. What is not noticed: a program that writes to the file after a crash and before it is
//! opened here again, and anything that writes to a *device* directly (a device has no such time).
//!
//! A sidecar that is no log, or is damaged, is refused if an option names it; one that was found
//! beside the image is left alone with a warning, and the image has no persistent bitmaps.

use std::path::PathBuf;
use std::time::Duration;

use bds_core::bitmap::MAX_GRANULES;
use bds_core::bitmap::intent_log::{Facts, Found, IntentLog, Tie};
use bds_core::driver::{
    BitmapSpec, BitmapStore, BitmapToStore, BoxFuture, Driver, IntentStore, OpenContext,
    StoredBitmap,
};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::{FileKind, FileStat, Fs};
use serde_json::Value;

use super::RawNode;
use crate::format::bitmap_sidecar::{Sidecar, SidecarOption, snapshots, stored, to_json, without};

/// Longest name of a bitmap, and most bitmaps: as in qcow2, so that they can move there.
const MAX_NAME_LEN: usize = 1023;
const MAX_BITMAPS: usize = 65_535;
/// Most bytes of bits that the bitmaps of one image may have together.
const MAX_BITS_LEN: u64 = 512 << 20;
/// Filesystems count the time of a change in steps of up to 10 ms: a change after this long has
/// another one.
const TIME_STEP: Duration = Duration::from_millis(12);

/// The sidecar of a raw image.
pub(super) struct RawBitmaps {
    sidecar: Sidecar,
    fs: Fs,
    image: PathBuf,
    /// The user has named the sidecar.
    is_named: bool,
}

impl RawBitmaps {
    /// `None`: the image keeps no bitmaps, as it is no file, shows a part of one, or the user wants
    /// none. A device keeps them only where the user says so.
    pub(super) fn new(
        context: &OpenContext<'_>,
        option: &SidecarOption,
        image: Option<PathBuf>,
        is_window: bool,
        len: u64,
    ) -> Option<Self> {
        let image = image?;
        let is_named = matches!(option, SidecarOption::At(_));
        let is_file = || {
            let stat = context.fs.stat(&image);
            stat.is_ok_and(|stat| stat.kind == FileKind::Regular)
        };
        if !is_named && (is_window || !is_file()) {
            return None;
        }
        let path = option.path(Some(&image))?;
        let sidecar = Sidecar::new(context.fs, path, len);
        Some(Self { sidecar, fs: context.fs.clone(), image, is_named })
    }

    fn stat(&self) -> Result<FileStat> {
        self.fs.stat(&self.image).map_err(|error| Error::io(error, "cannot look at the image file"))
    }

    /// What ties the sidecar to the image as it is now.
    fn tie(&self) -> Result<Tie> {
        let FileStat { kind, identity: (_, inode), modified_ns, .. } = self.stat()?;
        match kind {
            FileKind::Regular => Ok(Tie { inode, modified_ns }),
            _ => Ok(Tie::default()),
        }
    }
}

/// Whether another program may have changed the disk.
fn is_foreign(found: &Found, now: Tie, len: u64) -> bool {
    let known = found.header.tie;
    let is_changed =
        found.is_clean() && (known.modified_ns != now.modified_ns || found.header.disk_len != len);
    known.inode != now.inode || is_changed
}

impl RawNode {
    fn bitmaps(&self) -> &RawBitmaps {
        self.bitmaps.as_ref().expect("asked for as a store only if it is one")
    }

    async fn load_bitmaps(&self) -> Result<Vec<StoredBitmap>> {
        let bitmaps = self.bitmaps();
        let found = match bitmaps.sidecar.read().await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Vec::new()),
            Err(error) if bitmaps.is_named => return Err(error),
            Err(error) => {
                let node = &self.node_name;
                tracing::warn!(node, %error, "raw: the file of the dirty bitmaps is not used");
                return Ok(Vec::new());
            }
        };
        let is_foreign = is_foreign(&found, bitmaps.tie()?, self.len());
        if is_foreign {
            let node = &self.node_name;
            tracing::warn!(
                node,
                "raw: another program wrote to the image; its bitmaps are all dirty"
            );
        }
        let is_exact = found.is_clean() && !is_foreign;
        let all = found.bitmaps(self.len(), is_foreign)?;
        Ok(all.into_iter().map(|bitmap| stored(bitmap, is_exact)).collect())
    }

    /// Facts about the bitmaps in the sidecar.
    pub(super) async fn logged_bitmaps(&self) -> Result<Vec<Value>> {
        let Some(bitmaps) = &self.bitmaps else { return Ok(Vec::new()) };
        let found = match bitmaps.sidecar.read().await {
            Ok(Some(found)) => found,
            Err(error) if bitmaps.is_named => return Err(error),
            _ => return Ok(Vec::new()),
        };
        let is_foreign = is_foreign(&found, bitmaps.tie()?, self.len());
        let is_exact = found.is_clean() && !is_foreign;
        let all = found.bitmaps(self.len(), is_foreign)?;
        Ok(all.iter().map(|bitmap| to_json(bitmap, is_exact)).collect())
    }

    /// Starts the log, in the state that was found in the file.
    async fn start_log(&self, all: &[BitmapToStore]) -> Result<()> {
        let bitmaps = self.bitmaps();
        let tie = Tie { modified_ns: 0, ..bitmaps.tie()? };
        let facts = |found: Option<&Found>| Facts {
            disk_id: found.map_or_else(bds_io::random_id, |found| found.header.disk_id),
            disk_len: self.len(),
            tie,
        };
        bitmaps.sidecar.start(all, |_| true, facts).await
    }

    async fn store_bitmaps(&self, all: &[BitmapToStore]) -> Result<()> {
        let Sidecar { log, .. } = &self.bitmaps().sidecar;
        if !log.is_started() && !log.is_given_up() {
            // Nothing has changed since they were loaded.
            return Ok(());
        }
        self.file.flush().await?;
        if all.is_empty() {
            log.stop().await;
            return self.bitmaps().sidecar.remove();
        }
        if log.is_given_up() {
            self.start_log(all).await?;
        }
        bds_io::sleep(TIME_STEP).await;
        let tie = self.bitmaps().tie()?;
        let finished = log.finish(self.len(), &snapshots(all), tie).await;
        finished.map_err(|error| self.bitmaps().sidecar.named(error))
    }

    async fn remove_bitmap(&self, name: &str) -> Result<()> {
        let Sidecar { log, .. } = &self.bitmaps().sidecar;
        if log.is_started() || log.is_given_up() {
            // The graph makes a checkpoint without it.
            return Ok(());
        }
        let Some(found) = self.bitmaps().sidecar.read().await? else { return Ok(()) };
        let is_foreign = is_foreign(&found, self.bitmaps().tie()?, self.len());
        let all = found.bitmaps(self.len(), is_foreign)?;
        if all.iter().any(|bitmap| *bitmap.name == *name) {
            self.start_log(&without(all, name)).await?;
        }
        Ok(())
    }

    async fn invalidate_log(&self) -> Result<()> {
        let bitmaps = self.bitmaps();
        if bitmaps.sidecar.log.is_started() {
            let done = bitmaps.sidecar.log.invalidate().await;
            return done.map_err(|error| bitmaps.sidecar.named(error));
        }
        match bitmaps.sidecar.read().await? {
            None => Ok(()),
            // The next change of the image gives it another time.
            Some(found) if found.is_clean() && found.header.tie.modified_ns != 0 => Ok(()),
            Some(_) => {
                let words = "it counts after a crash, so it must not become stale: make it writable, or remove it";
                Err(bitmaps.sidecar.named(Error::new(ErrorKind::Io, words)))
            }
        }
    }
}

impl BitmapStore for RawNode {
    fn load(&self) -> BoxFuture<'_, Result<Vec<StoredBitmap>>> {
        Box::pin(self.load_bitmaps())
    }

    fn can_store(&self, new: &BitmapSpec, others: &[BitmapSpec]) -> Result<()> {
        let refuse = |kind, words: &str| Err(Error::new(kind, words).node(&self.node_name));
        if new.name.is_empty() || new.name.len() > MAX_NAME_LEN {
            return refuse(ErrorKind::InvalidInput, "a bitmap's name has 1 to 1023 bytes");
        }
        if others.len() >= MAX_BITMAPS {
            let words = "Maximum number of persistent bitmaps is already reached";
            return refuse(ErrorKind::LimitExceeded, words);
        }
        let bits_len = |spec: &BitmapSpec| spec.len.div_ceil(u64::from(spec.granularity)) / 8;
        let all = others.iter().chain([new]).map(bits_len);
        let total = all.fold(0, u64::saturating_add);
        if total > MAX_BITS_LEN || bits_len(new) > MAX_GRANULES / 8 {
            let words = "Too much space will be occupied by the bitmap. Use larger granularity";
            return refuse(ErrorKind::LimitExceeded, words);
        }
        Ok(())
    }

    fn store<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.store_bitmaps(all))
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.remove_bitmap(name))
    }

    /// The log that the graph has started says it.
    fn mark_in_use(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn intent(&self) -> Option<&dyn IntentStore> {
        Some(self)
    }
}

impl IntentStore for RawNode {
    fn log(&self) -> &IntentLog {
        &self.bitmaps().sidecar.log
    }

    fn start<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(self.start_log(all))
    }

    fn checkpoint<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.file.flush().await?;
            let len = all.iter().find_map(|bitmap| Some(bitmap.bits.as_ref()?.len()));
            self.bitmaps().sidecar.checkpoint(len.unwrap_or(self.len()), all).await
        })
    }

    fn invalidate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.invalidate_log())
    }
}
