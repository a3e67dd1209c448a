//! `HBitmap`: one bit for each granule of a range of bytes, set by many threads without a lock.
//!
//! ```text
//! pages   [ • ] [   ] [ • ] …      one for each 32,768 granules, allocated when its first bit is set
//!           │           └─ words   512 × 64 bits; bit n of word w is granule 64 w + n of the page
//!           └─ count               set bits of the page: pages without any are skipped by searches
//! ```
//!
//! Setting a bit is one atomic read-modify-write, also where the bit is set already: a plain load
//! could be answered before the bytes that were written become visible, while a job that claims the
//! bit reads the old bytes, and that write would never be copied. For the same reason a job must
//! claim bits (see [`HBitmap::claim`]) before it reads the bytes.
//!
//! A request that has counted its write with a `SeqCst` read-modify-write (`HBitmap::record`) needs
//! no second one where the bit is set: its `SeqCst` load is not answered before the count is
//! visible, and with it the bytes. If the load finds the bit set, it comes before the exchange that
//! claims the bit, and the fence behind that exchange comes before the claimer's reads.
//!
//! All accesses to words are `SeqCst`, which costs nothing where the machine locks the bus anyway:
//! a thread that sets a bit and then looks at another variable, and one that changes that variable
//! and then looks at the bit, do not both miss the other (`graph::bitmaps::recorder` needs that).
//!
//! A page's count is raised before its bits are set and lowered after they are cleared, so a page
//! with a dirty granule never counts as clean. It is exact whenever no other thread changes the
//! bitmap.
//!
//! The length can change in place. Pages for the first length are one array; those of later growth
//! are in segments, each twice as long as the one before, so that no page ever moves.

use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::error::{Error, ErrorKind, Result};

/// Smallest granularity, in bytes.
pub const MIN_GRANULARITY: u32 = 1 << 9;
/// Largest granularity, in bytes.
pub const MAX_GRANULARITY: u32 = 1 << 31;
/// Most granules of one bitmap: 512 MiB of bits, which is also the most that qcow2 stores.
pub const MAX_GRANULES: u64 = 1 << 32;

/// Granules of a word.
pub(super) const WORD: u64 = 64;
const WORDS: usize = 512;
/// Granules of a page.
pub(super) const PAGE: u64 = WORD * WORDS as u64;

/// Part of a bitmap that is allocated as a whole.
pub(super) struct Page {
    words: [AtomicU64; WORDS],
    /// Set bits in `words`.
    count: AtomicU32,
}

impl Page {
    fn new() -> Box<Self> {
        Box::new(Self { words: [const { AtomicU64::new(0) }; WORDS], count: AtomicU32::new(0) })
    }

    /// Sets bits of a word. `COUNTED`: the caller has counted the write, see the module.
    #[inline]
    fn set<const COUNTED: bool>(&self, word: usize, mask: u64) {
        let bits = &self.words[word];
        let known = bits.load(Ordering::SeqCst);
        if mask & !known == 0
            // They are set. The exchange of equal values is the read-modify-write that the module
            // asks for.
            && (COUNTED
                || bits.compare_exchange(known, known, Ordering::SeqCst, Ordering::Relaxed).is_ok())
        {
            return;
        }
        self.count.fetch_add(mask.count_ones(), Ordering::Relaxed);
        // Releases the bytes that were written before, for a thread that claims the bit afterwards.
        let surplus = self.words[word].fetch_or(mask, Ordering::SeqCst) & mask;
        if surplus != 0 {
            self.count.fetch_sub(surplus.count_ones(), Ordering::Relaxed);
        }
    }

    /// Clears bits of a word and returns those that were set.
    pub(super) fn take(&self, word: usize, mask: u64) -> u64 {
        // Acquires: bytes written before the bits were set are visible to the caller afterwards.
        let taken = self.words[word].fetch_and(!mask, Ordering::SeqCst) & mask;
        if taken != 0 {
            self.count.fetch_sub(taken.count_ones(), Ordering::Relaxed);
            // And the bytes of writes that found the bits set and left them: see the module.
            fence(Ordering::SeqCst);
        }
        taken
    }

