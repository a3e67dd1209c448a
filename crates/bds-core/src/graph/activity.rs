//! Whose bytes are they? Handing nodes over to another process, and taking them back.
//!
//! An inactive node is only read; nobody has permission to write to it or through it, and no inactive node lies below an active one.
//! Giving charge away goes from the top down, taking it from the bottom up. Either happens to all nodes in question, or to none:
//! what was done before a failure is undone.

use std::collections::HashSet;

use bds_refcount::Strong;

use super::commit::Moved;
use super::drain::DrainSet;
use super::lock::Edit;
use super::node::{Node, NodeId};
use super::perm::{self, Strictness};
use super::transaction::{Facts, Stage};
use super::{Graph, NodeRef, walk};
use crate::error::{Error, ErrorKind, Result};

impl Graph {
    /// Gives charge of the node away, and of all below it that no active node uses: everything is written out and nothing is
    /// written until [`Graph::activate`]. Its users must not have asked for writing.
    ///
    /// # Errors
    /// Everything is as active as before. `InUse`: an active node lies above; `Inactive`: somebody has permission to write
    /// (he is named); or what the driver could not write out.
    pub async fn inactivate(&self, node: &NodeRef) -> Result<()> {
        let _one = self.begin_change().await;
        self.inactivate_below(vec![Strong::clone(node.strong())]).await
    }

    /// [`Graph::inactivate`] for all nodes, as before the end of a migration.
    ///
    /// # Errors
    /// As [`Graph::inactivate`].
    pub async fn inactivate_all(&self) -> Result<()> {
        let _one = self.begin_change().await;
        let tops = self.0.reaper.live().into_iter().filter(|node| !has_parent_node(self, node));
        self.inactivate_below(tops.collect()).await
    }

    /// Takes charge of the node and of all below it: bytes are read anew, because others may have changed them.
    ///
    /// # Errors
    /// Everything is as inactive as before: what a driver could not read or lock.
    pub async fn activate(&self, node: &NodeRef) -> Result<()> {
        let _one = self.begin_change().await;
        self.activate_below(vec![Strong::clone(node.strong())]).await
    }

    /// [`Graph::activate`] for all nodes.
    ///
    /// # Errors
    /// As [`Graph::activate`].
    pub async fn activate_all(&self) -> Result<()> {
        let _one = self.begin_change().await;
        self.activate_below(self.0.reaper.live()).await
    }

    async fn inactivate_below(&self, tops: Vec<Strong<Node>>) -> Result<()> {
        let set = self.nodes_to_inactivate(tops)?;
        if set.is_empty() {
            return Ok(());
        }
        let drained = DrainSet::begin(self, set.clone(), "inactivation").await;
        // Refused before anything is written, if it will be.
        drop(self.settle_activity(&set, false)?);
        drained.open_doors();
        let mut done: Vec<&Strong<Node>> = Vec::new();
        for node in &set {
            if let Err(error) = self.inactivate_one(node).await {
                for node in done.into_iter().rev() {
                    undo(node).await;
                }
                return Err(error.node(node.name()));
            }
            done.push(node);
        }
        drained.settle().await;
        match self.put_activity_into_force(&drained, &set, false) {
            Ok(()) => Ok(()),
            Err(error) => {
                drained.open_doors();
                for node in done.into_iter().rev() {
                    undo(node).await;
                }
                Err(error)
            }
        }
    }

    async fn inactivate_one(&self, node: &Strong<Node>) -> Result<()> {
        self.step()?;
        if node.could_write() {
            self.0.reaper.flush_node(node).await?;
        }
        node.driver().inactivate().await
    }

    async fn activate_below(&self, tops: Vec<Strong<Node>>) -> Result<()> {
        // Children first: a parent reads through them.
        let set: Vec<_> = order(&tops).into_iter().filter(|node| !node.is_active()).rev().collect();
        if set.is_empty() {
            return Ok(());
        }
        let drained = DrainSet::begin(self, set.clone(), "activation").await;
        drop(self.settle_activity(&set, true)?);
        drained.open_doors();
        let mut done: Vec<&Strong<Node>> = Vec::new();
        for node in &set {
            let active = match self.step() {
                Ok(()) => node.driver().activate().await,
                Err(error) => Err(error),
            };
            // Whoever is above reads through it from here on.
            if let Err(error) = active {
                give_back(&done).await;
                return Err(error.node(node.name()));
            }
            done.push(node);
        }
        drained.settle().await;
        let changed = self.put_activity_into_force(&drained, &set, true);
        if changed.is_err() {
            drained.open_doors();
            give_back(&done).await;
        }
        changed
    }

