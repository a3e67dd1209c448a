//! The simulated world: a seeded scheduler, a virtual clock and a disk with a volatile cache.

use std::future::Future;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::file::{ByteLock, Extent, FileKind, Fs, OpenOptions, ZeroMode};
use crate::{IoVec, Task};

/// What the simulated disk may do.
#[derive(Clone, Debug, Default)]
pub struct SimConfig {}

/// A simulated disk and its clock. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sim {
    _p: (),
}

impl Sim {
    /// A fresh, empty disk.
    pub fn new(seed: u64, config: SimConfig) -> Sim {
        let _ = (seed, config);
        todo!()
    }
    /// Its name space.
    pub fn fs(&self) -> Fs {
        Fs::Sim(self.clone())
    }
    /// Runs a future to its end under the virtual clock and seeded scheduler. Panics on deadlock (nothing can ever run again), naming the seed.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _ = future;
        todo!()
    }
    pub(crate) fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<SimFile> {
        let _ = (path, options);
        todo!()
    }
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let _ = path;
        todo!()
    }
    pub(crate) fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        let _ = path;
        todo!()
    }
    /// Spawns onto this world's seeded scheduler.
    pub fn spawn<T: Send + 'static>(
        &self,
        future: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let _ = future;
        todo!()
    }
    pub(crate) fn now(&self) -> Duration {
        todo!()
    }
    pub(crate) async fn sleep(&self, how_long: Duration) {
        let _ = how_long;
        todo!()
    }
    pub(crate) async fn offload<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let _ = work;
        todo!()
    }
    pub(crate) async fn yield_now(&self) {
        todo!()
    }
}

/// A file of a simulated disk.
#[derive(Clone, Debug)]
pub(crate) struct SimFile {
    _p: (),
}

impl SimFile {
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
        target: &SimFile,
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
