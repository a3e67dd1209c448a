//! One slot of an arena: lifecycle word, cell with the occupant (unsafe), holders and watchers.
//!
//! Access to the cell follows from the word alone, never from the free list or a lock:
//! * `Reserved`: only the thread that reserved it (a compare-exchange from `Vacant`).
//! * `Occupied`, count ≥ 1: every owner of a counted reference may read.
//! * `Occupied`, count 0: only the owner of the dead object: the one that took it out of the
//!   graveyard, or made the decrement and kept it. Nothing raises a count from 0.
//! * `Vacant`, `Retired`: none; the cell is uninitialised.

use std::{mem::MaybeUninit, task::Waker};

use crate::{
    arena::Shared,
    handle::Handle,
    holder::HolderList,
    lifecycle::{ONE, State, Word},
    stale::{Stale, TooManyReferences},
    sync::{Arc, AtomicU32, AtomicU64, Mutex, Ordering, UnsafeCell, spin_loop},
    tag::Tag,
};

/// Content of an occupied slot.
pub(crate) struct Occupant<T> {
    pub(crate) value: T,
    /// Keeps the arena's memory, and so this slot, while the slot is occupied, so that a `Strong`
    /// need not.
    pub(crate) owner: Arc<Shared<T>>,
}

/// Data of an object that no fast path needs: named holders and watchers. The lock is held for a
/// few instructions and never while foreign code runs; no other lock is taken under it.
#[derive(Default)]
pub(crate) struct Side {
    pub(crate) holders: HolderList,
    pub(crate) watchers: Vec<(u64, Waker)>,
    pub(crate) next_watcher: u64,
}

// Two slots never share a cache line, nor a pair of lines that is fetched together, so that
// counting one object does not slow down another.
#[repr(align(128))]
pub(crate) struct Slot<T> {
    word: AtomicU64,
    /// Kind, tag and place as they stand in a handle.
    base: u64,
    /// The graveyard's link, meaningful only between burial and reaping. Ordered by the graveyard's
    /// head.
    pub(crate) next: AtomicU32,
    pub(crate) side: Mutex<Side>,
    occupant: UnsafeCell<MaybeUninit<Occupant<T>>>,
}

// SAFETY: the only field that is not Sync by itself is `occupant`. Shared access to it hands out
// `&T` on several threads (needs T: Sync) and the taking of a dead value moves T between threads
// (needs T: Send); that those two never overlap is the word's protocol, see the top of this file.
// `Arc<Shared<T>>` is Send and Sync under the same bounds.
unsafe impl<T: Send + Sync> Sync for Slot<T> {}
// SAFETY: as above; an owned slot owns at most a T and an Arc of the arena.
unsafe impl<T: Send + Sync> Send for Slot<T> {}

