//! Block status of a file by SEEK_DATA and SEEK_HOLE, and changes of its length.
//!
//! A query for holes costs a system call, and mapping a dense file asks for every piece of one long
//! run. The last run of data is therefore cached. Data that became a hole behind our back only
//! makes an answer less precise, never wrong; holes are never cached.

use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use bds_core::driver::{HostMap, Prealloc, Precision, StatusFlags, StatusRun, Truncate};
use bds_core::{Error, ErrorKind, Result};
use bds_io::ZeroMode;
use bds_io::{Buf, FileKind};

use super::{FileNode, Flavour, Opened};

/// Bytes of zeros written at a time.
const FILL_STEP_BYTES: u64 = 1 << 20;

/// Length of the first block of a new file, which is allocated at once: programs that probe the
/// alignment with trial reads need data there, because a hole accepts any alignment.
const FIRST_BLOCK_BYTES: u64 = 4096;

/// The last run of data that the file system reported.
#[derive(Debug, Default)]
pub(super) struct DataRun {
    range: Range<u64>,
    /// Generation: incremented by each invalidation, so that an older answer is not cached.
    age: u64,
}

impl FileNode {
    pub(super) fn forget_data_run(&self) {
        let mut run = self.data_run.lock().unwrap_or_else(PoisonError::into_inner);
        run.range = 0..0;
        run.age += 1;
    }

    /// Status of `len` bytes from `offset`. Unless exact, everything is reported as data.
    pub(super) fn status(&self, offset: u64, len: u64, precision: Precision) -> Result<StatusRun> {
        let file_len = self.status_len(offset, len)?;
        if offset >= file_len {
            return Ok(StatusRun { len: 0, flags: StatusFlags::EOF, map: None });
        }
        let len = len.min(file_len - offset);
        let now = self.opened();
        let (is_data, run_len) =
            if precision == Precision::Exact && now.file.kind() == FileKind::Regular {
                self.run_at(&now, offset, len)?
            } else {
                (true, len)
            };
        let content = if is_data { StatusFlags::DATA } else { StatusFlags::ZERO };
        let mut flags = content | StatusFlags::ALLOCATED | StatusFlags::OFFSET_VALID;
        if offset + run_len >= file_len {
            flags |= StatusFlags::EOF;
        }
        // A protocol has no child: the offset is one of its own file.
        Ok(StatusRun { len: run_len, flags, map: Some(HostMap { child: "", offset }) })
    }

    /// The known length, unless the query reaches past it: the file may have grown.
    fn status_len(&self, offset: u64, len: u64) -> Result<u64> {
        let known = self.known_len.load(Ordering::Relaxed);
        if offset.checked_add(len).is_some_and(|end| end < known) {
            return Ok(known);
        }
        self.grown_to(self.actual_len()?);
        Ok(self.known_len.load(Ordering::Relaxed))
    }

