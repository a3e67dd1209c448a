//! Options → driver → children → node.
//!
//! ```text
//! options ─► driver's type, common flags, unknown keys refused ─► name claimed
//!         ─► driver opens; it asks for its children (child.rs), each of which goes the same way
//!         ─► node into the arena, edges learn their parent ─► name published
//! ```
//!
//! A failed open leaves nothing: the name's claim, the driver and the children end with the values that hold them, and
//! what that leaves dead is closed before the error is returned. A dropped open does the same in the background.

use std::future::Future;
use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use super::child::Opener;
use super::edge::{Edge, Parent};
use super::flags::{self, Given};
use super::names::Reservation;
use super::node::{Node, NodeId, NodeParts};
use super::perm::{self, Strictness};
use super::transaction::Stage;
use super::{Graph, NodeRef};
use crate::driver::{BoxFuture, Driver, DriverType, OpenContext, OpenFlags, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::options::Options;

/// Levels of images that are opened on one stack; then a task of its own goes on.
const LEVELS_PER_STACK: usize = 8;

/// What is known of one call of [`Graph::open`], at every level of it.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) graph: Graph,
    opened: Arc<AtomicUsize>,
    /// Images above this one.
    pub(super) depth: usize,
    /// Where in the caller's program it was called.
    pub(super) since: &'static Location<'static>,
    /// Files that the images above lie in: opening one of them again would be a loop.
    pub(super) files_above: Vec<(u64, u64)>,
}

impl Call {
    /// Counts a node against the budget of the call.
    fn count_node(&self) -> Result<()> {
        let limit = self.graph.config().max_nodes_per_image;
        if self.opened.fetch_add(1, Ordering::Relaxed) < limit {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("more than {limit} nodes would be opened at once (max_nodes_per_image)"),
        ))
    }
}

impl Graph {
    /// Opens a node as `blockdev-add` describes it: `driver`, `node-name`, the common options, the driver's own, and children
    /// inline or by node name. Without `node-name` it gets a generated one. The reference returned is the only one.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let options = Options::parse("driver=layer,node-name=top,file.driver=memory,file.size=1M")?;
    /// let top = graph.open(options.clone()).await?;
    /// assert_eq!(top.len(), 1 << 20);
    ///
    /// let error = graph.open(options).await.unwrap_err();
    /// assert_eq!(error.to_string(), "the name 'top' is taken by another node or backend");
    /// let error = graph.open(Options::parse("driver=memory,colour=red")?).await.unwrap_err();
    /// assert!(error.to_string().contains("does not know the option 'colour'"), "{error}");
    /// assert_eq!(graph.nodes().len(), 2, "'top' and its file: what failed left nothing");
    /// # Ok(()) });
    /// ```
    ///
    /// # Errors
    /// Whatever fails: no node, no name, no lock remains and nothing was written.
    #[track_caller]
    pub fn open(&self, options: Options) -> impl Future<Output = Result<NodeRef>> + Send + '_ {
        self.open_with(options, OpenFlags::default())
    }

    /// As [`Graph::open`], with other defaults than the common options have, and what only a program can ask for
    /// (`info_only`, `for_check`). `flags.role` is ignored.
    ///
    /// ```
    /// # use bds_core::{*, driver::*, example::*, graph::*, request::*};
    /// # run(async |graph| {
    /// let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
    /// let one = graph.open_with(Options::parse("driver=memory")?, flags).await?;
    /// let other = graph.open_with(Options::parse("driver=memory,read-only=off")?, flags).await?;
    /// assert_eq!((one.is_writable(), other.is_writable()), (false, true), "options go first");
    /// # Ok(()) });
    /// ```
    #[track_caller]
    pub fn open_with(
        &self,
        options: Options,
        flags: OpenFlags,
    ) -> impl Future<Output = Result<NodeRef>> + Send + '_ {
        // An async fn would put itself down as the place where the reference was taken.
        let since = Location::caller();
        self.open_as(options, OpenFlags { role: Role::empty(), ..flags }, since)
    }

    /// As [`Graph::open_with`]; the node may be told what it will be to whom.
    pub(super) async fn open_as(
        &self,
        options: Options,
        flags: OpenFlags,
        since: &'static Location<'static>,
    ) -> Result<NodeRef> {
        ensure_home()?;
        let graph = self.clone();
        // It reads nodes that others use and drain.
        let open = bds_io::spawn_now(async move { graph.open_swept(options, flags, since).await });
        let (node, mut guard) = open.await?;
        guard.is_over = true;
        let owner = Holder::new(HolderKind::Owner, "open");
        Ok(NodeRef::from_held(self, node.held_since(owner, since)))
    }

    /// The guard comes second: a node that is opened and not wanted any more is closed.
    async fn open_swept(
        &self,
        options: Options,
        flags: OpenFlags,
        since: &'static Location<'static>,
    ) -> Result<(Strong<Node>, SweepIfDropped)> {
        let mut guard = SweepIfDropped { graph: self.clone(), is_over: false };
        self.0.core.sweep_unasked().await;
        let call = Call {
            graph: self.clone(),
            opened: Arc::default(),
            depth: 0,
            since,
            files_above: Vec::new(),
        };
        match open_node(call, options, flags).await {
            Ok(node) => Ok((node, guard)),
            Err(error) => {
                self.0.core.sweep_unasked().await;
                guard.is_over = true;
                Err(error)
            }
        }
    }
}

