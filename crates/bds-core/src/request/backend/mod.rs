//! The backend: where a device, a job, an export or a tool enters the graph.
//!
//! A backend has a medium, the node at its root, or none. It owns that node through an edge, refuses requests past the end, counts
//! what passes, decides what a failure means to its user, and adds a flush to every write if the user wants none of them to be volatile.
//! Many threads may use one at once.
//!
//! ```text
//! registry   names, the monitor's list         medium   insert, eject, replace, revoke
//! device     the one device that uses it       policy   what happens when a medium fails
//! io         the requests                      carry    one request's way: gate, work, verdict, perhaps again
//! drain      waiting until nobody is inside
//! ```
//!
//! **A handle is a reference**: the backend, and its hold on the node, end with the last one, at once. A request under way has one of
//! its own, so that it does not depend on its caller. A handle stays valid whatever happens to the medium: without one, requests fail with `NoMedium`.

mod carry;
mod device;
mod drain;
mod io;
mod medium;
mod policy;
mod progress;
mod registry;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::holder_kind::HolderKind;

pub use self::device::Device;
pub use self::drain::BackendDrained;
pub use self::policy::{ErrorPolicies, ErrorPolicy, IoStatus};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventHub;
use crate::graph::{Access, Edge, Graph, NodeRef, Perm, Root};
use crate::stats::Stats;

/// How a backend is made.
#[derive(Clone, Debug)]
pub struct BackendOptions {
    /// Who uses the node, for "in use" messages, events and queries. Need not be unique.
    pub name: String,
    /// May it write and resize? Fails on a read-only node.
    pub writable: bool,
    /// What others may do with the node meanwhile. Everything, unless said otherwise.
    pub shared: Perm,
    /// What a failing medium means. `None`: [`ErrorPolicies::default`] while a device is attached, [`ErrorPolicies::REPORT`]
    /// otherwise, because nobody would decide for a tool whose request is held.
    pub policy: Option<ErrorPolicies>,
    /// Can it be found by its name? Then the name is one of the namespace of node names, must be free in it, and is taken as long as the
    /// backend lives.
    pub claims_name: bool,
}

impl Default for BackendOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            writable: false,
            shared: Perm::all(),
            policy: None,
            claims_name: false,
        }
    }
}

impl BackendOptions {
    /// A reader that can be found by this name.
    pub fn registered(name: impl Into<String>) -> Self {
        Self { name: name.into(), claims_name: true, ..Self::default() }
    }

    fn access(&self) -> Access {
        let mut perm = Perm::CONSISTENT_READ;
        if self.writable {
            perm |= Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        }
        Access { perm, shared: self.shared }
    }
}

/// A user's way into a node. Cloning it takes another reference to the same backend. Dropping the last one gives up the node at once,
/// without I/O; flush first.
#[derive(Clone)]
pub struct Backend {
    inner: Arc<Inner>,
    /// After the backend, whose node must not outlive the graph, which closes it.
    graph: Graph,
}

/// The backend itself. Knows its graph only by what it is handed, so that the graph's own list can hold it.
struct Inner {
    edge: Arc<Edge>,
    stats: Stats,
    is_writethrough: AtomicBool,
    name: Arc<str>,
    claims_name: bool,
    desk: Mutex<Desk>,
    events: EventHub,
}

/// What is asked for and changed now and then. Locked for a few instructions, before nothing else.
struct Desk {
    /// `None`: it depends on whether there is a device.
    policies: Option<ErrorPolicies>,
    io_status: IoStatus,
    /// The gate is closed until the user has decided.
    is_stopped: bool,
    device: Option<Arc<str>>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backend('{}' {:?})", self.inner.name, self.inner.edge)
    }
}

impl Desk {
    fn policies(&self) -> ErrorPolicies {
        self.policies.unwrap_or(match &self.device {
            Some(_) => ErrorPolicies::default(),
            None => ErrorPolicies::REPORT,
        })
    }
}

impl Inner {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend {
    /// Enters at `node`. Durable writes are chosen by the node's `cache.writeback`.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M,read-only=on").await?;
    /// let guest = Backend::new(&disk, BackendOptions { name: "guest".into(), ..Default::default() })?;
    /// drop(disk);
    /// assert_eq!(guest.len(), 1 << 20, "the backend keeps the node");
    ///
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// let error = Backend::new(&graph.find("disk")?, writer).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': the node is read-only; open it for writing");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `ReadOnly`, `Inactive`: it wants to write and the node is that; `InUse`: it does what others do not bear, or does not
    /// bear what they do (both are named); `AlreadyExists`, `InvalidInput`: the name it claims.
    #[track_caller]
    pub fn new(node: &NodeRef, options: BackendOptions) -> Result<Backend> {
        if options.writable && !node.could_write() {
            let message = "the node is read-only; open it for writing";
            return Err(Error::new(ErrorKind::ReadOnly, message).node(node.name()));
        }
        Self::make(node.graph(), Some(node), options)
    }

