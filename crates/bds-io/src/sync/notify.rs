//! `Notify`: wakes waiting tasks, and waits for a condition that other tasks make true.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use tokio::sync as imp;

/// Wakes tasks that wait for something to change.
#[derive(Debug, Default)]
pub struct Notify(imp::Notify);

impl Notify {
    /// A notify without a stored wake-up.
    pub fn new() -> Self {
        Self(imp::Notify::new())
    }

    /// Wakes the task that has waited longest. If none waits, the next one to wait is woken at once
    /// (at most one such wake-up is stored).
    pub fn notify_one(&self) {
        self.0.notify_one();
    }

    /// Wakes all tasks that wait now; stores nothing.
    pub fn notify_waiters(&self) {
        self.0.notify_waiters();
    }

    /// Completes with the next wake-up. Counts as waiting from its first poll, or from
    /// [`Notified::enable`].
    pub fn notified(&self) -> Notified<'_> {
        Notified(self.0.notified())
    }

    /// Waits until `condition` holds: it is evaluated now and after every wake-up.
    ///
    /// A change that is followed by [`notify_waiters`](Self::notify_waiters) is never missed: the
    /// task counts as waiting before each evaluation.
    pub async fn wait_until(&self, mut condition: impl FnMut() -> bool) {
        self.wait_for(|| condition().then_some(())).await;
    }

    /// As [`wait_until`](Self::wait_until), for a condition that gives a value.
    pub async fn wait_for<T>(&self, mut value: impl FnMut() -> Option<T>) -> T {
        loop {
            let mut changed = pin!(self.notified());
            changed.as_mut().enable();
            if let Some(value) = value() {
                return value;
            }
            changed.await;
        }
    }
}

/// Future of [`Notify::notified`].
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct Notified<'a>(imp::futures::Notified<'a>);

impl<'a> Notified<'a> {
    /// Begins to wait without a poll. True if a wake-up was stored or has come already.
    pub fn enable(self: Pin<&mut Self>) -> bool {
        self.inner().enable()
    }

    fn inner(self: Pin<&mut Self>) -> Pin<&mut imp::futures::Notified<'a>> {
        // SAFETY: the field is pinned with the struct: nothing moves it out, the struct has no
        // `Drop` and is `Unpin` only if the field is.
        unsafe { self.map_unchecked_mut(|this| &mut this.0) }
    }
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.inner().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn wait_until_sees_a_change_from_another_thread() {
        let shared = Arc::new((Notify::new(), AtomicU32::new(0)));
        let other = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for _ in 0..1000 {
                other.1.fetch_add(1, Ordering::SeqCst);
                other.0.notify_waiters();
            }
        });
        let (notify, count) = &*shared;
        crate::block_on(async {
            for number in (0..=1000).step_by(10) {
                notify.wait_until(|| count.load(Ordering::SeqCst) >= number).await;
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn wait_for_returns_the_value_at_once_if_it_is_there() {
        let mut polls = 0;
        let value = crate::block_on(Notify::new().wait_for(|| {
            polls += 1;
            Some(7)
        }));
        assert_eq!((value, polls), (7, 1));
    }
}
