//! Tests of mirror and active commit on simulated disks: clients write stamps while jobs start,
//! end, are cancelled and fail.

mod cycles;
mod kit;
