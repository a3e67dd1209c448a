//! Through the gate: a request becomes one that a drain waits for.

use std::ops::{Deref, Range};

use bds_refcount::Strong;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, InFlightGuard, Node, Target};
use crate::tracker::{ShardNumber, Tracked, Writing};

/// The node an edge led to, with this request counted in: at the node, and at the backend it came in by. Dropping counts out.
pub(super) struct Entered<'e> {
    target: Target<'e>,
    number: ShardNumber,
    /// After the node's: a backend's drain lets nobody overtake the node's.
    lodged: Option<InFlightGuard<'e>>,
}

/// Why a request did not come in. Until this is dropped it is in flight for its backend all the same.
pub(super) struct TurnedAway<'e> {
    error: Error,
    lodged: Option<InFlightGuard<'e>>,
}

impl<'e> TurnedAway<'e> {
    /// The reason, and what keeps the request in flight.
    pub(super) fn into_parts(self) -> (Error, Option<InFlightGuard<'e>>) {
        (self.error, self.lodged)
    }
}

/// Waits at the gate until it is open, then enters.
///
/// # Errors
/// `NoMedium`: the edge leads nowhere. `Io`: the node's requests were given up.
pub(super) async fn enter(edge: &Edge) -> Result<Entered<'_>> {
    enter_hall(edge).await.map_err(|away| away.error)
}

/// As [`enter`], for a backend's requests: who has to go again is counted while he still has something to write down.
///
/// # Errors
/// Also `Cancelled`: the graph was shut down while the request waited at the gate.
pub(super) async fn enter_hall(edge: &Edge) -> Result<Entered<'_>, TurnedAway<'_>> {
    loop {
        if let Some(entered) = try_enter(edge) {
            return entered;
        }
        // Not counted anywhere: queued is not in flight, so a drain does not wait for us.
        Box::pin(edge.wait_open()).await;
        if edge.backend_in_flight().is_some_and(|in_flight| in_flight.is_ended()) {
            return Err(TurnedAway { error: ended(edge), lodged: None });
        }
    }
}

/// `None`: the gate is closed.
#[inline]
fn try_enter(edge: &Edge) -> Option<Result<Entered<'_>, TurnedAway<'_>>> {
    let ticket = edge.ticket()?;
    let lodged = edge.backend_in_flight().map(|in_flight| in_flight.enter());
    let Some(target) = edge.medium() else {
        let away = || TurnedAway { error: no_medium(edge), lodged };
        return edge.admits(ticket).then(|| Err(away()));
    };
    if target.is_poisoned() {
        return Some(Err(TurnedAway { error: poisoned(&target), lodged }));
    }
    let number = target.tracker().enter();
    let entered = Entered { target, number, lodged };
    edge.admits(ticket).then_some(Ok(entered))
}

#[cold]
fn ended(edge: &Edge) -> Error {
    let words = format!("{} waited for its turn when the graph was shut down", edge.holder());
    Error::new(ErrorKind::Cancelled, words)
}

#[cold]
fn no_medium(edge: &Edge) -> Error {
    let words = format!("{} has no medium: insert one", edge.holder());
    Error::new(ErrorKind::NoMedium, words)
}

#[cold]
fn poisoned(node: &Node) -> Error {
    let words = "its requests were given up (poisoned): replace it or close it";
    Error::new(ErrorKind::Io, words).node(node.name())
}

impl Deref for Entered<'_> {
    type Target = Node;

    #[inline]
    fn deref(&self) -> &Node {
        &self.target
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.target.tracker().leave(self.number);
    }
}

impl Entered<'_> {
    /// Counts in once more, for work that outlives this request. The gate is not asked: who is inside may bring what
    /// belongs to him, and whoever closed the gate waits for both.
    pub(super) fn again(&self) -> DetachedGuard {
        DetachedGuard::new(self.strong())
    }

    /// As which request of its backend it is in flight, if it came in by one.
    pub(super) fn lodged(&self) -> Option<&InFlightGuard<'_>> {
        self.lodged.as_ref()
    }

    /// The counted reference behind it.
    #[inline]
    pub(super) fn strong(&self) -> &Strong<Node> {
        self.target.strong()
    }

    /// From here on the node counts as written to.
    pub(super) fn writing(&self) -> Writing<'_> {
        self.tracker().writing(self.number)
    }

    /// Registers the range and waits for its turn.
    pub(super) async fn track(&self, range: Range<u64>, is_serialising: bool) -> Tracked<'_> {
        let mut tracked = self.tracker().track(self.number, range, is_serialising);
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
        let mut tracked = self.tracker().track(self.number, range.clone(), is_serialising);
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

/// Work that is inside a node on its own behalf, after the request that began it may have left.
pub(super) struct DetachedGuard {
    node: Strong<Node>,
    number: ShardNumber,
}

impl DetachedGuard {
    /// For who is inside already; see [`Entered::again`].
    pub(super) fn new(node: &Strong<Node>) -> Self {
        Self { node: node.clone(), number: node.tracker().inc_detached() }
    }

    /// The counted reference it holds.
    pub(super) fn strong(&self) -> &Strong<Node> {
        &self.node
    }

    /// See [`Entered::writing`].
    pub(super) fn writing(&self) -> Writing<'_> {
        self.node.tracker().writing(self.number)
    }

    /// See [`Entered::track`].
    pub(super) async fn track(&self, range: Range<u64>, is_serialising: bool) -> Tracked<'_> {
        let mut tracked = self.node.tracker().track(self.number, range, is_serialising);
        if !tracked.may_go() {
            Box::pin(tracked.wait_turn()).await;
        }
        tracked
    }
}

impl Deref for DetachedGuard {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Drop for DetachedGuard {
    fn drop(&mut self) {
        self.node.tracker().dec_detached(self.number);
    }
}

/// Names the node a request failed on, unless one below is named already.
pub(super) fn named<T>(node: &Node, result: Result<T>) -> Result<T> {
    result.map_err(|error| error.node(node.name()))
}
