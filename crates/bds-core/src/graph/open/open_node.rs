//! Opens a node: from options to a driver, its children, and a published node.
//!
//! ```text
//! options ─► driver's type, common flags, unknown keys refused ─► name claimed
//!         ─► driver opens; it requests its children (child.rs), which are opened the same way
//!         ─► node into the arena, edges get their parent ─► name published
//! ```
//!
//! A failed open leaves nothing: the name's claim, the driver and the children end with the values
//! that hold them, and nodes that die of that are closed before the error is returned. A dropped
//! open does the same in the background.

use std::future::Future;
use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use super::call::Call;
use super::child::Opener;
use super::names::Reservation;
use crate::driver::{BoxFuture, Driver, DriverType, OpenContext, OpenFlags, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventSender};
use crate::graph::bitmaps::persist::{self, LoadedBitmap};
use crate::graph::change::perm::{self, Strictness};
use crate::graph::change::stage::Stage;
use crate::graph::model::edge::{Edge, Parent};
use crate::graph::model::flags::{self, Given};
use crate::graph::model::node::{Node, NodeId, NodeParts};
use crate::graph::{Graph, NodeRef};
use crate::options::Options;

/// Levels of images that are opened on one stack; then a task of its own goes on.
const LEVELS_PER_STACK: usize = 8;

impl Graph {
    /// Opens a node as `blockdev-add` describes it: `driver`, `node-name`, the common options, the
    /// driver's own, and children inline or by node name. Without `node-name` it gets a generated
    /// one. The reference returned is the only one.
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
    /// let text = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2";
    /// let options = Options::parse(text)?;
    /// let top = graph.open(options.clone()).await?;
    /// assert_eq!(top.len(), 1 << 20);
    ///
    /// let error = graph.open(options).await.unwrap_err();
    /// assert_eq!(error.to_string(), "the name 'top' is taken by another node or backend");
    /// let error = graph.open(Options::parse("driver=mem,colour=red")?).await.unwrap_err();
    /// assert!(error.to_string().contains("does not know the option 'colour'"), "{error}");
    /// assert_eq!(graph.nodes().len(), 2, "'top' and its file: what failed left nothing");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Whatever fails: no node, no name, no lock remains and nothing was written.
    #[track_caller]
    pub fn open(&self, options: Options) -> impl Future<Output = Result<NodeRef>> + Send + '_ {
        self.open_with(options, OpenFlags::default())
    }

    /// As [`Graph::open`], with other defaults for the common options, and flags that only a
    /// program can set (`info_only`, `for_check`). `flags.role` is ignored.
    ///
    /// ```
    /// use bds_core::Options;
    /// use bds_core::driver::OpenFlags;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
    /// let one = graph.open_with(Options::parse("driver=mem")?, flags).await?;
    /// let other = graph.open_with(Options::parse("driver=mem,read-only=off")?, flags).await?;
    /// assert_eq!((one.is_writable(), other.is_writable()), (false, true), "options go first");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[track_caller]
    pub fn open_with(
        &self,
        options: Options,
        flags: OpenFlags,
    ) -> impl Future<Output = Result<NodeRef>> + Send + '_ {
        // An async fn would record itself as the place where the reference was taken.
        let since = Location::caller();
        self.open_as(None, options, OpenFlags { role: Role::empty(), ..flags }, since)
    }

    /// As [`Graph::open`], with a driver type that need not be registered: how a block job opens
    /// its filter, whose driver type carries the state that job and filter share. `options` has no
    /// `driver`.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_core::driver::Registry::new().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let own = Arc::new(bds_drivers::protocol::mem::Mem);
    /// let node = graph.open_driver(own, Options::parse("node-name=scratch,size=1M")?).await?;
    /// assert_eq!((node.name(), node.driver_name(), node.len()), ("scratch", "mem", 1 << 20));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Graph::open`]; nothing remains.
    #[track_caller]
    pub fn open_driver(
        &self,
        driver: Arc<dyn DriverType>,
        options: Options,
    ) -> impl Future<Output = Result<NodeRef>> + Send + '_ {
        let since = Location::caller();
        self.open_as(Some(driver), options, OpenFlags::default(), since)
    }

    /// As [`Graph::open_with`], with the role in `flags`, and with this driver if there is one.
    pub(in crate::graph) async fn open_as(
        &self,
        driver: Option<Arc<dyn DriverType>>,
        options: Options,
        flags: OpenFlags,
        since: &'static Location<'static>,
    ) -> Result<NodeRef> {
        ensure_executor()?;
        let graph = self.clone();
        // A task, because it reads nodes that other users drain.
        let open =
            bds_io::spawn_now(async move { graph.open_swept(driver, options, flags, since).await });
        let (node, mut guard) = open.await?;
        guard.is_over = true;
        let owner = Holder::new(HolderKind::Owner, "open");
        Ok(NodeRef::from_held(self, node.held_since(owner, since)))
    }

    /// The guard comes second: a node whose open is dropped late is closed.
    async fn open_swept(
        &self,
        driver: Option<Arc<dyn DriverType>>,
        options: Options,
        flags: OpenFlags,
        since: &'static Location<'static>,
    ) -> Result<(Strong<Node>, SweepIfDropped)> {
        let mut guard = SweepIfDropped { graph: self.clone(), is_over: false };
        self.0.core.sweep_and_keep().await;
        let call = Call::new(self, since);
        match call.open_node(driver, options, flags).await {
            Ok(node) => Ok((node, guard)),
            Err(error) => {
                self.0.core.sweep_and_keep().await;
                guard.is_over = true;
                Err(error)
            }
        }
    }
}

