//! Dirty bitmaps: which granules of a node's bytes were written since some moment.
//!
//! * `hbitmap`: the bits, set by many threads without a lock.
//! * `area`: searching and claiming runs of dirty granules.
//! * `wire`: the bits as bytes, in the order that qcow2 and QEMU use.
//! * [`intent_log`]: a file beside a disk from which bitmaps are recovered after a crash.
//!
//! This folder knows neither nodes nor images. Names, owners and leases of a node's bitmaps are in
//! [`crate::graph`].

mod area;
mod hbitmap;
pub mod intent_log;
mod wire;

pub use hbitmap::{HBitmap, MAX_GRANULARITY, MAX_GRANULES, MIN_GRANULARITY};
pub use wire::StreamState;

#[cfg(test)]
mod tests;
