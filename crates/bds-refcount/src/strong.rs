//! `Strong<T>`: a counted reference to an object in an arena; cloned and dropped by one atomic.
//!
//! A `Strong` is one pointer. It keeps its slot occupied, and an occupied slot keeps the arena's
//! memory.

use std::{fmt, mem::ManuallyDrop, ops::Deref, panic::Location, ptr::NonNull};

use crate::{
    dead::Dead,
    graveyard::bury,
    handle::Handle,
    holder::{Held, Holder, HolderInfo},
    slot::Slot,
    stale::TooManyReferences,
};

/// Result of a release: whether it was the last.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Release {
    /// This call released the last reference. Final: the object is not acquirable any more and
    /// waits to be reaped. Of any number of concurrent releases exactly one sees this.
    Last,
    /// Another reference existed at that moment. This says nothing about the object now.
    NotLast,
}

/// A counted reference to an object in an [`Arena`](crate::Arena): while it exists, the object
/// lives.
///
/// Dropping or releasing it never blocks, takes no lock, does no I/O, calls nothing and drops no
/// value: the object is left to the next reap. The one exception is an arena whose last
/// [`Arena`](crate::Arena) was dropped: it cannot be reaped any more, so the last release drops the
/// value, and those that lose their last reference with it, one after another without recursion,
/// and wakes their watchers.
pub struct Strong<T> {
    slot: NonNull<Slot<T>>,
}

// SAFETY: a Strong gives `&T` to its thread (T: Sync), and in an orphaned arena its release drops a
// T there (T: Send).
unsafe impl<T: Send + Sync> Send for Strong<T> {}
// SAFETY: as above; a `&Strong` can be cloned into a Strong.
unsafe impl<T: Send + Sync> Sync for Strong<T> {}

impl<T> Strong<T> {
    /// Wraps a reference that was counted already.
    ///
    /// # Safety
    /// The caller owns a reference on this slot and gives it away.
    #[inline]
    pub(crate) unsafe fn from_owned(slot: &Slot<T>) -> Self {
        Self { slot: NonNull::from(slot) }
    }

    #[inline]
    fn slot(&self) -> &Slot<T> {
        // SAFETY: our reference keeps the slot occupied; its occupant owns an Arc of the arena,
        // whose pages hold the slot and do not move.
        unsafe { self.slot.as_ref() }
    }

    /// Releases the reference and says whether it was the last. Otherwise like drop.
    #[inline]
    pub fn release(self) -> Release {
        let this = ManuallyDrop::new(self);
        // SAFETY: `this` owns one reference and is not used again; its drop does not run.
        unsafe { release(this.slot) }
    }

    /// The dead object if this is the only reference, bypassing the graveyard: for a close that
    /// needs the object at once. Takes the arena's lock for a moment and wakes the object's
    /// watchers, so this is a reap, not a release.
    ///
    /// # Errors
    /// The reference, unchanged, if there are others.
    pub fn into_dead(self) -> Result<Dead<T>, Self> {
        if !self.slot().release_if_last() {
            return Err(self);
        }
        let this = ManuallyDrop::new(self);
        // SAFETY: we made the count 0 and did not bury the slot: the dead object is ours, with its
        // occupant, which keeps the slot's memory.
        let slot = unsafe { this.slot.as_ref() };
        // SAFETY: as above.
        unsafe { slot.occupant() }.owner.free_list().closing += 1;
        // SAFETY: as above, and counted as closing.
        Ok(unsafe { Dead::new(slot) })
    }

    /// The object's handle.
    pub fn handle(&self) -> Handle<T> {
        self.slot().handle()
    }

    /// Whether both refer to the same object.
    pub fn ptr_eq(&self, other: &Self) -> bool {
        self.slot == other.slot
    }

    /// Number of references. For diagnostics: outdated on return.
    pub fn count(&self) -> usize {
        usize::try_from(self.slot().word().count()).unwrap_or(usize::MAX)
    }

    /// Another reference, unless there are 2³⁷ already.
    ///
    /// # Errors
    /// [`TooManyReferences`]; nothing has changed.
    #[inline]
    pub fn try_clone(&self) -> Result<Self, TooManyReferences> {
        self.slot().retain()?;
        Ok(Self { slot: self.slot })
    }

