//! The filter `mirror_top` above the source of a mirror: sees every write and has it copied.
//!
//! It shows its child `file`. What it does with writes is in [`super::tracking`] and
//! [`super::synced`]. The job opens it and takes it away; it has no options of its own.
//!
//! Writes below the filter would not be seen: while the filter has users, it lets no other user of
//! its child write. It refuses to change its length, since the job copies the length it began with.

use std::any::Any;
use std::sync::Arc;

use bds_core::driver::{
    Access, Attempt, BoxFuture, Category, Child, Driver, DriverType, HostMap, Limits, NodeUse,
    OpenContext, Perm, Precision, ReadFlags, Reopen, ReopenContext, Role, StatusFlags, StatusRun,
    Truncate, WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_io::IoVec;

use super::tracking::Tracking;

/// What the filter lets other users do with what is below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flavour {
    /// Nothing else writes the child.
    Mirror,
    /// The job itself writes a node below: it is not consistent meanwhile, except seen through the
    /// top.
    Commit,
}

/// Driver type that opens the one filter of a job.
pub(super) struct MirrorTop {
    pub(super) flavour: Flavour,
    pub(super) tracking: Arc<Tracking>,
}

/// The filter's node.
pub(super) struct MirrorTopNode {
    pub(super) file: Child,
    flavour: Flavour,
    pub(super) tracking: Arc<Tracking>,
}

const OPEN_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "file",
    kind: OptionKind::Child,
    help: "the node that is mirrored",
    default: None,
}];

impl DriverType for MirrorTop {
    fn name(&self) -> &'static str {
        self.flavour.driver_name()
    }

    fn category(&self) -> Category {
        Category::Filter
    }

    fn help(&self) -> &'static str {
        "every write is copied to a job's target"
    }

    fn open_options(&self) -> &'static [OptionSpec] {
        OPEN_OPTIONS
    }

    fn open<'a>(
        &'a self,
        context: &'a mut OpenContext<'_>,
    ) -> BoxFuture<'a, Result<Box<dyn Driver>>> {
        Box::pin(async move {
            let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
            let tracking = Arc::clone(&self.tracking);
            Ok(Box::new(MirrorTopNode { file, flavour: self.flavour, tracking }) as Box<dyn Driver>)
        })
    }
}

impl Flavour {
    fn driver_name(self) -> &'static str {
        match self {
            Self::Mirror => "mirror_top",
            Self::Commit => "commit_top",
        }
    }
}

impl MirrorTopNode {
    /// Runs a write of the source alone, and marks its range when it ends.
    async fn marked<T>(
        &self,
        offset: u64,
        len: u64,
        write: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _marking = self.tracking.begin_marking(offset..offset + len);
        write.await
    }
}

impl Driver for MirrorTopNode {
    fn name(&self) -> &'static str {
        self.flavour.driver_name()
    }

    fn len(&self) -> u64 {
        self.file.len()
    }

    fn limits(&self) -> Limits {
        Limits { request_alignment: 1, ..self.file.limits() }
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn must_see_writes(&self) -> bool {
        true
    }

    fn write_flags(&self) -> WriteFlags {
        WriteFlags::all()
    }

    fn zero_flags(&self) -> Option<ZeroFlags> {
        Some(ZeroFlags::all())
    }

    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        self.file.try_read(offset, iov)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        self.file.read(offset, iov, flags)
    }

    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if !self.tracking.is_inline() {
            return None;
        }
        let written = self.file.try_write(offset, iov)?;
        // After the write, and also if it failed: part of it may be there.
        self.tracking.mark(offset..offset + iov.len() as u64);
        Some(written)
    }

    /// A write that has to wait ends its wait when the filter is drained.
    fn pace(&self, _len: u64) -> Option<BoxFuture<'_, ()>> {
        let delay = self.tracking.delay();
        (!delay.is_zero()).then(|| -> BoxFuture<'_, ()> {
            Box::pin(async move {
                let _ended = self.tracking.unless_drained(bds_io::sleep(delay)).await;
            })
        })
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.tracking.is_synced() {
                return self.write_synced(offset, iov, flags).await;
            }
            let len = iov.len() as u64;
            self.marked(offset, len, self.file.write(offset, iov, flags)).await
        })
    }

    fn compressed_unit(&self) -> Option<u32> {
        self.file.compressed_unit()
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.tracking.is_synced() {
                return self.write_compressed_synced(offset, iov).await;
            }
            let len = iov.len() as u64;
            self.marked(offset, len, self.file.write_compressed(offset, iov)).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            if self.tracking.is_synced() {
                return self.write_zeroes_synced(offset, len, flags).await;
            }
            // Marked also if it was declined: pieces of it may have been done.
            self.marked(offset, len, self.file.write_zeroes(offset, len, flags)).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            if self.tracking.is_synced() {
                self.discard_synced(offset, len).await?;
            } else {
                self.marked(offset, len, self.file.discard(offset, len)).await?;
            }
            Ok(Attempt::Done)
        })
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        let end = self.len();
        let run = match offset < end {
            true => {
                let map = Some(HostMap { child: self.file.name(), offset });
                StatusRun { len: len.min(end - offset), flags: StatusFlags::RAW, map }
            }
            false => StatusRun { len: 0, flags: StatusFlags::EOF, map: None },
        };
        Box::pin(async move { Ok(run) })
    }

    fn truncate(&self, _change: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let message = "the length cannot change while a job mirrors it";
            Err(Error::new(ErrorKind::InUse, message))
        })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        self.file.allocated_len()
    }

    fn child_access(&self, _name: &str, role: Role, node: &NodeUse) -> Access {
        let mut access = Access::of_child(role, node);
        // The job copies a fixed length, so nothing above resizes.
        access.perm -= Perm::RESIZE;
        if node.above.perm.is_empty() {
            return access;
        }
        access.shared -= Perm::RESIZE;
        match self.flavour {
            Flavour::Mirror => access.shared -= Perm::WRITE,
            // Seen alone, the nodes between are inconsistent, so nothing is promised about them.
            Flavour::Commit => access.perm -= Perm::CONSISTENT_READ,
        }
        access
    }

    fn drain_begin(&self) {
        self.tracking.drain_begin();
    }

    fn drain_end(&self) {
        self.tracking.drain_end();
    }

    /// Accepts any mode; whether the file may be written is decided by the permissions.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async { Ok(Box::new(()) as Box<dyn Reopen>) })
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let message = "a job mirrors it: complete or cancel the job first";
            Err(Error::new(ErrorKind::InUse, message))
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
