//! Leaves out chunks that a bitmap of the source shows as unchanged since the record was begun:
//! neither read nor copied.
//!
//! The bitmap is looked at under a claim. A guest's write sets the bitmap's bits before the job's
//! filter marks its granules: so a claim that took the mark finds the bits, and a mark that comes
//! later stays.

use bds_core::Result;
use bds_core::copy::CopyMap;
use bds_core::request::Backend;

use super::chunks::Known;
use super::format::CHUNK_BITS;
use super::tracker::{ContentTracker, Trust};

/// Longest claim, in bytes, unless a granule is longer: a guest's write of the range waits for it.
const MAX_CLAIM: u64 = 1 << 20;
const CHUNK: u64 = 1 << CHUNK_BITS;

impl ContentTracker {
    /// Ends claims of what is unchanged, in whole granules, until all of the map was looked at.
    /// Returns early when `is_to_stop`.
    ///
    /// # Errors
    /// The bitmap is gone.
    pub(crate) async fn skip_unchanged(
        &self,
        map: &CopyMap,
        target: &Backend,
        is_to_stop: impl Fn() -> bool,
    ) -> Result<()> {
        let Some(name) = self.usable_bitmap().await else { return Ok(()) };
        let granule = u64::from(map.granularity()).max(CHUNK);
        let whole = |end: u64| end == map.len() || end.is_multiple_of(granule);
        let mut at = 0;
        while at < map.len() && !is_to_stop() {
            // Of other chunks the record says nothing.
            let Some(next) = self.0.state().chunks.next_inherited(at / CHUNK) else { break };
            at = at.max(next * CHUNK / granule * granule);
            let Some(mut claim) = map.claim(at..map.len(), MAX_CLAIM.max(granule)) else { break };
            let range = claim.range();
            let mut end = range.start;
            while end < range.end && range.start.is_multiple_of(granule) {
                let next = range.end.min(end + granule);
                if !whole(next) || !self.is_unchanged(end..next, &name, target).await? {
                    break;
                }
                end = next;
            }
            if end == range.start {
                at = range.end.min(range.start + granule);
                continue; // The claim is dropped, which marks its range again.
            }
            claim.shrink(end - range.start);
            claim.done();
            at = end;
            bds_io::yield_now().await;
        }
        Ok(())
    }

    /// The bitmap, if the record says that it is the one that recorded all the time.
    async fn usable_bitmap(&self) -> Option<String> {
        let record = self.0.record.as_ref().filter(|record| record.is_continued)?;
        let name = record.options.bitmap.clone()?;
        let header = record.header.lock().await;
        (header.bitmap == super::format::shortened(&name)).then_some(name)
    }

    async fn is_unchanged(
        &self,
        range: std::ops::Range<u64>,
        bitmap: &str,
        target: &Backend,
    ) -> Result<bool> {
        if self.1.next_dirty_in_bitmap(bitmap, range.clone())?.is_some() {
            return Ok(false);
        }
        for index in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            let is_trusted = {
                let state = self.0.state();
                match state.chunks.get(index).0 {
                    Known::Inherited => state.trust == Trust::Trusted,
                    known if known.is_sure() => continue,
                    _ => return Ok(false),
                }
            };
            let holds = match is_trusted {
                true => Ok(true),
                // An error of a read is left to the copy.
                false => self.holds_what_is_recorded(target, index).await,
            };
            if !matches!(holds, Ok(true)) {
                return Ok(false);
            }
            self.confirm(index);
        }
        Ok(true)
    }
}
