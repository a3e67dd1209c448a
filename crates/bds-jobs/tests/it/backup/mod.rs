//! Tests of backup on simulated disks: guests write while it runs, targets fail, hang, lose power.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests: a panic is their way to fail, numbers are small"
)]

mod bitmaps;
mod crash;
mod faults;
mod kit;
mod modes;
mod refusals;
mod spill;

use bds_testkit::Chance;

use crate::controlled as disk;
