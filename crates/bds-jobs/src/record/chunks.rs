//! `ChunkMap`: what is known of each chunk of a copy's target.
//!
//! ```text
//!               written              taken            flushed
//! Changed ─────────────────► Held ─────────► Flushing ───────► Flushed ──► may be in the record
//!    ▲                        │                 │                │
//!    └──── begin a write ─────┴─────────────────┴────────────────┴── Inherited (the record says so)
//! ```
//!
//! A chunk whose flush failed is `Changed`: the system may have dropped what it could not write. A
//! chunk is in the record only while it is `Flushed` or `Inherited`; `stored` has a bit for each
//! that the record's file may say something about, so that it is taken out there, durably, before
//! its bytes change.

use std::collections::BTreeSet;

use bds_core::{Error, ErrorKind, Result};

use super::format::{PAGE_CHUNKS, PAGE_HASHES, RecordPage};
use crate::manifest::ContentHash;

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Known {
    /// Nothing, and it was not written.
    #[default]
    Untouched,
    /// It was written in part, or is being written.
    Changed,
    /// What it is to hold, found by reading; not written by this copy.
    Read,
    /// Written as a whole, not flushed.
    Held,
    /// As `Held`, and a flush of the target is under way.
    Flushing,
    /// Written and flushed.
    Flushed,
    /// A record says that it holds this.
    Inherited,
}

impl Known {
    /// True if the hash is that of what this copy wrote, or found to be there.
    pub(super) fn is_sure(self) -> bool {
        matches!(self, Self::Held | Self::Flushing | Self::Flushed)
    }

    /// True if it may be in the record.
    fn is_durable(self) -> bool {
        matches!(self, Self::Flushed | Self::Inherited)
    }
}

/// The chunks of one page of the record.
#[derive(Clone)]
struct Page {
    known: [Known; PAGE_HASHES],
    /// One bit a chunk: the record's file may know it.
    stored: u128,
    /// Of the last version that was stored, or may have been.
    sequence: u64,
    /// Absent while all hashes are those of zeros.
    hashes: Option<Box<[ContentHash; PAGE_HASHES]>>,
}

impl Default for Page {
    fn default() -> Self {
        Self { known: [Known::default(); PAGE_HASHES], stored: 0, sequence: 0, hashes: None }
    }
}

impl Page {
    fn hash(&self, at: usize) -> ContentHash {
        self.hashes.as_ref().map_or(ContentHash::ZERO, |hashes| hashes[at])
    }

    fn set(&mut self, at: usize, known: Known, hash: ContentHash) {
        self.known[at] = known;
        match &mut self.hashes {
            Some(hashes) => hashes[at] = hash,
            None if hash == ContentHash::ZERO => {}
            None => {
                let mut hashes = Box::new([ContentHash::ZERO; PAGE_HASHES]);
                hashes[at] = hash;
                self.hashes = Some(hashes);
            }
        }
    }
}

/// See the module.
pub(super) struct ChunkMap {
    pages: Vec<Option<Box<Page>>>,
    /// Chunks of the image.
    count: u64,
    /// Pages with `Held` chunks.
    fresh: BTreeSet<usize>,
    /// Pages with `Flushing` chunks.
    flushing: BTreeSet<usize>,
    /// Pages with chunks that were flushed and are not stored.
    unstored: BTreeSet<u64>,
}

