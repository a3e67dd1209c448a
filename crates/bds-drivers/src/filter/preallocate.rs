//! The `preallocate` filter: grows the file ahead of writes, so that the file system allocates many
//! clusters in one call.
//!
//! Options are QEMU's: `file`, `prealloc-align` (bytes, a multiple of 512, default 1M) and
//! `prealloc-size` (bytes, default 128M). The node lies between a format and its protocol. A write
//! past the end of the file first allocates up to `prealloc-size` bytes beyond its own end, as
//! zeros, where that is cheap; closing the node trims the surplus.
//!
//! Errors at open: `InvalidInput` for an alignment that is not a multiple of 512 bytes.
//!
//! ```text
//! 0 ......... zero_from ........ file.len()      zero_from: never written from here on
//! └─ data_end ┘                                   data_end: the length that parents see
//! ```
//!
//! A crash leaves surplus space, which reads as zeros, and nothing else: no byte is moved, and only
//! what lies behind `data_end` is ever cut off. Allocating ahead is best effort: if it fails, the
//! write goes on without.
//!
//! No other user may write to the file or resize it meanwhile. The surplus is trimmed when the node
//! is closed or made inactive, and by any change of length; a driver is not notified when the last
//! writer detaches.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{self, Arc, PoisonError};

use bds_core::driver::{
    Access, Attempt, BoxFuture, Child, Driver, NodeUse, OpenContext, Perm, Prealloc, Reopen,
    ReopenContext, Role, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec, Options};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;
use bds_io::sync::{Mutex, OwnedMutexGuard};

use super::pass_through::{filter_type, pass_on};

/// The `preallocate` filter.
#[derive(Clone, Copy, Debug)]
pub struct Preallocate;

const OPEN_OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "file",
        kind: OptionKind::Child,
        help: "the file to grow ahead",
        default: None,
    },
    OptionSpec {
        name: "prealloc-align",
        kind: OptionKind::Size,
        help: "the file's length becomes a multiple of this, a multiple of 512 bytes",
        default: Some("1M"),
    },
    OptionSpec {
        name: "prealloc-size",
        kind: OptionKind::Size,
        help: "bytes to allocate beyond a write that grows the file",
        default: Some("128M"),
    },
];

struct PreallocateNode(Arc<Inner>);

struct Inner {
    file: Child,
    /// Bytes; a multiple of 512.
    align: u64,
    /// Bytes.
    ahead: u64,
    /// False: the file cannot be written, so preallocation is off.
    is_active: AtomicBool,
    /// Length that parents see.
    data_end: AtomicU64,
    /// All bytes from here to the end of the file are zeros. Raised before anything is written
    /// there.
    zero_from: AtomicU64,
    /// The file does not support zero writes without fallback.
    cannot_allocate: AtomicBool,
    /// Identity of the file that the lengths belong to.
    measured: sync::Mutex<Option<(u64, u64)>>,
    /// Held while the length of the file changes.
    length_lock: Arc<Mutex<()>>,
}

/// A write that may reach past the data. Whatever its result, the range it may have touched counts
/// as data afterwards.
struct GrowGuard<'a> {
    node: &'a Inner,
    end: u64,
    /// Held if there is no space ahead: no other write may allocate while this one makes the file
    /// longer.
    _length_lock: Option<OwnedMutexGuard<()>>,
}

impl Drop for GrowGuard<'_> {
    fn drop(&mut self) {
        let reached = self.end.min(self.node.file.len());
        self.node.data_end.fetch_max(reached, Ordering::SeqCst);
    }
}

