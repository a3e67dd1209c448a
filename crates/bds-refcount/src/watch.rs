//! `Watch<T>`: a future that completes when an object has lost its last reference.
//!
//! The state is read from the lifecycle word, so it is known at once and final. Only the wake-up of
//! a waiting task needs delivery: the watchers' wakers are stored in the slot, and the reap of the
//! object, or `deliver_watches`, takes them out and wakes them. A release wakes nothing.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use crate::{arena::Shared, handle::Handle, stale::Stale, sync::Arc};

/// A weak watch on one object: fires exactly once, after the object has become unacquirable, and at
/// once if it already was (or never lived).
///
/// As a future it completes with that. A task that waits is woken once, by
/// [`Arena::reap_one`](crate::Arena::reap_one),
/// [`Arena::deliver_watches`](crate::Arena::deliver_watches) or
/// [`Strong::into_dead`](crate::Strong::into_dead), never from inside a release. Dropping the watch
/// cancels it. It keeps neither the object alive nor the arena from being orphaned, only memory.
pub struct Watch<T> {
    shared: Arc<Shared<T>>,
    handle: Handle<T>,
    fired: bool,
    /// Key of our waker in the slot's list, once it is there.
    key: Option<u64>,
}

impl<T> Watch<T> {
    pub(crate) fn new(shared: Arc<Shared<T>>, handle: Handle<T>) -> Self {
        let fired = shared.check(handle).is_err();
        Self { shared, handle, fired, key: None }
    }

    /// The watched object's handle.
    pub fn handle(&self) -> Handle<T> {
        self.handle
    }

    /// Whether the object has become unacquirable. Once true, always true.
    pub fn has_fired(&self) -> bool {
        self.fired || self.refusal().is_some()
    }

    /// Completes when the object has become unacquirable.
    pub fn fired(&mut self) -> impl Future<Output = ()> + '_ {
        self
    }

    // A handle that resolved once is refused only for ever.
    fn refusal(&self) -> Option<Stale> {
        self.shared.check(self.handle).err()
    }

    /// Registers the waker unless the object has ended. True if it has ended.
    fn register(&mut self, waker: &Waker) -> bool {
        let Ok(slot) = self.shared.slot(self.handle) else { return true };
        let waker = waker.clone();
        let mut side = slot.side.lock();
        // Under the lock: if the object lives now, the wakers are taken out after we have
        // registered.
        if self.shared.check(self.handle).is_err() {
            return true;
        }
        let known = self.key.and_then(|key| side.watchers.iter_mut().find(|(k, _)| *k == key));
        let replaced = match known {
            Some((_, old)) => Some(std::mem::replace(old, waker)),
            None => {
                let key = side.next_watcher;
                side.next_watcher += 1;
                side.watchers.push((key, waker));
                self.key = Some(key);
                None
            }
        };
        drop(side);
        drop(replaced); // foreign code, outside the lock
        false
    }
}

impl<T> Future for Watch<T> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if !this.fired {
            this.fired = this.register(cx.waker());
        }
        if this.fired { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl<T> Drop for Watch<T> {
    fn drop(&mut self) {
        let (Some(key), Ok(slot)) = (self.key, self.shared.slot(self.handle)) else { return };
        // Keys are never used twice in a slot, so a later occupant's watchers are not touched.
        let mut side = slot.side.lock();
        let place = side.watchers.iter().position(|(k, _)| *k == key);
        let waker = place.map(|place| side.watchers.swap_remove(place));
        drop(side);
        drop(waker); // foreign code, outside the lock
    }
}

impl<T> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch")
            .field("handle", &self.handle)
            .field("fired", &self.has_fired())
            .finish()
    }
}
