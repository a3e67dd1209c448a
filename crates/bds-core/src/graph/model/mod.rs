//! The graph's elements: nodes, edges, counted references, and the small state that nodes and edges
//! carry.
//!
//! Needs the driver contract, the request tracker, events and options; knows nothing of changes,
//! drains or opening.

pub(super) mod blockers;
pub(super) mod edge;
pub(super) mod flags;
pub(super) mod gate;
pub(super) mod in_flight;
pub(super) mod limits;
pub(super) mod name;
pub(super) mod node;
pub(super) mod node_ref;
pub(super) mod threshold;
