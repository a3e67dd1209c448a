//! The source of a commit's copy: what `top` shows, and zeros behind its end.
//!
//! The base may be longer than `top`. An overlay that is longer too shows zeros there, because
//! `top` ends; in the end it is backed by the base, which therefore has to hold zeros there.

use bds_core::Result;
use bds_core::copy::{CopyRead, Found, FoundRun};
use bds_core::driver::BoxFuture;
use bds_core::graph::NodeId;
use bds_core::request::Backend;
use bds_io::IoVec;

use crate::chain::last_run::LastRun;

/// What is to be in the base.
pub(super) struct Shown(pub(super) Backend, pub(super) LastRun);

impl CopyRead for Shown {
    fn node_name(&self) -> String {
        CopyRead::node_name(&self.0)
    }

    fn read(&self, offset: u64, iov: IoVec) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let held = self.0.len().saturating_sub(offset).min(iov.len() as u64);
            let held = usize::try_from(held).expect("at most the buffer");
            if held > 0 {
                self.0.read(offset, iov.slice(0..held)).await?;
            }
            iov.fill(held..iov.len(), 0);
            Ok(())
        })
    }

    fn found(
        &self,
        offset: u64,
        len: u64,
        above: Option<NodeId>,
    ) -> BoxFuture<'_, Result<FoundRun>> {
        Box::pin(async move {
            let end = self.0.len();
            if offset >= end {
                return Ok(FoundRun { len, found: Found::Zero });
            }
            // No one writes to the images that are committed.
            if let Some(run) = self.1.at(offset, len) {
                return Ok(run);
            }
            let run = CopyRead::found(&self.0, offset, len.min(end - offset), above).await?;
            self.1.keep(offset, run);
            Ok(run)
        })
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}
