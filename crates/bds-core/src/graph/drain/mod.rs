//! Drains: keeping requests out of nodes, and waiting until those inside have left.
//!
//! `quiesce` counts reasons and closes gates under the graph's lock; `set` waits. Needs the model and the core.

pub(super) mod quiesce;
mod section;
pub(super) mod set;