impl Inner {
    /// Prepares for a write of `offset..end`.
    async fn prepare_growth(self: &Arc<Self>, offset: u64, end: u64) -> GrowGuard<'_> {
        let lacks_space = || end > self.file.len() && !self.cannot_allocate.load(Ordering::SeqCst);
        let mut held_lock = None;
        if lacks_space() {
            let lock = Arc::clone(&self.length_lock).lock_owned().await;
            if lacks_space() {
                let node = Arc::clone(self);
                let take = async move {
                    let has_space = node.allocate_ahead(offset, end).await;
                    drop(node);
                    (!has_space).then_some(lock)
                };
                // Runs to completion even if this future is dropped: zeros that come late must not
                // overwrite bytes of a later write.
                held_lock = bds_io::spawn(take).detach_on_drop().await;
            }
        }
        GrowGuard { node: self, end, _length_lock: held_lock }
    }

    /// Makes the file at least `end` bytes long. The range between its end and `offset` stays a
    /// hole. False: failed this time, and the write must hold the length lock, because zeros
    /// allocated meanwhile could overwrite its bytes. True also if allocation never works.
    async fn allocate_ahead(&self, offset: u64, end: u64) -> bool {
        let unit = u64::from(self.file.limits().request_alignment);
        // `align` need not be a power of two.
        let from = self.file.len().max(offset - offset % self.align).next_multiple_of(unit);
        let to = end
            .checked_add(self.ahead)
            .and_then(|to| to.checked_next_multiple_of(self.align))
            .and_then(|to| to.checked_next_multiple_of(unit))
            .filter(|to| from < *to);
        let Some(to) = to else { return false };
        match self.file.write_zeroes(from, to - from, ZeroFlags::NO_FALLBACK).await {
            Ok(Attempt::Done) => {}
            Ok(Attempt::Unsupported) => self.cannot_allocate.store(true, Ordering::SeqCst),
            Err(error) => {
                tracing::debug!(%error, "no space taken ahead of a write");
                return false;
            }
        }
        true
    }

    async fn write_past(
        self: &Arc<Self>,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> Result<()> {
        let end = offset + iov.len() as u64;
        let _guard = self.prepare_growth(offset, end).await;
        self.zero_from.fetch_max(end, Ordering::SeqCst);
        self.file.write(offset, iov, flags).await
    }

    async fn zero_past(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<Attempt> {
        let end = offset + len;
        let _guard = self.prepare_growth(offset, end).await;
        let is_zero = offset >= self.zero_from.load(Ordering::SeqCst) && end <= self.file.len();
        if is_zero && !flags.intersects(ZeroFlags::FUA | ZeroFlags::MAY_UNMAP) {
            return Ok(Attempt::Done);
        }
        // Zeros after zeros: an unwritten range stays so. But a zero write may be many operations.
        self.zero_from.fetch_max(end, Ordering::SeqCst);
        self.file.write_zeroes(offset, len, flags).await
    }

    /// Trims what lies behind the data. The caller holds the length lock.
    async fn trim_surplus(&self) -> Result<()> {
        let data_end = self.data_end.load(Ordering::SeqCst);
        if self.file.len() <= data_end {
            return Ok(());
        }
        let change =
            Truncate { len: data_end, exact: true, prealloc: Prealloc::Off, zero_new: false };
        self.file.truncate(change).await
    }

    /// Changes the length. The request path lets no write past the end run meanwhile.
    async fn resize(&self, change: Truncate) -> Result<()> {
        let _length_lock = self.length_lock.lock().await;
        let data_end = self.data_end.load(Ordering::SeqCst);
        let has_zeros = self.zero_from.load(Ordering::SeqCst) <= data_end;
        let is_there = change.len >= data_end && change.len <= self.file.len() && has_zeros;
        if !is_there || change.prealloc == Prealloc::Full {
            self.trim_surplus().await?;
            self.file.truncate(change).await?;
            self.zero_from.store(self.file.len(), Ordering::SeqCst);
        }
        self.data_end.store(change.len, Ordering::SeqCst);
        Ok(())
    }

    /// Takes the current length of the file, without surplus.
    fn measure(&self) {
        *self.lock_measured() = self.file.identity();
        let len = self.file.len();
        self.data_end.store(len, Ordering::SeqCst);
        self.zero_from.store(len, Ordering::SeqCst);
    }

    fn lock_measured(&self) -> sync::MutexGuard<'_, Option<(u64, u64)>> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures again if the bytes now lie in another file. Space allocated ahead in this file
    /// still counts: it has to be trimmed.
    fn children_changed(&self) {
        self.cannot_allocate.store(false, Ordering::SeqCst);
        let is_same = *self.lock_measured() == self.file.identity();
        // A file that got shorter than its data counts as another one (memory has no identity).
        if !is_same || self.file.len() < self.data_end.load(Ordering::SeqCst) {
            self.measure();
        }
    }

    fn is_active(&self) -> bool {
        self.is_active.load(Ordering::SeqCst)
    }

    fn is_past(&self, end: u64) -> bool {
        self.is_active() && end > self.data_end.load(Ordering::SeqCst)
    }
}

/// A prepared change of mode.
struct PreparedReopen<'n> {
    node: &'n Inner,
    will_write: bool,
}

