//! Test fixtures and oracles shared by the other crates: QEMU's tools, scratch files, workloads, a
//! disk model, axes of the test matrix.
//!
//! A dev-dependency only, used from `tests/it`; no shipped crate depends on it.
#![forbid(unsafe_code)]

mod axes;
mod chance;
mod daemon;
mod disk_model;
mod oracle;
mod scratch;
mod stamped;
mod workload;

pub use axes::{Cache, Engine, Format, axes};
pub use chance::Chance;
pub use daemon::{ask_daemon, bitmap_sums, run_daemon_job};
pub use disk_model::{DiskModel, Ended};
pub use oracle::{Output, Tool, qemu_img, qemu_io, tool};
pub use scratch::{Scratch, pattern};
pub use stamped::{BLOCK, StampedDisk, StampedWrite, Tick};
pub use workload::{Op, SECTOR, Shape, Step, Workload};

/// Prints the line that the test runner counts as a skip. Return from the test after it.
///
/// ```
/// fn needs_a_tool() {
///     let Some(_img) = bds_testkit::qemu_img() else { return };
///     // …
/// }
/// ```
#[expect(clippy::print_stdout, reason = "the line is the interface to the test runner")]
pub fn skip(why: &str) {
    println!("skipped: {why}");
}

/// The example of the crate's README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
