//! `BesideUsers`: a job's control of its copy, which gives way to the users of the disk.

use bds_core::Error;
use bds_core::copy::{CopyControl, DiskUse, ErrorSite, ErrorVerdict, Side};
use bds_core::driver::BoxFuture;
use bds_core::graph::NodeRef;

use crate::context::JobContext;

/// The job's context, and a node that users of the disk pass and the job's requests do not.
pub(crate) struct BesideUsers<'c> {
    ctx: &'c JobContext,
    disk: DiskUse,
}

impl<'c> BesideUsers<'c> {
    pub(crate) fn new(ctx: &'c JobContext, disk: &NodeRef) -> Self {
        Self { ctx, disk: DiskUse::new(disk.clone()) }
    }
}

impl CopyControl for BesideUsers<'_> {
    fn should_pause(&self) -> bool {
        CopyControl::should_pause(self.ctx)
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        CopyControl::pause_requested(self.ctx)
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        CopyControl::pause_point(self.ctx)
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        CopyControl::throttle(self.ctx, bytes)
    }

    fn is_disk_in_use(&self) -> bool {
        self.disk.is_used()
    }

    fn copied(&self, bytes: u64) {
        CopyControl::copied(self.ctx, bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: Side,
        site: ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, ErrorVerdict> {
        CopyControl::on_error(self.ctx, side, site, error)
    }
}
