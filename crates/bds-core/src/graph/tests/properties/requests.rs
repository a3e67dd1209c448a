//! Requests under drained sections: who waits for whom, and who does not.
//!
//! Requests are held at the files until they are told to go on. After every command everything runs that can run, and then the
//! model says exactly which requests are inside, which wait at a gate, and which sections have begun.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bds_io::Task;
use proptest::prelude::{Just, Strategy, any, prop_oneof};

use super::commands::{Body, Child, Command, Tree, Trouble};
use super::model::{ALL, Access, Drain, Key};
use super::run::{Held, World, idle};
use crate::graph::tests::fakes;
use crate::graph::{Drained, Edge};

#[derive(Clone, Debug)]
pub(super) enum Move {
    Submit(usize),
    Complete,
    /// The request's future is dropped.
    Abandon(usize),
    Drain(usize),
    DrainAll,
    /// Ends a section, or gives up its beginning.
    End(usize),
    Poison(usize),
    /// A filter comes on a node.
    Birth(usize),
    Death(usize),
    Root(usize),
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
        2 => n().prop_map(Move::Birth),
        2 => n().prop_map(Move::Death),
        1 => n().prop_map(Move::Root),
    ]
}

/// What is opened first: files, and things on top of each other.
pub(super) fn ground() -> impl Strategy<Value = Vec<(u8, usize)>> {
    proptest::collection::vec((0..3u8, any::<u16>().prop_map(usize::from)), 1..6)
}

struct Request {
    edge: u32,
    is_inside: bool,
    is_done: Arc<AtomicBool>,
    _task: Task<()>,
}

/// A section that has begun, with the names of all that must be empty by then.
type Begun = (Drained, Vec<String>);

struct Section {
    number: u32,
    nodes: Vec<Key>,
    begun: Arc<Mutex<Option<Begun>>>,
    task: Option<Task<()>>,
}

impl Section {
    fn has_begun(&self) -> bool {
        self.begun.lock().unwrap().is_some()
    }
}

pub(super) struct Traffic {
    world: World,
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
    // Read-only, so that nobody is in anybody's way.
    let ro = Some(true);
    Tree { name: None, ro, discard: false, transfer: 0, trouble: Trouble::None, body }
}

impl Traffic {
    pub(super) async fn new(mut world: World, ground: &[(u8, usize)]) -> Self {
        for (kind, on) in ground {
            let on = (!world.model.live().is_empty()).then_some(*on);
            world.step(&Command::Open(body(*kind, on))).await;
            world.step(&root(*on.as_ref().unwrap_or(&0))).await;
        }
        world.floor.is_holding.store(true, Ordering::Relaxed);
        Self { world, requests: Vec::new(), sections: Vec::new() }
    }

