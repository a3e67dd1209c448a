//! `OldData`: the source of a job that copies what a snapshot still has to keep.
//!
//! With staging, a guest's write does not wait for the job: its old data is in the staging area
//! then, and the disk may have changed while the job's copy of that range is under way. So the job
//! reads what was staged there, and the rest from the disk, where a write waits for the read alone.

use std::ops::Range;
use std::sync::Arc;

use bds_core::copy::{CopyRead, Found, FoundRun};
use bds_core::driver::BoxFuture;
use bds_core::graph::NodeId;
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::keep::Parts;
use super::snapshot::Snapshot;

/// Reads a disk below its copy-before-write filter as the snapshot has it, where the snapshot's map
/// is dirty or claimed by the reader. Not for other ranges, whose old data the target has.
pub struct OldData<'d> {
    snapshot: &'d Snapshot,
    disk: &'d dyn CopyRead,
}

impl std::fmt::Debug for OldData<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OldData").field("disk", &self.disk.node_name()).finish_non_exhaustive()
    }
}

impl<'d> OldData<'d> {
    /// The old data of a snapshot, of which `disk` reads what was not changed.
    pub fn new(snapshot: &'d Snapshot, disk: &'d dyn CopyRead) -> Self {
        Self { snapshot, disk }
    }

    fn parts(&self) -> Result<Arc<Parts>> {
        self.snapshot.check_whole()?;
        let gone = || Error::new(ErrorKind::Cancelled, "the snapshot's filter is closed");
        self.snapshot.parts().ok_or_else(gone)
    }

    async fn fill(&self, offset: u64, iov: &IoVec) -> Result<()> {
        let range: Range<u64> = offset..offset + iov.len() as u64;
        let _frozen = self.snapshot.frozen.register(range.clone());
        let mut at = offset;
        while at < range.end {
            let (passed, run_end) = self.snapshot.passed_run(at, range.end);
            let index = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
            let part = iov.slice(index(at)..index(run_end));
            if !passed {
                self.disk.read(at, part).await?;
                at = run_end;
                continue;
            }
            match self.parts()?.read_staged(at, &part).await? {
                // Only a range that is not the reader's is passed and not staged.
                0 => return Err(Error::new(ErrorKind::InvalidInput, "it was copied").at(at)),
                len => at += len,
            }
        }
        Ok(())
    }
}

impl CopyRead for OldData<'_> {
    fn node_name(&self) -> String {
        self.disk.node_name()
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.fill(offset, &iov).await?;
            // What was read after it broke may be new.
            self.snapshot.check_whole()
        })
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(async move {
            let end = self.snapshot.map.len().min(offset.saturating_add(len));
            let _frozen = self.snapshot.frozen.register(offset..end);
            let (passed, run_end) = self.snapshot.passed_run(offset, end);
            if passed {
                return Ok(FoundRun { len: run_end - offset, found: Found::Data });
            }
            self.disk.found(offset, run_end - offset, above).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.disk.discard(offset, len)
    }
}
