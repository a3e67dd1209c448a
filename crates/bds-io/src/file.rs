//! `File` and `Fs`: open files and name look-up, on the host or on a simulated disk.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::IoVec;
use crate::host::HostFile;
use crate::sim::{Sim, SimFile};

/// A name space of files: the host's, or a simulated disk's.
#[derive(Clone, Debug, Default)]
pub enum Fs {
    /// The host's file system.
    #[default]
    Host,
    /// A simulated disk.
    Sim(Sim),
}

/// Options of opening a file; make them with `..OpenOptions::default()`. Opening never truncates.
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
    /// cache) where the file system cannot say whether it would wait. `None`: the measured
    /// defaults, 256 KiB, or 32 KiB for a [`File::write`] while several such writes are under way.
    pub inline_write_max_bytes: Option<u32>,
}

/// Kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device, but no terminal.
    Char,
    /// A terminal. Detected on open files only: by name it is a character device.
    Terminal,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// Any other.
    Other,
}

impl FileKind {
    /// Whether it can be read at any offset.
    pub fn is_seekable(self) -> bool {
        matches!(self, Self::Regular | Self::Block | Self::Char)
    }

    /// A predicate for a sentence that begins with the file's name.
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

/// Properties of a name, found without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Kind of the file.
    pub kind: FileKind,
    /// As [`File::identity`].
    pub identity: (u64, u64),
    /// Length in bytes; 0 for a device.
    pub len: u64,
    /// When its bytes or its length last changed, in nanoseconds since 1970. Filesystems may count
    /// in steps of up to 10 ms; that of a device says nothing. In a simulated world a count of
    /// changes.
    pub modified_ns: u64,
}

/// Method of [`File::zero_range`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ZeroMode {
    /// FALLOC_FL_ZERO_RANGE (keeps or allocates blocks); extends the file if past its end.
    Allocate,
    /// FALLOC_FL_PUNCH_HOLE | KEEP_SIZE.
    PunchHole,
    /// Plain fallocate(mode 0): allocate, extend.
    Extend,
}

/// Byte range of an OFD lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteLock {
    /// Byte offset in the file.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A run of data or of a hole, as [`File::extent`] finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// True for data, false for a hole.
    pub is_data: bool,
    /// Length in bytes from the given offset.
    pub len: u64,
}

