//! Writes zeros and discards ranges, by the first method that the file system supports.
//!
//! ```text
//!               regular file                       block device
//! zero          zero range, else punch + allocate  BLKZEROOUT (direct, and only if
//!               else allocate (past the end)       writing zeros would do as well)
//! zero + unmap  punch hole, then as above          punch hole, then as above
//! discard       punch hole                         BLKDISCARD
//! ```
//!
//! A method that turned out to be unsupported is not tried again on this node. "Unsupported" means
//! that the caller writes zeros itself; an error means that the device failed.
//!
//! Growing by zeros never uses ftruncate: between querying the length and setting it, another
//! request may have grown the file further, and its bytes would be cut off.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::Result;
use bds_core::driver::{Attempt, ZeroFlags};
use bds_io::{Buf, ZeroMode};

use super::{FileNode, Flavour};

/// Result of one method.
enum Outcome {
    Done,
    /// Not supported, or not for this range.
    Next,
}

impl FileNode {
    pub(super) async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<Attempt> {
        if len == 0 {
            return Ok(Attempt::Done);
        }
        self.forget_data_run();
        let outcome = match self.flavour {
            Flavour::File => self.zero_file(offset, len, flags).await,
            Flavour::Device => self.zero_device(offset, len, flags).await,
        };
        self.forget_data_run();
        match outcome {
            Ok(Outcome::Done) => {
                self.grown_to(offset + len);
                Ok(Attempt::Done)
            }
            Ok(Outcome::Next) => Ok(Attempt::Unsupported),
            Err(e) => Err(self.failed("cannot write zeros", offset, e)),
        }
    }

    async fn zero_file(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<Outcome> {
        let features = &self.features;
        let end = offset + len;
        if flags.contains(ZeroFlags::MAY_UNMAP)
            && matches!(self.punch(offset, len).await?, Outcome::Done)
        {
            return self.extend_to(offset, end).await;
        }
        if matches!(
            self.attempt(&features.no_zero_range, offset, len, ZeroMode::Allocate).await?,
            Outcome::Done
        ) {
            return Ok(Outcome::Done);
        }
        let can_allocate = !features.no_allocate.load(Ordering::Relaxed);
        if can_allocate && matches!(self.punch(offset, len).await?, Outcome::Done) {
            // The bytes are zeros now; allocating keeps later writes from running out of space.
            if matches!(self.allocate(offset, len).await?, Outcome::Done) {
                return Ok(Outcome::Done);
            }
        }
        if offset >= self.opened().file.len()? {
            return self.allocate(offset, len).await;
        }
        Ok(Outcome::Next)
    }

    /// After a hole was punched: extends the file to `end`, because its length is part of what is
    /// read.
    async fn extend_to(&self, offset: u64, end: u64) -> io::Result<Outcome> {
        let now = self.opened();
        let len = now.file.len()?;
        if end <= len {
            return Ok(Outcome::Done);
        }
        // One block of zeros at the end of this request's own range: it cannot cut off or overwrite
        // bytes of others.
        let block_len = u64::from(now.limits.request_alignment).min(end - offset);
        let buf_len = usize::try_from(block_len).expect("an alignment fits into memory");
        let zeros = Buf::zeroed(buf_len, now.limits.memory_alignment as usize);
        match now.file.write(end - block_len, zeros.iov(), false).await? {
            0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            n if n == buf_len => Ok(Outcome::Done),
            _ => Ok(Outcome::Next),
        }
    }

    async fn zero_device(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<Outcome> {
        if flags.contains(ZeroFlags::MAY_UNMAP)
            && matches!(self.punch(offset, len).await?, Outcome::Done)
        {
            return Ok(Outcome::Done);
        }
        // BLKZEROOUT may write the zeros one by one, and does not update the page cache.
        let may_be_slow = !flags.contains(ZeroFlags::NO_FALLBACK);
        let known_bad = self.features.no_zero_device.load(Ordering::Relaxed);
        let now = self.opened();
        if !may_be_slow || !now.is_direct || known_bad {
            return Ok(Outcome::Next);
        }
        self.classify(
            now.file.zero_device(offset..offset + len).await,
            &self.features.no_zero_device,
        )
    }

    async fn punch(&self, offset: u64, len: u64) -> io::Result<Outcome> {
        self.attempt(&self.features.no_punch_hole, offset, len, ZeroMode::PunchHole).await
    }

    async fn allocate(&self, offset: u64, len: u64) -> io::Result<Outcome> {
        self.attempt(&self.features.no_allocate, offset, len, ZeroMode::Extend).await
    }

    async fn attempt(
        &self,
        known_bad: &AtomicBool,
        offset: u64,
        len: u64,
        mode: ZeroMode,
    ) -> io::Result<Outcome> {
        if known_bad.load(Ordering::Relaxed) {
            return Ok(Outcome::Next);
        }
        self.classify(self.opened().file.zero_range(offset..offset + len, mode).await, known_bad)
    }

    /// Classifies a result: done, never supported, not supported for this range, or failed.
    fn classify(&self, answer: io::Result<()>, known_bad: &AtomicBool) -> io::Result<Outcome> {
        let Err(error) = answer else { return Ok(Outcome::Done) };
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV) => {
                known_bad.store(true, Ordering::Relaxed);
                Ok(Outcome::Next)
            }
            Some(libc::EINVAL | libc::EBUSY | libc::EPERM | libc::EINTR) => Ok(Outcome::Next),
            _ => Err(error),
        }
    }

    pub(super) async fn discard_range(&self, offset: u64, len: u64) -> Result<Attempt> {
        if len == 0 {
            return Ok(Attempt::Done);
        }
        self.forget_data_run();
        let outcome = match self.flavour {
            Flavour::File => self.punch(offset, len).await,
            Flavour::Device => {
                let known_bad = &self.features.no_discard_device;
                if known_bad.load(Ordering::Relaxed) {
                    return Ok(Attempt::Unsupported);
                }
                let now = self.opened();
                self.classify(now.file.discard_device(offset..offset + len).await, known_bad)
            }
        };
        self.forget_data_run();
        match outcome {
            Ok(Outcome::Done) => Ok(Attempt::Done),
            Ok(Outcome::Next) => Ok(Attempt::Unsupported),
            Err(e) => Err(self.failed("cannot discard", offset, e)),
        }
    }
}
