//! Files of the host or of the simulated disk, behind one type.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::IoVec;
use crate::host::HostFile;
use crate::sim::{Sim, SimFile};

/// Where names are looked up: the host, or a simulated disk.
#[derive(Clone, Debug, Default)]
pub enum Fs {
    /// The host's file system.
    #[default]
    Host,
    /// A simulated disk.
    Sim(Sim),
}

/// How a file is opened. Never truncates.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Open for writing too.
    pub write: bool,
    /// Create if missing (needs `write`).
    pub create: bool,
    /// Fail if it exists (with `create`).
    pub exclusive: bool,
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Longest buffered write, in bytes, that is done at once on the calling thread (into the page
    /// cache) where the file system cannot say whether it would wait. None: the measured default.
    pub inline_write_max_bytes: Option<u32>,
}

/// What an opened name turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device, but no terminal.
    Char,
    /// A terminal. Known of open files only: by name it is a character device.
    Terminal,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Something else.
    Other,
}

impl FileKind {
    /// Whether bytes at any offset can be asked for.
    pub fn is_seekable(self) -> bool {
        matches!(self, Self::Regular | Self::Block | Self::Char)
    }

    /// What it is, for a sentence that begins with its name.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Regular => "is a regular file",
            Self::Block => "is a block device",
            Self::Char => "is a character device",
            Self::Terminal => "is a terminal",
            Self::Directory => "is a directory",
            Self::Fifo => "is a FIFO (named pipe)",
            Self::Socket => "is a socket",
            Self::Other => "is neither a regular file nor a device",
        }
    }
}

/// What a name leads to, found out without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLook {
    /// What it is.
    pub kind: FileKind,
    /// As [`File::identity`].
    pub identity: (u64, u64),
}

/// How `File::zero_range` may do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// FALLOC_FL_ZERO_RANGE (keeps or allocates blocks); extends the file if past its end.
    Allocate,
    /// FALLOC_FL_PUNCH_HOLE | KEEP_SIZE.
    PunchHole,
    /// Plain fallocate(mode 0): allocate, extend.
    Extend,
}

/// One OFD byte lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteLock {
    /// Byte offset in the file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// Bytes of data or hole from a status question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// True for data, false for a hole.
    pub is_data: bool,
    /// Length in bytes from the asked offset.
    pub len: u64,
}

impl Fs {
    /// Opens `path`. Blocks this thread for the open itself.
    pub fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<File> {
        Ok(File(match self {
            Fs::Host => Inner::Host(HostFile::open(path, options)?),
            Fs::Sim(sim) => Inner::Sim(sim.open(path, options)?),
        }))
    }
    /// Looks what a name leads to. Opens nothing: opening a FIFO or a terminal can disturb who uses it.
    pub fn look(&self, path: &Path) -> io::Result<FileLook> {
        match self {
            Fs::Host => crate::host::look(path),
            // A simulated disk holds files and devices only, and its files have no descriptors to save.
            Fs::Sim(sim) => {
                let file = sim.open(path, &OpenOptions::default())?;
                Ok(FileLook { kind: file.kind(), identity: file.identity()? })
            }
        }
    }
    /// Removes a file.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        match self {
            Fs::Host => std::fs::remove_file(path),
            Fs::Sim(sim) => sim.remove(path),
        }
    }
    /// The path with links resolved; two names of one file agree.
    pub fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        match self {
            Fs::Host => std::fs::canonicalize(path),
            Fs::Sim(sim) => sim.canonicalize(path),
        }
    }
}

/// An open file. Clones share the description (and its locks). Every future may be dropped or forgotten at any await.
#[derive(Clone, Debug)]
pub struct File(Inner);

#[derive(Clone, Debug)]
enum Inner {
    Host(HostFile),
    Sim(SimFile),
}

