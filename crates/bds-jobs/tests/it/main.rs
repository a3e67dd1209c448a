//! Tests of the crate's interface, on the simulated world.

#[path = "../../../bds-drivers/tests/it/copy_before_write/disk.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "shared with the tests of the filter"
)]
mod controlled;

mod amend;
mod backup;
mod budget;
mod chain;
mod checkpoint;
mod create;
mod errors;
mod every_type;
mod fake;
mod fuzz_seeds;
mod grouped;
mod groups;
mod life;
mod load;
mod meter;
mod mirror;
mod query;
mod races;
mod random;
mod resume;
mod shutdown;
mod speed;
mod stuck;
mod verbs;
