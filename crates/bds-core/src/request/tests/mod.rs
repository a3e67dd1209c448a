//! The corridor's promises, on fakes under the seeded scheduler.

mod begun;
mod copy_on_read;
pub(crate) mod fake;
mod flags;
mod model;
mod overlap;
mod status;

use bds_io::{Buf, IoVec, Sim, SimConfig};

/// Runs a future in a world of its own.
pub(crate) fn run<F: Future>(seed: u64, future: F) -> F::Output {
    Sim::new(seed, SimConfig::calm()).block_on(future)
}

/// A buffer in `parts` segments with these bytes.
pub(crate) fn iov(bytes: &[u8], parts: usize) -> IoVec {
    let mut list = IoVec::default();
    let step = bytes.len().div_ceil(parts.max(1)).max(1);
    for chunk in bytes.chunks(step) {
        list.push(Buf::from_slice(chunk).iov());
    }
    list
}