    pub(super) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::SeqCst)
    }

    pub(super) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }
}

/// Tracks which granules of `len` bytes are dirty. All methods but the constructors take `&self`
/// and may be called from any thread at any time; none blocks, and only setting the first bit of a
/// page allocates (4 KiB for each 32,768 granules).
///
/// ```
/// use bds_core::bitmap::HBitmap;
///
/// let bitmap = HBitmap::new(1 << 30, 65536)?;
/// bitmap.set(100_000..100_512);                    // a guest write
/// assert_eq!(bitmap.dirty_bytes(), 65536);
/// let area = bitmap.claim(0..1 << 30, u64::MAX);   // a backup takes what is to be copied …
/// assert_eq!(area, Some(65536..131_072));
/// assert_eq!(bitmap.dirty_bytes(), 0);             // … and copies it
/// # Ok::<(), bds_core::Error>(())
/// ```
pub struct HBitmap {
    len: AtomicU64,
    /// log2 of the granularity.
    shift: u32,
    /// Pages for the first length.
    pages: Pages,
    /// Pages of later growth: segment n has `GROWTH << n` of them.
    grown: [OnceLock<Pages>; SEGMENTS],
}

type Pages = Box<[OnceLock<Box<Page>>]>;

/// Pages of the first segment of growth.
const GROWTH: usize = 16;
/// Segments that suffice for a node of 2^63 bytes with the smallest granularity.
const SEGMENTS: usize = 36;

fn empty_pages(count: usize) -> Pages {
    (0..count).map(|_| OnceLock::new()).collect()
}

/// The segment of growth that has page `number`, counted from the first page of growth, and the
/// page's place in it.
fn segment_of(number: usize) -> (usize, usize) {
    let segment = (number / GROWTH + 1).ilog2() as usize;
    (segment, number - GROWTH * ((1 << segment) - 1))
}

