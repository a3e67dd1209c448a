//! Shuts a graph down: exports, jobs, backends, monitor; then reports every node that is left over.
//!
//! The order is fixed. Exports first, because their clients' requests would wait at gates for ever;
//! jobs next, because they hold nodes and write; then backends lose their media, and the monitor
//! its nodes. A node that lives after that is a leak, and the report names its holders. A second
//! shutdown does no harm.

use std::sync::Arc;

use bds_refcount::HolderInfo;

use super::report::CloseReport;
use super::stoppable::{ShutdownStage, Stoppable};
use super::sweep::Undelivered;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::graph::Graph;
use crate::graph::model::node::NodeId;

/// A node that outlived its graph's shutdown.
#[derive(Debug)]
pub struct Leak {
    /// The node's id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Its number of references.
    pub count: usize,
    /// The holders that have a name.
    pub holders: Vec<HolderInfo>,
}

/// The outcome of a shutdown.
#[derive(Debug)]
pub struct ShutdownReport {
    /// Names of exports, jobs and backends that could not stop in order, with the reason.
    pub failed: Vec<(String, Error)>,
    /// Nodes closed by it, and earlier failed closings that were not reported yet.
    pub closed: Vec<CloseReport>,
    /// Nodes with references left. They stay usable until their holders drop them.
    pub leaked: Vec<Leak>,
}

impl ShutdownReport {
    /// `Err` if nodes are left over.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let forgotten = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let error = graph.shutdown().await.check_leaks().unwrap_err();
    /// assert!(error.to_string().starts_with(
    ///     "still referenced: node 'disk' (1 references) by owner 'open' (since "
    /// ));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InUse` names the nodes, their holders, and where the holders took them.
    pub fn check_leaks(&self) -> Result<()> {
        if self.leaked.is_empty() {
            return Ok(());
        }
        let message: Vec<String> = self.leaked.iter().map(Leak::message).collect();
        Err(Error::new(ErrorKind::InUse, format!("still referenced: {}", message.join("; "))))
    }
}

impl Leak {
    fn message(&self) -> String {
        let holders: Vec<String> = self.holders.iter().map(ToString::to_string).collect();
        format!("node '{}' ({} references) by {}", self.name, self.count, holders.join(", "))
    }
}

impl Graph {
    /// Registers a user of nodes that is stopped when the graph shuts down. Kept weakly: a user
    /// that is gone by then is skipped.
    ///
    /// ```
    /// use bds_core::driver::BoxFuture;
    /// use bds_core::graph::{NodeRef, ShutdownStage, Stoppable};
    /// use bds_core::{Options, Result};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// # let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// # use std::sync::{Arc, Mutex};
    /// struct Export(Mutex<Option<NodeRef>>);
    /// impl Stoppable for Export {
    ///     fn name(&self) -> String {
    ///         "export 'nbd0'".to_owned()
    ///     }
    ///     fn stop(&self) -> BoxFuture<'_, Result<()>> {
    ///         Box::pin(async { Ok(drop(self.0.lock().expect("no thread panics").take())) })
    ///     }
    /// }
    /// let export: Arc<dyn Stoppable> = Arc::new(Export(Mutex::new(Some(disk))));
    /// graph.on_shutdown(ShutdownStage::Exports, &export);
    /// graph.shutdown().await.check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn on_shutdown(&self, stage: ShutdownStage, user: &Arc<dyn Stoppable>) {
        let mut names = self.lock_names();
        names.stoppable.retain(|(_, known)| known.strong_count() > 0);
        names.stoppable.push((stage, Arc::downgrade(user)));
    }

    /// Stops all users in the fixed order, closes what can be closed, and names the holders of the
    /// rest. Every backend loses its medium, whatever blocks that; a request that waits for a
    /// decision after an error fails with `Cancelled`. No node can be opened afterwards; a second
    /// call reports what has become of the rest. Waits for requests under way, not for queued ones.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// graph.add(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&graph.find("disk")?, BackendOptions::registered("guest"))?;
    /// let report = graph.shutdown().await;
    /// assert_eq!((report.closed.len(), report.leaked.len()), (1, 0));
    ///
    /// assert!(guest.node().is_none(), "the handle is valid, its medium is gone");
    /// let late = graph.open(Options::parse("driver=mem")?).await;
    /// assert!(late.is_err(), "the graph has been shut down");
    /// assert!(graph.shutdown().await.closed.is_empty());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn shutdown(&self) -> ShutdownReport {
        let graph = self.clone();
        let (failed, closed, leaked) =
            bds_io::spawn_now(async move { graph.shut_down().await }).await;
        ShutdownReport { failed, closed: closed.deliver(), leaked }
    }

    async fn shut_down(&self) -> (Vec<(String, Error)>, Undelivered, Vec<Leak>) {
        self.lock_names().is_shut_down = true;
        let mut failed = Vec::new();
        for stage in [ShutdownStage::Exports, ShutdownStage::Jobs, ShutdownStage::Backends] {
            for user in self.stoppable(stage) {
                if let Err(error) = user.stop().await {
                    failed.push((user.name(), error));
                }
            }
        }
        failed.extend(self.detach_backends().await);
        let owned = std::mem::take(&mut self.lock_names().monitor);
        drop(owned);
        let mut closed = Undelivered::new(&self.0.core);
        closed.extend(self.reap().await);
        self.0.core.events.emit(|| Event::GraphShutdown);
        (failed, closed, self.leaks())
    }

    fn stoppable(&self, stage: ShutdownStage) -> Vec<Arc<dyn Stoppable>> {
        let names = self.lock_names();
        let at_stage = names.stoppable.iter().filter(|(known, _)| *known == stage);
        at_stage.filter_map(|(_, user)| user.upgrade()).collect()
    }

    /// Nodes that still have references, sorted by name.
    fn leaks(&self) -> Vec<Leak> {
        let arena = &self.0.core.arena;
        let leak = |handle| {
            let node = arena.acquire(handle).ok()?;
            let name = node.name().to_owned();
            // Without the reference taken here.
            let count = node.count().saturating_sub(1);
            (count > 0).then(|| Leak { node: node.id(), name, count, holders: node.holders() })
        };
        let mut leaked: Vec<Leak> = arena.snapshot().into_iter().filter_map(leak).collect();
        leaked.sort_by(|a, b| a.name.cmp(&b.name));
        leaked
    }
}
