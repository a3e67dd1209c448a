//! One edit of the graph as a value: its arguments and the references it needs.

use std::panic::Location;
use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Stale};

use crate::driver::Access;
use crate::graph::NodeRef;
use crate::graph::bitmaps::edit::BitmapEdit;
use crate::graph::model::edge::{Edge, Freeze};
use crate::graph::roots::root::RootMove;
use crate::options::Options;

/// The holder of a change's references while it has its turn, and while it waits for the turn
/// again.
pub(in crate::graph) const TURN: (HolderKind, &str) = (HolderKind::Change, "change");
pub(in crate::graph) const WAITING: (HolderKind, &str) = (HolderKind::User, "change that waits");

/// One edit.
#[derive(Debug)]
pub(in crate::graph) enum Action {
    Append {
        top: NodeRef,
        overlay: NodeRef,
    },
    Replace {
        from: NodeRef,
        to: NodeRef,
    },
    ReplaceChild {
        parent: NodeRef,
        child: String,
        to: NodeRef,
    },
    InsertFilter {
        node: NodeRef,
        filter: NodeRef,
    },
    DropFilter {
        filter: NodeRef,
    },
    SetBacking {
        node: NodeRef,
        backing: Option<NodeRef>,
    },
    Remove {
        node: NodeRef,
    },
    Reopen {
        node: NodeRef,
        options: Options,
    },
    Rename {
        node: NodeRef,
        name: Arc<str>,
    },
    Own {
        node: NodeRef,
    },
    Disown {
        node: NodeRef,
    },
    Root(RootMove),
    Access {
        edge: Arc<Edge>,
        access: Access,
    },
    Thaw(Arc<Freeze>),
    Bitmap(BitmapEdit),
    /// Stores persistent bitmaps in the image.
    StoreBitmaps {
        node: NodeRef,
    },
    /// An edit of what is gone.
    Refused(Stale),
}

impl Action {
    pub(in crate::graph) fn nodes(&self) -> Vec<&NodeRef> {
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
            Self::Bitmap(edit) => edit.nodes().collect(),
            Self::StoreBitmaps { node } => vec![node],
            Self::Access { .. } | Self::Thaw(_) | Self::Refused(_) => Vec::new(),
        }
    }

    /// The node whose bitmaps it stores.
    pub(in crate::graph) fn node_to_store(&self) -> Option<&NodeRef> {
        match self {
            Self::StoreBitmaps { node } => Some(node),
            _ => None,
        }
    }

    /// The edit, if it is one of bitmaps.
    pub(in crate::graph) fn bitmap_edit(&self) -> Option<&BitmapEdit> {
        match self {
            Self::Bitmap(edit) => Some(edit),
            _ => None,
        }
    }

    /// The place in the caller's program that made the edits.
    pub(in crate::graph) fn since(actions: &[Self]) -> &'static Location<'static> {
        let nodes = actions.iter().flat_map(Self::nodes).next();
        nodes.map_or_else(Location::caller, NodeRef::since)
    }

    /// Changes the holder of its references. Those of the change that has its turn ([`TURN`]) do
    /// not prevent a removal; those of a change that waits for its turn ([`WAITING`]) do.
    pub(in crate::graph) fn held_by(self, (kind, name): (HolderKind, &str)) -> Self {
        let take = |node: NodeRef| node.reheld_as(Holder::new(kind, name));
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
            Self::Thaw(freeze) => Self::Thaw(freeze),
            Self::Bitmap(edit) => Self::Bitmap(edit.map_nodes(take)),
            Self::StoreBitmaps { node } => Self::StoreBitmaps { node: take(node) },
            Self::Refused(stale) => Self::Refused(stale),
        }
    }
}
