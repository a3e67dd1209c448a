//! The contract between a driver and the house.
//!
//! A driver sees its own state and its children, nothing else: it cannot name its parents or siblings. The
//! corridor (`request/`) has already checked range, permission and alignment, and registered the request, when a
//! driver method is called; a driver sends its own I/O through its [`Child`]ren, which is the same corridor
//! one node further down.
//!
//! Every future may be dropped at any await, or kept without being polled. The corridor carries a change, a flush or a resize
//! on in a task of its own if its request is dropped once it was polled, and keeps it inside until it ends; what others may
//! wait for still runs in a task of the driver's.

mod access;
mod child;
mod foreign;
mod limits;
mod open;
mod probe;
mod registry;
mod reopen;
mod status;
mod types;

use std::ffi::OsString;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;

use bds_io::IoVec;

pub use access::{Access, NodeUse, Perm};
// For what a driver exchanges while requests read it: children that come and go, descriptors, options.
pub use bds_refcount::{RcuCell, RcuGuard, own_shard};
pub use child::{Child, ChildPort};
pub use foreign::{TAIL_LEN, foreign_format};
pub use limits::Limits;
pub use open::{
    CacheMode, ChildOpener, ChildRequest, CreateContext, DetectZeroes, OpenContext, OpenFlags,
    Reference, ReferenceKind, Role,
};
pub use probe::{Candidate, PROBE_LEN, probe};
pub use registry::Registry;
pub use reopen::{Reopen, ReopenContext};
pub use status::{HostMap, StatusFlags, StatusRun};
pub use types::{Category, ClaimedFile, CreateFacts, DriverType, MeasureReport, MeasureSource};

use crate::error::{Error, ErrorKind, Result};

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// An operation a driver may decline: declining is not failing, the caller has a fallback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Attempt {
    /// It was done.
    Done,
    /// Nothing was changed; use the fallback.
    Unsupported,
}

bitflags::bitflags! {
    /// Modifiers of a read.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ReadFlags: u32 {
        /// Only bring the data closer: the buffer says how much, and its bytes may be left as they were.
        const PREFETCH = 1;
        /// Copy what is read from below into the node that is asked. The corridor does that; drivers never see it unless they
        /// set it.
        const COPY_ON_READ = 2;
    }

    /// Modifiers of a write. The corridor removes what a driver does not declare and emulates it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct WriteFlags: u32 {
        /// Durable when it returns.
        const FUA = 1;
        /// Does not change what a reader sees (needs only the write-unchanged permission).
        const UNCHANGED = 2;
        /// Exclude every overlapping request.
        const SERIALISING = 4;
        /// Fail with `WouldWait` rather than wait for an overlapping request.
        const NO_WAIT = 8;
    }

    /// Modifiers of a zero write.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ZeroFlags: u32 {
        /// Durable when it returns.
        const FUA = 1;
        /// May deallocate, if the range still reads as zeros afterwards.
        const MAY_UNMAP = 2;
        /// Only if that is faster than writing zeros; else `Attempt::Unsupported`.
        const NO_FALLBACK = 4;
        /// See [`WriteFlags::UNCHANGED`].
        const UNCHANGED = 8;
        /// See [`WriteFlags::NO_WAIT`].
        const NO_WAIT = 16;
    }
}

/// How space of a grown image is provided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prealloc {
    /// Not at all.
    #[default]
    Off,
    /// Metadata only.
    Metadata,
    /// Reserved on the host, not written.
    Falloc,
    /// Written with zeros.
    Full,
}

impl Prealloc {
    /// From QEMU's word for it.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }
}

/// A change of length.
#[derive(Clone, Copy, Debug)]
pub struct Truncate {
    /// The new length in bytes.
    pub len: u64,
    /// The length must become exactly this (else: at least).
    pub exact: bool,
    /// How grown space is provided.
    pub prealloc: Prealloc,
    /// Grown space must read as zeros, whatever lies below.
    pub zero_new: bool,
}

