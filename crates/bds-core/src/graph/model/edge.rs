//! Edges: one parent's use of one node, with permissions and a gate in front.
//!
//! The edge owns its target (a counted reference with a holder name), the parent owns the edge. The
//! request path reads the target without a lock; a graph change re-points the edge only while the
//! gate is closed and no request is inside the target.
//!
//! ```text
//! request:  read gate word ── load target ── count in at the target ── read gate word again: changed? leave, wait
//! change:   close gate ── wait until the target is empty ── swap target ── open gate
//! ```
//!
//! Both sides write first and read then, all `SeqCst`, so at least one of them sees the other:
//! either the request sees the closed gate, or the change sees the request inside. The word also
//! counts closings, so a request that was not scheduled during a whole close, swap and open sees
//! that too and does not go on with the old target.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::panic::Location;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bds_io::sync::Notify;
use bds_refcount::{Held, Holder, RcuCell, RcuGuard, Release, Strong};
use crossbeam::queue::SegQueue;
use futures_util::future::select;

use super::gate::{Gate, Ticket};
use super::in_flight::BackendInFlight;
use super::node::{Node, NodeId};
use crate::driver::Role;
use crate::driver::{Access, Perm};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::lock::{GraphLockGuard, RepointProof};

/// Nodes that lost a parent edge. Edges push here when they are dropped, without a lock; the next
/// holder of the topology lock recomputes the permissions of these nodes.
pub(in crate::graph) type StalePerms = Arc<SegQueue<NodeId>>;

/// The user of a node through an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// A node's driver.
    Node(NodeId),
    /// Not a node: a backend, a job, an export, by its name.
    Root(Arc<str>),
}

/// Arguments of [`Edge::new`].
pub(crate) struct EdgeParts {
    pub(crate) name: &'static str,
    pub(crate) role: Role,
    pub(crate) access: Access,
    /// The name under which the edge holds its target.
    pub(crate) holder: Holder,
    /// The place in the caller's program that made the edge.
    pub(crate) since: &'static Location<'static>,
    /// Graph changes leave the edge where it is (a job's).
    pub(crate) is_fixed: bool,
    /// For a root edge whose owner does not keep the graph itself.
    pub(crate) keep_alive: Option<Arc<dyn Any + Send + Sync>>,
    /// For a backend's edge.
    pub(crate) backend_in_flight: Option<Arc<BackendInFlight>>,
}

/// A filter as seen from its child, whose length it shows.
pub(super) trait ShowsLength: Send + Sync {
    /// Checks that it, and what shows its length in turn, can follow to this length.
    fn check_resize(&self, len: u64) -> Result<()>;
}

/// One parent's use of one node. Not `Clone`: a second user needs a second edge, with permissions
/// of its own.
pub(crate) struct Edge {
    name: &'static str,
    role: Role,
    is_fixed: bool,
    /// Set once the parent exists: a node's children are opened before the node.
    parent: OnceLock<Parent>,
    /// The parent's side that shows the target's length, if it is a filter.
    shown_by: OnceLock<Weak<dyn ShowsLength>>,
    holder: Holder,
    /// `None` only for a root whose medium is out.
    target: RcuCell<Slot>,
    /// For a root edge: its node must not outlive the graph, which closes it. After `target`:
    /// dropped in this order.
    _keep_alive: Option<Arc<dyn Any + Send + Sync>>,
    /// Requests in flight through it, for a backend's edge.
    backend_in_flight: Option<Arc<BackendInFlight>>,
    gate: Gate,
    access: AccessCell,
    frozen: Mutex<Option<Arc<Freeze>>>,
    /// The target is drained. Changed under the topology lock only.
    is_quiesced: AtomicBool,
    /// The drain has closed the gate: of a node's edge once that node is empty, of a root at once.
    is_closed_by_drain: AtomicBool,
    /// The parent is being closed and may still write.
    parent_closing: AtomicBool,
    /// Reports the target as stale when the edge is dropped.
    drop_notifier: DropNotifier,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let target = self.medium();
        let target = target.as_ref().map_or("nothing", |target| target.name());
        write!(f, "Edge({} {:?} -> {target})", self.name, self.role)
    }
}

