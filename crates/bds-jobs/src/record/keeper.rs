//! Keeps a job's record up to date while the job runs, and tells its users about it.

use std::pin::pin;
use std::time::Duration;

use bds_core::copy::{ErrorSite, ErrorVerdict, Side};
use bds_core::request::Backend;
use bds_core::{Error, Result};
use futures_util::future::{Either, select};

use super::format::CHUNK_BITS;
use super::options::CheckTarget;
use super::tracker::{ContentTracker, Trust};
use crate::context::JobContext;
use crate::event::{JobEvent, RecordUse};

/// Chunks that the check by sample reads.
const SAMPLES: usize = 256;
/// Longest flush of the target after the job has failed.
const LAST_FLUSH: Duration = Duration::from_secs(5);

impl ContentTracker {
    /// Says what becomes of an earlier record, and checks the target by sample if that was chosen.
    /// Called before the first copy of the job's own.
    pub(crate) async fn begin(&self, ctx: &JobContext, target: &Backend) {
        let Some(record) = &self.0.record else { return };
        ctx.set_resumed(self.resumed_bytes());
        let (bytes, what) = match &record.ignored {
            Some(why) => (0, RecordUse::Ignored { why: why.clone() }),
            None if record.is_continued => (record.known_bytes, RecordUse::Continued),
            None => (0, RecordUse::Begun),
        };
        self.report(ctx, what, bytes);
        let must_check = record.header.lock().await.must_check;
        let wants_sample = record.options.check_target == CheckTarget::Sample;
        if wants_sample && !must_check && self.sample_is_right(target).await {
            self.0.state().trust = Trust::Trusted;
        }
    }

    /// Whether chunks spread over the target hold what the record says. An error of a read is left
    /// to the copy.
    async fn sample_is_right(&self, target: &Backend) -> bool {
        let sample: Vec<u64> = {
            let all = self.0.state().chunks.inherited();
            all.iter().step_by(all.len().div_ceil(SAMPLES).max(1)).copied().collect()
        };
        for index in sample {
            let is_right = self.holds_what_is_recorded(target, index).await;
            if !matches!(is_right, Ok(true)) {
                return false;
            }
        }
        true
    }

    /// Works until the target cannot be flushed any more, or the future is dropped.
    pub(crate) async fn keep(&self, ctx: &JobContext, target: &Backend) -> Error {
        let Some(record) = &self.0.record else { return std::future::pending().await };
        let (interval, most) = (record.options.interval, self.0.interval_bytes(&record.options));
        loop {
            let due = self.0.is_due.wait_until(|| self.0.state().unrecorded >= most);
            select(pin!(due), pin!(bds_io::sleep(interval))).await;
            self.show(ctx);
            if let Err(error) = self.checkpoint_by_policy(ctx, target).await {
                return error;
            }
        }
    }

    /// A checkpoint whose failure the job's policy decides about.
    async fn checkpoint_by_policy(&self, ctx: &JobContext, target: &Backend) -> Result<()> {
        let Err(error) = self.checkpoint(target).await else { return Ok(()) };
        let node = target.node().map(|node| node.name().to_owned()).unwrap_or_default();
        let site = ErrorSite { offset: 0, len: 0, node };
        match ctx.on_error(Side::Target, site, &error).await {
            ErrorVerdict::Fail => Err(error),
            ErrorVerdict::Retry | ErrorVerdict::Skip => {
                while ctx.should_pause() {
                    bds_io::sleep(Duration::from_millis(20)).await;
                }
                Ok(())
            }
        }
    }

    /// Shows bytes that were not copied, and reports differences that were found since.
    pub(crate) fn show(&self, ctx: &JobContext) {
        if !self.has_record() {
            return;
        }
        ctx.set_resumed(self.resumed_bytes());
        let found = {
            let mut state = self.0.state();
            let found = state.differences;
            state.differences.reported = found.bytes;
            found
        };
        if found.bytes > found.reported {
            self.report(ctx, RecordUse::TargetDiffers { offset: found.first }, found.bytes);
        }
    }

    /// Brings the record up to date after a failure or a cancel, if the target can be flushed.
    pub(crate) async fn save(&self, target: &Backend) {
        if !self.has_record() || target.node().is_none_or(|node| node.is_poisoned()) {
            return;
        }
        let flushed = pin!(self.checkpoint(target));
        match select(flushed, pin!(bds_io::sleep(LAST_FLUSH))).await {
            Either::Left((Ok(()), _)) => {}
            Either::Left((Err(error), _)) => {
                tracing::warn!("a job's record was not brought up to date: {error}");
            }
            Either::Right(_) => {
                tracing::warn!("a job's record was not brought up to date: a flush takes too long");
            }
        }
    }

    fn report(&self, ctx: &JobContext, what: RecordUse, bytes: u64) {
        let Some(record) = &self.0.record else { return };
        let path = record.options.path.to_string_lossy().into_owned();
        ctx.emit(JobEvent::Record { id: ctx.id().to_owned(), path, what, bytes });
    }

    /// Reads a chunk of the target, and compares it with what is known of it.
    pub(super) async fn holds_what_is_recorded(
        &self,
        target: &Backend,
        index: u64,
    ) -> Result<bool> {
        let mut found = None;
        let len = self.0.len;
        let one = std::iter::once(index);
        crate::manifest::hash_chunks_of(target, len, 1 << CHUNK_BITS, one, |_, hash| {
            found = Some(hash);
            Ok(())
        })
        .await?;
        Ok(found == Some(self.0.state().chunks.get(index).1))
    }
}