/// What `info` tells about an image.
#[derive(Clone, Debug, Default)]
pub struct ImageInfo {
    /// Allocation unit in bytes, for formats that have one.
    pub cluster_size: Option<u64>,
    /// True if refcounts may be wrong until repaired.
    pub is_dirty: bool,
    /// True if marked corrupt.
    pub is_corrupt: bool,
    /// True if the payload is encrypted.
    pub is_encrypted: bool,
    /// True if data may be stored compressed (convert -c made it, or the format always does).
    pub is_compressed: bool,
    /// The backing file as stored in the image.
    pub backing_file: Option<OsString>,
    /// Its format as stored.
    pub backing_format: Option<String>,
    /// QEMU's `format-specific` object: `{"type": …, "data": {…}}`.
    pub format_specific: Option<serde_json::Value>,
    /// QEMU's `snapshots` array, if there are any.
    pub snapshots: Vec<serde_json::Value>,
}

/// What `check` found. Counts are QEMU's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that lose or will lose data.
    pub corruptions: u64,
    /// Space that nothing refers to.
    pub leaks: u64,
    /// Errors that kept the check from looking (I/O).
    pub check_errors: u64,
    /// Clusters of the guest in all.
    pub total_clusters: u64,
    /// Of these, allocated.
    pub allocated_clusters: u64,
    /// Of these, not contiguous with the one before.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// End of the last used byte in the file.
    pub image_end_offset: u64,
    /// What was found, one sentence each, in order; bounded (`messages_dropped` counts the rest).
    pub messages: Vec<String>,
    /// Messages not kept.
    pub messages_dropped: u64,
}

impl CheckReport {
    /// No corruption, no leak, no error.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }
}

