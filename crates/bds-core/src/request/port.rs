//! Implements [`ChildPort`]: a driver's requests to the node below take the request path.

use std::path::PathBuf;
use std::sync::Arc;

use bds_io::IoVec;

use super::admit::{enter, named};
use super::{dispatch, flush, status, truncate, zero};
use crate::bitmap::HBitmap;
use crate::driver::{
    Attempt, BoxFuture, ChildPort, ImageInfo, Limits, Precision, ReadFlags, StatusRun, Truncate,
    WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::graph::{Edge, walk};

/// Makes the port of an edge.
pub(super) fn make(edge: Arc<Edge>) -> Box<dyn ChildPort> {
    Box::new(Port(edge))
}

struct Port(Arc<Edge>);

impl ChildPort for Port {
    fn len(&self) -> u64 {
        self.0.target().len()
    }

    fn limits(&self) -> Limits {
        self.0.target().limits()
    }

    fn node_name(&self) -> String {
        self.0.target().name().to_owned()
    }

    fn filename(&self) -> Option<PathBuf> {
        walk::filename(&self.0.target())
    }

    fn driver_name(&self) -> &'static str {
        self.0.target().driver_name()
    }

    fn is_writable(&self) -> bool {
        self.0.holds_bytes() && self.0.target().is_writable()
    }

    fn can_zero(&self) -> bool {
        self.0.target().driver().zero_flags().is_some()
    }

    #[inline]
    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        dispatch::try_read(&self.0, offset, iov, |result| result)
    }

    #[inline]
    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>> {
        dispatch::try_write(&self.0, offset, iov, |result| result)
    }

    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(dispatch::read(&self.0, offset, iov, flags))
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(dispatch::write(&self.0, offset, iov, flags))
    }

    fn compressed_unit(&self) -> Option<u32> {
        self.0.target().driver().compressed_unit()
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(dispatch::write_compressed(&self.0, offset, iov))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(zero::write_zeroes(&self.0, offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(zero::discard(&self.0, offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        flush::flush(&self.0)
    }

    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(status::of_layer(&self.0, offset, len, precision))
    }

    fn is_zero(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<bool>> {
        Box::pin(status::is_zero(&self.0, offset, len))
    }

    fn status_down_to<'a>(
        &'a self,
        bottom: &'a str,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<StatusRun>> {
        Box::pin(status::down_to(&self.0, bottom, offset, len))
    }

    fn snapshot_read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let node = enter(&self.0).await?;
            named(&node, node.driver().snapshot_read(offset, iov).await)
        })
    }

    fn snapshot_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        Box::pin(async move {
            let node = enter(&self.0).await?;
            named(&node, node.driver().snapshot_status(offset, len, precision).await)
        })
    }

    fn snapshot_discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let node = enter(&self.0).await?;
            named(&node, node.driver().snapshot_discard(offset, len).await)
        })
    }

    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        truncate::truncate(&self.0, change)
    }

    fn copy_bitmap(&self, name: &str) -> Result<HBitmap> {
        let target = self.0.target();
        named(&target, target.copy_bitmap(name))
    }

    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async {
            let node = enter(&self.0).await?;
            named(&node, node.driver().info().await)
        })
    }

    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        Box::pin(async {
            let node = enter(&self.0).await?;
            named(&node, node.driver().allocated_len().await)
        })
    }

    fn identity(&self) -> Option<(u64, u64)> {
        walk::identity(&self.0.target())
    }
}
