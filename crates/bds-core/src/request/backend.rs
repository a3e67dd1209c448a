//! The hall: where a device, a job, an export or a tool enters the graph.
//!
//! A backend owns its node through an edge, refuses requests past the end, counts what passes, and adds a flush to
//! every write if the user wants none of them to be volatile. Many threads may use one at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_io::{Buf, IoVec};
use bds_refcount::HolderKind;

use super::enter::{enter, named};
use super::status::{self, ChainRun, Depth};
use super::{copy_on_read, dispatch, flush, offload, range, truncate, zero};
use crate::driver::{
    Attempt, CheckReport, ImageInfo, ReadFlags, StatusRun, Truncate, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Access, Edge, Graph, NodeId, NodeRef, Perm, Root};
use crate::stats::{Operation, Stats};

/// How a backend is made.
#[derive(Clone, Debug, Default)]
pub struct BackendOptions {
    /// Who uses the node, for "in use" messages.
    pub name: String,
    /// May it write and resize? Fails on a read-only node.
    pub writable: bool,
}

/// A user's way into a node. Dropping it gives up its reference to the node; flush first.
#[derive(Debug)]
pub struct Backend {
    edge: Arc<Edge>,
    graph: Graph,
    stats: Stats,
    is_writethrough: AtomicBool,
}

impl Backend {
    /// Enters at `node`. Durable writes are chosen by the node's `cache.writeback`.
    #[track_caller]
    pub fn new(node: &NodeRef, options: BackendOptions) -> Result<Backend> {
        let mut perm = Perm::CONSISTENT_READ;
        if options.writable {
            if !node.is_writable() {
                let message = "the node is read-only; open it for writing";
                return Err(Error::new(ErrorKind::ReadOnly, message).node(node.name()));
            }
            perm |= Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE;
        }
        let access = Access { perm, shared: Perm::all() };
        let root = Root { kind: HolderKind::Backend, name: &options.name, access, stays: false };
        let graph = node.graph().clone();
        Ok(Backend {
            edge: graph.attach_root(Some(node), &root)?,
            graph,
            stats: Stats::new(),
            is_writethrough: AtomicBool::new(!node.flags().cache.writeback),
        })
    }

    /// Length in bytes now.
    pub fn len(&self) -> u64 {
        self.edge.target().len()
    }

    /// True if there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A reference to the node now.
    #[track_caller]
    pub fn node(&self) -> NodeRef {
        NodeRef::user(&self.graph, self.edge.target().strong().clone())
    }

    /// What passed so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Is every write followed by a flush?
    pub fn is_writethrough(&self) -> bool {
        self.is_writethrough.load(Ordering::Relaxed)
    }

    /// Turns the flush after every write on or off, for writes that begin later.
    pub fn set_writethrough(&self, is_on: bool) {
        self.is_writethrough.store(is_on, Ordering::Relaxed);
    }

