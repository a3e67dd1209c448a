//! The refcounts of host clusters, as they will be in the file: a table of blocks, some of them in
//! memory.
//!
//! Everything here is memory only and happens under the lock of `Meta`. A block that is not in
//! memory stops the operation with [`NeedMeta::Load`]; the caller loads it without the lock and
//! runs the operation again. Each function changes all or nothing before it can stop, so running it
//! again is always right.
//!
//! Refcounts in memory run ahead of the file. Raised counts reach the file before any pointer to
//! the cluster (`write_back.rs`, rule O1); lowered ones are entered here only after the pointer's
//! removal is durable (`release.rs`, O2).

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bds_core::error::{Error, ErrorKind};

use crate::format::qcow2::layout::entry::{read_refcount, refblock_place, write_refcount};
use crate::format::qcow2::layout::header::MAX_REFTABLE_LEN;
use crate::format::qcow2::layout::space::{Clusters, MetaOffset};
use crate::format::qcow2::layout::units::{Geometry, all_pieces, joined_bits};
use crate::format::qcow2::plan::{MetaKey, MetaResult, NeedMeta};

/// Bytes of the refcount table that are written as one piece.
pub(crate) const SLOT_PIECE: usize = 512;

/// A refcount block in memory.
#[derive(Debug)]
pub(crate) struct RefcountBlock {
    pub offset: MetaOffset,
    bytes: Box<[u8]>,
    /// Bit i: piece i (of 64) differs from the file.
    dirty: u64,
    /// The batch under way holds pieces of it, which become dirty again if it fails.
    is_writing: bool,
    /// A count was raised since the block was last written: pointers may depend on it.
    pub is_raised: bool,
    /// Cloned by operations that need the block to stay in memory.
    pub pin: Arc<()>,
    /// When it was last used, for eviction.
    used_at: u64,
}

impl RefcountBlock {
    fn piece_len(&self) -> usize {
        (self.bytes.len() / 64).max(512)
    }

    /// The dirty pieces as (place in the block, bytes), neighbours joined.
    pub(crate) fn dirty_pieces(&self) -> Vec<(usize, &[u8])> {
        let len = self.piece_len();
        joined_bits(self.dirty)
            .map(|(first, count)| (first * len, &self.bytes[first * len..(first + count) * len]))
            .collect()
    }

    pub(crate) fn dirty(&self) -> u64 {
        self.dirty
    }

    /// Must it stay in memory?
    fn is_pinned(&self) -> bool {
        self.dirty != 0 || self.is_writing
    }

    /// The batch under way has taken its dirty pieces.
    pub(crate) fn begin_writing(&mut self) {
        self.dirty = 0;
        self.is_raised = false;
        self.is_writing = true;
    }

    /// The batch under way did not write these pieces.
    pub(crate) fn write_again(&mut self, pieces: u64, is_raised: bool) {
        debug_assert!(self.is_writing, "only blocks of a batch are put back");
        self.dirty |= pieces;
        self.is_raised |= is_raised;
    }

    fn put(&mut self, order: u32, index: usize, count: u64) -> bool {
        if !write_refcount(&mut self.bytes, order, index, count) {
            return false;
        }
        let byte = (index << order) / 8;
        self.dirty |= 1 << (byte / self.piece_len());
        true
    }

    /// The first cluster of this block from `from` on with refcount 0.
    fn next_free(&self, order: u32, from: usize) -> Option<usize> {
        if order == 4 {
            let counts = &self.bytes.as_chunks::<2>().0[from..];
            return counts.iter().position(|count| *count == [0, 0]).map(|i| from + i);
        }
        (from..).find_map(|i| match read_refcount(&self.bytes, order, i) {
            Some(0) => Some(Some(i)),
            Some(_) => None,
            None => Some(None),
        })?
    }
}

/// All refcounts of an image.
#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    /// The refcount table. It may be longer than its clusters in the file: see `table_needs_space`.
    table: Vec<u64>,
    pub table_offset: MetaOffset,
    pub table_clusters: u64,
    /// Pieces of the table that differ from the file.
    pub dirty_slots: BTreeSet<usize>,
    /// The table as a whole has a new place that the header does not name yet.
    pub is_moved: bool,
    blocks: HashMap<u64, RefcountBlock>,
    /// Blocks that are dirty or being written.
    pinned_count: usize,
    budget_bytes: usize,
    tick: u64,
    /// Below this cluster nothing is free.
    pub cursor: u64,
}

