//! Changes the graph: many edits in one change, all or nothing.
//!
//! ```text
//! actions ─► staged ─► nodes drained ─► driver steps prepared
//!                                            └─► staged again ─► checked ─► edges swapped in ─► gates open
//! ```
//! Nothing is changed until everything has been checked, and from there on nothing can fail. A
//! change that fails, or whose future is dropped, leaves everything as it was. Ids and references
//! keep denoting the same nodes, and the caller's references are neither taken nor given. One
//! change at a time; requests wait only while the nodes on their way are changed.
//!
//! The examples of the edits are in `examples/`, one file a verb.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bds_io::sync::MutexGuard;
use bds_refcount::Strong;
use futures_util::FutureExt;

use super::action::{Action, TURN, WAITING};
use super::commit;
use super::commit::{Done, Moved};
use super::edit::stage;
use super::flush;
use super::freeze::Frozen;
use super::perm::{self, Strictness};
use super::reopen::{self, Prepared, Wanted};
use crate::bitmap::HBitmap;
use crate::driver::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::bitmaps::edit::{BitmapEdit, Lists};
use crate::graph::bitmaps::info::BitmapOptions;
use crate::graph::bitmaps::lease::BitmapLease;
use crate::graph::bitmaps::persist::ImageWork;
use crate::graph::bitmaps::{intent, persist};
use crate::graph::close::report::CloseReport;
use crate::graph::close::sweep::Undelivered;
use crate::graph::drain::set::DrainedEdit;
use crate::graph::drain::set::{
    self, DrainSet, Drained, DrainedBelow, Section, wait_undrained_below,
};
use crate::graph::model::edge::Edge;
use crate::graph::model::node::Node;
use crate::graph::roots::root::RootMove;
use crate::graph::{Graph, NodeRef};
use crate::options::Options;

/// Edits of the graph that take effect together or not at all. Made by [`Graph::change`], applied
/// by [`Change::commit`].
///
/// Each edit is applied to the outcome of those before it; only the final outcome must be allowed.
/// A change that is dropped does nothing, and the compiler warns:
///
/// ```compile_fail
/// #![deny(unused_must_use)]
/// # use bds_core::graph::{Graph, NodeRef};
/// fn story(graph: Graph, node: NodeRef) {
///     graph.change().own(&node);
/// }
/// ```
#[must_use = "a change does nothing until it is committed"]
#[derive(Debug)]
pub struct Change {
    graph: Graph,
    pub(in crate::graph) actions: Vec<Action>,
    within: Vec<Arc<Section>>,
    effect: Option<Arc<AtomicBool>>,
}

/// The outcome of a change.
#[derive(Debug)]
pub struct ChangeReport {
    /// How long requests had to wait at the gates: from the first gate closed to the last one
    /// opened.
    pub held: Duration,
    /// Reports of the nodes that were removed, and of those that died with them.
    pub closed: Vec<CloseReport>,
    /// Why copies of removed bitmaps are still in their images. They are marked in use there, or go
    /// when the node's bitmaps are stored next.
    pub stored_bitmaps_left: Vec<Error>,
    /// Why edits of persistent bitmaps are not durable yet in the write-intent log: a crash undoes
    /// them. Of a change within a drained section of the caller, whose log is written when that
    /// ends, nothing is said.
    pub bitmaps_not_logged: Vec<Error>,
    /// Why images that became backing images of their users could not be flushed: the users' next
    /// flushes try again, and fail as long as it fails. Of a change within a drained section of the
    /// caller, after which the next flush does it, nothing is said.
    pub not_flushed: Vec<Error>,
}

impl Graph {
    /// An empty change.
    #[doc = include_str!("examples/change.md")]
    pub fn change(&self) -> Change {
        Change { graph: self.clone(), actions: Vec::new(), within: Vec::new(), effect: None }
    }

