//! `CopyRead` and `CopyWrite`: the two sides of a copy, implemented for backends and for children.
//!
//! Methods return futures that may be dropped: a write that its driver has begun runs to completion
//! nevertheless, and its node orders later writes that overlap it behind it.

use bds_io::IoVec;

use crate::driver::{
    Attempt, BoxFuture, Child, Precision, ReadFlags, StatusFlags, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::NodeId;
use crate::request::Backend;

/// What a run of the source holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Bytes, as far as is known.
    Data,
    /// Zeros.
    Zero,
    /// Nothing in the layers in question.
    Unallocated,
}

/// A run of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundRun {
    /// Length in bytes; not zero.
    pub len: u64,
    /// What it holds.
    pub found: Found,
}

/// The source of a copy.
pub trait CopyRead: Send + Sync {
    /// Name of its top node, for errors.
    fn node_name(&self) -> String;

    /// Fills `iov` from `offset`.
    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>>;

    /// What the run at `offset` holds, of at most `len` bytes. With `above`: only the layers above
    /// this one decide, the rest is [`Found::Unallocated`].
    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>>;

    /// Discards what was copied. Advisory.
    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>>;

    /// The backend, if it is one: for copies by the host.
    fn as_backend(&self) -> Option<&Backend> {
        None
    }
}

/// The target of a copy.
pub trait CopyWrite: Send + Sync {
    /// Name of its top node, for errors.
    fn node_name(&self) -> String;

    /// Writes `iov` at `offset`.
    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Writes one compressed cluster, or the tail of the image; an empty list at the end pads the
    /// file.
    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>>;

    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>>;

    /// Fills `iov` with what it holds from `offset` on, for an observer.
    fn read_back(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        let words = "the target of this copy cannot be read";
        Box::pin(async move { Err(Error::new(ErrorKind::NotSupported, words)) })
    }

    /// Copies `len` bytes from the same offset of the source without reading them here.
    /// `Unsupported`: they are read and written instead (part of them may have been copied).
    fn copy_from<'a>(
        &'a self,
        _source: &'a dyn CopyRead,
        _offset: u64,
        _len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async { Ok(Attempt::Unsupported) })
    }
}

fn run_of(len: u64, flags: StatusFlags, has_base: bool) -> FoundRun {
    let found = if has_base && !flags.contains(StatusFlags::ALLOCATED) {
        Found::Unallocated
    } else if flags.contains(StatusFlags::ZERO) {
        Found::Zero
    } else {
        Found::Data
    };
    FoundRun { len, found }
}

impl CopyRead for Backend {
    fn node_name(&self) -> String {
        self.node().map(|node| node.name().to_owned()).unwrap_or_default()
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::read(self, offset, iov))
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(async move {
            let run = match above {
                Some(base) => self.status_above(base, offset, len, Precision::Exact).await?,
                None => self.block_status(offset, len, Precision::Exact).await?,
            };
            Ok(run_of(run.len, run.flags, above.is_some()))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::discard(self, offset, len))
    }

    fn as_backend(&self) -> Option<&Backend> {
        Some(self)
    }
}

impl CopyWrite for Backend {
    fn node_name(&self) -> String {
        <Self as CopyRead>::node_name(self)
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::write(self, offset, iov, flags))
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::write_compressed(self, offset, iov))
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(Self::write_zeroes(self, offset, len, flags))
    }

    fn read_back(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(Self::read(self, offset, iov))
    }

    fn copy_from<'a>(
        &'a self,
        source: &'a dyn CopyRead,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'a, Result<Attempt>> {
        Box::pin(async move {
            match source.as_backend() {
                Some(source) => self.copy_range_from(source, offset, offset, len).await,
                None => Ok(Attempt::Unsupported),
            }
        })
    }
}

/// Whatever `above` names, a child answers for its own layer alone.
impl CopyRead for Child {
    fn node_name(&self) -> String {
        (**self).node_name()
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        (**self).read(offset, iov, ReadFlags::empty())
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(async move {
            let run = self.block_status(offset, len, Precision::Cheap).await?;
            Ok(run_of(run.len, run.flags, above.is_some()))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        (**self).discard(offset, len)
    }
}

impl CopyWrite for Child {
    fn node_name(&self) -> String {
        (**self).node_name()
    }

    fn write(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        (**self).write(offset, iov, flags)
    }

    fn write_compressed(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        (**self).write_compressed(offset, iov)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        (**self).write_zeroes(offset, len, flags)
    }

    fn read_back(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        (**self).read(offset, iov, ReadFlags::empty())
    }
}
