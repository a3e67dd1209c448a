//! Checks an image without changing it.
//!
//! `ref_walk` counts references (with `l2_entries`, `ref_map`), `refcount_reader` reads stored
//! counts, `compare` compares both and reports (`findings`). `truncation` looks for what an image
//! lost with the end of its file, before it is opened for writing.

pub(super) mod compare;
pub(super) mod findings;
pub(super) mod l2_entries;
pub(super) mod ref_map;
pub(super) mod ref_walk;
pub(super) mod refcount_reader;
pub(super) mod truncation;
