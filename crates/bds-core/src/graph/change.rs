//! Changing the graph: many edits, one change, all or nothing.
//!
//! ```text
//! actions ─► staged ─► what is to be drained ─► drained ─► driver steps prepared
//!                                                   └─► staged again, now for good ─► checked ─► edges swapped in ─► gates open
//! ```
//! Nothing is changed until everything has been checked, and from there on nothing can fail. A change that fails, or whose future is
//! dropped, leaves everything as it was. Identity stays: every id and reference denotes the node it did before, and the caller's
//! references are neither taken nor given. One change at a time; requests wait only while what they pass through is changed.
//!
//! The examples of the edits lie in `examples/`, one file a verb.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bds_io::sync::MutexGuard;
use bds_refcount::{Holder, HolderKind, Strong};
use futures_util::FutureExt;

use super::claims::Operations;
use super::commit::Moved;
use super::drain::{self, DrainSet, Drained, DrainedBelow, Section, wait_undrained_below};
use super::edge::{Edge, EdgeParts};
use super::lock::{Edit, Walls};
use super::node::{Node, NodeId};
use super::perm::{self, Access, Strictness};
use super::reap::CloseReport;
use super::reopen::{self, Prepared, Wanted};
use super::root::RootMove;
use super::transaction::{NewFacts, Stage};
use super::{Graph, NodeRef, commit};
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::options::Options;

/// Who holds what a change refers to while it has its turn, and while it waits for it again.
const TURN: (HolderKind, &str) = (HolderKind::Change, "change");
const WAITING: (HolderKind, &str) = (HolderKind::User, "change that waits");

/// One edit.
#[derive(Debug)]
pub(super) enum Action {
    Append { top: NodeRef, overlay: NodeRef },
    Replace { from: NodeRef, to: NodeRef },
    ReplaceChild { parent: NodeRef, child: String, to: NodeRef },
    InsertFilter { node: NodeRef, filter: NodeRef },
    DropFilter { filter: NodeRef },
    SetBacking { node: NodeRef, backing: Option<NodeRef> },
    Remove { node: NodeRef },
    Reopen { node: NodeRef, options: Options },
    Rename { node: NodeRef, name: Arc<str> },
    Own { node: NodeRef },
    Disown { node: NodeRef },
    Root(RootMove),
    Access { edge: Arc<Edge>, access: Access },
}

impl Action {
    fn nodes(&self) -> Vec<&NodeRef> {
        match self {
            Self::Append { top: a, overlay: b }
            | Self::Replace { from: a, to: b }
            | Self::ReplaceChild { parent: a, to: b, .. }
            | Self::InsertFilter { node: a, filter: b }
            | Self::SetBacking { node: a, backing: Some(b) } => vec![a, b],
            Self::DropFilter { filter: node }
            | Self::SetBacking { node, backing: None }
            | Self::Remove { node }
            | Self::Reopen { node, .. }
            | Self::Rename { node, .. }
            | Self::Own { node }
            | Self::Disown { node } => vec![node],
            Self::Root(RootMove { to, .. }) => to.iter().collect(),
            Self::Access { .. } => Vec::new(),
        }
    }

    /// The same, with its references held by the change whose turn it is ([`TURN`]): they are not in the way of a removal. Those of a
    /// change that waits for its turn ([`WAITING`]) are.
    fn held_by(self, (kind, name): (HolderKind, &str)) -> Self {
        let take = |node: NodeRef| node.held_as(Holder::new(kind, name));
        match self {
            Self::Append { top, overlay } => {
                Self::Append { top: take(top), overlay: take(overlay) }
            }
            Self::Replace { from, to } => Self::Replace { from: take(from), to: take(to) },
            Self::ReplaceChild { parent, child, to } => {
                Self::ReplaceChild { parent: take(parent), child, to: take(to) }
            }
            Self::InsertFilter { node, filter } => {
                Self::InsertFilter { node: take(node), filter: take(filter) }
            }
            Self::DropFilter { filter } => Self::DropFilter { filter: take(filter) },
            Self::SetBacking { node, backing } => {
                Self::SetBacking { node: take(node), backing: backing.map(take) }
            }
            Self::Remove { node } => Self::Remove { node: take(node) },
            Self::Reopen { node, options } => Self::Reopen { node: take(node), options },
            Self::Rename { node, name } => Self::Rename { node: take(node), name },
            Self::Own { node } => Self::Own { node: take(node) },
            Self::Disown { node } => Self::Disown { node: take(node) },
            Self::Root(root) => Self::Root(root.held_by(take)),
            Self::Access { edge, access } => Self::Access { edge, access },
        }
    }
}

