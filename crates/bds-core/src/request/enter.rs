//! Through the gate: a request becomes one that a drain waits for.

use std::ops::{Deref, Range};

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, Node, Target};
use crate::traffic::{ShardNumber, Tracked, Writing};

/// The node an edge led to, with this request counted in. Dropping counts out.
pub(super) struct Entered {
    target: Target,
    number: ShardNumber,
}

/// Waits at the gate until it is open, then enters.
pub(super) async fn enter(edge: &Edge) -> Entered {
    loop {
        if let Some(entered) = try_enter(edge) {
            return entered;
        }
        // Not counted anywhere: queued is not in flight, so a drain does not wait for us.
        Box::pin(edge.wait_open()).await;
    }
}

#[inline]
fn try_enter(edge: &Edge) -> Option<Entered> {
    let ticket = edge.ticket()?;
    let target = edge.target();
    let number = target.traffic().enter();
    let entered = Entered { target, number };
    edge.admits(ticket).then_some(entered)
}

impl Deref for Entered {
    type Target = Node;

    #[inline]
    fn deref(&self) -> &Node {
        &self.target
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.target.traffic().leave(self.number);
    }
}

impl Entered {
    /// Counts in once more, for work that outlives this request. `edge` is the one it came through; its gate is not
    /// asked: who is inside may bring what belongs to him, and whoever closed the gate waits for both.
    pub(super) fn again(&self, edge: &Edge) -> Entered {
        let target = edge.target();
        debug_assert!(std::ptr::eq::<Node>(&*target, &**self), "not re-pointed while inside");
        let number = target.traffic().enter();
        Entered { target, number }
    }

    /// From here on the node counts as written to.
    pub(super) fn writing(&self) -> Writing<'_> {
        self.traffic().writing(self.number)
    }

    /// Registers the range and waits for its turn.
    pub(super) async fn track(&self, range: Range<u64>, is_serialising: bool) -> Tracked<'_> {
        let mut tracked = self.traffic().track(self.number, range, is_serialising);
        if !tracked.may_go() {
            Box::pin(tracked.wait_turn()).await;
        }
        tracked
    }

    /// As [`Entered::track`], but fails rather than wait for an overlapping request if `no_wait`.
    pub(super) async fn track_unless(
        &self,
        range: Range<u64>,
        is_serialising: bool,
        no_wait: bool,
    ) -> Result<Tracked<'_>> {
        let mut tracked = self.traffic().track(self.number, range.clone(), is_serialising);
        if no_wait && tracked.has_conflict() {
            return Err(Error::new(
                ErrorKind::WouldWait,
                "an overlapping request is under way and the caller will not wait",
            )
            .at(range.start));
        }
        if !tracked.may_go() {
            Box::pin(tracked.wait_turn()).await;
        }
        Ok(tracked)
    }
}

/// Names the node a request failed on, unless one below is named already.
pub(super) fn named<T>(node: &Node, result: Result<T>) -> Result<T> {
    result.map_err(|error| error.node(node.name()))
}
