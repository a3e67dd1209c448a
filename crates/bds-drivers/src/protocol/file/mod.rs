//! The `file` and `host_device` protocols: read and write a file or device of the host (or of the
//! simulated disk) through one `bds_io::File`.
//!
//! Both drivers share this code; they differ in the kind of file they accept and in the calls that
//! free space. Files:
//!
//! ```text
//! open    options, kinds, read-only, limits    zero    zero writes, discard, their fallbacks
//! create  claims, makes, empties a file        status  holes and data, truncate
//! lock    QEMU's image locks                   io      reads, writes, flush, copy offload
//! users   lock holders of this process         reopen  other modes, inactivate and activate
//! ```
//!
//! Invariants:
//! - Nothing is written through a node opened read-only; the descriptor itself is read-only then.
//! - After `fdatasync` failed on a buffered file, every later flush fails too: the kernel has
//!   dropped the dirty pages or marked them clean, so a later success would prove nothing.
//! - The known length is a hint about a file that others may change: it decides whether the quick
//!   path is tried, never which bytes a read returns.

mod create;
mod io;
mod lock;
mod open;
mod reopen;
mod status;
#[cfg(test)]
mod tests;
mod users;
mod zero;

use std::any::Any;
use std::io as sysio;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use bds_core::driver::{
    Attempt, BoxFuture, Category, ClaimedFile, Driver, DriverType, Limits, OpenContext, Precision,
    RcuCell, RcuGuard, ReadFlags, Reopen, ReopenContext, StatusRun, Truncate, WriteFlags,
    ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, Result};
use bds_io::{File, Fs, IoVec};

use lock::{LockMode, Locks};
use status::DataRun;

/// The `file` protocol: regular files.
#[derive(Clone, Copy, Debug)]
pub struct FileProtocol;

/// The `host_device` protocol: block and character devices of the host.
#[derive(Clone, Copy, Debug)]
pub struct HostDevice;

/// Which of the two drivers a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    File,
    Device,
}

impl Flavour {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Device => "host_device",
        }
    }
}

const OPEN_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "filename",
        kind: OptionKind::String,
        help: "file name of the image",
        default: None,
    },
    OptionSpec {
        name: "locking",
        kind: OptionKind::Choice(&["on", "off", "auto"]),
        help: "lock the file against other users (on: refuse where locks do not work)",
        default: Some("auto"),
    },
    OptionSpec {
        name: "aio",
        kind: OptionKind::Choice(&["threads", "native", "io_uring"]),
        help: "accepted for compatibility; the engine belongs to the context",
        default: Some("threads"),
    },
    OptionSpec {
        name: "drop-cache",
        kind: OptionKind::Bool,
        help: "accepted for compatibility",
        default: Some("on"),
    },
    OptionSpec {
        name: "x-share-rw",
        kind: OptionKind::Bool,
        help: "let another writer in where no metadata is kept in the file",
        default: Some("off"),
    },
];

/// An open file or device.
struct FileNode {
    flavour: Flavour,
    node_name: String,
    path: PathBuf,
    /// State at the first open.
    first: Opened,
    /// State since the last reopen, if there was one. Most files are never reopened: for them the
    /// lookup costs one load.
    reopened: OnceLock<RcuCell<Opened>>,
    /// False while another process uses the file (after `inactivate`).
    is_active: AtomicBool,
    /// Length at open or after a resize, raised as far as the file was seen to reach since. A read
    /// never lowers it: what a file that was cut short has lost must not turn into zeros.
    known_len: AtomicU64,
    /// errno of the flush that failed; 0 if none did.
    broken_flush: AtomicI32,
    features: Features,
    data_run: Mutex<DataRun>,
}

/// Everything that a reopen replaces as a whole, while no request is in flight.
#[derive(Debug)]
struct Opened {
    file: File,
    locks: Locks,
    mode: Mode,
    is_read_only: bool,
    is_direct: bool,
    limits: Limits,
}

/// A reference to the current state.
enum OpenedRef<'a> {
    First(&'a Opened),
    Reopened(RcuGuard<'a, Opened>),
}

impl Deref for OpenedRef<'_> {
    type Target = Opened;

    #[inline]
    fn deref(&self) -> &Opened {
        match self {
            Self::First(opened) => opened,
            Self::Reopened(reading) => reading,
        }
    }
}

