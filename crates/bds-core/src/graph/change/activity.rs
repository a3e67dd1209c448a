//! Activates and inactivates nodes: hands images over to another process, and takes them back.
//!
//! An inactive node is only read: no user has permission to write to it or through it, and no
//! inactive node lies below an active one. Nodes are inactivated from the top down and activated
//! from the bottom up. Either happens to all nodes in question, or to none: what was done before a
//! failure is undone.

use std::collections::HashSet;
use std::sync::Arc;

use bds_refcount::Strong;

use super::commit::Moved;
use super::perm::{self, Strictness};
use super::stage::{Accesses, Facts, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::bitmaps::persist::{self, LoadedBitmap};
use crate::graph::close::run_to_end::run_to_end;
use crate::graph::drain::set::DrainedEdit;
use crate::graph::drain::set::{DrainSet, Drained, Section, wait_undrained_below};
use crate::graph::model::node::{Node, NodeId};
use crate::graph::query::walk;
use crate::graph::{Graph, NodeRef};

/// The bitmaps of an image that was activated.
type Loaded = Vec<LoadedBitmap>;

/// Inactivation or activation of nodes. Made by [`Graph::handover`].
#[derive(Clone, Debug)]
pub struct Handover {
    graph: Graph,
    within: Vec<Arc<Section>>,
}

impl Graph {
    /// Begins a hand-over, possibly inside the caller's drained sections. Without such,
    /// [`Graph::inactivate`] and [`Graph::activate`] are shorter.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let drained = graph.drain(&disk).await; // no request enters from before to after
    /// graph.handover().within(&drained).inactivate(&disk).await?;
    /// assert!(!disk.is_active());
    /// graph.handover().within(&drained).activate_all().await?;
    /// assert!(disk.is_active());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    pub fn handover(&self) -> Handover {
        Handover { graph: self.clone(), within: Vec::new() }
    }

    /// [`Handover::inactivate`] outside of drained sections.
    ///
    /// ```
    /// use bds_core::request::{Backend, BackendOptions};
    /// use bds_core::{ErrorKind, Options};
    ///
    /// # let config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # bds_io::block_on(async {
    /// let disk = graph.open(Options::parse("driver=mem,node-name=disk,size=1M")?).await?;
    /// let writer = BackendOptions { writable: true, ..BackendOptions::registered("guest") };
    /// let guest = Backend::new(&disk, writer.clone())?;
    /// let error = graph.inactivate(&disk).await.unwrap_err();
    /// assert!(error.to_string().contains("backend 'guest' would write to it"), "{error}");
    ///
    /// drop(guest);
    /// graph.inactivate(&disk).await?;
    /// assert!(!disk.is_writable() && disk.could_write());
    /// assert_eq!(Backend::new(&disk, writer).unwrap_err().kind(), ErrorKind::Inactive);
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # bds_io::block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Handover::inactivate`].
    pub async fn inactivate(&self, node: &NodeRef) -> Result<()> {
        self.handover().inactivate(node).await
    }

    /// [`Handover::inactivate_all`] outside of drained sections.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// graph.inactivate_all().await?;
    /// assert!(graph.nodes().iter().all(|node| !node.is_active()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Handover::inactivate`].
    pub async fn inactivate_all(&self) -> Result<()> {
        self.handover().inactivate_all().await
    }

    /// [`Handover::activate`] outside of drained sections.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// graph.inactivate_all().await?;
    /// graph.activate(&base).await?;
    /// assert!(base.is_active() && !top.is_active(), "only what lies below it");
    /// graph.activate(&top).await?;
    /// assert!(top.is_active());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Handover::activate`].
    pub async fn activate(&self, node: &NodeRef) -> Result<()> {
        self.handover().activate(node).await
    }

    /// [`Handover::activate_all`] outside of drained sections.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// graph.inactivate_all().await?;
    /// graph.activate_all().await?;
    /// assert!(graph.nodes().iter().all(|node| node.is_active()));
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Handover::activate`].
    pub async fn activate_all(&self) -> Result<()> {
        self.handover().activate_all().await
    }
}

impl Handover {
    /// Works inside this drained section, and may reach nodes that the section has drained. Other
    /// sections are waited for.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let drained = graph.drain_subtree(&top).await;
    /// graph.handover().within(&drained).inactivate_all().await?;
    /// assert!(!base.is_active());
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    #[must_use]
    pub fn within(mut self, drained: &Drained) -> Self {
        self.within.push(drained.section());
        self
    }

    /// Inactivates the node, and all below it that no active node uses: everything is written out,
    /// and nothing is written until [`Handover::activate`]. No user may have permission to write.
    /// Runs to its end once begun.
    ///
    /// ```
    /// use bds_core::Options;
    ///
    /// # let sim = bds_io::Sim::new(0, bds_io::SimConfig::calm());
    /// # let mut config = bds_core::graph::GraphConfig::new(bds_drivers::registry().into());
    /// # config.fs = sim.fs();
    /// # let graph = bds_core::graph::Graph::new(config);
    /// # sim.block_on(async {
    /// # for path in ["top.qcow2"] {
    /// #     let options = bds_core::Options::parse("size=1M")?;
    /// #     let (format, path) = ("qcow2".into(), path.into());
    /// #     let image = bds_core::graph::NewImage { format, path, options, skip_backing: false };
    /// #     graph.create_image(image).await?;
    /// # }
    /// let base = graph.open(Options::parse("driver=mem,node-name=base,size=1M")?).await?;
    /// let layer = "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,\
    ///     backing=base";
    /// let top = graph.open(Options::parse(layer)?).await?;
    /// let error = graph.handover().inactivate(&base).await.unwrap_err();
    /// assert_eq!(error.message(), "node 'top' above it is active: inactivate that first");
    /// graph.handover().inactivate(&top).await?;
    /// assert!(!base.is_active(), "it went along: no active node uses it");
    /// # Ok::<(), bds_core::Error>(())
    /// # })?;
    /// # sim.block_on(graph.shutdown()).check_leaks()?;
    /// # Ok::<(), bds_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// Everything is as active as before. `InUse`: an active node lies above; `Inactive`: a user
    /// has permission to write (it is named); or the driver's error when it wrote out.
    pub async fn inactivate(self, node: &NodeRef) -> Result<()> {
        let tops = vec![Strong::clone(node.strong())];
        self.run(move |graph| graph.nodes_to_inactivate(tops.clone()), false).await
    }

    /// [`Handover::inactivate`] for all nodes, as before the end of a migration.
    ///
    /// # Errors
    /// As [`Handover::inactivate`].
    pub async fn inactivate_all(self) -> Result<()> {
        let tops = |graph: &Graph| {
            let live = graph.0.core.live().into_iter();
            let tops = live.filter(|node| !has_parent_node(graph, node)).collect();
            graph.nodes_to_inactivate(tops)
        };
        self.run(tops, false).await
    }

    /// Activates the node and all below it: bytes are read anew, because other processes may have
    /// changed them. Runs to its end once begun.
    ///
    /// # Errors
    /// Everything is as inactive as before: a driver could not read or lock.
    pub async fn activate(self, node: &NodeRef) -> Result<()> {
        let tops = vec![Strong::clone(node.strong())];
        self.run(move |_| Ok(nodes_to_activate(&tops)), true).await
    }

    /// [`Handover::activate`] for all nodes.
    ///
    /// # Errors
    /// As [`Handover::activate`].
    pub async fn activate_all(self) -> Result<()> {
        self.run(|graph| Ok(nodes_to_activate(&graph.0.core.live())), true).await
    }

    /// Runs to its end even if the caller's future is dropped: drivers that were inactivated must
    /// not stay so while their nodes are marked active.
    async fn run(
        self,
        choose: impl Fn(&Graph) -> Result<Vec<Strong<Node>>> + Send + 'static,
        is_active: bool,
    ) -> Result<()> {
        let Self { graph, within } = self;
        let work = async move {
            loop {
                let turn = graph.begin_change().await;
                let set = choose(&graph)?;
                let Some(blocked) = graph.hand_over_set(set, is_active, &within).await? else {
                    return Ok(());
                };
                // The holder of the section below may need a change of its own to end it: that
                // change gets its turn.
                drop(turn);
                wait_undrained_below(&graph, &blocked).await;
                bds_io::yield_now().await;
            }
        };
        let unseen = |result: Result<()>| {
            if let Err(error) = result {
                tracing::error!(%error, "a change of activity failed, and no caller waited for it");
            }
        };
        run_to_end(work, unseen).await.unwrap_or_else(|| {
            Err(Error::new(ErrorKind::Cancelled, "the executor went away before the end"))
        })
    }
}

