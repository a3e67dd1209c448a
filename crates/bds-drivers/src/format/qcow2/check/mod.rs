//! Checks an image without changing it.

pub(super) mod compare;
pub(super) mod findings;
pub(super) mod l2_entries;
pub(super) mod ref_map;
pub(super) mod ref_walk;
pub(super) mod refcount_reader;
pub(super) mod truncation;
