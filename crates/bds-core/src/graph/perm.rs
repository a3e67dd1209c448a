//! Permissions over the graph: who does what with a node, and who does not bear it.

pub use crate::driver::{Access, Perm};
