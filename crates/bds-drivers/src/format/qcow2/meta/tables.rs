//! The L1 table and the cached slices of L2 tables in memory, found and read without a lock.
//!
//! An L2 table is cached in *slices* (a power of two of bytes, at most a cluster). Words are kept
//! in host order as atomics, so that a reader loads an entry while a writer changes another one. A
//! reader never stores anything here but the "used" mark; words and slots are changed only under
//! the lock of `Meta`.
//!
//! An extended entry is two words. A writer makes the slice's sequence odd while it changes one; a
//! reader that saw an odd or a changed sequence reads again. Writers do nothing else meanwhile, so
//! the wait is a few instructions.
//!
//! A slice that was evicted and loaded again exists twice for a moment: a reader may go on with the
//! old copy. That is the same as having loaded the entry earlier, and covered by the same argument
//! (`srcu.rs`).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use arc_swap::{ArcSwapOption, Guard};

use crate::format::qcow2::layout::entry::{L1Entry, L2Entry};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::layout::units::Geometry;

/// L1 entries of one page, pages of one directory, directories: together the largest L1 table there
/// is (32 MiB).
const PAGE_LEN: usize = 512;
const DIR_LEN: usize = 128;
const DIRS: usize = 64;
/// Bytes of the L1 table that are written as one piece.
pub(super) const L1_PIECE: u64 = 512;

/// Names one slice: which table, which piece of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SliceId {
    pub table: u32,
    pub piece: u32,
}

/// One cached piece of an L2 table.
#[derive(Debug)]
pub(crate) struct Slice {
    words: Box<[AtomicU64]>,
    /// Bit i: entry i was checked against the counts, or came from a write through this image
    /// (`offset_check.rs`).
    checked: Box<[AtomicU64]>,
    is_extended: bool,
    sequence: AtomicU32,
    used: AtomicBool,
}

impl Slice {
    /// A piece of `len` bytes without entries.
    pub(crate) fn empty(len: usize, is_extended: bool) -> Self {
        Self::of_words((0..len / 8).map(|_| AtomicU64::new(0)).collect(), is_extended)
    }

    /// From the bytes of the file.
    pub(crate) fn decode(bytes: &[u8], is_extended: bool) -> Self {
        let words = bytes.as_chunks().0.iter().map(|b| AtomicU64::new(u64::from_be_bytes(*b)));
        Self::of_words(words.collect(), is_extended)
    }

    fn of_words(words: Box<[AtomicU64]>, is_extended: bool) -> Self {
        let entries = words.len() / if is_extended { 2 } else { 1 };
        let checked = (0..entries.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (sequence, used) = (AtomicU32::new(0), AtomicBool::new(true));
        Self { words, checked, is_extended, sequence, used }
    }

    /// Was the entry checked? To be read before the entry is loaded: an entry that replaces it
    /// later comes from a write through this image.
    #[inline]
    pub(crate) fn is_checked(&self, index: usize) -> bool {
        self.checked[index / 64].load(Ordering::Acquire) >> (index % 64) & 1 == 1
    }

    /// Marks an entry as checked, or written through this image. Only under the lock of `Meta`.
    pub(crate) fn note_checked(&self, index: usize) {
        self.checked[index / 64].fetch_or(1 << (index % 64), Ordering::Release);
    }

    /// The bytes of the file from `start` on; fills `out`.
    pub(crate) fn encode(&self, start: usize, out: &mut [u8]) {
        let words = &self.words[start / 8..];
        for (bytes, word) in out.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = word.load(Ordering::Relaxed).to_be_bytes();
        }
    }

    #[inline]
    pub(crate) fn entry(&self, index: usize) -> L2Entry {
        if !self.is_extended {
            return L2Entry::standard(self.words[index].load(Ordering::Acquire));
        }
        loop {
            let before = self.sequence.load(Ordering::Acquire);
            let word = self.words[index * 2].load(Ordering::Relaxed);
            let bitmap = self.words[index * 2 + 1].load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            if before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before {
                return L2Entry { word, bitmap };
            }
            std::hint::spin_loop();
        }
    }

