//! Admits requests: waits at the edge's gate, counts a request in flight, orders it against
//! requests that overlap.
//!
//! ```text
//! enter(edge)            ─► Entered        counted in flight at the node and at the backend it came in by
//! Entered::admit(range)  ─► RequestScope   range registered, its turn has come; a write marks the node as written
//! ```
//!
//! A request that waits at the gate is queued, not in flight, so a drain does not wait for it. It
//! is counted first and looks at the gate after that: either a drain sees the count or the request
//! sees the closed gate.
//!
//! Dropping a scope records what it may have changed in the node's dirty bitmaps, before its
//! completion is reported. Dropping it, then its `Entered`, undoes each step in reverse. Driver
//! operations run in a scope (`detach_on_drop`), which is what they keep if their request is
//! dropped.

use std::ops::{Deref, Range};

use bds_refcount::Strong;

use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Edge, InFlightGuard, Node, Target, intent};
use crate::tracker::{RequestTracker, ShardNumber, Tracked, Writing};

/// The node an edge led to, with this request counted in flight at the node and at its backend.
/// Dropping counts it out.
pub(super) struct Entered<'e> {
    target: Target<'e>,
    number: ShardNumber,
    /// Dropped after the node's count: while a backend's drain waits, the node's count must not
    /// outlast this one.
    backend_guard: Option<InFlightGuard<'e>>,
}

/// Why a request was not admitted. It stays in flight for its backend until this is dropped.
pub(super) struct Refused<'e> {
    error: Error,
    backend_guard: Option<InFlightGuard<'e>>,
}

impl<'e> Refused<'e> {
    /// The reason, and the guard that keeps the request in flight.
    pub(super) fn into_parts(self) -> (Error, Option<InFlightGuard<'e>>) {
        (self.error, self.backend_guard)
    }
}

/// Waits until the gate is open, then counts the request in flight.
///
/// # Errors
/// `NoMedium`: the edge leads nowhere. `Io`: the node is poisoned.
pub(super) async fn enter(edge: &Edge) -> Result<Entered<'_>> {
    enter_backend(edge).await.map_err(|refused| refused.error)
}

/// As [`enter`], for a backend's requests: a refused one stays in flight until it was accounted.
///
/// # Errors
/// Also `Cancelled`: the graph was shut down while the request waited at the gate.
pub(super) async fn enter_backend(edge: &Edge) -> Result<Entered<'_>, Refused<'_>> {
    loop {
        if let Some(entered) = try_enter(edge) {
            return entered;
        }
        // Not counted anywhere while it waits: a drain must not wait for a queued request.
        Box::pin(edge.wait_open()).await;
        if edge.backend_in_flight().is_some_and(|in_flight| in_flight.is_ended()) {
            return Err(Refused { error: shut_down(edge), backend_guard: None });
        }
    }
}

/// As [`enter`], but `None` where that would wait.
pub(super) fn enter_now(edge: &Edge) -> Option<Result<Entered<'_>>> {
    try_enter(edge).map(|entered| entered.map_err(|refused| refused.error))
}

/// `None`: the gate is closed.
#[inline]
fn try_enter(edge: &Edge) -> Option<Result<Entered<'_>, Refused<'_>>> {
    let ticket = edge.ticket()?;
    let backend_guard = edge.backend_in_flight().map(|in_flight| in_flight.enter());
    let Some(target) = edge.medium() else {
        let refused = || Refused { error: no_medium(edge), backend_guard };
        return edge.admits(ticket).then(|| Err(refused()));
    };
    if target.is_poisoned() {
        return Some(Err(Refused { error: poisoned(&target), backend_guard }));
    }
    let number = target.tracker().enter();
    let entered = Entered { target, number, backend_guard };
    edge.admits(ticket).then_some(Ok(entered))
}

