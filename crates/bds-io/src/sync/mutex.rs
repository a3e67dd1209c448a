//! `Mutex<T>`: an exclusive lock whose guard may be held across awaits.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use tokio::sync as imp;

/// An exclusive lock that a task waits for without blocking its thread. FIFO; not poisoned by a
/// panic.
#[derive(Default)]
#[repr(transparent)]
pub struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    /// An unlocked mutex.
    pub fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    /// Waits for the lock.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(self.0.lock().await)
    }

    /// Takes the lock if it is free.
    ///
    /// # Errors
    /// [`TryLockError`] if it is held or reserved for a waiter.
    pub fn try_lock(&self) -> Result<MutexGuard<'_, T>, TryLockError> {
        self.0.try_lock().map(MutexGuard).map_err(|_| TryLockError)
    }

    /// Waits for the lock; the guard keeps the mutex alive.
    pub async fn lock_owned(self: Arc<Self>) -> OwnedMutexGuard<T> {
        OwnedMutexGuard(self.into_inner_arc().lock_owned().await)
    }

    fn into_inner_arc(self: Arc<Self>) -> Arc<imp::Mutex<T>> {
        // SAFETY: the pointer comes from Arc::into_raw. `Mutex` is a transparent wrapper, so both
        // types have the same size, alignment and layout, and dropping one is dropping the other.
        unsafe { Arc::from_raw(Arc::into_raw(self).cast::<imp::Mutex<T>>()) }
    }

    /// The value, which the exclusive borrow shows to be unlocked.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }

    /// Takes the value out.
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T: fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Holds a [`Mutex`] until it is dropped.
#[must_use = "dropping the guard unlocks the mutex"]
pub struct MutexGuard<'a, T>(imp::MutexGuard<'a, T>);

/// Holds a [`Mutex`], and keeps it alive, until it is dropped.
#[must_use = "dropping the guard unlocks the mutex"]
pub struct OwnedMutexGuard<T>(imp::OwnedMutexGuard<T>);

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Deref for OwnedMutexGuard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for OwnedMutexGuard<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: fmt::Debug> fmt::Debug for OwnedMutexGuard<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The mutex is held, or reserved for a task that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TryLockError;

impl fmt::Display for TryLockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the lock is held")
    }
}

impl std::error::Error for TryLockError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_guards_keep_the_mutex_and_unlock_it() {
        let mutex = Arc::new(Mutex::new(String::from("a")));
        let mut guard = crate::block_on(Arc::clone(&mutex).lock_owned());
        guard.push('b');
        assert_eq!(mutex.try_lock().err(), Some(TryLockError));
        assert_eq!(Arc::strong_count(&mutex), 2);
        drop(guard);
        assert_eq!(mutex.try_lock().map(|text| text.clone()), Ok("ab".into()));
        let mutex = Arc::into_inner(mutex).expect("the guard's reference is gone");
        assert_eq!(mutex.into_inner(), "ab");
    }
}
