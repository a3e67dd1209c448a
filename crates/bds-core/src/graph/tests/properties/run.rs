//! Runs commands on the graph and on the model, and compares the results.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::holder_kind::HolderKind;
use bds_io::{Sim, SimConfig};
use bds_refcount::{Release, Watch};
use futures_util::future::poll_immediate;

use super::commands::{Command, Tree};
use super::model::{Access, Edge, Key, Model};
use super::open::{self, pick};
use super::snapshot;
use crate::driver::Registry;
use crate::graph::tests::tally::Tally;
use crate::graph::{
    Access as RealAccess, AnonymousBitmap, BitmapId, BitmapLease, BlockOps, Blocker, CloseReport,
    Drained, Frozen, Graph, GraphConfig, Holder, JobEdge, JobSlot, Node, NodeId, NodeRef, Perm,
    Root, TopLevel, walk,
};
use crate::options::Options;
use crate::test_kit::gate_port;
use crate::test_kit::stepwise::Stepwise;

/// A root as its owner holds it.
pub(super) enum Held {
    Backend(Arc<crate::graph::Edge>),
    Job(JobEdge),
}

/// The graph and its model, side by side.
pub(super) struct Comparison {
    pub(super) graph: Graph,
    pub(super) drivers: Arc<Stepwise>,
    pub(super) model: Model,
    pub(super) is_narrow: bool,
    /// In step with the model's.
    pub(super) refs: Vec<NodeRef>,
    /// Every id ever issued.
    pub(super) ids: Vec<(NodeId, Key)>,
    pub(super) roots: Vec<(Held, u32)>,
    pub(super) frozen: Vec<(Frozen, u32)>,
    pub(super) drains: Vec<(Drained, u32)>,
    pub(super) blockers: Vec<(Blocker, Key, u32)>,
    pub(super) slots: Vec<(JobSlot, Key)>,
    pub(super) bitmaps: Vec<(BitmapId, Key, u64)>,
    pub(super) anonymous: Vec<(AnonymousBitmap, Key, u64)>,
    pub(super) leases: Vec<(BitmapLease, Key, u64)>,
    pub(super) walk: Option<(TopLevel, Vec<Key>)>,
    pub(super) watches: Vec<(Watch<Node>, Key)>,
    /// Counts of what the search reached.
    pub(super) tally: Arc<Tally>,
    /// Names in reports of closes that failed.
    pub(super) unclean: Vec<String>,
}

/// Widths of generation and index in ids.
pub(super) type Widths = (u32, u32);

/// Runs a test on a new graph and an empty model.
pub(super) fn run<F: Future<Output = ()>>(
    seed: u64,
    widths: Option<Widths>,
    tally: &Arc<Tally>,
    test: impl FnOnce(Comparison) -> F,
) {
    let sim = Sim::new(seed, SimConfig::calm());
    let (graph, drivers) = graph_of_fakes(&sim, widths);
    let both = Comparison {
        graph,
        drivers,
        model: Model::default(),
        is_narrow: widths.is_some(),
        refs: Vec::new(),
        ids: Vec::new(),
        roots: Vec::new(),
        frozen: Vec::new(),
        drains: Vec::new(),
        blockers: Vec::new(),
        slots: Vec::new(),
        bitmaps: Vec::new(),
        anonymous: Vec::new(),
        leases: Vec::new(),
        walk: None,
        watches: Vec::new(),
        tally: Arc::clone(tally),
        unclean: Vec::new(),
    };
    sim.block_on(test(both));
    sim.run_until_idle();
}

/// A graph of stepwise fake drivers.
pub(super) fn graph_of_fakes(sim: &Sim, widths: Option<Widths>) -> (Graph, Arc<Stepwise>) {
    let mut registry = Registry::new();
    let drivers = Stepwise::register(&mut registry);
    let mut config = GraphConfig::new(Arc::new(registry));
    config.fs = sim.fs();
    let graph = match widths {
        None => Graph::with_ports(config, gate_port::port),
        Some((generation, index)) => {
            Graph::with_narrow_ids(config, gate_port::port, generation, index)
        }
    };
    let weak = Arc::downgrade(&graph.0);
    drivers.set_fail_step(Box::new(move || {
        weak.upgrade().map_or(Ok(()), |graph| graph.faults.step())
    }));
    (graph, drivers)
}

/// Lets every task run that can run.
pub(super) async fn idle() {
    bds_io::sleep(Duration::from_secs(1)).await;
}

