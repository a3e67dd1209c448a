//! Cached slices of L2 tables ([`SliceCache`]): which are dirty, which are pinned, and which are
//! evicted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::tables::{Slice, SliceId, Tables};
use crate::format::qcow2::layout::units::all_pieces;

/// An L2 table that the L1 table in the file does not name yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unlinked {
    /// What its cluster holds is unknown: clear it before the first slice is written.
    pub(super) needs_zeros: bool,
}

/// Why a slice must stay in memory.
#[derive(Clone, Copy, Debug, Default)]
struct SliceUse {
    /// Bit i: piece i (of 64) differs from the file.
    dirty: u64,
    /// The batch under way holds pieces of it, which become dirty again if it fails.
    is_writing: bool,
    /// Allocations in flight that will change it.
    changing: u32,
}

impl SliceUse {
    fn is_needed(&self) -> bool {
        self.dirty != 0 || self.is_writing || self.changing > 0
    }
}

/// The cached slices of L2 tables and which of them are dirty.
#[derive(Debug)]
pub(crate) struct SliceCache {
    /// In memory, in clock order for eviction.
    ring: VecDeque<SliceId>,
    resident_bytes: usize,
    budget_bytes: usize,
    pinned: HashMap<SliceId, SliceUse>,
    /// Pinned slices that are dirty.
    dirty_count: usize,
    /// In order, so that a seed replays the writes they cause.
    pub(super) unlinked: BTreeMap<u32, Unlinked>,
    pub(super) slice_len: usize,
}

impl SliceCache {
    pub(crate) fn new(slice_len: usize, budget_bytes: usize) -> Self {
        Self {
            ring: VecDeque::new(),
            resident_bytes: 0,
            budget_bytes: budget_bytes.max(2 * slice_len),
            pinned: HashMap::new(),
            dirty_count: 0,
            unlinked: BTreeMap::new(),
            slice_len,
        }
    }

    /// Changes the budget. The excess is evicted at the next eviction.
    pub(crate) fn set_budget(&mut self, budget_bytes: usize) {
        self.budget_bytes = budget_bytes.max(2 * self.slice_len);
    }

    pub(super) fn piece_len(&self) -> usize {
        (self.slice_len / 64).max(512)
    }

    /// Marks bytes of a slice as changed.
    pub(crate) fn mark(&mut self, id: SliceId, byte: usize, len: usize) {
        let piece = self.piece_len();
        let mut mask = 0;
        for i in byte / piece..=(byte + len - 1) / piece {
            mask |= 1 << i;
        }
        self.mark_pieces(id, mask);
    }

    pub(super) fn mark_pieces(&mut self, id: SliceId, mask: u64) {
        let pinned = self.pinned.entry(id).or_default();
        self.dirty_count += usize::from(pinned.dirty == 0);
        pinned.dirty |= mask;
    }

    /// Keeps a slice in memory until [`Self::unpin`]: an allocation in flight will change it.
    pub(crate) fn pin(&mut self, id: SliceId) {
        self.pinned.entry(id).or_default().changing += 1;
    }

    pub(crate) fn unpin(&mut self, id: SliceId) {
        if let Some(pinned) = self.pinned.get_mut(&id) {
            pinned.changing -= 1;
            if !pinned.is_needed() {
                self.pinned.remove(&id);
            }
        }
    }

    /// Bytes that one more change to this slice would pin.
    pub(crate) fn bytes_to_pin(&self, id: SliceId) -> usize {
        if self.pinned.contains_key(&id) { 0 } else { self.slice_len }
    }

    /// Bytes of slices that cannot be evicted.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.pinned.len() * self.slice_len
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty_count > 0
    }

    /// Takes the dirty pieces of all slices, in the order of the file. They stay pinned until
    /// [`Self::end_batch`].
    pub(super) fn take_dirty(&mut self) -> Vec<(SliceId, u64)> {
        let mut taken = Vec::with_capacity(self.dirty_count);
        for (id, pinned) in self.pinned.iter_mut().filter(|(_, pinned)| pinned.dirty != 0) {
            taken.push((*id, std::mem::take(&mut pinned.dirty)));
            pinned.is_writing = true;
        }
        self.dirty_count = 0;
        taken.sort_unstable();
        taken
    }

    /// Ends the batch; what it did not write is dirty again.
    pub(super) fn end_batch(&mut self) {
        self.pinned.retain(|_, pinned| {
            pinned.is_writing = false;
            pinned.is_needed()
        });
    }

    /// Marks a whole slice as changed.
    pub(crate) fn mark_all(&mut self, id: SliceId) {
        self.mark_pieces(id, all_pieces(self.slice_len / self.piece_len()));
    }

    /// A new table: the file's L1 table does not name it yet.
    pub(crate) fn add_unlinked(&mut self, table: u32, needs_zeros: bool) {
        self.unlinked.insert(table, Unlinked { needs_zeros });
    }

    /// True if the file does not have this table: what is not in memory is empty.
    pub(crate) fn is_unlinked(&self, table: u32) -> bool {
        self.unlinked.contains_key(&table)
    }

    /// Puts a slice in its slot and counts it. Returns the slice that is there already if another
    /// load was faster.
    pub(crate) fn add(&mut self, tables: &Tables, id: SliceId, slice: Arc<Slice>) -> Arc<Slice> {
        if let Some(there) = tables.hold(id) {
            return there;
        }
        tables.set_slice(id, Some(Arc::clone(&slice)));
        self.ring.push_back(id);
        self.resident_bytes += self.slice_len;
        slice
    }

    /// Removes all slices of a table, none of which is pinned: the file has other entries by now.
    pub(crate) fn forget(&mut self, tables: &Tables, table: u32) {
        let before = self.ring.len();
        self.ring.retain(|id| id.table != table);
        self.resident_bytes -= (before - self.ring.len()) * self.slice_len;
        for piece in 0..u32::try_from(tables.slices_per_table()).expect("at most 4096") {
            let id = SliceId { table, piece };
            debug_assert!(!self.pinned.contains_key(&id), "what is dirty is newer than the file");
            tables.set_slice(id, None);
        }
    }

    /// Evicts clean slices until the budget is kept. Pinned and held ones stay. `only_unused`: all
    /// that were not used lately, whatever the budget.
    pub(crate) fn evict(&mut self, tables: &Tables, only_unused: bool) {
        let mut left = self.ring.len() * if only_unused { 1 } else { 2 };
        while only_unused || self.is_over_budget() {
            let Some(id) = self.next_candidate(&mut left) else { break };
            let is_free = !self.pinned.contains_key(&id) && !self.is_unlinked(id.table);
            // Two: the slot's and the one just taken.
            let slice = tables.hold(id);
            let is_gone = match &slice {
                Some(slice) => is_free && !slice.take_used() && Arc::strong_count(slice) <= 2,
                None => true,
            };
            if is_gone {
                tables.set_slice(id, None);
                self.resident_bytes -= self.slice_len;
            } else {
                self.ring.push_back(id);
            }
        }
    }

    /// Is there more in memory than the budget allows, and something to evict?
    fn is_over_budget(&self) -> bool {
        self.resident_bytes > self.budget_bytes && self.ring.len() > self.pinned.len()
    }

    /// Takes the next slice in clock order; `None` after `left` of them.
    fn next_candidate(&mut self, left: &mut usize) -> Option<SliceId> {
        *left = left.checked_sub(1)?;
        self.ring.pop_front()
    }
}