/// Edits of the graph that take effect together or not at all. Made by [`Graph::change`], put into force by [`Change::commit`].
///
/// Edits are applied in the order given, each to what the ones before have led to; only the outcome must be allowed. A change that is
/// dropped does nothing, and the compiler warns:
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
    pub(super) actions: Vec<Action>,
    within: Vec<Arc<Section>>,
}

/// What a change did.
#[derive(Debug)]
pub struct ChangeReport {
    /// How long requests had to wait at the gates: from the first gate that was closed to the last that was opened.
    pub held: Duration,
    /// How the nodes ended that were removed, and what ended with them.
    pub closed: Vec<CloseReport>,
}

impl Graph {
    /// An empty change.
    #[doc = include_str!("examples/change.md")]
    pub fn change(&self) -> Change {
        Change { graph: self.clone(), actions: Vec::new(), within: Vec::new() }
    }

    /// [`Change::append`] alone.
    ///
    #[doc = include_str!("examples/graph_append.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn append(&self, top: &NodeRef, overlay: &NodeRef) -> Result<()> {
        self.change().append(top, overlay).commit().await.map(drop)
    }

    /// [`Change::replace`] alone.
    ///
    #[doc = include_str!("examples/graph_replace.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn replace(&self, from: &NodeRef, to: &NodeRef) -> Result<()> {
        self.change().replace(from, to).commit().await.map(drop)
    }

    /// [`Change::set_backing`] alone.
    ///
    #[doc = include_str!("examples/graph_set_backing.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn set_backing(&self, node: &NodeRef, backing: Option<&NodeRef>) -> Result<()> {
        self.change().set_backing(node, backing).commit().await.map(drop)
    }

    /// [`Change::insert_filter`] alone.
    ///
    #[doc = include_str!("examples/graph_insert_filter.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn insert_filter(&self, node: &NodeRef, filter: &NodeRef) -> Result<()> {
        self.change().insert_filter(node, filter).commit().await.map(drop)
    }

    /// [`Change::drop_filter`] alone.
    ///
    #[doc = include_str!("examples/graph_drop_filter.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn drop_filter(&self, filter: &NodeRef) -> Result<()> {
        self.change().drop_filter(filter).commit().await.map(drop)
    }

    /// [`Change::reopen`] alone.
    ///
    #[doc = include_str!("examples/graph_reopen.md")]
    /// # Errors
    /// As [`Change::commit`].
    pub async fn reopen(&self, node: &NodeRef, options: Options) -> Result<()> {
        self.change().reopen(node, options).commit().await.map(drop)
    }

    /// One change at a time; what is dead goes first, so that it does not stand in the way.
    pub(super) async fn begin_change(&self) -> MutexGuard<'_, ()> {
        self.0.reaper.sweep_unasked().await;
        self.0.changes.lock().await
    }
}

impl Change {
    fn with(mut self, action: Action) -> Self {
        self.actions.push(action);
        self
    }

    /// Puts `overlay` on top: everyone who uses `top` uses `overlay` from then on, and `overlay` has `top` as its backing
    /// node. The overlay was opened either on `top` already, or without a backing node (then its driver must be able to
    /// take one while it is open). Edges that stay (a job's) stay.
    #[doc = include_str!("examples/append.md")]
    pub fn append(self, top: &NodeRef, overlay: &NodeRef) -> Self {
        self.with(Action::Append { top: top.clone(), overlay: overlay.clone() })
    }

