//! Queues dead objects until they are reaped: a lock-free stack for releases, a queue for reaps.
//!
//! A last release does three things here: one increment, one store, one compare-exchange. It drops
//! nothing, calls nothing and does not wait. A reap empties the stack in one swap and appends it,
//! oldest first, to the queue, so objects are reaped in the order of their deaths: a parent before
//! the children that only it held.
//!
//! **After the last `Arena` was dropped.** Nothing can reap then, and values must neither leak nor
//! be dropped recursively. The head has two flags: ORPHAN, set when the last `Arena` is dropped,
//! and DRAINING. A release that pushes on an orphaned graveyard without DRAINING sets it with the
//! same compare-exchange and becomes the drainer: it drops dead values one after another until the
//! stack is empty, which the exchange that clears DRAINING proves. Releases inside those drops, or
//! on other threads, see DRAINING and only push. So even then the stack depth is constant, and
//! every value is dropped exactly once.

use std::ptr::NonNull;

use crate::{
    arena::{Arena, Shared},
    dead::Dead,
    handle::{Handle, INDEX_BITS},
    slot::Slot,
    sync::{Arc, AtomicU32, AtomicUsize, Mutex, Ordering},
};

/// A link is a slot's place plus one; 0 ends a chain.
const LINK: u32 = (1 << (INDEX_BITS + 1)) - 1;
const ORPHAN: u32 = 1 << 30;
const DRAINING: u32 = 1 << 31;
// The three have no bit in common (asserted below), so joining them by `|`, `^` or `+` is the same.

/// The queue's ends, as links. Chained through the slots' `next`.
struct Queue {
    front: u32,
    back: u32,
}

// Releases and reaps write here; look-ups read the fields around it. On lines of its own, so that
// they do not meet.
#[repr(align(128))]
pub(crate) struct Graveyard {
    /// Top of the stack, and the flags. Pushed by compare-exchange, emptied as a whole: so no ABA.
    head: AtomicU32,
    /// Objects on the stack and in the queue. Raised before the push, so that it never falls short.
    waiting: AtomicUsize,
    /// Lock order: queue, then free list, then a slot's side.
    queue: Mutex<Queue>,
}

