//! Integration tests of the drivers: in a graph on the simulated disk, formats against QEMU's
//! tools, hostile images, replayed fuzz corpora.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "helpers of tests: a panic is their way to fail"
)]

#[cfg(feature = "qcow2")]
mod amend;
#[cfg(feature = "qcow2")]
mod backing_record;
#[cfg(feature = "qcow2")]
mod bitmap_log;
mod blkdebug;
#[cfg(feature = "qcow2")]
mod cached_facts;
#[cfg(feature = "qcow2")]
mod compress;
#[cfg(feature = "copy-before-write")]
mod copy_before_write;
#[cfg(feature = "qcow2")]
mod copy_on_read;
mod device;
mod dropped_requests;
#[cfg(feature = "qcow2")]
mod fuzz_seeds;
#[cfg(feature = "qcow2")]
mod graph_load;
#[cfg(feature = "qcow2")]
mod hostile_entries;
#[cfg(feature = "qcow2")]
mod hostile_images;
mod kit;
#[cfg(feature = "qcow2")]
mod known_defects;
#[cfg(feature = "qcow2")]
mod lifecycle;
#[cfg(feature = "qcow2")]
#[path = "../../examples/graph/load.rs"]
mod load;
mod locks;
mod matrix;
mod mem;
mod model;
mod null;
#[cfg(feature = "qcow2")]
mod options_table;
mod preallocate;
#[cfg(feature = "qcow2")]
mod qcow2;
#[cfg(feature = "qcow2")]
mod qcow2_check;
#[cfg(feature = "qcow2")]
mod qcow2_create;
mod raw;
#[cfg(feature = "qcow2")]
mod reap_beside;
mod reopen;
mod snapshot_flush;
mod sweep;
mod throttle;
#[cfg(feature = "qcow2")]
mod unpolled_requests;
