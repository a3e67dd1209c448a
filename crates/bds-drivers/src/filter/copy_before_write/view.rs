//! Reads the snapshot: from the stage, the target, or the node itself.

use bds_core::Result;
use bds_core::driver::{Precision, ReadFlags, StatusFlags, StatusRun};
use bds_io::IoVec;

use super::keep::Parts;
use super::stage::Staged;

impl Parts {
    /// Copies what is staged at `at` into the beginning of `iov`. Returns the number of bytes.
    pub(super) async fn read_staged(&self, at: u64, iov: &IoVec) -> Result<u64> {
        match self.snapshot.stage.read(at, iov) {
            Staged::Nothing => Ok(0),
            Staged::Copied(len) => Ok(len as u64),
            Staged::Spilled(place, from, len) => {
                self.read_spilled(&place, from, iov.slice(0..len)).await?;
                Ok(len as u64)
            }
        }
    }

    /// Fills `iov` with the bytes of the snapshot.
    pub(super) async fn read_snapshot(&self, offset: u64, iov: IoVec) -> Result<()> {
        let Parts { snapshot, file, target, .. } = self;
        let range = offset..offset + iov.len() as u64;
        snapshot.check_access(&range)?;
        let frozen = snapshot.frozen.register(range.clone());
        let mut at = offset;
        while at < range.end {
            let (passed, run_end) = snapshot.passed_run(at, range.end);
            let slice = |to: u64| {
                let index = |byte: u64| usize::try_from(byte - offset).unwrap_or(usize::MAX);
                iov.slice(index(at)..index(to))
            };
            let end = if passed {
                match self.read_staged(at, &slice(run_end)).await? {
                    0 => {
                        // It may reach the target meanwhile, but not leave it.
                        let staged = snapshot.stage.next(at).map_or(run_end, |staged| staged.start);
                        let end = run_end.min(staged.max(at));
                        if end > at {
                            target.read(at, slice(end), ReadFlags::empty()).await?;
                        }
                        end
                    }
                    len => at + len,
                }
            } else {
                file.read(at, slice(run_end), ReadFlags::empty()).await?;
                run_end
            };
            at = end;
        }
        drop(frozen);
        // What was read after it broke may be new.
        snapshot.check_whole()
    }

    /// Status of a run of the snapshot.
    pub(super) async fn snapshot_run(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> Result<StatusRun> {
        let Parts { snapshot, file, target, .. } = self;
        let end = snapshot.map.len().min(offset.saturating_add(len));
        if offset >= end {
            return Ok(StatusRun { len: 0, flags: StatusFlags::EOF, map: None });
        }
        snapshot.check_access(&(offset..offset + 1))?;
        let frozen = snapshot.frozen.register(offset..end);
        let (passed, run_end) = snapshot.passed_run(offset, end);
        let staged = snapshot.stage.next(offset).filter(|_| passed);
        let run = match staged {
            Some(staged) if staged.contains(&offset) => {
                let (len, flags) = (staged.end.min(run_end) - offset, StatusFlags::DATA);
                StatusRun { len, flags, map: None }
            }
            Some(staged) => {
                let end = staged.start.min(run_end);
                target.block_status(offset, end - offset, precision).await?
            }
            None if passed => target.block_status(offset, run_end - offset, precision).await?,
            None => file.block_status(offset, run_end - offset, precision).await?,
        };
        drop(frozen);
        snapshot.check_whole()?;
        let is_zero = run.flags.contains(StatusFlags::ZERO);
        let flags = if is_zero { StatusFlags::ZERO } else { StatusFlags::DATA };
        Ok(StatusRun { len: run.len, flags: flags | StatusFlags::ALLOCATED, map: None })
    }
}