impl Reopen for PreparedReopen<'_> {
    fn commit(self: Box<Self>) {
        let was_active = self.node.is_active.swap(self.will_write, Ordering::SeqCst);
        if self.will_write && !was_active {
            self.node.measure();
        }
    }
}

impl Driver for PreallocateNode {
    fn name(&self) -> &'static str {
        "preallocate"
    }

    pass_on!(self.0.file =>
        limits, is_filter, write_flags, zero_flags, try_read, read, discard, block_status,
        allocated_len);

    fn len(&self) -> u64 {
        if self.0.is_active() { self.0.data_end.load(Ordering::SeqCst) } else { self.0.file.len() }
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.0.is_past(offset.checked_add(iov.len() as u64)?) {
            return None;
        }
        self.0.file.try_write(offset, iov)
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        if self.0.is_past(offset + iov.len() as u64) {
            return Box::pin(self.0.write_past(offset, iov, flags));
        }
        self.0.file.write(offset, iov, flags)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        if self.0.is_past(offset + len) {
            return Box::pin(self.0.zero_past(offset, len, flags));
        }
        self.0.file.write_zeroes(offset, len, flags)
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        if !self.0.is_active() {
            return self.0.file.truncate(change);
        }
        Box::pin(self.0.resize(change))
    }

    /// Unshares resizing and writing behind the data. Requested also while no parent writes: the
    /// surplus must be trimmed after the last writer left.
    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        let mut access = Access::of_child(role, node);
        if node.is_writable && node.is_active {
            access.perm |= Perm::changes();
            access.shared -= Perm::changes();
        }
        access
    }

    fn children_changed(&self) {
        self.0.children_changed();
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        self.close()
    }

    fn activate(&self) -> BoxFuture<'_, Result<()>> {
        self.0.measure();
        Box::pin(async { Ok(()) })
    }

    /// Read-only, there is no surplus; writable again, the file is measured anew.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        let will_write = !context.flags.read_only;
        Box::pin(async move {
            if !will_write {
                self.close().await?;
            }
            Ok(Box::new(PreparedReopen { node: &self.0, will_write }) as Box<dyn Reopen>)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            if !self.0.is_active() {
                return Ok(());
            }
            let _length_lock = self.0.length_lock.lock().await;
            let given = self.0.trim_surplus().await;
            given.map_err(|e| e.context("cannot give back space taken ahead; no data is lost"))
        })
    }
}

filter_type!(Preallocate, "preallocate", "the file grows ahead of writes");

impl Preallocate {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<PreallocateNode> {
        let (align, ahead) = take_sizes(&mut context.options)?;
        let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
        let len = file.len();
        Ok(PreallocateNode(Arc::new(Inner {
            is_active: AtomicBool::new(file.is_writable()),
            measured: sync::Mutex::new(file.identity()),
            file,
            align,
            ahead,
            data_end: AtomicU64::new(len),
            zero_from: AtomicU64::new(len),
            cannot_allocate: AtomicBool::new(false),
            length_lock: Arc::default(),
        })))
    }
}

fn take_sizes(options: &mut Options) -> Result<(u64, u64)> {
    let align = options.take_size("prealloc-align")?.unwrap_or(1 << 20);
    if align == 0 || !align.is_multiple_of(512) {
        let words = "option 'prealloc-align' must be a multiple of 512 bytes, at least 512";
        return Err(Error::new(ErrorKind::InvalidInput, words).field("prealloc-align", align));
    }
    Ok((align, options.take_size("prealloc-size")?.unwrap_or(128 << 20)))
}