pub(super) fn real_access(access: Access) -> RealAccess {
    let perm = |bits: u8| Perm::from_bits(bits.into()).unwrap();
    RealAccess { perm: perm(access.perm), shared: perm(access.shared) }
}

impl Comparison {
    pub(super) fn pick_ref(&self, n: usize) -> Option<usize> {
        (!self.refs.is_empty()).then(|| n % self.refs.len())
    }

    pub(super) fn push_ref(&mut self, node: NodeRef) {
        let key = self.key(&node);
        self.refs.push(node);
        self.model.refs.push(key);
    }

    pub(super) fn take_ref(&mut self, index: usize) -> NodeRef {
        self.model.refs.swap_remove(index);
        self.refs.swap_remove(index)
    }

    fn key(&self, node: &NodeRef) -> Key {
        self.ids.iter().find(|(id, _)| *id == node.id()).expect("P5: an id is a node for ever").1
    }

    /// Collects the names of nodes whose close failed (P14).
    pub(super) fn collect_failures(&mut self, report: &CloseReport) {
        if report.flush_error.is_some() || report.close_error.is_some() {
            self.unclean.push(report.name.clone());
        }
        report.below.iter().for_each(|below| self.collect_failures(below));
    }

    pub(super) async fn reap(&mut self) {
        let reports = self.graph.reap().await;
        reports.iter().for_each(|report| self.collect_failures(report));
        self.model.sweep();
    }

    /// True if two nodes or more would die at once while something is drained: their order is not
    /// defined.
    pub(super) fn close_order_is_ambiguous(&self, after: &Model) -> bool {
        let mut after = after.clone();
        let before = after.graveyard.len();
        after.mark_dead();
        !after.drains.is_empty() && after.graveyard.len() > before + 1
    }

    /// Runs one command; does nothing if its object does not exist.
    pub(super) async fn step(&mut self, command: &Command) {
        match command {
            Command::Open(tree) => self.open(tree).await,
            Command::OpenSweep(tree) => self.open_sweep(tree).await,
            Command::Change(steps, mode) => self.change(steps, mode).await,
            Command::AttachAndDetach(node, backing) => {
                self.attach_and_detach(*node, *backing).await
            }
            Command::Activate(node, mode) => self.set_active(*node, true, mode).await,
            Command::Inactivate(node, mode) => self.set_active(*node, false, mode).await,
            Command::Close(n) => self.close(*n).await,
            Command::Del(n) => self.del(*n).await,
            Command::Reap => self.reap().await,
            Command::Shutdown => self.shutdown().await,
            Command::Drain(_) | Command::DrainSubtree(_) | Command::DrainAll => {
                self.drain(command).await;
            }
            Command::JobAccess(n, access) => self.job_access(*n, *access).await,
            Command::FreezeChain(n, len) => self.freeze_chain(*n, *len).await,
            _ => self.step_at_once(command),
        }
        self.model.update();
        idle().await;
        if self.model.has_deferred() {
            self.reap().await;
        }
    }

    /// Commands without an await.
    fn step_at_once(&mut self, command: &Command) {
        match *command {
            Command::Acquire(n) => self.acquire(n),
            Command::Find(n) => {
                if let Some(key) = pick(&self.model.live(), n) {
                    let node = self.graph.find(&self.model.nodes[&key].name).unwrap();
                    self.push_ref(node);
                }
            }
            Command::Clone(n) => {
                if let Some(n) = self.pick_ref(n) {
                    self.push_ref(self.refs[n].clone());
                }
            }
            Command::CloneAndRelease(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                // P15: clone, then release, leaves no trace; the snapshots are compared afterwards.
                assert_eq!(self.refs[n].clone().release(), Release::NotLast, "P15");
            }
            Command::Release(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let key = self.model.refs[n];
                let node = self.take_ref(n);
                let is_last = self.model.count(key) == 0;
                // P9: the release of the last reference says so.
                assert_eq!(node.release() == Release::Last, is_last, "P9");
            }
            Command::UseStale(n) => self.use_stale(n),
            Command::Own(n) => {
                let Some(n) = self.pick_ref(n) else { return };
                let key = self.model.refs[n];
                let node = self.take_ref(n);
                let is_new = !self.model.monitor.contains(&key);
                assert_eq!(self.graph.own(node).is_ok(), is_new, "owned once");
                if is_new {
                    self.model.monitor.push(key);
                }
            }
            Command::Walk => {
                self.walk = Some((self.graph.top_level(), self.model_top_level()));
            }
            Command::WalkOn => self.walk_on(),
            Command::LeaveWalk => self.walk = None,
            Command::Watch(n) => {
                if let Some((id, key)) = pick(&self.ids, n) {
                    self.watches.push((self.graph.watch(id), key));
                }
            }
            Command::Attach(node, access, is_job) => self.attach(node, access, is_job),
            Command::Detach(n) => {
                if !self.roots.is_empty() {
                    let (root, edge) = self.roots.swap_remove(n % self.roots.len());
                    drop(root);
                    self.model.edges.remove(&edge);
                }
            }
            Command::EndDrain(n) => self.end_drain(n),
            ref other => self.claim(other),
        }
    }

