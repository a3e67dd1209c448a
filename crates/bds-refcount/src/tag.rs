//! Arena tags: the twelve bits of a handle that say which arena gave it out.
//!
//! Among live arenas of a kind no two share a tag, up to 4095 of them; beyond that tags are shared and a foreign handle
//! is recognised only by index and generation. A tag comes back into use as late as possible: the search goes round.

use std::sync::{Mutex, PoisonError};

use crate::handle::{Kind, TAG_BITS};

const TAGS: usize = 1 << TAG_BITS;

/// Which tags of one kind are taken. Tag 0 is never given out.
struct Space {
    taken: [u64; TAGS / 64],
    last: u16,
}

static SPACES: Mutex<[Space; 16]> =
    Mutex::new([const { Space { taken: [0; TAGS / 64], last: 0 } }; 16]);

impl Space {
    fn next(tag: u16) -> u16 {
        if usize::from(tag) + 1 < TAGS { tag + 1 } else { 1 }
    }

    fn place(tag: u16) -> (usize, u64) {
        (usize::from(tag) / 64, 1 << (tag % 64))
    }

    fn take(&mut self) -> Option<u16> {
        let mut tag = Self::next(self.last);
        for _ in 1..TAGS {
            let (word, bit) = Self::place(tag);
            if self.taken[word] & bit == 0 {
                self.taken[word] |= bit;
                self.last = tag;
                return Some(tag);
            }
            tag = Self::next(tag);
        }
        None
    }
}

/// A tag, given back when dropped.
pub(crate) struct Tag {
    kind: Kind,
    number: u16,
    /// False for a tag shared because all were taken; such a one is not given back.
    own: bool,
}

impl Tag {
    pub(crate) fn take(kind: Kind) -> Self {
        let mut spaces = SPACES.lock().unwrap_or_else(PoisonError::into_inner);
        let space = &mut spaces[usize::from(kind.to_u8())];
        match space.take() {
            Some(number) => Self { kind, number, own: true },
            None => {
                space.last = Space::next(space.last);
                Self { kind, number: space.last, own: false }
            }
        }
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }
}

impl Drop for Tag {
    fn drop(&mut self) {
        if self.own {
            let mut spaces = SPACES.lock().unwrap_or_else(PoisonError::into_inner);
            let (word, bit) = Space::place(self.number);
            spaces[usize::from(self.kind.to_u8())].taken[word] &= !bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn live_arenas_of_a_kind_have_different_tags_until_all_are_taken() {
        let kind = Kind::new(15); // no other test of this crate uses it
        let tags: Vec<Tag> = (1..TAGS).map(|_| Tag::take(kind)).collect();
        let numbers: HashSet<u16> = tags.iter().map(Tag::number).collect();
        assert_eq!(numbers.len(), TAGS - 1);
        assert!(!numbers.contains(&0));

        let shared = Tag::take(kind);
        assert!(!shared.own);
        drop(shared);
        let freed = tags[77].number();
        drop(tags.into_iter().nth(77));
        assert!(Tag::take(kind).own, "a freed tag ({freed}) is found again");
    }
}
