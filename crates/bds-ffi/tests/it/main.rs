//! Integration tests: the C suite, sweeps over all functions, abuse of handles, the boundary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod abuse;
mod c_suite;
mod exports;
mod nbdkit;
mod panics;
mod python;
mod sweep;