    /// Everyone who uses `from` uses `to` from then on, except those at or below `to`, whose edges would close a loop, and
    /// edges that stay. So a filter opened on `from` stays there and takes over its users. Fails at a frozen edge.
    #[doc = include_str!("examples/replace.md")]
    pub fn replace(self, from: &NodeRef, to: &NodeRef) -> Self {
        self.with(Action::Replace { from: from.clone(), to: to.clone() })
    }

    /// `parent`'s child of this name ("file", "backing") is `to` from then on. A child that a job inserted on its own account cannot be
    /// replaced; replacing it by the very node below it does nothing.
    #[doc = include_str!("examples/replace_child.md")]
    pub fn replace_child(self, parent: &NodeRef, child: &str, to: &NodeRef) -> Self {
        let (parent, child, to) = (parent.clone(), child.to_owned(), to.clone());
        self.with(Action::ReplaceChild { parent, child, to })
    }

    /// Lets `filter`, which was opened on `node`, take over everyone else who uses `node`.
    #[doc = include_str!("examples/insert_filter.md")]
    pub fn insert_filter(self, node: &NodeRef, filter: &NodeRef) -> Self {
        self.with(Action::InsertFilter { node: node.clone(), filter: filter.clone() })
    }

    /// Lets everyone who uses `filter` use the node it filters. The filter itself lives until its last reference goes; with
    /// [`Change::remove`] in the same change it goes at once.
    #[doc = include_str!("examples/drop_filter.md")]
    pub fn drop_filter(self, filter: &NodeRef) -> Self {
        self.with(Action::DropFilter { filter: filter.clone() })
    }

    /// Gives a node another backing node, or none.
    #[doc = include_str!("examples/set_backing.md")]
    pub fn set_backing(self, node: &NodeRef, backing: Option<&NodeRef>) -> Self {
        self.with(Action::SetBacking { node: node.clone(), backing: backing.cloned() })
    }

    /// Ends a node. Takes the reference, also if the change fails; the monitor's is taken too, if it has one and the change succeeds. What
    /// a filter does to its child does not count any more when the change is checked; what a format still has to write does. The
    /// reports are in [`ChangeReport::closed`]. Closing waits for drained sections of the nodes below, the caller's own included.
    #[doc = include_str!("examples/remove.md")]
    pub fn remove(self, node: NodeRef) -> Self {
        self.with(Action::Remove { node })
    }

    /// Gives a node other options; those that are not named stay. The common ones (`read-only`, `cache.*`, `discard`, `detect-zeroes`),
    /// `backing` and other children by node name, and those of its driver that can change while it is open. Nodes that were
    /// opened inline below it inherit what they inherited then. A driver that has to write to a node below which somebody drains waits
    /// for the end of that section, and others have their turns meanwhile; of the caller's own, see [`Change::within`].
    #[doc = include_str!("examples/reopen.md")]
    pub fn reopen(self, node: &NodeRef, options: Options) -> Self {
        self.with(Action::Reopen { node: node.clone(), options })
    }

    /// Gives a node another name. In one change nodes may trade names: an overlay can take over the name of what it covers. Ids,
    /// references and edges notice nothing; a [`Graph::find`] of the old name finds whoever has it then.
    #[doc = include_str!("examples/rename.md")]
    pub fn rename(self, node: &NodeRef, name: &str) -> Self {
        self.with(Action::Rename { node: node.clone(), name: name.into() })
    }

    /// The change is made inside this drained section: it may reach what the section has drained. A reopen that has to write below
    /// nodes that are drained waits for the end of such sections, but for those named here. The section lasts at least as
    /// long as the change.
    #[doc = include_str!("examples/within.md")]
    pub fn within(mut self, drained: &Drained) -> Self {
        self.within.push(drained.section());
        self
    }

