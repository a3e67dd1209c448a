//! A node's name, and the names it had before.
//!
//! `Node::name` returns `&str` from a shared node, so a name that was read may be in use as long as
//! the node: a rename adds a name and frees none.

use std::sync::{Arc, OnceLock};

/// How many names a node can have in its life.
pub(in crate::graph) const MAX_NAMES: usize = 1000;

/// A node's names, oldest first; the last one is in force. Earlier names stay, because readers may
/// still borrow them.
pub(in crate::graph) struct NodeName {
    text: Arc<str>,
    next: OnceLock<Box<NodeName>>,
}

impl NodeName {
    pub(in crate::graph) fn new(text: Arc<str>) -> Self {
        Self { text, next: OnceLock::new() }
    }

    fn last(&self) -> (&Self, usize) {
        let (mut at, mut count) = (self, 1);
        while let Some(next) = at.next.get() {
            (at, count) = (next, count + 1);
        }
        (at, count)
    }

    pub(in crate::graph) fn as_str(&self) -> &str {
        &self.last().0.text
    }

    pub(in crate::graph) fn as_arc(&self) -> Arc<str> {
        Arc::clone(&self.last().0.text)
    }

    pub(in crate::graph) fn can_change(&self) -> bool {
        self.last().1 < MAX_NAMES
    }

    /// Adds a name. Called under the lock of the name table.
    pub(in crate::graph) fn change(&self, text: Arc<str>) {
        let set = self.last().0.next.set(Box::new(Self::new(text))).is_ok();
        debug_assert!(set, "names change under a lock");
    }
}
