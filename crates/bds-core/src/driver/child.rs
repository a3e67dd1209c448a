//! Child handles: what a driver uses to read and write the nodes below it.

use std::path::PathBuf;

use bds_io::IoVec;

use super::{
    Attempt, BoxFuture, ImageInfo, Limits, Precision, ReadFlags, StatusRun, Truncate, WriteFlags,
    ZeroFlags,
};
use crate::bitmap::HBitmap;
use crate::error::{Error, ErrorKind, Result};

/// Implements a [`Child`]: the request path to the node below. Implemented in `request/`.
#[expect(clippy::len_without_is_empty, reason = "an empty disk is not a special case")]
pub trait ChildPort: Send + Sync + 'static {
    /// Length in bytes of the node below now.
    fn len(&self) -> u64;
    /// Its limits.
    fn limits(&self) -> Limits;
    /// Its name.
    fn node_name(&self) -> String;
    /// The file name of the protocol node below, reached through filters, if there is one.
    fn filename(&self) -> Option<PathBuf>;
    /// Its driver's name.
    fn driver_name(&self) -> &'static str;
    /// True if it may be written.
    fn is_writable(&self) -> bool;
    /// True if it has zero writes that do not write zeros.
    fn can_zero(&self) -> bool;
    /// See [`super::Driver::try_read`].
    fn try_read(&self, offset: u64, iov: &IoVec) -> Option<Result<()>>;
    /// See [`super::Driver::try_write`].
    fn try_write(&self, offset: u64, iov: &IoVec) -> Option<Result<()>>;
    /// Reads; past the end: zeros.
    fn read(&self, offset: u64, iov: IoVec, flags: ReadFlags) -> BoxFuture<'_, Result<()>>;
    /// Writes.
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;
    /// See [`super::Driver::compressed_unit`].
    fn compressed_unit(&self) -> Option<u32> {
        None
    }
    /// Writes a compressed cluster.
    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>>;
    /// Writes zeros; falls back to a buffer of zeros unless `NO_FALLBACK`.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>>;
    /// Discards; advisory.
    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>>;
    /// Makes all completed writes durable.
    fn flush(&self) -> BoxFuture<'_, Result<()>>;
    /// Status of this one layer.
    fn block_status(
        &self,
        offset: u64,
        len: u64,
        precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>>;
    /// True if `len` bytes at `offset` are known to read as zeros through the whole chain below (a
    /// cheap answer).
    fn is_zero(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<bool>>;
    /// Status of `offset..` in the layers from the node below down to the one named `bottom`, both
    /// included: a run that one of them decides (`ALLOCATED`) or none does; no `map`. `NotFound` if
    /// there is no such node in the chain.
    fn status_down_to<'a>(
        &'a self,
        bottom: &'a str,
        _offset: u64,
        _len: u64,
    ) -> BoxFuture<'a, Result<StatusRun>> {
        Box::pin(async move {
            let words = format!("there is no chain in which '{bottom}' could be");
            Err(Error::new(ErrorKind::NotFound, words))
        })
    }
    /// See [`super::Driver::snapshot_read`].
    fn snapshot_read(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        no_snapshot()
    }
    /// See [`super::Driver::snapshot_status`].
    fn snapshot_status(
        &self,
        _offset: u64,
        _len: u64,
        _precision: Precision,
    ) -> BoxFuture<'_, Result<StatusRun>> {
        no_snapshot()
    }
    /// See [`super::Driver::snapshot_discard`].
    fn snapshot_discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        no_snapshot()
    }
    /// Changes the length.
    fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>>;
    /// A copy of the dirty bits of a named bitmap of the node below. `NotFound` if it has none.
    fn copy_bitmap(&self, name: &str) -> Result<HBitmap> {
        let words = format!("Bitmap '{name}' could not be found");
        Err(Error::new(ErrorKind::NotFound, words))
    }
    /// Facts about the image below.
    fn info(&self) -> BoxFuture<'_, Result<ImageInfo>> {
        Box::pin(async { Ok(ImageInfo::default()) })
    }
    /// Bytes occupied on the host.
    fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>>;
    /// Identity of the file below for loop and same-file checks: (device, inode).
    fn identity(&self) -> Option<(u64, u64)>;
}

fn no_snapshot<T: Send + 'static>() -> BoxFuture<'static, Result<T>> {
    Box::pin(async { Err(Error::new(ErrorKind::NotSupported, "the child keeps no snapshot")) })
}

/// A driver's handle to a node below it. Not `Clone`: a second user needs a second edge.
pub struct Child {
    name: &'static str,
    port: Box<dyn ChildPort>,
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Child({} -> {})", self.name, self.port.node_name())
    }
}

impl Child {
    /// Made by the graph (or by tests) from a port.
    pub fn new(name: &'static str, port: Box<dyn ChildPort>) -> Self {
        Self { name, port }
    }

    /// The child's name in its parent ("file", "backing").
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl std::ops::Deref for Child {
    type Target = dyn ChildPort;
    fn deref(&self) -> &Self::Target {
        &*self.port
    }
}