impl Edge {
    /// An edge to `target`.
    pub(crate) fn new(
        parts: EdgeParts,
        target: Option<Strong<Node>>,
        stale_perms: &StalePerms,
    ) -> Arc<Self> {
        let EdgeParts {
            name,
            role,
            access,
            holder,
            since,
            is_fixed,
            keep_alive,
            backend_in_flight,
        } = parts;
        let drop_notifier = DropNotifier::new(target.as_ref().map(|node| node.id()), stale_perms);
        let held = target.map(|target| target.held_since(holder.clone(), since));
        Arc::new(Self {
            name,
            role,
            is_fixed,
            parent: OnceLock::new(),
            shown_by: OnceLock::new(),
            holder,
            target: RcuCell::new(Slot::new(held)),
            _keep_alive: keep_alive,
            backend_in_flight,
            gate: Gate::default(),
            access: AccessCell::new(access),
            frozen: Mutex::default(),
            is_quiesced: AtomicBool::new(false),
            is_closed_by_drain: AtomicBool::new(false),
            parent_closing: AtomicBool::new(false),
            drop_notifier,
        })
    }

    /// The child's name in its parent ("file", "backing"); "root" for a backend's.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The child's role for its parent; empty for a root's.
    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// The user of the node; `None` while the parent is still being opened.
    pub(crate) fn parent(&self) -> Option<&Parent> {
        self.parent.get()
    }

    /// The name under which the node is held: "edge 'top.backing'", "backend 'guest'".
    pub(crate) fn holder(&self) -> &Holder {
        &self.holder
    }

    /// Is it a place of the parent's own bytes (not of a backing node's)?
    pub(crate) fn holds_bytes(&self) -> bool {
        self.role.intersects(Role::DATA | Role::METADATA | Role::FILTERED)
    }

    /// Can written bytes wait behind it to be made durable?
    pub(crate) fn may_hold_writes(&self) -> bool {
        self.holds_bytes() && self.medium().is_some_and(|target| target.could_write())
    }

    /// Do graph changes leave it where it is?
    pub(crate) fn is_fixed(&self) -> bool {
        self.is_fixed
    }

    /// The permissions that the parent uses, and those it shares.
    #[inline]
    pub(crate) fn access(&self) -> Access {
        self.access.load()
    }

    pub(in crate::graph) fn set_access(&self, _lock: &GraphLockGuard<'_>, access: Access) {
        self.access.store(access);
    }

    pub(crate) fn set_parent(&self, parent: Parent) {
        // A second call would be a bug; the first parent stays.
        let first = self.parent.set(parent).is_ok();
        debug_assert!(first, "an edge gets its parent once");
    }

    /// The parent is a filter, which shows the target's length.
    pub(super) fn set_shown_by(&self, parent: &Arc<dyn ShowsLength>) {
        let first = self.shown_by.set(Arc::downgrade(parent)).is_ok();
        debug_assert!(first, "an edge gets its parent once");
    }

    /// The parent, if it is a filter that lives.
    pub(super) fn shown_by(&self) -> Option<Arc<dyn ShowsLength>> {
        self.shown_by.get()?.upgrade()
    }