    fn run_at(&self, now: &Opened, offset: u64, len: u64) -> Result<(bool, u64)> {
        let age = {
            let run = self.data_run.lock().unwrap_or_else(PoisonError::into_inner);
            if run.range.contains(&offset) {
                return Ok((true, len.min(run.range.end - offset)));
            }
            run.age
        };
        let extent = match now.file.extent(offset) {
            Ok(Some(extent)) if extent.len > 0 => extent,
            // The file became shorter: a read will report that. A file system without holes, or
            // with inconsistent answers: data.
            Ok(None | Some(_)) => return Ok((true, len)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok((true, len)),
            Err(e) => return Err(self.failed("cannot query holes", offset, e)),
        };
        if extent.is_data {
            let mut run = self.data_run.lock().unwrap_or_else(PoisonError::into_inner);
            if run.age == age {
                run.range = offset..offset.saturating_add(extent.len);
            }
        }
        Ok(now.whole_blocks(extent.is_data, extent.len, len))
    }

    pub(super) async fn resize(&self, change: Truncate) -> Result<()> {
        self.resize_kind(change).await.map_err(|e| e.node(&self.node_name).file(&self.path))
    }

    async fn resize_kind(&self, change: Truncate) -> Result<()> {
        match self.flavour {
            Flavour::File => self.resize_file(change).await,
            Flavour::Device => {
                let now = self.current_len()?;
                match change.len {
                    len if len == now || (!change.exact && len < now) => Ok(()),
                    len if len > now => Err(Error::new(
                        ErrorKind::InvalidInput,
                        "cannot grow a device; enlarge it first",
                    )
                    .field("size", len)),
                    len => Err(Error::new(ErrorKind::NotSupported, "cannot resize a device")
                        .field("size", len)),
                }
            }
        }
    }

    async fn resize_file(&self, change: Truncate) -> Result<()> {
        let old_len = self.current_len()?;
        let new_len = change.len;
        if new_len < old_len && change.prealloc != Prealloc::Off {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "preallocation cannot be used for shrinking files",
            )
            .field("size", new_len));
        }
        if change.prealloc == Prealloc::Metadata {
            return Err(Error::new(
                ErrorKind::NotSupported,
                "preallocation=metadata is for formats; a file takes off, falloc or full",
            ));
        }
        let now = self.opened();
        let _resizing = now.locks.resizing(&now.file)?;
        self.forget_data_run();
        let outcome = set_len(&now.file, old_len, new_len, change.prealloc).await;
        self.forget_data_run();
        self.current_len()?;
        outcome
    }
}

impl Opened {
    /// Rounds a run to blocks: data up, a hole down (and it is data if nothing is left).
    fn whole_blocks(&self, is_data: bool, extent_len: u64, len: u64) -> (bool, u64) {
        let align = u64::from(self.limits.request_alignment);
        if extent_len >= len {
            return (is_data, len);
        }
        if is_data {
            return (true, extent_len.next_multiple_of(align).min(len));
        }
        match extent_len / align * align {
            0 => (true, align.min(len)),
            whole => (false, whole),
        }
    }
}

/// Sets the length of `file`; restores the old one on failure.
pub(super) async fn set_len(
    file: &bds_io::File,
    old_len: u64,
    new_len: u64,
    prealloc: Prealloc,
) -> Result<()> {
    let outcome = match prealloc {
        Prealloc::Falloc if new_len > old_len => file
            .zero_range(old_len..new_len, ZeroMode::Extend)
            .await
            .map_err(|e| Error::io(e, "could not preallocate data for the new file")),
        Prealloc::Full if new_len > old_len => fill(file, old_len, new_len)
            .await
            .map_err(|e| Error::io(e, "could not write zeros for preallocation")),
        _ => match file.set_len(new_len).await {
            Ok(()) if old_len == 0 && new_len >= FIRST_BLOCK_BYTES => {
                let zeros = Buf::zeroed(4096, 4096);
                let outcome = file.write(0, zeros.iov(), false).await;
                outcome.map(drop).map_err(|e| Error::io(e, "could not write the first block"))
            }
            outcome => {
                return outcome.map_err(|e| Error::io(e, "failed to resize file"));
            }
        },
    };
    let Err(error) = outcome else { return Ok(()) };
    match file.set_len(old_len).await {
        Ok(()) => Err(error),
        Err(e) => Err(error.context(format!("also failed to restore the length {old_len} ({e})"))),
    }
}

async fn fill(file: &bds_io::File, from: u64, to: u64) -> std::io::Result<()> {
    file.set_len(to).await?;
    let step = usize::try_from(FILL_STEP_BYTES.min(to - from)).expect("a step fits into memory");
    let zeros = Buf::zeroed(step, 4096);
    let mut at = from;
    while at < to {
        let len = usize::try_from((to - at).min(step as u64)).expect("at most a step");
        match file.write(at, zeros.slice(0..len), false).await {
            Ok(0) => return Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
            Ok(written_len) => at += written_len as u64,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    file.sync_data().await
}