    /// Lets the monitor own the node (its name then keeps it open).
    #[doc = include_str!("examples/own.md")]
    pub fn own(self, node: &NodeRef) -> Self {
        self.with(Action::Own { node: node.clone() })
    }

    /// Takes the node from the monitor's list.
    #[doc = include_str!("examples/disown.md")]
    pub fn disown(self, node: &NodeRef) -> Self {
        self.with(Action::Disown { node: node.clone() })
    }

    /// A root leads elsewhere, or nowhere.
    pub(crate) fn move_root(self, root: RootMove) -> Self {
        self.with(Action::Root(root))
    }

    /// A root asks for something else.
    pub(crate) fn set_access(self, edge: &Arc<Edge>, access: Access) -> Self {
        self.with(Action::Access { edge: Arc::clone(edge), access })
    }

    /// Puts the edits into force, and uses the change up:
    ///
    /// ```compile_fail,E0382
    /// # use bds_core::graph::Change;
    /// async fn story(change: Change) {
    ///     let _first = change.commit().await;
    ///     let _second = change.commit().await;
    /// }
    /// ```
    /// Waits for requests in what is changed, for other changes, and for drivers that prepare.
    ///
    #[doc = include_str!("examples/commit.md")]
    /// # Errors
    /// Nothing has changed. `InvalidInput`: an edit makes no sense where it stands (a loop, another graph's node, no filter);
    /// `InUse`: a permission conflict, a frozen edge, a blocker, a node that others hold, or one that is just being opened on
    /// what is replaced (both sides are named); `ReadOnly`, `Inactive`: somebody would write where that is not possible;
    /// `NotSupported`: a driver cannot do it while it is open; `AlreadyExists`: a name is taken; and whatever drivers fail with when they prepare.
    pub async fn commit(self) -> Result<ChangeReport> {
        let Self { graph, actions, within } = self;
        check_ours(&graph, &actions)?;
        if actions.is_empty() {
            return Ok(ChangeReport { held: Duration::ZERO, closed: Vec::new() });
        }
        let mut actions: Vec<Action> = actions;
        let (one, begun, outcome) = loop {
            let one = graph.begin_change().await;
            actions = actions.into_iter().map(|action| action.held_by(TURN)).collect();
            let begun = bds_io::now();
            match carry_out(&graph, &actions, &within).await? {
                Ok(outcome) => break (one, begun, outcome),
                Err(blocked) => {
                    // Whoever drains below may want a change of his own before he is done: he gets his turn.
                    actions = actions.into_iter().map(|action| action.held_by(WAITING)).collect();
                    drop(one);
                    wait_undrained_below(&graph, &blocked).await;
                    bds_io::yield_now().await;
                }
            }
        };
        let Outcome { moved, removed, drained } = outcome;
        moved.settle().await;
        let edges = moved.edges();
        drop(moved);
        drop(drained);
        let held = bds_io::now().saturating_sub(begun);
        drop(one);
        drop(actions);
        let closed = commit::close_removed(&graph, removed, edges).await;
        Ok(ChangeReport { held, closed })
    }
}

impl fmt::Display for ChangeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "requests waited {} us", self.held.as_micros())
    }
}

/// What remains to be done when the edges have been swapped.
struct Outcome {
    moved: Moved,
    removed: Vec<NodeRef>,
    drained: DrainSet,
}

/// Nodes whose drivers have to wait for the end of drained sections below them.
type Blocked = Vec<Strong<Node>>;

