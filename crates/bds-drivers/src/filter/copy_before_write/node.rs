//! The filter's node: keeps old data before each change, and serves reads of the snapshot.

use std::any::Any;
use std::sync::Arc;

use bds_core::Result;
use bds_core::driver::{
    Access, Attempt, BoxFuture, Driver, NodeUse, Perm, Precision, Role, StatusRun, WriteFlags,
    ZeroFlags,
};
use bds_io::IoVec;

use super::keep::Parts;
use crate::filter::pass_through::pass_on;

/// A copy-before-write node.
pub(super) struct CopyBeforeWriteNode(pub(super) Arc<Parts>);

impl Driver for CopyBeforeWriteNode {
    fn name(&self) -> &'static str {
        "copy-before-write"
    }

    pass_on!(self.0.file =>
        len, limits, is_filter, write_flags, zero_flags, try_read, read, compressed_unit,
        block_status, allocated_len);

    #[inline]
    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let range = offset..offset + iov.len() as u64;
        self.0.snapshot.lets_pass(&range).then(|| self.0.file.try_write(offset, iov))?
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if !flags.contains(WriteFlags::UNCHANGED) {
                self.0.keep(offset..offset + iov.len() as u64).await?;
            }
            self.0.file.write(offset, iov, flags).await
        })
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.0.keep(offset..offset + iov.len() as u64).await?;
            self.0.file.write_compressed(offset, iov).await
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            if !flags.contains(ZeroFlags::UNCHANGED) {
                self.0.keep(offset..offset + len).await?;
            }
            self.0.file.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.0.keep(offset..offset + len).await?;
            self.0.file.discard(offset, len).await?;
            Ok(Attempt::Done)
        })
    }

    fn snapshot_read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.0.read_snapshot(offset, iov))
    }

    fn snapshot_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(self.0.snapshot_run(offset, len, precision))
    }

    fn snapshot_discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let Parts { snapshot, target, .. } = &*self.0;
            snapshot.check_whole()?;
            let whole = snapshot.give_up(&(offset..offset.saturating_add(len)));
            if whole.start >= whole.end {
                return Ok(());
            }
            snapshot.stage.give_up(&whole);
            // A copy that is under way writes what is discarded; its readers are refused already.
            snapshot.map.wait_idle(whole.clone()).await;
            target.discard(whole.start, whole.end - whole.start).await
        })
    }

    /// The file is written by the parents of this node alone; the target is written, and may be
    /// written by others, but not resized; the spill node is this node's alone.
    fn child_access(&self, name: &str, role: Role, node: &NodeUse) -> Access {
        if name == "target" {
            let perm = match node.is_active {
                true => Perm::CONSISTENT_READ | Perm::WRITE,
                false => Perm::empty(),
            };
            return Access { perm, shared: Perm::all() - Perm::RESIZE };
        }
        if name == "spill" {
            let perm = match node.is_active {
                true => Perm::CONSISTENT_READ | Perm::WRITE,
                false => Perm::empty(),
            };
            return Access { perm, shared: Perm::CONSISTENT_READ };
        }
        let mut access = Access::of_child(role, node);
        access.perm -= Perm::RESIZE;
        // Without a user of this node nothing is copied, and others may write past it: it is not
        // inserted yet, or not any more. Then it must not stand in the way of those others.
        if !node.above.perm.is_empty() {
            access.perm |= Perm::CONSISTENT_READ;
            access.shared -= Perm::RESIZE;
            if !self.0.shares_writes {
                access.shared -= Perm::WRITE;
            }
        }
        access
    }

    fn drain_begin(&self) {
        self.0.snapshot.set_draining(true);
    }

    fn drain_end(&self) {
        self.0.snapshot.set_draining(false);
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.0.snapshot.end();
            self.0.snapshot.stage.wait_no_task().await;
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