    /// [`Change::append`] alone.
    #[doc = include_str!("examples/graph_append.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn append(
        &self,
        top: &NodeRef,
        overlay: &NodeRef,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().append(top, overlay);
        async move { change.commit().await.map(drop) }
    }

    /// [`Change::replace`] alone.
    #[doc = include_str!("examples/graph_replace.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn replace(
        &self,
        from: &NodeRef,
        to: &NodeRef,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().replace(from, to);
        async move { change.commit().await.map(drop) }
    }

    /// [`Change::set_backing`] alone.
    #[doc = include_str!("examples/graph_set_backing.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn set_backing(
        &self,
        node: &NodeRef,
        backing: Option<&NodeRef>,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().set_backing(node, backing);
        async move { change.commit().await.map(drop) }
    }

    /// [`Change::insert_filter`] alone.
    #[doc = include_str!("examples/graph_insert_filter.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn insert_filter(
        &self,
        node: &NodeRef,
        filter: &NodeRef,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().insert_filter(node, filter);
        async move { change.commit().await.map(drop) }
    }

    /// [`Change::drop_filter`] alone.
    #[doc = include_str!("examples/graph_drop_filter.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn drop_filter(&self, filter: &NodeRef) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().drop_filter(filter);
        async move { change.commit().await.map(drop) }
    }

    /// [`Change::reopen`] alone.
    #[doc = include_str!("examples/graph_reopen.md")]
    /// # Errors
    /// As [`Change::commit`].
    #[track_caller]
    pub fn reopen(
        &self,
        node: &NodeRef,
        options: Options,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let change = self.change().reopen(node, options);
        async move { change.commit().await.map(drop) }
    }

    /// Waits for the turn of a change. Dead nodes are closed first, so that they hold nothing.
    pub(in crate::graph) async fn begin_change(&self) -> MutexGuard<'_, ()> {
        self.0.core.sweep_and_keep().await;
        self.0.changes.lock().await
    }
}

impl Change {
    fn with(mut self, action: Action) -> Self {
        self.actions.push(action);
        self
    }

    /// Puts `overlay` on top: all users of `top` use `overlay` from then on, and `overlay` has
    /// `top` as its backing node. The overlay was opened either on `top` already, or without a
    /// backing node (then its driver must be able to take one while it is open). Fixed edges (a
    /// job's) are left. What was written to `top` is covered by the next flush of its former users,
    /// and [`Change::commit`] flushes it, unless another section drains it.
    #[doc = include_str!("examples/append.md")]
    #[track_caller]
    pub fn append(self, top: &NodeRef, overlay: &NodeRef) -> Self {
        self.with(Action::Append { top: top.clone(), overlay: overlay.clone() })
    }

    /// All users of `from` use `to` from then on, except those at or below `to`, whose edges would
    /// close a loop, and fixed edges. So a filter opened on `from` stays there and takes over its
    /// users. Fails at a frozen edge.
    #[doc = include_str!("examples/replace.md")]
    #[track_caller]
    pub fn replace(self, from: &NodeRef, to: &NodeRef) -> Self {
        self.with(Action::Replace { from: from.clone(), to: to.clone() })
    }

    /// `parent`'s child of this name ("file", "backing") is `to` from then on. A child that a job
    /// inserted for itself cannot be replaced; replacing it by the node directly below it does
    /// nothing.
    #[doc = include_str!("examples/replace_child.md")]
    #[track_caller]
    pub fn replace_child(self, parent: &NodeRef, child: &str, to: &NodeRef) -> Self {
        let (parent, child, to) = (parent.clone(), child.to_owned(), to.clone());
        self.with(Action::ReplaceChild { parent, child, to })
    }

    /// Lets `filter`, which was opened on `node`, take over all other users of `node`.
    #[doc = include_str!("examples/insert_filter.md")]
    #[track_caller]
    pub fn insert_filter(self, node: &NodeRef, filter: &NodeRef) -> Self {
        self.with(Action::InsertFilter { node: node.clone(), filter: filter.clone() })
    }

    /// Lets all users of `filter` use the node it filters. The filter itself lives until its last
    /// reference goes; with [`Change::remove`] in the same change it goes at once.
    #[doc = include_str!("examples/drop_filter.md")]
    #[track_caller]
    pub fn drop_filter(self, filter: &NodeRef) -> Self {
        self.with(Action::DropFilter { filter: filter.clone() })
    }