#[cold]
fn shut_down(edge: &Edge) -> Error {
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
    /// The counted reference to the node.
    #[inline]
    pub(super) fn strong(&self) -> &Strong<Node> {
        self.target.strong()
    }

    /// Counts a second time, for work that outlives this request. Passes the closed gate: the drain
    /// that closed it waits for both.
    pub(super) fn detached_guard(&self) -> DetachedGuard {
        DetachedGuard::new(self.strong())
    }

    /// Registers the range and waits for its turn.
    ///
    /// # Errors
    /// `WouldWait`, see [`Admission::no_wait_if`].
    pub(super) async fn admit(&self, admission: Admission) -> Result<RequestScope<'_>> {
        let mut tracked = admission.register(self.tracker(), self.number);
        if !tracked.may_go() {
            Box::pin(admission.wait_turn(&mut tracked)).await?;
        }
        if admission.must_log(self) {
            Box::pin(log_first(self.strong(), &admission)).await?;
        }
        Ok(self.scope().admitted(self.number, &admission, tracked))
    }

    /// The scope of a request without a range: a flush.
    pub(super) fn scope(&self) -> RequestScope<'_> {
        RequestScope {
            node: self.strong(),
            backend_guard: self.backend_guard.as_ref(),
            writing: None,
            change: None,
            tracked: None,
            above: None,
        }
    }
}

/// What a request needs to be admitted for: its range, whether it writes, how it is ordered.
pub(super) struct Admission {
    range: Range<u64>,
    is_write: bool,
    change: Option<Change>,
    is_serialising: bool,
    no_wait: bool,
}

/// What a request may have done to the bytes of its range.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Other bytes.
    Bytes,
    /// Another length: the range goes on behind the end.
    Length,
}

impl Admission {
    /// Reads `range`.
    pub(super) fn read(range: Range<u64>) -> Self {
        Self { range, is_write: false, change: None, is_serialising: false, no_wait: false }
    }

    /// May change bytes in `range`, so the next flush has work once the request ends, however it
    /// ends.
    pub(super) fn write(range: Range<u64>) -> Self {
        Self { is_write: true, change: Some(Change::Bytes), ..Self::read(range) }
    }

    /// Changes the length of the node; `range` begins at the shorter of both lengths.
    pub(super) fn resize(range: Range<u64>) -> Self {
        Self { change: Some(Change::Length), ..Self::write(range) }.serialising()
    }

    /// If the flag says so: the bytes that are written are those that are read already, which is no
    /// change for bitmaps.
    pub(super) fn unchanged_if(self, is_unchanged: bool) -> Self {
        Self { change: self.change.filter(|_| !is_unchanged), ..self }
    }

    /// Excludes all requests that overlap it.
    pub(super) fn serialising(self) -> Self {
        Self { is_serialising: true, ..self }
    }

    /// As [`Admission::serialising`], if the flag says so.
    pub(super) fn serialising_if(self, is_serialising: bool) -> Self {
        Self { is_serialising, ..self }
    }

    /// If the flag says so: fails with `WouldWait` instead of waiting for a request that overlaps
    /// it.
    pub(super) fn no_wait_if(self, no_wait: bool) -> Self {
        Self { no_wait, ..self }
    }

    #[inline]
    fn register<'a>(&self, tracker: &'a RequestTracker, number: ShardNumber) -> Tracked<'a> {
        tracker.track(number, self.range.clone(), self.is_serialising)
    }

    /// Whether the write-intent log of the node's bitmaps must know of it first.
    #[inline]
    fn must_log(&self, node: &Node) -> bool {
        self.change.is_some() && node.must_log(&self.range)
    }

    /// Waits for the turn of its range. Boxed by its callers: few requests wait, and it would make
    /// every layer's future larger.
    async fn wait_turn(&self, tracked: &mut Tracked<'_>) -> Result<()> {
        if self.no_wait && tracked.has_conflict() {
            return Err(would_wait(self.range.start));
        }
        tracked.wait_turn().await;
        Ok(())
    }
}

/// An admitted request: in flight at its node, with its range registered. Driver operations run in
/// it.
pub(super) struct RequestScope<'a> {
    pub(super) node: &'a Strong<Node>,
    /// The count at the backend the request came in by.
    pub(super) backend_guard: Option<&'a InFlightGuard<'a>>,
    /// Marks the node as written when dropped, before the range is free. `None`: a read or a flush.
    writing: Option<Writing<'a>>,
    /// What is recorded in the node's bitmaps for the range when this is dropped.
    pub(super) change: Option<Change>,
    /// `None`: a flush, which has no range.
    pub(super) tracked: Option<Tracked<'a>>,
    /// The scope of the same request at the node above, if the request path itself passed it on.
    pub(super) above: Option<&'a RequestScope<'a>>,
}