/// Checks, before anything is touched, that there is an executor for requests and closings.
pub(in crate::graph) fn ensure_executor() -> Result<()> {
    bds_io::ensure_context().map_err(|error| {
        let message = "no thread can be started for requests and closings; let the user have more processes \
                     (ulimit -u, RLIMIT_NPROC), or call this inside bds_io::block_on";
        Error::io(error, message)
    })
}

/// Closes what an abandoned open leaves dead.
pub(in crate::graph) struct SweepIfDropped {
    pub(in crate::graph) graph: Graph,
    pub(in crate::graph) is_over: bool,
}

impl Drop for SweepIfDropped {
    fn drop(&mut self) {
        if !self.is_over {
            self.graph.0.core.sweep_in_background();
        }
    }
}

impl Call {
    /// Opens one node and, through its driver, what lies below.
    pub(super) fn open_node(
        self,
        driver: Option<Arc<dyn DriverType>>,
        options: Options,
        base: OpenFlags,
    ) -> BoxFuture<'static, Result<Strong<Node>>> {
        if self.depth % LEVELS_PER_STACK == LEVELS_PER_STACK - 1 {
            // A long chain must not exhaust the stack. Dropping the task cancels it.
            return Box::pin(bds_io::spawn(open_here(self, driver, options, base)));
        }
        Box::pin(open_here(self, driver, options, base))
    }
}

async fn open_here(
    call: Call,
    driver: Option<Arc<dyn DriverType>>,
    options: Options,
    base: OpenFlags,
) -> Result<Strong<Node>> {
    // Again, because options may have been built by hand with flat keys.
    let mut options = Options::from_json(options.into_json())?;
    call.count_node()?;
    let graph = call.graph.clone();
    let driver_type = match driver {
        Some(driver) => driver,
        None => registered_driver(&graph, &mut options)?,
    };
    let node_name = options.take_str("node-name")?;
    let given = Given::of(&options);
    let flags = flags::take_flags(&mut options, base)?;
    flags::check_known(&*driver_type, &options)?;
    let name = graph.reserve_name(node_name.as_deref())?;
    let opened = open_driver(call, &*driver_type, options, flags, &name).await;
    let (driver, opener) = opened.map_err(|error| error.node(&**name.name()))?;
    let loaded = match flags.info_only || flags.for_check {
        true => Ok(Vec::new()),
        false => persist::load(&*driver).await,
    };
    match loaded {
        Ok(bitmaps) => publish(&graph, driver, opener, (flags, given, bitmaps), name).await,
        Err(error) => Err(close_unwanted(driver, error.node(&**name.name())).await),
    }
}

