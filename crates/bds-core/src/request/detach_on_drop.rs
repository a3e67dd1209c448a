//! Runs driver operations to completion: one that was polled once goes on in a task if its request
//! is dropped.
//!
//! An operation that changes the medium cannot be cancelled: the engine or the host's kernel may
//! carry it out at any later time. If it were forgotten with its request, a late write would land
//! on top of a later one that was flushed, and a drain, a graph change or a close would not wait
//! for it.
//!
//! ```text
//! request ── gate, range, turn ── pace ──┬── driver's future, polled in place ── done
//!            dropped here: no effect     └── dropped here: the same future goes on in a task that stays in
//!                                            flight at this node and those above, and keeps the ranges
//! ```
//!
//! The driver's future borrows from the node. As long as the request exists it borrows through the
//! request, which costs nothing; only a detached one takes a reference of its own
//! (`bds_refcount::BorrowedFuture`).
//!
//! Reads are simply dropped: their memory and file belong to the engine until it is done, and they
//! change nothing. A request's future that is kept without being polled, or forgotten, is not
//! dropped: it is the handle of a task (`backend::io`). A poisoned node drops its detached
//! operations.

use std::ops::Range;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bds_refcount::BorrowedFuture;
use futures_util::future::select;

use super::admit::{Change, DetachedGuard, RequestScope, record};
use crate::driver::BoxFuture;
use crate::graph::{InFlightGuard, Node, OwnedInFlight};
use crate::tracker::{DetachedRange, Tracked};

impl RequestScope<'_> {
    /// As [`RequestScope::run`], after [`RequestScope::pause`].
    pub(super) async fn run_paced<R: Send + 'static>(
        &self,
        len: u64,
        begin: impl for<'n> FnOnce(&'n Node) -> BoxFuture<'n, R>,
    ) -> R {
        self.pause(len).await;
        self.run(begin).await
    }

    /// Waits as long as the driver paces a change of `len` bytes. Dropped meanwhile: no effect.
    pub(super) async fn pause(&self, len: u64) {
        if let Some(turn) = self.node.driver().pace(len) {
            turn.await;
        }
    }

    /// Runs an operation of the driver. Once polled, it runs to completion even if it is dropped.
    pub(super) fn run<R: Send + 'static>(
        &self,
        begin: impl for<'n> FnOnce(&'n Node) -> BoxFuture<'n, R>,
    ) -> DriverOp<'_, R> {
        DriverOp { future: Some(BorrowedFuture::new(self.node, begin)), scope: self }
    }

    /// What a detached operation holds until it is done: at this node and at those above.
    fn detached_ops(&self) -> Vec<DetachedOp> {
        let mut ops = Vec::new();
        let mut next = Some(self);
        while let Some(scope) = next {
            let range = scope.tracked.as_ref().map(Tracked::detach);
            let bytes = scope.tracked.as_ref().map(|tracked| tracked.range().clone());
            let change = scope.change.zip(bytes);
            let guard = DetachedGuard::new(scope.node);
            let backend_guard = scope.backend_guard.map(InFlightGuard::again);
            ops.push(DetachedOp { guard, range, change, _backend_guard: backend_guard });
            next = scope.above;
        }
        ops
    }
}

/// An operation of a driver. Made to be awaited at once.
pub(super) struct DriverOp<'a, R: Send + 'static> {
    /// `None` once done, or if it panicked.
    future: Option<BorrowedFuture<'a, Node, R>>,
    scope: &'a RequestScope<'a>,
}

impl<R: Send + 'static> Future for DriverOp<'_, R> {
    type Output = R;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        // Taken out while it is polled: a future that panics is not polled again.
        let mut future = self.future.take().expect("not polled again after it was ready");
        let result = Pin::new(&mut future).poll(cx);
        if result.is_pending() {
            self.future = Some(future);
        }
        result
    }
}

impl<R: Send + 'static> Drop for DriverOp<'_, R> {
    #[inline]
    fn drop(&mut self) {
        if let Some(future) = self.future.take() {
            detach(future, self.scope);
        }
    }
}

/// Moves the operation of a dropped request into a task.
#[cold]
fn detach<R: Send + 'static>(future: BorrowedFuture<'_, Node, R>, scope: &RequestScope<'_>) {
    if scope.node.is_poisoned() {
        return;
    }
    let ops = scope.detached_ops();
    let node = scope.node.clone();
    let future = future.keep();
    let run_to_completion = async move {
        // Dropped last, also if the task is dropped unfinished.
        let (_ops, node) = (ops, node);
        let given_up = pin!(node.tracker().wait_given_up());
        // An operation that never ends is dropped when its node is poisoned.
        drop(select(future, given_up).await);
    };
    bds_io::spawn(run_to_completion).detach();
}

/// One node's part of a detached operation: counts and range.
struct DetachedOp {
    guard: DetachedGuard,
    range: Option<DetachedRange>,
    /// Recorded in the node's bitmaps at the end: a bitmap may have been cleared since the request
    /// was dropped.
    change: Option<(Change, Range<u64>)>,
    /// Dropped last, as in a request.
    _backend_guard: Option<OwnedInFlight>,
}

impl Drop for DetachedOp {
    fn drop(&mut self) {
        if let Some(range) = self.range.take() {
            // First the next flush has work, then bitmaps know, then the range is free, then the
            // node (with the guard).
            drop(self.guard.writing());
            if let Some((change, bytes)) = &self.change {
                record(&self.guard, *change, bytes);
            }
            self.guard.tracker().release_detached(range);
        }
    }
}
