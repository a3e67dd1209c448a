//! The jobs that shorten a chain: stream and commit.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is their way to fail")]

mod commit;
mod drained;
mod ends;
mod files;
mod kit;
mod power;
mod shared;
mod stream;
