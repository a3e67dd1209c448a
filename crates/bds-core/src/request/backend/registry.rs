//! Registers backends with the graph: finds them by name, lists them, and lets the monitor own
//! some.
//!
//! A backend's name is informative only, unless it was made with
//! [`super::BackendOptions::claims_name`]: a tool may open ten backends "cli" at once, or some
//! without a name. A claimed name shares the namespace of node names, checked from both sides, and
//! is free again once the last handle is dropped.

use std::any::Any;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use bds_refcount::Release;
use serde_json::{Value, json};

use super::{Backend, Inner};
use crate::error::Result;
use crate::graph::{BackendEntry, Edge, Graph, NodeRef, Reservation, no_backend, walk};

impl BackendEntry for Inner {
    fn name(&self) -> &str {
        &self.name
    }

    fn edge(&self) -> &Arc<Edge> {
        &self.edge
    }

    fn set_writethrough(&self, is_on: bool) {
        self.is_writethrough.store(is_on, Ordering::Relaxed);
    }

    fn device(&self) -> Option<Arc<str>> {
        self.state().device.clone()
    }

    fn end(&self) {
        if let Some(in_flight) = self.edge.backend_in_flight() {
            in_flight.end();
        }
        self.resume();
    }

    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

impl Backend {
    /// Registers it with the graph.
    pub(super) fn publish(graph: &Graph, inner: &Arc<Inner>, claimed: Option<Reservation>) {
        let entry: Weak<Inner> = Arc::downgrade(inner);
        if let Some(claimed) = claimed {
            claimed.publish_backend(entry.clone());
        }
        graph.register_backend(entry);
    }

    /// True if [`Graph::backend`] finds it by its name.
    pub fn claims_name(&self) -> bool {
        self.inner.claims_name
    }

    /// The medium as the user knows it: below implicit filters, which jobs insert.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::OpenFlags;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// let flags = OpenFlags { is_implicit: true, ..OpenFlags::default() };
    /// let jobs = graph.open_with(Options::parse("driver=raw,file=disk")?, flags).await?;
    /// drive.insert(&jobs).await?;
    /// assert_eq!(drive.shown_node().map(|node| node.id()), Some(disk.id()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn shown_node(&self) -> Option<NodeRef> {
        let mut node = self.node()?;
        while node.flags().is_implicit {
            let Some(below) = walk::next_below(&node) else { break };
            node = below;
        }
        Some(node)
    }
}

fn backend(graph: &Graph, entry: Arc<dyn BackendEntry>) -> Option<Backend> {
    let inner = entry.into_any().downcast::<Inner>().ok()?;
    Some(Backend { inner, graph: graph.clone() })
}

impl Graph {
    /// Returns a handle to the backend that claims this name.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// let drive = Backend::empty(&graph, BackendOptions::registered("drive0"))?;
    /// let again = graph.backend("drive0")?;
    /// assert!(Backend::empty(&graph, BackendOptions::registered("drive0")).is_err(), "taken");
    /// drop((drive, again));
    /// assert!(graph.backend("drive0").is_err(), "free with the last handle");
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `NotFound`.
    pub fn backend(&self, name: &str) -> Result<Backend> {
        self.backend_entry(name)
            .and_then(|entry| backend(self, entry))
            .ok_or_else(|| no_backend(name))
    }

    /// Returns a handle to every backend, with or without a name, in order of their creation.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let one = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// let two = Backend::empty(&graph, BackendOptions::default())?;
    /// let names: Vec<String> = graph.backends().iter().map(|b| b.name().to_owned()).collect();
    /// assert_eq!(names, ["cd0", ""]);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn backends(&self) -> Vec<Backend> {
        self.backend_entries().into_iter().filter_map(|entry| backend(self, entry)).collect()
    }

    /// Moves a handle to the monitor's list: the backend lives at least until
    /// [`Graph::del_backend`].
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// graph.own_backend(Backend::empty(&graph, BackendOptions::registered("cd0"))?)?;
    /// assert_eq!(graph.backend("cd0")?.name(), "cd0", "we hold nothing, the monitor does");
    ///
    /// let nameless = Backend::empty(&graph, BackendOptions::default())?;
    /// let error = graph.own_backend(nameless).unwrap_err();
    /// assert!(error.to_string().contains("has not claimed a name"), "{error}");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `AlreadyExists`: it is on the list; `InvalidInput`: the backend does not claim a name, or is
    /// another graph's. The handle is dropped.
    pub fn own_backend(&self, backend: Backend) -> Result<()> {
        let Backend { inner, graph } = backend;
        let owned = self.own_backend_entry(inner);
        drop(graph);
        owned
    }

    /// Removes a backend from the monitor's list. [`Release::Last`]: that was its last handle, so
    /// it is gone and its reference to the medium with it. Otherwise other handles keep it and its
    /// name; [`Backend::revoke`] takes their medium away.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// # use bds_core::request::{Backend, BackendOptions};
    /// # use bds_refcount::Release;
    /// graph.own_backend(Backend::empty(&graph, BackendOptions::registered("cd0"))?)?;
    /// let tray = graph.backend("cd0")?.attach_device("ide0")?;
    /// let error = graph.del_backend("cd0").unwrap_err();
    /// assert!(error.to_string().contains("ide0"), "{error}");
    /// tray.detach();
    /// assert_eq!(graph.del_backend("cd0")?, Release::Last);
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `NotFound`; `InvalidInput`: it is not on the list; `InUse`: a device is
    /// attached (it is named), or [`crate::graph::BlockOps::DELETE`] is blocked on its medium.
    pub fn del_backend(&self, name: &str) -> Result<Release> {
        let owned = self.disown_backend_entry(name)?;
        // Of handles that are dropped at the same time, exactly one gets the backend itself.
        let inner = owned.into_any().downcast::<Inner>().ok().and_then(Arc::into_inner);
        Ok(if inner.is_some() { Release::Last } else { Release::NotLast })
    }

    /// Describes all backends as `query-block` does, as far as the facts are known here. Implicit
    /// filters are not shown.
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
    /// let all = graph.query_backends();
    /// assert_eq!((&all[0]["device"], &all[0]["inserted"]["drv"]), (&"cd0".into(), &"mem".into()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn query_backends(&self) -> Value {
        let describe = |backend: Backend| {
            let mut all = json!({
                "device": backend.name(),
                "io-status": backend.io_status().as_str(),
                "removable": true,
            });
            if let Some(device) = backend.device() {
                all["qdev"] = json!(&*device);
            }
            if let Some(node) = backend.shown_node() {
                all["inserted"] = json!({
                    "node-name": node.name(),
                    "drv": node.driver_name(),
                    "ro": !node.is_writable(),
                    "virtual-size": node.len(),
                    "write_threshold": node.write_threshold().unwrap_or(0),
                });
            }
            all
        };
        self.backends().into_iter().map(describe).collect()
    }
}
