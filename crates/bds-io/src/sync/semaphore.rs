//! `Semaphore`: limits how many tasks do something at once, or counts things that tasks wait for.

use std::fmt;
use std::sync::Arc;

use tokio::sync as imp;

/// A number of permits that tasks take and return. FIFO.
#[derive(Debug)]
#[repr(transparent)]
pub struct Semaphore(imp::Semaphore);

impl Semaphore {
    /// A semaphore with this many permits.
    pub fn new(permits: usize) -> Self {
        Self(imp::Semaphore::new(permits))
    }

    /// Adds permits.
    pub fn add_permits(&self, count: usize) {
        self.0.add_permits(count);
    }

    /// Number of permits that are free now.
    pub fn available_permits(&self) -> usize {
        self.0.available_permits()
    }

    /// Waits for a permit.
    ///
    /// # Errors
    /// [`Closed`] if the semaphore is or gets closed.
    pub async fn acquire(&self) -> Result<SemaphorePermit<'_>, Closed> {
        self.acquire_many(1).await
    }

    /// Waits for `count` permits at once.
    ///
    /// # Errors
    /// [`Closed`] if the semaphore is or gets closed.
    pub async fn acquire_many(&self, count: u32) -> Result<SemaphorePermit<'_>, Closed> {
        self.0.acquire_many(count).await.map(SemaphorePermit).map_err(|_| Closed)
    }

    /// Waits for a permit that keeps the semaphore alive.
    ///
    /// # Errors
    /// [`Closed`] if the semaphore is or gets closed.
    pub async fn acquire_owned(self: Arc<Self>) -> Result<OwnedSemaphorePermit, Closed> {
        // SAFETY: the pointer comes from Arc::into_raw. `Semaphore` is a transparent wrapper, so
        // both types have the same size, alignment and layout, and dropping one is dropping the
        // other.
        let inner = unsafe { Arc::from_raw(Arc::into_raw(self).cast::<imp::Semaphore>()) };
        inner.acquire_owned().await.map(OwnedSemaphorePermit).map_err(|_| Closed)
    }

    /// Closes it: all waiters, now and later, get [`Closed`].
    pub fn close(&self) {
        self.0.close();
    }
}

/// Permits of a [`Semaphore`], returned when dropped.
#[derive(Debug)]
#[must_use = "dropping it returns the permit"]
pub struct SemaphorePermit<'a>(imp::SemaphorePermit<'a>);

impl SemaphorePermit<'_> {
    /// Consumes the permits: they are not returned.
    pub fn forget(self) {
        self.0.forget();
    }
}

/// As [`SemaphorePermit`], and keeps the semaphore alive.
#[derive(Debug)]
#[must_use = "dropping it returns the permit"]
pub struct OwnedSemaphorePermit(imp::OwnedSemaphorePermit);

impl OwnedSemaphorePermit {
    /// Consumes the permits: they are not returned.
    pub fn forget(self) {
        self.0.forget();
    }
}

/// The semaphore was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the semaphore is closed")
    }
}

impl std::error::Error for Closed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owned_permits_return_when_dropped_and_close_fails_waiters() {
        let semaphore = Arc::new(Semaphore::new(1));
        let permit = crate::block_on(Arc::clone(&semaphore).acquire_owned()).unwrap();
        assert_eq!((semaphore.available_permits(), Arc::strong_count(&semaphore)), (0, 2));
        drop(permit);
        crate::block_on(semaphore.acquire()).unwrap().forget();
        assert_eq!((semaphore.available_permits(), Arc::strong_count(&semaphore)), (0, 1));
        semaphore.close();
        assert_eq!(crate::block_on(semaphore.acquire()).err(), Some(Closed));
    }
}
