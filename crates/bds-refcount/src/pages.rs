//! The slots' memory: pages that double in size, never move and are never given back before the arena's end.
//!
//! A look-up takes one load and no lock; pages are added under the arena's lock. This file knows no lifecycles.

use std::sync::OnceLock;

use crate::{handle::INDEX_BITS, slot::Slot};

/// Slots of the first page, as a power of two; every further page has twice as many as the one before.
const FIRST_BITS: u32 = 5;
const PAGES: usize = (INDEX_BITS - FIRST_BITS + 1) as usize;

pub(crate) struct Pages<T> {
    // Filled from the front, each once.
    pages: [OnceLock<Box<[Slot<T>]>>; PAGES],
}

/// Page and place in it of an index.
#[inline]
fn place(index: u32) -> (usize, usize) {
    let shifted = index + (1 << FIRST_BITS);
    let page = shifted.ilog2() - FIRST_BITS;
    (page as usize, (shifted - (1 << (page + FIRST_BITS))) as usize)
}

impl<T> Pages<T> {
    pub(crate) fn new() -> Self {
        Self { pages: [const { OnceLock::new() }; PAGES] }
    }

    /// The slot of this index, if its page exists.
    #[inline]
    pub(crate) fn slot(&self, index: u32) -> Option<&Slot<T>> {
        let (page, offset) = place(index);
        self.pages.get(page)?.get()?.get(offset)
    }

    /// The slot of this index, whose page is made if need be, with no more than `capacity` slots in all pages.
    /// `base` is kind and tag in their places.
    pub(crate) fn slot_or_grow(&self, index: u32, capacity: u32, base: u64) -> &Slot<T> {
        let (page, offset) = place(index);
        let slots = self.pages[page].get_or_init(|| {
            let first = index - u32::try_from(offset).expect("an offset is below 2^24");
            let len = (1 << (FIRST_BITS + u32::try_from(page).expect("a page number is below 20")))
                .min(capacity - first);
            (first..first + len).map(|index| Slot::new(base | u64::from(index))).collect()
        });
        &slots[offset]
    }

    /// All slots that exist, in order of index.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot<T>> {
        self.pages.iter().map_while(OnceLock::get).flat_map(|page| page.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_has_its_place() {
        let mut expected = (0, 0);
        for index in 0..5_000 {
            assert_eq!(place(index), expected, "{index}");
            expected.1 += 1;
            if expected.1 == 1 << (expected.0 + FIRST_BITS as usize) {
                expected = (expected.0 + 1, 0);
            }
        }
        assert_eq!(place((1 << INDEX_BITS) - 1).0, PAGES - 1);
    }
}
