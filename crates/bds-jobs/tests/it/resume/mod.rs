//! Copies that are interrupted and go on: what is copied again, and that the copy is right.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "tests: a panic is their way to fail, numbers are small"
)]

mod kit;
mod manifest;
mod record;
mod refusals;
mod scenarios;
mod sweeps;
