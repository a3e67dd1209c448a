//! Waiting until none of a backend's requests is inside, whatever others do with the same node, and whether or not there is one.

use std::fmt;
use std::pin::pin;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};
use futures_util::future::select;

use super::Backend;

fn holder() -> Holder {
    Holder::new(HolderKind::Drain, "backend's drained section")
}

/// None of the backend's requests is inside, and none gets in, until this is dropped. Keeps the backend.
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
        self.backend.inner.edge.open();
    }
}

impl Backend {
    /// How many of its requests are inside: neither those that wait at its gate, or for a decision after an error, nor those that
    /// need no waiting. For diagnostics: exact only while it is drained.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,stuck=on").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let (asks, iov) = (guest.clone(), bds_io::Buf::zeroed(512, 512).iov());
    /// let read = bds_io::spawn(async move { asks.read(0, iov).await });
    /// # while guest.in_flight() == 0 { bds_io::yield_now().await }
    /// assert_eq!(guest.in_flight(), 1);
    /// drop(read); // cancelled
    /// # while guest.in_flight() == 1 { bds_io::yield_now().await }
    /// # Ok(()) });
    /// ```
    pub fn in_flight(&self) -> usize {
        self.inner.edge.backend_in_flight().map_or(0, |in_flight| in_flight.in_flight())
    }

    /// Waits until all of its requests that are inside have ended and are in the books, and keeps new ones waiting at its gate until the answer is
    /// dropped. Nests. Other users of the node go on; to keep everybody out, drain the node. Requests that wait at the
    /// gate, or for [`Backend::resume`], are not waited for, nor are those inside a medium that was given up
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
        self.inner.edge.close();
        // From here on a dropped future opens it again.
        let drained = BackendDrained { backend: self };
        let edge = &drained.backend.inner.edge;
        // A change that moves the edge now waits for its requests itself.
        let medium = edge.medium().map(|node| Strong::clone(node.strong()).held_by(holder()));
        let Some(in_flight) = edge.backend_in_flight() else { return drained };
        match medium {
            None => in_flight.wait_idle().await,
            Some(node) => {
                let over = pin!(async {
                    node.tracker().wait_inline_passed().await;
                    in_flight.wait_idle().await;
                });
                select(over, pin!(node.tracker().wait_given_up())).await;
            }
        }
        drained
    }
}
