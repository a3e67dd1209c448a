//! Backends: the entry of a device, a job, an export or a tool into the graph.
//!
//! A backend has a medium, the node at its root, or none. It references that node through an edge,
//! refuses requests past the end, counts requests, applies the user's policy to failures, and
//! flushes after every write in writethrough mode. Many threads may use one at once.
//!
//! ```text
//! registry   names, the monitor's list         medium    insert, eject, replace, revoke
//! device     the one device that uses it       policy    what happens when a medium fails
//! io         the public requests               execute   one request: admit, run, account, perhaps repeat
//! drain      waits until none is in flight     inspect   requests that change nothing: status, info, check
//! progress   passes progress from a request's task to its caller
//! ```
//!
//! **A handle is a reference**: the backend, and its reference to the node, end with the last one,
//! at once. A request in flight has one of its own, so it does not depend on its caller. A handle
//! stays valid whatever happens to the medium: without one, requests fail with `NoMedium`.

mod device;
mod drain;
mod execute;
mod inspect;
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
use crate::graph::{Access, Change, Edge, Graph, NodeRef, Perm, Root};
use crate::stats::Stats;

/// Options of a new backend.
#[derive(Clone, Debug)]
pub struct BackendOptions {
    /// Names the user of the node in "in use" messages, events and queries. Need not be unique.
    pub name: String,
    /// True if it may write and resize. Fails on a read-only node.
    pub writable: bool,
    /// What it does with the node, instead of what `writable` says.
    pub perm: Option<Perm>,
    /// What other users may do with the node meanwhile. Everything by default.
    pub shared: Perm,
    /// True if it is a job's: graph changes leave its edge at the node, and it is listed as a job.
    pub is_job: bool,
    /// The policy when the medium fails. `None`: [`ErrorPolicies::default`] while a device is
    /// attached, [`ErrorPolicies::REPORT`] otherwise, because a tool does not resume stopped
    /// requests.
    pub policy: Option<ErrorPolicies>,
    /// True if [`Graph::backend`] finds it by its name. Such a name shares the namespace of node
    /// names: it must be free, and is taken as long as the backend lives.
    pub claims_name: bool,
}

impl Default for BackendOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            writable: false,
            perm: None,
            shared: Perm::all(),
            is_job: false,
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

    /// A job's backend: it stays at its node when changes of the graph move other users, and has
    /// these permissions.
    pub fn job(name: impl Into<String>, access: Access) -> Self {
        let Access { perm, shared } = access;
        Self { name: name.into(), perm: Some(perm), shared, is_job: true, ..Self::default() }
    }

    fn access(&self) -> Access {
        if let Some(perm) = self.perm {
            return Access { perm, shared: self.shared };
        }
        let mut perm = Perm::CONSISTENT_READ;
        if self.writable {
            perm |= Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        }
        Access { perm, shared: self.shared }
    }
}

/// A handle to a backend, through which a user reads and writes a node. A clone is another
/// reference to the same backend. Dropping the last one releases the node at once, without I/O;
/// flush first.
#[derive(Clone)]
pub struct Backend {
    inner: Arc<Inner>,
    /// Dropped after `inner`: the graph closes the node, so the node must not outlive it.
    graph: Graph,
}

/// The backend behind its handles. Has no reference to its graph, whose list of backends may hold
/// it.
struct Inner {
    edge: Arc<Edge>,
    stats: Stats,
    is_writethrough: AtomicBool,
    name: Arc<str>,
    claims_name: bool,
    state: Mutex<State>,
    events: EventHub,
}

/// The backend's state apart from the request path. Its lock is held for a few instructions and no
/// other lock is taken under it.
struct State {
    /// `None`: depends on whether a device is attached.
    policies: Option<ErrorPolicies>,
    io_status: IoStatus,
    /// The gate is closed until [`Backend::resume`].
    is_stopped: bool,
    device: Option<Arc<str>>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Backend('{}' {:?})", self.inner.name, self.inner.edge)
    }
}

