//! Copy on write: adds to a write the bytes around it in newly allocated clusters, the rest of the
//! first and of the last one.
//!
//! A new cluster shows what the guest saw before wherever the write does not reach. Where that is
//! zeros and the cluster reads as zeros already, nothing is done. Else head, data and tail become
//! one write, and the link waits for a flush of the data node (rule O3).

use std::ops::Range;
use std::sync::Arc;

use bds_core::error::Result;
use bds_io::IoVec;

use crate::format::qcow2::alloc::in_flight::PendingLink;
use crate::format::qcow2::layout::entry::{Kind, L2Entry};
use crate::format::qcow2::layout::space::Offset;
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::meta::lookup::Found;
use crate::format::qcow2::state::Image;

/// Head and tail are read as one if no more than this lies between them.
const MAX_MIDDLE: u64 = 16 << 10;
/// The unit that a guest may expect to be written atomically.
const SECTOR_LEN: u64 = 512;

/// What is written for a step, and what it covers.
pub(crate) struct CopyPlan {
    /// Guest offset of the first byte of `iov`.
    pub start: u64,
    pub iov: IoVec,
    /// Guest bytes that are allocated after the write: these, and zeros left out around them.
    pub covers: Range<u64>,
    /// More than the guest's own bytes: the link depends on them.
    pub is_copy: bool,
}

impl Image {
    /// Completes the guest's bytes `iov` to what must be written for `work`.
    pub(crate) async fn copy_around(
        self: &Arc<Self>,
        work: &PendingLink,
        iov: IoVec,
    ) -> Result<CopyPlan> {
        let (first, last) = work.old_entries();
        let end_of_work = work.guest + (work.clusters << self.geometry().cluster_bits());
        let head = self.head_start(work, first)..work.start;
        let tail = work.end..self.tail_end(work, last, end_of_work);
        let covers = head.start..tail.end;
        if head.is_empty() && tail.is_empty() {
            return Ok(CopyPlan { start: work.start, iov, covers, is_copy: false });
        }
        let (zero_head, zero_tail) = (self.is_known_zero(&head), self.is_known_zero(&tail));
        let mut is_copy = false;
        // Zeros need not be written where there are zeros.
        let mut skips = work.is_fresh;
        if !skips && zero_head && zero_tail {
            skips = self.host_is_zero(work, &head).await && self.host_is_zero(work, &tail).await;
            // They are written, but durable before the link only if it waits for a flush.
            is_copy = skips;
        }
        let (head_iov, tail_iov) = self.read_around(&head, zero_head, &tail, zero_tail).await?;
        let mut all = IoVec::new();
        let mut start = work.start;
        if !(skips && head_iov.is_zero(0..head_iov.len())) {
            start = head.start;
            all.push(head_iov);
            is_copy = true;
        }
        all.push(iov);
        if !(skips && tail_iov.is_zero(0..tail_iov.len())) {
            all.push(tail_iov);
            is_copy = true;
        } else if work.is_fresh {
            // The file may end here. If it ended inside a sector, a later write of this sector that
            // is cut short by a power cut could leave its first half in front of the old end, and
            // neither old nor new behind it.
            let rest = work.end.next_multiple_of(SECTOR_LEN) - work.end;
            all.push(tail_iov.slice(0..mem_len(rest).min(tail_iov.len())));
        }
        Ok(CopyPlan { start, iov: all, covers, is_copy })
    }

    /// Where the copy begins: at the cluster, or at the first subcluster that must have data.
    fn head_start(&self, work: &PendingLink, old: L2Entry) -> u64 {
        let geometry = self.geometry();
        if !geometry.has_extended_l2() || old.is_compressed() {
            return work.guest;
        }
        let bits = geometry.subcluster_bits();
        let touched = (work.start - work.guest) >> bits;
        let first = match old.alloc_bits() {
            alloc if alloc != 0 && work.is_new => touched.min(u64::from(alloc.trailing_zeros())),
            _ => touched,
        };
        work.guest + (first << bits)
    }

    /// Where the copy ends.
    fn tail_end(&self, work: &PendingLink, old: L2Entry, end_of_work: u64) -> u64 {
        let geometry = self.geometry();
        if !geometry.has_extended_l2() || old.is_compressed() {
            return end_of_work;
        }
        let bits = geometry.subcluster_bits();
        let last_cluster = end_of_work - geometry.cluster_size();
        let touched = (work.end - last_cluster).div_ceil(1 << bits);
        let end = match old.alloc_bits() {
            alloc if alloc != 0 && work.is_new => {
                touched.max(u64::from(u32::BITS - alloc.leading_zeros()))
            }
            _ => touched,
        };
        last_cluster + (end << bits)
    }

    /// Do these guest bytes read as zeros, as far as that is known from memory?
    fn is_known_zero(&self, range: &Range<u64>) -> bool {
        let mut at = range.start;
        while at < range.end {
            let Ok(Found::Run(run)) = self.lookup(at, range.end - at) else { return false };
            let is_zero = match run.kind {
                Kind::ZeroPlain | Kind::ZeroAlloc => true,
                Kind::Unallocated | Kind::UnallocatedAlloc => {
                    self.backing.available_len(at, run.len) == 0
                }
                Kind::Normal | Kind::Compressed => false,
            };
            // Past the end of the disk there is nothing to keep.
            if !is_zero && at < self.disk_len() {
                return false;
            }
            at += run.len;
        }
        true
    }

    /// Do the new clusters of these guest bytes read as zeros? Cheap; false if unknown.
    async fn host_is_zero(&self, work: &PendingLink, range: &Range<u64>) -> bool {
        if range.is_empty() {
            return true;
        }
        let host = work.host.plus(range.start - work.guest);
        // An error here is not an error of the write: zeros are written then.
        self.data().is_zero(host, range.end - range.start).await.unwrap_or(false)
    }

    /// What the guest sees at `head` and `tail` now.
    async fn read_around(
        self: &Arc<Self>,
        head: &Range<u64>,
        zero_head: bool,
        tail: &Range<u64>,
        zero_tail: bool,
    ) -> Result<(IoVec, IoVec)> {
        let both = !zero_head && !zero_tail && !head.is_empty() && !tail.is_empty();
        if both && tail.start - head.end <= MAX_MIDDLE {
            let len = mem_len(tail.end - head.start);
            let all = self.pool.take(len).iov();
            self.read(head.start, all.clone()).await?;
            let tail_at = mem_len(tail.start - head.start);
            return Ok((all.slice(0..mem_len(head.end - head.start)), all.slice(tail_at..len)));
        }
        let head = self.read_side(head, zero_head);
        let tail = self.read_side(tail, zero_tail);
        let (head, tail) = futures_util::future::join(head, tail).await;
        Ok((head?, tail?))
    }

    async fn read_side(self: &Arc<Self>, range: &Range<u64>, is_zero: bool) -> Result<IoVec> {
        let len = mem_len(range.end - range.start);
        if len == 0 {
            return Ok(IoVec::new());
        }
        if is_zero {
            return Ok(self.zeros().slice(0..len));
        }
        let iov = self.pool.take(len).iov();
        self.read(range.start, iov.clone()).await?;
        Ok(iov)
    }
}