/// An open image, protocol or filter.
///
/// Ranges given to a driver are inside the node (writes past the end only for those who may resize), aligned to
/// [`Limits::request_alignment`], and split by its limits. Methods may be called from many threads at once.
#[expect(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
pub trait Driver: Send + Sync + 'static {
    /// The driver's name as QEMU spells it ("qcow2").
    fn name(&self) -> &'static str;

    /// Length in bytes as the guest sees it.
    fn len(&self) -> u64;

    /// What requests must look like. Read when the node is opened, when it is reopened and when anything below changes.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// True if the node shows its one child's data unchanged.
    fn is_filter(&self) -> bool {
        false
    }

    /// True if unallocated parts show the backing child.
    fn supports_backing(&self) -> bool {
        false
    }

    /// Flags `write` honours itself.
    fn write_flags(&self) -> WriteFlags {
        WriteFlags::empty()
    }

    /// Flags `write_zeroes` honours itself; `None` if there is no such operation.
    fn zero_flags(&self) -> Option<ZeroFlags> {
        None
    }

    /// True if it can only be read although writing was asked for (`auto_read_only`, or a medium that is write-protected).
    fn is_read_only(&self) -> bool {
        false
    }

    /// The name of the file that holds the bytes, for protocols that have one.
    fn filename(&self) -> Option<PathBuf> {
        None
    }

    /// Which file it is, as (device, inode), for protocols that have one: two names of one file agree.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// Answers a read at once if that needs no waiting (caches hold all of it). `None`: ask [`Driver::read`].
    /// Must not block, and leaves nothing behind when it declines (the buffer may be partly filled).
    fn try_read(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }

    /// Does a write at once if that needs no waiting. `None`: nothing was changed, ask [`Driver::write`].
    fn try_write(&self, _offset: u64, _iov: &IoVec) -> Option<Result<()>> {
        None
    }

    /// Asked before every write, compressed write, zero write and discard of `len` bytes: a driver that lets them go at its own
    /// pace has them wait here. What waits has not begun: dropped here, it is as if it had never come. `None`: go.
    fn pace(&self, _len: u64) -> Option<BoxFuture<'_, ()>> {
        None
    }

    /// Fills `iov` from `offset`. Bytes past the end of what is stored are zeros.
    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>>;

    /// Writes `iov` at `offset`.
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Bytes of one compressed cluster; `None` if the node writes none. A filter answers for its child.
    fn compressed_unit(&self) -> Option<u32> {
        None
    }

    /// Writes one compressed cluster (or the tail of the image). An empty `iov` at the end pads the file.
    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} has no compressed clusters")))
        })
    }

    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        _offset: u64,
        _len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Tells that the range is no longer needed. Advisory.
    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Writes cached metadata to the children (not necessarily to the medium). Called before `flush_to_disk`.
    fn flush_to_os(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Makes the driver's own medium durable. Children are flushed by the corridor afterwards.
    fn flush_to_disk(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// What lies at `offset`: a run of at most `len` bytes, at least one request alignment long. `precise`: work for exact answers
    /// about zeros; else a cheap answer will do.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precise: bool,
    ) -> BoxFuture<'_, Result<StatusRun>>;

    /// Changes the length.
    fn truncate(&self, _change: Truncate) -> BoxFuture<'_, Result<()>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} cannot be resized")))
        })
    }

    /// Facts about the image.
    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async { Ok(ImageInfo::default()) })
    }

    /// Bytes the node occupies on its host, where that is known.
    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async { Ok(None) })
    }

    /// Looks for leaks and corruption; changes nothing. `progress` is called with (done, total) bytes of metadata.
    fn check<'a>(
        &'a self,
        _progress: &'a (dyn Fn(u64, u64) + Send + Sync),
    ) -> BoxFuture<'a, Result<CheckReport>> {
        let name = self.name();
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotSupported, format!("{name} has nothing to check")))
        })
    }

    /// Copies bytes from `source` (a child-level offload such as copy_file_range). `Unsupported`: copy by buffers.
    fn copy_range_from<'a>(
        &'a self,
        _source: &'a dyn Driver,
        _source_offset: u64,
        _offset: u64,
        _len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }

    /// Takes the first backing child, or gives the only one back (`None`). Nobody is inside the node meanwhile. Exchanging
    /// one backing node for another needs no driver: the child then leads elsewhere.
    ///
    /// # Errors
    /// Nothing has changed.
    fn set_backing(&self, _backing: Option<Child>) -> Result<Option<Child>> {
        let name = self.name();
        let words = format!("{name} cannot get or lose its backing node while it is open");
        Err(Error::new(ErrorKind::NotSupported, words))
    }

    /// A child leads to another node, or a node somewhere below was exchanged or reopened (or this one): facts of children that
    /// the driver remembers (a length, an alignment, what the file can do) are asked again or forgotten. Called with nobody inside,
    /// before [`Driver::limits`] is read again, and also if nothing has changed. Must not block nor call into the graph.
    fn children_changed(&self) {}

    /// What this node does with one of its children, and what it lets others do with it meanwhile, given what its own parents do with
    /// it (`above`). A pure function of its arguments and of options: it is asked often, also for changes that never come to be.
    /// The default follows from the child's role, see [`Access::of_child`].
    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        Access::of_child(role, node)
    }

    /// Nobody enters the node from now on, so whatever the driver holds back on its own account (a throttled request) must
    /// go. Called before the wait for those inside, once until [`Driver::drain_end`]. Must not block nor call into the graph.
    fn drain_begin(&self) {}

    /// The node is open again. Alternates strictly with [`Driver::drain_begin`], which comes first.
    fn drain_end(&self) {}

    /// Gets ready for other flags or options, with nobody inside. What can fail, fails here; what is prepared takes
    /// effect in [`Reopen::commit`], or not at all. The default takes any flags that the graph itself sees to (discard,
    /// zero detection, flush switches) and refuses a change of `read_only` or `cache.direct`. What was prepared does not keep the
    /// context, so that the caller can see which options were not taken.
    ///
    /// # Errors
    /// Nothing has changed.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(std::future::ready(reopen::by_default(self.name(), context)))
    }

    /// Writes out whatever is held back and gives up whatever keeps other processes from writing. Nothing is written until
    /// [`Driver::activate`]. Called with nobody inside.
    ///
    /// # Errors
    /// The node is as active as before.
    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Takes charge again: others may have changed the bytes meanwhile, so what was remembered of them is read anew.
    /// Children are active already. Called with nobody inside.
    ///
    /// # Errors
    /// The node stays inactive; it may be tried again.
    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// For offload between two drivers of one kind.
    fn as_any(&self) -> &dyn std::any::Any;

    /// Called once when the node dies: writes what is left, reports what failed. Children are still open.
    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
