//! Implements the driver contract for qcow2 by delegation to [`Image`], and writes back everything
//! at flush and close.

use std::any::Any;
use std::sync::Arc;

use bds_core::driver::{
    Access, Amendment, Attempt, BackingRecord, BitmapStore, BoxFuture, CheckReport, Child, Driver,
    ImageInfo, Limits, NodeUse, Perm, Precision, ReadFlags, Reopen, ReopenContext, Role, StatusRun,
    Truncate, WriteFlags, ZeroFlags,
};
use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::check::compare::check_image;
use super::layout::cluster0::Cluster0;
use super::layout::header::{INCOMPATIBLE_AT, Incompatible};
use super::layout::space::MetaOffset;
use super::state::Image;
use super::task::detach_on_drop;

/// An open qcow2 image.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    pub(super) image: Arc<Image>,
}

impl Qcow2 {
    pub(crate) fn new(image: Image) -> Self {
        Self { image: Arc::new(image) }
    }

    /// Runs `work` on the image to completion, even if the caller is dropped.
    pub(super) fn run<T, F>(&self, work: impl FnOnce(Arc<Image>) -> F) -> BoxFuture<'_, Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let task_guard = self.image.tasks.begin();
        let work = work(Arc::clone(&self.image));
        Box::pin(detach_on_drop(async move {
            let result = work.await;
            drop(task_guard);
            result
        }))
    }
}

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn len(&self) -> u64 {
        self.image.disk_len()
    }

    fn limits(&self) -> Limits {
        let geometry = self.image.geometry();
        let fits = |size: u64| u32::try_from(size).expect("at most 2 MiB");
        Limits {
            zero_alignment: fits(geometry.subcluster_size()),
            discard_alignment: fits(geometry.cluster_size()),
            ..Limits::default()
        }
    }

    fn children_changed(&self) {
        self.image.children_changed();
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK)
    }

    /// The data file is zeroed first, then the entries: a write between the two would be in the
    /// file and not on the disk.
    fn serialises_zeroes(&self) -> bool {
        self.image.has_raw_data_file()
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.image.try_read(offset, iov)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.image.try_write(offset, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.image.read(offset, iov))
    }

    /// A write that does not change what is read must not show anything else after a crash either.
    fn write_flags(&self) -> WriteFlags {
        WriteFlags::UNCHANGED
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.image.write(offset, iov, flags.contains(WriteFlags::UNCHANGED)))
    }

    fn compressed_unit(&self) -> Option<u32> {
        let has_some = self.image.data_file.is_none();
        let size = self.image.geometry().cluster_size();
        has_some.then(|| u32::try_from(size).expect("at most 2 MiB"))
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.write_compressed(offset, iov).await })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        self.run(move |image| async move { image.write_zeroes(offset, len, flags).await })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        self.run(move |image| async move { image.discard(offset, len).await })
    }

    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        if !self.image.needs_write_back() {
            return Box::pin(async {
                self.image.check_flushable()?;
                self.image.take_write_back_error()
            });
        }
        self.run(|image| async move {
            image.check_flushable()?;
            let written = image.write_back(false).await;
            written.and(image.take_write_back_error())
        })
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        if !self.image.needs_flush() {
            return Box::pin(async { Ok(()) });
        }
        self.run(|image| async move {
            if image.flush_frees().await? {
                image.spawn_release();
            }
            Ok(())
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(self.image.status(offset, len, precision))
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        self.run(move |image| async move { image.resize(change).await })
    }

    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async {
            let image = &self.image;
            let info = super::manage::info::info(image.file.port(), &image.cluster0_now()).await?;
            Ok(ImageInfo { logged_bitmaps: image.logged_bitmaps().await, ..info })
        })
    }

    fn bitmap_store(&self) -> Option<&dyn BitmapStore> {
        Some(self)
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async {
            let of_file = self.image.file.allocated_len().await?;
            let of_data = match &self.image.data_file {
                Some(data) => data.allocated_len().await?,
                None => Some(0),
            };
            Ok(of_file.zip(of_data).map(|(file, data)| file.saturating_add(data)))
        })
    }

    fn check<'a>(
        &'a self,
        progress: &'a (dyn Fn(u64, u64) + Send + Sync),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        Box::pin(async move {
            // The check reads the file: all metadata must be written.
            self.run(|image| async move { image.write_all_metadata().await }).await?;
            let data_file = self.image.data_file.as_deref();
            check_image(self.image.file.port(), data_file, progress).await
        })
    }

    fn set_backing(&self, backing: Option<Child>) -> Result<Option<Child>> {
        self.image.set_backing(backing)
    }

    fn set_backing_record(&self, record: Option<BackingRecord>) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.set_backing_record(record).await })
    }

    fn check_backing_record(&self, record: Option<BackingRecord>) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.image.check_backing_record(record))
    }

    fn mark_base(&self, is_known: bool) -> BoxFuture<'_, Result<bool>> {
        self.run(move |image| async move { image.mark_base(is_known).await })
    }

    fn check_amend<'a>(&'a self, amendment: &'a Amendment) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { self.image.check_amend(amendment).await.map(drop) })
    }

    fn amend(&self, amendment: Amendment) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.amend(&amendment).await })
    }

    fn make_empty(&self) -> BoxFuture<'_, Result<()>> {
        self.run(|image| async move { image.make_empty().await })
    }

    fn child_access(&self, name: &str, role: Role, node: &NodeUse) -> Access {
        // Beside an external data file the image file holds metadata only.
        let is_metadata_only = name == "file" && self.image.data_file.is_some();
        let mut access =
            Access::of_child(if is_metadata_only { role - Role::DATA } else { role }, node);
        if name == "data-file" && node.is_writable && node.is_active {
            // Freed clusters are discarded there once no request can read them any more, also after
            // the last user has left.
            access.perm |= Perm::changes();
        }
        access
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(self.image.prepare_reopen(context))
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.image.inactivate())
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.image.activate())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.image.tasks.wait_idle().await;
            let image = Arc::clone(&self.image);
            detach_on_drop(async move { image.write_back_all().await }).await
        })
    }
}

