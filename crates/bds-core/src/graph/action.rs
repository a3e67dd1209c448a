//! One edit of the graph, as a value: what is asked for, and the references that are needed for it.

use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::Holder;

use super::NodeRef;
use super::edge::Edge;
use super::perm::Access;
use super::root::RootMove;
use crate::options::Options;

/// Who holds what a change refers to while it has its turn, and while it waits for it again.
pub(super) const TURN: (HolderKind, &str) = (HolderKind::Change, "change");
pub(super) const WAITING: (HolderKind, &str) = (HolderKind::User, "change that waits");

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
    pub(super) fn nodes(&self) -> Vec<&NodeRef> {
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

    /// Where in the caller's program the edits were asked for.
    pub(super) fn since(actions: &[Self]) -> &'static Location<'static> {
        let nodes = actions.iter().flat_map(Self::nodes).next();
        nodes.map_or_else(Location::caller, NodeRef::since)
    }

    /// The same, with its references held by the change whose turn it is ([`TURN`]): they are not in the way of a removal. Those of a
    /// change that waits for its turn ([`WAITING`]) are.
    pub(super) fn held_by(self, (kind, name): (HolderKind, &str)) -> Self {
        let take = |node: NodeRef| node.kept_as(Holder::new(kind, name));
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