    /// Reads at once if nothing has to be waited for, without allocating. `None`: ask [`Backend::read`]; the buffer may
    /// be partly filled.
    #[inline]
    pub fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        let result = dispatch::try_read(&self.edge, offset, iov)?;
        self.stats.ended(Operation::Read, iov.len() as u64, result.is_ok());
        Some(result)
    }

    /// Writes in place at once if nothing has to be waited for, without allocating. `None`: nothing was changed, ask
    /// [`Backend::write`].
    #[inline]
    pub fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        if self.is_writethrough() {
            return None;
        }
        let result = dispatch::try_write(&self.edge, offset, iov)?;
        self.stats.ended(Operation::Write, iov.len() as u64, result.is_ok());
        Some(result)
    }

    /// Fills `iov` from `offset`.
    pub async fn read(&self, offset: u64, iov: IoVec) -> Result<()> {
        if let Some(result) = self.try_read(offset, &iov) {
            return result;
        }
        let len = iov.len() as u64;
        let pending = self.stats.begin(Operation::Read, len);
        self.check_end(offset, len)?;
        let result = dispatch::read(&self.edge, offset, iov, ReadFlags::empty()).await;
        pending.end(result)
    }

    /// Copies what the node shows of `offset..` but does not hold itself from below into it; nothing is given back. Needs a writable
    /// backend, though what is read does not change.
    pub async fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        let pending = self.stats.begin(Operation::Read, len);
        self.check_end(offset, len)?;
        pending.end(copy_on_read::copy_up(&self.edge, offset, len).await)
    }

    /// Writes `iov` at `offset`.
    pub async fn write(&self, offset: u64, iov: IoVec, mut flags: WriteFlags) -> Result<()> {
        if flags.is_empty()
            && let Some(result) = self.try_write(offset, &iov)
        {
            return result;
        }
        let len = iov.len() as u64;
        let pending = self.stats.begin(Operation::Write, len);
        self.check_end(offset, len)?;
        flags.set(WriteFlags::FUA, flags.contains(WriteFlags::FUA) || self.is_writethrough());
        pending.end(dispatch::write(&self.edge, offset, iov, flags).await)
    }

    /// Writes one compressed cluster (or the image's tail); an empty `iov` at the end pads the file.
    pub async fn write_compressed(&self, offset: u64, iov: IoVec) -> Result<()> {
        let len = iov.len() as u64;
        let pending = self.stats.begin(Operation::Write, len);
        self.check_end(offset, len)?;
        pending.end(dispatch::write_compressed(&self.edge, offset, iov).await)
    }

    /// Makes the range read as zeros. `Unsupported` only with `NO_FALLBACK`.
    pub async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        mut flags: ZeroFlags,
    ) -> Result<Attempt> {
        let pending = self.stats.begin(Operation::Zero, len);
        self.check_end(offset, len)?;
        flags.set(ZeroFlags::FUA, flags.contains(ZeroFlags::FUA) || self.is_writethrough());
        pending.end(zero::write_zeroes(&self.edge, offset, len, flags).await)
    }

    /// Tells that the range is no longer needed; advisory, and ignored unless the node was opened with `discard=unmap`.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let pending = self.stats.begin(Operation::Discard, len);
        self.check_end(offset, len)?;
        pending.end(zero::discard(&self.edge, offset, len).await)
    }

    /// Lets the host copy `len` bytes from `source` at `source_offset` to `offset` here. `Unsupported`: use buffers; part of the
    /// bytes may have been copied.
    pub async fn copy_range_from(
        &self,
        source: &Backend,
        source_offset: u64,
        offset: u64,
        len: u64,
    ) -> Result<Attempt> {
        let pending = self.stats.begin(Operation::Write, len);
        source.check_end(source_offset, len)?;
        self.check_end(offset, len)?;
        let copied = offload::copy(&source.edge, source_offset, &self.edge, offset, len).await;
        let copied = pending.end(copied)?;
        if copied == Attempt::Done && self.is_writethrough() {
            self.flush().await?;
        }
        Ok(copied)
    }

    /// Makes every write durable that ended before.
    pub async fn flush(&self) -> Result<()> {
        let pending = self.stats.begin(Operation::Flush, 0);
        pending.end(flush::flush(&self.edge).await)
    }

    /// Changes the length.
    pub async fn truncate(&self, change: Truncate) -> Result<()> {
        truncate::truncate(&self.edge, change).await
    }

    /// What `offset..` holds at the top layer alone. The run's `map` names a child of that layer.
    pub async fn layer_status(&self, offset: u64, len: u64, precise: bool) -> Result<StatusRun> {
        status::of_layer(&self.edge, offset, len, precise).await
    }

    /// What `offset..` holds, through the whole chain.
    pub async fn block_status(&self, offset: u64, len: u64, precise: bool) -> Result<ChainRun> {
        status::of_chain(&self.edge, Depth::All, offset, len, precise).await
    }

    /// What `offset..` holds in the layers above `base`, which is in the chain. Without `ALLOCATED`: none of them decides it.
    pub async fn status_above(
        &self,
        base: NodeId,
        offset: u64,
        len: u64,
        precise: bool,
    ) -> Result<ChainRun> {
        status::of_chain(&self.edge, Depth::Above(base), offset, len, precise).await
    }

    /// Does the range read as zeros? A cheap answer: false if unknown.
    pub async fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        status::is_zero(&self.edge, offset, len).await
    }

    /// Facts about the image.
    pub async fn info(&self) -> Result<ImageInfo> {
        let node = enter(&self.edge).await?;
        named(&node, node.driver().info().await)
    }

    /// Bytes the node occupies on its host, where that is known.
    pub async fn allocated_len(&self) -> Result<Option<u64>> {
        let node = enter(&self.edge).await?;
        named(&node, node.driver().allocated_len().await)
    }

    /// Looks for leaks and corruption; changes nothing. `progress` gets (done, total) bytes of metadata.
    pub async fn check(&self, progress: &(dyn Fn(u64, u64) + Send + Sync)) -> Result<CheckReport> {
        let node = enter(&self.edge).await?;
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

    /// Users of a node stay inside it: only parents inside the graph may read or write past the end.
    fn check_end(&self, offset: u64, len: u64) -> Result<()> {
        let target = self.edge.target();
        let reach = target.len();
        let end = range::check(offset, len).map_err(|e| e.node(target.name()))?;
        if end > reach {
            let message = format!("the request ends past the end of the node ({reach} bytes)");
            return Err(range::out_of_range(offset, len, &message).node(target.name()));
        }
        Ok(())
    }
}