    /// P4: an id resolves exactly while its node lives, and an acquired reference is one more.
    fn acquire(&mut self, n: usize) {
        let Some((id, key)) = pick(&self.ids, n) else { return };
        let found = self.graph.acquire(id);
        assert_eq!(found.is_ok(), self.model.is_live(key), "P4");
        if let Ok(node) = found {
            self.push_ref(node);
        }
    }

    /// P1: a stale id resolves to nothing, and never to another node.
    fn use_stale(&self, n: usize) {
        let stale: Vec<NodeId> = self
            .ids
            .iter()
            .filter(|(_, key)| !self.model.is_live(*key))
            .map(|(id, _)| *id)
            .collect();
        let Some(id) = pick(&stale, n) else { return };
        assert!(self.graph.acquire(id).is_err(), "P1");
        self.tally.count("stale ids");
        assert_eq!((self.graph.count(id), self.graph.holders(id).len()), (0, 0), "P1");
        assert!(self.graph.watch(id).has_fired(), "P49: at once, post mortem");
        assert!(!self.graph.is_owned(id), "P23");
    }

    // ---- open

    async fn prepare_open(&mut self) {
        if self.is_narrow || self.model.has_deferred() {
            self.reap().await;
        }
    }

    pub(super) async fn open(&mut self, tree: &Tree) {
        self.prepare_open().await;
        let mut after = self.model.swept();
        let Some(text) = open::options(tree, &after) else { return };
        let fits = self.graph.0.core.arena.stats().free >= open::len(tree);
        let root = if fits { after.open(tree) } else { None };
        if root.is_none() && !after.drains.is_empty() {
            return; // What it leaves is closed after the section.
        }
        self.model = after;
        let opened = self.graph.open(Options::parse(&text).unwrap()).await;
        assert_eq!(opened.is_ok(), root.is_some(), "{text}: {:?}", opened.err());
        self.tally.count(if root.is_some() { "opened" } else { "not opened" });
        self.tally.count_if(!fits, "graph is full");
        match (opened, root) {
            (Ok(node), Some(root)) => {
                self.learn_ids(root, &node);
                self.push_ref(node);
            }
            _ => self.accept_closes_of_failed_open().await,
        }
    }

    /// P29, P13: fails at each step of its drivers, and leaves nothing each time.
    async fn open_sweep(&mut self, tree: &Tree) {
        if !self.model.drains.is_empty() {
            return; // What it leaves is closed after the section.
        }
        self.drivers.drivers_fail.store(true, Ordering::Relaxed);
        self.reap().await;
        let Some(text) = open::options(tree, &self.model) else { return };
        for step in 0.. {
            let before = snapshot::of_graph(&self.graph);
            self.graph.0.faults.set(Some(step));
            let opened = self.graph.open(Options::parse(&text).unwrap()).await;
            let has_struck = self.graph.0.faults.has_struck();
            self.graph.0.faults.set(None);
            if !has_struck {
                drop(opened);
                self.graph.reap().await;
                return self.accept_closes_of_failed_open().await;
            }
            assert!(opened.is_err(), "P29: {text} at {step}");
            self.tally.count("faults of opens");
            self.accept_closes_of_failed_open().await;
            assert_eq!(snapshot::of_graph(&self.graph), before, "P29: {text} at {step}");
        }
    }

