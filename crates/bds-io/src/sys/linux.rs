//! System calls of Linux: one call, one function, one SAFETY.
//!
//! Through `nix` where it has a safe wrapper, else through `libc`. Nothing here keeps state.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, copy_file_range, fallocate, fcntl};
use nix::unistd::{self, Whence};
use smallvec::SmallVec;

use crate::IoVec;
use crate::file::{ByteLock, OpenOptions};

/// Segments that one call takes at most (UIO_MAXIOV); longer lists give short transfers.
const VECTORS_MAX: usize = 1024;

/// Repeats `call` while signals interrupt it.
fn retry<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// As `retry`, for calls that return a count or -1.
fn retry_count(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    retry(|| usize::try_from(call()).map_err(|_| Errno::last()))
}

/// A file offset as the kernel takes it; EFBIG past `i64::MAX`.
pub(crate) fn to_off(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from(Errno::EFBIG))
}

/// The list as the kernel takes it, cut to what one call may carry.
pub(crate) fn vectors(iov: &IoVec) -> SmallVec<[libc::iovec; 4]> {
    let segments = iov.segments().iter().take(VECTORS_MAX);
    segments.map(|seg| libc::iovec { iov_base: seg.as_ptr().cast(), iov_len: seg.len() }).collect()
}

pub(crate) fn open(path: &Path, options: &OpenOptions) -> io::Result<OwnedFd> {
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let file = fs::OpenOptions::new()
        .read(true)
        .write(options.write)
        .create(options.create && !options.exclusive)
        .create_new(options.create && options.exclusive)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK | direct)
        .open(path)?;
    let fd = OwnedFd::from(file);
    // Only the open itself must not wait (for a fifo's other end); operations may.
    let flags = OFlag::from_bits_retain(retry(|| fcntl(&fd, FcntlArg::F_GETFL))?);
    retry(|| fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)))?;
    Ok(fd)
}

/// Whether the process ignores `number` (sigaction without a new action).
pub(crate) fn is_signal_ignored(number: libc::c_int) -> io::Result<bool> {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: the new action is null, so nothing changes; the old one goes to memory of its type
    // that lives in this frame.
    let mut call = || unsafe { libc::sigaction(number, std::ptr::null(), action.as_mut_ptr()) };
    Errno::result(call())?;
    // SAFETY: the call succeeded, so the kernel and libc have filled in the whole struct.
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// Ignores `number` in the whole process.
pub(crate) fn ignore_signal(number: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_IGN is no function, so none is called with a wrong signature or where only
    // async-signal-safe code may run.
    let old = unsafe { libc::signal(number, libc::SIG_IGN) };
    if old == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// dup3: `from` names the description of `to` from now on; its own is closed.
pub(crate) fn redirect(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: plain integers. Both descriptors are borrowed, so open; `from` stays open (its number
    // never becomes free), so its owner goes on owning an open descriptor.
    let call = || unsafe { libc::dup3(to.as_raw_fd(), from.as_raw_fd(), libc::O_CLOEXEC) };
    retry(|| Errno::result(call())).map(drop)
}

/// preadv2. `flags`: RWF_*.
pub(crate) fn read_at(
    fd: BorrowedFd<'_>,
    offset: u64,
    iov: &IoVec,
    flags: libc::c_int,
) -> io::Result<usize> {
    let offset = to_off(offset)?;
    let vectors = vectors(iov);
    let count = vectors.len().try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is borrowed, so open; `vectors` has `count` entries, each naming
    // memory that is valid for writes while the borrowed list holds its anchors, which is longer
    // than this call.
    retry_count(|| unsafe { libc::preadv2(fd.as_raw_fd(), vectors.as_ptr(), count, offset, flags) })
}

/// pwritev2. `flags`: RWF_*.
pub(crate) fn write_at(
    fd: BorrowedFd<'_>,
    offset: u64,
    iov: &IoVec,
    flags: libc::c_int,
) -> io::Result<usize> {
    let offset = to_off(offset)?;
    let vectors = vectors(iov);
    let count = vectors.len().try_into().unwrap_or(libc::c_int::MAX);
    // SAFETY: as in `read_at`; the memory is only read.
    retry_count(|| unsafe {
        libc::pwritev2(fd.as_raw_fd(), vectors.as_ptr(), count, offset, flags)
    })
}

pub(crate) fn sync_data(fd: BorrowedFd<'_>) -> io::Result<()> {
    retry(|| unistd::fdatasync(fd))
}

pub(crate) fn set_len(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let len = to_off(len)?;
    retry(|| unistd::ftruncate(fd, len))
}

/// fallocate with a raw mode (FALLOC_FL_*).
pub(crate) fn allocate_range(
    fd: BorrowedFd<'_>,
    mode: libc::c_int,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let (offset, len) = (to_off(offset)?, to_off(len)?);
    retry(|| fallocate(fd, FallocateFlags::from_bits_retain(mode), offset, len))
}

pub(crate) fn copy_range(
    from: BorrowedFd<'_>,
    from_offset: u64,
    to: BorrowedFd<'_>,
    to_offset: u64,
    len: usize,
) -> io::Result<usize> {
    let (from_offset, to_offset) = (to_off(from_offset)?, to_off(to_offset)?);
    retry(|| {
        let (mut from_at, mut to_at) = (from_offset, to_offset);
        copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len)
    })
}

/// Target of `seek`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Seek {
    Data,
    Hole,
    End,
}

/// lseek. Moves the description's position, which nothing here uses.
pub(crate) fn seek(fd: BorrowedFd<'_>, offset: u64, to: Seek) -> io::Result<u64> {
    let whence = match to {
        Seek::Data => Whence::SeekData,
        Seek::Hole => Whence::SeekHole,
        Seek::End => Whence::SeekEnd,
    };
    let offset = to_off(offset)?;
    let at = retry(|| unistd::lseek(fd, offset, whence))?;
    u64::try_from(at).map_err(|_| io::Error::from(Errno::EOVERFLOW))
}

pub(crate) fn stat_path(path: &Path) -> io::Result<libc::stat> {
    retry(|| nix::sys::stat::stat(path))
}

pub(crate) fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    retry(|| nix::sys::stat::fstat(fd))
}