impl Refcounts {
    pub(crate) fn new(
        geometry: Geometry,
        table: Vec<u64>,
        table_offset: MetaOffset,
        table_clusters: u64,
        budget_bytes: usize,
    ) -> Self {
        Self {
            geometry,
            table,
            table_offset,
            table_clusters,
            dirty_slots: BTreeSet::new(),
            is_moved: false,
            blocks: HashMap::new(),
            pinned_count: 0,
            budget_bytes,
            tick: 0,
            cursor: 0,
        }
    }

    /// Changes the budget. The excess is evicted at the next eviction.
    pub(crate) fn set_budget(&mut self, budget_bytes: usize) {
        self.budget_bytes = budget_bytes;
    }

    /// The place of block `index`; `None` if it does not exist, so that all its counts are zero.
    pub(crate) fn block_place(&self, index: u64) -> MetaResult<Option<MetaOffset>> {
        let slot = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        let place = refblock_place(slot.copied().unwrap_or(0), &self.geometry);
        place.map_err(|bad| NeedMeta::Corrupt {
            what: format!("refcount table entry {index}: {bad}"),
            at: self.table_offset.0 + index * 8,
        })
    }

    /// Block `index`, which exists.
    fn block(&mut self, index: u64) -> MetaResult<&mut RefcountBlock> {
        self.tick += 1;
        let tick = self.tick;
        match self.blocks.get_mut(&index) {
            Some(block) => {
                block.used_at = tick;
                Ok(block)
            }
            None => Err(NeedMeta::Load(MetaKey::Block(index))),
        }
    }

    /// A block already in memory.
    pub(crate) fn resident(&mut self, index: u64) -> Option<&mut RefcountBlock> {
        self.blocks.get_mut(&index)
    }

    /// Blocks in memory that differ from the file.
    pub(crate) fn dirty_blocks(&mut self) -> impl Iterator<Item = (u64, &mut RefcountBlock)> {
        self.blocks.iter_mut().filter(|(_, b)| b.dirty != 0).map(|(i, b)| (*i, b))
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.is_moved
            || !self.dirty_slots.is_empty()
            || self.blocks.values().any(|block| block.dirty != 0)
    }

    /// Inserts block `index` as read from `offset`. Returns what keeps it in memory.
    pub(crate) fn insert(&mut self, index: u64, offset: MetaOffset, bytes: Box<[u8]>) -> Arc<()> {
        self.tick += 1;
        let block = RefcountBlock {
            offset,
            bytes,
            dirty: 0,
            is_writing: false,
            is_raised: false,
            pin: Arc::new(()),
            used_at: self.tick,
        };
        // Another load may have been faster; what is in memory is newer than the file.
        Arc::clone(&self.blocks.entry(index).or_insert(block).pin)
    }

    /// Bytes of blocks that cannot be evicted.
    pub(crate) fn pinned_bytes(&self) -> usize {
        self.pinned_count * self.geometry.cluster_len()
    }

    /// Bytes that a change of this cluster's count would pin.
    pub(crate) fn bytes_to_pin(&self, cluster: u64) -> usize {
        let block = self.blocks.get(&self.geometry.reftable_index(cluster));
        if block.is_some_and(RefcountBlock::is_pinned) { 0 } else { self.geometry.cluster_len() }
    }

    /// Ends the batch; what it did not write is dirty again.
    pub(crate) fn end_batch(&mut self) {
        for block in self.blocks.values_mut().filter(|block| block.is_writing) {
            block.is_writing = false;
            self.pinned_count -= usize::from(block.dirty == 0);
        }
    }

