//! Transfers bytes: reads, complete writes, flush and copy offload.
//!
//! A read past the end yields zeros; where the file once reached and does not any more, it fails. A
//! write is complete or an error, never short. With O_DIRECT a buffer that the device cannot take,
//! and only that one, goes through an aligned copy.

use std::io;
use std::sync::atomic::Ordering;

use bds_core::driver::Attempt;
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Buf, IoVec};

use super::{FileNode, Opened};

impl FileNode {
    /// Serves a read from the page cache, completely or not at all.
    pub(super) fn quick_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let end = offset.checked_add(iov.len() as u64)?;
        if end > self.known_len.load(Ordering::Relaxed) {
            return None;
        }
        match self.opened().file.try_read(offset, iov)? {
            Ok(read_len) if read_len == iov.len() => Some(Ok(())),
            // The file is shorter than the known length; the slow path handles that.
            Ok(_) => None,
            Err(e) => Some(Err(self.failed("cannot read", offset, e))),
        }
    }

    /// Writes into the page cache, completely or not at all (a short write is repeated from its
    /// start).
    pub(super) fn quick_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let end = offset.checked_add(iov.len() as u64)?;
        match self.opened().file.try_write(offset, iov)? {
            Ok(written_len) if written_len == iov.len() => {
                self.grown_to(end);
                Some(Ok(()))
            }
            Ok(_) => None,
            Err(e) => Some(Err(self.failed("cannot write", offset, e))),
        }
    }

    pub(super) async fn read_all(&self, offset: u64, iov: IoVec) -> Result<()> {
        let now = self.opened();
        if now.needs_bounce(&iov) {
            let buf = Buf::zeroed(iov.len(), now.limits.memory_alignment as usize);
            self.read_fitting(&now, offset, &buf.iov()).await?;
            iov.copy_from_iov(0, &buf.iov());
            return Ok(());
        }
        self.read_fitting(&now, offset, &iov).await
    }

    async fn read_fitting(&self, now: &Opened, offset: u64, iov: &IoVec) -> Result<()> {
        let total = iov.len();
        // Before the read: a write that completes meanwhile may make the file longer.
        let known = self.known_len.load(Ordering::Relaxed);
        let mut done = 0;
        while done < total {
            let at = offset + done as u64;
            let rest = if done == 0 { iov.clone() } else { iov.slice(done..total) };
            let read_len = match now.file.read(at, rest).await {
                Ok(read_len) => read_len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.failed("cannot read", at, e)),
            };
            if read_len == 0 {
                break;
            }
            done += read_len;
            if done < total && now.is_direct {
                if offset + done as u64 >= self.actual_len()? {
                    break;
                }
                done = self.last_block_begin(now, done, read_len, at)?;
            }
        }
        if done < total {
            self.check_end(offset + done as u64, known)?;
            iov.fill(done..total, 0);
        }
        Ok(())
    }

    /// The file ended at `end`: fine if it was not `known` to reach further. A file that others
    /// made shorter has lost data.
    fn check_end(&self, end: u64, known: u64) -> Result<()> {
        let actual = self.actual_len()?;
        self.grown_to(actual);
        // It may have been shrunk through this node meanwhile.
        if end >= known.min(self.known_len.load(Ordering::Relaxed)) {
            return Ok(());
        }
        let words = format!(
            "the file was cut short while it was open: it has {actual} bytes and had {known}"
        );
        Err(Error::new(ErrorKind::Io, words).node(&self.node_name).file(&self.path).at(end))
    }

    /// Where a short direct transfer continues: only whole blocks count, because offsets must stay
    /// aligned.
    fn last_block_begin(
        &self,
        now: &Opened,
        done: usize,
        moved_len: usize,
        at: u64,
    ) -> Result<usize> {
        let align = now.limits.request_alignment as usize;
        if moved_len < align {
            return Err(Error::new(
                ErrorKind::Io,
                "the device moved less than one block of a direct request",
            )
            .file(&self.path)
            .at(at)
            .field("moved", moved_len));
        }
        Ok(done / align * align)
    }

    /// Writes all of `iov`; durable when it returns if `fua`.
    pub(super) async fn write_all(&self, offset: u64, iov: IoVec, fua: bool) -> Result<()> {
        if iov.is_empty() {
            return if fua { self.flush().await } else { Ok(()) };
        }
        if fua {
            self.refuse_if_flush_broke()?;
        }
        let now = self.opened();
        let iov = if now.needs_bounce(&iov) {
            let buf = Buf::zeroed(iov.len(), now.limits.memory_alignment as usize);
            buf.iov().copy_from_iov(0, &iov);
            buf.iov()
        } else {
            iov
        };
        if fua && !self.features.no_dsync.load(Ordering::Relaxed) {
            match self.write_fitting(&now, offset, &iov, true).await {
                Ok(()) => return Ok(()),
                Err(e) => self.handle_dsync_failure(&now, offset, &iov, e).await?,
            }
        } else {
            self.write_fitting(&now, offset, &iov, false)
                .await
                .map_err(|e| self.failed("cannot write", offset, e))?;
        }
        if fua { self.flush().await } else { Ok(()) }
    }

    /// Handles a failed durable write. A plain write tells whether durable writes are unsupported
    /// or space was missing; `Ok` means that it succeeded that way and a flush is owed. Any other
    /// failure is the kernel's one report of a lost page and must stick.
    async fn handle_dsync_failure(
        &self,
        now: &Opened,
        offset: u64,
        iov: &IoVec,
        error: io::Error,
    ) -> Result<()> {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => {
                self.write_fitting(now, offset, iov, false)
                    .await
                    .map_err(|e| self.failed("cannot write", offset, e))?;
                // Only now is it known that the flag was the cause.
                self.features.no_dsync.store(true, Ordering::Relaxed);
                Ok(())
            }
            Some(libc::ENOSPC | libc::EDQUOT) => {
                match self.write_fitting(now, offset, iov, false).await {
                    Ok(()) => self.flush_broke(now, &error),
                    Err(again) => return Err(self.failed("cannot write", offset, again)),
                }
                Err(self.failed("cannot write durably", offset, error))
            }
            _ => {
                self.flush_broke(now, &error);
                Err(self.failed("cannot write durably", offset, error))
            }
        }
    }

    async fn write_fitting(
        &self,
        now: &Opened,
        offset: u64,
        iov: &IoVec,
        dsync: bool,
    ) -> io::Result<()> {
        let written = self.write_pieces(now, offset, iov, dsync).await;
        if written.is_err() {
            // Part of it may be in the file past the old end, so the known length must include it.
            if let Ok(len) = now.file.len() {
                self.grown_to(len);
            }
        }
        written
    }

    async fn write_pieces(
        &self,
        now: &Opened,
        offset: u64,
        iov: &IoVec,
        dsync: bool,
    ) -> io::Result<()> {
        let total = iov.len();
        let mut done = 0;
        while done < total {
            let rest = if done == 0 { iov.clone() } else { iov.slice(done..total) };
            let moved_len = match now.file.write(offset + done as u64, rest, dsync).await {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                Ok(moved_len) => moved_len,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            done += moved_len;
            if done < total && now.is_direct {
                let align = now.limits.request_alignment as usize;
                if moved_len < align {
                    return Err(io::Error::from_raw_os_error(libc::EIO));
                }
                done = done / align * align;
            }
        }
        self.grown_to(offset + total as u64);
        Ok(())
    }

    pub(super) fn grown_to(&self, end: u64) {
        // Read first: a shared cache line that is only read stays in every core's cache.
        if end > self.known_len.load(Ordering::Relaxed) {
            self.known_len.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// fdatasync. Fails for good once it failed on a buffered file.
    pub(super) async fn flush(&self) -> Result<()> {
        self.refuse_if_flush_broke()?;
        let now = self.opened();
        match now.file.sync_data().await {
            Ok(()) => Ok(()),
            Err(e) => {
                self.flush_broke(&now, &e);
                Err(Error::io(e, "cannot flush").node(&self.node_name).file(&self.path))
            }
        }
    }

    fn flush_broke(&self, now: &Opened, error: &io::Error) {
        if !now.is_direct {
            self.broken_flush.store(error.raw_os_error().unwrap_or(libc::EIO), Ordering::Release);
        }
    }

    pub(super) fn refuse_if_flush_broke(&self) -> Result<()> {
        match self.broken_flush.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Error::io(
                io::Error::from_raw_os_error(errno),
                "cannot flush: an earlier flush failed, so what the page cache held may be lost; \
                 close the node and check the image",
            )
            .node(&self.node_name)
            .file(&self.path)),
        }
    }

    /// Copies a range between two nodes with copy_file_range. Declines if that cannot finish the
    /// range; bytes copied until then are right.
    pub(super) async fn copy_from(
        &self,
        source: &Self,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<Attempt> {
        let source_end = source_offset.checked_add(len);
        let is_inside =
            source_end.is_some_and(|end| end <= source.known_len.load(Ordering::Relaxed));
        if !is_inside || self.features.no_copy_range.load(Ordering::Relaxed) {
            return Ok(Attempt::Unsupported);
        }
        let (now, from_now) = (self.opened(), source.opened());
        let mut done = 0;
        while done < len {
            let (from, to) = (source_offset + done, offset + done);
            match from_now.file.copy_range_to(from, &now.file, to, len - done).await {
                Ok(0) => return Ok(Attempt::Unsupported),
                Ok(copied_len) => done += copied_len,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::ENOSYS | libc::EOPNOTSUPP) => {
                        self.features.no_copy_range.store(true, Ordering::Relaxed);
                        return Ok(Attempt::Unsupported);
                    }
                    // These errors depend on the pair of files or the range, so they are not
                    // remembered.
                    Some(libc::EXDEV | libc::EINVAL | libc::ETXTBSY) => {
                        return Ok(Attempt::Unsupported);
                    }
                    _ => return Err(self.failed("cannot copy a range", to, e)),
                },
            }
        }
        self.grown_to(offset + len);
        self.forget_data_run();
        Ok(Attempt::Done)
    }
}

impl Opened {
    fn needs_bounce(&self, iov: &IoVec) -> bool {
        let align = self.limits.memory_alignment as usize;
        self.is_direct
            && iov.segments().iter().any(|s| s.as_ptr().addr() % align != 0 || s.len() % align != 0)
    }
}