/// Drains, prepares, stages, checks, and puts into force.
async fn carry_out(
    graph: &Graph,
    actions: &[Action],
    within: &[Arc<Section>],
) -> Result<Result<Outcome, Blocked>> {
    let wanted = reopen::collect(graph, actions)?;
    let nodes = {
        let walls = graph.0.reaper.walls();
        let facts = wanted.iter().map(Wanted::facts).collect();
        stage(graph, &walls, actions, facts)?.to_drain()
    };
    let mut drained = DrainSet::begin_within(graph, nodes, drain::CHANGE, within).await;
    loop {
        graph.step()?;
        let Some(prepared) = prepare(graph, &drained, &wanted).await? else {
            return Ok(Err(wanted.iter().map(Wanted::node).collect()));
        };
        let missing = {
            let walls = graph.0.reaper.walls();
            let facts = prepared.iter().map(Prepared::facts).collect();
            let staged = stage(graph, &walls, actions, facts)?;
            // Opening and closing nodes is not held up meanwhile, so what is to be drained may have grown.
            let missing: Vec<_> =
                staged.to_drain().into_iter().filter(|node| !drained.covers(node.id())).collect();
            if missing.is_empty() {
                let accesses = perm::settle(&staged, staged.starts(), Strictness::Checked)?;
                graph.step()?;
                let edit = Edit::new(&drained, &walls);
                let done =
                    commit::put_into_force(graph, &edit, staged, accesses, prepared, actions)?;
                drop(walls);
                return Ok(Ok(Outcome { moved: done.moved, removed: done.removed, drained }));
            }
            missing
        };
        drop(prepared);
        drained.extend(missing, drain::CHANGE).await;
    }
}

/// Lets drivers get ready, who may have to write out what they hold back. `None`: one would have to wait for a drained section of
/// somebody else's, which must not happen while others wait for their turn.
async fn prepare<'w>(
    graph: &Graph,
    drained: &DrainSet,
    wanted: &'w [Wanted],
) -> Result<Option<Vec<Prepared<'w>>>> {
    if wanted.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let nodes: Vec<_> = wanted.iter().map(Wanted::node).collect();
    let prepared = match drained.open_doors_for(&nodes) {
        Ok(work) => {
            let prepared = reopen::prepare(graph, wanted).await?;
            drop(work);
            prepared
        }
        Err(DrainedBelow) => match reopen::prepare(graph, wanted).now_or_never() {
            Some(prepared) => prepared?,
            None => return Ok(None),
        },
    };
    drained.settle().await;
    Ok(Some(prepared))
}

fn check_ours(graph: &Graph, actions: &[Action]) -> Result<()> {
    let is_foreign = |action: &Action| matches!(action, Action::Root(root) if !Arc::ptr_eq(&root.graph.0, &graph.0));
    if actions.iter().any(is_foreign) {
        let words = "the backend belongs to another graph";
        return Err(Error::new(ErrorKind::InvalidInput, words));
    }
    let mut nodes = actions.iter().flat_map(Action::nodes);
    match nodes.find(|node| !Arc::ptr_eq(&node.graph().0, &graph.0)) {
        Some(node) => Err(refuse(node, "it belongs to another graph".to_owned())),
        None => Ok(()),
    }
}

/// What the edits come to, on the graph as it is now.
fn stage<'g>(
    graph: &'g Graph,
    walls: &Walls<'_>,
    actions: &[Action],
    facts: Vec<NewFacts>,
) -> Result<Stage<'g>> {
    let mut stage = Stage::new(&graph.0.reaper);
    let mut editor = Editor { graph, stage: &mut stage, _walls: walls };
    for action in actions {
        editor.apply(action)?;
        graph.step()?;
    }
    for action in actions {
        editor.check_removal(action)?;
    }
    for (node, facts) in facts {
        stage.set_facts(&node, facts);
    }
    Ok(stage)
}

/// Applies edits to a stage.
struct Editor<'e, 'g> {
    graph: &'g Graph,
    stage: &'e mut Stage<'g>,
    _walls: &'e Walls<'e>,
}