    /// Gives a node another backing node, or none.
    #[doc = include_str!("examples/set_backing.md")]
    #[track_caller]
    pub fn set_backing(self, node: &NodeRef, backing: Option<&NodeRef>) -> Self {
        self.with(Action::SetBacking { node: node.clone(), backing: NodeRef::clone_of(backing) })
    }

    /// Removes a node. Takes the reference, even if the change fails; the monitor's too, if it has
    /// one and the change succeeds. What a filter does to its child does not count any more when
    /// the change is checked; what a format still has to write does. The reports are in
    /// [`ChangeReport::closed`], but for a node that a query ([`Graph::nodes`]) looks at just now:
    /// it has left the graph's edges, ends with the query's reference, and is reported by the reap
    /// after that. Closing waits for drained sections of the nodes below, the caller's own
    /// included.
    #[doc = include_str!("examples/remove.md")]
    pub fn remove(self, node: NodeRef) -> Self {
        self.with(Action::Remove { node })
    }

    /// Gives a node other options; those that are not named stay. The common ones (`read-only`,
    /// `cache.*`, `discard`, `detect-zeroes`), `backing` and other children by node name, and those
    /// of its driver that can change while it is open. Nodes below that were opened inline inherit
    /// the new values as they did when they were opened. A driver that has to write to a node below
    /// that another section drains waits for the end of that section, while other changes have
    /// their turns; for the caller's own sections, see [`Change::within`].
    #[doc = include_str!("examples/reopen.md")]
    #[track_caller]
    pub fn reopen(self, node: &NodeRef, options: Options) -> Self {
        self.with(Action::Reopen { node: node.clone(), options })
    }

