//! The plan of the rooms: nodes, the edges between them, and who holds what.
//!
//! Control plane only: nothing here does guest I/O. Opening, closing and changing the graph never run inside a release;
//! a release only counts down. Reading order: `node`, `edge`, `node_ref`.
//!
//! **Count of a node = number of its live holders.** Every edge owns its target; every [`NodeRef`] owns its node; names
//! own nothing. **Names are free exactly when no reference to the node is left.**
//!
//! Who closes dead nodes: a node whose last reference went away waits, unpublished, until somebody reaps.
//! [`Graph::open`], [`NodeRef::close`], [`Graph::reap`] and [`Graph::shutdown`] do; the graph's own end does what is left.

mod action;
mod activity;
mod backends;
mod change;
mod child;
mod claims;
mod commit;
mod core;
mod create;
mod create_target;
mod detached;
mod drain;
mod dump;
mod edge;
mod edit;
mod facts;
mod flags;
mod freeze;
pub mod gate;
mod in_flight;
mod inspect;
mod leases;
mod left_behind;
mod limits;
mod lock;
mod monitor;
mod names;
mod node;
mod node_ref;
mod open;
mod perm;
mod quiesce;
mod rename;
mod reopen;
mod root;
mod shutdown;
mod threshold;
mod transaction;
pub mod walk;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, Weak};

use bds_io::Fs;
use bds_refcount::{Arena, Kind};
pub use bds_refcount::{Holder, HolderInfo, HolderName, Release, Stale, Watch};

pub use crate::holder_kind::HolderKind;

pub use activity::Handover;
pub(crate) use backends::{BackendEntry, no_backend};
pub use change::{Change, ChangeReport};
pub use claims::{Blocker, JobSlot, Operations};
pub use core::{CloseError, CloseReport};
pub use create::{NewImage, NewImageReport};
pub use drain::Drained;
pub(crate) use edge::Target;
pub use edge::{Edge, Parent};
pub use facts::EdgeFacts;
pub use flags::COMMON_OPTIONS;
pub use freeze::Frozen;
pub use gate::ReferenceGate;
pub(crate) use in_flight::{InFlightGuard, OwnedInFlight};
pub use inspect::FileGuess;
pub use leases::{AnonymousBitmap, BitmapId, BitmapInfo, BitmapLease, MAX_BITMAP_NAME_LEN};
pub use monitor::TopLevel;
pub use names::MAX_NAME_LEN;
pub(crate) use names::Reservation;
pub use node::{Node, NodeId};
pub use node_ref::NodeRef;
pub use perm::{Access, Perm};
pub use root::JobEdge;
pub(crate) use root::{Expected, Root, RootMove};
pub use shutdown::{Leak, ShutdownReport, ShutdownStage, Stoppable};

use crate::driver::{ChildPort, Registry};
use crate::error::{Error, ErrorKind};
use crate::event::{Event, EventHub, Events};
use core::GraphCore;
use names::Claim;

/// What stands in a handle as "node".
const NODE: Kind = Kind::new(1);

/// What a graph is made with.
#[derive(Clone, Debug)]
pub struct GraphConfig {
    /// Where file names are looked up.
    pub fs: Fs,
    /// The drivers there are.
    pub registry: Arc<Registry>,
    /// Decides about files named inside images.
    pub gate: Arc<dyn ReferenceGate>,
    /// How many images deep one call may open: the length of a backing chain.
    pub max_depth: usize,
    /// How many nodes one call may open.
    pub max_nodes_per_image: usize,
}

impl GraphConfig {
    /// These drivers on the host's files; no file named inside an image is opened; chains of at most 64 images, 128 nodes in
    /// one call.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self {
            fs: Fs::Host,
            registry,
            gate: Arc::new(gate::DenyAll),
            max_depth: 64,
            max_nodes_per_image: 128,
        }
    }
}

/// Makes the corridor to the node behind an edge, for the edge's parent.
pub(crate) type MakePort = fn(Arc<Edge>) -> Box<dyn ChildPort>;

/// A graph of counted nodes. Clones denote the same graph, from any thread.
#[derive(Clone)]
pub struct Graph(Arc<Shared>);

struct Shared {
    core: GraphCore,
    config: GraphConfig,
    /// Held by a graph change from its first drain to its end. Taken before everything else.
    changes: bds_io::sync::Mutex<()>,
    /// How often edges were moved.
    epoch: AtomicU64,
    #[cfg(test)]
    faults: tests::Faults,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Nobody can hold a node any more but the monitor's list, and operations whose requests have
        // gone; what is dead and not yet closed must still be flushed.
        let (owned, backends) = {
            let mut plan = self.core.lock_plan();
            (std::mem::take(&mut plan.monitor), std::mem::take(&mut plan.owned_backends))
        };
        drop((backends, owned));
        self.core.sweep_for_good();
    }
}

