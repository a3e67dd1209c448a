//! Applies a checked stage. The few driver calls that can fail come first and are undone; the rest
//! cannot fail.

use std::collections::HashSet;
use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use bds_refcount::Strong;

use super::action::Action;
use super::perm;
use super::reopen::{Prepared, Reopened};
use super::stage::{Accesses, Attach, ById, Move, Stage, Staged};
use crate::driver::Child;
use crate::error::Result;
use crate::graph::close::sweep::Undelivered;
use crate::graph::drain::set::DrainedEdit;
use crate::graph::model::edge::{Edge, OldTarget, Parent};
use crate::graph::model::node::Node;
use crate::graph::query::walk;
use crate::graph::roots::backends;
use crate::graph::{Graph, NodeRef};

/// How long a removal waits for requests that are stuck in a poisoned node. They may end late or
/// never.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// What is left to do after the lock is released.
pub(in crate::graph) struct Done {
    pub(in crate::graph) moved: Moved,
    pub(in crate::graph) removed: Vec<NodeRef>,
    pub(in crate::graph) reopened: Vec<Reopened>,
    /// Nodes that their users' flushes would no longer reach.
    pub(in crate::graph) hidden: Vec<Strong<Node>>,
}

/// Swaps the staged edges in.
///
/// # Errors
/// A driver refused its first backing node, or to lose its only one. Nothing has changed.
pub(in crate::graph) fn apply_staged(
    graph: &Graph,
    edit: &DrainedEdit<'_>,
    stage: Stage<'_>,
    accesses: Accesses,
    prepared: Vec<Prepared<'_>>,
    actions: &[Action],
) -> Result<Done> {
    let hidden = stage.hidden();
    let staged = stage.into_parts();
    let renames = graph.reserve_renames(actions)?;
    let notified = NotifiedDrivers::notify(graph, &staged)?;
    graph.step()?;
    notified.keep();
    renames.commit();
    let reopened: Vec<Reopened> = prepared.iter().map(Prepared::reopened).collect();
    // Children before parents: a parent that becomes writable finds its children so.
    prepared.into_iter().for_each(Prepared::commit);
    let Staged { moves, attached, dropped, facts, leaving } = staged;
    let mut moved = Moved::default();
    for Reopened { node, .. } in &reopened {
        moved.parents.insert(node.id(), Strong::clone(node));
    }
    // New edges first, to their first target: a later edit of the same change may move them on.
    for staged in attached {
        moved.attach(edit, staged);
    }
    let since = Action::since(actions);
    for staged in moves {
        moved.repoint(edit, staged, since);
    }
    for (parent, edge) in dropped {
        moved.drop_edge(edit, &parent, edge);
    }
    for (id, facts) in facts {
        if let (Some(is_active), Ok(node)) = (facts.is_active, graph.0.core.arena.acquire(id.0)) {
            node.set_active(is_active);
        }
    }
    perm::apply(edit.lock, accesses);
    hidden.iter().for_each(|node| node.tracker().note_hidden());
    moved.refresh(graph, edit);
    graph.apply_ownership(actions);
    let removed = graph.take_removed(actions, &leaving);
    Ok(Done { moved, removed, reopened, hidden })
}

/// Drivers that have accepted another backing node. Dropped: they are switched back.
struct NotifiedDrivers<'s> {
    notified: Vec<(&'s Strong<Node>, Option<Child>)>,
}

impl<'s> NotifiedDrivers<'s> {
    fn notify(graph: &Graph, staged: &'s Staged) -> Result<Self> {
        let mut this = Self { notified: Vec::new() };
        let gone = staged.dropped.iter().map(|(parent, _)| (parent, None));
        let come = staged.attached.iter().filter_map(|attach| {
            let port = (graph.0.core.make_port)(Arc::clone(&attach.edge));
            attach
                .parent
                .as_ref()
                .map(|parent| (parent, Some(Child::new(attach.edge.name(), port))))
        });
        for (parent, child) in gone.chain(come) {
            graph.step()?;
            let back =
                parent.driver().set_backing(child).map_err(|error| error.node(parent.name()))?;
            this.notified.push((parent, back));
        }
        Ok(this)
    }

    fn keep(mut self) {
        self.notified.clear();
    }
}

impl Drop for NotifiedDrivers<'_> {
    fn drop(&mut self) {
        for (parent, back) in self.notified.drain(..).rev() {
            // The driver accepted the opposite a moment ago, and no request was inside since.
            let undone = parent.driver().set_backing(back);
            if let Err(error) = undone {
                tracing::error!(node = %parent.name(), %error, "a refused change could not be taken back");
            }
        }
    }
}

/// Edges that have been re-pointed. Their gates stay closed until this is dropped.
#[derive(Default)]
pub(in crate::graph) struct Moved {
    edges: Vec<Arc<Edge>>,
    old_targets: Vec<OldTarget>,
    /// Nodes whose children differ, and nodes that were reopened.
    parents: ById<Strong<Node>>,
    /// Former targets of nodes' edges: at and below them, inheritance may have ended.
    orphans: Vec<Strong<Node>>,
}

