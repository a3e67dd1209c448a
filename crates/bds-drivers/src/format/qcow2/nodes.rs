//! The child nodes of an image, each wrapped so that it takes offsets of its own address space only
//! (`layout/space.rs`).
//!
//! A number in one space means nothing in the other: a table freed in the image file and discarded
//! at the same offset of the data file would destroy guest data. So [`MetaNode`] takes only the one
//! type, [`DataNode`] only the other, and [`Space`](super::layout::space::Space) alone converts
//! between them, where that is possible. A data cluster cannot be discarded where metadata was:
//!
//! ```compile_fail,E0308
//! use bds_drivers::format::qcow2::fuzzing::{DataNode, MetaOffset};
//!
//! fn discard(data: DataNode<'_>, freed_table: MetaOffset) {
//!     let _ = data.discard(freed_table, 512);
//! }
//! ```
//!
//! nor a table where data was:
//!
//! ```compile_fail,E0308
//! use bds_drivers::format::qcow2::fuzzing::{DataOffset, MetaNode};
//!
//! fn discard(file: &MetaNode, freed_cluster: DataOffset) {
//!     let _ = file.discard(freed_cluster, 512);
//! }
//! ```
//!
//! while each in its own space compiles:
//!
//! ```
//! use bds_drivers::format::qcow2::fuzzing::{DataNode, DataOffset, MetaNode, MetaOffset};
//!
//! fn discard(
//!     file: &MetaNode,
//!     freed_table: MetaOffset,
//!     data: DataNode<'_>,
//!     freed_cluster: DataOffset,
//! ) {
//!     let _ = file.discard(freed_table, 512);
//!     let _ = data.discard(freed_cluster, 512);
//! }
//! ```

use std::path::PathBuf;

use bds_core::driver::{
    Attempt, BoxFuture, Child, ChildPort, ReadFlags, Truncate, WriteFlags, ZeroFlags,
};
use bds_core::error::Result;
use bds_io::IoVec;

use super::layout::space::{DataOffset, MetaOffset};

/// The node of the image file. Takes offsets of the image file only.
#[derive(Debug)]
pub struct MetaNode(Child);

impl MetaNode {
    /// Wraps the image's child "file".
    pub(crate) fn new(file: Child) -> Self {
        Self(file)
    }

    /// The node as a whole, for those that parse the file: open, check, info.
    pub(crate) fn port(&self) -> &dyn ChildPort {
        &*self.0
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn filename(&self) -> Option<PathBuf> {
        self.0.filename()
    }

    pub(crate) fn read(&self, at: MetaOffset, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        self.0.read(at.0, iov, ReadFlags::empty())
    }

    pub(crate) fn write(&self, at: MetaOffset, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        self.0.write(at.0, iov, WriteFlags::empty())
    }

    pub(crate) fn write_zeroes(&self, at: MetaOffset, len: u64) -> BoxFuture<'_, Result<Attempt>> {
        self.0.write_zeroes(at.0, len, ZeroFlags::empty())
    }

    /// Discards clusters of the image file on the host.
    pub fn discard(&self, at: MetaOffset, len: u64) -> BoxFuture<'_, Result<()>> {
        self.0.discard(at.0, len)
    }

    pub(crate) fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.0.flush()
    }

    pub(crate) fn truncate(&self, change: Truncate) -> BoxFuture<'_, Result<()>> {
        self.0.truncate(change)
    }

    pub(crate) fn allocated_len(&self) -> BoxFuture<'_, Result<Option<u64>>> {
        self.0.allocated_len()
    }
}

/// The node that holds data clusters: the image file, or its external data file. Takes offsets of
/// data only.
#[derive(Clone, Copy, Debug)]
pub struct DataNode<'a> {
    child: &'a Child,
}

impl<'a> DataNode<'a> {
    /// The external data file if there is one, else the image file.
    #[inline]
    pub(crate) fn of(file: &'a MetaNode, data_file: Option<&'a Child>) -> Self {
        Self { child: data_file.unwrap_or(&file.0) }
    }

    pub(crate) fn len(self) -> u64 {
        self.child.len()
    }

    pub(crate) fn filename(self) -> Option<PathBuf> {
        self.child.filename()
    }

    #[inline]
    pub(crate) fn try_read(self, at: DataOffset, iov: &IoVec) -> Option<Result<()>> {
        self.child.try_read(at.0, iov)
    }

    #[inline]
    pub(crate) fn try_write(self, at: DataOffset, iov: &IoVec) -> Option<Result<()>> {
        self.child.try_write(at.0, iov)
    }

    pub(crate) fn read(self, at: DataOffset, iov: IoVec) -> BoxFuture<'a, Result<()>> {
        self.child.read(at.0, iov, ReadFlags::empty())
    }

    pub(crate) fn write(self, at: DataOffset, iov: IoVec) -> BoxFuture<'a, Result<()>> {
        self.child.write(at.0, iov, WriteFlags::empty())
    }

    pub(crate) fn write_zeroes(
        self,
        at: DataOffset,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<Attempt>> {
        self.child.write_zeroes(at.0, len, flags)
    }

    /// Discards data clusters on the host.
    pub fn discard(self, at: DataOffset, len: u64) -> BoxFuture<'a, Result<()>> {
        self.child.discard(at.0, len)
    }

    pub(crate) fn is_zero(self, at: DataOffset, len: u64) -> BoxFuture<'a, Result<bool>> {
        self.child.is_zero(at.0, len)
    }

    pub(crate) fn allocated_len(self) -> BoxFuture<'a, Result<Option<u64>>> {
        self.child.allocated_len()
    }
}