impl State {
    fn policies(&self) -> ErrorPolicies {
        self.policies.unwrap_or(match &self.device {
            Some(_) => ErrorPolicies::default(),
            None => ErrorPolicies::REPORT,
        })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend {
    /// Makes a backend of `node`. It is in writethrough mode if the node's `cache.writeback` is
    /// off.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let options = "driver=mem,node-name=disk,size=1M,read-only=on";
    /// let disk = graph.open(Options::parse(options)?).await?;
    /// let options = BackendOptions { name: "guest".into(), ..Default::default() };
    /// let guest = Backend::new(&disk, options)?;
    /// drop(disk);
    /// assert_eq!(guest.len(), 1 << 20, "the backend keeps the node");
    ///
    /// let writer = BackendOptions { writable: true, ..Default::default() };
    /// let error = Backend::new(&graph.find("disk")?, writer).unwrap_err();
    /// assert_eq!(error.to_string(), "node 'disk': the node is read-only; open it for writing");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `ReadOnly`, `Inactive`: it is to write and the node cannot be written;
    /// `InUse`: its permissions conflict with another user's (both are named); `AlreadyExists`,
    /// `InvalidInput`: the name it claims.
    #[track_caller]
    pub fn new(node: &NodeRef, options: BackendOptions) -> Result<Backend> {
        if options.writable && !node.could_write() {
            let message = "the node is read-only; open it for writing";
            return Err(Error::new(ErrorKind::ReadOnly, message).node(node.name()));
        }
        Self::make(node.graph(), Some(node), options)
    }

    /// Makes a backend without a medium: an empty drive. Its permissions are checked when a medium
    /// is inserted.
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
            kind: if options.is_job { HolderKind::Job } else { HolderKind::Backend },
            name: &options.name,
            access: options.access(),
            is_fixed: options.is_job,
            is_backend: true,
        };
        let edge = graph.attach_root(node, &root)?;
        let inner = Arc::new(Inner {
            edge,
            stats: Stats::new(),
            is_writethrough: AtomicBool::new(node.is_some_and(|n| !n.flags().cache.writeback)),
            name: options.name.into(),
            claims_name: options.claims_name,
            state: Mutex::new(State {
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

    /// Its name; may be empty.
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

    /// True if its length is 0, as without a medium.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of one compressed cluster; `None` if the medium can hold none.
    pub fn compressed_unit(&self) -> Option<u32> {
        self.inner.edge.medium()?.driver().compressed_unit()
    }

    /// A reference to the medium: the node at its root now.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// assert_eq!(guest.node().map(|node| node.id()), Some(disk.id()));
    /// guest.eject().await?;
    /// assert!(guest.node().is_none());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[track_caller]
    pub fn node(&self) -> Option<NodeRef> {
        let medium = self.inner.edge.medium()?;
        Some(NodeRef::user(&self.graph, medium.strong().clone()))
    }

    /// Its statistics. They last as long as the backend, across media.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// use bds_core::stats::Operation;
    ///
    /// guest.write_at(0, b"hello")?;
    /// assert_eq!(guest.stats().totals(Operation::Write).bytes, 5);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn stats(&self) -> &Stats {
        &self.inner.stats
    }

    /// Its permissions on its medium, and what it lets other users do.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::{Access, Perm};
    /// use bds_core::request::{Backend, BackendOptions};
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
    /// # let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// # let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    /// #     backing=base";
    /// # let top = graph.open(Options::parse(layer)?).await?;
    /// // Others may not write below 'top'.
    /// let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    /// let reader = Backend::new(&top, BackendOptions { shared, ..Default::default() })?;
    /// assert_eq!(reader.access(), Access { perm: Perm::CONSISTENT_READ, shared });
    ///
    /// let writer = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
    /// assert_eq!(
    ///     Backend::new(&base, writer).unwrap_err().to_string(),
    ///     "node 'base': backend 'guest' uses it for 'write, resize', which edge 'top.backing' \
    ///      does not allow (it allows: consistent-read, write-unchanged); let one of them go, or \
    ///      let the second \
    ///      share more"
    /// );
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn access(&self) -> Access {
        self.inner.edge.access()
    }

    /// Changes its permissions.
    ///
    /// ```
    /// use bds_core::graph::Perm;
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let reader = Backend::new(&disk, picky)?;
    /// let other = Backend::new(&disk, BackendOptions::registered("guest"))?;
    /// let error = other.set_access(Perm::WRITE, Perm::all()).await.unwrap_err();
    /// assert_eq!(error.kind(), ErrorKind::InUse);
    ///
    /// reader.set_access(Perm::empty(), Perm::all()).await?; // less: cannot fail
    /// other.set_access(Perm::WRITE, Perm::all()).await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Nothing has changed. `InUse`, `ReadOnly`, `Inactive`, as [`Backend::new`]. Fewer permissions
    /// cannot fail, nor any without a medium.
    pub async fn set_access(&self, perm: Perm, shared: Perm) -> Result<()> {
        let access = Access { perm, shared };
        self.graph.change().set_access(&self.inner.edge, access).commit().await.map(drop)
    }

    /// As [`Backend::set_access`], as an edit of a change that does more: a job gives up its
    /// permissions in the change that ends it.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::graph::Perm;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let picky = BackendOptions { shared: Perm::CONSISTENT_READ, ..Default::default() };
    /// let job = Backend::new(&disk, picky)?;
    /// let change = graph.change().rename(&disk, "done");
    /// job.stage_access(change, Perm::empty(), Perm::all()).commit().await?;
    /// assert_eq!((disk.name(), job.access().shared), ("done", Perm::all()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn stage_access(&self, change: Change, perm: Perm, shared: Perm) -> Change {
        change.set_access(&self.inner.edge, Access { perm, shared })
    }

    /// True if every write is followed by a flush.
    #[inline]
    pub fn is_writethrough(&self) -> bool {
        self.inner.is_writethrough.load(Ordering::Relaxed)
    }

    /// Turns writethrough mode (a flush after every write) on or off, for writes that begin later.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::request::{Backend, BackendOptions};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,size=1M,cache.writeback=off")?).await?;
    /// let guest = Backend::new(&disk, BackendOptions { writable: true, ..Default::default() })?;
    /// assert!(guest.is_writethrough(), "as the node was opened");
    /// guest.set_writethrough(false); // faster; flush when it matters
    /// guest.write_at(0, b"hello")?;
    /// guest.flush().await?;
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn set_writethrough(&self, is_on: bool) {
        self.inner.is_writethrough.store(is_on, Ordering::Relaxed);
    }
}
