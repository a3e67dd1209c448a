//! Tests of mirror and active commit on simulated disks: clients write stamps while jobs start,
//! end, are cancelled and fail.

mod bitmaps;
mod commit;
mod crash;
mod cycles;
mod faults;
mod kit;
mod late_backing;
mod modes;
mod options;
mod pivot;
mod threads;
mod verbs;