    /// Gives a node another name. Nodes may swap names in one change: an overlay can take over the
    /// name of its backing node. Ids, references and edges do not change; a [`Graph::find`] of the
    /// old name finds the node that has it then.
    #[doc = include_str!("examples/rename.md")]
    #[track_caller]
    pub fn rename(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Rename { node: node.clone(), name: name.into() })
    }

    /// Lets the edits that follow move links which this guard keeps frozen: for the holder of the
    /// guard, who ends what it was frozen for. The links stay frozen until the guard is dropped,
    /// also where they lead then.
    #[doc = include_str!("examples/thaw.md")]
    pub fn thaw(self, frozen: &Frozen) -> Self {
        self.with(Action::Thaw(frozen.freeze()))
    }

    /// Makes the change inside this drained section: it may reach nodes that the section has
    /// drained. A reopen that has to write below drained nodes waits for the end of such sections,
    /// except those named here. The section lasts at least as long as the change.
    #[doc = include_str!("examples/within.md")]
    pub fn within(mut self, drained: &Drained) -> Self {
        self.within.push(drained.section());
        self
    }

    /// Sets the flag in the moment in which the change takes effect. So a caller that drops the
    /// future of [`Change::commit`] can tell afterwards whether it was too late; once the flag is
    /// set, the future ends soon and with success.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicBool, Ordering};
    ///
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk")?).await?;
    /// let effect = Arc::new(AtomicBool::new(false));
    /// let change = graph.change().rename(&disk, "vda").marks_effect(&effect);
    /// assert!(!effect.load(Ordering::Acquire));
    /// change.commit().await?;
    /// assert!(effect.load(Ordering::Acquire));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn marks_effect(mut self, flag: &Arc<AtomicBool>) -> Self {
        self.effect = Some(Arc::clone(flag));
        self
    }

    /// Lets the monitor own the node (its name then keeps it open).
    #[doc = include_str!("examples/own.md")]
    #[track_caller]
    pub fn own(self, node: &NodeRef) -> Self {
        self.with(Action::Own { node: node.clone() })
    }

    /// Takes the node from the monitor's list.
    #[doc = include_str!("examples/disown.md")]
    #[track_caller]
    pub fn disown(self, node: &NodeRef) -> Self {
        self.with(Action::Disown { node: node.clone() })
    }

    /// Adds a bitmap, as [`NodeRef::add_bitmap`]. The verbs of bitmaps in a change are made in
    /// order, each on the outcome of those before it, while the nodes are drained: all bitmaps and
    /// all other edits see one point in time.
    #[doc = include_str!("examples/add_bitmap.md")]
    #[track_caller]
    pub fn add_bitmap(self, node: &NodeRef, options: BitmapOptions) -> Self {
        self.with(Action::Bitmap(BitmapEdit::add(node, options)))
    }

    /// Removes a bitmap, as [`NodeRef::remove_bitmap`]. The copy in the image is removed after the
    /// change took effect: see [`ChangeReport::stored_bitmaps_left`].
    #[track_caller]
    pub fn remove_bitmap(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Bitmap(BitmapEdit::remove(node, name)))
    }

    /// Forgets what a bitmap has recorded, as [`NodeRef::clear_bitmap`].
    #[track_caller]
    pub fn clear_bitmap(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Bitmap(BitmapEdit::clear(node, name)))
    }

    /// Lets a bitmap record, as [`NodeRef::enable_bitmap`].
    #[track_caller]
    pub fn enable_bitmap(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Bitmap(BitmapEdit::enable(node, name)))
    }

    /// Lets a bitmap record no more, as [`NodeRef::disable_bitmap`].
    #[track_caller]
    pub fn disable_bitmap(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Bitmap(BitmapEdit::disable(node, name)))
    }

    /// Marks in a bitmap what is dirty in others, as [`NodeRef::merge_bitmaps`].
    #[track_caller]
    pub fn merge_bitmaps(self, node: &NodeRef, target: &str, sources: &[(&NodeRef, &str)]) -> Self {
        self.with(Action::Bitmap(BitmapEdit::merge(node, target, sources)))
    }

    /// Freezes a leased bitmap and lets a successor record, as [`BitmapLease::split`]: a job begins
    /// at the same point in time as the other edits. Nothing is split if the change fails.
    #[track_caller]
    pub fn split_bitmap(self, lease: &BitmapLease) -> Self {
        match self.graph.acquire(lease.id().node()) {
            Ok(node) => self.with(Action::Bitmap(lease.split_edit(&node))),
            Err(stale) => self.with(Action::Refused(stale)),
        }
    }

    /// Ends a lease that was split, as [`BitmapLease::abdicate`], with what is dirty in `uncopied`
    /// in addition. The lease does nothing when it is dropped afterwards; if the change fails, it
    /// lasts.
    #[track_caller]
    pub fn abdicate_bitmap(self, lease: &BitmapLease, uncopied: Option<Arc<HBitmap>>) -> Self {
        match self.graph.acquire(lease.id().node()) {
            Ok(node) => self.with(Action::Bitmap(lease.abdicate_edit(&node, uncopied))),
            Err(stale) => self.with(Action::Refused(stale)),
        }
    }

    /// Stores the node's persistent bitmaps in its image now, as they are when the change takes
    /// effect, not counting other edits of it. They are stored anyway when the node is closed,
    /// inactivated or becomes read-only; a crash before that makes them inconsistent if anything
    /// was written in between.
    #[track_caller]
    pub fn store_bitmaps(self, node: &NodeRef) -> Self {
        self.with(Action::StoreBitmaps { node: node.clone() })
    }

    /// Moves a root to another node, or to none.
    pub(crate) fn move_root(self, root: RootMove) -> Self {
        self.with(Action::Root(root))
    }

    /// Changes a root's permissions.
    pub(crate) fn set_access(self, edge: &Arc<Edge>, access: Access) -> Self {
        self.with(Action::Access { edge: Arc::clone(edge), access })
    }

    /// Applies the edits, and consumes the change:
    ///
    /// ```compile_fail,E0382
    /// # use bds_core::graph::Change;
    /// async fn story(change: Change) {
    ///     let _first = change.commit().await;
    ///     let _second = change.commit().await;
    /// }
    /// ```
    /// Waits for requests inside the nodes that are changed, for other changes, and for drivers
    /// that prepare. Goes on if its future is kept without being polled; dropping the future before
    /// the change has taken effect ends it, and nothing has changed.
    #[doc = include_str!("examples/commit.md")]
    /// # Errors
    /// Nothing has changed. `InvalidInput`: an edit is impossible (a loop, another graph's node, no
    /// filter); `InUse`: a permission conflict, a frozen edge, a blocker, a node with other
    /// holders, or one on which a node is just being opened (both sides are named); `ReadOnly`,
    /// `Inactive`: a user would write where that is not possible; `NotSupported`: a driver cannot
    /// do it while it is open; `AlreadyExists`: a name is taken; and any error of a driver that
    /// prepares.
    pub async fn commit(self) -> Result<ChangeReport> {
        check_same_graph(&self.graph, &self.actions)?;
        if self.actions.is_empty() {
            mark(self.effect.as_deref());
            return Ok(ChangeReport {
                held: Duration::ZERO,
                closed: Vec::new(),
                stored_bitmaps_left: Vec::new(),
                bitmaps_not_logged: Vec::new(),
                not_flushed: Vec::new(),
            });
        }
        // Other changes wait for the turn, and requests at the gates: a task ends that wait even if
        // the caller keeps its future without polling it.
        let (closed, report) = bds_io::spawn_now(self.run()).await?;
        Ok(ChangeReport { closed: closed.deliver(), ..report })
    }

    /// Returns the report without the nodes that were closed, and these.
    async fn run(self) -> Result<(Undelivered, ChangeReport)> {
        let Self { graph, mut actions, within, effect } = self;
        for action in &mut actions {
            if let Action::Bitmap(edit) = action {
                edit.resolve().await?;
            }
        }
        let (turn, begun, outcome) = loop {
            let turn = graph.begin_change().await;
            actions = actions.into_iter().map(|action| action.held_by(TURN)).collect();
            let begun = bds_io::now();
            match try_once(&graph, &actions, &within, effect.as_deref()).await? {
                Ok(outcome) => break (turn, begun, outcome),
                Err(blocked) => {
                    // The holder of the section below may need a change of its own to end it: that
                    // change gets its turn.
                    actions = actions.into_iter().map(|action| action.held_by(WAITING)).collect();
                    drop(turn);
                    wait_undrained_below(&graph, &blocked).await;
                    bds_io::yield_now().await;
                }
            }
        };
        let Outcome { mut moved, removed, removed_bitmaps, drained, hidden } = outcome;
        moved.wait_released().await;
        let old_targets = moved.take_old_targets();
        drop(moved);
        drop(drained);
        let held = bds_io::now().saturating_sub(begun);
        drop(turn);
        let edited = nodes_with_edits(&actions);
        drop(actions);
        let stored_bitmaps_left = persist::remove_all_stored(removed_bitmaps).await;

        let logged = intent::checkpoint_all(edited);
        let bitmaps_not_logged = match within.is_empty() {
            true => logged.await,
            // Drivers wait for the caller's own section.
            false => {
                bds_io::spawn(logged).detach();
                Vec::new()
            }
        };
        let not_flushed = flush::flush_hidden(&graph, hidden).await;
        let undelivered = commit::close_removed(&graph, removed, old_targets).await;
        let closed = Vec::new();
        let report =
            ChangeReport { held, closed, stored_bitmaps_left, bitmaps_not_logged, not_flushed };
        Ok((undelivered, report))
    }
}

