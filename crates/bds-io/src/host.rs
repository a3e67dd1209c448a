//! `HostFile`: a file of the host; operations run inline from the page cache or in an engine.
//!
//! What the page cache can do is done at once, on the caller's thread; the rest becomes an `Op` for
//! an engine. What a file system cannot do is remembered per file, so that it is tried once.

use std::io::{self, IsTerminal};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::context::yield_now;
use crate::current::{self, Current};
use crate::file::{ByteLock, Extent, FileKind, FileStat, OpenOptions, ZeroMode};
use crate::long_write::{ByLen, InEngine, InlineLimit, LongWrites};
use crate::op::{OpFuture, OpKind};
use crate::sys::{self, LockKind, Seek};
use crate::{Buf, IoVec};

/// An open file description and its cached properties.
#[derive(Debug)]
pub(crate) struct Descriptor {
    fd: OwnedFd,
    kind: FileKind,
    is_direct: bool,
    /// Of writes into the page cache. Under memory pressure the kernel may throttle such a write; a
    /// file that must never block its thread sets the limit to 0.
    inline_writes: InlineLimit,
    alignment: OnceLock<(usize, u32)>,
    /// The file system refused RWF_NOWAIT (EOPNOTSUPP).
    read_may_wait: AtomicBool,
    write_may_wait: AtomicBool,
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Outcome of a write to the page cache that may not wait.
enum Cached {
    Done(io::Result<usize>),
    /// It would wait, or there is no page cache in between.
    WouldWait,
    /// The file system cannot say.
    MayWait,
}

/// An open file of the host.
#[derive(Clone, Debug)]
pub(crate) struct HostFile(Arc<Descriptor>);

impl HostFile {
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> io::Result<HostFile> {
        HostFile::from_fd(sys::open(path, options)?, options)
    }

    /// Takes over an open descriptor; `options.direct` says how it was opened.
    pub(crate) fn from_fd(fd: OwnedFd, options: &OpenOptions) -> io::Result<HostFile> {
        let kind = match kind(&sys::stat(fd.as_fd())?) {
            FileKind::Char if fd.is_terminal() => FileKind::Terminal,
            kind => kind,
        };
        let inline_writes = options.inline_write_max_bytes.map_or(InlineLimit::Measured, |max| {
            InlineLimit::Fixed(usize::try_from(max).unwrap_or(usize::MAX))
        });
        Ok(HostFile(Arc::new(Descriptor {
            fd,
            kind,
            is_direct: options.direct,
            inline_writes,
            alignment: OnceLock::new(),
            read_may_wait: AtomicBool::new(
                options.direct || kind != FileKind::Regular && kind != FileKind::Block,
            ),
            write_may_wait: AtomicBool::new(false),
        })))
    }

    pub(crate) fn kind(&self) -> FileKind {
        self.0.kind
    }

    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        Ok(identity(&sys::stat(self.0.as_fd())?))
    }

    pub(crate) fn len(&self) -> io::Result<u64> {
        let fd = self.0.as_fd();
        match self.0.kind {
            FileKind::Block => sys::device_len(fd),
            FileKind::Char => sys::seek(fd, 0, Seek::End),
            _ => unsigned(sys::stat(fd)?.st_size),
        }
    }

    pub(crate) fn allocated_len(&self) -> io::Result<u64> {
        // st_blocks counts 512 bytes whatever the file system's block is.
        Ok(unsigned(sys::stat(self.0.as_fd())?.st_blocks)?.saturating_mul(512))
    }

    pub(crate) fn redirect(&self, to: &HostFile) -> io::Result<()> {
        sys::redirect(self.0.as_fd(), to.0.as_fd())
    }

    pub(crate) fn is_write_protected(&self) -> io::Result<bool> {
        match self.0.kind {
            FileKind::Block => sys::is_read_only_device(self.0.as_fd()),
            _ => Ok(false),
        }
    }

    pub(crate) fn set_no_cow(&self) -> io::Result<()> {
        sys::set_no_cow(self.0.as_fd())
    }

