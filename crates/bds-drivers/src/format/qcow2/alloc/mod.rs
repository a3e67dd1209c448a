//! Host clusters: allocates them, checks them, and releases them when nothing refers to them any more.

pub(super) mod allocate;
pub(super) mod freed;
pub(super) mod in_flight;
pub(super) mod offset_check;
pub(super) mod overlap;
pub(super) mod release;
