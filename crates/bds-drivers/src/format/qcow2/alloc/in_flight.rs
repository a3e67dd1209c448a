//! Tracks allocations in flight: guest clusters whose L2 entries will change as soon as their data
//! is written.

use std::sync::Arc;

use crate::format::qcow2::layout::entry::L2Entry;
use crate::format::qcow2::layout::space::DataOffset;
use crate::format::qcow2::layout::units::mem_len;
use crate::format::qcow2::meta::slice_cache::SliceCache;
use crate::format::qcow2::meta::tables::{Slice, SliceId};
use crate::format::qcow2::task::Completion;

/// An allocation in flight: guest clusters whose entries will change when its data is written.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// Number of the first guest cluster.
    pub first: u64,
    /// One past the last.
    pub end: u64,
    /// The slice that will change, pinned meanwhile.
    pub slice: Option<SliceId>,
    pub done: Completion,
}

impl InFlight {
    /// Removes it from `list` and wakes the requests that wait for it.
    pub(crate) fn leave(self: &Arc<Self>, list: &mut Vec<Arc<Self>>, slices: &mut SliceCache) {
        list.retain(|item| !Arc::ptr_eq(item, self));
        if let Some(id) = self.slice {
            slices.unpin(id);
        }
        self.done.set();
    }
}

/// Guest clusters whose entries will point at new clusters, or at data in clusters they have, once
/// the data is written.
pub(crate) struct PendingLink {
    pub item: Arc<InFlight>,
    pub id: SliceId,
    pub slice: Arc<Slice>,
    /// Index of the first entry in the slice.
    pub index: usize,
    /// Start of the first cluster.
    pub guest: u64,
    /// Its host offset.
    pub host: DataOffset,
    pub clusters: u64,
    /// The clusters are new (else they keep their host offset).
    pub is_new: bool,
    /// New, and never written before: they read as zeros.
    pub is_fresh: bool,
    /// The guest's bytes.
    pub start: u64,
    pub end: u64,
}

impl PendingLink {
    /// The old entry of the first cluster, and of the last.
    pub(crate) fn old_entries(&self) -> (L2Entry, L2Entry) {
        let last = self.index + mem_len(self.clusters) - 1;
        (self.slice.entry(self.index), self.slice.entry(last))
    }
}
