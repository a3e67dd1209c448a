//! Parses and encodes what an image stores: pure functions over bytes.

pub(super) mod bitmap_directory;
pub(super) mod cluster0;
pub(super) mod entry;
pub(super) mod extension;
pub(super) mod header;
pub(super) mod space;
pub(super) mod units;
