//! The drivers from outside: in a graph on the simulated disk, formats against QEMU's tools, hostile images, replayed fuzz
//! corpora.

mod blkdebug;
#[cfg(feature = "qcow2")]
mod fuzz_seeds;
#[cfg(feature = "qcow2")]
mod hostile;
mod house;
mod locks;
mod mem;
mod model;
mod null;
#[cfg(feature = "qcow2")]
mod qcow2;
#[cfg(feature = "qcow2")]
mod qcow2_check;
mod raw;
mod sweep;
