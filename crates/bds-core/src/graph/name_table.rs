//! The name table: claims of node and backend names, and the lists of nodes, backends and
//! stoppables that the graph knows.
//!
//! Locked for a few instructions, after the topology lock. A claim holds nothing open: a node's is
//! an id, a backend's a weak reference. Only the monitor's lists own what they list.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use bds_refcount::Held;

use super::close::stoppable::{ShutdownStage, Stoppable};
use super::model::edge::Edge;
use super::model::node::{Node, NodeId};

/// Names, and lists of nodes and backends.
#[derive(Default)]
pub(crate) struct NameTable {
    pub(super) claims: HashMap<Arc<str>, Claim>,
    /// How many names were generated.
    pub(super) auto_names: u64,
    /// `Graph::shutdown` has begun: no name can be claimed any more.
    pub(super) is_shut_down: bool,
    /// Nodes that the monitor owns.
    pub(super) monitor: BTreeMap<NodeId, OwnedNode>,
    pub(super) monitor_order: u64,
    /// All backends, and those that the monitor owns.
    pub(super) backends: Vec<Weak<dyn BackendEntry>>,
    pub(super) owned_backends: Vec<Arc<dyn BackendEntry>>,
    /// Registered with `Graph::on_shutdown`.
    pub(super) stoppable: Vec<(ShutdownStage, Weak<dyn Stoppable>)>,
}

/// The claim of a name.
#[derive(Clone)]
pub(super) enum Claim {
    /// A node that is being opened.
    Opening,
    /// A node, as long as the id resolves.
    Node(NodeId),
    /// A backend, as long as a handle to it is left.
    Backend(Weak<dyn BackendEntry>),
}

/// A node on the monitor's list.
pub(super) struct OwnedNode {
    pub(super) node: Held<Node>,
    /// The list is walked in the order in which nodes were added.
    pub(super) order: u64,
}

/// A backend as the graph knows it.
pub(crate) trait BackendEntry: Send + Sync + 'static {
    /// The holder name of its edge; also its name in the monitor's namespace, if it claimed that.
    fn name(&self) -> &str;

    /// Its root edge.
    fn edge(&self) -> &Arc<Edge>;

    /// Turns the flush after every write on or off.
    fn set_writethrough(&self, is_on: bool);

    /// The device that uses it.
    fn device(&self) -> Option<Arc<str>>;

    /// The graph is shut down: requests that wait for a user's decision fail.
    fn end(&self);

    /// For a caller that knows the type.
    fn into_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}

impl NameTable {
    /// Removes backends that are gone, whenever the list would have to grow: constant time on
    /// average.
    pub(super) fn prune_backends(&mut self) {
        if self.backends.len() == self.backends.capacity() {
            self.backends.retain(|backend| backend.strong_count() > 0);
            self.claims.retain(
                |_, claim| !matches!(claim, Claim::Backend(backend) if backend.strong_count() == 0),
            );
        }
    }
}
