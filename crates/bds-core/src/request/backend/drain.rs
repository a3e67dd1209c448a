//! Drains a backend: waits until none of its requests is in flight.
//!
//! Works without a medium. Other users of the node go on.

use std::fmt;
use std::pin::pin;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};
use futures_util::future::select;

use super::Backend;

fn holder() -> Holder {
    Holder::new(HolderKind::Drain, "backend's drained section")
}

/// A drained section of a backend: none of its requests is in flight or enters until this is
/// dropped. Keeps the backend.
#[must_use = "the backend's gate opens when this is dropped"]
pub struct BackendDrained {
    backend: Backend,
}

impl fmt::Debug for BackendDrained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BackendDrained('{}')", self.backend.name())
    }
}

impl BackendDrained {
    /// The backend.
    pub fn backend(&self) -> &Backend {
        &self.backend
    }
}

impl Drop for BackendDrained {
    fn drop(&mut self) {
        self.backend.inner.edge.open_gate();
    }
}

impl Backend {
    /// Number of its requests in flight, without inline ones and those that wait at its gate
    /// (stopped ones among them). For diagnostics: exact only while it is drained.
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
    /// let (asks, iov) = (guest.clone(), bds_io::Buf::zeroed(512, 512).iov());
    /// let read = bds_io::spawn(async move { asks.read(0, iov).await });
    /// # while guest.in_flight() == 0 { bds_io::yield_now().await }
    /// assert_eq!(guest.in_flight(), 1);
    /// drop(read); // cancelled
    /// # while guest.in_flight() == 1 { bds_io::yield_now().await }
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn in_flight(&self) -> usize {
        self.inner.edge.backend_in_flight().map_or(0, |in_flight| in_flight.in_flight())
    }

    /// Waits until all of its requests in flight have ended and are accounted, and keeps new ones
    /// waiting at its gate until the returned guard is dropped. Nests. Other users of the node go
    /// on; to stop those too, drain the node. Requests that wait at the gate, or for
    /// [`Backend::resume`], are not waited for, nor are those of a poisoned medium
    /// ([`crate::graph::NodeRef::poison`]).
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # bds_io::block_on(async {
    /// let drive = Backend::empty(&graph, BackendOptions::default())?;
    /// let drained = drive.drain().await; // also without a medium
    /// assert_eq!(drained.backend().in_flight(), 0);
    /// drop(drained);
    /// # Ok::<(), bds_core::Error>(()) }).unwrap();
    /// ```
    pub async fn drain(&self) -> BackendDrained {
        let backend = self.clone();
        bds_io::spawn_now(backend.drain_here()).await
    }

    async fn drain_here(self) -> BackendDrained {
        self.inner.edge.close_gate();
        // From here on dropping the future opens the gate again.
        let drained = BackendDrained { backend: self };
        let edge = &drained.backend.inner.edge;
        // A graph change that moves the edge from here on waits for the requests itself.
        let medium = edge.medium().map(|node| Strong::clone(node.strong()).held_by(holder()));
        let Some(in_flight) = edge.backend_in_flight() else { return drained };
        match medium {
            None => in_flight.wait_idle().await,
            Some(node) => {
                let idle = pin!(async {
                    node.tracker().wait_inline_passed().await;
                    in_flight.wait_idle().await;
                });
                select(idle, pin!(node.tracker().wait_given_up())).await;
            }
        }
        drained
    }
}
