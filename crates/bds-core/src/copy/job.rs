//! State that the workers of one copy share: planner, order of writes, counts, cancellation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bds_io::BufPool;
use bds_io::sync::Notify;

use super::options::{CopyOptions, CopyReport, CopySource};
use super::plan::Planner;
use crate::error::{Error, ErrorKind, Result};
use crate::request::Backend;

/// State shared by the workers of one copy.
pub(super) struct Job<'a> {
    pub(super) sources: &'a [CopySource],
    pub(super) target: &'a Backend,
    pub(super) options: &'a CopyOptions,
    pub(super) planner: bds_io::sync::Mutex<Planner<'a>>,
    pub(super) turns: Turns,
    pub(super) counts: Counts,
    pub(super) failed: AtomicBool,
    pub(super) pool: BufPool,
    pub(super) total: u64,
}

impl Job<'_> {
    pub(super) fn is_stopped(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn check_cancel(&self) -> Result<()> {
        match &self.options.cancel {
            Some(flag) if flag.load(Ordering::Relaxed) => {
                Err(Error::new(ErrorKind::Cancelled, "the copy was cancelled"))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn progress(&self, len: u64) {
        let done = self.counts.done.fetch_add(len, Ordering::Relaxed) + len;
        if let Some(progress) = &self.options.progress {
            progress(done, self.total);
        }
    }
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) done: AtomicU64,
    pub(super) written: AtomicU64,
    pub(super) zeroed: AtomicU64,
    pub(super) skipped: AtomicU64,
    pub(super) salvaged: AtomicU64,
}

impl Counts {
    pub(super) fn report(&self, total: u64) -> CopyReport {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CopyReport {
            total,
            written: load(&self.written),
            zeroed: load(&self.zeroed),
            skipped: load(&self.skipped),
            salvaged: load(&self.salvaged),
        }
    }
}

/// Orders the beginnings of writes by the pieces' numbers. A piece passes its turn as soon as its
/// last write has begun: writes overlap, and a driver that allocates as they come still places them
/// in order.
#[derive(Default)]
pub(super) struct Turns {
    now: AtomicU64,
    passed: Notify,
}

impl Turns {
    pub(super) async fn wait(&self, number: u64) {
        self.passed.wait_until(|| self.now.load(Ordering::SeqCst) >= number).await;
    }

    pub(super) fn pass(&self, number: u64) {
        self.now.fetch_max(number + 1, Ordering::SeqCst);
        self.passed.notify_waiters();
    }

    /// Ends all waits after a failure: some pieces will never be written.
    pub(super) fn release_all(&self) {
        self.pass(u64::MAX - 1);
    }
}