/// Checks, before anything is touched, that what the caller's thread begins has an executor to go on in.
pub(super) fn ensure_home() -> Result<()> {
    bds_io::ensure_context().map_err(|error| {
        let words = "no thread can be started for requests and closings; let the user have more processes \
                     (ulimit -u, RLIMIT_NPROC), or call this inside bds_io::block_on";
        Error::io(error, words)
    })
}

/// What is given up half-way leaves nodes to close.
pub(super) struct SweepIfDropped {
    pub(super) graph: Graph,
    pub(super) is_over: bool,
}

impl Drop for SweepIfDropped {
    fn drop(&mut self) {
        if !self.is_over {
            self.graph.0.core.sweep_in_background();
        }
    }
}

/// Opens one node and, through its driver, what lies below.
pub(super) fn open_node(
    call: Call,
    options: Options,
    base: OpenFlags,
) -> BoxFuture<'static, Result<Strong<Node>>> {
    if call.depth % LEVELS_PER_STACK == LEVELS_PER_STACK - 1 {
        // A long chain must not exhaust the stack. Dropping the task cancels it.
        return Box::pin(bds_io::spawn(open_here(call, options, base)));
    }
    Box::pin(open_here(call, options, base))
}

async fn open_here(call: Call, options: Options, base: OpenFlags) -> Result<Strong<Node>> {
    // Again, because options may have been put together by hand with flat keys.
    let mut options = Options::from_json(options.into_json())?;
    call.count_node()?;
    let Some(driver_name) = options.take_str("driver")? else {
        return Err(Error::new(ErrorKind::InvalidInput, "option 'driver' is missing"));
    };
    let graph = call.graph.clone();
    let driver_type = Arc::clone(graph.config().registry.driver(&driver_name)?);
    let node_name = options.take_str("node-name")?;
    let given = Given::of(&options);
    let flags = flags::take_flags(&mut options, base)?;
    flags::check_known(&*driver_type, &options)?;
    let name = graph.reserve_name(node_name.as_deref())?;
    let opened = open_driver(call, &*driver_type, options, flags, &name).await;
    let (driver, opener) = opened.map_err(|error| error.node(&**name.name()))?;
    publish(&graph, driver, opener, (flags, given), name).await
}

/// Lets the driver open. What it leaves of its options is refused.
async fn open_driver(
    call: Call,
    driver_type: &dyn DriverType,
    options: Options,
    flags: OpenFlags,
    name: &Reservation,
) -> Result<(Box<dyn Driver>, Opener)> {
    let fs = call.graph.config().fs.clone();
    let mut opener = Opener::new(call, Arc::clone(name.name()), flags);
    let mut context = OpenContext::new(name.name(), options, flags, &fs, &mut opener);
    let driver = driver_type.open(&mut context).await?;
    let rest = context.options;
    if let Err(error) = flags::check_taken(driver_type, &rest) {
        return Err(undo(driver, error).await);
    }
    Ok((driver, opener))
}

/// Makes the node and lets its name be found.
async fn publish(
    graph: &Graph,
    driver: Box<dyn Driver>,
    opener: Opener,
    flags: (OpenFlags, Given),
    name: Reservation,
) -> Result<Strong<Node>> {
    match settle_in(graph, driver, opener.into_children(), flags, &name) {
        Ok(node) => {
            name.publish(node.id());
            graph.0.core.events.emit(|| Event::node_opened(node.name(), node.driver_name()));
            Ok(node)
        }
        Err((error, None)) => Err(error),
        Err((error, Some(driver))) => Err(undo(driver, error).await),
    }
}

/// Why a node did not come to be, and its driver if that is still to be closed.
type Unsettled = (Error, Option<Box<dyn Driver>>);

/// The node is part of the graph from here on: its edges have a parent, and it does with its children what its driver wants.
///
/// # Errors
/// If that is not allowed, the node ends with its one reference and is closed like any other. If there is no room for it, the
/// driver comes back.
fn settle_in(
    graph: &Graph,
    driver: Box<dyn Driver>,
    children: Vec<(Arc<Edge>, bool)>,
    (flags, given): (OpenFlags, Given),
    name: &Reservation,
) -> Result<Strong<Node>, Unsettled> {
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
    lock.born(&node);
    let stage = Stage::new(&graph.0.core);
    let settled = perm::settle(&stage, [Strong::clone(&node)], Strictness::Checked);
    perm::apply(&lock, settled.map_err(|error| (named(error), None))?);
    Ok(node)
}

/// Closes a driver that opened well but is not wanted after all.
async fn undo(driver: Box<dyn Driver>, error: Error) -> Error {
    match driver.close().await {
        Ok(()) => error,
        Err(closing) => error.caused_by(closing.context("closing it again failed too")),
    }
}