/// Options that decide about locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    locking: LockMode,
    share_writers: bool,
}

/// Calls that the file system turned out not to support. Set once a node, so that they are not
/// tried again.
#[derive(Debug, Default)]
struct Features {
    no_zero_range: AtomicBool,
    no_punch_hole: AtomicBool,
    no_allocate: AtomicBool,
    no_zero_device: AtomicBool,
    no_discard_device: AtomicBool,
    no_dsync: AtomicBool,
    no_copy_range: AtomicBool,
}

impl FileNode {
    #[inline]
    fn opened(&self) -> OpenedRef<'_> {
        match self.reopened.get() {
            None => OpenedRef::First(&self.first),
            Some(reopened) => OpenedRef::Reopened(reopened.read()),
        }
    }

    /// Makes an error of the system with file, node and byte offset.
    fn failed(&self, what: &str, offset: u64, error: sysio::Error) -> Error {
        Error::io(error, what).node(&self.node_name).file(&self.path).at(offset)
    }

    /// Queries the length, and refreshes what `len` returns.
    fn current_len(&self) -> Result<u64> {
        let len = self.actual_len()?;
        self.known_len.store(len, Ordering::Relaxed);
        Ok(len)
    }

    /// Queries the length that the file system reports.
    fn actual_len(&self) -> Result<u64> {
        let len = self.opened().file.len();
        len.map_err(|e| Error::io(e, "cannot query the length").file(&self.path))
    }
}

impl Driver for FileNode {
    fn name(&self) -> &'static str {
        self.flavour.name()
    }

    fn len(&self) -> u64 {
        self.known_len.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        self.opened().limits
    }

    fn is_read_only(&self) -> bool {
        self.opened().is_read_only
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::FUA
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK)
    }

    fn filename(&self) -> Option<PathBuf> {
        Some(self.path.clone())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.opened().file.identity().ok()
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.quick_read(offset, iov)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.quick_write(offset, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, _flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.read_all(offset, iov))
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_all(offset, iov, flags.contains(WriteFlags::FUA)))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(self.zero(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(self.discard_range(offset, len))
    }

    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.flush())
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let run = self.status(offset, len, precision);
        Box::pin(async move { run })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.resize(change))
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        let now = self.opened();
        let answer = now
            .file
            .allocated_len()
            .map(Some)
            .map_err(|e| Error::io(e, "cannot query the allocated space").file(&self.path));
        Box::pin(async move { answer })
    }

    fn copy_range_from<'a>(
        &'a self,
        source: &'a dyn Driver,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async move {
            match source.as_any().downcast_ref::<FileNode>() {
                Some(source) => self.copy_from(source, source_offset, offset, len).await,
                None => Ok(Attempt::Unsupported),
            }
        })
    }

    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(self.prepare(context))
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        self.set_inactive();
        Box::pin(async { Ok(()) })
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { self.set_active() })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        // The locks belong to the open file description, and an operation in flight may keep that
        // alive.
        let now = self.opened();
        now.locks.release(&now.file);
        Box::pin(async { Ok(()) })
    }
}

impl DriverType for FileProtocol {
    fn name(&self) -> &'static str {
        Flavour::File.name()
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn help(&self) -> &'static str {
        "a regular file of the host"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { open::open(Flavour::File, context) })
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::CREATE_OPTIONS
    }

    fn claim_file(&self, fs: &Fs, path: &Path, options: &mut Options) -> Result<ClaimedFile> {
        create::claim(fs, path, options)
    }
}

impl DriverType for HostDevice {
    fn name(&self) -> &'static str {
        Flavour::Device.name()
    }

    fn category(&self) -> Category {
        Category::Protocol
    }

    fn help(&self) -> &'static str {
        "a block or character device of the host"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move { open::open(Flavour::Device, context) })
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        create::DEVICE_OPTIONS
    }

    fn claim_file(&self, fs: &Fs, path: &Path, options: &mut Options) -> Result<ClaimedFile> {
        create::claim_device(fs, path, options)
    }
}
