//! `CopyControl` of a job: pauses, speed, progress and error policy of the copy engine are the
//! job's.

use bds_core::Error;
use bds_core::copy::{self, CopyControl};
use bds_core::driver::BoxFuture;

use crate::context::JobContext;
use crate::policy::{ErrorSite, ErrorVerdict, Side};

impl CopyControl for JobContext {
    fn should_pause(&self) -> bool {
        Self::should_pause(self)
    }

    fn pause_requested(&self) -> BoxFuture<'_, ()> {
        let job = &self.0;
        Box::pin(job.changed.wait_until(|| job.should_pause()))
    }

    fn pause_point(&self) -> BoxFuture<'_, ()> {
        Box::pin(Self::pause_point(self))
    }

    fn throttle(&self, bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(Self::throttle(self, bytes))
    }

    fn copied(&self, bytes: u64) {
        self.progress().advance(bytes);
    }

    fn on_error<'a>(
        &'a self,
        side: copy::Side,
        site: copy::ErrorSite,
        error: &'a Error,
    ) -> BoxFuture<'a, copy::ErrorVerdict> {
        let side = match side {
            copy::Side::Source => Side::Source,
            copy::Side::Target => Side::Target,
        };
        let site = ErrorSite { offset: site.offset, len: site.len, node: site.node };
        Box::pin(async move {
            match Self::on_error(self, side, site, error).await {
                ErrorVerdict::Retry => copy::ErrorVerdict::Retry,
                ErrorVerdict::Skip => copy::ErrorVerdict::Skip,
                ErrorVerdict::Fail => copy::ErrorVerdict::Fail,
            }
        })
    }
}