    /// The target now. Lock-free, a few nanoseconds. For facts (length, name); a request uses
    /// [`Edge::ticket`] and [`Edge::medium`].
    ///
    /// # Panics
    /// For a root without a medium. A node's edge always has a target.
    #[inline]
    pub(crate) fn target(&self) -> Target<'_> {
        self.medium().expect("a node's edge leads to a node")
    }

    /// The target now, or `None`: a root without a medium.
    #[inline]
    pub(crate) fn medium(&self) -> Option<Target<'_>> {
        let reading = self.target.read();
        reading.held.as_ref()?;
        Some(Target(reading))
    }

    /// The first half of passing the gate; `None` if it is closed. A request enters like this:
    ///
    /// ```text
    /// let ticket = edge.ticket()?;                 // closed: wait_open(), again
    /// let target = edge.medium()?;                 // nothing there: NoMedium
    /// let inside = target.tracker().enter();       // counts in, SeqCst
    /// if !edge.admits(ticket) { drop(inside); … }  // closed meanwhile: wait_open(), again
    /// ```
    #[inline]
    pub(crate) fn ticket(&self) -> Option<Ticket> {
        self.gate.ticket()
    }

    /// The second half: true if the gate was never closed since the ticket was drawn.
    #[inline]
    pub(crate) fn admits(&self, ticket: Ticket) -> bool {
        self.gate.ticket() == Some(ticket)
    }

    /// The in-flight count of a backend's edge.
    #[inline]
    pub(crate) fn backend_in_flight(&self) -> Option<&Arc<BackendInFlight>> {
        self.backend_in_flight.as_ref()
    }

    /// Is the gate closed now? One load.
    #[inline]
    pub(crate) fn gate_blocked(&self) -> bool {
        self.gate.ticket().is_none()
    }

    /// Waits until the gate is open. It may have closed again on return.
    pub(crate) async fn wait_open(&self) {
        self.gate.wait_open().await;
    }

    /// Drops a node's edge and says whether its reference was the target's last.
    ///
    /// # Errors
    /// Another reference to the edge exists just now.
    pub(crate) fn release_target(self: Arc<Self>) -> Result<Release, Arc<Self>> {
        let edge = Arc::try_unwrap(self)?;
        Ok(edge.target.into_inner().held.map_or(Release::NotLast, Held::release))
    }

    /// Closes the gate. Closings nest; each is undone by one [`Edge::open_gate`].
    pub(crate) fn close_gate(&self) {
        self.gate.close();
    }

    /// Undoes one [`Edge::close_gate`].
    pub(crate) fn open_gate(&self) {
        self.gate.open();
    }

    // ---- drained

    /// Is the target drained, as far as this edge knows?
    pub(in crate::graph) fn is_quiesced(&self) -> bool {
        self.is_quiesced.load(Ordering::SeqCst)
    }

    /// The target is drained from now on. False if it was before.
    pub(in crate::graph) fn quiesce(&self, _lock: &GraphLockGuard<'_>) -> bool {
        !self.is_quiesced.swap(true, Ordering::SeqCst)
    }

    /// Closes the gate for a drain of the target, once.
    pub(in crate::graph) fn close_in_drain(&self, _lock: &GraphLockGuard<'_>) {
        debug_assert!(self.is_quiesced(), "only a drain closes it so");
        if !self.is_closed_by_drain.swap(true, Ordering::SeqCst) {
            self.gate.close();
        }
    }

    /// Opens the gate again although the target is drained. False if the drain had not closed it.
    pub(in crate::graph) fn open_in_drain(&self, _lock: &GraphLockGuard<'_>) -> bool {
        let was = self.is_closed_by_drain.swap(false, Ordering::SeqCst);
        if was {
            self.gate.open();
        }
        was
    }

    /// The target is not drained any more. False if it was not before.
    pub(in crate::graph) fn unquiesce(&self, lock: &GraphLockGuard<'_>) -> bool {
        let was = self.is_quiesced.swap(false, Ordering::SeqCst);
        self.open_in_drain(lock);
        was
    }

    /// The parent is being closed: a drain of the target waits for that.
    pub(in crate::graph) fn set_parent_closing(&self, _lock: &GraphLockGuard<'_>) {
        self.parent_closing.store(true, Ordering::SeqCst);
    }

    pub(in crate::graph) fn parent_closing(&self) -> bool {
        self.parent_closing.load(Ordering::SeqCst)
    }

    // ---- frozen

    /// The freeze that keeps the edge at its target, if it is frozen.
    pub(in crate::graph) fn frozen(&self) -> Option<Arc<Freeze>> {
        self.lock_frozen().clone()
    }

    pub(in crate::graph) fn set_frozen(
        &self,
        _lock: &GraphLockGuard<'_>,
        freeze: Option<Arc<Freeze>>,
    ) {
        *self.lock_frozen() = freeze;
    }

    fn lock_frozen(&self) -> MutexGuard<'_, Option<Arc<Freeze>>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- re-pointed

    /// Re-points the edge. The old reference goes as soon as no reader looks at the old node
    /// through the edge any more; [`OldTarget::wait_released`] waits for that.
    pub(in crate::graph) fn repoint(
        &self,
        _proof: &impl RepointProof,
        target: Option<Strong<Node>>,
        since: &'static Location<'static>,
    ) -> OldTarget {
        debug_assert!(self.gate_blocked(), "an edge is re-pointed behind its closed gate");
        self.drop_notifier.watch(target.as_ref().map(|node| node.id()));
        let held = target.map(|target| target.held_since(self.holder.clone(), since));
        let old = {
            let slot = self.target.read();
            let is_poisoned = slot.held.as_ref().is_some_and(|node| node.is_poisoned());
            OldTarget { released: Arc::clone(&slot.on_drop.0), is_poisoned }
        };
        self.target.replace(Slot::new(held));
        old
    }
}

/// The value in an edge's RCU cell: a counted reference, or none, and a notification for when
/// readers have left it.
struct Slot {
    held: Option<Held<Node>>,
    /// After `held`: dropped in this order.
    on_drop: NotifyOnDrop,
}

impl Slot {
    fn new(held: Option<Held<Node>>) -> Self {
        Self { held, on_drop: NotifyOnDrop(Arc::default()) }
    }
}

#[derive(Default)]
struct Released {
    is_released: AtomicBool,
    changed: Notify,
}