    /// A backend without a medium, an empty drive. What it wants to do is asked of the medium when one is put in.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use bds_core::ErrorKind;
    /// # use bds_core::graph::{Graph, GraphConfig};
    /// # let graph = Graph::new(GraphConfig::new(Arc::new(bds_core::driver::Registry::new())));
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// let drive = Backend::empty(&graph, BackendOptions::registered("cd0"))?;
    /// assert_eq!(drive.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::NoMedium);
    /// assert_eq!((drive.len(), drive.node().is_none()), (0, true));
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// `AlreadyExists`, `InvalidInput`: the name it claims.
    #[track_caller]
    pub fn empty(graph: &Graph, options: BackendOptions) -> Result<Backend> {
        Self::make(graph, None, options)
    }

    #[track_caller]
    fn make(graph: &Graph, node: Option<&NodeRef>, options: BackendOptions) -> Result<Backend> {
        let claimed = match options.claims_name {
            true => Some(graph.reserve_name(Some(&options.name))?),
            false => None,
        };
        let root = Root {
            kind: HolderKind::Backend,
            name: &options.name,
            access: options.access(),
            stays: false,
            is_backend: true,
        };
        let edge = graph.attach_root(node, &root)?;
        let inner = Arc::new(Inner {
            edge,
            stats: Stats::new(),
            is_writethrough: AtomicBool::new(node.is_some_and(|n| !n.flags().cache.writeback)),
            name: options.name.into(),
            claims_name: options.claims_name,
            desk: Mutex::new(Desk {
                policies: options.policy,
                io_status: IoStatus::Ok,
                is_stopped: false,
                device: None,
            }),
            events: graph.event_hub().clone(),
        });
        Self::publish(graph, &inner, claimed);
        Ok(Backend { inner, graph: graph.clone() })
    }

    /// Its name; empty if it was not given one.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The graph it belongs to.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Length in bytes now; 0 without a medium.
    pub fn len(&self) -> u64 {
        self.inner.edge.medium().map_or(0, |node| node.len())
    }

    /// True if there is no byte, as without a medium.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of one compressed cluster; `None` if the medium can hold none.
    pub fn compressed_unit(&self) -> Option<u32> {
        self.inner.edge.medium()?.driver().compressed_unit()
    }

    /// A reference to the node now: the medium.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// assert_eq!(guest.node().map(|node| node.id()), Some(disk.id()));
    /// guest.eject().await?;
    /// assert!(guest.node().is_none());
    /// # Ok(()) });
    /// ```
    #[track_caller]
    pub fn node(&self) -> Option<NodeRef> {
        let medium = self.inner.edge.medium()?;
        Some(NodeRef::user(&self.graph, medium.strong().clone()))
    }

    /// What passed so far. Lives as long as the backend, whatever the medium.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// use bds_core::stats::Operation;
    ///
    /// guest.write_at(0, b"hello")?;
    /// assert_eq!(guest.stats().totals(Operation::Write).bytes, 5);
    /// # Ok(()) });
    /// ```
    pub fn stats(&self) -> &Stats {
        &self.inner.stats
    }

    /// What it may do with its medium, and lets others do.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// # let base = open(&graph, "driver=memory,node-name=base,size=1M").await?;
    /// # let layer = "driver=layer,node-name=top,file.driver=memory,file.size=1M,backing=base";
    /// # let top = open(&graph, layer).await?;
    /// let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED; // others may not write below 'top'
    /// let reader = Backend::new(&top, BackendOptions { shared, ..Default::default() })?;
    /// assert_eq!(reader.access(), Access { perm: Perm::CONSISTENT_READ, shared });
    ///
    /// let writer = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
    /// assert_eq!(
    ///     Backend::new(&base, writer).unwrap_err().to_string(),
    ///     "node 'base': backend 'guest' uses it for 'write, resize', which edge 'top.backing' does not \
    ///      allow (it allows: consistent-read, write-unchanged); let one of them go, or let the second \
    ///      share more"
    /// );
    /// # Ok(()) });
    /// ```
    pub fn access(&self) -> Access {
        self.inner.edge.access()
    }

    /// Asks for something else.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,node-name=disk,size=1M").await?;
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let reader = Backend::new(&disk, picky)?;
    /// let other = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let error = other.set_access(Perm::WRITE, Perm::all()).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InUse);
    ///
    /// reader.set_access(Perm::empty(), Perm::all()).await?; // less: cannot fail
    /// other.set_access(Perm::WRITE, Perm::all()).await?;
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `InUse`, `ReadOnly`, `Inactive`, as [`Backend::new`]. Asking for less cannot fail, nor asking for anything
    /// without a medium.
    pub async fn set_access(&self, perm: Perm, shared: Perm) -> Result<()> {
        let access = Access { perm, shared };
        self.graph.change().set_access(&self.inner.edge, access).commit().await.map(drop)
    }

    /// Is every write followed by a flush?
    #[inline]
    pub fn is_writethrough(&self) -> bool {
        self.inner.is_writethrough.load(Ordering::Relaxed)
    }

    /// Turns the flush after every write on or off, for writes that begin later.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let disk = open(&graph, "driver=memory,size=1M,cache.writeback=off").await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// assert!(guest.is_writethrough(), "as the node was opened");
    /// guest.set_writethrough(false); // faster; flush when it matters
    /// guest.write_at(0, b"hello")?;
    /// guest.flush().await?;
    /// # Ok(()) });
    /// ```
    pub fn set_writethrough(&self, is_on: bool) {
        self.inner.is_writethrough.store(is_on, Ordering::Relaxed);
    }
}