impl Image {
    /// Is there metadata that a flush must write?
    fn needs_write_back(&self) -> bool {
        self.is_writable() && self.serves_io && self.has_unwritten(&self.meta())
    }

    /// Must the file be flushed for metadata or freed clusters?
    fn needs_flush(&self) -> bool {
        let meta = self.meta();
        !meta.frees_written.is_empty()
            || !meta.frees_durable.is_empty()
            || meta.pending_flush.needs_meta_flush()
    }

    /// Drops cached facts about children: they may be other nodes now.
    pub(crate) fn children_changed(&self) {
        self.forget_sparseness();
        // Reads and caches the length.
        self.backing.len();
    }

    /// Takes the first backing node, or gives the only one back.
    pub(crate) fn set_backing(&self, child: Option<Child>) -> Result<Option<Child>> {
        let refuse =
            |words: &str| Err(Error::new(ErrorKind::InvalidInput, words).node(&self.node_name));
        if child.is_some() && self.backing.is_some() {
            return refuse("the image has a backing node already");
        }
        if child.is_some() && self.has_raw_data_file() {
            return refuse("a raw data file and a backing node exclude each other");
        }
        Ok(self.backing.exchange(child))
    }

    /// A flush of a broken image must not claim that anything is safe.
    pub(super) fn check_flushable(&self) -> Result<()> {
        if self.is_writable() { self.check_usable() } else { Ok(()) }
    }

    /// Releases freed clusters in the background: only close waits for it.
    pub(super) fn spawn_release(self: &Arc<Self>) {
        let image = Arc::clone(self);
        let task_guard = self.tasks.begin();
        bds_io::spawn(async move {
            if let Err(error) = image.release().await {
                // They stay on the list; the next flush tries again, close reports it.
                tracing::warn!(node = image.node_name, %error, "qcow2: cannot release freed clusters");
            }
            // Close continues when it is dropped: nothing may hold the image then.
            drop(image);
            drop(task_guard);
        })
        .detach();
    }

    /// The header as it is by now.
    fn cluster0_now(&self) -> Cluster0 {
        let mut now = Cluster0::clone(&self.cluster0.load());
        let meta = self.meta();
        now.header.incompatible = meta.header.incompatible;
        now.header.autoclear = meta.header.autoclear;
        now.header.size = self.disk_len();
        now
    }

    /// Brings the file up to what is in memory, counts included.
    async fn write_all_metadata(self: &Arc<Self>) -> Result<()> {
        if !self.is_writable() || !self.serves_io {
            return Ok(());
        }
        self.check_usable()?;
        if self.needs_write_back() || self.needs_flush() || self.meta().counts.has_dirty() {
            self.write_back(true).await?;
            self.flush_and_release_frees().await?;
            // Counts that fell when clusters were released.
            self.write_back(true).await?;
        }
        Ok(())
    }

    /// Writes back everything, releases freed clusters and clears the dirty bit, as a clean close
    /// leaves an image. Also reports an earlier write-back that failed, if no flush has reported
    /// it.
    pub(super) async fn write_back_all(self: &Arc<Self>) -> Result<()> {
        let finished = self.write_all_and_clear_dirty_bit().await;
        finished.and(self.take_write_back_error())
    }

    async fn write_all_and_clear_dirty_bit(self: &Arc<Self>) -> Result<()> {
        /// Writes may go on meanwhile if the caller was dropped.
        const ATTEMPTS: usize = 8;
        for _ in 0..ATTEMPTS {
            self.write_all_metadata().await?;
            // While the lock is held, no write-back changes the file.
            let _lock = self.write_back_lock.lock().await;
            let bits = {
                let meta = self.meta();
                if !meta.header.is_dirty_marked {
                    return Ok(());
                }
                if self.has_unwritten(&meta) || meta.counts.has_dirty() {
                    continue;
                }
                meta.header.incompatible - Incompatible::DIRTY
            };
            // O9: all refcounts before the dirty bit is cleared.
            self.flush_meta().await?;
            self.write_file(MetaOffset(INCOMPATIBLE_AT), bits.bits().to_be_bytes().to_vec())
                .await?;
            let mut meta = self.meta();
            meta.header.incompatible -= Incompatible::DIRTY;
            meta.header.is_dirty_marked = false;
            return Ok(());
        }
        let words = "the image is written to faster than its metadata can be brought up to date";
        Err(Error::new(ErrorKind::InUse, words).node(&self.node_name))
    }
}