    /// Top down, all that is active, reachable, and used by no active node that stays so.
    fn nodes_to_inactivate(&self, tops: Vec<Strong<Node>>) -> Result<Vec<Strong<Node>>> {
        let walls = self.0.reaper.walls();
        let asked: HashSet<NodeId> = tops.iter().map(|node| node.id()).collect();
        let mut set: Vec<Strong<Node>> = Vec::new();
        let mut chosen = HashSet::new();
        for node in order(&tops) {
            if !node.is_active() {
                continue;
            }
            let parents: Vec<_> =
                node.parents().iter().filter_map(|edge| walls.parent_node(edge)).collect();
            let user = parents.iter().find(|p| p.is_active() && !chosen.contains(&p.id()));
            match user {
                None => {
                    chosen.insert(node.id());
                    set.push(node);
                }
                Some(user) if asked.contains(&node.id()) => {
                    let words =
                        format!("node '{}' above it is active: inactivate that first", user.name());
                    return Err(Error::new(ErrorKind::InUse, words).node(node.name()));
                }
                Some(_) => {}
            }
        }
        Ok(set)
    }

    fn settle_activity(&self, set: &[Strong<Node>], is_active: bool) -> Result<perm::Accesses> {
        let _walls = self.0.reaper.walls();
        let stage = self.stage_activity(set, is_active);
        perm::settle(&stage, stage.starts(), Strictness::Checked)
    }

    fn stage_activity(&self, set: &[Strong<Node>], is_active: bool) -> Stage<'_> {
        let mut stage = Stage::new(&self.0.reaper);
        for node in set {
            stage.set_facts(node, Facts { is_active: Some(is_active), ..Facts::default() });
        }
        stage
    }

    fn put_activity_into_force(
        &self,
        drained: &DrainSet,
        set: &[Strong<Node>],
        is_active: bool,
    ) -> Result<()> {
        let walls = self.0.reaper.walls();
        let stage = self.stage_activity(set, is_active);
        let accesses = perm::settle(&stage, stage.starts(), Strictness::Checked)?;
        self.step()?;
        let edit = Edit::new(drained, &walls);
        set.iter().for_each(|node| node.set_active(is_active));
        perm::apply(&walls, accesses);
        // Lengths and limits may have changed below.
        Moved::of(set).refresh(self, &edit);
        Ok(())
    }
}

async fn give_back(done: &[&Strong<Node>]) {
    for node in done.iter().rev() {
        if let Err(error) = node.driver().inactivate().await {
            tracing::error!(node = %node.name(), %error, "a refused activation could not be taken back");
        }
    }
}

async fn undo(node: &Strong<Node>) {
    if let Err(error) = node.driver().activate().await {
        tracing::error!(node = %node.name(), %error, "a refused inactivation could not be taken back");
    }
}

fn has_parent_node(graph: &Graph, node: &Node) -> bool {
    let walls = graph.0.reaper.walls();
    node.parents().iter().any(|edge| walls.parent_node(edge).is_some())
}

/// These nodes and all below them, each after all of its parents that are among them.
pub(super) fn order(tops: &[Strong<Node>]) -> Vec<Strong<Node>> {
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    let mut todo: Vec<(Strong<Node>, bool)> =
        tops.iter().map(|node| (Strong::clone(node), false)).collect();
    while let Some((node, is_done)) = todo.pop() {
        if is_done {
            order.push(node);
        } else if seen.insert(node.id()) {
            todo.push((Strong::clone(&node), true));
            todo.extend(walk::children_strong(&node).into_iter().map(|child| (child, false)));
        }
    }
    order.reverse();
    order
}
