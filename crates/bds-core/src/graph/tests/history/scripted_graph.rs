//! The fixture of the history tests: a graph of logging and scripted drivers, snapshots of it, and
//! faults at every step.

use std::future::Future;
use std::sync::Arc;

use crate::error::{ErrorKind, Result};
use crate::graph::{ChangeReport, Graph, GraphConfig, NodeRef, walk};
use crate::options::Options;
use crate::test_kit::logging::{self, Fixture};
use crate::test_kit::scripted::Script;
use crate::test_kit::yield_times;

/// A graph, and the script that its drivers follow.
pub(super) struct ScriptedGraph {
    pub(super) fixture: Fixture,
    pub(super) graph: Graph,
    pub(super) script: Arc<Script>,
}

/// Runs a test under one schedule.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce(ScriptedGraph) -> F) {
    run_seeded(7, test);
}

/// Runs a test under many schedules. Prints the seed of one that fails.
pub(super) fn run_schedules<F: Future<Output = ()>>(count: u64, test: impl Fn(ScriptedGraph) -> F) {
    struct PrintOnPanic(u64);
    impl Drop for PrintOnPanic {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the seed of the schedule was {}", self.0);
            }
        }
    }
    for seed in 0..count {
        let _print = PrintOnPanic(seed);
        run_seeded(seed, &test);
    }
}

fn run_seeded<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(ScriptedGraph) -> F) {
    let script = Arc::new(Script::default());
    let register = |config: &mut GraphConfig| {
        script.register(Arc::get_mut(&mut config.registry).unwrap());
    };
    logging::run_seeded(seed, register, |fixture| {
        let graph = fixture.graph.clone();
        test(ScriptedGraph { graph, fixture, script: Arc::clone(&script) })
    });
}

impl ScriptedGraph {
    /// Opens the node that the options describe.
    pub(super) async fn open(&self, text: &str) -> NodeRef {
        self.fixture.open(text).await
    }

    /// An image without children.
    pub(super) async fn part(&self, name: &str) -> NodeRef {
        self.open(&format!("driver=part,node-name={name}")).await
    }

    /// An image on these nodes: "file=a,backing=b".
    pub(super) async fn part_on(&self, name: &str, children: &str) -> NodeRef {
        self.open(&format!("driver=part,node-name={name},{children}")).await
    }

    /// A filter on the node.
    pub(super) async fn sieve(&self, name: &str, file: &str) -> NodeRef {
        self.open(&format!("driver=sieve,node-name={name},file={file}")).await
    }

    /// A backing chain, `names[0]` at the top; the caller holds each node.
    pub(super) async fn chain<const N: usize>(&self, names: [&str; N]) -> [NodeRef; N] {
        let mut nodes: Vec<NodeRef> = Vec::new();
        for name in names.iter().rev() {
            let node = match nodes.last() {
                Some(below) => self.part_on(name, &format!("backing={}", below.name())).await,
                None => self.part(name).await,
            };
            nodes.push(node);
        }
        nodes.reverse();
        nodes.try_into().unwrap()
    }

    /// Everything visible of the graph, as text, without the references that the snapshot itself
    /// takes.
    pub(super) fn snapshot(&self) -> String {
        // Taking the lock recomputes stale permissions.
        drop(self.graph.0.core.lock());
        let mut snapshot = self.graph.dump();
        for node in self.graph.nodes() {
            let node = node.node();
            let inherits = node.inherits_from().map(|id| self.graph.acquire(id).is_ok());
            snapshot += &format!(
                "{}: quiesce {} inside {} flags {:?} limits {:?} active {} inherits {inherits:?}\n",
                node.name(),
                node.quiesce_count(),
                node.tracker().in_flight(),
                node.flags(),
                node.limits(),
                node.is_active(),
            );
            let mut edges: Vec<String> = node
                .parents()
                .iter()
                .map(|e| {
                    format!("  {}: {:?} closed {}\n", e.holder(), e.access(), e.gate_blocked())
                })
                .collect();
            edges.sort();
            snapshot.extend(edges);
        }
        snapshot
    }

    /// Runs `act` once for every step that can fail, with that step failing: it must fail and
    /// change nothing. The last run has no fault and must succeed.
    pub(super) async fn fail_every_step<T, F: Future<Output = Result<T>>>(
        &self,
        act: impl Fn() -> F,
    ) -> T {
        let before = self.snapshot();
        for step in 0.. {
            self.graph.0.faults.set(Some(step));
            let result = act().await;
            if !self.graph.0.faults.has_struck() {
                self.graph.0.faults.set(None);
                return result.unwrap_or_else(|error| panic!("failed without a fault: {error}"));
            }
            let error = result.err().unwrap_or_else(|| panic!("step {step} failed in silence"));
            assert_eq!(error.kind(), ErrorKind::Io, "step {step}: {error}");
            self.graph.reap().await;
            assert_eq!(self.snapshot(), before, "step {step} left a trace");
        }
        unreachable!("there are finitely many steps")
    }

    /// Lets other tasks run for a while.
    pub(super) async fn idle(&self) {
        yield_times(50).await;
    }

    /// Asserts that every node is closed and every slot free.
    pub(super) async fn assert_empty(&self) {
        self.graph.reap().await;
        assert_eq!(self.graph.dump(), "");
        let arena = &self.graph.0.core.arena;
        assert_eq!((arena.live(), arena.dead()), (0, 0));
    }

    /// Asserts that nothing is drained and that every `drain_begin` of a driver had its
    /// `drain_end`.
    pub(super) fn assert_undrained(&self) {
        for node in self.graph.nodes() {
            assert_eq!(node.quiesce_count(), 0, "{} is still drained", node.name());
            for edge in node.node().parents() {
                assert!(!edge.gate_blocked(), "{}: the gate is still closed", edge.holder());
            }
            let [begun, ended] = ["begin", "end"]
                .map(|word| self.script.times(&format!("drain {word} {}", node.name())));
            assert_eq!(begun, ended, "{}", node.name());
        }
    }
}

/// The names of the nodes of a backing chain, from this one down.
pub(super) fn names_below(node: &NodeRef) -> Vec<String> {
    walk::backing_chain(node).iter().map(|node| node.name().to_owned()).collect()
}

/// Commits a change.
pub(super) async fn commit(change: crate::graph::Change) -> Result<ChangeReport> {
    change.commit().await
}

/// Parses options.
pub(super) fn options(text: &str) -> Options {
    Options::parse(text).unwrap()
}