impl fmt::Display for ChangeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "requests waited {} us", self.held.as_micros())
    }
}

fn mark(effect: Option<&AtomicBool>) {
    if let Some(effect) = effect {
        effect.store(true, Ordering::Release);
    }
}

/// What is left to do when the edges have been swapped.
struct Outcome {
    moved: Moved,
    removed: Vec<NodeRef>,
    removed_bitmaps: Vec<(NodeRef, Arc<str>)>,
    drained: DrainSet,
    /// Nodes that became backing nodes of their users.
    hidden: Vec<Strong<Node>>,
}

/// Nodes whose drivers have to wait for the end of drained sections below them.
type Blocked = Vec<Strong<Node>>;

/// Drains, prepares, stages, checks, and applies. `Err` inside: a driver would have to wait for
/// another section.
async fn try_once(
    graph: &Graph,
    actions: &[Action],
    within: &[Arc<Section>],
    effect: Option<&AtomicBool>,
) -> Result<Result<Outcome, Blocked>> {
    let wanted = reopen::collect(graph, actions)?;
    let nodes = {
        let lock = graph.0.core.lock();
        let facts = wanted.iter().map(Wanted::facts).collect();
        let nodes = stage(graph, &lock, actions, facts)?.to_drain();
        // Refused before requests have to wait.
        drop(Lists::of(bitmap_edits(actions)).stage(bitmap_edits(actions))?);
        nodes
    };
    let mut drained = DrainSet::begin_within(graph, nodes, set::CHANGE, within).await;
    loop {
        graph.step()?;
        let to_store = actions.iter().filter_map(Action::node_to_store);
        let images = ImageWork::new(bitmap_edits(actions), to_store);
        let Some(prepared) = prepare(graph, &drained, &wanted, &images).await? else {
            return Ok(Err(wanted.iter().map(Wanted::node).chain(images.nodes()).collect()));
        };
        let lists = Lists::of(bitmap_edits(actions));
        let missing = {
            let lock = graph.0.core.lock();
            let facts = prepared.iter().map(Prepared::facts).collect();
            let staged = stage(graph, &lock, actions, facts)?;
            // Nodes may be opened and closed meanwhile, so more nodes may have to be drained.
            let missing: Vec<_> =
                staged.to_drain().into_iter().filter(|node| !drained.covers(node.id())).collect();
            if missing.is_empty() {
                let accesses = perm::compute(&staged, staged.starts(), Strictness::Checked)?;
                let bitmaps = lists.stage(bitmap_edits(actions))?;
                graph.step()?;
                let edit = DrainedEdit::new(&drained, &lock);
                let done = commit::apply_staged(graph, &edit, staged, accesses, prepared, actions)?;
                mark(effect);
                let removed_bitmaps = bitmaps.commit();
                for reopen::Reopened { node, .. } in &done.reopened {
                    node.bitmaps.set_readonly(!node.is_writable());
                }
                drop(lock);
                done.reopened.iter().for_each(|reopened| reopened.update_backends(graph));
                let Done { moved, removed, hidden, .. } = done;
                return Ok(Ok(Outcome { moved, removed, removed_bitmaps, drained, hidden }));
            }
            missing
        };
        drop(prepared);
        drained.extend(missing, set::CHANGE).await;
    }
}

