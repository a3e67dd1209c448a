//! Integration tests of the drivers: in a graph on the simulated disk, formats against QEMU's tools, hostile images,
//! replayed fuzz corpora.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "helpers of tests: a panic is their way to fail"
)]

#[cfg(all(feature = "mem", feature = "blkdebug"))]
mod backend;
mod blkdebug;
#[cfg(feature = "qcow2")]
mod compress;
#[cfg(feature = "qcow2")]
mod copy_on_read;
mod device;
#[cfg(feature = "qcow2")]
mod facts;
#[cfg(feature = "qcow2")]
mod findings;
#[cfg(feature = "qcow2")]
mod fuzz_seeds;
#[cfg(feature = "qcow2")]
mod graph_load;
#[cfg(feature = "qcow2")]
mod hostile;
#[cfg(feature = "qcow2")]
mod hostile_places;
mod house;
#[cfg(feature = "qcow2")]
mod kept;
mod late;
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
mod reopen;
mod sweep;
mod throttle;
