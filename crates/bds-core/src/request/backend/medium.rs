//! Changes a backend's medium: insert, replace, eject, revoke.
//!
//! Each is a graph change: drained, checked, all or nothing.

use super::Backend;
use super::policy::ErrorPolicies;
use crate::error::Result;
use crate::graph::{BlockOps, Change, Expected, NodeRef, RootMove};

impl Backend {
    /// Inserts a medium. The backend takes a reference of its own. Turns writethrough mode on if
    /// the node's `cache.writeback` is off, and never turns it off.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// drive.insert(&disk).await?;
    /// let error = drive.insert(&disk).await.unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "backend 'cd0' has the medium 'disk': eject it first, or replace it"
    /// );
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: there is a medium, or the permissions conflict with another
    /// user's (which is named); `ReadOnly`, `Inactive`: the backend writes and the node cannot be
    /// written; `InvalidInput`: it belongs to another graph.
    #[track_caller]
    pub fn insert(&self, node: &NodeRef) -> impl Future<Output = Result<()>> + Send + '_ {
        let root = RootMove::new(&self.graph, &self.inner.edge, Some(node));
        self.put(!node.flags().cache.writeback, root.from(Expected::Nothing))
    }

    /// Inserts a medium, in place of the present one if there is one.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// drive.insert(&disk).await?;
    /// let other = graph.open(Options::parse("driver=mem,node-name=other,size=2M")?).await?;
    /// let mut events = graph.events();
    /// drive.replace_medium(&other).await?;
    /// assert_eq!(drive.len(), 2 << 20);
    /// assert_eq!(events.try_next().map(|event| event.name()), Some("BLOCK_MEDIUM_REPLACED"));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Backend::insert`]; `InUse` also if [`BlockOps::EJECT`] is blocked on the old one.
    #[track_caller]
    pub fn replace_medium(&self, node: &NodeRef) -> impl Future<Output = Result<()>> + Send + '_ {
        let root = RootMove::new(&self.graph, &self.inner.edge, Some(node));
        self.put(!node.flags().cache.writeback, root.from(Expected::Anything))
    }

    async fn put(&self, is_writethrough: bool, root: RootMove) -> Result<()> {
        let this = self.clone();
        bds_io::spawn_now(async move { this.put_here(is_writethrough, root).await }).await
    }

    async fn put_here(&self, is_writethrough: bool, root: RootMove) -> Result<()> {
        let was_on = self.is_writethrough();
        // Before the first write can enter; a few flushes too many if the change fails.
        self.set_writethrough(was_on || is_writethrough);
        let done = self.graph.change().move_root(root).commit().await;
        if done.is_err() {
            self.set_writethrough(was_on);
        }
        done.map(drop)
    }

    /// Takes the medium out and returns a reference to it; `None` if there was none. Waits for
    /// requests in flight; those that wait at the gate fail with `NoMedium`.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BlockOps;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// drive.insert(&disk).await?;
    /// let blocker = disk.block(BlockOps::EJECT, "a backup runs");
    /// let error = drive.eject().await.unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': eject is not possible now: a backup runs");
    ///
    /// drop(blocker);
    /// assert_eq!(drive.eject().await?.map(|node| node.id()), Some(disk.id()));
    /// assert!(drive.eject().await?.is_none());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: [`BlockOps::EJECT`] is blocked, or the edge is frozen (the
    /// message says by what and why).
    pub async fn eject(&self) -> Result<Option<NodeRef>> {
        self.take_out(BlockOps::EJECT).await
    }

    /// Takes the medium away from the user of the backend: QEMU's `drive_del`. A device stays
    /// attached: its handle is valid, and its requests fail with `NoMedium`. Sets
    /// [`ErrorPolicies::REPORT`] and resumes stopped requests, which then fail. Without a medium it
    /// does only that.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// drive.insert(&disk).await?;
    /// let device = drive.attach_device("virtio0")?;
    /// drive.revoke().await?; // the guest still has its device, and the device its backend
    /// let error = device.backend().read_at(0, &mut [0; 512]).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::NoMedium);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `InUse`: [`BlockOps::DELETE`] is blocked on the medium, or the edge is
    /// frozen.
    pub async fn revoke(&self) -> Result<()> {
        let this = self.clone();
        bds_io::spawn_now(async move { this.revoke_here().await }).await
    }

    async fn revoke_here(&self) -> Result<()> {
        let medium = self.take_out(BlockOps::DELETE).await?;
        self.set_policies(ErrorPolicies::REPORT);
        self.resume();
        drop(medium);
        Ok(())
    }

    /// Returns a reference to the node that was taken out, also if the medium is changed
    /// concurrently.
    async fn take_out(&self, blockers: BlockOps) -> Result<Option<NodeRef>> {
        loop {
            let Some(medium) = self.node() else { return Ok(None) };
            let expected = Expected::Node(medium.id());
            let root = RootMove::new(&self.graph, &self.inner.edge, None);
            let root = root.unless(blockers).from(expected);
            match self.graph.change().move_root(root).commit().await {
                Ok(_) => return Ok(Some(medium)),
                Err(error) if self.node().is_some_and(|now| now.id() == medium.id()) => {
                    return Err(error);
                }
                // The medium was changed concurrently: try again.
                Err(_) => {}
            }
        }
    }
}

impl Change {
    /// Inserts a medium into a backend that has none by then. [`Backend::insert`] as part of a
    /// larger change; leaves writethrough mode as it is.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// let filter = graph.open(Options::parse("driver=raw,node-name=filter,file=disk")?).await?;
    /// graph.change().insert_filter(&disk, &filter).insert(&drive, &filter).commit().await?;
    /// assert_eq!(drive.node().map(|node| node.id()), Some(filter.id()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[track_caller]
    pub fn insert(self, backend: &Backend, node: &NodeRef) -> Self {
        let root = RootMove::new(&backend.graph, &backend.inner.edge, Some(node));
        self.move_root(root.from(Expected::Nothing))
    }

    /// Takes the medium out of a backend, if it has one.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// drive.insert(&disk).await?;
    /// let report = graph.change().eject(&drive).remove(disk).commit().await?;
    /// assert_eq!(report.closed[0].name, "disk");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn eject(self, backend: &Backend) -> Self {
        self.move_root(RootMove::new(&backend.graph, &backend.inner.edge, None))
    }

    /// Takes the medium out of a backend whose user ends, if it has one. Unlike [`Change::eject`]
    /// it is not refused where [`BlockOps::EJECT`] is blocked: that keeps media in drives, and must
    /// not keep a job from ending.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::BlockOps;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let own = Backend::new(&disk, BackendOptions::default())?;
    /// let blocker = disk.block(BlockOps::EJECT, "it is exported");
    /// graph.change().eject(&own).commit().await.unwrap_err();
    /// graph.change().release_medium(&own).commit().await?;
    /// assert!(own.node().is_none());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn release_medium(self, backend: &Backend) -> Self {
        let root = RootMove::new(&backend.graph, &backend.inner.edge, None);
        self.move_root(root.unless(BlockOps::empty()))
    }
}