    pub(crate) fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        sys::set_extent_size_hint(self.0.as_fd(), bytes)
    }

    pub(crate) fn alignment(&self) -> io::Result<(usize, u32)> {
        if !self.0.is_direct {
            return Ok((1, 1));
        }
        if let Some(known) = self.0.alignment.get() {
            return Ok(*known);
        }
        let found = self.find_alignment()?;
        Ok(*self.0.alignment.get_or_init(|| found))
    }

    /// The alignment that O_DIRECT requires: from statx, else from the device, else found by trial.
    fn find_alignment(&self) -> io::Result<(usize, u32)> {
        let fd = self.0.as_fd();
        if let Some(dio) = sys::dio_align(fd)
            && dio.memory > 0
            && dio.offset > 0
        {
            return Ok((dio.memory as usize, dio.offset));
        }
        if self.0.kind == FileKind::Block {
            let size = sys::block_size(fd)?;
            return Ok((size as usize, size));
        }
        // The end of file may hide an error (a hole or an empty file reads fine unaligned), so a
        // success at a single byte proves nothing.
        let buf = Buf::zeroed(8192, 4096);
        for len in [512u32, 1024, 2048, 4096] {
            match sys::read_at(fd, u64::from(len), &buf.slice(0..len as usize), 0) {
                Ok(_) => return Ok((len as usize, len)),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok((4096, 4096))
    }

    pub(crate) fn try_read(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        let file = &*self.0;
        if file.read_may_wait.load(Ordering::Relaxed) {
            return None;
        }
        let answer = sys::read_at(file.as_fd(), offset, iov, libc::RWF_NOWAIT);
        answer_without_waiting(answer, &file.read_may_wait)
    }

    pub(crate) fn try_write(&self, offset: u64, iov: &IoVec) -> Option<io::Result<usize>> {
        let is_inline = iov.len() <= self.0.inline_writes.max_len();
        match self.try_write_cached(offset, iov) {
            Cached::Done(answer) => Some(answer),
            Cached::MayWait if is_inline => Some(sys::write_at(self.0.as_fd(), offset, iov, 0)),
            Cached::MayWait | Cached::WouldWait => None,
        }
    }

    /// Writes to the page cache where the file system can say that this waits for nothing.
    fn try_write_cached(&self, offset: u64, iov: &IoVec) -> Cached {
        let file = &*self.0;
        if file.is_direct || !matches!(file.kind, FileKind::Regular | FileKind::Block) {
            return Cached::WouldWait;
        }
        if file.write_may_wait.load(Ordering::Relaxed) {
            return Cached::MayWait;
        }
        let answer = sys::write_at(file.as_fd(), offset, iov, libc::RWF_NOWAIT);
        match answer_without_waiting(answer, &file.write_may_wait) {
            Some(answer) => Cached::Done(answer),
            None if file.write_may_wait.load(Ordering::Relaxed) => Cached::MayWait,
            None => Cached::WouldWait,
        }
    }

    pub(crate) async fn read(&self, offset: u64, iov: IoVec) -> io::Result<usize> {
        OpFuture::new(&self.0, OpKind::Read { offset, iov }).await
    }

    pub(crate) async fn write(&self, offset: u64, iov: IoVec, dsync: bool) -> io::Result<usize> {
        let tried = if dsync { Cached::WouldWait } else { self.try_write_cached(offset, &iov) };
        let in_engine = match tried {
            Cached::Done(answer) => return answer,
            Cached::WouldWait => None,
            Cached::MayWait => match place(self.0.inline_writes, iov.len()).await {
                Place::Inline => return sys::write_at(self.0.as_fd(), offset, &iov, 0),
                Place::Engine(in_engine) => in_engine,
            },
        };
        OpFuture::counted(&self.0, OpKind::Write { offset, iov, dsync }, in_engine).await
    }

    pub(crate) async fn sync_data(&self) -> io::Result<()> {
        self.run_without_result(OpKind::SyncData).await
    }

    pub(crate) async fn zero_range(&self, range: Range<u64>, mode: ZeroMode) -> io::Result<()> {
        let mode = match mode {
            ZeroMode::Allocate => libc::FALLOC_FL_ZERO_RANGE,
            ZeroMode::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            ZeroMode::Extend => 0,
        };
        match length(&range)? {
            0 => Ok(()),
            len => {
                self.run_without_result(OpKind::Allocate { mode, offset: range.start, len }).await
            }
        }
    }

    pub(crate) async fn discard_device(&self, range: Range<u64>) -> io::Result<()> {
        let len = length(&range)?;
        self.run_without_result(OpKind::Discard { offset: range.start, len }).await
    }

    pub(crate) async fn zero_device(&self, range: Range<u64>) -> io::Result<()> {
        let len = length(&range)?;
        self.run_without_result(OpKind::ZeroOut { offset: range.start, len }).await
    }

    pub(crate) async fn set_len(&self, len: u64) -> io::Result<()> {
        self.run_without_result(OpKind::SetLen { len }).await
    }

    pub(crate) async fn copy_range_to(
        &self,
        offset: u64,
        target: &HostFile,
        target_offset: u64,
        len: u64,
    ) -> io::Result<u64> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let target = target.0.clone();
        let kind = OpKind::CopyRange { offset, target, target_offset, len };
        OpFuture::new(&self.0, kind).await.map(|count| count as u64)
    }

    async fn run_without_result(&self, kind: OpKind) -> io::Result<()> {
        OpFuture::new(&self.0, kind).await.map(drop)
    }

    pub(crate) fn extent(&self, offset: u64) -> io::Result<Option<Extent>> {
        let fd = self.0.as_fd();
        let data = match sys::seek(fd, offset, Seek::Data) {
            Ok(data) => data,
            // ENXIO: no data from here on. Past the end of file, or a hole that reaches it.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                let end = self.len()?;
                let hole = |len| Extent { is_data: false, len };
                return Ok(end.checked_sub(offset).filter(|len| *len > 0).map(hole));
            }
            Err(error) => return Err(error),
        };
        if data > offset {
            return Ok(Some(Extent { is_data: false, len: data - offset }));
        }
        match sys::seek(fd, offset, Seek::Hole) {
            Ok(hole) if hole > offset => Ok(Some(Extent { is_data: true, len: hole - offset })),
            // The file changed between the two calls.
            Ok(_) => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn lock_shared(&self, lock: ByteLock) -> io::Result<()> {
        sys::lock(self.0.as_fd(), lock, LockKind::Shared)
    }

    pub(crate) fn unlock(&self, lock: ByteLock) -> io::Result<()> {
        sys::lock(self.0.as_fd(), lock, LockKind::None)
    }

    pub(crate) fn is_locked_by_others(&self, lock: ByteLock) -> io::Result<bool> {
        sys::is_locked_by_others(self.0.as_fd(), lock)
    }
}

/// Where a buffered write is executed.
#[derive(Debug)]
enum Place {
    Inline,
    /// In the engine, which keeps the count (of a long write) until the write is over.
    Engine(Option<InEngine>),
}

/// Decides for a write of `len` bytes that is about to start. May let other tasks run first.
async fn place(limit: InlineLimit, len: usize) -> Place {
    match limit.by_len(len) {
        ByLen::Inline => return Place::Inline,
        ByLen::Engine => return Place::Engine(with_long_writes(LongWrites::enter_engine)),
        ByLen::InlineIfAlone => {}
    }
    // A thread that drives no Context has no engine of its own to keep busy.
    let Some(arrival) = with_long_writes(LongWrites::arrive) else { return Place::Inline };
    if arrival.finds_engine_idle() {
        yield_now().await;
        if with_long_writes(|writes| arrival.is_alone(writes)).unwrap_or(true) {
            return Place::Inline;
        }
    }
    Place::Engine(with_long_writes(LongWrites::enter_engine))
}

/// Calls `read` with the long writes of the Context that this thread drives, if any.
fn with_long_writes<R>(read: impl FnOnce(&LongWrites) -> R) -> Option<R> {
    current::with(|current| match current {
        Current::Host(local) => Some(read(&local.long_writes)),
        _ => None,
    })
}

/// See [`crate::Fs::stat`].
pub(crate) fn stat(path: &Path) -> io::Result<FileStat> {
    let stat = sys::stat_path(path)?;
    let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
    let nanos = u64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Ok(FileStat {
        kind: kind(&stat),
        identity: identity(&stat),
        len: u64::try_from(stat.st_size).unwrap_or(0),
        modified_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos),
    })
}

