//! Frozen edges: links of a backing chain that no graph change may move while a guard lives.

use std::fmt;
use std::sync::Arc;

use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::model::edge::{Edge, Freeze};
use crate::graph::{Graph, NodeRef};

/// Links that no graph change moves, until this is dropped.
#[must_use = "the links are free again when this is dropped"]
pub struct Frozen {
    graph: Graph,
    edges: Vec<Arc<Edge>>,
    freeze: Arc<Freeze>,
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.edges).finish()
    }
}

impl Frozen {
    pub(super) fn freeze(&self) -> Arc<Freeze> {
        Arc::clone(&self.freeze)
    }

    /// How many links it keeps.
    pub fn len(&self) -> usize {
        self.edges.len()
    }

    /// True if it keeps none: the chain was one node long.
    pub fn is_empty(&self) -> bool {
        self.edges.is_empty()
    }
}

impl Graph {
    /// Freezes the links from `top` down to `base` (backing and filtered children): all of them or
    /// none. `holder` is named in the errors of changes that meet a frozen link ("job 'commit0'").
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
    /// let frozen = graph.freeze_chain(&top, &base, "job 'commit0'")?;
    /// assert_eq!(frozen.len(), 1);
    /// let error = graph.set_backing(&top, None).await.unwrap_err();
    /// assert!(error.to_string().contains("is frozen by job 'commit0'"), "{error}");
    /// assert!(graph.freeze_chain(&top, &base, "job 'stream1'").is_err(), "one freeze at a time");
    /// drop(frozen);
    /// graph.set_backing(&top, None).await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `InvalidInput`: `base` is not in the chain; `InUse`: a link is frozen already.
    pub fn freeze_chain(&self, top: &NodeRef, base: &NodeRef, holder: &str) -> Result<Frozen> {
        let lock = self.0.core.lock();
        let mut edges = Vec::new();
        let mut at = top.strong().clone();
        while at.id() != base.id() {
            let role = if at.driver().is_filter() { Role::FILTERED } else { Role::COW };
            let Some(edge) = at.child_in_role(role) else {
                let message = format!("'{}' is not in its chain", base.name());
                return Err(Error::new(ErrorKind::InvalidInput, message).node(top.name()));
            };
            if let Some(freeze) = edge.frozen() {
                let message = format!("{} is frozen by {freeze} already", edge.holder());
                return Err(Error::new(ErrorKind::InUse, message).node(at.name()));
            }
            at = edge.target().strong().clone();
            edges.push(edge);
        }
        let freeze = Arc::new(Freeze::new(holder));
        edges.iter().for_each(|edge| edge.set_frozen(&lock, Some(Arc::clone(&freeze))));
        drop(lock);
        Ok(Frozen { graph: self.clone(), edges, freeze })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let lock = self.graph.0.core.lock();
        self.edges.iter().for_each(|edge| edge.set_frozen(&lock, None));
    }
}
