//! The write-intent log of the bitmaps: in a sidecar file, so that programs that do not know it
//! find nothing that they could call a leak. The image is tied to it by a header extension with the
//! id of the session, which counts only while an autoclear bit of its own is set.
//!
//! ```text
//! start     log with a new id, durable ─► extension ─► bit ─► the stored bitmaps are marked in use
//! crash     marked in use + bit + id of the log: each bitmap is that of the log
//! store     the stored bitmaps are valid ─► bit cleared ─► log removed
//! ```
//!
//! A program that does not know the bit clears it before it writes, so the log is not believed
//! after that; to such a program the bitmaps are in use, which is true. A bitmap that is stored and
//! valid always wins over the log. Each step is flushed before the next.

use std::collections::BTreeSet;
use std::sync::Arc;

use bds_core::bitmap::intent_log::{Facts, Found, IntentLog, Tie};
use bds_core::driver::{BitmapToStore, BoxFuture, Driver, IntentStore, StoredBitmap};
use bds_core::error::Result;
use serde_json::Value;

use crate::format::bitmap_sidecar::{Sidecar, stored, to_json, without};
use crate::format::qcow2::driver::Qcow2;
use crate::format::qcow2::file_read::{read_bytes, read_cluster0};
use crate::format::qcow2::layout::cluster0::{Cluster0, Strictness};
use crate::format::qcow2::layout::extension::BitmapLogId;
use crate::format::qcow2::layout::header::{AUTOCLEAR_AT, Autoclear};
use crate::format::qcow2::state::Image;

impl Image {
    /// The id of the log that counts, if one does.
    fn log_id(&self) -> Option<BitmapLogId> {
        let counts = self.meta().header.autoclear.contains(Autoclear::BITMAP_LOG);
        self.cluster0.load().extensions.bitmap_log.filter(|_| counts)
    }

    /// What a crash has left in the log of this image.
    async fn crashed_log(&self, journal: &Sidecar) -> Result<Option<Found>> {
        let Some(BitmapLogId(id)) = self.log_id() else { return Ok(None) };
        Ok(journal.read().await?.filter(|found| found.header.disk_id == id))
    }

    /// Replaces bitmaps that are marked in use by those of the log that a crash has left, and adds
    /// those that were never stored. Returns the names of the former.
    pub(super) async fn recover_bitmaps(
        &self,
        loaded: &mut Vec<StoredBitmap>,
    ) -> BTreeSet<Vec<u8>> {
        let mut recovered = BTreeSet::new();
        let Some(journal) = &self.journal else { return recovered };
        let found = match self.crashed_log(journal).await {
            Ok(Some(found)) => found.bitmaps(self.disk_len(), false),
            Ok(None) => return recovered,
            Err(error) => Err(error),
        };
        let found = match found {
            Ok(found) => {
                self.bitmaps.set_log_known(true);
                found
            }
            Err(error) => {
                let node = &self.node_name;
                tracing::warn!(node, %error, "qcow2: the log of the bitmaps cannot be used");
                return recovered;
            }
        };
        for bitmap in found {
            match loaded.iter_mut().find(|it| *it.name == *bitmap.name) {
                None => loaded.push(stored(bitmap, false)),
                Some(known)
                    if known.bits.is_none() && known.granularity == bitmap.bits.granularity() =>
                {
                    recovered.insert(known.name.as_bytes().to_vec());
                    *known = stored(bitmap, false);
                }
                // It was stored after all.
                Some(_) => {}
            }
        }
        recovered
    }

    /// Facts about bitmaps that a crash has left in the log.
    pub(crate) async fn logged_bitmaps(&self) -> Vec<Value> {
        let Some(journal) = &self.journal else { return Vec::new() };
        let found = match self.crashed_log(journal).await {
            Ok(Some(found)) if !journal.log.is_started() => found,
            _ => return Vec::new(),
        };
        let all = found.bitmaps(self.disk_len(), false).unwrap_or_default();
        all.iter().map(|bitmap| to_json(bitmap, false)).collect()
    }

    /// Starts the log in the file, then lets the header say so.
    async fn start_log(&self, journal: &Sidecar, all: &[BitmapToStore]) -> Result<()> {
        self.check_usable()?;
        self.write_state.check().map_err(|error| self.name_error(error))?;
        let known = self.log_id();
        let mut id = [0; 16];
        let accept = |found: &Found| known == Some(BitmapLogId(found.header.disk_id));
        let facts = |found: Option<&Found>| {
            id = found.map_or_else(bds_io::random_id, |found| found.header.disk_id);
            Facts { disk_id: id, disk_len: self.disk_len(), tie: Tie::default() }
        };
        if known.is_some() && !self.crashed_log(journal).await?.is_some_and(|it| accept(&it)) {
            // The log that counts is gone: its id must not be found in another one.
            self.clear_log_bit().await?;
        }
        journal.start(all, accept, facts).await?;
        if self.log_id() == Some(BitmapLogId(id)) {
            return Ok(());
        }
        let entered = self.enter_log(BitmapLogId(id)).await;
        if entered.is_err() {
            journal.log.stop().await;
        }
        entered
    }