impl Fs {
    /// Opens `path`. Blocks this thread for the open itself.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(&self, path: &Path, options: &OpenOptions) -> io::Result<File> {
        Ok(File(match self {
            Fs::Host => Inner::Host(HostFile::open(path, options)?),
            Fs::Sim(sim) => Inner::Sim(sim.open(path, options)?),
        }))
    }
    /// Kind and identity of the file with this name. Opens nothing: opening a FIFO or a terminal
    /// can disturb its users.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn stat(&self, path: &Path) -> io::Result<FileStat> {
        match self {
            Fs::Host => crate::host::stat(path),
            // A simulated disk holds files and devices only, and its files have no descriptors to
            // save.
            Fs::Sim(sim) => {
                let file = sim.open(path, &OpenOptions::default())?;
                Ok(FileStat {
                    kind: file.kind(),
                    identity: file.identity()?,
                    len: file.len()?,
                    modified_ns: file.changes(),
                })
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
    /// Gives the file `from` the name `to`, in the place of the file that has it, in one step, and
    /// makes that durable: after a crash `to` is one of both. Sync the content of `from` before.
    /// Both names are in one directory. Blocks this thread.
    ///
    /// # Errors
    /// Those of rename(2). Of fsync(2) of the directory: the new name may not survive a crash.
    pub fn replace(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Fs::Host => {
                std::fs::rename(from, to)?;
                crate::host::sync_directory_of(to)
            }
            Fs::Sim(sim) => sim.rename(from, to),
        }
    }
    /// Makes the removal or creation of this name durable. Blocks this thread.
    ///
    /// # Errors
    /// Those of open(2) and fsync(2), of the directory.
    pub fn sync_name(&self, path: &Path) -> io::Result<()> {
        match self {
            Fs::Host => crate::host::sync_directory_of(path),
            // Names of a simulated disk are removed durably.
            Fs::Sim(_) => Ok(()),
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

/// An open file. Clones share the description (and its locks). Every future may be dropped or
/// forgotten at any await.
#[derive(Clone, Debug)]
pub struct File(Inner);

#[derive(Clone, Debug)]
enum Inner {
    Host(HostFile),
    Sim(SimFile),
}

impl File {
    /// Makes a file of an open descriptor of the host (from a sandbox's parent process, for
    /// instance). Of `options`, `direct` must say how it was opened and `inline_write_max_bytes` is
    /// used; the others are ignored.
    pub fn from_fd(fd: OwnedFd, options: &OpenOptions) -> io::Result<File> {
        Ok(File(Inner::Host(HostFile::from_fd(fd, options)?)))
    }
    /// Whether it belongs to a simulated disk.
    pub fn is_simulated(&self) -> bool {
        matches!(self.0, Inner::Sim(_))
    }
    /// Kind of the file.
    pub fn kind(&self) -> FileKind {
        match &self.0 {
            Inner::Host(file) => file.kind(),
            Inner::Sim(file) => file.kind(),
        }
    }
    /// Redirects this file and its clones to the description of `to`, which closes their own
    /// (dup2), with its locks.
    ///
    /// For closing a description while clones exist, not for further use: cached properties of the
    /// old one (alignment) stay. BlockOps in flight may use either.
    pub fn redirect(&self, to: &File) -> io::Result<()> {
        match (&self.0, &to.0) {
            (Inner::Host(file), Inner::Host(to)) => file.redirect(to),
            // A simulated description costs nothing, so it stays.
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
    /// True for a block device that refuses writes although it may be opened for writing
    /// (BLKROGET).
    pub fn is_write_protected(&self) -> io::Result<bool> {
        match &self.0 {
            Inner::Host(file) => file.is_write_protected(),
            Inner::Sim(_) => Ok(false),
        }
    }
    /// Turns copy-on-write off for an empty file. A hint: most file systems do not support it.
    pub fn set_no_cow(&self) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.set_no_cow(),
            Inner::Sim(_) => Ok(()),
        }
    }
    /// Sets the size in bytes in which space is allocated. A hint: most file systems do not support
    /// it.
    pub fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        match &self.0 {
            Inner::Host(file) => file.set_extent_size_hint(bytes),
            Inner::Sim(_) => Ok(()),
        }
    }
    /// (memory alignment, offset alignment) that reads and writes need; (1, 1) unless O_DIRECT or a
    /// device requires more.
    pub fn alignment(&self) -> io::Result<(usize, u32)> {
        match &self.0 {
            Inner::Host(file) => file.alignment(),
            Inner::Sim(file) => file.alignment(),
        }
    }
    /// Reads from the page cache without blocking. `None`: it would block or is not possible; use
    /// `read`.
    pub fn try_read(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        match &self.0 {
            Inner::Host(file) => file.try_read(offset, iov),
            Inner::Sim(file) => file.try_read(offset, iov),
        }
    }
    /// Writes to the page cache without waiting. `None`: it would wait or is not possible; use
    /// `write`.
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
    /// copy_file_range; 0: not supported, copy with `read` and `write`.
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
    /// SEEK_DATA / SEEK_HOLE: the run of data or hole that begins at `offset`. `None`: at or past
    /// the end.
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
    /// True if another description holds a lock that an exclusive lock on the range would conflict
    /// with (F_OFD_GETLK).
    pub fn is_locked_by_others(&self, lock: ByteLock) -> io::Result<bool> {
        match &self.0 {
            Inner::Host(file) => file.is_locked_by_others(lock),
            Inner::Sim(file) => file.is_locked_by_others(lock),
        }
    }
}
