//! Writes back dirty metadata in an order that keeps the image consistent after a crash.
//!
//! This is the only place that decides the order of metadata writes. All dirty metadata is taken at
//! once, as it is at one moment (a [`Batch`]), and written rank by rank; between two ranks stands a
//! flush if anything of a lower rank has been written since the last one:
//!
//! ```text
//! rank       what                                                       rules (docs/qcow2.md)
//! Body       refcount blocks with raised counts, a moved refcount       nothing points at these yet,
//!            table, L2 tables the L1 table does not name yet, a           or what points at them is in a
//!            moved L1 table                                              later rank: O1, O4, O5, O6, O7
//! Directory  slots of the refcount table, the header's pointer to it,   O6, O7, O8
//!            the dirty bit of lazy refcounts
//! Link       L2 entries, L1 entries, the header's pointer to the L1     O1, O3, O4, O5
//!            table, refcount blocks in which counts only fell
//! Size       the disk's length in the header                            O14
//! ```
//!
//! Before rank Link the *data* node is flushed too if a link points at copied bytes (O3; finding
//! F5), or at a new cluster of the image file itself: its count needs that flush anyway, and
//! without it the file may end before the cluster, or compressed bytes be missing, after a power
//! cut. O2 needs no place in this table: a count is lowered in memory only after the removal of the
//! pointer is durable (`release.rs`), so lowered counts depend on nothing. A batch that fails puts
//! back what was not written *and flushed*; dirty metadata is never dropped, and later batches
//! write the newest version.
//!
//! One batch at a time (`Image::write_back_lock`); the lock of `Meta` is held while a batch is
//! taken, never while it is written.

use std::sync::Arc;

use bds_core::error::{Error, ErrorKind, Result};
use bds_io::IoVec;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::refcounts::SLOT_PIECE;
use super::tables::{L1_PIECE, SliceId};
use crate::format::qcow2::alloc::freed::FreedRun;
use crate::format::qcow2::layout::entry::L1Entry;
use crate::format::qcow2::layout::header::{
    Header, INCOMPATIBLE_AT, Incompatible, L1_AT, REFTABLE_AT, SIZE_AT,
};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::layout::units::{all_pieces, joined_bits};
use crate::format::qcow2::state::{Image, Meta};

/// Writes of one rank in flight at once.
const WRITES_AT_ONCE: usize = 16;

/// The order of writes in a batch; see the module docs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Body,
    Directory,
    Link,
    Size,
}

const RANKS: [Rank; 4] = [Rank::Body, Rank::Directory, Rank::Link, Rank::Size];

/// The origin of a planned write, which becomes dirty again if the write fails.
#[derive(Clone, Copy, Debug)]
enum Source {
    Slice(SliceId, u64),
    Block(u64, u64, bool),
    Slots(usize),
    MovedTable,
    L1(u64),
    MovedL1,
    DirtyBit,
    Size(u64),
    /// Clearing the cluster of a new L2 table: done again as long as the table is not linked.
    Clear,
}

#[derive(Debug)]
enum Action {
    Write(Vec<u8>),
    Zero(u64),
}

#[derive(Debug)]
struct PlannedWrite {
    rank: Rank,
    offset: u64,
    action: Action,
    source: Source,
}

/// Metadata as it was at one moment, to be written in order.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    writes: Vec<PlannedWrite>,
    /// Tables that rank Link makes reachable.
    linked: Vec<u32>,
    /// Freed references whose pointers are removed once rank Link is durable.
    frees: Vec<FreedRun>,
    /// Links point at bytes that must be durable first, written since the last flush of the data
    /// node.
    needs_data_flush: bool,
}

impl Image {
    /// Is there anything to write, or being written?
    pub(crate) fn has_unwritten(&self, meta: &Meta) -> bool {
        let counts = self.writes_counts_now() && meta.counts.has_dirty();
        meta.pending_flush.is_writing
            || meta.slices.has_dirty()
            || !meta.slices.unlinked.is_empty()
            || !meta.l1.dirty.is_empty()
            || meta.l1.is_moved
            || meta.new_size.is_some()
            || !meta.frees.is_empty()
            || counts
    }

    /// With lazy refcounts, counts are written at close; until then the dirty bit is set.
    fn writes_counts_now(&self) -> bool {
        !self.config.load().lazy_refcounts
    }

