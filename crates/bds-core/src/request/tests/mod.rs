//! The corridor's promises, on fakes under the seeded scheduler.

mod copy_on_read;
mod detach_on_drop;
mod detached_ops;
mod device;
mod drain;
mod durable;
mod events;
pub(crate) mod fake;
mod flags;
mod medium;
mod model;
mod overlap;
mod policy;
mod status;
mod unpolled_futures;
mod waiting;

use bds_io::{Buf, IoVec, Sim, SimConfig};

/// Runs a future in a world of its own.
pub(crate) fn run<F: Future>(seed: u64, future: F) -> F::Output {
    Sim::new(seed, SimConfig::calm()).block_on(future)
}

/// Lets everything that can go on do so, without ending the test's own task.
pub(crate) async fn settle() {
    for _ in 0..300 {
        bds_io::yield_now().await;
    }
}

/// Has the task ended, and how? Lets everything go on first.
pub(crate) async fn ended<T: Send + 'static>(task: &mut bds_io::Task<T>) -> Option<T> {
    settle().await;
    futures_util::FutureExt::now_or_never(task)
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
