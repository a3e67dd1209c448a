//! Integration tests: the C suite, sweeps over all functions, abuse of handles, the boundary.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod abi;
mod abuse;
mod c_suite;
mod exports;
mod header;
mod nbdkit;
mod panics;
mod python;
mod sweep;
