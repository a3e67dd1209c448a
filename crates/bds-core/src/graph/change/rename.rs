//! Renames open nodes: several at once, so that two can swap names.
//!
//! Ids, references and edges do not change. Holder names keep the node name under which the
//! reference was taken.

use std::collections::HashSet;
use std::sync::Arc;

use super::action::Action;
use crate::error::{Error, ErrorKind, Result};
use crate::graph::model::name::MAX_NAMES;
use crate::graph::name_table::Claim;
use crate::graph::open::names::check_name;
use crate::graph::{Graph, NodeRef};

/// The renames among the actions; of several for one node, the last.
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

/// Names that are reserved for the nodes. Dropped: they are free again, and nothing has changed.
pub(in crate::graph) struct Renames<'a> {
    graph: &'a Graph,
    wanted: Vec<(&'a NodeRef, &'a Arc<str>)>,
    /// Those that were free before.
    reserved: Vec<Arc<str>>,
}

impl Graph {
    /// Reserves the names that the actions give to nodes.
    ///
    /// # Errors
    /// `InvalidInput`: not a name; `AlreadyExists`: taken by what keeps it; `LimitExceeded`:
    /// renamed too often.
    pub(in crate::graph) fn reserve_renames<'a>(
        &'a self,
        actions: &'a [Action],
    ) -> Result<Renames<'a>> {
        let mut renames = Renames { graph: self, wanted: wanted(actions), reserved: Vec::new() };
        if renames.wanted.is_empty() {
            return Ok(renames);
        }
        let mut names = self.lock_names();
        let leaving: HashSet<Arc<str>> =
            renames.wanted.iter().map(|(node, _)| node.node().name_arc()).collect();
        let mut coming = HashSet::new();
        for (node, name) in &renames.wanted {
            check_name(name).map_err(|error| error.node(node.name()))?;
            let is_taken = self.is_taken(&names, name) && !leaving.contains(*name);
            if is_taken || !coming.insert(Arc::clone(name)) {
                let message = format!("the node name '{name}' is taken");
                return Err(Error::new(ErrorKind::AlreadyExists, message).node(node.name()));
            }
            if !node.node().names().can_change() {
                let message = format!("a node can have {MAX_NAMES} names in its life");
                return Err(Error::new(ErrorKind::LimitExceeded, message).node(node.name()));
            }
        }
        // A name that one of the nodes gives up is claimed by that node until then.
        for name in coming.difference(&leaving) {
            names.claims.insert(Arc::clone(name), Claim::Opening);
            renames.reserved.push(Arc::clone(name));
        }
        drop(names);
        Ok(renames)
    }
}

impl Renames<'_> {
    /// Renames the nodes.
    pub(in crate::graph) fn commit(mut self) {
        let mut names = self.graph.lock_names();
        for (node, _) in &self.wanted {
            names.claims.remove(node.name());
        }
        for (node, name) in &self.wanted {
            names.claims.insert(Arc::clone(name), Claim::Node(node.id()));
            node.node().names().change(Arc::clone(name));
        }
        self.reserved.clear();
    }
}

impl Drop for Renames<'_> {
    fn drop(&mut self) {
        if !self.reserved.is_empty() {
            let mut names = self.graph.lock_names();
            for name in &self.reserved {
                names.claims.remove(name);
            }
        }
    }
}
