//! Drained sections for callers: a node, a subtree or all nodes, kept drained while a guard lives;
//! and giving up on a node.

use std::pin::pin;
use std::time::Duration;

use bds_refcount::Strong;
use futures_util::future::{Either, select};

use super::set::{DrainSet, Drained, wait_idle};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::model::node::{Node, NodeId};
use crate::graph::query::walk;
use crate::graph::{Graph, NodeRef};

impl Graph {
    /// Waits until no request is inside `node` nor above it, and keeps new ones waiting at the
    /// gates until the guard is dropped. Waiting requests do not fail; they go on afterwards.
    ///
    /// Never blocks the thread. Waits as long as the slowest request inside: see
    /// [`Graph::drain_within`] and [`NodeRef::poison`].
    ///
    /// The section begins with the first poll and lasts until the future, or its guard, is dropped.
    /// A future that is kept without being polled becomes a section all the same: requests for the
    /// node wait, everything else goes on.
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
    /// let guest = Backend::new(&top, BackendOptions::registered("guest"))?;
    /// let drained = graph.drain(&base).await;
    /// assert_eq!(top.in_flight(), 0, "what lies above is drained too");
    ///
    /// let (late, iov) = (guest.clone(), bds_io::Buf::zeroed(512, 512).iov());
    /// let read = bds_io::spawn(async move { late.read(0, iov).await });
    /// assert_eq!(guest.in_flight(), 0, "it waits at the gate: queued is not in flight");
    /// drop(drained);
    /// read.await?; // and was not failed
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn drain(&self, node: &NodeRef) -> Drained {
        self.drain_nodes(vec![Strong::clone(node.strong())]).await
    }

    /// In a task, so that the references and queue places it holds on its way are released even if
    /// its future is not polled.
    async fn drain_nodes(&self, nodes: Vec<Strong<Node>>) -> Drained {
        let graph = self.clone();
        let drain = async move {
            Drained::new(DrainSet::begin(&graph, nodes, "drained section").await, false)
        };
        bds_io::spawn_now(drain).await
    }

    /// As [`Graph::drain`], for the node and everything below it.
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
    /// let beside = Backend::new(&base, BackendOptions::registered("beside"))?;
    /// let drained = graph.drain_subtree(&top).await;
    /// assert_eq!((top.quiesce_count() > 0, base.quiesce_count() > 0), (true, true));
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// assert!(beside.try_read(0, &iov).is_none(), "'drain(&top)' would admit it");
    /// drop(drained);
    /// assert!(beside.try_read(0, &iov).is_some());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn drain_subtree(&self, node: &NodeRef) -> Drained {
        let mut nodes = Vec::new();
        walk::each_below_strong(node.strong(), &mut |node| nodes.push(Strong::clone(node)));
        self.drain_nodes(nodes).await
    }

    /// As [`Graph::drain`], for all nodes, also those opened meanwhile. Keeps no node open: nodes
    /// that die during the section are closed after it.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let drained = graph.drain_all().await;
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// assert_eq!(disk.quiesce_count(), 1, "drained from the start");
    /// drop(drained);
    /// assert_eq!(disk.quiesce_count(), 0);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn drain_all(&self) -> Drained {
        let graph = self.clone();
        bds_io::spawn_now(async move { drain_all(&graph).await }).await
    }

    /// As [`Graph::drain`], but stops waiting after `timeout`; the gates are open again then.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let options = "driver=null-co,node-name=disk,size=1M,latency-ns=1000000000000";
    /// let disk = graph.open(Options::parse(options)?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// let read = bds_io::spawn(async move { guest.read(0, iov).await });
    /// # while disk.in_flight() == 0 { bds_io::yield_now().await }
    /// let limit = std::time::Duration::from_millis(5);
    /// let error = graph.drain_within(&disk, limit).await.unwrap_err();
    /// assert!(error.to_string().contains("1 requests are still inside after 5 ms"), "{error}");
    /// assert_eq!(disk.quiesce_count(), 0, "the gates are open again");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `WouldWait` names the node and how many requests are still inside.
    pub async fn drain_within(&self, node: &NodeRef, timeout: Duration) -> Result<Drained> {
        let (graph, node) = (self.clone(), Strong::clone(node.strong()));
        bds_io::spawn_now(async move { drain_within(&graph, &node, timeout).await }).await
    }
}

async fn drain_all(graph: &Graph) -> Drained {
    let set = DrainSet::new(graph);
    let all = {
        let mut lock = graph.0.core.lock();
        lock.state.drain_alls += 1;
        let all = graph.0.core.live();
        all.iter().for_each(|node| lock.begin_section(node));
        all.iter().map(|node| node.id()).collect::<Vec<NodeId>>()
    };
    let drained = Drained::new(set, true);
    wait_idle(graph, &all).await;
    drained
}

async fn drain_within(graph: &Graph, node: &Strong<Node>, timeout: Duration) -> Result<Drained> {
    let drain = pin!(graph.drain_nodes(vec![Strong::clone(node)]));
    let end = pin!(bds_io::sleep(timeout));
    match select(drain, end).await {
        Either::Left((drained, _)) => Ok(drained),
        Either::Right(_) => {
            let count = node.tracker().in_flight();
            let message = format!(
                "{count} requests are still inside after {} ms; wait longer, or poison the node \
                 if they will never end",
                timeout.as_millis()
            );
            Err(Error::new(ErrorKind::WouldWait, message).node(node.name()))
        }
    }
}

impl NodeRef {
    /// Poisons the node, because requests inside it never end (a device that is gone): no drain
    /// waits for them any more, and new requests fail. A poisoned node can only be replaced and
    /// closed. Memory of stuck requests stays theirs.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let options = "driver=null-co,node-name=disk,size=1M,latency-ns=1000000000000";
    /// let disk = graph.open(Options::parse(options)?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let iov = bds_io::Buf::zeroed(512, 512).iov();
    /// let read = bds_io::spawn(async move { guest.read(0, iov).await });
    /// # while disk.in_flight() == 0 { bds_io::yield_now().await }
    /// disk.poison();
    /// drop(graph.drain(&disk).await); // does not wait for the request that is stuck
    /// let late = Backend::new(&disk, BackendOptions::registered("late"))?;
    /// let error = late.read_at(0, &mut [0; 512]).unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::Io);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn poison(&self) {
        self.node().set_poisoned();
    }

    /// The number of reasons for the node to be drained. For diagnostics: outdated on return.
    ///
    /// ```
    /// use bds_core::Options;
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
    /// let (first, second) = (graph.drain(&base).await, graph.drain(&base).await);
    /// assert_eq!((base.quiesce_count(), top.quiesce_count()), (2, 1), "once per edge");
    /// drop((first, second));
    /// assert_eq!((base.quiesce_count(), top.quiesce_count()), (0, 0));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn quiesce_count(&self) -> u32 {
        self.node().quiesce_count()
    }

    /// Requests inside the node. For diagnostics: outdated on return. For a drained node it is 0,
    /// but for moments in which a request on another thread counts in and out again because it
    /// finds the gate closed.
    pub fn in_flight(&self) -> usize {
        self.node().tracker().in_flight()
    }

    /// Writes that have ended inside the node since it was opened, failed ones too; wraps around.
    /// Tells by two calls whether it was written to in between.
    pub fn writes_ended(&self) -> u64 {
        self.node().tracker().writes()
    }
}
