//! The regions of a disk as one bit each, set and tested by many threads without a lock.
//!
//! There is a fixed number of regions. The last one stands for everything behind it too, so a disk
//! that grows beyond what was planned for stays covered, more coarsely.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};

use super::page::Shape;

/// One bit for each region.
#[derive(Debug)]
pub struct Regions {
    /// log2 of a region's length.
    shift: u32,
    words: Box<[AtomicU64]>,
}

impl Regions {
    /// No region.
    pub fn new(shape: Shape) -> Self {
        let words =
            usize::try_from(shape.regions() / 64).expect("a shape has at most 2^22 regions");
        Self {
            shift: shape.region_len().trailing_zeros(),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The regions that a range touches. An empty range touches that of its start.
    #[inline]
    fn of(&self, range: &Range<u64>) -> RangeInclusive<u64> {
        let last = self.words.len() as u64 * 64 - 1;
        let end = range.end.saturating_sub(1).max(range.start);
        (range.start >> self.shift).min(last)..=(end >> self.shift).min(last)
    }

    /// Whether all regions of the range are set. One load for each 64 regions.
    #[inline]
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let (first, last) = self.of(range).into_inner();
        if first == last {
            return self.word(first) & 1 << (first % 64) != 0;
        }
        self.all_set(first, last)
    }

    fn all_set(&self, first: u64, last: u64) -> bool {
        masks(first, last)
            .all(|(word, mask)| self.words[word].load(Ordering::SeqCst) & mask == mask)
    }

    #[inline]
    fn word(&self, region: u64) -> u64 {
        // SeqCst: against `clear` when an epoch begins. A plain load on x86.
        self.words[word_of(region)].load(Ordering::SeqCst)
    }

    /// Sets all regions of the range.
    pub fn set(&self, range: &Range<u64>) {
        let (first, last) = self.of(range).into_inner();
        for (word, mask) in masks(first, last) {
            self.words[word].fetch_or(mask, Ordering::SeqCst);
        }
    }

    /// Sets the regions of these words, as [`Regions::take`] returned them.
    pub fn add(&self, words: &[u64]) {
        for (word, bits) in self.words.iter().zip(words).filter(|(_, bits)| **bits != 0) {
            word.fetch_or(*bits, Ordering::SeqCst);
        }
    }

    /// Clears all regions and returns them.
    pub fn take(&self) -> Vec<u64> {
        self.words.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect()
    }

    /// Clears all regions.
    pub fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// The words with `more` added.
    pub fn union(&self, more: &[u64]) -> Vec<u64> {
        let words = self.words.iter().zip(more);
        words.map(|(word, more)| word.load(Ordering::SeqCst) | more).collect()
    }

    /// Number of regions that are set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

fn word_of(region: u64) -> usize {
    usize::try_from(region / 64).unwrap_or(usize::MAX)
}

/// The words that hold `first..=last`, with the bits in each.
fn masks(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let low = if word == first / 64 { u64::MAX << (first % 64) } else { u64::MAX };
        let high = if word == last / 64 { u64::MAX >> (63 - last % 64) } else { u64::MAX };
        (word_of(word * 64), low & high)
    })
}
