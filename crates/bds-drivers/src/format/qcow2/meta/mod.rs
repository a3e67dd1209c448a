//! The metadata cached in memory: L1 and L2 tables, refcounts, and the order in which changes reach the file.

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