impl<'a> RequestScope<'a> {
    /// Puts it below the scope of the same request at the node above, which a detached operation
    /// keeps too.
    pub(super) fn below(mut self, above: Option<&'a RequestScope<'a>>) -> Self {
        self.above = above;
        self
    }

    pub(super) fn node(&self) -> &'a Node {
        self.node
    }

    /// The scope once the turn of `tracked` has come.
    #[inline]
    fn admitted(
        mut self,
        number: ShardNumber,
        admission: &Admission,
        tracked: Tracked<'a>,
    ) -> Self {
        self.writing = admission.is_write.then(|| self.node.tracker().writing(number));
        self.change = admission.change;
        self.tracked = Some(tracked);
        self
    }
}

impl Drop for RequestScope<'_> {
    #[inline]
    fn drop(&mut self) {
        // In this order: the write is counted, recorded, and only then is its range free.
        drop(self.writing.take());
        if let (Some(change), Some(tracked)) = (self.change, &self.tracked) {
            record(self.node, change, tracked.range());
        }
    }
}

/// Makes the range of a change durable in the write-intent log. In a task that stays in flight: it
/// is shared with other requests, and ends even if this one is dropped.
#[cold]
async fn log_first(node: &Strong<Node>, admission: &Admission) -> Result<()> {
    let guard = DetachedGuard::new(node);
    let range = admission.range.clone();
    let log = async move { intent::log_change(&guard.node, range).await };
    bds_io::spawn_now(log).detach_on_drop().await?;
    if intent::claim_checkpoint(node) {
        let guard = DetachedGuard::new(node);
        let checkpoint = async move {
            if let Err(error) = intent::checkpoint(&guard).await {
                tracing::warn!(node = guard.name(), %error, "no checkpoint of the dirty bitmaps");
            }
        };
        bds_io::spawn(checkpoint).detach();
    }
    Ok(())
}

/// Records a change that has ended, whether or not it failed.
#[inline]
pub(super) fn record(node: &Node, change: Change, range: &Range<u64>) {
    match change {
        Change::Bytes => node.record_change(range),
        Change::Length => record_length(node, range),
    }
}

#[cold]
fn record_length(node: &Node, range: &Range<u64>) {
    node.follow_len();
    node.record_change(range);
}

#[cold]
fn would_wait(offset: u64) -> Error {
    let words = "an overlapping request is under way and the caller will not wait";
    Error::new(ErrorKind::WouldWait, words).at(offset)
}

/// Counts work in flight at a node that may outlive its request, and keeps the node open.
pub(super) struct DetachedGuard {
    node: Strong<Node>,
    number: ShardNumber,
}

impl DetachedGuard {
    /// For a request that is in flight at the node; see [`Entered::detached_guard`].
    pub(super) fn new(node: &Strong<Node>) -> Self {
        Self { node: node.clone(), number: node.tracker().inc_detached() }
    }

    /// Marks the node as written when the mark is dropped.
    pub(super) fn writing(&self) -> Writing<'_> {
        self.node.tracker().writing(self.number)
    }

    /// See [`Entered::admit`].
    pub(super) async fn admit(&self, admission: Admission) -> Result<RequestScope<'_>> {
        let node = &self.node;
        let mut tracked = admission.register(node.tracker(), self.number);
        if !tracked.may_go() {
            Box::pin(admission.wait_turn(&mut tracked)).await?;
        }
        if admission.must_log(node) {
            Box::pin(log_first(node, &admission)).await?;
        }
        let scope = RequestScope {
            node,
            backend_guard: None,
            writing: None,
            change: None,
            tracked: None,
            above: None,
        };
        Ok(scope.admitted(self.number, &admission, tracked))
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

/// Names the node a request failed on, unless an error from below names one already.
pub(super) fn named<T>(node: &Node, result: Result<T>) -> Result<T> {
    result.map_err(|error| error.node(node.name()))
}