    /// Writes the log's id into the header, then sets the bit.
    async fn enter_log(&self, id: BitmapLogId) -> Result<()> {
        let _lock = self.write_back_lock.lock().await;
        let old = read_cluster0(self.file.port(), Strictness::Use).await?;
        let bytes = read_bytes(self.file.port(), 0, self.geometry().cluster_len()).await?;
        let list_at = usize::try_from(old.header.header_len).expect("inside a cluster");
        match BitmapLogId::find(&bytes, list_at) {
            Some(at) => self.write_header(at, id.0.to_vec()).await?,
            None => {
                let mut new = old.clone();
                new.extensions.bitmap_log = Some(id);
                self.rewrite_header(&bytes, &old, &new).await?;
            }
        }
        let mut known = Cluster0::clone(&self.cluster0.load());
        known.extensions.bitmap_log = Some(id);
        self.cluster0.store(Arc::new(known));
        self.bitmaps.set_log_known(true);
        self.write_log_bit(true).await
    }

    /// Clears the bit, durably, if it is set: the log does not count any more.
    async fn clear_log_bit(&self) -> Result<()> {
        let _lock = self.write_back_lock.lock().await;
        self.bitmaps.set_log_known(false);
        let is_set = self.meta().header.autoclear.contains(Autoclear::BITMAP_LOG);
        if is_set { self.write_log_bit(false).await } else { Ok(()) }
    }

    /// The write-back lock is held. In memory the bit is set as long as it may be in the file.
    async fn write_log_bit(&self, counts: bool) -> Result<()> {
        let mut bits = self.meta().header.autoclear;
        bits.set(Autoclear::BITMAP_LOG, counts);
        if counts {
            self.meta().header.autoclear |= Autoclear::BITMAP_LOG;
        }
        let at = usize::try_from(AUTOCLEAR_AT).expect("in the header");
        self.write_header(at, bits.bits().to_be_bytes().to_vec()).await?;
        self.meta().header.autoclear.set(Autoclear::BITMAP_LOG, counts);
        Ok(())
    }

    /// The bitmaps are stored: ends the use of the log.
    ///
    /// # Errors
    /// The header still names the log. That does no harm: what is stored is valid.
    pub(super) async fn end_log(&self) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let was_in_use = journal.log.is_started() || self.log_id().is_some();
        self.clear_log_bit().await?;
        journal.log.stop().await;
        if was_in_use && let Err(error) = journal.remove() {
            tracing::warn!(node = self.node_name, %error, "qcow2: the log of the bitmaps is left");
        }
        Ok(())
    }

    /// A stored bitmap was removed: what a crash has left of it must not come back.
    pub(super) async fn forget_in_log(&self, name: &str) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        if journal.log.is_started() {
            // The graph makes a checkpoint without it.
            return Ok(());
        }
        match self.crashed_log(journal).await? {
            None => Ok(()),
            Some(found) => {
                let all = found.bitmaps(self.disk_len(), false)?;
                self.start_log(journal, &without(all, name)).await
            }
        }
    }

    /// Is the log that the header names kept: then its bit stays when data changes.
    pub(crate) fn keeps_log_bit(&self) -> bool {
        self.journal.is_some() && self.bitmaps.is_log_known()
    }

    async fn checkpoint_log(
        self: &Arc<Self>,
        journal: &Sidecar,
        all: &[BitmapToStore],
    ) -> Result<()> {
        let len = all.iter().find_map(|bitmap| Some(bitmap.bits.as_ref()?.len()));
        journal.checkpoint(len.unwrap_or(self.disk_len()), all).await
    }
}

impl Qcow2 {
    fn journal(&self) -> &Sidecar {
        self.image.journal.as_ref().expect("asked for as a store only if it is one")
    }
}

impl IntentStore for Qcow2 {
    fn log(&self) -> &IntentLog {
        &self.journal().log
    }

    fn start<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        let all = all.to_vec();
        self.run(|image| async move {
            let _lock = image.prepare_lock.lock().await;
            let journal = image.journal.as_ref().expect("a store of a log");
            image.start_log(journal, &all).await
        })
    }

    fn checkpoint<'a>(&'a self, all: &'a [BitmapToStore]) -> BoxFuture<'a, Result<()>> {
        let all = all.to_vec();
        Box::pin(async move {
            self.flush_to_os().await?;
            if let Some(data) = &self.image.data_file {
                data.flush().await?;
            }
            self.image.file.flush().await?;
            self.flush_to_disk().await?;
            self.run(|image| async move {
                let journal = image.journal.as_ref().expect("a store of a log");
                image.checkpoint_log(journal, &all).await
            })
            .await
        })
    }

    fn invalidate(&self) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.clear_log_bit().await })
    }
}
