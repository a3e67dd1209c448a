//! Remembers the last run of a block status, so that a copy in pieces asks once for each run.

use std::sync::{Mutex, PoisonError};

use bds_core::copy::FoundRun;

/// The last run. For answers that stay true, or do no harm when they are old.
#[derive(Debug, Default)]
pub(crate) struct LastRun(Mutex<Option<(u64, FoundRun)>>);

impl LastRun {
    /// The rest of the run that holds `offset`, of at most `len` bytes.
    pub(crate) fn at(&self, offset: u64, len: u64) -> Option<FoundRun> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, run) = (*last)?;
        let end = start + run.len;
        let is_in = (start..end).contains(&offset);
        is_in.then(|| FoundRun { len: len.min(end - offset), ..run })
    }

    /// Remembers a run that begins at `offset`.
    pub(crate) fn keep(&self, offset: u64, run: FoundRun) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((offset, run));
    }
}