    /// Drops closes that a failed open made itself; those of the model must be among them.
    async fn accept_closes_of_failed_open(&mut self) {
        idle().await;
        self.graph.reports().iter().for_each(|report| self.collect_failures(report));
        let mut closed = self.drivers.closed.lock().unwrap();
        for (found, ours) in
            [(&mut *closed, &self.model.closed), (&mut self.unclean, &self.model.unclean)]
        {
            let count = |all: &[String], name: &String| all.iter().filter(|n| *n == name).count();
            assert!(ours.iter().all(|name| count(found, name) >= count(ours, name)), "P11, P14");
            found.clone_from(ours);
        }
    }

    /// Records names and ids of the opened nodes.
    fn learn_ids(&mut self, key: Key, node: &NodeRef) {
        let wanted = self.model.nodes[&key].name.clone();
        if wanted.is_empty() {
            assert!(node.name().starts_with('#'), "P42: no user can type a generated name");
        } else {
            assert_eq!(node.name(), wanted);
        }
        assert!(self.ids.iter().all(|(id, _)| *id != node.id()), "P1: an id is issued once");
        self.ids.push((node.id(), key));
        self.model.set_name(key, node.name());
        for edge in self.model.children(key) {
            let Edge { name, child, .. } = self.model.edges[&edge];
            let child = child.unwrap();
            if self.ids.iter().all(|(_, known)| *known != child) {
                let (node, _) = walk::child(node, name).unwrap();
                self.learn_ids(child, &node);
            }
        }
    }

    // ---- beside the tree

    fn attach(&mut self, node: Option<usize>, access: Access, is_job: bool) {
        let index = match node.map(|n| self.pick_ref(n)) {
            Some(None) => return,
            Some(index) => index,
            None => None,
        };
        let number = self.model.fresh();
        let name = format!("r{number}");
        let (real, target) = (real_access(access), index.map(|n| &self.refs[n]));
        let (held, word) = match (is_job, target) {
            (true, Some(node)) => (self.graph.attach_job(node, &name, real).map(Held::Job), "job"),
            _ => {
                let root = Root {
                    kind: HolderKind::Backend,
                    name: &name,
                    access: real,
                    is_fixed: false,
                    is_backend: false,
                };
                (self.graph.attach_root(target, &root).map(Held::Backend), "backend")
            }
        };
        let before = self.model.clone();
        let edge = Edge {
            parent: None,
            name: "root",
            holder: format!("{word} '{name}'"),
            child: index.map(|n| self.model.refs[n]),
            access,
            frozen: None,
            stays: word == "job",
        };
        self.model.edges.insert(number, edge);
        self.model.recompute();
        let is_fine = self.model.is_legal();
        assert_eq!(held.is_ok(), is_fine, "P24, P19: {access:?} {:?}", held.err());
        self.tally.count(if is_fine { "attached" } else { "not attached" });
        match held {
            Ok(held) => self.roots.push((held, number)),
            Err(_) => self.model = before,
        }
    }

    pub(super) fn model_top_level(&self) -> Vec<Key> {
        let edges = self.model.edges.values();
        let mut roots: Vec<(&str, Key)> = edges
            .filter(|edge| edge.holder.starts_with("backend"))
            .filter_map(|edge| Some((&*edge.holder, edge.child?)))
            .collect();
        roots.sort_unstable();
        let all = roots.into_iter().map(|(_, key)| key).chain(self.model.monitor.iter().copied());
        let mut seen = Vec::new();
        all.for_each(|key| {
            if !seen.contains(&key) {
                seen.push(key);
            }
        });
        seen
    }

    /// P44: top-level nodes of the walk's beginning that still live, in order.
    fn walk_on(&mut self) {
        let Some((mut walk, mut left)) = self.walk.take() else { return };
        left.retain(|key| self.model.is_live(*key));
        let found = walk.next();
        let found_key = found.as_ref().map(|node| self.key(node));
        assert_eq!(found_key, left.first().copied(), "P44");
        self.tally.count_if(found.is_some(), "walked");
        if let Some(node) = found {
            // Kept for longer than the walk: under a name of its own it counts as a user.
            self.push_ref(node.held_as(Holder::new(HolderKind::User, "found by a walk")));
            left.remove(0);
            self.walk = Some((walk, left));
        }
    }

    /// Polls a future for this many turns and drops it. Its output, if it completed.
    pub(super) async fn run_for<T>(turns: usize, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        for _ in 0..turns {
            if let Some(done) = poll_immediate(future.as_mut()).await {
                return Some(done);
            }
            bds_io::yield_now().await;
        }
        None
    }

    pub(super) fn operations(bits: u32) -> BlockOps {
        BlockOps::from_bits_truncate(bits)
    }
}