/// Alignment for O_DIRECT from statx.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DioAlign {
    /// Alignment of memory, bytes; 0: no O_DIRECT on this file.
    pub(crate) memory: u32,
    /// Alignment of offset and length, bytes.
    pub(crate) offset: u32,
}

/// The kernel's struct statx by words; libc's has no names for the O_DIRECT fields on glibc.
#[repr(C, align(8))]
struct StatxWords([u32; 64]);

const STATX_DIOALIGN: u32 = 0x2000;
/// Byte 152 and 156 of struct statx: stx_dio_mem_align, stx_dio_offset_align.
const DIO_MEM_WORD: usize = 38;
const DIO_OFFSET_WORD: usize = 39;

/// `None`: the kernel or the file system does not say.
pub(crate) fn dio_align(fd: BorrowedFd<'_>) -> Option<DioAlign> {
    let mut words = StatxWords([0; 64]);
    // SAFETY: the path is a NUL-terminated literal (empty, with AT_EMPTY_PATH: the descriptor
    // itself); the kernel writes at most 256 bytes, the size of `words`, whose every bit pattern is
    // valid.
    let done = unsafe {
        libc::syscall(
            libc::SYS_statx,
            fd.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_DIOALIGN,
            &raw mut words,
        )
    };
    let StatxWords(words) = words;
    (done == 0 && words[0] & STATX_DIOALIGN != 0)
        .then(|| DioAlign { memory: words[DIO_MEM_WORD], offset: words[DIO_OFFSET_WORD] })
}

nix::ioctl_read_bad!(blk_logical_size, libc::BLKSSZGET, libc::c_int);
nix::ioctl_read!(blk_size64, 0x12, 114, usize);
nix::ioctl_write_ptr_bad!(blk_discard, 0x1277, [u64; 2]);
nix::ioctl_write_ptr_bad!(blk_zeroout, 0x127f, [u64; 2]);