impl Graph {
    /// Switches a set of nodes in this order. `Some`: nothing was done, because another section
    /// drains a node below.
    async fn hand_over_set(
        &self,
        set: Vec<Strong<Node>>,
        is_active: bool,
        within: &[Arc<Section>],
    ) -> Result<Option<Vec<Strong<Node>>>> {
        if set.is_empty() {
            return Ok(None);
        }
        let what = "change of activity";
        let drained = DrainSet::begin_within(self, set.clone(), what, within).await;
        // Checked before anything is written.
        drop(self.compute_activity(&set, is_active)?);
        let Ok(work) = drained.open_gates_for(&set) else { return Ok(Some(set)) };
        let mut done: Vec<&Strong<Node>> = Vec::new();
        let mut bitmaps = Vec::new();
        for node in &set {
            match self.switch_driver(node, is_active).await {
                Ok(loaded) => bitmaps.push(loaded),
                Err(error) => {
                    undo_switch(&done, is_active).await;
                    return Err(error.node(node.name()));
                }
            }
            done.push(node);
        }
        drop(work);
        drained.wait_drained().await;
        let changed = self.apply_activity(&drained, &set, is_active, bitmaps);
        if changed.is_err() {
            // No other section can have drained the set in between without waiting for this.
            let work = drained.open_gates_for(&set);
            undo_switch(&done, is_active).await;
            drop(work);
        }
        changed.map(|()| None)
    }

