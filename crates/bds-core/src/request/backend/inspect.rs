//! Requests about the image as a whole or that change no byte of the disk: block status, image
//! information, check, the recorded backing file.

use super::{Backend, progress};
use crate::driver::{
    AmendControl, Amendment, BackingRecord, CheckReport, ImageInfo, Precision, StatusRun,
};
use crate::error::Result;
use crate::graph::NodeId;
use crate::request::admit::{enter, named};
use crate::request::status::{self, ChainRun, Depth};
use crate::request::{amend, backing_record};

impl Backend {
    /// Block status of `offset..` at the top layer alone. The run's `map` names a child of that
    /// layer.
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
    /// guest.write_at(65536, b"hello")?;
    /// let run = guest.layer_status(0, 1 << 20, Precision::Exact).await?;
    /// assert_eq!((run.len, run.flags), (65536, StatusFlags::empty()), "shows what lies below");
    /// let run = guest.layer_status(65536, 1 << 20, Precision::Exact).await?;
    /// assert_eq!(run.map.map(|map| map.child), Some("file"));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn layer_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<StatusRun> {
        let this = self.clone();
        let work = async move { status::of_layer(&this.inner.edge, offset, len, precision).await };
        bds_io::spawn_now(work).await
    }

    /// Block status of `offset..`, through the whole chain.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::Precision;
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
    /// guest.write_at(65536, b"hello")?;
    /// let run = guest.block_status(0, 1 << 20, Precision::Exact).await?;
    /// assert_eq!((run.len, run.depth, run.node), (65536, 1, base.id()));
    /// let run = guest.block_status(65536, 1 << 20, Precision::Exact).await?;
    /// assert_eq!((run.len, run.depth, run.node), (512, 0, top.id()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<ChainRun> {
        self.status_to(Depth::All, offset, len, precision).await
    }

    /// Block status of `offset..` in the layers above `base`, which is in the chain. Without
    /// `ALLOCATED`: none of them decides it.
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
    /// let run = guest.status_above(base.id(), 0, 1 << 20, Precision::Exact).await?;
    /// assert_eq!(run.len, 1 << 20);
    /// assert!(!run.flags.contains(StatusFlags::ALLOCATED), "all of it lies in 'base'");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn status_above(
        &self,
        base: NodeId,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<ChainRun> {
        self.status_to(Depth::Above(base), offset, len, precision).await
    }

    async fn status_to(
        &self,
        depth: Depth,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<ChainRun> {
        let this = self.clone();
        bds_io::spawn_now(async move {
            status::of_chain(&this.inner.edge, depth, offset, len, precision).await
        })
        .await
    }

    /// True if the range is known to read as zeros. A cheap answer: false if unknown.
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
    /// # for path in ["image0.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let options = "driver=qcow2,file.driver=file,file.filename=image0.qcow2";
    /// let empty = graph.open(Options::parse(options)?).await?;
    /// let guest = Backend::new(&empty, BackendOptions { writable: true, ..Default::default() })?;
    /// assert!(guest.is_zero(0, 1 << 20).await?, "nothing was written");
    /// guest.write_at(0, &[0; 512])?;
    /// assert!(!guest.is_zero(0, 1 << 20).await?, "bytes are not looked at");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let this = self.clone();
        let work = async move { status::is_zero(&this.inner.edge, offset, len).await };
        bds_io::spawn_now(work).await
    }

    /// Facts about the image.
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
    /// assert_eq!(guest.info().await?.backing_file, None, "no image names 'base': we did");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn info(&self) -> Result<ImageInfo> {
        let this = self.clone();
        bds_io::spawn_now(async move {
            let node = enter(&this.inner.edge).await?;
            named(&node, node.driver().info().await)
        })
        .await
    }

    /// Rewrites the backing file that the image itself records; `None`: it records none from then
    /// on. The graph does not change: which node serves as backing node is decided there
    /// ([`crate::graph::Change::set_backing`]). Flushes the node first, and is durable when it
    /// returns; a crash on the way leaves the old record or the new one.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::BackingRecord;
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
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let guest = Backend::new(&top, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.set_backing_record(Some(BackingRecord::new("base.raw", Some("raw")))).await?;
    /// assert_eq!(guest.info().await?.backing_file, Some("base.raw".into()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `PermissionDenied`, `ReadOnly`, `Inactive`: this backend may not write, not even unchanged
    /// bytes; `NotSupported`: the format records no backing file; `InvalidInput`, `NoSpace`: the
    /// record breaks a rule of the format or does not fit, nothing was written; and what a flush
    /// and writing the header can fail with.
    pub async fn set_backing_record(&self, record: Option<BackingRecord>) -> Result<()> {
        let this = self.clone();
        bds_io::spawn_now(async move { backing_record::set(&this.inner.edge, record).await }).await
    }

    /// Checks whether [`Backend::set_backing_record`] could be done now, as far as that depends on
    /// the record, the format and the space in the header. Writes nothing.
    ///
    /// # Errors
    /// `NotSupported`, `InvalidInput`, `NoSpace`, as above; what reading the header can fail with.
    pub async fn check_backing_record(&self, record: Option<BackingRecord>) -> Result<()> {
        let this = self.clone();
        let work = async move { backing_record::check(&this.inner.edge, record).await };
        bds_io::spawn_now(work).await
    }

    /// Changes format options of the image, such as its version or the width of its refcounts. What
    /// the guest reads stays the same. Other requests to the node wait meanwhile, which can be long
    /// for a large image. All options are checked before anything is written; the option `size`
    /// resizes the node, after the others took effect. Durable when it returns.
    ///
    /// A crash leaves the old options or the new ones (and, with `size`, the new ones with the old
    /// length). If the future is dropped, the work ends at its next step, or is completed if it was
    /// about to take effect.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::Amendment;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # let options = bds_core::Options::parse("size=1M")?;
    /// # let (format, path) = ("qcow2".into(), "disk.qcow2".into());
    /// # let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// # graph.create_image(image).await?;
    /// let options = "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2";
    /// let disk = graph.open(Options::parse(options)?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// guest.amend(Amendment::new(Options::parse("refcount_bits=64")?)).await?;
    /// let facts = guest.info().await?.format_specific.unwrap();
    /// assert_eq!(facts["data"]["refcount-bits"], 64);
    ///
    /// let error = guest.amend(Amendment::new(Options::parse("compat=0.10")?)).await.unwrap_err();
    /// assert!(error.to_string().contains("compat=0.10 requires refcount_bits=16"));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `PermissionDenied`, `ReadOnly`, `Inactive`: this backend may not write, not even unchanged
    /// bytes, or not resize; `NotSupported`, `InvalidInput`, `LimitExceeded`: the format has no
    /// such option, or this change is not possible, and nothing was written; `InUse`: resizing is
    /// blocked; `Cancelled`; and what reading and writing metadata can fail with.
    pub async fn amend(&self, amendment: Amendment) -> Result<()> {
        let this = self.clone();
        let mut cancel = CancelOnDrop(Some(amendment.control.clone()));
        let work = async move { amend::amend(&this.inner.edge, amendment).await };
        let result = bds_io::spawn_now(work).await;
        cancel.0 = None;
        result
    }

    /// Bytes the node occupies on its host, where that is known.
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
    /// assert_eq!(guest.allocated_len().await?, Some(0), "no page is written");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn allocated_len(&self) -> Result<Option<u64>> {
        let this = self.clone();
        bds_io::spawn_now(async move {
            let node = enter(&this.inner.edge).await?;
            named(&node, node.driver().allocated_len().await)
        })
        .await
    }

    /// Checks the image for leaks and corruption; changes nothing. `progress` gets (done, total)
    /// bytes of metadata.
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
    /// let error = guest.check(&|done, total| println!("{done} of {total}")).await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': mem has nothing to check");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn check(&self, progress: &(dyn Fn(u64, u64) + Send + Sync)) -> Result<CheckReport> {
        let this = self.clone();
        let (reporter, mut reported) = progress::channel();
        let check = bds_io::spawn_now(async move {
            let node = enter(&this.inner.edge).await?;
            named(&node, node.driver().check(&|done, total| reporter.report(done, total)).await)
        });
        reported.pass_on_until(check, progress).await
    }
}

/// Cancels an amendment whose caller is gone.
struct CancelOnDrop(Option<AmendControl>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            control.cancel();
        }
    }
}