    /// Gives the reference a named holder until the [`Held`] is dropped.
    #[track_caller]
    pub fn held_by(self, holder: Holder) -> Held<T> {
        Held::register(self, holder, Location::caller())
    }

    /// As [`held_by`](Self::held_by), with the call site given: for a function that takes the
    /// reference for its caller.
    pub fn held_since(self, holder: Holder, since: &'static Location<'static>) -> Held<T> {
        Held::register(self, holder, since)
    }

    /// Lists the named holders.
    pub fn holders(&self) -> Vec<HolderInfo> {
        self.slot().side.lock().holders.list()
    }

    /// Number of references without a named holder. For diagnostics.
    pub fn anonymous(&self) -> usize {
        let held = self.holders().len();
        self.count().saturating_sub(held)
    }

    pub(crate) fn enroll(&self, entry: &std::sync::Arc<crate::holder::Entry>) {
        self.slot().side.lock().holders.add(entry);
    }
}

/// Releases a reference.
///
/// # Safety
/// `slot` is one on which the caller owns a reference, which is not used again.
#[inline]
unsafe fn release<T>(slot: NonNull<Slot<T>>) -> Release {
    // SAFETY: the caller's duty is the same.
    if !unsafe { Slot::release(slot.as_ptr()) } {
        return Release::NotLast;
    }
    // SAFETY: ours was the last reference; the slot stays occupied, hence allocated, until it is
    // reaped, which cannot happen before `bury`. Its load acquires, by reading our own decrement:
    // that continues the release sequence of every earlier one, so all that any holder did happens
    // before what the reaper does.
    unsafe { slot.as_ref() }.word();
    // SAFETY: we made the count 0, and do this once.
    unsafe { bury(slot) };
    Release::Last
}

/// Makes another reference: one atomic operation.
///
/// # Panics
/// If there are 2³⁷ references already, which takes leaking them or a tebibyte of them. The count
/// is put right before the panic and the object is unharmed. Unwinding was chosen over aborting,
/// which would take a whole VMM down, and over a saturated count, which would never close the
/// object and so lose its last flush silently. [`try_clone`](Strong::try_clone) does not panic.
impl<T> Clone for Strong<T> {
    #[inline]
    fn clone(&self) -> Self {
        match self.try_clone() {
            Ok(strong) => strong,
            Err(_) => too_many(),
        }
    }
}

#[cold]
#[inline(never)]
fn too_many() -> ! {
    panic!("{TooManyReferences}")
}

impl<T> Drop for Strong<T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: this is the drop: the reference is ours, and nothing follows.
        unsafe { release(self.slot) };
    }
}

impl<T> Deref for Strong<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: `self` owns a reference for as long as it is borrowed.
        unsafe { &self.slot().occupant().value }
    }
}

impl<T: fmt::Debug> fmt::Debug for Strong<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Strong").field("handle", &self.handle()).field("value", &**self).finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::{Arena, Kind, Stale, lifecycle::COUNT_LIMIT};

    #[test]
    fn too_many_references_are_refused_and_change_nothing() {
        let arena = Arena::new(Kind::new(1));
        let strong = arena.insert(7).unwrap();
        let limit = COUNT_LIMIT;
        strong.slot().force_count(limit);

        assert_eq!(strong.try_clone().err(), Some(TooManyReferences));
        assert!(catch_unwind(AssertUnwindSafe(|| strong.clone())).is_err());
        assert_eq!(arena.acquire(strong.handle()).err(), Some(Stale::TooManyReferences));
        assert_eq!(arena.check(strong.handle()), Ok(()), "it lives");
        assert_eq!(strong.count(), usize::try_from(limit).unwrap());

        strong.slot().force_count(limit - 1);
        let one_more = strong.clone();
        assert_eq!(strong.count(), usize::try_from(limit).unwrap());
        drop(one_more);
        drop(arena.acquire(strong.handle()).unwrap());
        strong.slot().force_count(1);
        assert_eq!(strong.release(), Release::Last);
        assert_eq!(arena.reap_all(), 1);
    }
}