    /// Activates one driver and reads its bitmaps, or stores them and inactivates it.
    async fn switch_driver(&self, node: &Strong<Node>, is_active: bool) -> Result<Loaded> {
        self.step()?;
        let driver = node.driver();
        if is_active {
            driver.activate().await?;
            let loaded = persist::load(driver).await;
            if loaded.is_err() {
                undo_switch(&[node], is_active).await;
            }
            return loaded;
        }
        if node.could_write() {
            self.0.core.flush_node(node).await?;
        }
        persist::store_all(node).await?;
        driver.inactivate().await.map(|()| Loaded::new())
    }

    /// The nodes to inactivate, top down: active, reachable, and used by no active node outside the
    /// set.
    fn nodes_to_inactivate(&self, tops: Vec<Strong<Node>>) -> Result<Vec<Strong<Node>>> {
        let lock = self.0.core.lock();
        let requested: HashSet<NodeId> = tops.iter().map(|node| node.id()).collect();
        let mut set: Vec<Strong<Node>> = Vec::new();
        let mut chosen = HashSet::new();
        for node in walk::parents_first(&tops) {
            if !node.is_active() {
                continue;
            }
            let parents: Vec<_> =
                node.parents().iter().filter_map(|edge| lock.parent_node(edge)).collect();
            let user = parents.iter().find(|p| p.is_active() && !chosen.contains(&p.id()));
            match user {
                None => {
                    chosen.insert(node.id());
                    set.push(node);
                }
                Some(user) if requested.contains(&node.id()) => {
                    let message =
                        format!("node '{}' above it is active: inactivate that first", user.name());
                    return Err(Error::new(ErrorKind::InUse, message).node(node.name()));
                }
                Some(_) => {}
            }
        }
        Ok(set)
    }

    fn compute_activity(&self, set: &[Strong<Node>], is_active: bool) -> Result<Accesses> {
        let _lock = self.0.core.lock();
        let stage = self.stage_activity(set, is_active);
        perm::compute(&stage, stage.starts(), Strictness::Checked)
    }

    fn stage_activity(&self, set: &[Strong<Node>], is_active: bool) -> Stage<'_> {
        let mut stage = Stage::new(&self.0.core.arena);
        for node in set {
            stage.set_facts(node, Facts { is_active: Some(is_active), ..Facts::default() });
        }
        stage
    }

    fn apply_activity(
        &self,
        drained: &DrainSet,
        set: &[Strong<Node>],
        is_active: bool,
        bitmaps: Vec<Loaded>,
    ) -> Result<()> {
        let lock = self.0.core.lock();
        let stage = self.stage_activity(set, is_active);
        let accesses = perm::compute(&stage, stage.starts(), Strictness::Checked)?;
        self.step()?;
        let edit = DrainedEdit::new(drained, &lock);
        for (node, loaded) in set.iter().zip(bitmaps) {
            node.set_active(is_active);
            if is_active {
                node.bitmaps.set_loaded(loaded, node.len());
            }
            node.bitmaps.set_readonly(!node.is_writable());
        }
        perm::apply(&lock, accesses);
        // Lengths and limits may have changed below.
        Moved::of(set).refresh(self, &edit);
        Ok(())
    }
}

/// Switches drivers back, the last first.
async fn undo_switch(done: &[&Strong<Node>], was_to_be_active: bool) {
    for node in done.iter().rev() {
        let driver = node.driver();
        let switched = match was_to_be_active {
            true => driver.inactivate().await,
            false => driver.activate().await,
        };
        if let Err(error) = switched {
            tracing::error!(node = %node.name(), %error, "a refused change of activity could not be taken back");
        }
    }
}

/// The inactive nodes at or below these, children first: a parent reads through them.
fn nodes_to_activate(tops: &[Strong<Node>]) -> Vec<Strong<Node>> {
    walk::parents_first(tops).into_iter().filter(|node| !node.is_active()).rev().collect()
}

fn has_parent_node(graph: &Graph, node: &Node) -> bool {
    let lock = graph.0.core.lock();
    node.parents().iter().any(|edge| lock.parent_node(edge).is_some())
}