impl File {
    /// A file of the host that somebody else opened (a sandbox's parent). Of `options`, `direct` must say how
    /// it was opened and `inline_write_max_bytes` counts; the others were decided by the opener.
    pub fn from_fd(fd: OwnedFd, options: &OpenOptions) -> io::Result<File> {
        Ok(File(Inner::Host(HostFile::from_fd(fd, options)?)))
    }
    /// Whether it belongs to a simulated disk.
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Inner::Sim(_))
    }
    /// What it is.
    pub fn kind(&self) -> FileKind {
        match &self.0 {
            Inner::Host(file) => file.kind(),
            Inner::Sim(file) => file.kind(),
        }
    }
    /// Closes the description of this file and of its clones, whoever still holds them: from now on they name that of `to`. To get
    /// rid of a description, not to go on with: what was learnt about the old one (alignment) stays. Operations
    /// under way may use either. The locks of the old one go with it.
    pub fn forward(&self, to: &File) -> io::Result<()> {
        match (&self.0, &to.0) {
            (Inner::Host(file), Inner::Host(to)) => file.forward(to),
            // A simulated description costs nothing, so it may stay.
            _ => Ok(()),
        }
    }
    /// (device, inode): equal for two names of one file.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        match &self.0 {
            Inner::Host(file) => file.identity(),
            Inner::Sim(file) => file.identity(),
        }
    }
    /// Current length in bytes (regular: fstat; block device: BLKGETSIZE64).
    pub fn len(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::Host(file) => file.len(),
            Inner::Sim(file) => file.len(),
        }
    }
    /// True if the length is 0.
    pub fn is_empty(&self) -> io::Result<bool> {
        self.len().map(|len| len == 0)
    }
    /// Bytes on disk (st_blocks * 512).
    pub fn allocated_len(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::Host(file) => file.allocated_len(),
            Inner::Sim(file) => file.allocated_len(),
        }
    }
    /// True for a block device that refuses writes although it may be opened for writing (BLKROGET).
    pub fn is_write_protected(&self) -> io::Result<bool> {
        match &self.0 {
            Inner::Host(file) => file.is_write_protected(),
            Inner::Sim(_) => Ok(false),
        }
    }
    /// Turns copy-on-write off for an empty file. A wish: most file systems do not know it.
    pub fn set_no_cow(&self) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.set_no_cow(),
            Inner::Sim(_) => Ok(()),
        }
    }
    /// Asks for space in extents of this many bytes. A wish: most file systems do not know it.
    pub fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.set_extent_size_hint(bytes),
            Inner::Sim(_) => Ok(()),
        }
    }
    /// (memory alignment, offset alignment) that reads and writes need; (1, 1) unless direct or a device demands more.
    pub fn alignment(&self) -> io::Result<(usize, u32)> {
        match &self.0 {
            Inner::Host(file) => file.alignment(),
            Inner::Sim(file) => file.alignment(),
        }
    }
    /// Reads what the page cache can answer without blocking. None: would block or not possible; ask `read`.
    pub fn try_read(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        match &self.0 {
            Inner::Host(file) => file.try_read(offset, iov),
            Inner::Sim(file) => file.try_read(offset, iov),
        }
    }
    /// Writes to the page cache if that needs no waiting. None: ask `write`.
    pub fn try_write(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        match &self.0 {
            Inner::Host(file) => file.try_write(offset, iov),
            Inner::Sim(file) => file.try_write(offset, iov),
        }
    }
    /// Reads into `iov`; may be short (0 at end of file).
    pub async fn read(&self, offset: u64, iov: IoVec) -> io::Result<usize> {
        match &self.0 {
            Inner::Host(file) => file.read(offset, iov).await,
            Inner::Sim(file) => file.read(offset, iov).await,
        }
    }
    /// Writes from `iov`; may be short. `dsync`: durable when it returns (RWF_DSYNC).
    pub async fn write(&self, offset: u64, iov: IoVec, dsync: bool) -> io::Result<usize> {
        match &self.0 {
            Inner::Host(file) => file.write(offset, iov, dsync).await,
            Inner::Sim(file) => file.write(offset, iov, dsync).await,
        }
    }
    /// fdatasync.
    pub async fn sync_data(&self) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.sync_data().await,
            Inner::Sim(file) => file.sync_data().await,
        }
    }
    /// fallocate family.
    pub async fn zero_range(&self, range: Range<u64>, mode: ZeroMode) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.zero_range(range, mode).await,
            Inner::Sim(file) => file.zero_range(range, mode).await,
        }
    }
    /// Block device: BLKDISCARD. Regular files: use `zero_range(PunchHole)`.
    pub async fn discard_device(&self, range: Range<u64>) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.discard_device(range).await,
            Inner::Sim(file) => file.discard_device(range).await,
        }
    }
    /// Block device: BLKZEROOUT.
    pub async fn zero_device(&self, range: Range<u64>) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.zero_device(range).await,
            Inner::Sim(file) => file.zero_device(range).await,
        }
    }
    /// ftruncate.
    pub async fn set_len(&self, len: u64) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.set_len(len).await,
            Inner::Sim(file) => file.set_len(len).await,
        }
    }
    /// copy_file_range; 0 = give up.
    pub async fn copy_range_to(
        &self,
        offset: u64,
        target: &File,
        target_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        match (&self.0, &target.0) {
            (Inner::Host(file), Inner::Host(target)) => {
                file.copy_range_to(offset, target, target_offset, len).await
            }
            (Inner::Sim(file), Inner::Sim(target)) => {
                file.copy_range_to(offset, target, target_offset, len).await
            }
            _ => Ok(0),
        }
    }
    /// SEEK_DATA / SEEK_HOLE: what begins at `offset` and how long it is. None: at or past the end.
    pub fn extent(&self, offset: u64) -> io::Result<Option<Extent>> {
        match &self.0 {
            Inner::Host(file) => file.extent(offset),
            Inner::Sim(file) => file.extent(offset),
        }
    }
    /// Takes a shared OFD lock on a byte range; never blocks (EAGAIN).
    pub fn lock_shared(&self, lock: ByteLock) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.lock_shared(lock),
            Inner::Sim(file) => file.lock_shared(lock),
        }
    }
    /// Drops OFD locks on a byte range.
    pub fn unlock(&self, lock: ByteLock) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.unlock(lock),
            Inner::Sim(file) => file.unlock(lock),
        }
    }
    /// True if another description holds a lock that an exclusive lock on the range would conflict with (F_OFD_GETLK).
    pub fn is_locked_by_others(&self, lock: ByteLock) -> io::Result<bool> {
        match &self.0 {
            Inner::Host(file) => file.is_locked_by_others(lock),
            Inner::Sim(file) => file.is_locked_by_others(lock),
        }
    }
}