impl ChunkMap {
    /// A map of `count` chunks of which nothing is known.
    ///
    /// # Errors
    /// `LimitExceeded`: it does not fit into memory.
    pub(super) fn new(count: u64) -> Result<Self> {
        let mut pages = Vec::new();
        let len = usize::try_from(count.div_ceil(PAGE_CHUNKS)).ok();
        if len.is_none_or(|len| pages.try_reserve_exact(len).is_err()) {
            let message = "the image is too long for the hashes of its chunks in memory";
            return Err(Error::new(ErrorKind::LimitExceeded, message).field("chunks", count));
        }
        pages.resize_with(len.unwrap_or(0), || None);
        Ok(Self {
            pages,
            count,
            fresh: BTreeSet::new(),
            flushing: BTreeSet::new(),
            unstored: BTreeSet::new(),
        })
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    fn place(index: u64) -> (usize, usize) {
        let page = usize::try_from(index / PAGE_CHUNKS).expect("an index of the map");
        (page, usize::try_from(index % PAGE_CHUNKS).expect("less than a page has"))
    }

    fn page(&mut self, number: usize) -> &mut Page {
        self.pages[number].get_or_insert_default()
    }

    /// What is known of a chunk, and its hash.
    pub(super) fn get(&self, index: u64) -> (Known, ContentHash) {
        let (page, at) = Self::place(index);
        match &self.pages[page] {
            Some(page) => (page.known[at], page.hash(at)),
            None => (Known::Untouched, ContentHash::ZERO),
        }
    }

    /// The chunk is about to be written, with these bytes if it is written as a whole. True: the
    /// record's file may say that it holds others, so it has to be taken out first. Where it says
    /// the same, it stays right whatever part of the write a crash leaves.
    pub(super) fn begin(&mut self, index: u64, hash: Option<ContentHash>) -> bool {
        let (number, at) = Self::place(index);
        let page = self.page(number);
        let says_so = page.known[at].is_durable() && hash == Some(page.hash(at));
        page.known[at] = Known::Changed;
        page.stored & (1 << at) != 0 && !says_so
    }

    /// The chunk was written, or was found to hold this.
    pub(super) fn hold(&mut self, index: u64, hash: ContentHash) {
        let (number, at) = Self::place(index);
        self.page(number).set(at, Known::Held, hash);
        self.fresh.insert(number);
    }

    /// A record says that the chunk holds this.
    pub(super) fn inherit(&mut self, index: u64, hash: ContentHash) {
        let (number, at) = Self::place(index);
        self.page(number).set(at, Known::Inherited, hash);
    }

    /// What the record says of the chunk is right, and was flushed before it was recorded.
    pub(super) fn confirm(&mut self, index: u64) {
        let (number, at) = Self::place(index);
        let page = self.page(number);
        if page.known[at] == Known::Inherited {
            page.known[at] = Known::Flushed;
        }
    }

    /// The chunk reads as this, whatever it was written.
    pub(super) fn read(&mut self, index: u64, hash: ContentHash) {
        let (number, at) = Self::place(index);
        self.page(number).set(at, Known::Read, hash);
    }

    /// Forgets what a record says of a chunk. Its file says it still.
    pub(super) fn distrust(&mut self, index: u64) {
        let (number, at) = Self::place(index);
        let page = self.page(number);
        if page.known[at] == Known::Inherited {
            page.known[at] = Known::Changed;
        }
    }

    /// Takes over a page of a record.
    pub(super) fn load(&mut self, page: &RecordPage) {
        let Ok(number) = usize::try_from(page.number) else { return };
        if number >= self.pages.len() {
            return;
        }
        let first = page.number * PAGE_CHUNKS;
        for (index, hash) in (first..self.count).zip(&page.hashes) {
            if let Some(hash) = hash {
                self.inherit(index, *hash);
            }
        }
        let bits = page.known_bits();
        let mine = self.page(number);
        (mine.stored, mine.sequence) = (bits, page.sequence);
    }

    /// Begins a flush: returns whether it has anything to make durable for the record.
    pub(super) fn take_fresh(&mut self) -> bool {
        for number in std::mem::take(&mut self.fresh) {
            self.turn(number, Known::Held, Known::Flushing);
            self.flushing.insert(number);
        }
        !self.flushing.is_empty() || !self.unstored.is_empty()
    }

    /// The flush that began with [`ChunkMap::take_fresh`] succeeded.
    pub(super) fn flushed(&mut self) {
        for number in std::mem::take(&mut self.flushing) {
            self.turn(number, Known::Flushing, Known::Flushed);
            self.unstored.insert(number as u64);
        }
    }

    /// Takes the pages that are to be stored.
    pub(super) fn take_unstored(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.unstored)
    }

    /// Pages could not be stored: they are to be stored later.
    pub(super) fn not_stored(&mut self, pages: BTreeSet<u64>) {
        self.unstored.extend(pages);
    }

    /// The flush failed: nothing that was not flushed before counts as held.
    pub(super) fn flush_failed(&mut self) {
        for number in std::mem::take(&mut self.flushing) {
            self.turn(number, Known::Flushing, Known::Changed);
        }
        for number in std::mem::take(&mut self.fresh) {
            self.turn(number, Known::Held, Known::Changed);
        }
    }

    fn turn(&mut self, number: usize, from: Known, to: Known) {
        let known = self.page(number).known.iter_mut();
        known.filter(|known| **known == from).for_each(|known| *known = to);
    }

    /// Pages of these chunks of which the file may say what is no longer so.
    pub(super) fn outdated(&self, indices: &[u64]) -> BTreeSet<u64> {
        let is_outdated = |index: &&u64| {
            let (number, at) = Self::place(**index);
            self.pages[number]
                .as_ref()
                .is_some_and(|page| page.stored & (1 << at) != 0 && !page.known[at].is_durable())
        };
        indices.iter().filter(is_outdated).map(|index| index / PAGE_CHUNKS).collect()
    }

    /// A page as it is to be stored now. Until [`ChunkMap::stored`] the file may have either.
    pub(super) fn page_to_store(&mut self, number: u64) -> RecordPage {
        let page = self.page(usize::try_from(number).expect("a page of the map"));
        let hash = |at: usize| page.known[at].is_durable().then(|| page.hash(at));
        let hashes: Vec<_> = (0..PAGE_HASHES).map(hash).collect();
        page.sequence += 1;
        let version = RecordPage { number, sequence: page.sequence, hashes };
        page.stored |= version.known_bits();
        version
    }

    /// A page was stored durably.
    pub(super) fn stored(&mut self, stored: &RecordPage) {
        let page = self.page(usize::try_from(stored.number).expect("a page of the map"));
        page.stored = stored.known_bits();
    }

