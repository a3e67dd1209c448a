//! The requests.

use bds_io::{Buf, IoVec};

use super::carry::{Request, Work};
use super::{Backend, Inner};
use crate::driver::{
    Attempt, CheckReport, ImageInfo, ReadFlags, StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use crate::error::{Error, Result};
use crate::graph::{Node, NodeId};
use crate::request::enter::{enter, named};
use crate::request::status::{self, ChainRun, Depth};
use crate::request::{dispatch, offload, range, truncate};
use crate::stats::{Operation, Outcome};

impl Backend {
    /// Reads at once if nothing has to be waited for, without allocating. `None`: ask [`Backend::read`]; the buffer may
    /// be partly filled.
    #[inline]
    pub fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let inner = &*self.inner;
        let began = inner.stats.clock();
        dispatch::try_read(&inner.edge, offset, iov, |result| match result {
            Ok(()) => {
                inner.stats.ended(Operation::Read, iov.len() as u64, Outcome::Done, began);
                Some(Ok(()))
            }
            Err(error) => inner.failed_inline(Operation::Read, error, began),
        })?
    }

    /// Writes in place at once if nothing has to be waited for, without allocating. `None`: nothing was changed for good, ask
    /// [`Backend::write`].
    #[inline]
    pub fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.is_writethrough() {
            return None;
        }
        let inner = &*self.inner;
        let began = inner.stats.clock();
        dispatch::try_write(&inner.edge, offset, iov, |result| match result {
            Ok(()) => {
                inner.stats.ended(Operation::Write, iov.len() as u64, Outcome::Done, began);
                Some(Ok(()))
            }
            Err(error) => inner.failed_inline(Operation::Write, error, began),
        })?
    }

    /// Fills `iov` from `offset`.
    ///
    /// # Errors
    /// `NoMedium`, `OutOfRange`, what the medium failed with if [`super::ErrorPolicies`] reports it, `Cancelled` if the graph was
    /// shut down while the request waited for its turn. The same for every request here.
    pub async fn read(&self, offset: u64, iov: IoVec) -> Result<()> {
        if let Some(result) = self.try_read(offset, &iov) {
            return result;
        }
        self.carry(Request { offset, work: Work::Read(iov) }).await.map(drop)
    }

    /// Copies what the node shows of `offset..` but does not hold itself from below into it; nothing is given back. Needs a writable
    /// backend, though what is read does not change.
    pub async fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        self.carry(Request { offset, work: Work::CopyUp(len) }).await.map(drop)
    }

    /// Writes `iov` at `offset`.
    pub async fn write(&self, offset: u64, iov: IoVec, mut flags: WriteFlags) -> Result<()> {
        if flags.is_empty()
            && let Some(result) = self.try_write(offset, &iov)
        {
            return result;
        }
        flags.set(WriteFlags::FUA, flags.contains(WriteFlags::FUA) || self.is_writethrough());
        self.carry(Request { offset, work: Work::Write(iov, flags) }).await.map(drop)
    }

    /// Writes one compressed cluster (or the image's tail); an empty `iov` at the end pads the file.
    pub async fn write_compressed(&self, offset: u64, iov: IoVec) -> Result<()> {
        self.carry(Request { offset, work: Work::Compressed(iov) }).await.map(drop)
    }

    /// Makes the range read as zeros. `Unsupported` only with `NO_FALLBACK`.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mut flags: ZeroFlags,
    ) -> Result<Attempt> {
        flags.set(ZeroFlags::FUA, flags.contains(ZeroFlags::FUA) || self.is_writethrough());
        self.carry(Request { offset, work: Work::Zero(len, flags) }).await
    }

    /// Tells that the range is no longer needed; advisory, and ignored unless the node was opened with `discard=unmap`.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.carry(Request { offset, work: Work::Discard(len) }).await.map(drop)
    }

    /// Makes every write durable that ended before.
    pub async fn flush(&self) -> Result<()> {
        self.carry(Request { offset: 0, work: Work::Flush }).await.map(drop)
    }

    /// Lets the host copy `len` bytes from `source` at `source_offset` to `offset` here. `Unsupported`: use buffers; part of the
    /// bytes may have been copied. A failure is always reported: what it means is decided when the bytes go through buffers.
    pub async fn copy_range_from(
        &self,
        source: &Backend,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<Attempt> {
        let pending = self.inner.stats.begin(Operation::Write, len);
        source.inner.check_end_now(source_offset, len)?;
        self.inner.check_end_now(offset, len)?;
        let (from, to) = (&source.inner.edge, &self.inner.edge);
        let copied = pending.end(offload::copy(from, source_offset, to, offset, len).await)?;
        if copied == Attempt::Done && self.is_writethrough() {
            self.flush().await?;
        }
        Ok(copied)
    }

    /// Changes the length.
    ///
    /// # Errors
    /// Also `InUse`: somebody blocks [`crate::graph::Operations::RESIZE`] on the medium.
    pub async fn truncate(&self, change: Truncate) -> Result<()> {
        truncate::truncate_for_user(&self.inner.edge, change).await
    }

    /// What `offset..` holds at the top layer alone. The run's `map` names a child of that layer.
    pub async fn layer_status(&self, offset: u64, len: u64, precise: bool) -> Result<StatusRun> {
        status::of_layer(&self.inner.edge, offset, len, precise).await
    }

    /// What `offset..` holds, through the whole chain.
    pub async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<ChainRun> {
        status::of_chain(&self.inner.edge, Depth::All, offset, len, precise).await
    }

    /// What `offset..` holds in the layers above `base`, which is in the chain. Without `ALLOCATED`: none of them decides it.
    pub async fn status_above(
        &self,
        base: NodeId,
        offset: u64,
        len: u64,
        precise: bool,
    ) -> Result<ChainRun> {
        status::of_chain(&self.inner.edge, Depth::Above(base), offset, len, precise).await
    }

    /// Does the range read as zeros? A cheap answer: false if unknown.
    pub async fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        status::is_zero(&self.inner.edge, offset, len).await
    }

    /// Facts about the image.
    pub async fn info(&self) -> Result<ImageInfo> {
        let node = enter(&self.inner.edge).await?;
        named(&node, node.driver().info().await)
    }

    /// Bytes the node occupies on its host, where that is known.
    pub async fn allocated_len(&self) -> Result<Option<u64>> {
        let node = enter(&self.inner.edge).await?;
        named(&node, node.driver().allocated_len().await)
    }

    /// Looks for leaks and corruption; changes nothing. `progress` gets (done, total) bytes of metadata.
    pub async fn check(&self, progress: &(dyn Fn(u64, u64) + Send + Sync)) -> Result<CheckReport> {
        let node = enter(&self.inner.edge).await?;
        named(&node, node.driver().check(progress).await)
    }

    /// Reads into `out`, through a copy. Blocks this thread.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let iov = Buf::zeroed(out.len(), 4096).iov();
        bds_io::block_on(self.read(offset, iov.clone()))?;
        iov.copy_to(0, out);
        Ok(())
    }

    /// Writes `bytes`, through a copy. Blocks this thread.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        bds_io::block_on(self.write(offset, Buf::from_slice(bytes).iov(), WriteFlags::empty()))
    }

    /// Makes every write durable that ended before. Blocks this thread.
    pub fn flush_blocking(&self) -> Result<()> {
        bds_io::block_on(self.flush())
    }
}

impl Inner {
    fn check_end_now(&self, offset: u64, len: u64) -> Result<()> {
        match self.edge.medium() {
            Some(node) => check_end(&node, offset, len),
            // The request itself finds that there is no medium.
            None => Ok(()),
        }
    }
}

/// Users of a node stay inside it: only parents inside the graph may read or write past the end.
pub(super) fn check_end(node: &Node, offset: u64, len: u64) -> Result<()> {
    let reach = node.len();
    let end = range::check(offset, len)?;
    if end > reach {
        let message = format!("the request ends past the end of the node ({reach} bytes)");
        return Err(range::out_of_range(offset, len, &message));
    }
    Ok(())
}

/// The flags of a read through a backend: all of it is wanted.
pub(super) const READ: ReadFlags = ReadFlags::empty();

/// Was the request refused because it made no sense?
pub(super) fn is_invalid(error: &Error) -> bool {
    use crate::error::ErrorKind::{InvalidInput, OutOfRange};
    matches!(error.kind(), InvalidInput | OutOfRange)
}