    /// Evicts clean blocks that are not held until the budget is kept, or only pinned ones are
    /// left.
    pub(crate) fn evict(&mut self) {
        let cluster_len = self.geometry.cluster_len();
        let allowed = (self.budget_bytes / cluster_len).max(4);
        while self.blocks.len() > allowed.max(self.pinned_count) {
            let oldest = self
                .blocks
                .iter()
                .filter(|(_, b)| !b.is_pinned() && Arc::strong_count(&b.pin) == 1)
                .min_by_key(|(_, b)| b.used_at)
                .map(|(index, _)| *index);
            match oldest {
                Some(index) => self.blocks.remove(&index),
                None => return,
            };
        }
    }

    /// The refcount of `cluster`.
    pub(crate) fn count(&mut self, cluster: u64) -> MetaResult<u64> {
        let geometry = self.geometry;
        let index = geometry.reftable_index(cluster);
        if self.block_place(index)?.is_none() {
            return Ok(0);
        }
        let block = self.block(index)?;
        let slot = geometry.refblock_index(cluster);
        Ok(read_refcount(&block.bytes, geometry.refcount_order(), slot)
            .expect("an index inside the block"))
    }

    /// Sets the count of `cluster`, whose block exists. The new count must fit.
    fn set(&mut self, cluster: u64, count: u64, is_raise: bool) -> MetaResult<()> {
        let geometry = self.geometry;
        let block = self.block(geometry.reftable_index(cluster))?;
        let slot = geometry.refblock_index(cluster);
        let was_pinned = block.is_pinned();
        let fits = block.put(geometry.refcount_order(), slot, count);
        debug_assert!(fits, "the caller checked the width");
        block.is_raised |= is_raise;
        self.pinned_count += usize::from(!was_pinned);
        Ok(())
    }

    /// Raises the refcount of `cluster`. Fails if the count's width does not allow it.
    pub(crate) fn raise(&mut self, cluster: u64) -> MetaResult<u64> {
        let count = self.count(cluster)?;
        if count >= self.geometry.refcount_max() {
            return Err(self.full(cluster));
        }
        self.set(cluster, count + 1, true)?;
        Ok(count + 1)
    }

    /// Raises the refcount of `cluster`, which is not zero, by `more`. Fails if the count's width
    /// does not allow it.
    pub(crate) fn raise_by(&mut self, cluster: u64, more: u64) -> MetaResult<()> {
        let count = self.count(cluster)?;
        let max = self.geometry.refcount_max();
        let Some(raised) = count.checked_add(more).filter(|raised| *raised <= max) else {
            return Err(self.full(cluster));
        };
        self.set(cluster, raised, true)
    }

    /// The error of a count that its width does not allow.
    fn full(&self, cluster: u64) -> NeedMeta {
        let words = format!("{}-bit refcounts are full", self.geometry.refcount_bits());
        let at = cluster << self.geometry.cluster_bits();
        NeedMeta::Fail(Error::new(ErrorKind::LimitExceeded, words).at(at))
    }

    /// Lowers the refcount of `cluster`. At zero it is free at once.
    pub(crate) fn lower(&mut self, cluster: u64) -> MetaResult<u64> {
        let count = self.count(cluster)?;
        let Some(left) = count.checked_sub(1) else {
            return Err(NeedMeta::Corrupt {
                what: "a cluster in use has refcount 0".into(),
                at: cluster << self.geometry.cluster_bits(),
            });
        };
        self.set(cluster, left, false)?;
        if left == 0 {
            self.cursor = self.cursor.min(cluster);
        }
        Ok(left)
    }

    /// The first free cluster from `from` on that lies in a block that exists, or the first of a
    /// block that does not. The flag says which.
    pub(crate) fn next_free(&mut self, from: u64) -> MetaResult<(u64, bool)> {
        let geometry = self.geometry;
        let mut at = from;
        loop {
            let index = geometry.reftable_index(at);
            if self.block_place(index)?.is_none() {
                return Ok((at, false));
            }
            let slot = geometry.refblock_index(at);
            let found = self.block(index)?.next_free(geometry.refcount_order(), slot);
            let first = index << geometry.refblock_bits();
            let next = first + found.map_or(geometry.refblock_entries(), |slot| slot as u64);
            if self.cursor == at {
                // Nothing is free in between: never look there again.
                self.cursor = next;
            }
            if found.is_some() {
                return Ok((next, true));
            }
            at = next;
        }
    }

