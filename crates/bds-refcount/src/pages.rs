//! Memory of the slots: pages that never move and are freed only with the arena.
//!
//! A look-up takes no lock; pages are added under the free list's lock. This file knows no
//! lifecycles.
//!
//! A slot has two numbers. Its *key* counts 0, 1, 2, … and is the free list's. Its *place* is the
//! index field of handles:
//! ```text
//!  23       18 17                 0
//! ┌───────────┬────────────────────┐
//! │ page      │ slot in the page   │      pages 0 to 13 hold 32, 64, … 2¹⁸ slots,
//! └───────────┴────────────────────┘      pages 14 to 63 hold 2¹⁸ each
//! ```
//! so that a look-up, which starts from a handle, finds page and slot by shifting; only inserting
//! computes a logarithm.

use std::sync::OnceLock;

use crate::{handle::Handle, slot::Slot};

const OFFSET_BITS: u32 = 18;
const OFFSET_MASK: u32 = (1 << OFFSET_BITS) - 1;
const PAGES: u32 = 64;
/// Slots of the first page, as a power of two.
const FIRST_BITS: u32 = 5;
/// The first page that is not twice as large as the one before.
const FIRST_EVEN: u32 = OFFSET_BITS - FIRST_BITS + 1;
/// Slots in the pages before that one.
const BEFORE_EVEN: u32 = (1 << (OFFSET_BITS + 1)) - (1 << FIRST_BITS);

/// Slots in all pages together: 13.6 million.
pub(crate) const MAX_SLOTS: u32 = BEFORE_EVEN + ((PAGES - FIRST_EVEN) << OFFSET_BITS);

pub(crate) struct Pages<T> {
    // Filled from the front, each once.
    pages: [OnceLock<Box<[Slot<T>]>>; PAGES as usize],
}

/// The place of a key below [`MAX_SLOTS`].
pub(crate) fn place(key: u32) -> u32 {
    if key < BEFORE_EVEN {
        let shifted = key + (1 << FIRST_BITS);
        let page = shifted.ilog2() - FIRST_BITS;
        page << OFFSET_BITS | (shifted - (1 << (page + FIRST_BITS)))
    } else {
        key - BEFORE_EVEN + (FIRST_EVEN << OFFSET_BITS)
    }
}

/// The key of a place. Some number also for a place where no slot can be.
pub(crate) const fn key(place: u32) -> u32 {
    let (page, offset) = (place >> OFFSET_BITS, place & OFFSET_MASK);
    if page < FIRST_EVEN {
        (1 << (page + FIRST_BITS)) - (1 << FIRST_BITS) + offset
    } else {
        place - (FIRST_EVEN << OFFSET_BITS) + BEFORE_EVEN
    }
}

impl<T> Pages<T> {
    pub(crate) fn new() -> Self {
        Self { pages: [const { OnceLock::new() }; PAGES as usize] }
    }

    /// The slot at this place, if its page exists.
    #[inline]
    pub(crate) fn slot(&self, place: u32) -> Option<&Slot<T>> {
        self.pages[(place >> OFFSET_BITS & (PAGES - 1)) as usize]
            .get()?
            .get((place & OFFSET_MASK) as usize)
    }

    /// The slot with this key, after making its page if needed, with no more than `capacity` slots
    /// in all pages. `first` is the first handle of the first slot: kind, tag and generation in
    /// their places.
    pub(crate) fn slot_or_grow(&self, key: u32, capacity: u32, first: Handle<T>) -> &Slot<T> {
        let place = place(key);
        let (page, offset) = (place >> OFFSET_BITS, place & OFFSET_MASK);
        let slots = self.pages[page as usize].get_or_init(|| {
            let len = (1 << (page + FIRST_BITS).min(OFFSET_BITS)).min(capacity - (key - offset));
            let start = page << OFFSET_BITS;
            (start..start + len).map(|place| Slot::new(first.at(place))).collect()
        });
        &slots[offset as usize]
    }

    /// All slots that exist, in order of key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Slot<T>> {
        self.pages.iter().map_while(OnceLock::get).flat_map(|page| page.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_place_of_its_own() {
        let mut expected = 0;
        for key in 0..MAX_SLOTS {
            assert_eq!(place(key), expected, "{key}");
            assert_eq!(super::key(expected), key);
            let (page, offset) = (expected >> OFFSET_BITS, expected & OFFSET_MASK);
            let last = offset + 1 == 1 << (page + FIRST_BITS).min(OFFSET_BITS);
            expected = if last { (page + 1) << OFFSET_BITS } else { expected + 1 };
        }
        assert_eq!(expected, PAGES << OFFSET_BITS, "no page is left over");
    }
}
