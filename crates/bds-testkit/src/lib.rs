//! What the tests of the other crates share: QEMU's tools as an oracle, scratch files, axes of the test matrix.
//!
//! Used from `tests/it` only; never a dependency of what we ship.
#![forbid(unsafe_code)]

mod axes;
mod chance;
mod disk_model;
mod oracle;
mod scratch;
mod workload;

pub use axes::{Cache, Engine, Format, axes};
pub use chance::Chance;
pub use disk_model::{DiskModel, Ended};
pub use oracle::{Output, Tool, qemu_img, qemu_io, tool};
pub use scratch::{Scratch, pattern};
pub use workload::{Op, SECTOR, Shape, Step, Workload};

/// Prints the line by which the test runner counts a skip. Return from the test after it.
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
