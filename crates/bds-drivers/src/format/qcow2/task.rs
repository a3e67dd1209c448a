//! Tasks that run to completion although the future that started them is dropped.
//!
//! A request's future may be dropped at any await. It is polled until then: it is part of a task,
//! not of the caller's future (`bds_core::request`), so a guard of `srcu` in it does not depend on
//! the caller. Work that must not end with the request, because other requests wait for it (an
//! allocation in flight, a table being loaded, metadata on its way to the disk), runs in a task of
//! its own: [`detach_on_drop`]. An in-place write has no such waiters, but its bytes are on their
//! way to clusters that must not be reused meanwhile; it is polled by its request and moves into a
//! task only if it is dropped half-way: [`SpawnOnDrop`].
//!
//! `bds_io::spawn_now` replaces neither: dropping its handle drops the future.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bds_io::DetachOnDrop;
use bds_io::sync::{Notify, Semaphore};
use futures_util::stream::{FuturesUnordered, StreamExt};

/// Spawns `work` and waits for it. Dropping the future detaches the task, which runs to completion.
pub(crate) fn detach_on_drop<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> DetachOnDrop<T> {
    bds_io::spawn(work).detach_on_drop()
}

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A future that moves into a task of its own if it is dropped after its first poll.
pub(crate) struct SpawnOnDrop<T: Send + 'static> {
    work: Option<Boxed<T>>,
    has_begun: bool,
}

impl<T: Send + 'static> SpawnOnDrop<T> {
    pub(crate) fn new(work: impl Future<Output = T> + Send + 'static) -> Self {
        Self { work: Some(Box::pin(work)), has_begun: false }
    }
}

impl<T: Send + 'static> Future for SpawnOnDrop<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.has_begun = true;
        let work = self.work.as_mut().expect("not polled again after it was ready");
        let result = work.as_mut().poll(cx);
        if result.is_ready() {
            self.work = None;
        }
        result
    }
}

impl<T: Send + 'static> Drop for SpawnOnDrop<T> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take().filter(|_| self.has_begun) {
            bds_io::spawn(work).detach();
        }
    }
}

/// Futures polled concurrently. Allocates nothing before the first push: most requests have one
/// part, which needs no set.
#[derive(Debug)]
pub(crate) struct LazyUnordered<F>(Option<FuturesUnordered<F>>);

impl<F: Future> LazyUnordered<F> {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.as_ref().map_or(0, FuturesUnordered::len)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn push(&mut self, future: F) {
        self.0.get_or_insert_default().push(future);
    }

    /// The result of the next future that completes; `None` if there is none.
    pub(crate) async fn next(&mut self) -> Option<F::Output> {
        self.0.as_mut()?.next().await
    }
}

/// A one-time event with any number of waiters.
#[derive(Debug)]
pub(crate) struct Completion(Semaphore);

impl Completion {
    pub(crate) fn new() -> Self {
        Self(Semaphore::new(0))
    }

    /// Completes: wakes all waiters; later waits return at once.
    pub(crate) fn set(&self) {
        self.0.close();
    }

    pub(crate) async fn wait(&self) {
        // The semaphore never has a permit: this returns when it is closed.
        let closed = self.0.acquire().await;
        debug_assert!(closed.is_err());
    }
}

/// Counts tasks that outlive their callers, so that closing can wait for them.
#[derive(Debug, Default)]
pub(crate) struct TaskCount {
    count: AtomicUsize,
    idle: Notify,
}

/// Counts one running task until it is dropped.
#[derive(Debug)]
pub(crate) struct TaskGuard(Arc<TaskCount>);

impl TaskCount {
    pub(crate) fn begin(self: &Arc<Self>) -> TaskGuard {
        self.count.fetch_add(1, Ordering::SeqCst);
        TaskGuard(Arc::clone(self))
    }

    /// Waits until no task is running. One waiter at a time.
    pub(crate) async fn wait_idle(&self) {
        while self.count.load(Ordering::SeqCst) > 0 {
            // A permit given between the look and the wait is kept.
            self.idle.notified().await;
        }
    }
}

impl Drop for TaskGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_one();
        }
    }
}