    /// How many clusters from entry `first` on, at most `most`, are not allocated, as far as one
    /// word an entry tells: in an extended table none does.
    pub(crate) fn count_unallocated(&self, first: usize, most: usize) -> usize {
        if self.is_extended {
            return 0;
        }
        let is_zero = |word: &&AtomicU64| word.load(Ordering::Acquire) == 0;
        self.words[first..].iter().take(most).take_while(is_zero).count()
    }

    /// Changes an entry. Only under the lock of `Meta`.
    pub(crate) fn set_entry(&self, index: usize, entry: L2Entry) {
        if !self.is_extended {
            self.words[index].store(entry.word, Ordering::Release);
            return;
        }
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.words[index * 2].store(entry.word, Ordering::Relaxed);
        self.words[index * 2 + 1].store(entry.bitmap, Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// Marks it used since the eviction clock last passed.
    #[inline]
    pub(crate) fn touch(&self) {
        // Look first: a store would take the cache line from all other readers.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Was it used since the last call?
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }
}

type Slots = Box<[ArcSwapOption<Slice>]>;

struct Page {
    words: [AtomicU64; PAGE_LEN],
    slots: [OnceLock<Slots>; PAGE_LEN],
}

type Dir = Box<[OnceLock<Box<Page>>]>;

/// The L1 table with, behind each entry, the cached slices of its L2 table.
pub(crate) struct Tables {
    dirs: Box<[OnceLock<Dir>]>,
    slices_per_table: usize,
    /// Guest bytes one slice maps, as a shift.
    slice_span_bits: u32,
    /// Guest bytes one table maps, as a shift.
    table_span_bits: u32,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("slices_per_table", &self.slices_per_table).finish()
    }
}

impl Tables {
    /// An empty L1 table. `slice_len`: bytes of a slice, a power of two, at most a cluster.
    pub(crate) fn new(geometry: &Geometry, slice_len: usize) -> Self {
        let entries = slice_len / geometry.l2_entry_len();
        Self {
            dirs: (0..DIRS).map(|_| OnceLock::new()).collect(),
            slices_per_table: geometry.cluster_len() / slice_len,
            slice_span_bits: geometry.cluster_bits() + entries.trailing_zeros(),
            table_span_bits: geometry.l2_span_bits(),
        }
    }

    /// The slice that maps `guest`; `None` if no L1 table can reach it.
    #[inline]
    pub(crate) fn slice_id(&self, guest: u64) -> Option<SliceId> {
        let table = u32::try_from(guest >> self.table_span_bits).ok()?;
        let pieces = u64::try_from(self.slices_per_table).ok()?;
        let piece = u32::try_from((guest >> self.slice_span_bits) & (pieces - 1)).ok()?;
        Some(SliceId { table, piece })
    }

    /// Guest bytes that one slice maps.
    pub(crate) fn slice_span(&self) -> u64 {
        1 << self.slice_span_bits
    }

    pub(crate) fn slices_per_table(&self) -> usize {
        self.slices_per_table
    }

    #[inline]
    fn page(&self, table: u32) -> Option<&Page> {
        let page = table as usize / PAGE_LEN;
        let dir = self.dirs.get(page / DIR_LEN)?.get()?;
        dir[page % DIR_LEN].get().map(|page| &**page)
    }

    /// The L1 entry for table number `table`; zero where the table does not reach.
    #[inline]
    pub(crate) fn l1(&self, table: u32) -> L1Entry {
        match self.page(table) {
            Some(page) => L1Entry(page.words[table as usize % PAGE_LEN].load(Ordering::Acquire)),
            None => L1Entry(0),
        }
    }

    /// Changes an L1 entry. Only under the lock of `Meta` (or while opening).
    pub(crate) fn set_l1(&self, table: u32, entry: L1Entry) {
        if entry.0 == 0 && self.page(table).is_none() {
            return;
        }
        let page = self.page_or_new(table);
        page.words[table as usize % PAGE_LEN].store(entry.0, Ordering::Release);
    }

