//! Scans the source before the first copies, and takes out of the map what need not be copied.
//!
//! The map is complete before the scan begins, and the scan only clears: it claims granules, asks
//! what they hold, and ends the claim as done if the target is known to read alike, or was made to.
//! So it obeys the rules of a copy: no synced write of these granules is under way, and what is
//! written later is marked again.
//!
//! Only what the target has never received may be left alone. Nothing is copied before the scan has
//! ended but by synced writes, which keep their bytes equal; after one of them has failed, the scan
//! leaves nothing alone any more.

use bds_core::Result;
use bds_core::copy::{Claim, CopyRead, Found};
use bds_core::driver::{Attempt, ZeroFlags};

use super::Mirror;
use super::options::MirrorSync;
use super::pass::Watched;

/// Longest range that is claimed for one question, in bytes.
const MAX_SCAN: u64 = 1 << 30;

impl Mirror {
    pub(super) async fn scan(&self, watched: &Watched<'_>) -> Result<()> {
        if self.initial.sync == MirrorSync::None {
            return Ok(());
        }
        let map = &self.tracking.map;
        let mut at = 0;
        while at < map.len() {
            watched.pause_point().await;
            self.deal_with_failure(watched).await?;
            if self.tracking.is_spoiled() {
                return Ok(());
            }
            let Some(claim) = map.claim(at..map.len(), MAX_SCAN) else { break };
            at = self.scan_claim(claim, watched).await?;
            watched.show_progress();
            // A scan of a sparse image is many answers from caches: other tasks go in between.
            bds_io::yield_now().await;
        }
        Ok(())
    }

    /// Takes out the beginning of a claim if it needs no copy. Returns where to go on.
    async fn scan_claim(&self, mut claim: Claim<'_>, watched: &Watched<'_>) -> Result<u64> {
        let range = claim.range();
        let len = range.end - range.start;
        let found = CopyRead::found(&self.reader, range.start, len, self.initial.above).await;
        let run = match found {
            Ok(run) => run,
            Err(_) => {
                // The copy meets the error again, and deals with it.
                return Ok(range.end);
            }
        };
        let granularity = u64::from(self.tracking.map.granularity());
        let is_rest = run.len >= len;
        let whole = if is_rest { len } else { run.len - run.len % granularity };
        let next = range.start + whole.max(granularity);
        if whole == 0 || run.found == Found::Data {
            return Ok(next);
        }
        claim.shrink(whole);
        let is_equal = match run.found {
            Found::Data => false,
            Found::Unallocated => true,
            Found::Zero if self.initial.target_is_zero => true,
            Found::Zero => self.zero_target(&claim).await,
        };
        if is_equal && !self.tracking.is_spoiled() {
            self.tracking.skipped(claim.range());
            watched.advance(whole);
            claim.done();
        }
        Ok(next)
    }

    /// Zeroes the range in the target, if that is cheap. `false`: the copy does it.
    async fn zero_target(&self, claim: &Claim<'_>) -> bool {
        let range = claim.range();
        let mut flags = ZeroFlags::NO_FALLBACK;
        flags.set(ZeroFlags::MAY_UNMAP, self.tracking.unmap);
        let Ok(target) = self.tracking.target() else { return false };
        let zeroed = target.write_zeroes(range.start, range.end - range.start, flags);
        matches!(zeroed.await, Ok(Attempt::Done))
    }
}
