//! Persistent dirty bitmaps: loaded into memory, marked "in use" before they become stale, stored.
//!
//! ```text
//! directory   reads what the file has
//! load        the bits of each bitmap into memory
//! mark        "in use" in the directory, before the first change of what a bitmap records
//! store       new clusters, tables and directory; then the header's pointer; then frees what was
//! journal     the write-intent log in a file of its own, by which they survive a crash
//! switch      the header's pointer to the directory, so that a crash leaves the old or the new one
//! driver      these for the contract of drivers (`BitmapStore`)
//! ```
//!
//! A bitmap in memory may be newer than the file's only while the file says "in use", so whatever a
//! crash leaves is right, or says that it is not. The order of the writes is argued in
//! docs/qcow2.md.

pub(super) mod directory;
mod driver;
mod journal;
mod load;
pub(super) mod mark;
mod store;
mod switch;
