//! Tests of the request path on fake disks under the seeded scheduler.

mod bitmaps;
mod copy_on_read;
mod detach_on_drop;
mod detached_ops;
mod device;
mod drain;
mod durable;
mod error_kinds;
mod events;
mod flags;
mod medium;
mod model;
mod offload;
mod overlap;
mod policy;
mod status;
mod unpolled_futures;
mod waiting;
