//! `Dead<T>`: owns an object that has lost its last reference, so that it can be closed.

use std::{
    fmt, mem,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

use crate::{
    arena::Shared,
    handle::Handle,
    slot::{Occupant, Slot},
    sync::Arc,
};

/// Owns an object that has no references and can get none.
///
/// The value can be used, also mutably, for instance to flush and close it. Its slot is freed (or
/// retired) and its generation moves on only when this is dropped or the value is taken out; until
/// then the handle is [`Dying`](crate::Stale::Dying). May be sent to another thread, kept across an
/// await, and outlive the arena.
#[must_use = "dropping it drops the value and frees the slot"]
pub struct Dead<T> {
    slot: NonNull<Slot<T>>,
}

// SAFETY: owns a T and shares the arena (Arc<Shared<T>>), which is Send and Sync under these
// bounds.
unsafe impl<T: Send + Sync> Send for Dead<T> {}
// SAFETY: a shared Dead gives out only `&T`.
unsafe impl<T: Send + Sync> Sync for Dead<T> {}

/// Ends a slot whose occupant was taken out, also when the value's drop panics.
struct End<T> {
    slot: NonNull<Slot<T>>,
    owner: Arc<Shared<T>>,
}

impl<T> Drop for End<T> {
    fn drop(&mut self) {
        // SAFETY: `owner` keeps the slot's memory.
        let slot = unsafe { self.slot.as_ref() };
        // SAFETY: an End is made by `Dead::open` alone, which has taken the occupant of a dead
        // object out.
        unsafe { self.owner.end(slot, true) };
    }
}

impl<T> Dead<T> {
    /// Takes a dead object over and wakes its watchers.
    ///
    /// # Safety
    /// The object's count is 0, the caller owns the dead object, and it is counted as closing.
    pub(crate) unsafe fn new(slot: &Slot<T>) -> Self {
        let dead = Self { slot: NonNull::from(slot) };
        let watchers = mem::take(&mut slot.side.lock().watchers);
        watchers.into_iter().for_each(|(_, waker)| waker.wake());
        dead
    }

    fn slot(&self) -> &Slot<T> {
        // SAFETY: the dead object's occupant owns an Arc of the arena, which keeps the slot's
        // memory; it is taken out only by `open`, whose callers give `self` up.
        unsafe { self.slot.as_ref() }
    }

    /// The handle that the object had.
    pub fn handle(&self) -> Handle<T> {
        self.slot().handle()
    }

    /// Takes the value out, with the guard that ends the slot.
    ///
    /// # Safety
    /// `self` is not used again, and its drop does not run after this.
    unsafe fn open(&mut self) -> (T, End<T>) {
        // SAFETY: we own the dead object, and by the caller's duty this happens once.
        let Occupant { value, owner } = unsafe { self.slot().take() };
        (value, End { slot: self.slot, owner })
    }

    /// The value. The slot is free when this returns.
    pub fn into_inner(self) -> T {
        let mut this = mem::ManuallyDrop::new(self);
        // SAFETY: ManuallyDrop keeps the drop from running, and `this` ends here.
        let (value, end) = unsafe { this.open() };
        drop(end);
        value
    }
}

impl<T> Deref for Dead<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: we own the dead object and borrow it shared for as long as `self` is borrowed.
        unsafe { &self.slot().occupant().value }
    }
}

impl<T> DerefMut for Dead<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: we own the dead object, and `self` is borrowed exclusively.
        unsafe { self.slot().value_mut() }
    }
}

impl<T> Drop for Dead<T> {
    fn drop(&mut self) {
        // SAFETY: this is the drop; nothing follows.
        let (value, end) = unsafe { self.open() };
        // The value first: its slot is not free while its drop runs. `end` follows, also on
        // unwinding.
        drop(value);
        drop(end);
    }
}

impl<T: fmt::Debug> fmt::Debug for Dead<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dead").field("handle", &self.handle()).field("value", &**self).finish()
    }
}
