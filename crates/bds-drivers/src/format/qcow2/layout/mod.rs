//! The bytes of an image: headers, extensions, entries, the bitmap directory and offsets, parsed
//! and encoded by pure functions.
//!
//! Limits before allocation, checked arithmetic, no panic on any input: these are the fuzz targets.
//! No I/O.

pub(super) mod bitmap_directory;
pub(super) mod cluster0;
pub(super) mod entry;
pub(super) mod extension;
pub(super) mod header;
pub(super) mod rewrite;
pub(super) mod space;
pub(super) mod units;