impl HBitmap {
    /// A clean bitmap for `len` bytes, of which each `granularity` bytes share a bit.
    ///
    /// # Errors
    /// `InvalidInput`: the granularity is no power of two from [`MIN_GRANULARITY`] to
    /// [`MAX_GRANULARITY`]. `LimitExceeded`: there would be more than [`MAX_GRANULES`] granules.
    pub fn new(len: u64, granularity: u32) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < MIN_GRANULARITY {
            let text = "a granularity is a power of two from 512 to 2147483648 bytes";
            return Err(Error::new(ErrorKind::InvalidInput, text).field("granularity", granularity));
        }
        let granules = len.div_ceil(u64::from(granularity));
        if granules > MAX_GRANULES {
            let text = format!(
                "a bitmap of {len} bytes would have more than 2^32 granules; choose a larger granularity"
            );
            return Err(
                Error::new(ErrorKind::LimitExceeded, text).field("granularity", granularity)
            );
        }
        let pages = empty_pages(page_of(granules.next_multiple_of(PAGE)));
        let grown = [const { OnceLock::new() }; SEGMENTS];
        Ok(Self { len: AtomicU64::new(len), shift: granularity.trailing_zeros(), pages, grown })
    }

    /// Bytes that the bitmap covers.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    /// Changes the length in place: granules behind the shorter of both lengths are clean
    /// afterwards. Meant for a moment at which no thread sets bits there. More than
    /// [`MAX_GRANULES`] granules are possible: the directory of pages takes 16 bytes for each
    /// 32,768.
    ///
    /// ```
    /// use bds_core::bitmap::HBitmap;
    ///
    /// let bitmap = HBitmap::new(1 << 20, 65536)?;
    /// bitmap.set_all();
    /// bitmap.set_len(2 << 20);
    /// assert_eq!((bitmap.len(), bitmap.dirty_bytes()), (2 << 20, 1 << 20));
    /// bitmap.set_len(65536);
    /// assert_eq!((bitmap.len(), bitmap.dirty_bytes()), (65536, 65536));
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn set_len(&self, len: u64) {
        let before = self.granules();
        self.len.store(len, Ordering::Relaxed);
        self.each_word(self.granules()..before, |page, word, mask| {
            page.take(word, mask);
        });
    }

    /// As [`HBitmap::set_len`], unless it is as long already; from several threads at once.
    pub(crate) fn grow(&self, len: u64) {
        self.len.fetch_max(len, Ordering::Relaxed);
    }

    /// Whether it covers no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that share a bit: a power of two.
    pub fn granularity(&self) -> u32 {
        1 << self.shift
    }

    /// Granules, the last of which may be shorter than the others.
    pub fn granules(&self) -> u64 {
        self.len().div_ceil(1 << self.shift)
    }

    /// Number of dirty granules.
    pub fn dirty_granules(&self) -> u64 {
        self.present_pages().map(|(_, page)| u64::from(page.count())).sum()
    }

    /// Dirty granules times the granularity, in bytes; a short last granule counts as a whole one,
    /// as in QEMU's `count`.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_granules() << self.shift
    }

    /// Marks every granule that the byte range touches. What lies beyond the end is ignored.
    #[inline]
    pub fn set(&self, range: Range<u64>) {
        self.mark::<false>(range);
    }

    /// As [`HBitmap::set`], for a thread that executed a `SeqCst` read-modify-write after the bytes
    /// were written: see the module.
    #[inline]
    pub(crate) fn record(&self, range: Range<u64>) {
        self.mark::<true>(range);
    }

    #[inline]
    fn mark<const COUNTED: bool>(&self, range: Range<u64>) {
        let len = self.len();
        if range.start >= range.end || range.start >= len {
            return;
        }
        let first = range.start >> self.shift;
        let last = (range.end.min(len) - 1) >> self.shift;
        if first == last {
            return self.page(first).set::<COUNTED>(word_of(first), bit_of(first));
        }
        self.mark_granules::<COUNTED>(first..last + 1);
    }

    /// Marks all granules of the bitmap.
    pub fn set_all(&self) {
        self.set_granules(0..self.granules());
    }

    /// Cleans every granule that lies wholly in the byte range; a short last granule does if the
    /// range reaches the end.
    pub fn clear(&self, range: Range<u64>) {
        let end = if range.end >= self.len() { self.granules() } else { range.end >> self.shift };
        let start = range.start.div_ceil(1 << self.shift);
        self.each_word(start..end, |page, word, mask| {
            page.take(word, mask);
        });
    }

    /// Whether the granule that holds this byte is dirty. False beyond the end.
    pub fn is_dirty(&self, offset: u64) -> bool {
        if offset >= self.len() {
            return false;
        }
        let granule = offset >> self.shift;
        self.present(granule).is_some_and(|page| page.word(word_of(granule)) & bit_of(granule) != 0)
    }

    /// Marks what is dirty in `from`. Granularities may differ: a dirty granule of `from` marks
    /// every granule that it touches. Bits set in `from` meanwhile may or may not be taken along.
    ///
    /// # Errors
    /// `InvalidInput`: the lengths differ. Nothing has changed.
    pub fn merge(&self, from: &Self) -> Result<()> {
        let (len, other) = (self.len(), from.len());
        if len != other {
            let text = format!(
                "Bitmaps are of different sizes (destination size is {len}, source size is {other}) and can't be merged"
            );
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        self.take_over(from);
        Ok(())
    }

    /// A copy for `len` bytes: what lies beyond is dropped, what is new is clean. Meant for a
    /// moment at which no thread sets bits.
    ///
    /// # Errors
    /// As [`HBitmap::new`].
    pub fn resized(&self, len: u64) -> Result<Self> {
        let other = Self::new(len, self.granularity())?;
        other.take_over(self);
        Ok(other)
    }

    /// Marks what is dirty in `from`, as far as both reach.
    pub(crate) fn take_over(&self, from: &Self) {
        if self.shift != from.shift {
            return from.areas(0..from.len()).for_each(|area| self.set(area));
        }
        // Pairs with the fence after a page was allocated.
        fence(Ordering::SeqCst);
        let granules = self.granules();
        for (number, page) in from.present_pages().filter(|(_, page)| page.count() > 0) {
            let start = number as u64 * PAGE;
            if start >= granules {
                break;
            }
            for word in 0..WORDS {
                let first = start + word as u64 * WORD;
                let mask = page.word(word) & mask_of(first, granules);
                if mask != 0 {
                    self.page(first).set::<false>(word, mask);
                }
            }
        }
    }

    // ---- granules

    pub(super) fn shift(&self) -> u32 {
        self.shift
    }

    /// Marks granules, which must exist.
    pub(super) fn set_granules(&self, range: Range<u64>) {
        self.mark_granules::<false>(range);
    }

    fn mark_granules<const COUNTED: bool>(&self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % WORD + WORD).min(range.end);
            self.page(at).set::<COUNTED>(
                word_of(at),
                mask_of(at - at % WORD, end) & (u64::MAX << (at % WORD)),
            );
            at = end;
        }
    }

    /// Calls `f` for each word of the granules whose page exists, with the mask of the bits in
    /// question.
    pub(super) fn each_word(&self, range: Range<u64>, mut f: impl FnMut(&Page, usize, u64)) {
        let mut at = range.start;
        while at < range.end {
            let Some(page) = self.present(at) else {
                at = at - at % PAGE + PAGE;
                continue;
            };
            let end = (at - at % WORD + WORD).min(range.end);
            f(page, word_of(at), mask_of(at - at % WORD, end) & (u64::MAX << (at % WORD)));
            at = end;
        }
    }

    /// The page of a granule that exists, allocated if need be.
    #[inline]
    fn page(&self, granule: u64) -> &Page {
        match self.present(granule) {
            Some(page) => page,
            None => self.allocate(page_of(granule)),
        }
    }

    #[cold]
    fn allocate(&self, number: usize) -> &Page {
        let place = match number.checked_sub(self.pages.len()) {
            None => &self.pages[number],
            Some(number) => {
                let (segment, place) = segment_of(number);
                &self.grown[segment].get_or_init(|| empty_pages(GROWTH << segment))[place]
            }
        };
        let page = place.get_or_init(Page::new);
        fence(Ordering::SeqCst);
        page
    }

    /// The page of a granule, if any bit of it was ever set.
    #[inline]
    pub(super) fn present(&self, granule: u64) -> Option<&Page> {
        let number = page_of(granule);
        let place = match self.pages.get(number) {
            Some(place) => place,
            None => {
                let (segment, place) = segment_of(number - self.pages.len());
                self.grown.get(segment)?.get()?.get(place)?
            }
        };
        place.get().map(|page| &**page)
    }

    /// The pages that exist, by number.
    fn present_pages(&self) -> impl Iterator<Item = (usize, &Page)> {
        let grown = self.grown.iter().enumerate().flat_map(|(segment, pages)| {
            let first = self.pages.len() + GROWTH * ((1 << segment) - 1);
            pages.get().into_iter().flatten().enumerate().map(move |(n, page)| (first + n, page))
        });
        let all = self.pages.iter().enumerate().chain(grown);
        all.filter_map(|(number, page)| Some((number, &**page.get()?)))
    }
}

fn page_of(granule: u64) -> usize {
    (granule / PAGE) as usize
}

pub(super) fn word_of(granule: u64) -> usize {
    (granule % PAGE / WORD) as usize
}

fn bit_of(granule: u64) -> u64 {
    1 << (granule % WORD)
}

/// The bits of the word that begins at granule `first` which lie before granule `end`.
fn mask_of(first: u64, end: u64) -> u64 {
    match end.saturating_sub(first) {
        0 => 0,
        bits @ 1..WORD => (1 << bits) - 1,
        _ => u64::MAX,
    }
}

impl fmt::Debug for HBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HBitmap")
            .field("len", &self.len())
            .field("granularity", &self.granularity())
            .field("dirty_bytes", &self.dirty_bytes())
            .finish()
    }
}
