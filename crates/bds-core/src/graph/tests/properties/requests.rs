//! Requests under drained sections: the model says which request waits and which section has begun.
//!
//! Requests are held at the files until they get a permit. After every command every task runs that
//! can run; then the model says exactly which requests are inside, which wait at a gate, and which
//! sections have begun.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::Task;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

use super::commands::{Body, Child, Command, Fault, Tree};
use super::model::{ALL, Access, Drain, Key};
use super::run::{Comparison, Held, idle};
use crate::graph::{Drained, Edge};
use crate::test_kit::gate_port;

#[derive(Clone, Debug)]
pub(super) enum Move {
    Submit(usize),
    Complete,
    /// The request's future is dropped.
    Abandon(usize),
    Drain(usize),
    DrainAll,
    /// Ends a section, or drops its beginning.
    End(usize),
    Poison(usize),
    /// Opens a filter on a node.
    OpenFilter(usize),
    Release(usize),
    AttachRoot(usize),
}

pub(super) fn action() -> impl Strategy<Value = Move> {
    let n = || 0..64usize;
    prop_oneof![
        6 => n().prop_map(Move::Submit),
        5 => Just(Move::Complete),
        1 => n().prop_map(Move::Abandon),
        4 => n().prop_map(Move::Drain),
        1 => Just(Move::DrainAll),
        5 => n().prop_map(Move::End),
        1 => n().prop_map(Move::Poison),
        2 => n().prop_map(Move::OpenFilter),
        2 => n().prop_map(Move::Release),
        1 => n().prop_map(Move::AttachRoot),
    ]
}

/// The nodes opened first: files, filters and images on each other.
pub(super) fn initial_nodes() -> impl Strategy<Value = Vec<(u8, usize)>> {
    proptest::collection::vec((0..3u8, any::<u16>().prop_map(usize::from)), 1..6)
}

struct Request {
    edge: u32,
    is_inside: bool,
    is_done: Arc<AtomicBool>,
    _task: Task<()>,
}

/// A section that has begun, with the names of all nodes that must be empty by then.
type StartedSection = (Drained, Vec<String>);

struct Section {
    number: u32,
    nodes: Vec<Key>,
    begun: Arc<Mutex<Option<StartedSection>>>,
    task: Option<Task<()>>,
}

impl Section {
    fn has_begun(&self) -> bool {
        self.begun.lock().unwrap().is_some()
    }
}

pub(super) struct RequestTest {
    both: Comparison,
    requests: Vec<Request>,
    sections: Vec<Section>,
}

fn body(kind: u8, on: Option<usize>) -> Tree {
    let child = || Box::new(on.map_or_else(|| Child::Inline(body(0, None)), Child::Node));
    let body = match kind {
        0 => Body::File,
        1 => Body::Filter(child()),
        _ => Body::Image(child(), None),
    };
    // Read-only, so that no permissions conflict.
    let ro = Some(true);
    Tree { name: None, ro, discard: false, transfer: 0, fault: Fault::None, body }
}

impl RequestTest {
    pub(super) async fn new(mut both: Comparison, initial_nodes: &[(u8, usize)]) -> Self {
        for (kind, on) in initial_nodes {
            let on = (!both.model.live().is_empty()).then_some(*on);
            both.step(&Command::Open(body(*kind, on))).await;
            both.step(&root(*on.as_ref().unwrap_or(&0))).await;
        }
        both.drivers.holds_requests.store(true, Ordering::Relaxed);
        Self { both, requests: Vec::new(), sections: Vec::new() }
    }

    pub(super) async fn step(&mut self, action: &Move) {
        match *action {
            Move::Submit(n) => self.submit(n),
            Move::Complete => self.complete().await,
            Move::Abandon(n) => {
                if !self.requests.is_empty() {
                    self.both.tally.count("abandoned");
                    self.requests.swap_remove(n % self.requests.len());
                }
            }
            Move::Drain(n) => {
                if let Some(index) = self.both.pick_ref(n) {
                    self.drain(Some(index));
                }
            }
            Move::DrainAll => self.drain(None),
            Move::End(n) => {
                if !self.sections.is_empty() {
                    let section = self.sections.swap_remove(n % self.sections.len());
                    self.end_section(section);
                }
            }
            Move::Poison(n) => self.both.step(&Command::Poison(n)).await,
            Move::OpenFilter(n) => self.both.step(&Command::Open(body(1, Some(n)))).await,
            Move::Release(n) => self.both.step(&Command::Release(n)).await,
            Move::AttachRoot(n) => self.both.step(&root(n)).await,
        }
        idle().await;
        self.both.model.update();
        self.both.reap().await;
        self.admit();
    }

    fn submit(&mut self, n: usize) {
        if self.both.roots.is_empty() {
            return;
        }
        let (Held::Backend(real), edge) = &self.both.roots[n % self.both.roots.len()] else {
            return;
        };
        let (real, is_done): (Arc<Edge>, _) = (Arc::clone(real), Arc::new(AtomicBool::new(false)));
        let done_flag = Arc::clone(&is_done);
        let task = bds_io::spawn(async move {
            gate_port::read(&real).await.unwrap();
            assert!(!done_flag.swap(true, Ordering::Relaxed), "P37: once");
        });
        self.requests.push(Request { edge: *edge, is_inside: false, is_done, _task: task });
    }

