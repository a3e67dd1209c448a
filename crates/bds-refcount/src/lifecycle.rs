//! The lifecycle word of a slot: packs count, state and generation into one `u64`. Arithmetic only.
//!
//! ```text
//!  63                               26 25 24 23              0
//! ┌───────────────────────────────────┬─────┬─────────────────┐
//! │ count − 1, as a signed number     │state│ generation      │
//! └───────────────────────────────────┴─────┴─────────────────┘
//!
//!   Vacant ──reserve──► Reserved ──publish──► Occupied, count ≥ 1 (live)
//!     ▲                    │                      │ the decrement to 0
//!     │                    │                      ▼
//!     └──────generation+1──┴───────────────── Occupied, count = 0 (dying, then dead)
//!                 (Retired instead of Vacant when the generation is exhausted)
//! ```
//! One word, so that one atomic operation decides: the decrement that takes the count to 0 is the
//! same operation that makes the object unacquirable, and an acquire checks state, generation, "not
//! zero" and "not too many" on the value that its compare-exchange then confirms.
//!
//! The count is on top and less by one so that both questions after an atomic add or subtract, "was
//! that the last?" and "are those too many?", are answered by the processor's flags. On x86 both
//! are then one `lock add` or `lock sub` of a constant and a jump, as for `Arc`; other layouts need
//! the slower `lock xadd` (10 % of a clone and drop). For that one reference must also fit an
//! immediate operand, which 2²⁶ does.

/// One reference.
pub(crate) const ONE: u64 = 1 << 26;

/// No more references than this are given out: up to here the signed field is not negative.
/// Increments that are about to be undone would have to come from 2³⁷ threads at once to reach the
/// value that means none.
pub(crate) const COUNT_LIMIT: u64 = 1 << 37;

const COUNT_SHIFT: u32 = ONE.trailing_zeros();
const COUNT_MASK: u64 = u64::MAX >> COUNT_SHIFT;
const STATE_SHIFT: u32 = 24;
const GENERATION_MASK: u64 = (1 << STATE_SHIFT) - 1;

/// State of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    /// Free; the generation is the one that the next occupant gets.
    Vacant = 0,
    /// Reserved by an insert that has not published yet.
    Reserved = 1,
    /// Holds a value: live while the count is not 0, dying or dead afterwards.
    Occupied = 2,
    /// Never to be used again; the generation is the last one that was given out.
    Retired = 3,
}

/// A value of the lifecycle word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    #[inline]
    pub(crate) const fn new(state: State, generation: u32, count: u64) -> Self {
        let low = (state as u64) << STATE_SHIFT | generation as u64;
        Self(count.wrapping_sub(1).wrapping_mul(ONE) | low)
    }

    pub(crate) const fn state(self) -> State {
        match (self.0 >> STATE_SHIFT) & 3 {
            0 => State::Vacant,
            1 => State::Reserved,
            2 => State::Occupied,
            _ => State::Retired,
        }
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        (self.0 & GENERATION_MASK) as u32
    }

    #[inline]
    pub(crate) const fn count(self) -> u64 {
        (self.0 >> COUNT_SHIFT).wrapping_add(1) & COUNT_MASK
    }

    /// Whether an object of this generation lives here and may get one more reference.
    #[inline]
    pub(crate) const fn admits(self, generation: u32) -> bool {
        // Against the live word of count 1, state and generation are 0 if they agree, and the
        // count, turned down, is below the limit if it is neither 0 nor too high: one comparison
        // for all.
        let one = Self::new(State::Occupied, generation, 1);
        (self.0 ^ one.0).rotate_right(COUNT_SHIFT) < COUNT_LIMIT - 1
    }

    /// Of the word before an increment: whether it exceeded the limit and must be undone.
    #[inline]
    #[expect(clippy::cast_possible_wrap, reason = "the count is signed; this is how flags see it")]
    pub(crate) const fn was_saturated(self) -> bool {
        (self.0.wrapping_add(ONE) as i64) < 0
    }

    /// Of the word before a decrement: whether that released the last reference.
    #[inline]
    pub(crate) const fn was_last(self) -> bool {
        self.0 < ONE
    }

    /// The word after the end of the occupant: vacant in the next generation if that may begin,
    /// else retired.
    pub(crate) const fn after_end(self, may_go_on: bool) -> Self {
        let generation = self.generation();
        if may_go_on {
            Self::new(State::Vacant, generation + 1, 0)
        } else {
            Self::new(State::Retired, generation, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_live_object_of_the_same_generation_admits() {
        let cases = [
            (State::Occupied, 5, 1, true),
            (State::Occupied, 5, 2, true),
            (State::Occupied, 5, COUNT_LIMIT - 1, true),
            (State::Occupied, 5, COUNT_LIMIT, false),
            (State::Occupied, 5, COUNT_LIMIT + 9, false),
            (State::Occupied, 5, COUNT_MASK, false),
            (State::Occupied, 5, 0, false),
            (State::Occupied, 4, 1, false),
            (State::Occupied, 6, 1, false),
            (State::Occupied, 0, 1, false),
            (State::Vacant, 5, 0, false),
            (State::Reserved, 5, 0, false),
            (State::Retired, 5, 0, false),
        ];
        for (state, generation, count, admits) in cases {
            let word = Word::new(state, generation, count);
            assert_eq!(word.admits(5), admits, "{state:?} {generation} {count}");
            assert_eq!(word.state(), state);
            assert_eq!(word.generation(), generation);
            assert_eq!(word.count(), count);
        }
    }

    #[test]
    fn counts_from_one_to_the_limit_and_detects_both_ends() {
        let word = |count| Word::new(State::Occupied, 0x00AB_CDEF, count);
        for count in [1, 2, 3, COUNT_LIMIT - 2, COUNT_LIMIT - 1] {
            assert_eq!(Word(word(count).0 + ONE), word(count + 1));
            assert!(!word(count).was_saturated());
            assert_eq!(word(count).was_last(), count == 1);
        }
        assert_eq!(Word(word(1).0.wrapping_sub(ONE)), word(0));
        for count in [COUNT_LIMIT, COUNT_LIMIT + 1, COUNT_LIMIT + 1000] {
            assert!(word(count).was_saturated());
            assert!(!word(count).was_last());
        }
    }

    /// Both comparisons are strict. No occupied slot has such a word (its state is not 0), so that
    /// only here does it show.
    #[test]
    fn the_boundary_words_are_neither_last_nor_too_many() {
        assert_eq!((Word(ONE - 1).count(), Word(ONE - 1).was_last()), (1, true));
        assert_eq!((Word(ONE).count(), Word(ONE).was_last()), (2, false));
        let none = Word(ONE.wrapping_neg());
        assert_eq!((none.count(), none.was_saturated()), (0, false));
        let most = Word::new(State::Vacant, 0, COUNT_LIMIT);
        assert!(most.was_saturated() && !Word(most.0 - 1).was_saturated());
    }

    #[test]
    fn an_exhausted_generation_retires_the_slot() {
        let word = Word::new(State::Occupied, 6, 0);
        assert_eq!(word.after_end(true), Word::new(State::Vacant, 7, 0));
        assert_eq!(word.after_end(false), Word::new(State::Retired, 6, 0));
    }
}
