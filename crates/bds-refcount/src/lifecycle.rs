//! The lifecycle word of a slot: state, generation and count in one `u64`. Arithmetic only.
//!
//! ```text
//!  63   56 55              32 31                        0
//! ┌───────┬──────────────────┬───────────────────────────┐
//! │ state │ generation       │ count                     │
//! └───────┴──────────────────┴───────────────────────────┘
//!
//!   Vacant ──reserve──► Reserved ──publish──► Occupied, count ≥ 1 (live)
//!     ▲                    │                      │ the decrement to 0
//!     │                    │                      ▼
//!     └──────generation+1──┴───────────────── Occupied, count = 0 (dying, then dead)
//!                 (Retired instead of Vacant when the generation is exhausted)
//! ```
//! One word, so that one atomic operation decides everything: the decrement that takes the count to 0 is the same
//! operation that makes the object unacquirable, and an acquire checks state, generation, "not zero" and "not too many"
//! with one comparison. The count has the low half to itself: "was that the last?" is a 32-bit compare with 1.

/// References beyond which no more are given out. Half of what the field holds: increments that are about to be undone
/// would have to come from 2³¹ threads at once to spill into the generation.
pub(crate) const COUNT_LIMIT: u64 = 1 << 31;

const GENERATION_SHIFT: u32 = 32;
const STATE_SHIFT: u32 = 56;
const GENERATION_MASK: u64 = (1 << (STATE_SHIFT - GENERATION_SHIFT)) - 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    /// Free; the generation is the one that the next occupant gets.
    Vacant = 0,
    /// Given to an insert that has not published yet.
    Reserved = 1,
    /// Holds a value: live while the count is not 0, dying or dead afterwards.
    Occupied = 2,
    /// Never to be used again; the generation is the last one that was given out.
    Retired = 3,
}

/// A value of the lifecycle word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    #[inline]
    pub(crate) const fn new(state: State, generation: u32, count: u32) -> Self {
        let high = (state as u64) << STATE_SHIFT | (generation as u64) << GENERATION_SHIFT;
        Self(high | count as u64)
    }

    pub(crate) const fn state(self) -> State {
        match self.0 >> STATE_SHIFT {
            0 => State::Vacant,
            1 => State::Reserved,
            2 => State::Occupied,
            _ => State::Retired,
        }
    }

    #[inline]
    pub(crate) const fn generation(self) -> u32 {
        ((self.0 >> GENERATION_SHIFT) & GENERATION_MASK) as u32
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the count is the low half")]
    pub(crate) const fn count(self) -> u32 {
        self.0 as u32
    }

    /// Whether an object of this generation lives here and may get one more reference.
    #[inline]
    pub(crate) const fn admits(self, generation: u32) -> bool {
        // Wrong state or generation leaves high bits, count 0 wraps around, too many is above the
        // limit: all three make the difference large.
        let difference = self.0 ^ Self::new(State::Occupied, generation, 0).0;
        difference.wrapping_sub(1) < COUNT_LIMIT - 1
    }

    /// Whether an increment of this word must be taken back.
    #[inline]
    pub(crate) const fn is_saturated(self) -> bool {
        self.count() as u64 >= COUNT_LIMIT
    }

    /// What a slot becomes when its occupant has ended.
    pub(crate) const fn after_end(self, last_generation: u32) -> Self {
        let generation = self.generation();
        if generation >= last_generation {
            Self::new(State::Retired, generation, 0)
        } else {
            Self::new(State::Vacant, generation + 1, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_live_object_of_the_same_generation_admits() {
        let limit = u32::try_from(COUNT_LIMIT).unwrap();
        let cases = [
            (State::Occupied, 5, 1, true),
            (State::Occupied, 5, limit - 2, true),
            (State::Occupied, 5, limit - 1, true),
            (State::Occupied, 5, limit, false),
            (State::Occupied, 5, u32::MAX, false),
            (State::Occupied, 5, 0, false),
            (State::Occupied, 4, 1, false),
            (State::Occupied, 6, 1, false),
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
    fn an_exhausted_generation_retires_the_slot() {
        let word = Word::new(State::Occupied, 6, 0);
        assert!(word.after_end(7) == Word::new(State::Vacant, 7, 0));
        assert!(word.after_end(6) == Word::new(State::Retired, 6, 0));
    }
}
