//! Copies an image for a backup or a restoration, and hashes what passes by.

use std::sync::{Mutex, PoisonError};

use bds_core::Result;
use bds_core::copy::{self, CopyControl, CopyMap, CopyRead, Found, FoundRun, RunOptions};
use bds_core::driver::BoxFuture;
use bds_core::graph::NodeId;
use bds_core::request::Backend;
use bds_io::IoVec;
use bds_jobs::manifest::ManifestBuilder;

use crate::progress::Progress;

/// Bytes that are copied together: a chunk of a manifest.
pub(super) const GRANULARITY: u32 = 64 << 10;

/// Copies what the map names from `source` to `target`.
pub(super) async fn copy(
    map: &CopyMap,
    (source, target): (&Backend, &Backend),
    builder: &ManifestBuilder,
    options: &RunOptions,
    progress: Progress,
) -> Result<()> {
    let reader = HashingRead { source, builder };
    let total = map.dirty_bytes();
    let control = Shown { total, state: Mutex::new((0, progress)) };
    let copied = copy::run(map, &reader, target, options, &control).await;
    let (_, progress) = control.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match &copied {
        Ok(()) => progress.finish(total),
        Err(_) => progress.abandon(),
    }
    copied
}

/// Reads a backend and passes what was read on to a manifest.
struct HashingRead<'a> {
    source: &'a Backend,
    builder: &'a ManifestBuilder,
}

impl CopyRead for HashingRead<'_> {
    fn node_name(&self) -> String {
        CopyRead::node_name(self.source)
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            CopyRead::read(self.source, offset, iov.clone()).await?;
            self.builder.saw(offset, &iov);
            Ok(())
        })
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(async move {
            let run = self.source.found(offset, len, above).await?;
            if run.found == Found::Zero {
                self.builder.saw_zeros(offset..offset + run.len.min(len));
            }
            Ok(run)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        CopyRead::discard(self.source, offset, len)
    }
}

/// Shows the progress of a copy.
struct Shown {
    total: u64,
    /// Bytes done, and where that is shown.
    state: Mutex<(u64, Progress)>,
}

impl CopyControl for Shown {
    fn copied(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, progress) = &mut *state;
        *done = self.total.min(*done + bytes);
        progress.show(*done, self.total);
    }
}
