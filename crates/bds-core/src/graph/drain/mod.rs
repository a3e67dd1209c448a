//! Drains: keep new requests out of nodes, and wait until those inside have left.
//!
//! `quiesce` counts reasons and closes gates under the topology lock; `set` waits; `section` offers
//! both to callers. Needs the model and the core.

pub(super) mod quiesce;
mod section;
pub(super) mod set;
