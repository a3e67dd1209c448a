//! Opening: from options to a node with its children; names; creating image files.
//!
//! A name stored in an image is followed only through a [`reference_gate`]. Needs the model, the
//! core, permissions and roots.

mod call;
pub(super) mod child;
pub(super) mod create;
pub(super) mod create_target;
pub(super) mod format_node;
pub(super) mod inspect;
pub(super) mod names;
pub(super) mod open_node;
pub mod reference_gate;