/// Lets drivers prepare; they may write out what they hold back. `None`: one would have to wait for
/// another drained section, which must not happen during the turn.
async fn prepare<'w>(
    graph: &Graph,
    drained: &DrainSet,
    wanted: &'w [Wanted],
    images: &ImageWork<'_>,
) -> Result<Option<Vec<Prepared<'w>>>> {
    let nodes: Vec<_> = wanted.iter().map(Wanted::node).chain(images.nodes()).collect();
    if nodes.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let prepare = async {
        images.run().await?;
        reopen::prepare(graph, wanted).await
    };
    let prepared = match drained.open_gates_for(&nodes) {
        Ok(work) => {
            let prepared = prepare.await?;
            drop(work);
            prepared
        }
        Err(DrainedBelow) => match prepare.now_or_never() {
            Some(prepared) => prepared?,
            None => return Ok(None),
        },
    };
    drained.wait_drained().await;
    Ok(Some(prepared))
}

/// The edits of bitmaps among the actions.
fn bitmap_edits(actions: &[Action]) -> impl Iterator<Item = &BitmapEdit> {
    actions.iter().filter_map(Action::bitmap_edit)
}

/// The nodes whose bitmaps are edited, once each.
fn nodes_with_edits(actions: &[Action]) -> Vec<NodeRef> {
    let mut nodes: Vec<NodeRef> = Vec::new();
    for edit in bitmap_edits(actions) {
        if nodes.iter().all(|node| node.id() != edit.node.id()) {
            nodes.push(edit.node.clone());
        }
    }
    nodes
}

fn check_same_graph(graph: &Graph, actions: &[Action]) -> Result<()> {
    let is_foreign = |action: &Action| matches!(action, Action::Root(root) if !Arc::ptr_eq(&root.graph.0, &graph.0));
    if actions.iter().any(is_foreign) {
        let message = "the backend belongs to another graph";
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut nodes = actions.iter().flat_map(Action::nodes);
    match nodes.find(|node| !Arc::ptr_eq(&node.graph().0, &graph.0)) {
        Some(node) => Err(refuse(node, "it belongs to another graph".to_owned())),
        None => Ok(()),
    }
}

fn refuse(node: &NodeRef, why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, why).node(node.name())
}
