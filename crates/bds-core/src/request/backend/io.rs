//! The public requests of a backend: read, write, zero, discard, flush, copy, resize.
//!
//! A request that the inline path declines runs in a task from its first poll on
//! (`bds_io::spawn_now`), and the caller's future is the handle of that task. A request in flight
//! holds what others wait for: its in-flight counts, its range, the turn of a flush, a driver's
//! guards. Because a task polls it, keeping the future without polling it (as `select!` does) or
//! forgetting it holds up no other request; dropping it cancels the request.

use bds_io::{Buf, IoVec};

use super::execute::Request;
use super::{Backend, Inner};
use crate::driver::{Attempt, Truncate, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::request::range::CheckedRange;
use crate::request::{dispatch, empty, offload, truncate};
use crate::stats::{Operation, Outcome};

impl Backend {
    /// Reads at once if that needs no waiting, without allocating. `None`: call
    /// [`Backend::read_waiting`]; the buffer may be partly filled.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// assert!(guest.try_read(0, &iov).is_some(), "memory has nothing to wait for");
    /// let drained = graph.drain(&disk).await;
    /// assert!(guest.try_read(0, &iov).is_none(), "the gate is closed: 'read' would wait");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[inline]
    pub fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let inner = &*self.inner;
        let began = inner.stats.clock();
        dispatch::try_read(&inner.edge, offset, iov, |result| match result {
            Ok(()) => {
                inner.stats.ended(Operation::Read, iov.len() as u64, Outcome::Done, began);
                Some(Ok(()))
            }
            Err(error) => inner.account_inline_failure(Operation::Read, error, began),
        })?
    }

    /// Writes in place at once if that needs no waiting, without allocating. `None`: nothing was
    /// changed for good, call [`Backend::write_waiting`].
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::WriteFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let iov = bds_io::Buf::from_slice(b"hello").iov();
    /// match guest.try_write(0, &iov) {
    ///     Some(written) => written?,
    ///     None => guest.write_waiting(0, iov, WriteFlags::empty()).await?,
    /// }
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[inline]
    pub fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.is_writethrough() {
            return None;
        }
        let inner = &*self.inner;
        let began = inner.stats.clock();
        dispatch::try_write(&inner.edge, offset, iov, |result| match result {
            Ok(()) => {
                inner.stats.ended(Operation::Write, iov.len() as u64, Outcome::Done, began);
                Some(Ok(()))
            }
            Err(error) => inner.account_inline_failure(Operation::Write, error, began),
        })?
    }

    /// Fills `iov` from `offset`.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// guest.read(0, iov.clone()).await?;
    /// assert!(iov.is_zero(0..512), "nothing was written there");
    ///
    /// let error = guest.read(guest.len() - 1, iov).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::OutOfRange);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `NoMedium`, `OutOfRange`, the medium's error if [`super::ErrorPolicies`] reports it,
    /// `Cancelled` if the graph was shut down while the request waited for its turn. The same for
    /// every request here.
    pub async fn read(&self, offset: u64, iov: IoVec) -> Result<()> {
        if let Some(result) = self.try_read(offset, &iov) {
            return result;
        }
        self.read_waiting(offset, iov).await
    }

    /// As [`Backend::read`], but does not try [`Backend::try_read`] first: for a caller that just
    /// did.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// match guest.try_read(0, &iov) {
    ///     Some(read) => read?,
    ///     None => guest.read_waiting(0, iov).await?,
    /// }
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn read_waiting(&self, offset: u64, iov: IoVec) -> Result<()> {
        self.execute(Request::read(offset, iov)).await.map(drop)
    }

    /// Copies what the node shows of `offset..` but does not hold itself from the layers below into
    /// it; returns no bytes. Needs a writable backend, although reads give the same bytes before
    /// and after.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::{Precision, StatusFlags};
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let guest = Backend::new(&top, BackendOptions { writable: true, ..Default::default() })?;
    /// let run = guest.layer_status(0, 8192, Precision::Exact).await?;
    /// assert!(!run.flags.contains(StatusFlags::ALLOCATED));
    /// guest.copy_up(0, 8192).await?;
    /// let run = guest.layer_status(0, 8192, Precision::Exact).await?;
    /// assert!(run.flags.contains(StatusFlags::ALLOCATED));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        self.execute(Request::copy_up(offset, len, None)).await.map(drop)
    }

    /// As [`Backend::copy_up`] of `iov.len()` bytes, with `iov` as the memory for them where whole
    /// units of the node are copied: saves the copy an allocation. Write nothing to it until the
    /// copy has ended, which may be after this future was dropped: the node would then hold those
    /// bytes. Afterwards its content is undefined.
    ///
    /// # Errors
    /// As [`Backend::copy_up`].
    pub async fn copy_up_in(&self, offset: u64, iov: IoVec) -> Result<()> {
        self.execute(Request::copy_up(offset, iov.len() as u64, Some(iov))).await.map(drop)
    }

    /// Writes `iov` at `offset`.
    ///
    /// ```
    /// use bds_core::driver::WriteFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let hello = bds_io::Buf::from_slice(b"hello").iov();
    /// guest.write(4096, hello.clone(), WriteFlags::FUA).await?; // durable when it returns
    ///
    /// let reader = Backend::new(&disk, BackendOptions::default())?;
    /// let error = reader.write(4096, hello, WriteFlags::empty()).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::PermissionDenied, "it is not writable");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<()> {
        if flags.is_empty()
            && let Some(result) = self.try_write(offset, &iov)
        {
            return result;
        }
        self.write_waiting(offset, iov, flags).await
    }

    /// As [`Backend::write`], but does not try [`Backend::try_write`] first: for a caller that just
    /// did.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::WriteFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let iov = bds_io::Buf::from_slice(b"hello").iov();
    /// match guest.try_write(0, &iov) {
    ///     Some(written) => written?,
    ///     None => guest.write_waiting(0, iov, WriteFlags::empty()).await?,
    /// }
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn write_waiting(
        &self,
        offset: u64,
        iov: IoVec,
        mut flags: WriteFlags,
    ) -> Result<()> {
        flags.set(WriteFlags::FUA, flags.contains(WriteFlags::FUA) || self.is_writethrough());
        self.execute(Request::write(offset, iov, flags)).await.map(drop)
    }

    /// Writes one compressed cluster (or the image's tail); an empty `iov` at the end pads the
    /// file.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let cluster = bds_io::Buf::zeroed(4096, 4096).iov();
    /// let error = guest.write_compressed(0, cluster).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::NotSupported, "memory has no clusters");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn write_compressed(&self, offset: u64, iov: IoVec) -> Result<()> {
        self.execute(Request::write_compressed(offset, iov)).await.map(drop)
    }

    /// Makes the range read as zeros. `Unsupported` only with `NO_FALLBACK`.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::{Attempt, ZeroFlags};
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(0, b"hello")?;
    /// let done = guest.write_zeroes(0, 4096, ZeroFlags::empty()).await?;
    /// assert_eq!(done, Attempt::Done, "mem frees whole pages");
    /// let done = guest.write_zeroes(0, 4096, ZeroFlags::NO_FALLBACK).await?;
    /// assert_eq!(done, Attempt::Done, "no zeros were written from a buffer");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mut flags: ZeroFlags,
    ) -> Result<Attempt> {
        flags.set(ZeroFlags::FUA, flags.contains(ZeroFlags::FUA) || self.is_writethrough());
        self.execute(Request::write_zeroes(offset, len, flags)).await
    }

    /// Discards a range that is no longer needed; advisory, and ignored unless the node was opened
    /// with `discard=unmap`.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(0, b"hello")?;
    /// guest.discard(0, 4096).await?;
    /// let mut bytes = [0; 5];
    /// guest.read_at(0, &mut bytes)?;
    /// assert_eq!(&bytes, b"hello", "the disk was opened without 'discard=unmap'");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.execute(Request::discard(offset, len)).await.map(drop)
    }

    /// Makes every write durable that ended before.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let text = "driver=blkdebug,node-name=disk,image.driver=mem,image.size=1M,\
    ///     inject-error.0.iotype=flush";
    /// let disk = graph.open(Options::parse(text)?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.flush().await?; // nothing was written: nothing to do
    /// guest.write_at(0, b"hello")?;
    /// let error = guest.flush().await.unwrap_err();
    /// assert_eq!(error.message(), "injected error");
    /// let error = guest.flush().await.unwrap_err();
    /// assert!(error.to_string().contains("an earlier flush failed"), "it stays so");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn flush(&self) -> Result<()> {
        self.execute(Request::flush()).await.map(drop)
    }

    /// Copies `len` bytes from `source` at `source_offset` to `offset` here on the host (copy
    /// offload). `Unsupported`: use buffers; part of the bytes may have been copied. Failures are
    /// reported whatever the error policy: it applies when the bytes go through buffers.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::Attempt;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let source = Backend::new(&base, BackendOptions::default())?;
    /// let target = Backend::new(&top, BackendOptions { writable: true, ..Default::default() })?;
    /// let copied = target.copy_range_from(&source, 0, 0, 4096).await?;
    /// assert_eq!(copied, Attempt::Unsupported, "only files can");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn copy_range_from(
        &self,
        source: &Backend,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<Attempt> {
        let (this, source) = (self.clone(), source.clone());
        bds_io::spawn_now(async move {
            let pending = this.inner.stats.begin(Operation::Write, len);
            source.inner.check_range_now(source_offset, len)?;
            this.inner.check_range_now(offset, len)?;
            let (from, to) = (&source.inner.edge, &this.inner.edge);
            let copied = pending.end(offload::copy(from, source_offset, to, offset, len).await)?;
            if copied == Attempt::Done && this.is_writethrough() {
                let _done = this.execute_here(Request::flush()).await?;
            }
            Ok(copied)
        })
        .await
    }

    /// Makes the whole image show its backing node: it holds nothing itself from then on. For an
    /// image whose contents were committed; flush the node below before.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let guest = Backend::new(&top, BackendOptions { writable: true, ..Default::default() })?;
    /// let hello = bds_io::Buf::from_slice(b"hello").iov();
    /// guest.write(0, hello, Default::default()).await?;
    /// guest.make_empty().await?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// guest.read(0, iov.clone()).await?;
    /// assert!(iov.is_zero(0..512), "as 'base'");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `PermissionDenied`, `ReadOnly`, `Inactive`: this backend may not write; `NotSupported`: the
    /// format cannot do that.
    pub async fn make_empty(&self) -> Result<()> {
        let this = self.clone();
        bds_io::spawn_now(async move { empty::make_empty(&this.inner.edge).await }).await
    }

    /// Changes the length.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::{Prealloc, Truncate};
    /// use bds_core::graph::BlockOps;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let change = Truncate::to(2 << 20);
    /// let blocker = disk.block(BlockOps::RESIZE, "a backup runs");
    /// let error = guest.truncate(change).await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': resize is not possible now: a backup runs");
    ///
    /// drop(blocker);
    /// guest.truncate(change).await?;
    /// assert_eq!(guest.len(), 2 << 20);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Also `InUse`: [`crate::graph::BlockOps::RESIZE`] is blocked on the medium.
    pub async fn truncate(&self, change: Truncate) -> Result<()> {
        let this = self.clone();
        let work = async move { truncate::truncate_for_user(&this.inner.edge, change).await };
        bds_io::spawn_now(work).await
    }

    /// Reads into `out`, through a copy. Blocks this thread.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// let mut bytes = [1; 4];
    /// guest.read_at(0, &mut bytes)?;
    /// assert_eq!(bytes, [0; 4]);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let iov = Buf::zeroed(out.len(), 4096).iov();
        bds_io::block_on(self.read(offset, iov.clone()))?;
        iov.copy_to(0, out);
        Ok(())
    }

    /// Writes `bytes`, through a copy. Blocks this thread.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(4096, b"hello")?;
    /// let mut bytes = [0; 7];
    /// guest.read_at(4095, &mut bytes)?;
    /// assert_eq!(&bytes, b"\0hello\0");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        bds_io::block_on(self.write(offset, Buf::from_slice(bytes).iov(), WriteFlags::empty()))
    }

    /// Makes every write durable that ended before. Blocks this thread.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.write_at(0, b"hello")?;
    /// guest.flush_blocking()?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn flush_blocking(&self) -> Result<()> {
        bds_io::block_on(self.flush())
    }
}

impl Inner {
    fn check_range_now(&self, offset: u64, len: u64) -> Result<()> {
        match self.edge.medium() {
            Some(node) => CheckedRange::inside(&node, offset, len).map(drop),
            // The request itself fails with `NoMedium`.
            None => Ok(()),
        }
    }
}