    /// Writes all dirty metadata in order. Not necessarily durable when it returns, but ordered
    /// behind all it depends on. Must run to completion: callers put it in a task
    /// (`task::detach_on_drop`).
    pub(crate) async fn write_back(self: &Arc<Self>, with_counts: bool) -> Result<()> {
        let _lock = self.write_back_lock.lock().await;
        // The table's new place must be counted before the blocks are taken.
        self.plan(|image, meta| image.move_table(meta)).await?;
        let batch = {
            let mut meta = self.meta();
            let batch = self.take_batch(&mut meta, with_counts || self.writes_counts_now());
            meta.pending_flush.is_writing = true;
            batch
        };
        let result = self.write_batch(&batch).await;
        let mut meta = self.meta();
        meta.pending_flush.is_writing = false;
        let result = match result {
            Ok(()) => {
                meta.frees_written.extend(batch.frees);
                Ok(())
            }
            Err((done, error)) => {
                self.put_back(&mut meta, batch, done);
                Err(error)
            }
        };
        meta.slices.end_batch();
        meta.counts.end_batch();
        meta.slices.evict(&self.tables, false);
        meta.counts.evict();
        result
    }

    /// Everything dirty, as it is now.
    fn take_batch(&self, meta: &mut Meta, with_counts: bool) -> Batch {
        let mut batch = Batch::default();
        self.take_slices(meta, &mut batch);
        self.take_l1(meta, &mut batch);
        if with_counts {
            self.take_counts(meta, &mut batch);
        }
        let has_links = batch.writes.iter().any(|w| w.rank == Rank::Link);
        if has_links && self.config.load().lazy_refcounts && !meta.header.is_dirty_marked {
            meta.header.is_dirty_marked = true;
            meta.header.incompatible |= Incompatible::DIRTY;
            batch.push(
                Rank::Directory,
                INCOMPATIBLE_AT,
                meta.header.incompatible.bits().to_be_bytes().to_vec(),
                Source::DirtyBit,
            );
        }
        if let Some(size) = meta.new_size.take() {
            batch.push(Rank::Size, SIZE_AT, size.to_be_bytes().to_vec(), Source::Size(size));
        }
        batch.frees = std::mem::take(&mut meta.frees);
        batch.needs_data_flush = has_links && std::mem::take(&mut meta.pending_flush.data_flush);
        batch
    }

    fn take_slices(&self, meta: &mut Meta, batch: &mut Batch) {
        let cache = &mut meta.slices;
        let dirty = cache.take_dirty();
        batch.linked = cache.unlinked.keys().copied().collect();
        for (table, unlinked) in &cache.unlinked {
            let offset = self.table_offset(*table);
            let len = self.geometry().cluster_size();
            // The file must hold all of it, even if little of it is written: a table that the file
            // ends in has lost entries.
            if unlinked.needs_zeros || self.file.len() < offset + len {
                let action = Action::Zero(len);
                let source = Source::Clear;
                batch.writes.push(PlannedWrite { rank: Rank::Body, offset, action, source });
            }
        }
        let piece_len = cache.piece_len();
        for (id, mask) in dirty {
            let slice = self.tables.hold(id).expect("pinned slices are not evicted");
            let rank = if cache.is_unlinked(id.table) { Rank::Body } else { Rank::Link };
            let start = self.table_offset(id.table) + u64::from(id.piece) * cache.slice_len as u64;
            for (first, count) in joined_bits(mask) {
                let mut bytes = vec![0; count * piece_len];
                slice.encode(first * piece_len, &mut bytes);
                let pieces = all_pieces(count) << first;
                let offset = start + (first * piece_len) as u64;
                batch.push(rank, offset, bytes, Source::Slice(id, pieces));
            }
        }
    }

    /// Host offset of the L2 table of L1 entry `table`.
    fn table_offset(&self, table: u32) -> u64 {
        let place = self.tables.l1(table).table(self.geometry());
        place.ok().flatten().expect("a table with cached slices has a place").0
    }