impl Graveyard {
    pub(crate) fn new() -> Self {
        Self {
            head: AtomicU32::new(0),
            waiting: AtomicUsize::new(0),
            queue: Mutex::new(Queue { front: 0, back: 0 }),
        }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// Puts a dead object into the graveyard: the second half of a last release.
///
/// # Safety
/// The caller made the decrement to 0 on the slot that this points to, and does this once.
#[cold]
pub(crate) unsafe fn bury<T>(slot: NonNull<Slot<T>>) {
    // SAFETY: the slot stays occupied, hence allocated, at least until it is reaped, which cannot
    // happen before the push below; and then `shared` keeps it. (A pointer and not a reference as
    // the argument, because a reference would claim the slot until this function has returned, and
    // so longer than `shared` does.)
    let slot = unsafe { slot.as_ref() };
    // As soon as the slot is on the stack a reaper may free it, and with it the arena; our own Arc
    // keeps the memory (not the occupant) until we are done. SAFETY: until the push below, the dead
    // object is ours alone, so we may borrow it shared.
    let shared = Arc::clone(unsafe { &slot.occupant().owner });
    let graveyard = &shared.graveyard;
    graveyard.waiting.fetch_add(1, Ordering::Relaxed);
    let mut head = graveyard.head.load(Ordering::Relaxed);
    let drains = loop {
        slot.next.store(head & LINK, Ordering::Relaxed);
        let flags = if head & ORPHAN != 0 { ORPHAN | DRAINING } else { 0 };
        // Release: the reaper sees the link and everything that any holder did to the object. The
        // holders' release decrements reached us through the load in `strong::release`.
        match graveyard.head.compare_exchange_weak(
            head,
            (slot.place() + 1) | flags,
            Ordering::AcqRel,
            Ordering::Relaxed,
        ) {
            Ok(_) => break head & (ORPHAN | DRAINING) == ORPHAN,
            Err(now) => head = now,
        }
    };
    if drains {
        Drain { shared: &shared, done: false }.drain();
    }
}

impl<T> Shared<T> {
    /// Moves the stack to the queue, oldest first.
    fn collect(&self, queue: &mut Queue) {
        // Acquire: pairs with the pushes. The flags stay.
        let mut link = self.graveyard.head.fetch_and(!LINK, Ordering::AcqRel) & LINK;
        let back = link;
        let mut front = 0;
        while link != 0 {
            let slot = self.slot_at(link - 1);
            let older = slot.next.load(Ordering::Relaxed);
            slot.next.store(front, Ordering::Relaxed);
            front = link;
            link = older;
        }
        if front == 0 {
            return;
        }
        if queue.back == 0 {
            queue.front = front;
        } else {
            self.slot_at(queue.back - 1).next.store(front, Ordering::Relaxed);
        }
        queue.back = back;
    }

    pub(crate) fn reap_one(&self) -> Option<(Handle<T>, Dead<T>)> {
        let mut queue = self.graveyard.queue.lock();
        if queue.front == 0 {
            self.collect(&mut queue);
        }
        let link = queue.front;
        if link == 0 {
            return None;
        }
        let slot = self.slot_at(link - 1);
        queue.front = slot.next.load(Ordering::Relaxed);
        if queue.front == 0 {
            queue.back = 0;
        }
        // From waiting to closing in one step for those that count under the free list's lock.
        let mut free_list = self.free_list();
        self.graveyard.waiting.fetch_sub(1, Ordering::Relaxed);
        free_list.closing += 1;
        drop(free_list);
        drop(queue);
        // SAFETY: the slot was buried once, by the release that made it dead, and we alone took it
        // out.
        Some((slot.handle(), unsafe { Dead::new(slot) }))
    }

    pub(crate) fn deliver_watches(&self) -> usize {
        let mut queue = self.graveyard.queue.lock();
        self.collect(&mut queue);
        let mut wakers = Vec::new();
        let mut link = queue.front;
        while link != 0 {
            let slot = self.slot_at(link - 1);
            wakers.append(&mut slot.side.lock().watchers);
            link = slot.next.load(Ordering::Relaxed);
        }
        drop(queue);
        let woken = wakers.len();
        wakers.into_iter().for_each(|(_, waker)| waker.wake());
        woken
    }

    /// Marks the arena as orphaned: drops what is dead, and leaves the rest to later releases.
    pub(crate) fn orphan(&self) {
        // DRAINING is not set yet: only orphaned graveyards are drained.
        self.graveyard.head.fetch_or(ORPHAN | DRAINING, Ordering::AcqRel);
        Drain { shared: self, done: false }.drain();
    }
}

/// Drops the dead objects of an orphaned arena. If a value's drop panics, the drop of this guard
/// goes on with the rest, as `Vec`'s does.
struct Drain<'a, T> {
    shared: &'a Shared<T>,
    done: bool,
}

impl<T> Drain<'_, T> {
    fn drain(&mut self) {
        while !self.done {
            while let Some(dead) = self.shared.reap_one() {
                drop(dead);
            }
            // Succeeds only on an empty stack, so nothing pushed under DRAINING is left behind.
            let head = &self.shared.graveyard.head;
            self.done = head
                .compare_exchange(ORPHAN | DRAINING, ORPHAN, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok();
        }
    }
}

impl<T> Drop for Drain<'_, T> {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Iterates over dead objects until there are none. See [`Arena::reap`].
#[must_use = "nothing is reaped until the iterator is driven"]
#[derive(Debug)]
pub struct Reap<'a, T> {
    arena: &'a Arena<T>,
}

impl<'a, T> Reap<'a, T> {
    pub(crate) fn new(arena: &'a Arena<T>) -> Self {
        Self { arena }
    }
}

impl<T> Iterator for Reap<'_, T> {
    type Item = (Handle<T>, Dead<T>);

    fn next(&mut self) -> Option<Self::Item> {
        self.arena.reap_one()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_flags_share_no_bit() {
        let largest = 1 << INDEX_BITS; // of the last place
        assert_eq!(LINK & largest, largest);
        assert_eq!(LINK, 0x01ff_ffff, "all bits below the largest link's");
        assert_eq!([LINK & ORPHAN, LINK & DRAINING, ORPHAN & DRAINING], [0; 3]);
    }
}
