//! Closing: what happens to a node after its last reference, and the shutdown of a whole graph.
//!
//! Closing runs outside of every release: a release only counts down. Needs the model and the core.

pub(super) mod close_node;
pub(super) mod detached_ops;
pub(super) mod report;
pub(super) mod run_to_end;
pub(super) mod shutdown;
pub(super) mod stoppable;
pub(super) mod sweep;
