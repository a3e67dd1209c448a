//! The two sides of a stream's copy, and its error policy.
//!
//! Reading a range through the copy *is* the copy: the request path of `top` writes what it finds
//! below into the image and excludes guest requests meanwhile. So there is nothing left to write.

use std::sync::{Mutex, PoisonError};

use bds_core::copy::{
    CopyControl, CopyRead, CopyWrite, ErrorSite, ErrorVerdict, Found, FoundRun, Side,
};
use bds_core::driver::{Attempt, BoxFuture, Precision, StatusFlags, WriteFlags, ZeroFlags};
use bds_core::graph::{NodeId, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, Result};
use bds_io::IoVec;

use crate::beside_users::BesideUsers;
use crate::chain::last_run::LastRun;
use crate::chain::nodes::node_below;

/// Bytes that one request copies at most.
pub(super) const CHUNK: u64 = 1 << 20;

/// `top` as source and target.
pub(super) struct CopyUp {
    pub(super) top: Backend,
    pub(super) bottom: NodeRef,
    /// Data only: copying up what was copied or written meanwhile does nothing.
    pub(super) last: LastRun,
}

impl CopyUp {
    /// What is to be copied at `offset`. Zeros are copied as zeros, unless nothing lies below the
    /// images that are cut out: then the range reads as zeros anyway.
    async fn look(&self, offset: u64, len: u64) -> Result<FoundRun> {
        if let Some(run) = self.last.at(offset, len) {
            return Ok(run);
        }
        // Another job may have exchanged what lies below. Status that goes too deep copies too
        // much, which does no harm.
        let base = node_below(&self.bottom);
        let run = match &base {
            Some(base) => self.top.status_above(base.id(), offset, len, Precision::Exact).await?,
            None => self.top.block_status(offset, len, Precision::Exact).await?,
        };
        let is_zero = run.flags.contains(StatusFlags::ZERO);
        let is_needed = run.flags.contains(StatusFlags::ALLOCATED)
            && run.depth > 0
            && !(is_zero && base.is_none());
        let found = match (is_needed, is_zero) {
            (false, _) => Found::Unallocated,
            (true, true) => Found::Zero,
            (true, false) => Found::Data,
        };
        let run = FoundRun { len: run.len, found };
        if found == Found::Data {
            self.last.keep(offset, run);
        }
        Ok(run)
    }
}

impl CopyRead for CopyUp {
    fn node_name(&self) -> String {
        CopyRead::node_name(&self.top)
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.top.copy_up_in(offset, iov))
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        _above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(self.look(offset, len))
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

impl CopyWrite for CopyUp {
    fn node_name(&self) -> String {
        CopyRead::node_name(&self.top)
    }

    fn write(&self, _offset: u64, _iov: IoVec, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write_compressed(&self, _offset: u64, _iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        _flags: ZeroFlags,
    ) -> BoxFuture<'_, Result<Attempt>> {
        Box::pin(async move {
            let end = offset + len;
            for at in (offset..end).step_by(usize::try_from(CHUNK).expect("1 MiB")) {
                self.top.copy_up(at, CHUNK.min(end - at)).await?;
            }
            Ok(Attempt::Done)
        })
    }
}

/// The job's control, which notes the first error that was skipped.
pub(super) struct SkipErrors<'a> {
    control: BesideUsers<'a>,
    first: Mutex<Option<Error>>,
}

impl<'a> SkipErrors<'a> {
    pub(super) fn new(control: BesideUsers<'a>) -> Self {
        Self { control, first: Mutex::default() }
    }

    pub(super) fn into_first(self) -> Option<Error> {
        self.first.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CopyControl for SkipErrors<'_> {
    fn should_pause(&self) -> bool {
        self.control.should_pause()
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        self.control.pause_requested()
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        self.control.pause_point()
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        self.control.throttle(bytes)
    }

    fn is_disk_in_use(&self) -> bool {
        self.control.is_disk_in_use()
    }

    fn copied(&self, bytes: u64) {
        self.control.copied(bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        Box::pin(async move {
            let verdict = self.control.on_error(side, site, error).await;
            if verdict == ErrorVerdict::Skip {
                let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| error.duplicate());
            }
            verdict
        })
    }
}
