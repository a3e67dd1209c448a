//! Metadata in memory: L1 table, L2 slices and refcounts; how they are found, loaded, changed and
//! written back.
//!
//! `tables`, `slice_cache`, `refcounts` hold it; `lookup` reads it without a lock; `load` (with
//! `shared_load`) fills it; `l2_table` provides the table to change; `write_back` (with
//! `pending_flush`) orders the writes; `background` (with `budget`) starts them and limits how much
//! is dirty.

pub(super) mod background;
pub(super) mod budget;
pub(super) mod l2_table;
pub(super) mod load;
pub(super) mod lookup;
pub(super) mod pending_flush;
pub(super) mod refcounts;
pub(super) mod shared_load;
pub(super) mod slice_cache;
pub(super) mod tables;
pub(super) mod write_back;