    /// Marks free clusters, whose blocks exist and are in memory, as used by one.
    pub(crate) fn mark_used(&mut self, first: u64, count: u64) -> MetaResult<()> {
        let geometry = self.geometry;
        for index in geometry.reftable_index(first)..=geometry.reftable_index(first + count - 1) {
            self.block(index)?;
        }
        for cluster in first..first + count {
            debug_assert_eq!(self.count(cluster).ok(), Some(0));
            self.set(cluster, 1, true)?;
        }
        if self.cursor == first {
            self.cursor = first + count;
        }
        Ok(())
    }

    /// Adds a new block number `index` at cluster `place`, which is free and which the block may
    /// describe itself.
    pub(crate) fn add_block(&mut self, index: u64, place: u64) -> MetaResult<()> {
        let geometry = self.geometry;
        let slot = usize::try_from(index).map_err(|_| table_full(&geometry))?;
        let describes_itself = geometry.reftable_index(place) == index;
        if !describes_itself {
            self.block(geometry.reftable_index(place))?;
        }
        if slot >= self.table.len() {
            let bytes = (index + 1).saturating_mul(8);
            if bytes.next_multiple_of(geometry.cluster_size()) > MAX_REFTABLE_LEN {
                return Err(table_full(&geometry));
            }
            self.table.resize(slot + 1, 0);
        }
        self.table[slot] = place << geometry.cluster_bits();
        self.dirty_slots.insert(slot * 8 / SLOT_PIECE);
        self.insert(
            index,
            MetaOffset(place << geometry.cluster_bits()),
            vec![0; geometry.cluster_len()].into_boxed_slice(),
        );
        let block = self.block(index)?;
        // All of it is new to the file.
        let was_pinned = block.is_pinned();
        block.dirty = all_pieces(block.bytes.len() / block.piece_len());
        block.is_raised = true;
        self.pinned_count += usize::from(!was_pinned);
        self.set(place, 1, true)
    }

    /// Is the table longer than its clusters in the file?
    pub(crate) fn table_needs_space(&self) -> bool {
        self.table.len() as u64 * 8 > self.table_clusters * self.geometry.cluster_size()
    }

    /// Clusters to allocate for the table: half as much again as it needs, within the format's
    /// limit.
    pub(crate) fn wanted_table_clusters(&self) -> u64 {
        let need = self.table.len() as u64 * 8;
        let roomy = (need + need / 2).min(MAX_REFTABLE_LEN).max(need);
        self.geometry.clusters(roomy)
    }

    /// Sets the new clusters of the table and returns the old ones.
    pub(crate) fn move_table(&mut self, place: Clusters<MetaOffset>) -> Clusters<MetaOffset> {
        let old = Clusters { start: self.table_offset, count: self.table_clusters };
        self.table_offset = place.start;
        self.table_clusters = place.count;
        self.is_moved = true;
        old
    }

    /// The whole table in file form, as long as its place.
    pub(crate) fn encode_table(&self) -> Vec<u8> {
        let len = self.table_clusters * self.geometry.cluster_size();
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        bytes.extend(self.table.iter().flat_map(|slot| slot.to_be_bytes()));
        bytes.resize(usize::try_from(len).expect("at most 8 MiB"), 0);
        bytes
    }

    /// One piece of the table in file form.
    pub(crate) fn encode_slots(&self, piece: usize) -> Vec<u8> {
        let first = piece * (SLOT_PIECE / 8);
        let slots = self.table[first.min(self.table.len())..].iter().take(SLOT_PIECE / 8);
        let mut bytes: Vec<u8> = slots.flat_map(|slot| slot.to_be_bytes()).collect();
        bytes.resize(SLOT_PIECE, 0);
        bytes
    }
}

fn table_full(geometry: &Geometry) -> NeedMeta {
    NeedMeta::Fail(
        Error::new(
            ErrorKind::LimitExceeded,
            "the image file is full: its refcount table may not exceed 8 MiB; use larger clusters or narrower refcounts",
        )
        .field("cluster size", geometry.cluster_size()),
    )
}