impl Moved {
    /// Nodes that may have other limits now.
    pub(in crate::graph) fn of(nodes: &[Strong<Node>]) -> Self {
        let mut this = Self::default();
        this.parents.extend(nodes.iter().map(|node| (node.id(), Strong::clone(node))));
        this
    }

    pub(in crate::graph) fn repoint(
        &mut self,
        edit: &DrainedEdit<'_>,
        staged: Move,
        since: &'static Location<'static>,
    ) {
        let Move { edge, from, to, .. } = staged;
        // For the edge itself: its share of the drain ends when it leaves the old node.
        edge.close_gate();
        self.old_targets.push(edge.repoint(edit, to.clone(), since));
        edit.lock.reattach(from.as_deref(), to.as_deref(), &edge);
        let events = &edit.lock.core.events;
        backends::emit_medium_event(events, &edge, from.as_deref(), to.as_deref());
        if let Some(parent) = edit.lock.parent_node(&edge) {
            self.orphans.extend(from);
            self.parents.insert(parent.id(), parent);
        }
        self.edges.push(edge);
    }

    fn attach(&mut self, edit: &DrainedEdit<'_>, staged: Attach) {
        let Attach { parent, edge, to } = staged;
        if let Some(parent) = parent {
            edge.set_parent(Parent::Node(parent.id()));
            let mut children = parent.children().to_vec();
            children.push(Arc::clone(&edge));
            parent.set_children(children);
            self.parents.insert(parent.id(), parent);
        }
        edit.lock.attach(&to, &edge);
    }

    fn drop_edge(&mut self, edit: &DrainedEdit<'_>, parent: &Strong<Node>, edge: Arc<Edge>) {
        let mut children = parent.children().to_vec();
        children.retain(|known| !Arc::ptr_eq(known, &edge));
        parent.set_children(children);
        let target = edge.medium().map(|target| Strong::clone(target.strong()));
        if let Some(target) = target {
            edit.lock.detach(&target, &edge);
            self.orphans.push(target);
        }
        self.parents.insert(parent.id(), Strong::clone(parent));
    }

    /// Refreshes limits of all nodes above, and clears inheritance that has ended.
    pub(in crate::graph) fn refresh(&mut self, graph: &Graph, edit: &DrainedEdit<'_>) {
        let now = Stage::new(&graph.0.core.arena);
        for orphan in self.orphans.drain(..) {
            // Whatever was inserted in between, an heir is somewhere below what was cut off.
            walk::each_below_strong(&orphan, &mut |heir| {
                let Some(from) = heir.inherits_from() else { return };
                let from = graph.0.core.arena.acquire(from.0);
                if !from.is_ok_and(|from| now.reaches(&from, heir)) {
                    heir.set_inherits_from(None);
                }
            });
        }
        let mut todo: Vec<Strong<Node>> = std::mem::take(&mut self.parents).into_values().collect();
        let mut seen = HashSet::new();
        while let Some(node) = todo.pop() {
            node.driver().children_changed();
            // To the top in any case: a driver may look through nodes whose own limits stay the
            // same.
            if node.refresh_limits() | seen.insert(node.id()) {
                todo.extend(node.parents().iter().filter_map(|edge| edit.lock.parent_node(edge)));
            }
        }
        graph.note_change();
    }

    /// Waits, with the gates closed, until the references to the old targets are released.
    pub(in crate::graph) async fn wait_released(&self) {
        for old in &self.old_targets {
            old.wait_released().await;
        }
    }

    pub(in crate::graph) fn take_old_targets(&mut self) -> Vec<OldTarget> {
        std::mem::take(&mut self.old_targets)
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        self.edges.iter().for_each(|edge| edge.open_gate());
    }
}

impl Graph {
    /// Applies the actions on the monitor's list.
    fn apply_ownership(&self, actions: &[Action]) {
        for action in actions {
            match action {
                // Checked when it was staged. If another call was quicker, the monitor owns it all
                // the same.
                Action::Own { node } => drop(self.own(node.clone())),
                Action::Disown { node } => drop(self.take_owned(node.id(), node.name())),
                _ => {}
            }
        }
    }

    /// References to the removed nodes, after the monitor's are dropped.
    fn take_removed(&self, actions: &[Action], leaving: &ById<Strong<Node>>) -> Vec<NodeRef> {
        let mut removed = Vec::new();
        for action in actions {
            if let Action::Remove { node } = action
                && leaving.contains_key(&node.id())
            {
                drop(self.take_owned(node.id(), node.name()));
                removed.push(node.clone());
            }
        }
        removed
    }
}

/// Closes the removed nodes and reports them. A node that was acquired by its id meanwhile lives
/// on, and is reported when it is closed later.
pub(in crate::graph) async fn close_removed(
    graph: &Graph,
    removed: Vec<NodeRef>,
    old_targets: Vec<OldTarget>,
) -> Undelivered {
    let mut closed = Undelivered::new(&graph.0.core);
    if removed.is_empty() {
        return closed;
    }
    for old in old_targets {
        old.wait_released_within(RELEASE_TIMEOUT).await;
    }
    for node in removed {
        match node.try_end() {
            Ok(ended) => closed.push(ended.close().await),
            Err((node, _)) => drop(node),
        }
    }
    graph.0.core.sweep_and_keep().await;
    closed
}