/// BLKSSZGET: a block device's logical block size in bytes.
pub(crate) fn block_size(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: the kernel writes one int, to a live local.
    retry(|| unsafe { blk_logical_size(fd.as_raw_fd(), &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::Error::from(Errno::EINVAL))
}

/// BLKGETSIZE64: a block device's length in bytes.
pub(crate) fn device_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut len = 0;
    // SAFETY: the kernel writes one 64-bit number, to a live local of that size (usize is 64 bits
    // on the hosts we serve; on 32-bit ones the ioctl number, which contains the size, is refused).
    retry(|| unsafe { blk_size64(fd.as_raw_fd(), &raw mut len) })?;
    Ok(len as u64)
}

/// BLKDISCARD.
pub(crate) fn discard(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the kernel reads two u64 from a live local.
    retry(|| unsafe { blk_discard(fd.as_raw_fd(), &raw const range) }).map(drop)
}

/// BLKZEROOUT.
pub(crate) fn zero_out(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the kernel reads two u64 from a live local.
    retry(|| unsafe { blk_zeroout(fd.as_raw_fd(), &raw const range) }).map(drop)
}

nix::ioctl_read_bad!(blk_read_only, 0x125e, libc::c_int);
nix::ioctl_read_bad!(fs_flags, libc::FS_IOC_GETFLAGS, libc::c_int);
nix::ioctl_write_ptr_bad!(fs_set_flags, libc::FS_IOC_SETFLAGS, libc::c_int);
nix::ioctl_read!(fs_xattr, b'X', 31, FsXattr);
nix::ioctl_write_ptr!(fs_set_xattr, b'X', 32, FsXattr);

/// The kernel's struct fsxattr.
#[expect(unreachable_pub, reason = "the calls that nix makes of it are pub")]
#[repr(C)]
#[derive(Default)]
pub struct FsXattr {
    xflags: u32,
    extent_size: u32,
    extent_count: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

const FS_NOCOW_FL: libc::c_int = 0x0080_0000;
const FS_XFLAG_EXTSIZE: u32 = 0x800;

/// BLKROGET: is a block device write-protected?
pub(crate) fn is_read_only_device(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut is_read_only = 0;
    // SAFETY: the kernel writes one int, to a live local.
    retry(|| unsafe { blk_read_only(fd.as_raw_fd(), &raw mut is_read_only) })?;
    Ok(is_read_only != 0)
}

/// Turns copy-on-write off for an empty file (btrfs).
pub(crate) fn set_no_cow(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut flags = 0;
    // SAFETY: the kernel writes one int, to a live local.
    retry(|| unsafe { fs_flags(fd.as_raw_fd(), &raw mut flags) })?;
    flags |= FS_NOCOW_FL;
    // SAFETY: the kernel reads one int from a live local.
    retry(|| unsafe { fs_set_flags(fd.as_raw_fd(), &raw const flags) }).map(drop)
}

/// Sets the extent size hint in bytes (XFS).
pub(crate) fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let mut xattr = FsXattr::default();
    // SAFETY: the kernel writes one struct fsxattr, whose layout `FsXattr` has, to a live local;
    // every bit pattern of it is valid.
    retry(|| unsafe { fs_xattr(fd.as_raw_fd(), &raw mut xattr) })?;
    xattr.xflags |= FS_XFLAG_EXTSIZE;
    xattr.extent_size = bytes;
    // SAFETY: the kernel reads one struct fsxattr from a live local.
    retry(|| unsafe { fs_set_xattr(fd.as_raw_fd(), &raw const xattr) }).map(drop)
}

/// Kind of an OFD lock.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LockKind {
    Shared,
    Exclusive,
    None,
}

fn flock(lock: ByteLock, kind: LockKind) -> io::Result<libc::flock> {
    let l_type = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::None => libc::F_UNLCK,
    };
    Ok(libc::flock {
        l_type: i16::try_from(l_type).expect("lock types are 0, 1 and 2"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("SEEK_SET is 0"),
        l_start: to_off(lock.offset)?,
        l_len: to_off(lock.len)?,
        l_pid: 0,
    })
}

/// Takes or drops an OFD lock; never waits (EAGAIN).
pub(crate) fn lock(fd: BorrowedFd<'_>, lock: ByteLock, kind: LockKind) -> io::Result<()> {
    let flock = flock(lock, kind)?;
    // SAFETY: the kernel reads one flock from a live local.
    retry_count(|| unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const flock) as isize
    })
    .map(drop)
}

/// True if an exclusive lock on the range would conflict with that of another description.
pub(crate) fn is_locked_by_others(fd: BorrowedFd<'_>, lock: ByteLock) -> io::Result<bool> {
    let mut flock = flock(lock, LockKind::Exclusive)?;
    // SAFETY: the kernel reads and writes one flock, a live local.
    retry_count(|| unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) as isize
    })?;
    Ok(libc::c_int::from(flock.l_type) != libc::F_UNLCK)
}

/// A nonblocking eventfd.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    Ok(OwnedFd::from(event))
}

/// Adds one to an eventfd.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads a number of this machine")]
pub(crate) fn signal(event: &OwnedFd) {
    // Fails only when the counter is full (EAGAIN), and then the fd is readable already.
    let _ = retry(|| unistd::write(event, &1u64.to_ne_bytes()));
}

/// Empties an eventfd or timerfd.
pub(crate) fn clear(event: impl AsFd) {
    let mut count = [0; 8];
    // Fails only when there is nothing to empty (EAGAIN).
    let _ = retry(|| unistd::read(&event, &mut count));
}