/// Names, and lists of who is where. Locked for a few instructions, after the graph's lock.
#[derive(Default)]
pub(crate) struct NameTable {
    names: HashMap<Arc<str>, Claim>,
    auto_names: u64,
    is_shut: bool,
    /// Nodes that the monitor owns.
    monitor: BTreeMap<NodeId, monitor::Owned>,
    monitor_order: u64,
    /// Every backend, and those that the monitor owns.
    backends: Vec<Weak<dyn backends::BackendEntry>>,
    owned_backends: Vec<Arc<dyn backends::BackendEntry>>,
    /// Who wants to be told of a shutdown.
    stoppable: Vec<(ShutdownStage, Weak<dyn Stoppable>)>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("arena", &self.0.core.arena).finish_non_exhaustive()
    }
}

impl Graph {
    /// A graph whose edges are entered through `make_port`.
    pub(crate) fn with_corridor(config: GraphConfig, make_port: MakePort) -> Self {
        Self::in_arena(config, make_port, Arena::new(NODE))
    }

    /// A graph whose ids run out soon.
    #[cfg(test)]
    fn with_narrow_ids(
        config: GraphConfig,
        make_port: MakePort,
        generation_bits: u32,
        index_bits: u32,
    ) -> Self {
        let widths = bds_refcount::ArenaConfig { kind: NODE, generation_bits, index_bits };
        Self::in_arena(config, make_port, Arena::with_config(widths))
    }

    fn in_arena(config: GraphConfig, make_port: MakePort, arena: Arena<Node>) -> Self {
        let core = GraphCore::new(arena, make_port);
        Self(Arc::new(Shared {
            core,
            config,
            changes: bds_io::sync::Mutex::default(),
            epoch: AtomicU64::new(0),
            #[cfg(test)]
            faults: tests::Faults::default(),
        }))
    }

    /// What it was made with.
    pub fn config(&self) -> &GraphConfig {
        &self.0.config
    }

    /// A reference to the node of this id: the only way from an id to a node.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let id = disk.id();
    /// assert_eq!(graph.acquire(id)?.name(), "disk");
    ///
    /// drop(disk);
    /// let stale = graph.acquire(id).unwrap_err();
    /// assert_eq!(stale, Stale::Dying, "the last reference is gone, the node waits to be closed");
    /// graph.reap().await;
    /// assert_eq!(graph.acquire(id).unwrap_err(), Stale::Released);
    /// assert_eq!(Error::from(stale).kind(), ErrorKind::Stale);
    /// # Ok(()) });
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

    /// Who holds the node, by name; empty for a stale id. References without a name are not listed.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    ///
    /// let words: Vec<String> = graph.holders(disk.id()).iter().map(ToString::to_string).collect();
    /// assert!(words[0].starts_with("owner 'open' (since "), "and a place in the program");
    /// assert!(words[1].starts_with("backend 'guest' (since "));
    /// # Ok(()) });
    /// ```
    pub fn holders(&self, id: NodeId) -> Vec<HolderInfo> {
        self.0.core.arena.holders(id.0)
    }

    /// How many references the node has; 0 for a stale id. For diagnostics: outdated on return.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// assert_eq!(graph.count(disk.id()), 2);
    ///
    /// let id = disk.id();
    /// drop((disk, guest));
    /// assert_eq!(graph.count(id), 0);
    /// # Ok(()) });
    /// ```
    pub fn count(&self, id: NodeId) -> usize {
        self.0.core.arena.count(id.0)
    }

    /// Fires once the node cannot be acquired any more; at once for a stale id.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk").await?;
    /// let id = disk.id();
    /// let mut watch = graph.watch(id);
    /// assert!(!watch.has_fired(), "and the watch does not keep the node");
    ///
    /// assert_eq!(disk.release(), Release::Last);
    /// watch.fired().await;
    /// assert!(graph.acquire(id).is_err());
    /// # Ok(()) });
    /// ```
    pub fn watch(&self, id: NodeId) -> Watch<Node> {
        self.0.core.arena.watch(id.0)
    }

    /// How often edges were moved: equal answers mean the same graph in between, as far as changes go.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let filter = open(&graph, "driver=pass,node-name=filter,file=disk").await?;
    /// let before = graph.epoch();
    /// graph.insert_filter(&disk, &filter).await?;
    /// assert_ne!(graph.epoch(), before);
    /// # Ok(()) });
    /// ```
    pub fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::SeqCst)
    }

    fn note_change(&self) {
        let epoch = self.0.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.core.events.emit(|| Event::GraphChanged { epoch });
    }

    /// A numbered step that can fail in tests.
    #[cfg(test)]
    fn step(&self) -> crate::Result<()> {
        self.0.faults.step()
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests have another one")]
    fn step(&self) -> crate::Result<()> {
        Ok(())
    }

    /// What happens from now on, in order. Dropping the answer ends it.
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

    /// Where things that happen are told.
    pub(crate) fn event_hub(&self) -> &EventHub {
        &self.0.core.events
    }

    fn plan(&self) -> MutexGuard<'_, NameTable> {
        self.0.core.lock_plan()
    }
}

impl From<Stale> for Error {
    fn from(stale: Stale) -> Self {
        Error::new(ErrorKind::Stale, stale.to_string())
    }
}

#[cfg(test)]
mod tests;
