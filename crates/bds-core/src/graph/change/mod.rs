//! Graph changes: edits are staged over the graph, permissions computed, nodes drained, and all
//! take effect at once.
//!
//! Offers [`builder::Change`] and its verbs, hand-over between processes, frozen links, renames.
//! `stage` and `perm` are also used where single edges are attached (`open`, `roots`). Needs the
//! model, drains, roots and closing. Nothing here opens nodes.

pub(super) mod action;
pub(super) mod activity;
pub(super) mod builder;
pub(super) mod commit;
pub(super) mod edit;
mod flush;
pub(super) mod freeze;
pub(super) mod perm;
pub(super) mod rename;
pub(super) mod reopen;
pub(super) mod stage;
