//! The graph's core: the arena of nodes, the name table, the topology lock, the queue of stale
//! permissions, and events.
//!
//! [`Graph`] is the handle that users hold. [`GraphCore`] is the part that closing needs, without
//! the graph itself: nodes are still closed when the last handle to their graph is gone.

use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::Fs;
use bds_io::sync::{Mutex as AsyncMutex, Notify};
use bds_refcount::{Arena, Dead, Kind, Strong};

use super::close::report::CloseReport;
use super::lock::{GraphLock, GraphLockGuard};
use super::model::edge::{Edge, StalePerms};
use super::model::node::Node;
use super::name_table::NameTable;
use super::open::reference_gate::{DenyAll, ReferenceGate};
use crate::driver::{ChildPort, Registry};
use crate::event::{Event, EventHub};
use crate::tracker::DetachedCount;

/// The kind that node handles carry.
const NODE: Kind = Kind::new(1);

/// Configuration of a graph: file system, drivers, reference gate, limits.
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
    /// These drivers on the host's files; no file named inside an image is opened; chains of at
    /// most 64 images, 128 nodes in one call.
    pub fn new(registry: Arc<Registry>) -> Self {
        Self {
            fs: Fs::Host,
            registry,
            gate: Arc::new(DenyAll),
            max_depth: 64,
            max_nodes_per_image: 128,
        }
    }
}

/// Makes the child handle by which an edge's parent sends requests to the node behind the edge.
pub(crate) type MakePort = fn(Arc<Edge>) -> Box<dyn ChildPort>;

/// A graph of counted nodes. Clones denote the same graph, from any thread.
#[derive(Clone)]
pub struct Graph(pub(super) Arc<Shared>);

/// What all handles to one graph share.
pub(super) struct Shared {
    pub(super) core: GraphCore,
    config: GraphConfig,
    /// Held by a graph change from its first drain to its end. Taken before everything else.
    pub(super) changes: AsyncMutex<()>,
    /// How often edges were moved.
    epoch: AtomicU64,
    #[cfg(test)]
    pub(super) faults: super::tests::Faults,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("arena", &self.0.core.arena).finish_non_exhaustive()
    }
}

impl Graph {
    /// A graph whose drivers send requests through ports made by `make_port`. The public
    /// `Graph::new` is in `request`, which makes the ports: the graph does not import the request
    /// path.
    pub(crate) fn with_ports(config: GraphConfig, make_port: MakePort) -> Self {
        Self::in_arena(config, make_port, Arena::new(NODE))
    }

    /// A graph whose ids run out soon.
    #[cfg(test)]
    pub(super) fn with_narrow_ids(
        config: GraphConfig,
        make_port: MakePort,
        generation_bits: u32,
        index_bits: u32,
    ) -> Self {
        let widths = bds_refcount::ArenaConfig { kind: NODE, generation_bits, index_bits };
        Self::in_arena(config, make_port, Arena::with_config(widths))
    }

    fn in_arena(config: GraphConfig, make_port: MakePort, arena: Arena<Node>) -> Self {
        Self(Arc::new(Shared {
            core: GraphCore::new(arena, make_port),
            config,
            changes: AsyncMutex::default(),
            epoch: AtomicU64::new(0),
            #[cfg(test)]
            faults: super::tests::Faults::default(),
        }))
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &GraphConfig {
        &self.0.config
    }

    /// How often edges were moved: equal answers mean the same graph in between, as far as changes
    /// go.
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
    /// let filter = graph.open(Options::parse("driver=raw,node-name=filter,file=disk")?).await?;
    /// let before = graph.epoch();
    /// graph.insert_filter(&disk, &filter).await?;
    /// assert_ne!(graph.epoch(), before);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::SeqCst)
    }

    /// Counts a change and emits its event.
    pub(super) fn note_change(&self) {
        let epoch = self.0.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.core.events.emit(|| Event::GraphChanged { epoch });
    }

    /// The hub that events are emitted to.
    pub(crate) fn event_hub(&self) -> &EventHub {
        &self.0.core.events
    }

    pub(super) fn lock_names(&self) -> MutexGuard<'_, NameTable> {
        self.0.core.lock_names()
    }

    /// Keeps the graph as long as the value lives, without naming its type.
    pub(super) fn keep_alive(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::<Shared>::clone(&self.0)
    }

    /// A numbered step that can fail in tests.
    #[cfg(test)]
    pub(super) fn step(&self) -> crate::Result<()> {
        self.0.faults.step()
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests have another one")]
    pub(super) fn step(&self) -> crate::Result<()> {
        Ok(())
    }
}

/// All it takes to close dead nodes, without the graph itself. Clones denote the same core.
#[derive(Clone)]
pub(crate) struct GraphCore {
    pub(super) arena: Arena<Node>,
    names: Arc<Mutex<NameTable>>,
    pub(super) make_port: MakePort,
    pub(super) topology: Arc<Topology>,
    pub(super) events: EventHub,
    /// One sweep at a time, so that a close keeps its own dead nodes together.
    pub(super) sweeping: Arc<AsyncMutex<()>>,
    /// Reports of failed closings that no caller waited for.
    pub(super) kept_reports: Arc<Mutex<Vec<CloseReport>>>,
    /// Dead nodes whose closing waits for the end of a drained section below them.
    pub(super) deferred: Arc<Mutex<Vec<Dead<Node>>>>,
    /// Detached operations of all nodes.
    pub(super) detached: Arc<DetachedCount>,
}

/// The lock, and what accompanies it.
#[derive(Default)]
pub(crate) struct Topology {
    lock: GraphLock,
    /// Nodes that lost a parent edge: see `GraphCore::lock`.
    pub(super) stale_perms: StalePerms,
    /// Notified when a closing or a drained section has ended.
    pub(super) drain_progress: Notify,
    /// Re-creates the order that deadlocks, for the test that must find it.
    #[cfg(test)]
    pub(super) lock_first: std::sync::atomic::AtomicBool,
}

impl GraphCore {
    fn new(arena: Arena<Node>, make_port: MakePort) -> Self {
        Self {
            arena,
            names: Arc::default(),
            make_port,
            topology: Arc::default(),
            events: EventHub::default(),
            sweeping: Arc::default(),
            kept_reports: Arc::default(),
            deferred: Arc::default(),
            detached: Arc::default(),
        }
    }

    pub(super) fn lock_names(&self) -> MutexGuard<'_, NameTable> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the topology lock without recomputing stale permissions: `GraphCore::lock` (in
    /// `change::perm`) does both.
    pub(super) fn lock_stale(&self) -> LockedGraph<'_> {
        LockedGraph { core: self, guard: self.topology.lock.lock() }
    }

    /// Is the lock free just now?
    #[cfg(test)]
    pub(super) fn lock_is_free(&self) -> bool {
        self.topology.lock.is_free()
    }

    /// The nodes that live now.
    pub(super) fn live(&self) -> Vec<Strong<Node>> {
        self.arena.snapshot().into_iter().filter_map(|id| self.arena.acquire(id).ok()).collect()
    }
}

/// The core with its topology lock held.
pub(super) struct LockedGraph<'a> {
    pub(super) core: &'a GraphCore,
    guard: GraphLockGuard<'a>,
}

impl<'a> Deref for LockedGraph<'a> {
    type Target = GraphLockGuard<'a>;

    fn deref(&self) -> &GraphLockGuard<'a> {
        &self.guard
    }
}

impl<'a> DerefMut for LockedGraph<'a> {
    fn deref_mut(&mut self) -> &mut GraphLockGuard<'a> {
        &mut self.guard
    }
}
