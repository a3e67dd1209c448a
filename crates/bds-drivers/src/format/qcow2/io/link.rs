//! The last step of an allocating write: links new clusters into the L2 table, or releases them if
//! the write failed.
//!
//! Linking is one synchronous section under the lock of `Meta`: it happens as a whole or not at
//! all. The table it changes has been held since the plan, so it needs no I/O and cannot fail.

use std::sync::Arc;

use bds_io::IoVec;

use super::cow::CopyPlan;
use crate::format::qcow2::alloc::freed::FreeReason;
use crate::format::qcow2::alloc::in_flight::{InFlight, PendingLink};
use crate::format::qcow2::layout::entry::L2Entry;
use crate::format::qcow2::layout::space::{Clusters, Offset};
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::meta::tables::SliceId;
use crate::format::qcow2::plan::{MetaResult, NeedMeta};
use crate::format::qcow2::state::{Image, Meta};
use crate::format::qcow2::task::Completion;

/// Owns a [`PendingLink`] until it is linked. If dropped before, releases its clusters and wakes
/// its waiters.
pub(crate) struct AllocGuard {
    image: Arc<Image>,
    pub work: PendingLink,
    /// Bytes are on their way to the new clusters: they must not be reused.
    pub(super) is_writing: bool,
    is_over: bool,
}

impl Image {
    pub(crate) fn guard_allocation(self: &Arc<Self>, work: PendingLink) -> AllocGuard {
        AllocGuard { image: Arc::clone(self), work, is_writing: false, is_over: false }
    }

    /// Enters an allocation in flight, which will change `slice`.
    pub(crate) fn begin_allocation(
        &self,
        meta: &mut Meta,
        guest: u64,
        clusters: u64,
        slice: Option<SliceId>,
    ) -> Arc<InFlight> {
        let first = self.geometry().cluster_index(guest);
        let item =
            Arc::new(InFlight { first, end: first + clusters, slice, done: Completion::new() });
        if let Some(id) = slice {
            meta.slices.pin(id);
        }
        meta.in_flight.push(Arc::clone(&item));
        item
    }

    /// How many of the `max` bytes at `guest` lie before the next allocation in flight. Stops if
    /// one is at the start.
    pub(crate) fn before_in_flight(&self, meta: &Meta, guest: u64, max: u64) -> MetaResult<u64> {
        let geometry = self.geometry();
        let first = geometry.cluster_index(guest);
        let last = geometry.cluster_index(guest + (max - 1));
        let mut max = max;
        for item in meta.in_flight.iter().filter(|i| i.first <= last && i.end > first) {
            if item.first <= first {
                return Err(NeedMeta::Wait(Arc::clone(item)));
            }
            max = max.min((item.first << geometry.cluster_bits()) - guest);
        }
        Ok(max)
    }
}

impl AllocGuard {
    /// Changes the entries: the data is written, and the guest sees it from now on.
    pub(super) fn link(mut self, copy: &CopyPlan) {
        let image = Arc::clone(&self.image);
        let mut meta = image.meta();
        let work = &self.work;
        let geometry = image.geometry();
        for i in 0..mem_len(work.clusters) {
            let offset = (i as u64) << geometry.cluster_bits();
            let old = work.slice.entry(work.index + i);
            let bitmap = if geometry.has_extended_l2() {
                new_bitmap(&image, old, work.guest + offset, copy, !work.is_new)
            } else {
                0
            };
            let place = work.host.plus(offset);
            work.slice.set_entry(work.index + i, L2Entry::at_cluster(place, true, bitmap));
            // Its count was set, or looked up, when this was planned.
            work.slice.note_checked(work.index + i);
            if work.is_new {
                image.free_entry(&mut meta, old, FreeReason::Reuse);
            }
        }
        let entry_len = geometry.l2_entry_len();
        let len = mem_len(work.clusters) * entry_len;
        meta.slices.mark(work.id, work.index * entry_len, len);
        // A place that was there already, and showed something else, still has what it had before.
        let may_show_old = !self.work.is_new || image.data_file.is_none();
        meta.pending_flush.data_flush |=
            copy.is_copy || may_show_old || image.config.load().data_before_metadata;
        self.is_over = true;
        meta.end_allocation(&self.work.item);
    }

    /// Links clusters that read as zeros already. Extended entries get their host offset only:
    /// their subclusters stay what they are.
    pub(crate) fn link_empty(self) {
        let is_extended = self.image.geometry().has_extended_l2();
        let covers = if is_extended {
            self.work.guest..self.work.guest
        } else {
            self.work.start..self.work.end
        };
        let start = self.work.start;
        // The zeros of reused clusters must be there before the link.
        let is_copy = !self.work.is_fresh;
        self.link(&CopyPlan { start, iov: IoVec::new(), covers, is_copy });
    }
}

impl Drop for AllocGuard {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let image = Arc::clone(&self.image);
        let mut meta = image.meta();
        // If bytes may still be on their way (the executor was dropped), the clusters stay counted:
        // a leak is harmless.
        let unused = image.space().counted(self.work.host);
        if let Some(first) = unused.filter(|_| self.work.is_new && !self.is_writing) {
            image.release_unused(&mut meta, Clusters { start: first, count: self.work.clusters });
        }
        meta.end_allocation(&self.work.item);
    }
}

/// The subclusters of a cluster after a write: what was written is data, the rest stays what it
/// was.
fn new_bitmap(image: &Image, old: L2Entry, guest: u64, copy: &CopyPlan, keeps: bool) -> u64 {
    let geometry = image.geometry();
    let bits = geometry.subcluster_bits();
    let from = copy.covers.start.max(guest) - guest;
    let to = copy.covers.end.min(guest + geometry.cluster_size()).saturating_sub(guest);
    let (first, end) = (from >> bits, to.div_ceil(1 << bits));
    let written = if first < end { ((1u64 << end) - 1) & !((1u64 << first) - 1) } else { 0 };
    let (alloc, zero) = if old.is_compressed() {
        (0, 0)
    } else {
        (u64::from(old.alloc_bits()), u64::from(old.zero_bits()))
    };
    // In a new cluster only what was written has data; the plan covers all that had any.
    let alloc = if keeps { alloc | written } else { written };
    alloc | (zero & !written) << 32
}
