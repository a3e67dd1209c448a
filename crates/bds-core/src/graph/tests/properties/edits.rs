//! The model of changes: applies each edit to the result of those before; only the final state must
//! be legal.

use std::collections::{BTreeMap, BTreeSet};

use super::model::{Access, Edge, Key, Kind, Model};

/// Refused.
#[derive(Debug)]
pub(super) struct Refused;

type Answer<T = ()> = Result<T, Refused>;

/// An edit and its nodes.
#[derive(Clone, Debug)]
pub(super) enum Edit {
    Append { top: Key, overlay: Key },
    Replace { from: Key, to: Key },
    ReplaceChild { parent: Key, name: &'static str, to: Key },
    InsertFilter { node: Key, filter: Key },
    DropFilter { filter: Key },
    SetBacking { node: Key, backing: Option<Key> },
    Remove { node: Key },
    Reopen { node: Key, what: Reopen },
    Rename { node: Key, name: String },
    Own { node: Key },
    Disown { node: Key },
    Root { edge: u32, to: Option<Key> },
    Access { edge: u32, access: Access },
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Reopen {
    ReadOnly(bool),
    Discard(bool),
    Level(u64),
    Backing(Option<Key>),
    File(Key),
}

fn check(is_fine: bool) -> Answer {
    if is_fine { Ok(()) } else { Err(Refused) }
}

/// Bits of operations that can be blocked, as the product numbers them.
pub(super) const DELETE: u32 = 1 << 4;
pub(super) const EJECT: u32 = 1 << 5;
pub(super) const SNAPSHOT: u32 = 1 << 6;
pub(super) const REPLACE: u32 = 1 << 12;

impl Model {
    pub(super) fn is_blocked(&self, key: Key, operation: u32) -> bool {
        self.nodes[&key].blocks.iter().any(|(_, blocked)| blocked & operation != 0)
    }

    /// Applies the whole change or nothing. The caller removes the references of removed nodes.
    pub(super) fn change(&mut self, edits: &[Edit]) -> Answer {
        let before = self.clone();
        let outcome = self.change_in_place(edits, &before);
        if outcome.is_err() {
            *self = before;
        }
        outcome
    }

    fn change_in_place(&mut self, edits: &[Edit], before: &Self) -> Answer {
        for edit in edits {
            if let Edit::Root { edge, .. } = edit {
                // An eject applies to the medium before the change.
                let now = before.edges[edge].child;
                check(!now.is_some_and(|now| self.is_blocked(now, EJECT)))?;
            }
            self.edit(edit)?;
        }
        let leaving = self.check_removals(edits)?;
        self.reopen(edits, before)?;
        self.check_drivers(before)?;
        self.rename(edits)?;
        self.recompute_without(&leaving);
        check(self.is_legal())?;
        self.epoch += u64::from(!edits.is_empty());
        for edit in edits {
            if let Edit::Remove { node } = edit {
                self.monitor.retain(|owned| owned != node);
            }
        }
        self.clear_stale_inheritance();
        Ok(())
    }

    fn edit(&mut self, edit: &Edit) -> Answer {
        match *edit {
            Edit::Append { top, overlay } => {
                check(!self.is_blocked(top, SNAPSHOT))?;
                match self.child(overlay, "backing") {
                    Some(edge) => check(self.edges[&edge].child == Some(top))?,
                    None => self.attach_backing(overlay, top)?,
                }
                self.move_parents(top, overlay)
            }
            Edit::Replace { from, to } => {
                check(!self.is_blocked(from, REPLACE))?;
                self.move_parents(from, to)
            }
            Edit::ReplaceChild { parent, name, to } => {
                let edge = self.child(parent, name).ok_or(Refused)?;
                self.repoint(edge, Some(to))
            }
            Edit::InsertFilter { node, filter } => {
                check(self.filtered(filter)? == node)?;
                self.move_parents(node, filter)
            }
            Edit::DropFilter { filter } => {
                let below = self.filtered(filter)?;
                self.move_parents(filter, below)
            }
            Edit::SetBacking { node, backing } => self.set_backing(node, backing),
            Edit::Reopen { node, what: Reopen::Backing(to) } => self.set_backing(node, to),
            Edit::Reopen { node, what: Reopen::File(to) } => {
                let edge = self.child(node, "file").ok_or(Refused)?;
                self.repoint(edge, Some(to))
            }
            Edit::Reopen { .. } | Edit::Rename { .. } => Ok(()),
            Edit::Remove { node } => check(!self.is_blocked(node, DELETE)),
            Edit::Own { node } => {
                check(!self.monitor.contains(&node))?;
                self.monitor.push(node);
                Ok(())
            }
            Edit::Disown { node } => {
                check(self.monitor.contains(&node))?;
                self.monitor.retain(|owned| *owned != node);
                Ok(())
            }
            Edit::Root { edge, to } => self.repoint(edge, to),
            Edit::Access { edge, access } => {
                self.edges.get_mut(&edge).unwrap().access = access;
                Ok(())
            }
        }
    }

    fn filtered(&self, filter: Key) -> Answer<Key> {
        check(self.nodes[&filter].kind == Kind::Filter)?;
        self.child(filter, "file").and_then(|edge| self.edges[&edge].child).ok_or(Refused)
    }

    fn set_backing(&mut self, node: Key, backing: Option<Key>) -> Answer {
        match (self.child(node, "backing"), backing) {
            (None, None) => Ok(()),
            (Some(edge), Some(_)) => self.repoint(edge, backing),
            (None, Some(backing)) => self.attach_backing(node, backing),
            (Some(edge), None) => {
                check(self.edges[&edge].frozen.is_none())?;
                self.edges.remove(&edge);
                Ok(())
            }
        }
    }

    /// P17: no loop; P47: no inactive child under an active parent.
    fn check_child(&self, parent: Key, child: Key) -> Answer {
        check(!self.below(child).contains(&parent))?;
        check(!self.nodes[&parent].is_active || self.nodes[&child].is_active)
    }

    fn attach_backing(&mut self, node: Key, backing: Key) -> Answer {
        check(self.nodes[&node].kind == Kind::Image)?;
        self.check_child(node, backing)?;
        let edge = Edge {
            parent: Some(node),
            name: "backing",
            holder: format!("edge '{}.backing'", self.nodes[&node].name),
            child: Some(backing),
            access: Access { perm: 0, shared: super::model::ALL },
            frozen: None,
            stays: false,
        };
        let key = self.fresh();
        self.edges.insert(key, edge);
        Ok(())
    }

    /// P21: a frozen edge never changes its target.
    fn repoint(&mut self, edge: u32, to: Option<Key>) -> Answer {
        let Edge { frozen, child, parent, .. } = &self.edges[&edge];
        check(frozen.is_none())?;
        if *child == to {
            return Ok(());
        }
        if let (Some(parent), Some(to)) = (*parent, to)
            && self.is_live(parent)
        {
            self.check_child(parent, to)?;
        }
        self.edges.get_mut(&edge).unwrap().child = to;
        Ok(())
    }

    /// P22: all edges move but those that stay.
    fn move_parents(&mut self, from: Key, to: Key) -> Answer {
        if from == to {
            return Ok(());
        }
        for edge in self.parents(from) {
            let Edge { parent, stays, .. } = self.edges[&edge];
            let is_below = parent.is_some_and(|parent| self.below(to).contains(&parent));
            if !stays && !is_below {
                self.repoint(edge, Some(to))?;
            }
        }
        Ok(())
    }

    /// A removed node has no user at the end, and no holder but the change and the monitor.
    fn check_removals(&self, edits: &[Edit]) -> Answer<BTreeSet<Key>> {
        let mut taken: BTreeMap<Key, usize> = BTreeMap::new();
        for edit in edits {
            if let Edit::Remove { node } = edit {
                *taken.entry(*node).or_default() += 1;
            }
        }
        for (node, taken) in &taken {
            let held = self.refs.iter().filter(|held| *held == node).count();
            let is_drained = self.drains.iter().any(|drain| drain.nodes.contains(node));
            check(held == *taken && self.parents(*node).is_empty() && !is_drained)?;
        }
        Ok(taken.into_keys().collect())
    }

    /// Permissions as if the filters that are removed used nothing below them.
    fn recompute_without(&mut self, leaving: &BTreeSet<Key>) {
        let is_idle = |key: &Key, this: &Self| this.nodes[key].kind == Kind::Filter;
        let idle: Vec<Key> = leaving.iter().copied().filter(|key| is_idle(key, self)).collect();
        let hidden: Vec<(u32, Edge)> = idle
            .iter()
            .flat_map(|key| self.children(*key))
            .map(|edge| (edge, self.edges[&edge].clone()))
            .collect();
        // The edges of a removed filter exist without permissions.
        for (edge, _) in &hidden {
            self.edges.remove(edge);
        }
        self.recompute();
        for (key, edge) in hidden {
            self.edges.insert(
                key,
                Edge { access: Access { perm: 0, shared: super::model::ALL }, ..edge },
            );
        }
    }

    /// New flags, for the node and for those below that inherit from it.
    fn reopen(&mut self, edits: &[Edit], before: &Self) -> Answer {
        let mut touched = BTreeSet::new();
        for edit in edits {
            let Edit::Reopen { node, what } = edit else { continue };
            touched.insert(*node);
            let now = self.nodes.get_mut(node).unwrap();
            match *what {
                Reopen::Discard(on) => now.discard = on,
                Reopen::Level(level) => now.level = level,
                Reopen::ReadOnly(on) => now.ro = on,
                Reopen::Backing(_) | Reopen::File(_) => {}
            }
            touched.extend(self.pass_down(*node, before));
        }
        let is_lost = |key: &Key| {
            let (was, is) = (&before.nodes[key], &self.nodes[key]);
            !was.ro && is.ro && was.fail_flush
        };
        check(!touched.iter().any(is_lost))
    }

    /// Nodes get `read-only` from the node they inherit from unless it was set explicitly, along
    /// the edges before the change.
    fn pass_down(&mut self, node: Key, before: &Self) -> Vec<Key> {
        let mut touched = Vec::new();
        let mut todo = vec![node];
        while let Some(parent) = todo.pop() {
            for edge in before.children(parent) {
                let edge = &before.edges[&edge];
                let ro = self.nodes[&parent].ro || edge.is_backing();
                for child in before.through_filters(edge.child.unwrap()) {
                    let inherits = before.nodes[&child].inherits_from == Some(parent);
                    let node = self.nodes.get_mut(&child).unwrap();
                    if inherits && !node.is_ro_given && node.ro != ro {
                        node.ro = ro;
                        touched.push(child);
                        todo.push(child);
                    }
                }
            }
        }
        touched
    }

    /// P42: all at once, so that names can be swapped; at the end they are unique.
    fn rename(&mut self, edits: &[Edit]) -> Answer {
        for edit in edits {
            if let Edit::Rename { node, name } = edit {
                self.nodes.get_mut(node).unwrap().name.clone_from(name);
            }
        }
        let live = self.live();
        let names: BTreeSet<&str> = live.iter().map(|key| &*self.nodes[key].name).collect();
        check(names.len() == live.len())
    }

    fn through_filters(&self, key: Key) -> Vec<Key> {
        let mut path = vec![key];
        while let Ok(next) = self.filtered(*path.last().unwrap()) {
            path.push(next);
        }
        path
    }

    /// Drivers may refuse that a backing node is added or removed.
    fn check_drivers(&self, before: &Self) -> Answer {
        let is_content = |key: Key| {
            let was = if before.is_live(key) { before.child(key, "backing") } else { None };
            was == self.child(key, "backing") || !self.nodes[&key].refuses_backing
        };
        check(self.live().into_iter().all(is_content))
    }

    /// Inheritance ends for good when the node inherited from is no longer above.
    pub(super) fn clear_stale_inheritance(&mut self) {
        for key in self.live() {
            let inherits_from = self.inherits_from(key);
            self.nodes.get_mut(&key).unwrap().inherits_from = inherits_from;
        }
    }

    // ---- activation

    /// Inactivates these nodes and all below that no active node uses.
    pub(super) fn inactivate(&mut self, tops: &[Key]) -> Answer {
        let before = self.clone();
        let set = self.to_inactivate(tops)?;
        if set.is_empty() {
            return Ok(());
        }
        let fails = |key: &Key| !self.nodes[key].ro && self.nodes[key].fail_flush;
        check(!set.iter().any(fails))?;
        self.set_active(&set, false, before)
    }

    fn to_inactivate(&self, tops: &[Key]) -> Answer<BTreeSet<Key>> {
        let all: BTreeSet<Key> = tops.iter().flat_map(|key| self.below(*key)).collect();
        let mut set: BTreeSet<Key> = BTreeSet::new();
        loop {
            let is_free = |key: Key, set: &BTreeSet<Key>| {
                let parents = self.parent_nodes(key);
                parents.into_iter().all(|p| set.contains(&p) || !self.nodes[&p].is_active)
            };
            let next = all
                .iter()
                .copied()
                .find(|key| self.nodes[key].is_active && !set.contains(key) && is_free(*key, &set));
            match next {
                Some(key) => set.insert(key),
                None => break,
            };
        }
        check(tops.iter().all(|key| !self.nodes[key].is_active || set.contains(key)))?;
        Ok(set)
    }

    pub(super) fn activate(&mut self, tops: &[Key]) -> Answer {
        let before = self.clone();
        let all: BTreeSet<Key> = tops.iter().flat_map(|key| self.below(*key)).collect();
        let set: BTreeSet<Key> = all.into_iter().filter(|key| !self.nodes[key].is_active).collect();
        if set.is_empty() {
            return Ok(());
        }
        self.set_active(&set, true, before)
    }

    fn set_active(&mut self, set: &BTreeSet<Key>, on: bool, before: Self) -> Answer {
        for key in set {
            self.nodes.get_mut(key).unwrap().is_active = on;
        }
        self.recompute();
        if !self.is_legal() {
            *self = before;
            return Err(Refused);
        }
        self.epoch += 1;
        Ok(())
    }
}
