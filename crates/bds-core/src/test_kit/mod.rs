//! Fake drivers and fixtures for the unit tests of the graph, the request path and the copier.
//!
//! | module | driver names | used by | what it does |
//! |---|---|---|---|
//! | [`disk`], [`bitmap_store`] | `fake` | `request`, `copy` | memory; asserts what the request path promises to drivers |
//! | [`logging`] | `file`, `cow`, `pass` | `graph` | logs opens, flushes, closes; stored headers, simulated files |
//! | [`scripted`] | `part`, `sieve` | `graph` `history` | runs the test's hook at any point of any node |
//! | [`stepwise`] | `file`, `cow`, `pass` | `graph` `properties` | fails at numbered steps, counts opens and closes |
//! | [`forwarding`] | `leaf`, `image`, `filter` | `graph` `schedules` | sends requests on, forbids entry on demand |
//!
//! The last four share one driver, [`driver::FakeDriver`], which asserts the driver contract; each
//! supplies a [`driver::Behaviour`]. They enter nodes through [`gate_port`], a request path of one
//! step, or through the real one.

pub(crate) mod bitmap_store;
pub(crate) mod disk;
pub(crate) mod driver;
pub(crate) mod forwarding;
pub(crate) mod gate_port;
pub(crate) mod logging;
pub(crate) mod scripted;
pub(crate) mod stepwise;

use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_io::{Buf, IoVec, Sim, SimConfig};

use crate::options::{OptionKind, OptionSpec};

/// Runs a future in a simulation of its own.
pub(crate) fn run<F: Future>(seed: u64, future: F) -> F::Output {
    Sim::new(seed, SimConfig::calm()).block_on(future)
}

/// Yields this many times, so that other tasks run.
pub(crate) async fn yield_times(turns: usize) {
    for _ in 0..turns {
        bds_io::yield_now().await;
    }
}

/// Yields until every task that can run has run, without ending the test's own task.
pub(crate) async fn let_tasks_run() {
    yield_times(300).await;
}

/// The task's result if it has ended; lets other tasks run first.
pub(crate) async fn ended<T: Send + 'static>(task: &mut bds_io::Task<T>) -> Option<T> {
    let_tasks_run().await;
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

/// An option of a fake driver.
pub(crate) const fn option(name: &'static str, kind: OptionKind) -> OptionSpec {
    OptionSpec { name, kind, help: "", default: None }
}

/// Locks, also after a test has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