    fn take_l1(&self, meta: &mut Meta, batch: &mut Batch) {
        let l1 = &mut meta.l1;
        let encode = |from: u32, count: u64| -> Vec<u8> {
            (u64::from(from)..u64::from(from) + count)
                .map(|table| self.tables.l1(u32::try_from(table).unwrap_or(u32::MAX)))
                .flat_map(|L1Entry(word)| word.to_be_bytes())
                .collect()
        };
        if l1.is_moved {
            l1.is_moved = false;
            l1.dirty.clear();
            let mut bytes = encode(0, u64::from(l1.entries));
            let whole = self.geometry().cluster_ceil(bytes.len() as u64).unwrap_or(0);
            bytes.resize(usize::try_from(whole).unwrap_or(bytes.len()), 0);
            batch.push(Rank::Body, l1.offset.0, bytes, Source::MovedL1);
            let pointer = Header::encode_l1(l1.entries, l1.offset.0).to_vec();
            batch.push(Rank::Link, L1_AT, pointer, Source::MovedL1);
        }
        for piece in std::mem::take(&mut l1.dirty) {
            let first = piece * (L1_PIECE / 8);
            let count = (u64::from(l1.entries) - first).min(L1_PIECE / 8);
            let bytes = encode(u32::try_from(first).unwrap_or(u32::MAX), count);
            batch.push(Rank::Link, l1.offset.0 + first * 8, bytes, Source::L1(piece));
        }
    }

    fn take_counts(&self, meta: &mut Meta, batch: &mut Batch) {
        for (index, block) in meta.counts.dirty_blocks() {
            // Counts that only fell may lag behind everything.
            let rank = if block.is_raised { Rank::Body } else { Rank::Link };
            let source = Source::Block(index, block.dirty(), block.is_raised);
            for (start, bytes) in block.dirty_pieces() {
                batch.push(rank, block.offset.0 + start as u64, bytes.to_vec(), source);
            }
            block.begin_writing();
        }
        let counts = &mut meta.counts;
        if counts.is_moved {
            counts.is_moved = false;
            counts.dirty_slots.clear();
            let table = counts.encode_table();
            batch.push(Rank::Body, counts.table_offset.0, table, Source::MovedTable);
            let clusters = u32::try_from(counts.table_clusters).expect("at most 16384");
            let pointer = Header::encode_reftable(counts.table_offset.0, clusters).to_vec();
            batch.push(Rank::Directory, REFTABLE_AT, pointer, Source::MovedTable);
        }
        for piece in std::mem::take(&mut counts.dirty_slots) {
            let bytes = counts.encode_slots(piece);
            let offset = counts.table_offset.0 + (piece * SLOT_PIECE) as u64;
            batch.push(Rank::Directory, offset, bytes, Source::Slots(piece));
        }
    }

    /// Writes rank by rank. On failure: the first rank that may not be durable, and the error.
    async fn write_batch(
        self: &Arc<Self>,
        batch: &Batch,
    ) -> std::result::Result<(), (Rank, Error)> {
        let mut not_done = Rank::Body;
        for rank in RANKS {
            if !batch.writes.iter().any(|w| w.rank == rank) {
                continue;
            }
            if rank > Rank::Body {
                self.flush_before(rank, batch).await.map_err(|e| (not_done, e))?;
                not_done = rank;
            }
            if rank == Rank::Link {
                // From here on the file may name these tables.
                let mut meta = self.meta();
                for table in &batch.linked {
                    meta.slices.unlinked.remove(table);
                }
            }
            // Once before, in case it fails half-way; once after, so that a flush that began
            // meanwhile does not count.
            self.note_rank_written(rank);
            self.write_rank(rank, batch).await.map_err(|e| (not_done, e))?;
            self.note_rank_written(rank);
        }
        Ok(())
    }

    /// The flushes that must stand before `rank`.
    async fn flush_before(&self, rank: Rank, batch: &Batch) -> Result<()> {
        let is_link = rank >= Rank::Link;
        let data = self.data_file.as_ref().filter(|_| is_link && batch.needs_data_flush);
        let needs_file_flush = self.data_file.is_none() && is_link && batch.needs_data_flush;
        if let Some(data) = data {
            data.flush().await.map_err(|e| self.name_error(e))?;
        }
        let needs_flush = {
            let meta = self.meta();
            // The size may only be seen with all that precedes it.
            meta.pending_flush.needs_meta_flush() || needs_file_flush || rank == Rank::Size
        };
        if needs_flush {
            self.flush_meta().await?;
        }
        Ok(())
    }

