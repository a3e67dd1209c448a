//! Applies edits to a stage, each to the outcome of those before it.

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Strong};

use super::action::Action;
use super::reopen;
use super::stage::{NewFacts, Stage};
use crate::driver::Access;
use crate::driver::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::core::LockedGraph;
use crate::graph::drain::set;
use crate::graph::model::blockers::BlockOps;
use crate::graph::model::edge::{Edge, EdgeParts};
use crate::graph::model::node::Node;
use crate::graph::{Graph, NodeRef};
use crate::options::Options;

/// Stages the edits on the graph as it is now.
pub(in crate::graph) fn stage<'g>(
    graph: &'g Graph,
    lock: &LockedGraph<'_>,
    actions: &[Action],
    facts: Vec<NewFacts>,
) -> Result<Stage<'g>> {
    let mut stage = Stage::new(&graph.0.core.arena);
    let mut editor = Editor { graph, stage: &mut stage, _lock: lock };
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
    _lock: &'e LockedGraph<'e>,
}

impl Editor<'_, '_> {
    fn apply(&mut self, action: &Action) -> Result<()> {
        match action {
            Action::Append { top, overlay } => {
                top.check_allowed(BlockOps::EXTERNAL_SNAPSHOT)?;
                self.append(top, overlay)
            }
            Action::Replace { from, to } => {
                from.check_allowed(BlockOps::REPLACE)?;
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
                node.check_allowed(BlockOps::DELETE)?;
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
            // All names are checked together, when everything else has been, and all bitmaps.
            Action::Rename { .. } => Ok(()),
            Action::Bitmap(edit) => {
                edit.nodes().for_each(|node| self.stage.drain(node.strong()));
                Ok(())
            }
            Action::StoreBitmaps { node } => {
                self.stage.drain(node.strong());
                Ok(())
            }
            Action::Refused(stale) => Err(Error::from(*stale)),
            Action::Access { edge, access } => {
                self.stage.request_access(edge, *access);
                Ok(())
            }
            Action::Thaw(freeze) => {
                self.stage.thaw(freeze);
                Ok(())
            }
        }
    }

    fn own(&mut self, node: &NodeRef, shall_be: bool) -> Result<()> {
        let before = self.stage.own(node.id(), shall_be);
        if before.unwrap_or_else(|| self.graph.is_owned(node.id())) != shall_be {
            return Ok(());
        }
        let (kind, message) = match shall_be {
            true => (ErrorKind::AlreadyExists, "the monitor owns the node already"),
            false => (ErrorKind::InvalidInput, "the monitor does not own the node"),
        };
        Err(Error::new(kind, message).node(node.name()))
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

    /// Moves all users of `from` to `to`, except those whose edge would close a loop and fixed
    /// edges.
    fn move_parents(&mut self, from: &NodeRef, to: &NodeRef) -> Result<()> {
        if from.id() == to.id() {
            return Ok(());
        }
        for edge in self.stage.parents(from) {
            if self.stage.is_opening(&edge) {
                let message = "a node is just being opened on it; try again when that is done";
                return Err(Error::new(ErrorKind::InUse, message).node(from.name()));
            }
            let closes_loop = |parent: Strong<Node>| self.stage.reaches(to.strong(), &parent);
            if edge.is_fixed()
                || edge.parent_closing()
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
                    let message = format!(
                        "its child '{name}' was inserted by a job and stays until that is done"
                    );
                    Err(Error::new(ErrorKind::InUse, message).node(parent.name()))
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
            let message = format!("{} nodes have no backing node", node.driver_name());
            return Err(Error::new(ErrorKind::NotSupported, message).node(node.name()));
        }
        let parts = EdgeParts {
            name: "backing",
            role: Role::COW,
            access: Access::NONE,
            holder: Holder::new(HolderKind::Edge, format!("{}.backing", node.name())),
            since: backing.since(),
            is_fixed: false,
            keep_alive: None,
            backend_in_flight: None,
        };
        let target = Strong::clone(backing.strong());
        let edge = Edge::new(parts, Some(target), &self.graph.0.core.topology.stale_perms);
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

    /// The node that a filter filters.
    fn filtered(&self, filter: &NodeRef) -> Result<Strong<Node>> {
        let edge = filter.driver().is_filter().then(|| {
            let shown = self.stage.child_in_role(filter, Role::FILTERED);
            shown.or_else(|| self.stage.child_in_role(filter, Role::PRIMARY))
        });
        let target = edge.flatten().and_then(|edge| self.stage.target(&edge));
        target.ok_or_else(|| refuse(filter, "it is not a filter".to_owned()))
    }

    /// Checks that a node to be removed has no holders but the change, the monitor and queries.
    fn check_removal(&self, action: &Action) -> Result<()> {
        let Action::Remove { node } = action else { return Ok(()) };
        let mut holders = self.graph.holders(node.id());
        let is_owned = self.graph.is_owned(node.id());
        holders.retain(|info| match HolderKind::from(info.kind) {
            // The change's own references end with it (it has its turn alone), and the monitor's
            // too; edges are checked where they lead in the end. A query that looks at it just now
            // ends by itself, and the node with it.
            HolderKind::Change | HolderKind::Edge | HolderKind::Backend | HolderKind::Iterator => {
                false
            }
            HolderKind::Drain => !set::is_by_change(&info.name),
            HolderKind::Monitor => !is_owned,
            _ => true,
        });
        let users = self.stage.parents(node);
        if users.is_empty() && holders.is_empty() {
            return Ok(());
        }
        let mut message: Vec<String> = users.iter().map(|edge| edge.holder().to_string()).collect();
        message.extend(holders.iter().map(ToString::to_string));
        let error =
            Error::new(ErrorKind::InUse, format!("node is in use by {}", message.join(", ")));
        Err(error.node(node.name()))
    }
}

fn refuse(node: &NodeRef, why: String) -> Error {
    Error::new(ErrorKind::InvalidInput, why).node(node.name())
}
