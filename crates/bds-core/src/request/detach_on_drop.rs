//! What a driver has begun ends, whatever becomes of the request.
//!
//! An operation that changes the medium cannot be called back: the engine, or the host's kernel, may carry it out at any
//! time later. If the request's future is dropped meanwhile, nothing of it may be forgotten, or a late write would land on
//! top of one that came after it and was flushed, and a drain, a change of the graph or a close would not wait for it.
//!
//! ```text
//! request ── gate, range, turn ── pace ──┬── driver's future, polled in place ── ended
//!            dropped here: it never was  └── dropped here: the same future goes on in a task that
//!                                            stays inside the node and those above, and keeps the ranges
//! ```
//!
//! The driver's future borrows from the node. While the request is there it borrows through the request, which costs
//! nothing; only one that is left behind takes a reference of its own (`bds_refcount::BorrowedFuture`).
//!
//! Reads are simply dropped: their memory and their file are the engine's until it is done, and they change nothing.
//! A future that its caller keeps or forgets is not dropped: it is the handle of a task that goes on (`backend::io`). A poisoned
//! node lets go of what it left behind.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bds_refcount::{BorrowedFuture, Strong};
use futures_util::future::select;

use super::admit::{DetachedGuard, Entered};
use crate::driver::BoxFuture;
use crate::graph::{InFlightGuard, Node, OwnedInFlight};
use crate::tracker::{DetachedRange, Tracked};

/// A request whose turn has come: where it is inside, and with what range.
pub(super) struct RequestScope<'a> {
    node: &'a Strong<Node>,
    /// In flight for this backend too, if it came in by one.
    backend_guard: Option<&'a InFlightGuard<'a>>,
    /// `None`: a flush, which touches no range.
    tracked: Option<&'a Tracked<'a>>,
    /// Where the same request is inside too, if the corridor itself brought it down here.
    above: Option<&'a RequestScope<'a>>,
}

impl<'a> RequestScope<'a> {
    /// A request that changes `tracked`.
    pub(super) fn new(request: &'a Entered<'_>, tracked: &'a Tracked<'a>) -> Self {
        Self { tracked: Some(tracked), ..Self::flush(request) }
    }

    /// A task of the corridor's own that changes `tracked`.
    pub(super) fn alone(node: &'a Strong<Node>, tracked: &'a Tracked<'a>) -> Self {
        Self { node, backend_guard: None, tracked: Some(tracked), above: None }
    }

    /// A flush.
    pub(super) fn flush(request: &'a Entered<'_>) -> Self {
        Self {
            node: request.strong(),
            backend_guard: request.backend_guard(),
            tracked: None,
            above: None,
        }
    }

    /// The same, inside `above` too.
    pub(super) fn below(self, above: Option<&'a RequestScope<'a>>) -> Self {
        Self { above, ..self }
    }

    pub(super) fn node(&self) -> &'a Node {
        self.node
    }

    /// As [`RequestScope::run`], for a change of `len` bytes, which the driver may pace.
    pub(super) async fn change<R: Send + 'static>(
        &self,
        len: u64,
        begin: impl for<'n> FnOnce(&'n Node) -> BoxFuture<'n, R>,
    ) -> R {
        if let Some(turn) = self.node.driver().pace(len) {
            turn.await;
        }
        self.run(begin).await
    }

    /// Does an operation of the driver. Once polled, it goes on if the answer is dropped.
    pub(super) fn run<R: Send + 'static>(
        &self,
        begin: impl for<'n> FnOnce(&'n Node) -> BoxFuture<'n, R>,
    ) -> DriverOp<'_, R> {
        DriverOp { work: Some(BorrowedFuture::new(self.node, begin)), inside: self }
    }

    /// What stays until the operation has ended: here and above.
    fn stays(&self) -> Vec<DetachedOp> {
        let mut stays = Vec::new();
        let mut here = Some(self);
        while let Some(inside) = here {
            let kept = inside.tracked.map(Tracked::detach);
            let lodger = DetachedGuard::new(inside.node);
            stays.push(DetachedOp {
                lodger,
                kept,
                _straggler: inside.backend_guard.map(InFlightGuard::again),
            });
            here = inside.above;
        }
        stays
    }
}

/// An operation of a driver. Made to be awaited at once.
pub(super) struct DriverOp<'a, R: Send + 'static> {
    /// `None` once ended, or if it panicked.
    work: Option<BorrowedFuture<'a, Node, R>>,
    inside: &'a RequestScope<'a>,
}

impl<R: Send + 'static> Future for DriverOp<'_, R> {
    type Output = R;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        // Out of our hands while it runs: what panics is not polled again.
        let mut work = self.work.take().expect("not polled again after it was ready");
        let result = Pin::new(&mut work).poll(cx);
        if result.is_pending() {
            self.work = Some(work);
        }
        result
    }
}

impl<R: Send + 'static> Drop for DriverOp<'_, R> {
    #[inline]
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            leave_behind(work, self.inside);
        }
    }
}

/// The request is gone; its operation is not.
#[cold]
fn leave_behind<R: Send + 'static>(work: BorrowedFuture<'_, Node, R>, inside: &RequestScope<'_>) {
    if inside.node.is_poisoned() {
        return;
    }
    let stays = inside.stays();
    let node = inside.node.clone();
    let work = work.keep();
    let to_the_end = async move {
        // Dropped last, also if the task is dropped unfinished.
        let (_stays, node) = (stays, node);
        let given_up = pin!(node.tracker().wait_given_up());
        // What would never end stays with whoever has it.
        drop(select(work, given_up).await);
    };
    bds_io::spawn(to_the_end).detach();
}

/// One node's part in an operation whose request has gone.
struct DetachedOp {
    lodger: DetachedGuard,
    kept: Option<DetachedRange>,
    /// Last, as with a request.
    _straggler: Option<OwnedInFlight>,
}

impl Drop for DetachedOp {
    fn drop(&mut self) {
        if let Some(kept) = self.kept.take() {
            // The next flush has work; then the range is free; then, with the lodger, the node.
            drop(self.lodger.writing());
            self.lodger.tracker().release_detached(kept);
        }
    }
}
