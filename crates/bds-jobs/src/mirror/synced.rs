//! Synced writes: write the source, then the target, before the guest's request is completed.
//!
//! ```text
//! exclude copies ─► clear bits ─► write the source ─► write the target ─► equal
//!       │ drained                      │ failed, dropped    │ failed, drained
//!       ▼                              ▼                    ▼
//!  write the source, mark            marked               marked (the guest's write succeeds)
//! ```
//!
//! Bits are cleared for whole granules only: the head and the tail of an unaligned write keep
//! theirs. The payload is copied first, because the guest may change its memory while the two
//! writes run. A failure of the target goes to the job and its error policy, never to the guest.

use std::ops::Range;

use bds_core::Result;
use bds_core::copy::Content;
use bds_core::driver::{Attempt, ReadFlags, WriteFlags, ZeroFlags};
use bds_io::{Buf, IoVec};

use super::filter::MirrorTopNode;
use super::tracking::Synced;

/// Alignment of the copied payload: enough for direct I/O.
const PAYLOAD_ALIGN: usize = 4096;

impl MirrorTopNode {
    pub(super) async fn write_synced(
        &self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> Result<()> {
        let (range, payload) = (range_of(offset, iov.len() as u64), own_copy(&iov));
        let Some(synced) = self.tracking.begin_synced(range.clone()).await else {
            let _marking = self.tracking.begin_marking(range);
            return self.file.write(offset, payload, flags).await;
        };
        self.file.write(offset, payload.clone(), flags).await?;
        self.payload_to_target(synced, range, payload).await;
        Ok(())
    }

    pub(super) async fn write_compressed_synced(&self, offset: u64, iov: IoVec) -> Result<()> {
        if iov.is_empty() {
            return self.file.write_compressed(offset, iov).await;
        }
        let (range, payload) = (range_of(offset, iov.len() as u64), own_copy(&iov));
        let Some(synced) = self.tracking.begin_synced(range.clone()).await else {
            let _marking = self.tracking.begin_marking(range);
            return self.file.write_compressed(offset, payload).await;
        };
        self.file.write_compressed(offset, payload.clone()).await?;
        self.payload_to_target(synced, range, payload).await;
        Ok(())
    }

    pub(super) async fn write_zeroes_synced(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<Attempt> {
        let range = range_of(offset, len);
        let Some(synced) = self.tracking.begin_synced(range.clone()).await else {
            let _marking = self.tracking.begin_marking(range);
            return self.file.write_zeroes(offset, len, flags).await;
        };
        // Marked if it was declined: pieces of it may have been done.
        if self.file.write_zeroes(offset, len, flags).await? == Attempt::Unsupported {
            return Ok(Attempt::Unsupported);
        }
        self.zeroes_to_target(synced, range, flags.contains(ZeroFlags::MAY_UNMAP)).await;
        Ok(Attempt::Done)
    }

    /// What a discarded range reads as is the source's choice. Where that is zeros, so is the
    /// target's; elsewhere the range is marked, because it may be long and its bytes unchanged.
    pub(super) async fn discard_synced(&self, offset: u64, len: u64) -> Result<()> {
        let range = range_of(offset, len);
        let Some(synced) = self.tracking.begin_synced(range.clone()).await else {
            let _marking = self.tracking.begin_marking(range);
            return self.file.discard(offset, len).await;
        };
        self.file.discard(offset, len).await?;
        // A failed query is no failure of the discard: the range is marked.
        if matches!(self.file.is_zero(offset, len).await, Ok(true)) {
            self.zeroes_to_target(synced, range, true).await;
        }
        Ok(())
    }

    async fn payload_to_target(&self, synced: Synced<'_>, range: Range<u64>, payload: IoVec) {
        if self.tracking.needs_whole_granules(&range) {
            return self.granules_to_target(synced, range).await;
        }
        let write = self.write_target(range.start, payload);
        self.end_synced(synced, range, write).await;
    }

    async fn zeroes_to_target(&self, synced: Synced<'_>, range: Range<u64>, may_unmap: bool) {
        if self.tracking.needs_whole_granules(&range) {
            return self.granules_to_target(synced, range).await;
        }
        let mut flags = ZeroFlags::empty();
        flags.set(ZeroFlags::MAY_UNMAP, may_unmap && self.tracking.unmap);
        let write = self.tracking.zero_target(range.clone(), flags);
        self.end_synced(synced, range, async { write.await.map(drop) }).await;
    }

    async fn write_target(&self, offset: u64, payload: IoVec) -> Result<()> {
        let seen = self.tracking.observe(offset, Content::Data(&payload)).await?;
        for range in seen.missing() {
            let part = seen.part(&payload, range);
            self.tracking.target()?.write(range.start, part, WriteFlags::empty()).await?;
        }
        seen.written();
        Ok(())
    }

    /// Copies the granules around the first and the last byte, which the target shows from a layer
    /// that it gets later, as a whole; what lies between them too.
    async fn granules_to_target(&self, synced: Synced<'_>, range: Range<u64>) {
        let around = self.tracking.map.granules_around(range);
        let copy = async {
            let mut at = around.start;
            while at < around.end {
                let end = around.end.min(at + COPY_LEN);
                let len = usize::try_from(end - at).expect("at most COPY_LEN");
                let piece = Buf::zeroed(len, PAYLOAD_ALIGN).iov();
                // A failed read of the source leaves the range marked, for the job to meet.
                if self.file.read(at, piece.clone(), ReadFlags::empty()).await.is_err() {
                    return Ok(false);
                }
                self.write_target(at, piece).await?;
                at = end;
            }
            Ok(true)
        };
        match self.tracking.unless_drained(copy).await {
            Some(Ok(true)) => {
                self.tracking.copied_whole(around);
                synced.equal();
            }
            Some(Err(error)) => {
                drop(synced);
                self.tracking.target_failed(around, error);
            }
            Some(Ok(false)) | None => drop(synced),
        }
    }

    /// Ends a synced write with the outcome of its write to the target.
    async fn end_synced(
        &self,
        synced: Synced<'_>,
        range: Range<u64>,
        write: impl Future<Output = Result<()>>,
    ) {
        match self.tracking.unless_drained(write).await {
            Some(Ok(())) => synced.equal(),
            Some(Err(error)) => {
                // Marked before the job hears of it.
                drop(synced);
                self.tracking.target_failed(range, error);
            }
            None => drop(synced),
        }
    }
}

/// Longest piece that a synced write copies at once, in bytes.
const COPY_LEN: u64 = 1 << 20;

fn range_of(offset: u64, len: u64) -> Range<u64> {
    offset..offset + len
}

fn own_copy(iov: &IoVec) -> IoVec {
    let copy = Buf::zeroed(iov.len(), PAYLOAD_ALIGN).iov();
    copy.copy_from_iov(0, iov);
    copy
}