/// Syncs the directory that a name is in.
pub(crate) fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::File::open(directory)?.sync_all()
}

fn kind(stat: &libc::stat) -> FileKind {
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFBLK => FileKind::Block,
        libc::S_IFCHR => FileKind::Char,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        _ => FileKind::Other,
    }
}

/// Two names of one device are two inodes with one device number.
fn identity(stat: &libc::stat) -> (u64, u64) {
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFBLK | libc::S_IFCHR => (stat.st_rdev, 0),
        _ => (stat.st_dev, stat.st_ino),
    }
}

/// Result of an attempt with RWF_NOWAIT. `None`: it would have waited, or the file system cannot
/// say (then remembered).
fn answer_without_waiting(
    answer: io::Result<usize>,
    may_wait: &AtomicBool,
) -> Option<io::Result<usize>> {
    match answer.as_ref().err().and_then(io::Error::raw_os_error) {
        Some(libc::EAGAIN) => None,
        Some(libc::EOPNOTSUPP) => {
            may_wait.store(true, Ordering::Relaxed);
            None
        }
        _ => Some(answer),
    }
}

fn unsigned(number: i64) -> io::Result<u64> {
    u64::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

fn length(range: &Range<u64>) -> io::Result<u64> {
    let len = range.end.checked_sub(range.start);
    len.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod place_tests;
