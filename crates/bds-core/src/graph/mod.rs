//! The plan of the rooms: nodes, the edges between them, and who holds what.
//!
//! Control plane only: nothing here does guest I/O. Opening, closing and changing the graph never run inside a release;
//! a release only counts down. Reading order: [`node`], [`edge`], [`node_ref`].
//!
//! **Count of a node = number of its live holders.** Every edge owns its target; every [`NodeRef`] owns its node; names
//! own nothing. **Names are free exactly when no reference to the node is left.**
//!
//! Who closes dead nodes: a node whose last reference went away waits, unpublished, until somebody reaps.
//! [`Graph::open`], [`NodeRef::close`], [`Graph::reap`] and [`Graph::shutdown`] do; the graph's own end does what is left.

mod edge;
mod limits;
mod node;
mod node_ref;
mod perm;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::Fs;
use bds_refcount::{Arena, HolderInfo, Kind, Stale, Watch};

pub use edge::{Edge, Parent};
pub use node::{Node, NodeId};
pub use node_ref::NodeRef;
pub use perm::{Access, Perm};

use crate::driver::ChildPort;

/// What stands in a handle as "node".
const NODE: Kind = Kind::new(1);

/// What a graph is made with.
#[derive(Clone)]
pub struct GraphConfig {
    /// Where file names are looked up.
    pub fs: Fs,
}

impl fmt::Debug for GraphConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GraphConfig").finish_non_exhaustive()
    }
}

/// Makes the corridor to the node behind an edge, for the edge's parent.
pub(crate) type MakePort = fn(Arc<Edge>) -> Box<dyn ChildPort>;

/// A graph of counted nodes. Clones denote the same graph, from any thread.
#[derive(Clone)]
pub struct Graph(Arc<Shared>);

pub(crate) struct Shared {
    arena: Arena<Node>,
    config: GraphConfig,
    make_port: MakePort,
    plan: Mutex<Plan>,
}

/// What graph changes agree on under one lock.
#[derive(Default)]
struct Plan {
    names: HashMap<Arc<str>, NodeId>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("arena", &self.0.arena).finish_non_exhaustive()
    }
}

impl Graph {
    /// A graph whose edges are entered through `make_port`.
    pub(crate) fn with_corridor(config: GraphConfig, make_port: MakePort) -> Self {
        Self(Arc::new(Shared {
            arena: Arena::new(NODE),
            config,
            make_port,
            plan: Mutex::default(),
        }))
    }

    /// What it was made with.
    pub fn config(&self) -> &GraphConfig {
        &self.0.config
    }

    /// A reference to the node of this id: the only way from an id to a node.
    ///
    /// # Errors
    /// [`Stale`] says why the id leads nowhere.
    #[track_caller]
    pub fn acquire(&self, id: NodeId) -> Result<NodeRef, Stale> {
        self.0.arena.acquire(id.0).map(|strong| NodeRef::user(self, strong))
    }

    /// Who holds the node, by name; empty for a stale id. References without a name are not listed.
    pub fn holders(&self, id: NodeId) -> Vec<HolderInfo> {
        self.0.arena.holders(id.0)
    }

    /// How many references the node has; 0 for a stale id. For diagnostics: outdated on return.
    pub fn count(&self, id: NodeId) -> usize {
        self.0.arena.count(id.0)
    }

    /// Fires once the node cannot be acquired any more; at once for a stale id.
    pub fn watch(&self, id: NodeId) -> Watch<Node> {
        self.0.arena.watch(id.0)
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