struct NotifyOnDrop(Arc<Released>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.0.is_released.store(true, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

/// The node an edge pointed to before it was re-pointed. Keeps nothing open.
#[derive(Clone)]
pub(in crate::graph) struct OldTarget {
    released: Arc<Released>,
    is_poisoned: bool,
}

impl OldTarget {
    /// Waits until the edge's reference to the old target is gone. Requests have left before the
    /// edge was re-pointed; readers that are left look at facts and wait for nothing, so this ends
    /// soon. Returns at once for a poisoned node: requests that are stuck in it may read for ever.
    pub(in crate::graph) async fn wait_released(&self) {
        if self.is_poisoned {
            return;
        }
        self.wait().await;
    }

    /// As [`OldTarget::wait_released`], also for a poisoned node, but not longer than `timeout`.
    pub(in crate::graph) async fn wait_released_within(&self, timeout: Duration) {
        select(pin!(self.wait()), pin!(bds_io::sleep(timeout))).await;
    }

    async fn wait(&self) {
        self.released.changed.wait_until(|| self.released.is_released.load(Ordering::SeqCst)).await;
    }
}

/// The permissions of an edge, read by every write.
struct AccessCell(AtomicU32);

impl AccessCell {
    fn new(access: Access) -> Self {
        let cell = Self(AtomicU32::new(0));
        cell.store(access);
        cell
    }

    #[inline]
    fn load(&self) -> Access {
        let bits = self.0.load(Ordering::Relaxed);
        let (perm, shared) = (bits & 0xFFFF, bits >> 16);
        Access { perm: Perm::from_bits_truncate(perm), shared: Perm::from_bits_truncate(shared) }
    }

    fn store(&self, access: Access) {
        self.0.store(access.perm.bits() | access.shared.bits() << 16, Ordering::Relaxed);
    }
}

/// Queues the target for a recomputation of its permissions when the edge is dropped or re-pointed.
/// Takes no lock.
struct DropNotifier {
    stale_perms: StalePerms,
    /// The target's id, 0 for none.
    target: AtomicU64,
}

impl DropNotifier {
    fn new(target: Option<NodeId>, stale_perms: &StalePerms) -> Self {
        let drop_notifier = Self { stale_perms: stale_perms.clone(), target: AtomicU64::new(0) };
        drop_notifier.watch(target);
        drop_notifier
    }

    fn watch(&self, target: Option<NodeId>) {
        self.target.store(target.map_or(0, NodeId::to_u64), Ordering::Relaxed);
    }
}

impl Drop for DropNotifier {
    fn drop(&mut self) {
        let target = *self.target.get_mut();
        if target != 0 {
            self.stale_perms.push(NodeId::from_u64(target));
        }
    }
}

/// The node an edge points to, kept alive by the edge's own reference: reading it counts nothing on
/// the node.
pub(crate) struct Target<'a>(RcuGuard<'a, Slot>);

impl Target<'_> {
    /// The counted reference behind the edge.
    pub(crate) fn strong(&self) -> &Strong<Node> {
        self.held()
    }

    #[inline]
    fn held(&self) -> &Held<Node> {
        // A `Target` is made only of a slot that holds a node.
        self.0.held.as_ref().expect("a target is there")
    }
}

impl Deref for Target<'_> {
    type Target = Node;

    #[inline]
    fn deref(&self) -> &Node {
        self.held()
    }
}

/// The reason of a freeze: the holder's name.
#[derive(Debug)]
pub(in crate::graph) struct Freeze(String);

impl Freeze {
    pub(in crate::graph) fn new(holder: &str) -> Self {
        Self(holder.to_owned())
    }
}

impl fmt::Display for Freeze {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a child's role beside its siblings': one child at most is the primary, the backing or the
/// filtered one each, and a filtered one has no other role.
pub(in crate::graph) fn check_role(
    mut others: impl Iterator<Item = Role>,
    name: &str,
    role: Role,
) -> Result<()> {
    let unique = role & (Role::PRIMARY | Role::COW | Role::FILTERED);
    let mixed =
        role.contains(Role::FILTERED) && role.intersects(Role::DATA | Role::METADATA | Role::COW);
    if mixed || others.any(|other| other.intersects(unique)) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("child '{name}' cannot have the role {role:?} beside the others"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiles only as long as `Edge` is not `Clone`: otherwise the type parameter is ambiguous.
    #[test]
    fn an_edge_cannot_be_cloned() {
        trait NotClone<A> {
            fn check() {}
        }
        struct IsClone;
        impl<T> NotClone<()> for T {}
        impl<T: Clone> NotClone<IsClone> for T {}
        <Edge as NotClone<_>>::check();
    }
}
