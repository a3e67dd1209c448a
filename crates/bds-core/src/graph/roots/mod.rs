//! Roots: users of nodes that are not nodes (backends, jobs, exports), and the monitor's list of
//! nodes.
//!
//! Needs the model, the names and changes.

pub(super) mod backends;
pub(super) mod monitor;
pub(super) mod root;