    /// Flushes the image file; no flush is needed any more for what had been written when it began.
    pub(crate) async fn flush_meta(&self) -> Result<()> {
        let before = self.meta().pending_flush.written();
        self.file.flush().await.map_err(|e| self.name_error(e))?;
        self.meta().pending_flush.note_flushed(before);
        Ok(())
    }

    fn note_rank_written(&self, rank: Rank) {
        if rank < Rank::Link {
            self.meta().pending_flush.note_written();
        }
    }

    async fn write_rank(&self, rank: Rank, batch: &Batch) -> Result<()> {
        let clears = batch.writes.iter().filter(|w| w.rank == rank);
        for planned in clears {
            if let Action::Zero(len) = planned.action {
                self.zero_file(MetaOffset(planned.offset), len).await?;
            }
        }
        let mut writes = joined_writes(&batch.writes, rank).into_iter();
        let mut under_way = FuturesUnordered::new();
        let mut worst: Option<Error> = None;
        loop {
            while under_way.len() < WRITES_AT_ONCE {
                let Some((offset, bytes)) = writes.next() else { break };
                under_way.push(self.file.write(MetaOffset(offset), IoVec::from(bytes)));
            }
            match under_way.next().await {
                None => break,
                Some(Ok(())) => {}
                Some(Err(error)) => worst = Some(worse(worst, error)),
            }
        }
        worst.map_or(Ok(()), |e| Err(self.name_error(e)))
    }

    /// What was not written becomes dirty again.
    fn put_back(&self, meta: &mut Meta, batch: Batch, not_done: Rank) {
        for planned in batch.writes.iter().filter(|w| w.rank >= not_done) {
            match planned.source {
                Source::Slice(id, pieces) => meta.slices.mark_pieces(id, pieces),
                Source::Block(index, pieces, is_raised) => {
                    let block = meta.counts.resident(index);
                    let block = block.expect("blocks of a batch under way are pinned");
                    block.write_again(pieces, is_raised);
                }
                Source::Slots(piece) => drop(meta.counts.dirty_slots.insert(piece)),
                Source::MovedTable => meta.counts.is_moved = true,
                Source::L1(piece) => drop(meta.l1.dirty.insert(piece)),
                Source::MovedL1 => meta.l1.is_moved = true,
                Source::DirtyBit => meta.header.is_dirty_marked = false,
                Source::Size(size) => meta.new_size = meta.new_size.or(Some(size)),
                Source::Clear => {}
            }
        }
        meta.pending_flush.data_flush |= batch.needs_data_flush;
        let newer = std::mem::replace(&mut meta.frees, batch.frees);
        meta.frees.extend(newer);
    }
}

impl Batch {
    fn push(&mut self, rank: Rank, offset: u64, bytes: Vec<u8>, source: Source) {
        self.writes.push(PlannedWrite { rank, offset, action: Action::Write(bytes), source });
    }
}

/// The writes of a rank in the order of the file, neighbours joined.
fn joined_writes(writes: &[PlannedWrite], rank: Rank) -> Vec<(u64, Vec<u8>)> {
    let mut pieces: Vec<(u64, &[u8])> = writes
        .iter()
        .filter(|w| w.rank == rank)
        .filter_map(|w| match &w.action {
            Action::Write(bytes) => Some((w.offset, &bytes[..])),
            Action::Zero(_) => None,
        })
        .collect();
    pieces.sort_unstable_by_key(|(offset, _)| *offset);
    let mut joined: Vec<(u64, Vec<u8>)> = Vec::with_capacity(pieces.len());
    for (offset, bytes) in pieces {
        match joined.last_mut() {
            Some((start, all)) if *start + all.len() as u64 == offset && all.len() < 1 << 20 => {
                all.extend_from_slice(bytes);
            }
            _ => joined.push((offset, bytes.to_vec())),
        }
    }
    joined
}

/// Of two errors the one to report: the first, but a full disk before all others.
fn worse(first: Option<Error>, second: Error) -> Error {
    match first {
        Some(first) if first.kind() == ErrorKind::NoSpace => first,
        Some(_) if second.kind() == ErrorKind::NoSpace => second,
        Some(first) => first,
        None => second,
    }
}

#[cfg(test)]
#[path = "tests/write_back.rs"]
mod tests;
