//! The end of a graph: exports, jobs, backends, monitor, then everything that is left over is named.
//!
//! The order is fixed. Exports first, because their clients' requests would wait at gates for ever; jobs next, because they hold
//! nodes and write; then backends lose their media, and the monitor its nodes. Whatever lives after that is a leak, and
//! the report says who holds it. Doing it twice does no harm: the second time finds less to do.

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
    /// How many references it has.
    pub count: usize,
    /// Those held by name.
    pub holders: Vec<HolderInfo>,
}

/// What a shutdown did.
#[derive(Debug)]
pub struct ShutdownReport {
    /// What exports, jobs and backends could not end in order: who, and why.
    pub failed: Vec<(String, Error)>,
    /// Nodes closed by it, and earlier closings that failed and that nobody asked about.
    pub closed: Vec<CloseReport>,
    /// Nodes still referred to. They stay usable until their holders let go.
    pub leaked: Vec<Leak>,
}

impl ShutdownReport {
    /// The leaks as a result.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let forgotten = open(&graph, "driver=memory,node-name=disk").await?;
    /// let error = graph.shutdown().await.check_leaks().unwrap_err();
    /// assert!(error.to_string().starts_with(
    ///     "still referenced: node 'disk' (1 references) by owner 'open' (since "
    /// ));
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// `InUse` names the nodes and who holds them since where.
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
    /// Has `who` told to stop when the graph shuts down. Kept weakly: who has gone by then is not asked.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// # let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// # use std::sync::{Arc, Mutex};
    /// struct Export(Mutex<Option<NodeRef>>);
    /// impl Stoppable for Export {
    ///     fn name(&self) -> String {
    ///         "export 'nbd0'".to_owned()
    ///     }
    ///     fn stop(&self) -> BoxFuture<'_, Result<()>> {
    ///         Box::pin(async { Ok(drop(self.0.lock().expect("nobody panics").take())) })
    ///     }
    /// }
    /// let export: Arc<dyn Stoppable> = Arc::new(Export(Mutex::new(Some(disk))));
    /// graph.on_shutdown(ShutdownStage::Exports, &export);
    /// graph.shutdown().await.check_leaks()?;
    /// # Ok(()) });
    /// ```
    pub fn on_shutdown(&self, stage: ShutdownStage, who: &Arc<dyn Stoppable>) {
        let mut names = self.lock_names();
        names.stoppable.retain(|(_, known)| known.strong_count() > 0);
        names.stoppable.push((stage, Arc::downgrade(who)));
    }

    /// Ends everything in the fixed order, closes what can be closed, and tells who keeps the rest open. Every backend loses its medium,
    /// whatever blocks that; a request that waits for a decision after an error fails with `Cancelled`. No node can be opened afterwards; a second call reports what has become of the rest. Waits for requests under way, never for queued ones.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// graph.add(Options::parse("driver=memory,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&graph.find("disk")?, BackendOptions::registered("guest"))?;
    /// let report = graph.shutdown().await;
    /// assert_eq!((report.closed.len(), report.leaked.len()), (1, 0));
    ///
    /// assert!(guest.node().is_none(), "the handle is valid, its medium is gone");
    /// assert!(open(&graph, "driver=memory").await.is_err(), "the graph has been shut down");
    /// assert!(graph.shutdown().await.closed.is_empty());
    /// # Ok(()) });
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
            for who in self.stoppable(stage) {
                if let Err(error) = who.stop().await {
                    failed.push((who.name(), error));
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
        at_stage.filter_map(|(_, who)| who.upgrade()).collect()
    }

    /// Nodes that are still referred to, by name.
    fn leaks(&self) -> Vec<Leak> {
        let arena = &self.0.core.arena;
        let leak = |handle| {
            let node = arena.acquire(handle).ok()?;
            let name = node.name().to_owned();
            // Not counting the reference that asks.
            let count = node.count().saturating_sub(1);
            (count > 0).then(|| Leak { node: node.id(), name, count, holders: node.holders() })
        };
        let mut leaked: Vec<Leak> = arena.snapshot().into_iter().filter_map(leak).collect();
        leaked.sort_by(|a, b| a.name.cmp(&b.name));
        leaked
    }
}