    /// Chunks of which a record says what they hold.
    pub(super) fn inherited(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for (number, page) in (0..).zip(&self.pages) {
            let Some(page) = page else { continue };
            let known = (0..).zip(&page.known).filter(|(_, known)| **known == Known::Inherited);
            found.extend(known.map(|(at, _): (u64, _)| number * PAGE_CHUNKS + at));
        }
        found
    }

    /// The first chunk from `from` on of which a record says what it holds.
    pub(super) fn next_inherited(&self, from: u64) -> Option<u64> {
        let (first, start) = Self::place(from);
        let is_inherited = |known: &Known| *known == Known::Inherited;
        self.pages.iter().enumerate().skip(first).find_map(|(number, page)| {
            let skipped = if number == first { start } else { 0 };
            let known = page.as_ref()?.known.get(skipped..)?;
            let at = skipped + known.iter().position(is_inherited)?;
            Some(number as u64 * PAGE_CHUNKS + at as u64)
        })
    }

    /// Chunks of which it is not known what they are to hold.
    pub(super) fn unknown(&self) -> Vec<u64> {
        let is_unknown = |index: &u64| {
            matches!(self.get(*index).0, Known::Untouched | Known::Changed | Known::Inherited)
        };
        (0..self.count).filter(is_unknown).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: ContentHash = ContentHash([4; 32]);

    fn flush(chunks: &mut ChunkMap) -> Vec<RecordPage> {
        chunks.take_fresh();
        chunks.flushed();
        let pages = chunks.take_unstored();
        let pages: Vec<_> = pages.into_iter().map(|number| chunks.page_to_store(number)).collect();
        pages.iter().for_each(|page| chunks.stored(page));
        pages
    }

    #[test]
    fn a_chunk_is_stored_only_if_a_flush_began_after_its_write() {
        let mut chunks = ChunkMap::new(300).unwrap();
        chunks.begin(5, Some(HASH));
        chunks.hold(5, HASH);
        assert!(chunks.take_fresh());
        // Written while the flush is under way.
        chunks.begin(200, Some(HASH));
        chunks.hold(200, HASH);
        chunks.flushed();
        assert_eq!(chunks.get(200).0, Known::Held);
        let pages = flush(&mut chunks);
        let known: Vec<u128> = pages.iter().map(RecordPage::known_bits).collect();
        assert_eq!(known, [1 << 5, 1 << (200 - 126)]);
    }

    #[test]
    fn a_write_during_the_flush_of_the_same_chunk_undoes_it() {
        let mut chunks = ChunkMap::new(10).unwrap();
        chunks.hold(5, HASH);
        chunks.take_fresh();
        chunks.begin(5, None);
        chunks.flushed();
        assert_eq!(chunks.get(5).0, Known::Changed);
    }

    #[test]
    fn a_failed_flush_leaves_nothing_of_what_it_covered_or_might_have_covered() {
        let mut chunks = ChunkMap::new(10).unwrap();
        chunks.hold(1, HASH);
        flush(&mut chunks);
        chunks.hold(2, HASH);
        chunks.take_fresh();
        chunks.hold(3, HASH);
        chunks.flush_failed();
        let known = [1, 2, 3].map(|index| chunks.get(index).0);
        assert_eq!(known, [Known::Flushed, Known::Changed, Known::Changed]);
        assert!(!chunks.take_fresh());
    }

    #[test]
    fn what_the_file_may_say_is_taken_out_before_it_changes() {
        let mut chunks = ChunkMap::new(10).unwrap();
        chunks.hold(1, HASH);
        assert!(!chunks.begin(1, None), "it was never stored");
        chunks.hold(1, HASH);
        flush(&mut chunks);
        assert!(!chunks.begin(1, Some(HASH)), "the file stays right whatever a crash leaves");
        chunks.hold(1, HASH);
        assert!(chunks.begin(1, Some(ContentHash::ZERO)), "it is not durable yet");
        assert_eq!(chunks.outdated(&[1, 2]), BTreeSet::from([0]));
        let without = chunks.page_to_store(0);
        assert_eq!(without.known_bits(), 0);
        assert_eq!(chunks.outdated(&[1]), BTreeSet::from([0]), "until the page is durable");
        chunks.stored(&without);
        assert!(chunks.outdated(&[1]).is_empty());
    }

    #[test]
    fn inherited_chunks_are_found_across_pages() {
        let mut chunks = ChunkMap::new(1000).unwrap();
        for index in [3, 125, 126, 900] {
            chunks.inherit(index, HASH);
        }
        assert_eq!(chunks.inherited(), [3, 125, 126, 900]);
        let next = [0, 3, 4, 126, 127, 900, 901].map(|from| chunks.next_inherited(from));
        let expected = [Some(3), Some(3), Some(125), Some(126), Some(900), Some(900), None];
        assert_eq!(next, expected);
        chunks.confirm(3);
        assert_eq!(chunks.next_inherited(0), Some(125));
        assert_eq!(chunks.unknown().len(), 999, "a confirmed one is known");
    }
}
