//! Files of the host.

use std::io;
use std::ops::Range;
use std::path::Path;

use crate::IoVec;
use crate::file::{ByteLock, Extent, FileKind, OpenOptions, ZeroMode};

/// An open file of the host.
#[derive(Clone, Debug)]
pub(crate) struct HostFile {
    _p: (),
}

impl HostFile {
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> io::Result<HostFile> {
        let _ = (path, options);
        todo!()
    }
    pub(crate) fn kind(&self) -> FileKind {
        todo!()
    }
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        todo!()
    }
    pub(crate) fn len(&self) -> io::Result<u64> {
        todo!()
    }
    pub(crate) fn allocated_len(&self) -> io::Result<u64> {
        todo!()
    }
    pub(crate) fn alignment(&self) -> io::Result<(usize, u32)> {
        todo!()
    }
    pub(crate) fn try_read(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        let _ = (offset, iov);
        todo!()
    }
    pub(crate) fn try_write(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        let _ = (offset, iov);
        todo!()
    }
    pub(crate) async fn read(&self, offset: u64, iov: IoVec) -> io::Result<usize> {
        let _ = (offset, iov);
        todo!()
    }
    pub(crate) async fn write(&self, offset: u64, iov: IoVec, dsync: bool) -> io::Result<usize> {
        let _ = (offset, iov, dsync);
        todo!()
    }
    pub(crate) async fn sync_data(&self) -> io::Result<()> {
        todo!()
    }
    pub(crate) async fn zero_range(&self, range: Range<u64>, mode: ZeroMode) -> io::Result<()> {
        let _ = (range, mode);
        todo!()
    }
    pub(crate) async fn discard_device(&self, range: Range<u64>) -> io::Result<()> {
        let _ = range;
        todo!()
    }
    pub(crate) async fn zero_device(&self, range: Range<u64>) -> io::Result<()> {
        let _ = range;
        todo!()
    }
    pub(crate) async fn set_len(&self, len: u64) -> io::Result<()> {
        let _ = len;
        todo!()
    }
    pub(crate) async fn copy_range_to(
        &self,
        offset: u64,
        target: &HostFile,
        target_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let _ = (offset, target, target_offset, len);
        todo!()
    }
    pub(crate) fn extent(&self, offset: u64) -> io::Result<Option<Extent>> {
        let _ = offset;
        todo!()
    }
    pub(crate) fn lock_shared(&self, lock: ByteLock) -> io::Result<()> {
        let _ = lock;
        todo!()
    }
    pub(crate) fn unlock(&self, lock: ByteLock) -> io::Result<()> {
        let _ = lock;
        todo!()
    }
    pub(crate) fn is_locked_by_others(&self, lock: ByteLock) -> io::Result<bool> {
        let _ = lock;
        todo!()
    }
}