    pub(super) async fn step(&mut self, action: &Move) {
        match *action {
            Move::Submit(n) => self.submit(n),
            Move::Complete => self.complete().await,
            Move::Abandon(n) => {
                if !self.requests.is_empty() {
                    self.world.tally.count("abandoned");
                    self.requests.swap_remove(n % self.requests.len());
                }
            }
            Move::Drain(n) => {
                if let Some(index) = self.world.pick_ref(n) {
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
            Move::Poison(n) => self.world.step(&Command::Poison(n)).await,
            Move::Birth(n) => self.world.step(&Command::Open(body(1, Some(n)))).await,
            Move::Death(n) => self.world.step(&Command::Release(n)).await,
            Move::Root(n) => self.world.step(&root(n)).await,
        }
        idle().await;
        self.world.model.settle();
        self.world.reap().await;
        self.admit();
    }

    fn submit(&mut self, n: usize) {
        if self.world.roots.is_empty() {
            return;
        }
        let (Held::Backend(real), edge) = &self.world.roots[n % self.world.roots.len()] else {
            return;
        };
        let (real, is_done): (Arc<Edge>, _) = (Arc::clone(real), Arc::new(AtomicBool::new(false)));
        let told = Arc::clone(&is_done);
        let task = bds_io::spawn(async move {
            fakes::read(&real).await.unwrap();
            assert!(!told.swap(true, Ordering::Relaxed), "P37: once");
        });
        self.requests.push(Request { edge: *edge, is_inside: false, is_done, _task: task });
    }

    /// One request of those that are held goes on.
    async fn complete(&mut self) {
        let held = self.requests.iter().filter(|request| request.is_inside).count();
        if held == 0 {
            return;
        }
        self.world.floor.permits.add_permits(1);
        idle().await;
        let is_done = |request: &Request| request.is_done.load(Ordering::Relaxed);
        let done = self.requests.iter().filter(|request| is_done(request)).count();
        assert_eq!(done, 1, "P37: one permit, one completion");
        self.world.tally.count("completed");
        self.requests.retain(|request| !is_done(request));
    }

    fn drain(&mut self, index: Option<usize>) {
        let number = self.world.model.fresh();
        let key = index.map(|index| self.world.model.refs[index]);
        let nodes: Vec<Key> = key.into_iter().collect();
        let begun = Arc::new(Mutex::new(None));
        let names = self.above(&nodes, key.is_none());
        let (graph, floor, slot) =
            (self.world.graph.clone(), Arc::clone(&self.world.floor), Arc::clone(&begun));
        let node = index.map(|index| self.world.refs[index].clone());
        let task = bds_io::spawn(async move {
            let guard = match &node {
                Some(node) => graph.drain(node).await,
                None => graph.drain_all().await,
            };
            drop(node);
            names.iter().for_each(|name| floor.seal(name));
            *slot.lock().unwrap() = Some((guard, names));
        });
        let is_all = key.is_none();
        let set = nodes.iter().copied().collect();
        self.world.model.drains.push(Drain { number, nodes: set, is_all });
        self.sections.push(Section { number, nodes, begun, task: Some(task) });
    }

    fn end_section(&mut self, mut section: Section) {
        drop(section.task.take());
        if let Some((guard, names)) = section.begun.lock().unwrap().take() {
            names.iter().for_each(|name| self.world.floor.unseal(name));
            drop(guard);
        }
        self.world.model.drains.retain(|drain| drain.number != section.number);
    }

    /// Names of the nodes and of all above them, that cannot let anybody in while the nodes are drained.
    fn above(&self, nodes: &[Key], is_all: bool) -> Vec<String> {
        let model = &self.world.model;
        let is_above =
            |key: &Key| is_all || nodes.iter().any(|node| model.below(*key).contains(node));
        model
            .live()
            .into_iter()
            .filter(is_above)
            .map(|key| model.nodes[&key].name.clone())
            .collect()
    }

    /// Who waits at an open gate does not wait.
    fn admit(&mut self) {
        let model = &self.world.model;
        for request in &mut self.requests {
            let target = model.edges[&request.edge].child.unwrap();
            let is_free = model.quiesce(target) == 0;
            self.world.tally.count_if(!request.is_inside && !is_free, "waits at a gate");
            request.is_inside |= is_free;
        }
    }

    /// How many requests are inside each node.
    fn inside(&self) -> BTreeMap<Key, usize> {
        let model = &self.world.model;
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
        let (model, inside) = (&self.world.model, self.inside());
        for key in model.live() {
            let node = self.world.graph.find(&model.nodes[&key].name).unwrap();
            // P37: who waits at a gate does not count.
            let wanted = inside.get(&key).copied().unwrap_or(0);
            assert_eq!(node.in_flight(), wanted, "P37: {} after {what}", node.name());
            assert_eq!(node.quiesce_count() as usize, model.quiesce(key), "P35: after {what}");
        }
        for section in &self.sections {
            // P34: it has begun exactly if nobody is inside, there or above; the poisoned are not waited for.
            let is_all = section.nodes.is_empty();
            let is_busy = |key: &Key| {
                let is_above =
                    is_all || section.nodes.iter().any(|n| model.below(*key).contains(n));
                is_above && !model.nodes[key].is_poisoned && inside.contains_key(key)
            };
            let is_free = !model.live().iter().any(is_busy);
            assert_eq!(section.has_begun(), is_free, "P34: after {what}");
            self.world.tally.count(if is_free { "drained" } else { "waits for requests" });
            // P38: what is drained lives.
            assert!(section.nodes.iter().all(|key| model.is_live(*key)), "P38: after {what}");
        }
    }

    /// Everything goes on, and comes to its end.
    pub(super) async fn end(mut self) {
        for section in std::mem::take(&mut self.sections) {
            self.end_section(section);
        }
        self.world.floor.is_holding.store(false, Ordering::Relaxed);
        self.world.floor.permits.add_permits(self.requests.len());
        idle().await;
        let is_done = |request: &Request| request.is_done.load(Ordering::Relaxed);
        assert!(self.requests.iter().all(is_done), "P37: none is forgotten");
        self.requests.clear();
        self.world.model.settle();
        self.world.reap().await;
        self.world.check("the end");
        self.world.end().await;
    }
}

fn root(n: usize) -> Command {
    Command::Attach(Some(n), Access { perm: 1, shared: ALL }, false)
}
