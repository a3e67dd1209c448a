//! The `compress` filter: stores what is written through this node as compressed clusters.
//!
//! The option is QEMU's `file`. The request alignment of the node is the cluster size (bytes) of
//! the image below, so the request path completes smaller writes by read-modify-write; each then
//! goes down as compressed clusters. Zero writes and discards pass through. Data that does not get
//! smaller is stored uncompressed, by the format. If the image below is replaced, its cluster size
//! counts from then on; above one without compressed clusters, writes are stored as they are.
//!
//! Errors: `NotSupported` at open if the image below has no compressed clusters; `OutOfRange` for
//! data past the end of the node.
//!
//! A write that was started runs to completion even if its future is dropped: compression takes a
//! while, and it includes the bytes around. Later requests to the same clusters wait for such a
//! detached write, so that old bytes never land on newer ones.

use std::any::Any;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bds_core::driver::{
    Attempt, BoxFuture, Child, Driver, Limits, OpenContext, Reopen, ReopenContext, Role, Truncate,
    WriteFlags, ZeroFlags,
};
use bds_core::options::{OptionKind, OptionSpec};
use bds_core::{Error, ErrorKind, Result};
use bds_io::sync::Notify;
use bds_io::{IoVec, Task};

use super::pass_through::{filter_type, pass_on};

/// The `compress` filter.
#[derive(Clone, Copy, Debug)]
pub struct Compress;

const OPEN_OPTIONS: &[OptionSpec] = &[OptionSpec {
    name: "file",
    kind: OptionKind::Child,
    help: "the image to write compressed clusters to",
    default: None,
}];

struct CompressNode {
    file: Arc<Child>,
    detached: Arc<DetachedWrites>,
}

/// Ranges of writes whose futures were dropped and that still run.
#[derive(Default)]
struct DetachedWrites {
    ranges: Mutex<Vec<Range<u64>>>,
    ended: Notify,
}

impl DetachedWrites {
    fn ranges(&self) -> MutexGuard<'_, Vec<Range<u64>>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no detached write overlaps the range.
    async fn wait(&self, range: &Range<u64>) {
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        self.ended.wait_until(|| !self.ranges().iter().any(overlaps)).await;
    }
}

/// Writes whole clusters; the last one may end with the node.
async fn write_whole(file: &Child, offset: u64, mut iov: IoVec) -> Result<()> {
    if file.compressed_unit().is_none() {
        return file.write(offset, iov, WriteFlags::empty()).await;
    }
    let end = offset + iov.len() as u64;
    let reach = file.len();
    if end > reach && offset < reach {
        // The request path completed the last cluster; the node ends inside it.
        let inside_len = usize::try_from(reach - offset).expect("shorter than the request");
        let rest = iov.split_off(inside_len);
        if !rest.is_zero(0..rest.len()) {
            let words = "compressed clusters cannot be written past the end of the node";
            return Err(Error::new(ErrorKind::OutOfRange, words).at(reach));
        }
    }
    file.write_compressed(offset, iov).await
}

/// A write in a task of its own. Dropped before completion, it is detached.
struct WriteTask {
    detached: Arc<DetachedWrites>,
    range: Range<u64>,
    task: Option<Task<Result<()>>>,
}

impl Future for WriteTask {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let Some(task) = &mut self.task else { return Poll::Ready(Ok(())) };
        let result = std::task::ready!(Pin::new(task).poll(cx));
        self.task = None;
        Poll::Ready(result)
    }
}

impl Drop for WriteTask {
    fn drop(&mut self) {
        let Some(task) = self.task.take() else { return };
        // Without the child: once the write has completed, nothing here may keep the child open.
        let (detached, range) = (Arc::clone(&self.detached), self.range.clone());
        detached.ranges().push(range.clone());
        bds_io::spawn(async move {
            if let Err(error) = task.await {
                tracing::debug!(%error, "a detached compressed write failed");
            }
            let mut ranges = detached.ranges();
            if let Some(place) = ranges.iter().position(|other| *other == range) {
                ranges.swap_remove(place);
            }
            drop(ranges);
            detached.ended.notify_waiters();
        })
        .detach();
    }
}

impl CompressNode {
    async fn write_in_task(&self, offset: u64, iov: IoVec) -> Result<()> {
        let range = offset..offset + iov.len() as u64;
        self.detached.wait(&range).await;
        let file = Arc::clone(&self.file);
        let task = bds_io::spawn(async move { write_whole(&file, offset, iov).await });
        WriteTask { detached: Arc::clone(&self.detached), range, task: Some(task) }.await
    }
}

impl Driver for CompressNode {
    fn name(&self) -> &'static str {
        "compress"
    }

    pass_on!(self.file => len, is_filter, zero_flags, try_read, read, block_status, allocated_len);

    fn limits(&self) -> Limits {
        // Not cached: the child may now be an image with another cluster size.
        let unit = self.file.compressed_unit().unwrap_or(1);
        Limits { request_alignment: unit, ..self.file.limits() }
    }

    fn write(&self, offset: u64, iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_in_task(offset, iov))
    }

    fn compressed_unit(&self) -> Option<u32> {
        self.file.compressed_unit()
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.write_in_task(offset, iov))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.detached.wait(&(offset..offset + len)).await;
            // The request path may have rounded up to the end of the last cluster, behind the end
            // of the node.
            let reach = self.file.len();
            let len = if offset < reach { len.min(reach - offset) } else { len };
            self.file.write_zeroes(offset, len, flags).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            self.detached.wait(&(offset..offset + len)).await;
            self.file.discard(offset, len).await?;
            Ok(Attempt::Done)
        })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.detached.wait(&(0..u64::MAX)).await;
            self.file.truncate(change).await
        })
    }

    fn inactivate(&self) -> BoxFuture<'_, Result<()>> {
        self.close()
    }

    /// Accepts any mode, once detached writes have completed.
    fn prepare_reopen<'n, 'c>(
        &'n self,
        _context: &'c mut ReopenContext<'_>,
    ) -> BoxFuture<'c, Result<Box<dyn Reopen + 'n>>>
    where
        'n: 'c,
    {
        Box::pin(async {
            self.detached.wait(&(0..u64::MAX)).await;
            Ok(Box::new(()) as Box<dyn Reopen>)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.detached.wait(&(0..u64::MAX)).await;
            Ok(())
        })
    }
}

filter_type!(Compress, "compress", "writes become compressed clusters of the image below");

impl Compress {
    async fn open_node(&self, context: &mut OpenContext<'_>) -> Result<CompressNode> {
        let file = context.child("file", Role::FILTERED | Role::PRIMARY).await?;
        if file.compressed_unit().is_none() {
            let words = format!(
                "'file' is node '{}' ({}), which has no compressed clusters; the compress filter \
                 stands above an image that has them, like qcow2 without a data file",
                file.node_name(),
                file.driver_name()
            );
            return Err(Error::new(ErrorKind::NotSupported, words));
        }
        let detached = Arc::default();
        Ok(CompressNode { file: Arc::new(file), detached })
    }
}
