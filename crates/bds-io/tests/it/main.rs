//! Integration tests of bds-io: one binary, a module for each subject.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panic and say what they skip"
)]

mod abandon;
mod clock;
mod executor;
mod file;
mod foreign;
mod races;
mod sim_crash;
mod sim_faults;
mod sim_files;
mod sim_replay;
mod sim_versions;
mod spawn_now;
mod support;
