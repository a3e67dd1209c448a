//! Each type of job on each path: success on every engine, errors, cancels at every await, pauses,
//! drained sections; always under a guest's load, always with the same checks. The table of types
//! and paths is in `docs/jobs-scenarios.md`.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests: a panic is their way to fail, numbers are small"
)]

mod cycles;
mod ends;
mod engines;
mod latency;
mod rig;
mod stuck;