impl<T> Slot<T> {
    /// A vacant slot whose first occupant gets this handle.
    pub(crate) fn new(first: Handle<T>) -> Self {
        Self {
            word: AtomicU64::new(Word::new(State::Vacant, first.generation(), 0).0),
            base: first.base(),
            next: AtomicU32::new(0),
            side: Mutex::new(Side::default()),
            occupant: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    /// The current word. Without a reference only its final states are still true on return.
    #[inline]
    pub(crate) fn word(&self) -> Word {
        Word(self.word.load(Ordering::Acquire))
    }

    /// The handle of the present generation.
    pub(crate) fn handle(&self) -> Handle<T> {
        Handle::with_generation(self.base, Word(self.word.load(Ordering::Relaxed)).generation())
    }

    pub(crate) fn place(&self) -> u32 {
        Handle::<T>::from_u64(self.base).place()
    }

    // ---- insert

    /// Takes a vacant slot for one insert. The cell belongs to the caller until `publish` or `end`.
    ///
    /// # Panics
    /// If the slot is not vacant, that is, if the free list is wrong. Checked, because the cell's
    /// safety must not depend on another crate's free list.
    pub(crate) fn reserve(&self) {
        let vacant = self.word();
        let reserved = Word::new(State::Reserved, vacant.generation(), 0);
        // Acquire: what the previous occupant's reaper did to the cell is over.
        let taken = vacant.state() == State::Vacant
            && self
                .word
                .compare_exchange(vacant.0, reserved.0, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        assert!(taken, "the free list offered a slot that is in use");
    }

    /// Fills a reserved slot and makes it acquirable with count 1. The caller owns that reference.
    ///
    /// # Safety
    /// The caller did `reserve` on this slot, and neither `publish` nor `end` since.
    pub(crate) unsafe fn publish(&self, occupant: Occupant<T>) {
        // SAFETY: the state is Reserved by the caller's duty, so no other thread reads or writes
        // the cell; it is uninitialised, so nothing is overwritten undropped.
        self.occupant.with_mut(|cell| unsafe { (*cell).write(occupant) });
        let generation = Word(self.word.load(Ordering::Relaxed)).generation();
        // Release: an acquire sees the occupant.
        self.word.store(Word::new(State::Occupied, generation, 1).0, Ordering::Release);
    }

    // ---- references

    /// Makes another reference if an object of this generation lives here; otherwise returns the
    /// word that refused.
    #[inline]
    pub(crate) fn acquire(&self, generation: u32) -> Result<(), Word> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            if !Word(word).admits(generation) {
                return Err(Word(word));
            }
            // Acquire: pairs with `publish`. Compare-exchange and not an increment: a count that
            // was ever 0 must never be seen above it, not even for a moment, or a release could
            // miss being the last.
            match self.word.compare_exchange_weak(
                word,
                word + ONE,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(()),
                Err(now) => {
                    word = now;
                    // Another thread counts at this moment; a pause lets it finish instead of
                    // taking the cache line.
                    spin_loop();
                }
            }
        }
    }

    /// Makes another reference for a caller that has one.
    #[inline]
    pub(crate) fn retain(&self) -> Result<(), TooManyReferences> {
        // Relaxed as in Arc: the caller's own reference keeps everything in place.
        let before = Word(self.word.fetch_add(ONE, Ordering::Relaxed));
        if before.was_saturated() {
            self.take_back();
            return Err(TooManyReferences);
        }
        Ok(())
    }

    #[cold]
    fn take_back(&self) {
        // Cannot reach 0: the caller of `retain` has a reference of its own.
        self.word.fetch_sub(ONE, Ordering::Relaxed);
    }

    /// Releases one reference. True if it was the last: then the object is dead and the caller must
    /// bury it. After `false` the slot may be freed at any moment.
    ///
    /// # Safety
    /// `slot` points to a slot on which the caller owns a reference, and the caller does not use
    /// that reference again.
    #[inline]
    pub(crate) unsafe fn release(slot: *const Self) -> bool {
        // SAFETY: until the decrement the caller's reference keeps the slot occupied and so
        // allocated. The borrow is of the atomic alone and not of the slot, because the slot may be
        // freed by another thread once the decrement has happened, while a `&Slot` argument would
        // still claim it.
        let word = unsafe { &(*slot).word };
        // Release: what this holder did with the object happens before its end.
        let before = Word(word.fetch_sub(ONE, Ordering::Release));
        before.was_last()
    }

    /// Releases the reference if it is the only one: the object is then dead and the caller's.
    /// False, and nothing changed, if there are others.
    pub(crate) fn release_if_last(&self) -> bool {
        let word = Word(self.word.load(Ordering::Relaxed));
        let one = Word::new(State::Occupied, word.generation(), 1);
        let zero = Word::new(State::Occupied, word.generation(), 0);
        // Acquire: what earlier holders did is over; Release as in `release`.
        self.word.compare_exchange(one.0, zero.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// The occupant.
    ///
    /// # Safety
    /// For as long as the borrow is used, the caller owns a reference, or owns the dead object and
    /// borrows it shared.
    #[inline]
    pub(crate) unsafe fn occupant<'a>(&self) -> &'a Occupant<T> {
        // SAFETY: the cell was filled by `publish` before the caller's reference could exist
        // (acquire pairs with publish, or the caller got the reference from an owner of one) and is
        // emptied only by `take`, which needs the dead object, which exists only once no reference
        // does.
        self.occupant.with(|cell| unsafe { (*cell).assume_init_ref() })
    }

    // ---- dead

    /// The value of a dead object, exclusively.
    ///
    /// # Safety
    /// For as long as the borrow is used, the caller owns the dead object and borrows it once.
    pub(crate) unsafe fn value_mut<'a>(&self) -> &'a mut T {
        // SAFETY: initialised as in `occupant`; exclusive by the caller's duty.
        self.occupant.with_mut(|cell| unsafe { &mut (*cell).assume_init_mut().value })
    }

    /// Moves the occupant of a dead object out.
    ///
    /// # Safety
    /// The caller owns the dead object, does this once, and next does nothing to the cell but
    /// `end`.
    pub(crate) unsafe fn take(&self) -> Occupant<T> {
        // SAFETY: initialised as in `occupant`; exclusive, and read out only once, by the caller's
        // duty.
        self.occupant.with_mut(|cell| unsafe { (*cell).assume_init_read() })
    }

    /// Ends the present generation: the slot becomes vacant for the next one, or retired. True if
    /// retired.
    ///
    /// # Safety
    /// The caller owns the dead object and has taken its occupant out, or has reserved the slot.
    pub(crate) unsafe fn end(&self, tag: &Tag) -> bool {
        let now = Word(self.word.load(Ordering::Relaxed));
        let next = now.after_end(tag.begin(now.generation() + 1));
        // Release: pairs with `reserve`.
        self.word.store(next.0, Ordering::Release);
        next.state() == State::Retired
    }

    /// Explains why a word refuses a handle of this generation.
    #[cold]
    pub(crate) fn explain(word: Word, generation: u32) -> Stale {
        let now = word.generation();
        match word.state() {
            _ if generation == 0 || generation > now => Stale::NeverIssued,
            State::Retired => Stale::Retired,
            _ if generation < now => Stale::Released,
            State::Vacant | State::Reserved => Stale::NeverIssued,
            State::Occupied if word.count() == 0 => Stale::Dying,
            State::Occupied => Stale::TooManyReferences,
        }
    }

    #[cfg(test)]
    pub(crate) fn force_count(&self, count: u64) {
        let word = self.word();
        self.word.store(Word::new(State::Occupied, word.generation(), count).0, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// The cell's safety depends on this, not on the free list.
    #[test]
    fn only_a_vacant_slot_is_reserved_and_only_once() {
        let slot = Slot::<String>::new(Handle::with_generation(0, 7));
        slot.reserve();
        let reserved = Word::new(State::Reserved, 7, 0);
        assert_eq!(slot.word(), reserved);
        let others = [
            reserved,
            Word::new(State::Occupied, 7, 1),
            Word::new(State::Occupied, 7, 0),
            Word::new(State::Retired, 7, 0),
        ];
        for word in others {
            slot.word.store(word.0, Ordering::Relaxed);
            assert!(catch_unwind(AssertUnwindSafe(|| slot.reserve())).is_err(), "{word:?}");
            assert_eq!(slot.word(), word, "refused and left alone");
        }
        slot.word.store(Word::new(State::Vacant, 8, 0).0, Ordering::Relaxed);
        slot.reserve();
        assert_eq!(slot.word(), Word::new(State::Reserved, 8, 0));
    }
}
