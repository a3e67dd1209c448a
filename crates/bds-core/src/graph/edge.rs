//! An edge: one parent's use of one node, with a gate in front.
//!
//! The edge owns its target (a counted reference, held by name), the parent owns the edge. The I/O path reads
//! the target without a lock; re-pointing is the graph's business and happens only while the gate is closed and
//! nobody is inside the target.
//!
//! ```text
//! request:  read gate word ── load target ── count in at the target ── read gate word again: changed? out, wait
//! change:   close gate ── wait until nobody is inside the target ── swap target ── open gate
//! ```
//!
//! Both sides write first and read then, all `SeqCst`, so at least one of them sees the other: either the request sees
//! the closed gate, or the change sees the request inside. The word also counts closings, so a request that
//! slept through a whole close, swap and open sees that too and does not stay with the old target.

use std::fmt;
use std::ops::Deref;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bds_io::sync::Notify;
use bds_refcount::{Held, Hinge, Holder, HolderKind, Reading, Release, Strong};

use super::Graph;
use super::node::{Node, NodeId};
use super::perm::Access;
use crate::driver::Role;

/// Who uses a node through an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parent {
    /// A node's driver.
    Node(NodeId),
    /// Someone who is not a node: a backend, a job, an export, by its name.
    Root(Arc<str>),
}

/// One parent's use of one node.
pub struct Edge {
    name: &'static str,
    role: Role,
    /// Set once the parent exists: a node's children are opened before the node.
    parent: OnceLock<Parent>,
    target: Hinge<Held<Node>>,
    /// Of a root edge: its node must not outlive the graph, which closes it. After `target`: dropped in this order.
    _graph: Option<Graph>,
    gate: Gate,
    access: Access,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Edge({} {:?} -> {})", self.name, self.role, self.target().name())
    }
}

impl Edge {
    /// An edge to `target`, whose reference is held as `holder` (the parent's and the child's name).
    #[track_caller]
    pub(crate) fn new(
        name: &'static str,
        role: Role,
        access: Access,
        holder: &str,
        target: Strong<Node>,
        graph: Option<Graph>,
    ) -> Arc<Self> {
        let kind = if role.is_empty() { HolderKind::Backend } else { HolderKind::Edge };
        let held = target.held_by(Holder::new(kind, holder));
        Arc::new(Self {
            name,
            role,
            parent: OnceLock::new(),
            target: Hinge::new(held),
            _graph: graph,
            gate: Gate::default(),
            access,
        })
    }

    /// The child's name in its parent ("file", "backing"); "root" for a backend's.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What the child is to its parent; empty for a backend's.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Who uses the node; `None` while the parent is still being opened.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.get()
    }

    /// What the parent does with the node, and what it lets others do.
    pub fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn set_parent(&self, parent: Parent) {
        // A second call would be a bug of ours; the first parent stays.
        let first = self.parent.set(parent).is_ok();
        debug_assert!(first, "an edge gets its parent once");
    }

    /// The node at the other end now. Lock-free, a few nanoseconds. For facts (length, name); a request uses
    /// [`Edge::admit`].
    #[inline]
    pub(crate) fn target(&self) -> Target<'_> {
        Target(self.target.read())
    }

    /// The first half of passing the gate; `None` if it is closed. A request enters like this:
    ///
    /// ```text
    /// let ticket = edge.ticket()?;                 // closed: wait_open(), again
    /// let target = edge.target();
    /// let inside = target.traffic().enter();       // counts in, SeqCst
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

    /// Is the gate closed now? One load.
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.gate.ticket().is_none()
    }

    /// Waits until the gate is open. It may have closed again on return.
    pub(crate) async fn wait_open(&self) {
        self.gate.wait_open().await;
    }

    /// Ends the edge and says whether its reference was the target's last. `None` if somebody else has the edge in hand and
    /// will release it.
    pub(crate) fn release(self: Arc<Self>) -> Option<Release> {
        let edge = Arc::into_inner(self)?;
        Some(edge.target.into_inner().release())
    }

    /// Closes the gate. Closings nest; each is undone by one [`Edge::open`].
    pub(super) fn close(&self) {
        self.gate.close();
    }

    /// Undoes one [`Edge::close`].
    pub(super) fn open(&self) {
        self.gate.open();
    }

    /// Re-points the edge. The old reference is given up as soon as nobody looks through the edge at the old node any more,
    /// which [`Edge::settle`] waits for.
    #[track_caller]
    pub(super) fn swap(&self, target: Strong<Node>) {
        debug_assert!(self.is_closed(), "an edge is re-pointed behind its closed gate");
        let holder = self.target().0.holder().clone();
        self.target.replace(target.held_by(holder));
    }

    /// Waits until the reference to the former target is given up. Requests have left before the swap; what may still look are
    /// questions about facts, which end without waiting for anybody. So this ends soon; and if somebody keeps such
    /// an answer in hand after all, he gives the reference up when done, and nobody waits for that.
    pub(super) async fn settle(&self) {
        for _ in 0..1000 {
            if self.target.waiting() == 0 {
                return;
            }
            bds_io::yield_now().await;
        }
    }
}

/// The node an edge points to, kept alive by the edge's own reference: nothing is counted on the node.
pub(crate) struct Target<'a>(Reading<'a, Held<Node>>);

impl Target<'_> {
    /// The counted reference behind the edge.
    pub(crate) fn strong(&self) -> &Strong<Node> {
        &self.0
    }
}

impl Deref for Target<'_> {
    type Target = Node;

    #[inline]
    fn deref(&self) -> &Node {
        &self.0
    }
}

/// What the gate showed to a request that found it open. See [`Edge::ticket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u64);

/// How many keep it closed (low half) and how often it was closed (high half), in one word.
#[derive(Default)]
struct Gate {
    word: AtomicU64,
    opened: Notify,
}

const CLOSED: u64 = 0xFFFF_FFFF;
const CLOSING: u64 = (1 << 32) + 1;

impl Gate {
    /// The word, if the gate is open: it is the same later only if nobody closed the gate in between.
    #[inline]
    fn ticket(&self) -> Option<Ticket> {
        let word = self.word.load(Ordering::SeqCst);
        (word & CLOSED == 0).then_some(Ticket(word))
    }

    fn close(&self) {
        self.word.fetch_add(CLOSING, Ordering::SeqCst);
    }

    fn open(&self) {
        let before = self.word.fetch_sub(1, Ordering::SeqCst);
        if before & CLOSED == 1 {
            self.opened.notify_waiters();
        }
    }

    async fn wait_open(&self) {
        loop {
            let mut opened = pin!(self.opened.notified());
            opened.as_mut().enable();
            if self.ticket().is_some() {
                return;
            }
            opened.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_does_not_survive_a_closing_it_slept_through() {
        let gate = Gate::default();
        let ticket = gate.ticket().unwrap();
        gate.close();
        assert_eq!(gate.ticket(), None);
        gate.open();
        assert_ne!(gate.ticket(), Some(ticket));
    }

    #[test]
    fn closings_nest() {
        let gate = Gate::default();
        gate.close();
        gate.close();
        gate.open();
        assert_eq!(gate.ticket(), None);
        gate.open();
        assert!(gate.ticket().is_some());
    }
}