    /// Completes one of the held requests.
    async fn complete(&mut self) {
        let held = self.requests.iter().filter(|request| request.is_inside).count();
        if held == 0 {
            return;
        }
        self.both.drivers.permits.add_permits(1);
        idle().await;
        let is_done = |request: &Request| request.is_done.load(Ordering::Relaxed);
        let done = self.requests.iter().filter(|request| is_done(request)).count();
        assert_eq!(done, 1, "P37: one permit, one completion");
        self.both.tally.count("completed");
        self.requests.retain(|request| !is_done(request));
    }

    fn drain(&mut self, index: Option<usize>) {
        let number = self.both.model.fresh();
        let key = index.map(|index| self.both.model.refs[index]);
        let nodes: Vec<Key> = key.into_iter().collect();
        let begun = Arc::new(Mutex::new(None));
        let names = self.above(&nodes, key.is_none());
        let (graph, drivers, slot) =
            (self.both.graph.clone(), Arc::clone(&self.both.drivers), Arc::clone(&begun));
        let node = index.map(|index| self.both.refs[index].clone());
        let task = bds_io::spawn(async move {
            let guard = match &node {
                Some(node) => graph.drain(node).await,
                None => graph.drain_all().await,
            };
            drop(node);
            names.iter().for_each(|name| drivers.seal(name));
            *slot.lock().unwrap() = Some((guard, names));
        });
        let is_all = key.is_none();
        let set = nodes.iter().copied().collect();
        self.both.model.drains.push(Drain { number, nodes: set, is_all });
        self.sections.push(Section { number, nodes, begun, task: Some(task) });
    }

    fn end_section(&mut self, mut section: Section) {
        drop(section.task.take());
        if let Some((guard, names)) = section.begun.lock().unwrap().take() {
            names.iter().for_each(|name| self.both.drivers.unseal(name));
            drop(guard);
        }
        self.both.model.drains.retain(|drain| drain.number != section.number);
    }

    /// Names of the nodes and of all above them, which no request may enter while the nodes are
    /// drained.
    fn above(&self, nodes: &[Key], is_all: bool) -> Vec<String> {
        let model = &self.both.model;
        let is_above =
            |key: &Key| is_all || nodes.iter().any(|node| model.below(*key).contains(node));
        model
            .live()
            .into_iter()
            .filter(is_above)
            .map(|key| model.nodes[&key].name.clone())
            .collect()
    }

    /// Requests at an open gate enter.
    fn admit(&mut self) {
        let model = &self.both.model;
        for request in &mut self.requests {
            let target = model.edges[&request.edge].child.unwrap();
            let is_free = model.quiesce(target) == 0;
            self.both.tally.count_if(!request.is_inside && !is_free, "waits at a gate");
            request.is_inside |= is_free;
        }
    }

    /// The number of requests inside each node.
    fn inside(&self) -> BTreeMap<Key, usize> {
        let model = &self.both.model;
        let mut inside = BTreeMap::new();
        for request in self.requests.iter().filter(|request| request.is_inside) {
            let mut at = model.edges[&request.edge].child;
            while let Some(key) = at {
                *inside.entry(key).or_default() += 1;
                at = model.child(key, "file").and_then(|edge| model.edges[&edge].child);
            }
        }
        inside
    }

    pub(super) fn check(&self, what: &str) {
        let (model, inside) = (&self.both.model, self.inside());
        for key in model.live() {
            let node = self.both.graph.find(&model.nodes[&key].name).unwrap();
            // P37: a request that waits at a gate does not count.
            let wanted = inside.get(&key).copied().unwrap_or(0);
            assert_eq!(node.in_flight(), wanted, "P37: {} after {what}", node.name());
            assert_eq!(node.quiesce_count() as usize, model.quiesce(key), "P35: after {what}");
        }
        for section in &self.sections {
            // P34: it has begun exactly if no request is inside, there or above; poisoned nodes are
            // not waited for.
            let is_all = section.nodes.is_empty();
            let is_busy = |key: &Key| {
                let is_above =
                    is_all || section.nodes.iter().any(|n| model.below(*key).contains(n));
                is_above && !model.nodes[key].is_poisoned && inside.contains_key(key)
            };
            let is_free = !model.live().iter().any(is_busy);
            assert_eq!(section.has_begun(), is_free, "P34: after {what}");
            self.both.tally.count(if is_free { "drained" } else { "waits for requests" });
            // P38: a drained node lives.
            assert!(section.nodes.iter().all(|key| model.is_live(*key)), "P38: after {what}");
        }
    }

    /// Releases all requests, and asserts that they complete.
    pub(super) async fn end(mut self) {
        for section in std::mem::take(&mut self.sections) {
            self.end_section(section);
        }
        self.both.drivers.holds_requests.store(false, Ordering::Relaxed);
        self.both.drivers.permits.add_permits(self.requests.len());
        idle().await;
        let is_done = |request: &Request| request.is_done.load(Ordering::Relaxed);
        assert!(self.requests.iter().all(is_done), "P37: none is forgotten");
        self.requests.clear();
        self.both.model.update();
        self.both.reap().await;
        self.both.check("the end");
        self.both.end().await;
    }
}

fn root(n: usize) -> Command {
    Command::Attach(Some(n), Access { perm: 1, shared: ALL }, false)
}