/// The registered driver type that the options name.
fn registered_driver(graph: &Graph, options: &mut Options) -> Result<Arc<dyn DriverType>> {
    let Some(name) = options.take_str("driver")? else {
        return Err(Error::new(ErrorKind::InvalidInput, "option 'driver' is missing"));
    };
    Ok(Arc::clone(graph.config().registry.driver(&name)?))
}

/// Lets the driver open. Options that it did not take are refused.
async fn open_driver(
    call: Call,
    driver_type: &dyn DriverType,
    options: Options,
    flags: OpenFlags,
    name: &Reservation,
) -> Result<(Box<dyn Driver>, Opener)> {
    let fs = call.graph.config().fs.clone();
    let events = EventSender(call.graph.event_hub().clone());
    let mut opener = Opener::new(call, Arc::clone(name.name()), flags);
    let mut context = OpenContext::new(name.name(), options, flags, &fs, &mut opener);
    context.events = events;
    let driver = driver_type.open(&mut context).await?;
    let rest = context.options;
    if let Err(error) = flags::check_taken(driver_type, &rest) {
        return Err(close_unwanted(driver, error).await);
    }
    Ok((driver, opener))
}

/// Facts of a new node: its flags, which of them were given for it, the bitmaps of its image.
type Facts = (OpenFlags, Given, Vec<LoadedBitmap>);

/// Makes the node and publishes its name.
async fn publish(
    graph: &Graph,
    driver: Box<dyn Driver>,
    opener: Opener,
    facts: Facts,
    name: Reservation,
) -> Result<Strong<Node>> {
    match insert_node(graph, driver, opener.into_children(), facts, &name) {
        Ok(node) => {
            name.publish(node.id());
            graph.0.core.events.emit(|| Event::node_opened(node.name(), node.driver_name()));
            Ok(node)
        }
        Err((error, None)) => Err(error),
        Err((error, Some(driver))) => Err(close_unwanted(driver, error).await),
    }
}

/// The error, and the driver if it is still to be closed.
type InsertError = (Error, Option<Box<dyn Driver>>);

/// Inserts the node into the graph: its edges get their parent, and permissions on its children are
/// computed.
///
/// # Errors
/// If the permissions are refused, the node ends with its one reference and is closed like any
/// other. If the arena is full, the driver is returned.
fn insert_node(
    graph: &Graph,
    driver: Box<dyn Driver>,
    children: Vec<(Arc<Edge>, bool)>,
    (flags, given, bitmaps): Facts,
    name: &Reservation,
) -> Result<Strong<Node>, InsertError> {
    let named = |error: Error| error.node(&**name.name());
    let lock = graph.0.core.lock();
    let mut waiting = Some(driver);
    let inserted = graph.0.core.arena.insert_with(|handle| {
        let driver = waiting.take().expect("insert_with calls its closure once");
        Node::new(NodeParts {
            id: NodeId(handle),
            name: Arc::clone(name.name()),
            identity: driver.identity(),
            driver,
            flags,
            given,
            children: children.iter().map(|(edge, _)| Arc::clone(edge)).collect(),
            detached: Arc::clone(&graph.0.core.detached),
        })
    });
    let node = match inserted {
        Ok(node) => node,
        Err(full) => {
            let error = Error::new(ErrorKind::LimitExceeded, full.to_string());
            return Err((named(error), waiting));
        }
    };
    for (edge, is_inline) in children {
        edge.set_parent(Parent::Node(node.id()));
        if is_inline {
            edge.target().set_inherits_from(Some(node.id()));
        }
    }
    lock.node_added(&node);
    node.take_intent_log();
    node.bitmaps.set_loaded(bitmaps, node.len());
    node.bitmaps.set_readonly(!node.is_writable());
    let stage = Stage::new(&graph.0.core.arena);
    let computed = perm::compute(&stage, [Strong::clone(&node)], Strictness::Checked);
    perm::apply(&lock, computed.map_err(|error| (named(error), None))?);
    Ok(node)
}

/// Closes a driver that opened but is not used after all.
async fn close_unwanted(driver: Box<dyn Driver>, error: Error) -> Error {
    match driver.close().await {
        Ok(()) => error,
        Err(closing) => error.caused_by(closing.context("closing it again failed too")),
    }
}
