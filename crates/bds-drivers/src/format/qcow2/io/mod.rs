//! Guest I/O: reads, writes, compressed writes, zero writes and discards, block status.
//!
//! `write` → `cow` (the bytes around the write) → `link` (the new entries). `backing`, `compress`
//! and `decompressed_cache` serve reads.

pub(super) mod backing;
pub(super) mod compress;
pub(super) mod compressed_write;
pub(super) mod cow;
pub(super) mod decompressed_cache;
pub(super) mod link;
pub(super) mod read;
pub(super) mod status;
pub(super) mod write;
pub(super) mod zero;
