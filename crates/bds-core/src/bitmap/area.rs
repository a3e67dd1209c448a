//! Searches a bitmap for runs of dirty or clean granules, and claims runs for copying.
//!
//! Searches see every bit that was set before they began and is not cleared meanwhile; bits that
//! are set meanwhile may or may not be seen. Positions are bytes; runs begin and end at granule
//! boundaries, or at the end of the bitmap.

use std::iter;
use std::ops::Range;

use super::hbitmap::{HBitmap, PAGE, WORD, word_of};

impl HBitmap {
    /// The first dirty byte in the range: `range.start` if its granule is dirty, else the start of
    /// a granule.
    pub fn next_dirty(&self, range: Range<u64>) -> Option<u64> {
        let granules = self.granules_of(&range);
        let found = self.find(granules, true)?;
        Some((found << self.shift()).max(range.start))
    }

    /// The first clean byte in the range, as [`HBitmap::next_dirty`].
    pub fn next_clean(&self, range: Range<u64>) -> Option<u64> {
        let granules = self.granules_of(&range);
        let found = self.find(granules, false)?;
        Some((found << self.shift()).max(range.start))
    }

    /// The first run of dirty bytes in the range, of at most `max_len` bytes (at least a granule).
    pub fn next_area(&self, range: Range<u64>, max_len: u64) -> Option<Range<u64>> {
        let start = self.next_dirty(range.clone())?;
        let limit = start.saturating_add(max_len.max(u64::from(self.granularity())));
        let end = range.end.min(self.len()).min(limit);
        Some(start..self.next_clean(start..end).unwrap_or(end))
    }

    /// All runs of dirty bytes in the range, ascending.
    pub fn areas(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut rest = range;
        iter::from_fn(move || {
            let area = self.next_area(rest.clone(), u64::MAX)?;
            rest.start = area.end;
            Some(area)
        })
    }

    /// Whether the granule of `offset` is dirty, and for how many bytes from there on that holds,
    /// up to `end`. Length 0 at or beyond the end.
    pub fn status(&self, offset: u64, end: u64) -> (bool, u64) {
        let end = end.min(self.len());
        if offset >= end {
            return (false, 0);
        }
        let is_dirty = self.is_dirty(offset);
        let change = match is_dirty {
            true => self.next_clean(offset..end),
            false => self.next_dirty(offset..end),
        };
        (is_dirty, change.unwrap_or(end) - offset)
    }

    /// Cleans the first run of dirty granules that touches the range, of at most `max_len` bytes
    /// (at least a granule), and returns it: the caller has the duty to copy these bytes, or to
    /// [`HBitmap::set`] them again. A write that ends after this call marks its granules anew, a
    /// write that ended before is visible to the caller; no two callers get the same granule. The
    /// run may begin before `range.start`, at the start of its granule, and ends at the end of a
    /// granule.
    pub fn claim(&self, range: Range<u64>, max_len: u64) -> Option<Range<u64>> {
        let granules = self.granules_of(&range);
        let most = (max_len >> self.shift()).max(1);
        let mut at = granules.start;
        while let Some(found) = self.find(at..granules.end, true) {
            let end = granules.end.min(found.saturating_add(most));
            let taken = self.take_run(found..end);
            if !taken.is_empty() {
                let start = taken.start << self.shift();
                return Some(start..(taken.end << self.shift()).min(self.len()));
            }
            at = found; // another caller was faster
        }
        None
    }

    /// Cleans dirty granules from the start of the range on, up to the first clean one.
    fn take_run(&self, range: Range<u64>) -> Range<u64> {
        let mut at = range.start;
        while at < range.end {
            let Some(page) = self.present(at) else { break };
            let bit = at % WORD;
            let word = page.word(word_of(at)) >> bit;
            let run = u64::from((!word).trailing_zeros()).min(WORD - bit).min(range.end - at);
            if run == 0 {
                break;
            }
            let mask = (u64::MAX >> (WORD - run)) << bit;
            let taken = page.take(word_of(at), mask) >> bit;
            let got = u64::from((!taken).trailing_zeros()).min(run);
            // Behind a bit that another caller took: not part of this run.
            let rest =
                taken & !(u64::MAX.checked_shr(64 - u32::try_from(got).unwrap_or(64)).unwrap_or(0));
            if rest != 0 {
                self.mark_word(at - bit, rest << bit);
            }
            at += got;
            if got < run || bit + run < WORD {
                break;
            }
        }
        range.start..at
    }

    /// Marks bits of the word that begins at this granule.
    fn mark_word(&self, first: u64, mask: u64) {
        (0..WORD).filter(|bit| mask >> bit & 1 != 0).for_each(|bit| {
            self.set_granules(first + bit..first + bit + 1);
        });
    }

    /// The granules that a byte range touches.
    fn granules_of(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len());
        if range.start >= end {
            return 0..0;
        }
        range.start >> self.shift()..end.div_ceil(1 << self.shift())
    }

    /// The first granule in the range that is dirty, or clean.
    fn find(&self, range: Range<u64>, is_dirty: bool) -> Option<u64> {
        let mut at = range.start;
        while at < range.end {
            let page = self.present(at);
            let next_page = at - at % PAGE + PAGE;
            let Some(page) = page.filter(|page| !is_dirty || page.count() > 0) else {
                if !is_dirty {
                    return Some(at);
                }
                at = next_page;
                continue;
            };
            let word = page.word(word_of(at));
            let wanted = (if is_dirty { word } else { !word }) >> (at % WORD);
            if wanted != 0 {
                let found = at + u64::from(wanted.trailing_zeros());
                return Some(found).filter(|found| *found < range.end);
            }
            at = at - at % WORD + WORD;
        }
        None
    }
}
