//! Sweeps: closing all dead nodes, one after the other, and keeping the reports that no caller
//! waits for.

use std::collections::HashSet;
use std::sync::{MutexGuard, PoisonError};

use bds_refcount::{Dead, Handle};

use super::report::CloseReport;
use super::run_to_end::run_to_end;
use crate::graph::core::{Graph, GraphCore, Shared};
use crate::graph::model::node::Node;

impl GraphCore {
    /// Closes all dead nodes that can be closed now, and those that die of that.
    pub(in crate::graph) async fn sweep(self) -> Vec<CloseReport> {
        let _one_at_a_time = self.sweeping.lock().await;
        let mut reports = Vec::new();
        let mut waiting = std::mem::take(&mut *self.lock_deferred()).into_iter();
        while let Some(dead) =
            waiting.next().or_else(|| self.arena.reap_one().map(|(_, dead)| dead))
        {
            match self.begin_node_close(dead) {
                Ok(closing) => reports.push(self.close_node(closing).await.0),
                Err(dead) => self.lock_deferred().push(dead),
            }
        }
        reports
    }

    /// Closes one dead node and what dies of it. Other dead nodes are closed too, but reported
    /// apart.
    pub(super) async fn close_with_dependents(self, dead: Dead<Node>) -> CloseReport {
        let closing = self.begin_node_close_when_undrained(dead).await;
        let _one_at_a_time = self.sweeping.lock().await;
        let (mut report, died) = self.close_node(closing).await;
        let mut ours: HashSet<Handle<Node>> = died.into_iter().collect();
        while let Some((handle, dead)) = self.arena.reap_one() {
            let is_ours = ours.remove(&handle);
            let dead = match self.begin_node_close(dead) {
                Ok(closing) => closing,
                Err(dead) => {
                    self.lock_deferred().push(dead);
                    continue;
                }
            };
            let (other, died) = self.close_node(dead).await;
            if is_ours {
                ours.extend(died);
                report.below.push(other);
            } else {
                self.keep_reports(vec![other]);
            }
        }
        report
    }

    /// A drained section has ended: wakes waiters, and closes dead nodes that waited for it.
    pub(in crate::graph) fn drain_ended(&self) {
        self.topology.drain_progress.notify_waiters();
        if !self.lock_deferred().is_empty() {
            self.sweep_now_in_background();
        }
    }

    fn lock_deferred(&self) -> MutexGuard<'_, Vec<Dead<Node>>> {
        self.deferred.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps reports of failed closings for [`Graph::reports`]; traces all.
    pub(in crate::graph) fn keep_reports(&self, reports: Vec<CloseReport>) {
        for report in reports {
            let name = &report.name;
            if report.is_clean() {
                tracing::debug!(node = %name, "node closed");
                continue;
            }
            for error in report.errors() {
                tracing::error!(node = %name, %error, "closing a node failed");
            }
            self.kept_reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
        }
    }

    fn take_kept_reports(&self) -> Vec<CloseReport> {
        std::mem::take(&mut self.kept_reports.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Closes dead nodes without a caller that wants the reports.
    pub(in crate::graph) async fn sweep_and_keep(&self) {
        if self.arena.has_dead() {
            let core = self.clone();
            let sweep = async move {
                let reports = core.clone().sweep().await;
                core.keep_reports(reports);
                Vec::new()
            };
            drop(self.run_to_end(sweep).await);
        }
    }

    /// As [`GraphCore::sweep_and_keep`], without waiting.
    pub(in crate::graph) fn sweep_in_background(&self) {
        if self.arena.has_dead() {
            self.sweep_now_in_background();
        }
    }

    fn sweep_now_in_background(&self) {
        let core = self.clone();
        bds_io::spawn(async move {
            let reports = core.clone().sweep().await;
            core.keep_reports(reports);
        })
        .detach();
    }

    /// The graph is gone: closes dead nodes, and those that die when the last detached operation
    /// ends.
    pub(in crate::graph) fn close_remaining(&self) {
        let is_held = self.live().iter().any(|node| node.tracker().detached() > 0);
        if !is_held {
            return self.sweep_in_background();
        }
        let core = self.clone();
        bds_io::spawn(async move {
            core.wait_all_detached_ops().await;
            let reports = core.clone().sweep().await;
            core.keep_reports(reports);
        })
        .detach();
    }

    pub(super) async fn run_to_end(
        &self,
        work: impl Future<Output = Vec<CloseReport>> + Send + 'static,
    ) -> Option<Vec<CloseReport>> {
        let core = self.clone();
        run_to_end(work, move |reports| core.keep_reports(reports)).await
    }
}

impl Graph {
    /// Closes all dead nodes and reports them, a node before the children that only it held. Also
    /// returns reports of earlier failures that were not returned yet. Waits for operations whose
    /// requests were dropped, if nothing else keeps their node open.
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
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     file.node-name=file";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// drop(top); // neither waits nor does I/O
    /// let names: Vec<String> = graph.reap().await.into_iter().map(|report| report.name).collect();
    /// assert_eq!(names, ["top", "file"]);
    /// assert!(graph.reap().await.is_empty(), "each is reported once");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub async fn reap(&self) -> Vec<CloseReport> {
        let core = self.0.core.clone();
        let sweep = async move {
            core.wait_all_detached_ops().await;
            core.sweep().await
        };
        let swept = self.0.core.run_to_end(sweep).await;
        let mut reports = self.reports();
        reports.extend(swept.unwrap_or_default());
        reports
    }

    /// Reports of closings that failed while no caller waited for them: as a side effect of another
    /// call, or after the caller's future was dropped. Each is returned once.
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
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// Backend::new(&disk, writer)?.write_at(0, b"x")?;
    /// drop(disk); // something was written to it, and it will fail to flush
    /// let options = "driver=mem";
    /// let other = graph.open(Options::parse(options)?).await?; // closes what is dead, in passing
    ///
    /// let reports = graph.reports();
    /// let error = reports[0].flush_error.as_ref().expect("fail-flush=on");
    /// assert_eq!(error.message(), "injected error");
    /// assert!(graph.reports().is_empty());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn reports(&self) -> Vec<CloseReport> {
        self.0.core.take_kept_reports()
    }
}

/// Reports on their way to a caller. Dropped before they are delivered: kept for
/// [`Graph::reports`].
pub(in crate::graph) struct Undelivered {
    core: GraphCore,
    reports: Vec<CloseReport>,
}

impl Undelivered {
    pub(in crate::graph) fn new(core: &GraphCore) -> Self {
        Self { core: core.clone(), reports: Vec::new() }
    }

    pub(in crate::graph) fn push(&mut self, report: CloseReport) {
        self.reports.push(report);
    }

    pub(in crate::graph) fn extend(&mut self, reports: Vec<CloseReport>) {
        self.reports.extend(reports);
    }

    pub(in crate::graph) fn deliver(mut self) -> Vec<CloseReport> {
        std::mem::take(&mut self.reports)
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        self.core.keep_reports(std::mem::take(&mut self.reports));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Only the monitor's list and detached operations can still hold nodes; what is dead and
        // not yet closed must still be flushed.
        let (owned, backends) = {
            let mut names = self.core.lock_names();
            (std::mem::take(&mut names.monitor), std::mem::take(&mut names.owned_backends))
        };
        drop((backends, owned));
        self.core.close_remaining();
    }
}