impl Editor<'_, '_> {
    fn apply(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Append { top, overlay } => {
                top.check_allowed(Operations::EXTERNAL_SNAPSHOT)?;
                self.append(top, overlay)
            }
            Action::Replace { from, to } => {
                from.check_allowed(Operations::REPLACE)?;
                self.move_parents(from, to)
            }
            Action::ReplaceChild { parent, child, to } => self.replace_child(parent, child, to),
            Action::InsertFilter { node, filter } => {
                let below = self.filtered(filter)?;
                if below.id() != node.id() {
                    return Err(refuse(filter, format!("it is not a filter on '{}'", node.name())));
                }
                self.move_parents(node, filter)
            }
            Action::DropFilter { filter } => {
                let below = NodeRef::change(self.graph, self.filtered(filter)?);
                self.move_parents(filter, &below)
            }
            Action::SetBacking { node, backing } => self.set_backing(node, backing.as_ref()),
            Action::Remove { node } => {
                node.check_allowed(Operations::DELETE)?;
                self.stage.leave_graph(node.strong());
                Ok(())
            }
            Action::Reopen { node, options } => self.reopen_children(node, options),
            Action::Own { node } => self.own(node, true),
            Action::Disown { node } => self.own(node, false),
            Action::Root(root) => {
                root.check(self.stage.target(&root.edge).as_deref())?;
                self.stage.repoint(&root.edge, root.to.as_ref().map(NodeRef::strong))
            }
            // All names are looked at together, when everything else has been checked.
            Action::Rename { .. } => Ok(()),
            Action::Access { edge, access } => {
                self.stage.wish(edge, *access);
                Ok(())
            }
        }
    }

    fn own(&mut self, node: &NodeRef, shall_be: bool) -> Result<()> {
        let before = self.stage.own(node.id(), shall_be);
        if before.unwrap_or_else(|| self.graph.is_owned(node.id())) != shall_be {
            return Ok(());
        }
        let (kind, words) = match shall_be {
            true => (ErrorKind::AlreadyExists, "the monitor owns the node already"),
            false => (ErrorKind::InvalidInput, "the monitor does not own the node"),
        };
        Err(Error::new(kind, words).node(node.name()))
    }

    fn append(&mut self, top: &NodeRef, overlay: &NodeRef) -> Result<()> {
        let attached = match self.stage.child_in_role(overlay, Role::COW) {
            Some(edge) => {
                let target = self.stage.target(&edge);
                if target.as_ref().is_none_or(|target| target.id() != top.id()) {
                    let name = target.map_or_else(String::new, |target| target.name().to_owned());
                    return Err(refuse(
                        overlay,
                        format!("it has the backing node '{name}' already"),
                    ));
                }
                true
            }
            None => false,
        };
        if !attached {
            self.attach_backing(overlay, top)?;
        }
        self.move_parents(top, overlay)
    }

    /// Everyone who uses `from` uses `to`, but for those whose edge would close a loop and those that stay.
    fn move_parents(&mut self, from: &NodeRef, to: &NodeRef) -> Result<()> {
        if from.id() == to.id() {
            return Ok(());
        }
        for edge in self.stage.parents(from) {
            if self.stage.is_opening(&edge) {
                let words = "a node is just being opened on it; try again when that is done";
                return Err(Error::new(ErrorKind::InUse, words).node(from.name()));
            }
            let closes_loop = |parent: Strong<Node>| self.stage.reaches(to.strong(), &parent);
            if edge.stays()
                || edge.is_closing()
                || self.stage.parent_node(&edge).is_some_and(closes_loop)
            {
                continue;
            }
            self.stage.repoint(&edge, Some(to.strong()))?;
        }
        Ok(())
    }

    fn replace_child(&mut self, parent: &NodeRef, name: &str, to: &NodeRef) -> Result<()> {
        let found = self.stage.children(parent).into_iter().find(|edge| edge.name() == name);
        let Some(edge) = found else {
            return Err(refuse(parent, format!("it has no child '{name}'")));
        };
        if let Some(old) = self.stage.target(&edge)
            && old.flags().is_implicit
        {
            let below = old.filtered_child().map(|edge| edge.target().id());
            return match below == Some(to.id()) {
                true => Ok(()),
                false => {
                    let words = format!(
                        "its child '{name}' was inserted by a job and stays until that is done"
                    );
                    Err(Error::new(ErrorKind::InUse, words).node(parent.name()))
                }
            };
        }
        self.stage.repoint(&edge, Some(to.strong()))
    }

    fn set_backing(&mut self, node: &NodeRef, backing: Option<&NodeRef>) -> Result<()> {
        match (self.stage.child_in_role(node, Role::COW), backing) {
            (None, None) => Ok(()),
            (Some(edge), Some(backing)) => self.stage.repoint(&edge, Some(backing.strong())),
            (None, Some(backing)) => self.attach_backing(node, backing),
            (Some(edge), None) => self.stage.drop_edge(node.strong(), &edge),
        }
    }

    /// Stages a node's first backing node.
    fn attach_backing(&mut self, node: &NodeRef, backing: &NodeRef) -> Result<()> {
        if !node.driver().supports_backing() {
            let words = format!("{} nodes have no backing node", node.driver_name());
            return Err(Error::new(ErrorKind::NotSupported, words).node(node.name()));
        }
        let parts = EdgeParts {
            name: "backing",
            role: Role::COW,
            access: Access::NONE,
            holder: Holder::new(HolderKind::Edge, format!("{}.backing", node.name())),
            stays: false,
            graph: None,
            hall: None,
        };
        let target = Strong::clone(backing.strong());
        let edge = Edge::new(parts, Some(target), &self.graph.0.reaper.topology.loosened);
        self.stage.attach(Some(node.strong()), &edge, backing.strong())
    }

    /// Children that a reopen names by node name.
    fn reopen_children(&mut self, node: &NodeRef, options: &Options) -> Result<()> {
        for (name, to) in reopen::children_named(self.graph, node, options)? {
            match (name, to) {
                ("backing", to) => self.set_backing(node, to.as_ref())?,
                (name, Some(to)) => self.replace_child(node, name, &to)?,
                (name, None) => return Err(refuse(node, format!("its child '{name}' cannot go"))),
            }
        }
        Ok(())
    }

    /// What a filter filters.
    fn filtered(&self, filter: &NodeRef) -> Result<Strong<Node>> {
        let edge = filter.driver().is_filter().then(|| {
            let shown = self.stage.child_in_role(filter, Role::FILTERED);
            shown.or_else(|| self.stage.child_in_role(filter, Role::PRIMARY))
        });
        let target = edge.flatten().and_then(|edge| self.stage.target(&edge));
        target.ok_or_else(|| refuse(filter, "it is not a filter".to_owned()))
    }

    /// Nobody but the change and the monitor may hold what goes.
    fn check_removal(&self, action: &Action) -> Result<()> {
        let Action::Remove { node } = action else { return Ok(()) };
        let mut holders = self.graph.holders(node.id());
        let is_owned = self.graph.is_owned(node.id());
        holders.retain(|info| match info.kind {
            // The change's own references go (it has its turn alone), and the monitor's; edges are looked at where they lead in the end.
            HolderKind::Change | HolderKind::Edge | HolderKind::Backend => false,
            HolderKind::Drain => !drain::is_by_change(&info.name),
            HolderKind::Monitor => !is_owned,
            _ => true,
        });
        let users = self.stage.parents(node);
        if users.is_empty() && holders.is_empty() {
            return Ok(());
        }
        let mut words: Vec<String> = users.iter().map(|edge| edge.holder().to_string()).collect();
        words.extend(holders.iter().map(ToString::to_string));
        let error = Error::new(ErrorKind::InUse, format!("node is in use by {}", words.join(", ")));
        Err(error.node(node.name()))
    }
}

pub(super) fn refuse(node: &NodeRef, why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, why).node(node.name())
}

/// By id, so that one node is one entry; walked in an order that a replay sees again.
pub(super) type ById<T> = BTreeMap<NodeId, T>;
