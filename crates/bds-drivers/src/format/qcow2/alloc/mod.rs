//! Host clusters: allocates them, checks offsets that entries name, and releases clusters after
//! their last reference is removed.
//!
//! `allocate` → `in_flight` (until linked) → `freed` → `release`. `overlap` is the set of clusters
//! that hold metadata.

pub(super) mod allocate;
pub(super) mod freed;
pub(super) mod in_flight;
pub(super) mod offset_check;
pub(super) mod overlap;
pub(super) mod release;