    /// Removes everything. Only under the lock of `Meta`, while no request is in flight.
    pub(crate) fn clear(&self) {
        let dirs = self.dirs.iter().filter_map(OnceLock::get).flatten();
        for page in dirs.filter_map(OnceLock::get) {
            page.words.iter().for_each(|word| word.store(0, Ordering::Release));
            let slots = page.slots.iter().filter_map(OnceLock::get);
            slots.flatten().for_each(|slot| slot.store(None));
        }
    }

    fn page_or_new(&self, table: u32) -> &Page {
        let page = table as usize / PAGE_LEN;
        let dir = self.dirs[page / DIR_LEN]
            .get_or_init(|| (0..DIR_LEN).map(|_| OnceLock::new()).collect());
        dir[page % DIR_LEN].get_or_init(|| {
            Box::new(Page {
                words: std::array::from_fn(|_| AtomicU64::new(0)),
                slots: std::array::from_fn(|_| OnceLock::new()),
            })
        })
    }

    /// The cached slice, borrowed for a moment.
    #[inline]
    pub(crate) fn slice(&self, id: SliceId) -> Option<Guard<Option<Arc<Slice>>>> {
        let slots = self.page(id.table)?.slots[id.table as usize % PAGE_LEN].get()?;
        Some(slots[id.piece as usize].load())
    }

    /// The cached slice, held: it is not evicted while a reference exists.
    pub(crate) fn hold(&self, id: SliceId) -> Option<Arc<Slice>> {
        self.slice(id).and_then(|guard| guard.clone())
    }

    /// Puts a slice in its slot, or empties the slot. Only under the lock of `Meta`.
    pub(crate) fn set_slice(&self, id: SliceId, slice: Option<Arc<Slice>>) {
        let page = self.page_or_new(id.table);
        let slots = page.slots[id.table as usize % PAGE_LEN]
            .get_or_init(|| (0..self.slices_per_table).map(|_| ArcSwapOption::empty()).collect());
        slots[id.piece as usize].store(slice);
    }
}

/// The active L1 table's place and which pieces of it differ from the file. The entries are in
/// `Tables`.
#[derive(Debug)]
pub(crate) struct L1State {
    pub offset: MetaOffset,
    pub entries: u32,
    /// Pieces of 512 bytes.
    pub(super) dirty: BTreeSet<u64>,
    /// The table as a whole has a new place that the header does not name yet.
    pub is_moved: bool,
}

impl L1State {
    pub(crate) fn new(offset: MetaOffset, entries: u32) -> Self {
        Self { offset, entries, dirty: BTreeSet::new(), is_moved: false }
    }

    /// Marks entry `table` as changed.
    pub(crate) fn mark(&mut self, table: u32) {
        self.dirty.insert(u64::from(table) * 8 / L1_PIECE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_round_trip_through_bytes() {
        for is_extended in [false, true] {
            let slice = Slice::empty(512, is_extended);
            let entry = L2Entry { word: 0x8000_0000_0005_0000, bitmap: 7 };
            let entry = if is_extended { entry } else { L2Entry::standard(entry.word) };
            slice.set_entry(3, entry);
            let mut bytes = vec![0; 512];
            slice.encode(0, &mut bytes);
            let again = Slice::decode(&bytes, is_extended);
            assert_eq!((again.entry(3), again.entry(2)), (entry, L2Entry::default()));
        }
    }

    #[test]
    fn a_slice_is_found_by_guest_offset() {
        let g = Geometry::new(16, false, 4).unwrap();
        let tables = Tables::new(&g, 4096);
        assert_eq!((tables.slices_per_table(), tables.slice_span()), (16, 32 << 20));
        let id = tables.slice_id((512 << 20) + (33 << 20)).unwrap();
        assert_eq!(id, SliceId { table: 1, piece: 1 });
        assert!(tables.hold(id).is_none());
        tables.set_slice(id, Some(Arc::new(Slice::empty(4096, false))));
        assert!(tables.hold(id).is_some());
        assert_eq!(tables.l1(4_194_303), L1Entry(0));
        tables.set_l1(4_194_303, L1Entry(1 << 16));
        assert_eq!(tables.l1(4_194_303), L1Entry(1 << 16));
        assert_eq!(tables.l1(u32::MAX), L1Entry(0));
    }
}
