//! Other names for open nodes: several at once, so that two can trade theirs.
//!
//! A name says where to look, an id says what was meant: ids, references and edges notice nothing. Whoever holds a node keeps the
//! name in his text under which he took it.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::change::Action;
use super::names::{Claim, check_name};
use super::{Graph, NodeRef};
use crate::error::{Error, ErrorKind, Result};

/// A node can have this many names in its life.
const MAX_NAMES: usize = 1000;

/// A node's name now, behind all it ever had: whoever reads one may keep it as long as the node.
pub(super) struct NodeName {
    text: Arc<str>,
    next: OnceLock<Box<NodeName>>,
}

impl NodeName {
    pub(super) fn new(text: Arc<str>) -> Self {
        Self { text, next: OnceLock::new() }
    }

    fn last(&self) -> (&Self, usize) {
        let (mut at, mut count) = (self, 1);
        while let Some(next) = at.next.get() {
            (at, count) = (next, count + 1);
        }
        (at, count)
    }

    pub(super) fn as_str(&self) -> &str {
        &self.last().0.text
    }

    pub(super) fn as_arc(&self) -> Arc<str> {
        Arc::clone(&self.last().0.text)
    }

    fn can_change(&self) -> bool {
        self.last().1 < MAX_NAMES
    }

    /// Under the lock of names.
    fn change(&self, text: Arc<str>) {
        let set = self.last().0.next.set(Box::new(Self::new(text))).is_ok();
        debug_assert!(set, "names change under a lock");
    }
}

/// The renames among the actions, the last word for each node.
fn wanted(actions: &[Action]) -> Vec<(&NodeRef, &Arc<str>)> {
    let mut all: Vec<(&NodeRef, &Arc<str>)> = Vec::new();
    for action in actions {
        if let Action::Rename { node, name } = action {
            all.retain(|(known, _)| known.id() != node.id());
            all.push((node, name));
        }
    }
    all
}

impl Graph {
    /// Gives nodes their new names, all or none.
    ///
    /// # Errors
    /// `InvalidInput`: not a name; `AlreadyExists`: taken by what keeps it; `LimitExceeded`: renamed too often.
    pub(super) fn rename(&self, actions: &[Action]) -> Result<()> {
        let wanted = wanted(actions);
        if wanted.is_empty() {
            return Ok(());
        }
        let mut plan = self.plan();
        let leaving: HashMap<Arc<str>, ()> =
            wanted.iter().map(|(node, _)| (node.node().name_arc(), ())).collect();
        let mut coming = HashMap::new();
        for (node, name) in &wanted {
            check_name(name).map_err(|error| error.node(node.name()))?;
            let is_taken = self.is_taken(&plan, name) && !leaving.contains_key(*name);
            if is_taken || coming.insert(Arc::clone(name), ()).is_some() {
                let words = format!("the node name '{name}' is taken");
                return Err(Error::new(ErrorKind::AlreadyExists, words).node(node.name()));
            }
            if !node.node().names().can_change() {
                let words = format!("a node can have {MAX_NAMES} names in its life");
                return Err(Error::new(ErrorKind::LimitExceeded, words).node(node.name()));
            }
        }
        for name in leaving.keys() {
            plan.names.remove(name);
        }
        for (node, name) in wanted {
            plan.names.insert(Arc::clone(name), Claim::Node(node.id()));
            node.node().names().change(Arc::clone(name));
        }
        Ok(())
    }
}
