//! The block graph: nodes, edges, their holders, and the operations that change them.
//!
//! Control plane only: nothing here does guest I/O. Opening, closing and changing the graph never
//! run inside a release; a release only counts down.
//!
//! ```text
//! lock, model ──► core, name_table ──► bitmaps ──► close, query ──► drain, roots ──► change ──► open
//! ```
//! Files further right use those further left. Reading order: `model::node`, `model::edge`,
//! `model::node_ref`, `core`.
//!
//! **Count of a node = number of its live holders.** Every edge owns its target; every [`NodeRef`]
//! owns its node; names own nothing. **A name is free exactly when no reference to its node is
//! left.**
//!
//! A node whose last reference went is dead: it is unpublished and waits to be closed.
//! [`Graph::open`], [`NodeRef::close`], [`Graph::reap`] and [`Graph::shutdown`] close dead nodes;
//! the drop of the last [`Graph`] handle closes the rest.

mod bitmaps;
mod change;
mod close;
mod core;
mod drain;
mod lock;
mod model;
mod name_table;
mod open;
mod query;
mod roots;

pub use bds_refcount::{Holder, HolderInfo, HolderName, Release, Stale, Watch};

pub use self::bitmaps::info::{BitmapId, BitmapInfo, BitmapOptions, MAX_BITMAP_NAME_LEN};
pub(crate) use self::bitmaps::intent;
pub use self::bitmaps::lease::{AnonymousBitmap, BitmapLease};
pub use self::change::activity::Handover;
pub use self::change::builder::{Change, ChangeReport};
pub use self::change::freeze::Frozen;
pub use self::close::close_node::CloseError;
pub use self::close::report::CloseReport;
pub use self::close::shutdown::{Leak, ShutdownReport};
pub use self::close::stoppable::{ShutdownStage, Stoppable};
pub use self::core::{Graph, GraphConfig};
pub use self::drain::set::Drained;
pub use self::model::blockers::{BlockOps, Blocker, JobSlot};
pub use self::model::edge::Parent;
pub(crate) use self::model::edge::{Edge, Target};
pub use self::model::flags::COMMON_OPTIONS;
pub(crate) use self::model::in_flight::{InFlightGuard, OwnedInFlight};
pub use self::model::node::{Node, NodeId};
pub use self::model::node_ref::NodeRef;
pub(crate) use self::name_table::BackendEntry;
pub use self::open::create::{NewImage, NewImageReport};
pub use self::open::format_node::NodeFormat;
pub use self::open::inspect::FileGuess;
pub use self::open::names::MAX_NAME_LEN;
pub(crate) use self::open::names::Reservation;
pub use self::open::reference_gate;
pub use self::open::reference_gate::ReferenceGate;
pub use self::query::facts::EdgeFacts;
pub use self::query::walk;
pub(crate) use self::roots::backends::no_backend;
pub use self::roots::monitor::TopLevel;
pub use self::roots::root::JobEdge;
pub(crate) use self::roots::root::{Expected, Root, RootMove};
pub use crate::driver::{Access, Perm};
pub use crate::holder_kind::HolderKind;

use crate::error::{Error, ErrorKind};
use crate::event::Events;

impl Graph {
    /// A reference to the node of this id: the only way from an id to a node.
    ///
    /// ```
    /// use bds_core::graph::Stale;
    /// use bds_core::{Error, ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let id = disk.id();
    /// assert_eq!(graph.acquire(id)?.name(), "disk");
    ///
    /// drop(disk);
    /// let stale = graph.acquire(id).unwrap_err();
    /// assert_eq!(stale, Stale::Dying, "the last reference is gone, the node waits to be closed");
    /// graph.reap().await;
    /// assert_eq!(graph.acquire(id).unwrap_err(), Stale::Released);
    /// assert_eq!(Error::from(stale).kind(), ErrorKind::Stale);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Stale`] says why the id leads nowhere.
    #[track_caller]
    pub fn acquire(&self, id: NodeId) -> Result<NodeRef, Stale> {
        // No closure: the caller would not be seen through it.
        let strong = self.0.core.arena.acquire(id.0)?;
        Ok(NodeRef::user(self, strong))
    }

    /// The holders of the node that have a name; empty for a stale id.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    ///
    /// let holders = graph.holders(disk.id());
    /// let holders: Vec<String> = holders.iter().map(ToString::to_string).collect();
    /// assert!(holders[0].starts_with("owner 'open' (since "), "and a place in the program");
    /// assert!(holders[1].starts_with("backend 'guest' (since "));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn holders(&self, id: NodeId) -> Vec<HolderInfo> {
        self.0.core.arena.holders(id.0)
    }

    /// The number of references to the node; 0 for a stale id. For diagnostics: outdated on return.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// assert_eq!(graph.count(disk.id()), 2);
    ///
    /// let id = disk.id();
    /// drop((disk, guest));
    /// assert_eq!(graph.count(id), 0);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn count(&self, id: NodeId) -> usize {
        self.0.core.arena.count(id.0)
    }

    /// Fires once the node cannot be acquired any more; at once for a stale id.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::Release;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let id = disk.id();
    /// let mut watch = graph.watch(id);
    /// assert!(!watch.has_fired(), "and the watch does not keep the node");
    ///
    /// assert_eq!(disk.release(), Release::Last);
    /// watch.fired().await;
    /// assert!(graph.acquire(id).is_err());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn watch(&self, id: NodeId) -> Watch<Node> {
        self.0.core.arena.watch(id.0)
    }

    /// Subscribes to events, in order, from now on. Dropping the subscription ends it.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::event::Event;
    ///
    /// # bds_io::block_on(async {
    /// let mut events = graph.events();
    /// graph.shutdown().await;
    /// assert_eq!(events.next().await, Some(Event::GraphShutdown));
    /// assert_eq!(events.try_next(), None, "nothing else happened");
    /// # });
    /// ```
    pub fn events(&self) -> Events {
        self.0.core.events.subscribe()
    }
}

impl From<Stale> for Error {
    fn from(stale: Stale) -> Self {
        Error::new(ErrorKind::Stale, stale.to_string())
    }
}

#[cfg(test)]
mod tests;
