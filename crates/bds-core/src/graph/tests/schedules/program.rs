//! Small random programs: a chain of images, two backends, and tasks that read, write, drain,
//! change, open, close and drop futures half-way. A task's operations follow from its random
//! numbers; the order of tasks follows from the simulation's.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use bds_io::{Fs, Sim, SimConfig};

use super::audit::{DumpOnPanic, audit, check_at_rest};
use crate::driver::{BoxFuture, Registry, WriteFlags};
use crate::error::{Error, ErrorKind};
use crate::graph::tests::tally::Tally;
use crate::graph::{CloseError, Graph, GraphConfig, NodeId, NodeRef, walk};
use crate::options::Options;
use crate::request::{Backend, BackendOptions};
use crate::test_kit::forwarding::{Forwarder, Forwarding, block};
use crate::test_kit::yield_times;

/// Names in use; few, so that they collide.
const NAMES: [&str; 5] = ["base", "mid", "top", "one", "two"];

/// Random numbers from a seed (splitmix64).
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// 0 to `n - 1`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The graph of one run, and what its tasks share.
pub(super) struct Scenario {
    pub(super) graph: Graph,
    pub(super) drivers: Arc<Forwarding>,
    pub(super) backends: Mutex<Vec<Arc<Backend>>>,
    /// References that no task uses now.
    pub(super) pool: Mutex<Vec<NodeRef>>,
    ids: Vec<NodeId>,
    tally: Arc<Tally>,
    filters: AtomicUsize,
    /// Tasks run on real threads: some facts are not exact then.
    pub(super) is_threaded: bool,
}

/// An empty graph of forwarding drivers.
pub(super) fn graph(fs: Fs) -> (Graph, Arc<Forwarding>) {
    let mut registry = Registry::new();
    let drivers = Forwarding::register(&mut registry);
    let mut config = GraphConfig::new(Arc::new(registry));
    config.fs = fs;
    (Graph::new(config), drivers)
}

/// An image on a leaf of its own.
pub(super) fn image(name: &str, backing: Option<&str>) -> Options {
    let mut options = Options::new().with("driver", "image").with("node-name", name);
    options.set("file.driver", "leaf");
    if let Some(backing) = backing {
        options.set("backing", backing);
    }
    options
}

pub(super) fn backend(node: &NodeRef, name: &str, writable: bool) -> Arc<Backend> {
    Arc::new(
        Backend::new(
            node,
            BackendOptions { name: name.into(), writable, ..BackendOptions::default() },
        )
        .unwrap(),
    )
}

/// Drops `future` after this many turns unless it has completed. It runs inside a task that is
/// woken in between, so polls of `future` itself do not count.
pub(super) async fn drop_after<T>(future: impl Future<Output = T>, turns: usize) -> Option<T> {
    let mut future = pin!(future);
    let mut left = turns;
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => {
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    })
    .await
}

impl Scenario {
    async fn build(fs: Fs, tally: Arc<Tally>, is_threaded: bool) -> Self {
        let (graph, drivers) = graph(fs);
        let mut pool = Vec::new();
        for (name, backing) in [("base", None), ("mid", Some("base")), ("top", Some("mid"))] {
            pool.push(graph.open(image(name, backing)).await.unwrap());
        }
        let mut ids: Vec<NodeId> = pool.iter().map(|node| node.id()).collect();
        for name in ["one", "two"] {
            ids.push(graph.add(image(name, None)).await.unwrap());
        }
        let backends = vec![backend(&pool[2], "guest", true), backend(&pool[1], "reader", false)];
        Self {
            graph,
            drivers,
            backends: Mutex::new(backends),
            pool: Mutex::new(pool),
            ids,
            tally,
            filters: AtomicUsize::new(0),
            is_threaded,
        }
    }

    fn name(rng: &mut Rng) -> &'static str {
        NAMES[rng.below(NAMES.len())]
    }

    fn pick(&self, rng: &mut Rng) -> Option<NodeRef> {
        self.graph.find(Self::name(rng)).ok()
    }

    fn backend(&self, index: usize) -> Arc<Backend> {
        Arc::clone(&self.backends.lock().unwrap()[index])
    }

    /// Drops the future half-way, once in five times.
    async fn maybe_drop<T>(&self, rng: &mut Rng, future: impl Future<Output = T>) -> Option<T> {
        if !rng.one_in(5) {
            return Some(future.await);
        }
        let done = drop_after(future, 1 + rng.below(8)).await;
        if done.is_none() {
            self.tally.count("dropped");
        }
        done
    }

    /// Asserts that the error is a refusal that other tasks can cause.
    fn check_refusal(&self, error: &Error) {
        use ErrorKind::{AlreadyExists, InUse, InvalidInput, NotFound, NotSupported, Stale};
        let may_be = [AlreadyExists, InUse, InvalidInput, NotFound, NotSupported, Stale];
        assert!(may_be.contains(&error.kind()), "{error}");
        self.tally.count("refusals");
    }

    // ---- operations of tasks

    async fn request(&self, rng: &mut Rng, index: usize) {
        let backend = self.backend(index);
        let done = match rng.below(if index == 0 { 6 } else { 4 }) {
            0..=3 => self.maybe_drop(rng, backend.read(0, block())).await,
            4 => self.maybe_drop(rng, backend.write(0, block(), WriteFlags::empty())).await,
            _ => self.maybe_drop(rng, backend.flush()).await,
        };
        if let Some(result) = done {
            result.unwrap();
            self.tally.count("requests");
        }
    }

    async fn change(&self, rng: &mut Rng, may_wait_for_drains: bool) {
        let mut change = self.graph.change();
        for _ in 0..1 + rng.below(3) {
            let (Some(a), Some(b)) = (self.pick(rng), self.pick(rng)) else { return };
            change = match rng.below(if may_wait_for_drains { 9 } else { 7 }) {
                0 => change.append(&a, &b),
                1 => change.replace(&a, &b),
                2 | 3 => change.set_backing(&a, Some(&b)),
                4 => change.set_backing(&a, None),
                5 => change.own(&a),
                6 => change.disown(&a),
                7 => change.remove(a),
                _ => change.reopen(&a, Options::parse("discard=unmap").unwrap()),
            };
        }
        match self.maybe_drop(rng, change.commit()).await {
            Some(Ok(report)) => {
                assert!(report.closed.iter().all(|report| report.is_clean()));
                self.tally.count("changes");
            }
            Some(Err(error)) => self.check_refusal(&error),
            None => {}
        }
    }

    /// A filter is inserted, stays for a while and is dropped.
    async fn filter(&self, rng: &mut Rng) {
        let Some(node) = self.pick(rng) else { return };
        let name = format!("filter{}", self.filters.fetch_add(1, Ordering::Relaxed));
        let options = Options::new().with("driver", "filter").with("node-name", name);
        let opened = self.graph.open(options.with("file", node.name())).await;
        let Ok(filter) = opened.map_err(|error| self.check_refusal(&error)) else { return };
        match self.maybe_drop(rng, self.graph.insert_filter(&node, &filter)).await {
            Some(Ok(())) => self.tally.count("changes"),
            Some(Err(error)) => self.check_refusal(&error),
            None => {}
        }
        drop(node);
        yield_times(rng.below(4)).await;
        let change = self.graph.change().drop_filter(&filter).remove(filter);
        match self.maybe_drop(rng, change.commit()).await {
            Some(Ok(report)) => assert!(report.closed.iter().all(|report| report.is_clean())),
            Some(Err(error)) => self.check_refusal(&error),
            None => {}
        }
    }

    /// Drains some nodes for a while; inside, drains others or changes the graph.
    fn drain<'a>(&'a self, rng: &'a mut Rng, depth: usize) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let Some(node) = self.pick(rng) else { return };
            let mut quiet = vec![node.clone()];
            let drained = match rng.below(4) {
                0 | 1 => self.maybe_drop(rng, self.graph.drain(&node)).await,
                2 => {
                    let mut below = Vec::new();
                    walk::each_below_strong(node.strong(), &mut |node| below.push(node.clone()));
                    let below = below.into_iter().map(|s| NodeRef::iterator(&self.graph, s));
                    quiet = below.collect();
                    self.maybe_drop(rng, self.graph.drain_subtree(&node)).await
                }
                _ => {
                    let all = self.maybe_drop(rng, self.graph.drain_all()).await;
                    quiet = self.graph.nodes();
                    all
                }
            };
            let Some(drained) = drained else { return };
            self.tally.count("drains");
            // No request can have entered above since the last of the nodes was seen to be empty.
            // (With threads a request may be counted for a moment until it finds the gate closed.)
            let is_idle = |node: NodeRef| self.is_threaded || node.in_flight() == 0;
            assert!(quiet.iter().flat_map(above).all(is_idle), "inside a drained node");
            quiet.iter().for_each(|node| Forwarder::of_node(node).forbid());
            audit(&self.graph, self.is_threaded);
            yield_times(rng.below(4)).await;
            match rng.below(4) {
                0 if depth < 2 => self.drain(rng, depth + 1).await,
                1 => self.change(rng, false).await,
                2 => assert!(self.graph.reap().await.iter().all(|report| report.is_clean())),
                _ => {}
            }
            yield_times(rng.below(3)).await;
            quiet.iter().for_each(|node| Forwarder::of_node(node).allow());
            drop(quiet);
            drop(drained);
        })
    }

    async fn hold(&self, rng: &mut Rng) {
        match rng.below(5) {
            0 => {
                let Some(node) = self.pick(rng) else { return };
                let other = node.clone();
                yield_times(rng.below(3)).await;
                drop(node);
                other.release();
            }
            1 => {
                let id = self.ids[rng.below(self.ids.len())];
                let Ok(node) = self.graph.acquire(id) else { return };
                yield_times(rng.below(3)).await;
                self.pool.lock().unwrap().push(node);
            }
            2 => drop(self.take(rng)),
            _ => {
                let Some(node) = self.take(rng) else { return };
                match self.maybe_drop(rng, node.close()).await {
                    Some(Ok(report)) => {
                        assert!(report.is_clean());
                        self.tally.count("closes");
                    }
                    Some(Err(CloseError::InUse { node, .. })) => {
                        self.pool.lock().unwrap().push(node);
                    }
                    None => {}
                }
            }
        }
    }

    fn take(&self, rng: &mut Rng) -> Option<NodeRef> {
        let mut pool = self.pool.lock().unwrap();
        let index = rng.below(pool.len().max(1));
        (index < pool.len()).then(|| pool.swap_remove(index))
    }

    async fn open(&self, rng: &mut Rng) {
        let name = Self::name(rng);
        let backing = rng.one_in(2).then(|| Self::name(rng));
        let options = image(name, backing);
        match rng.below(3) {
            0 => {
                if let Some(Err(error)) = self.maybe_drop(rng, self.graph.add(options)).await {
                    self.check_refusal(&error);
                }
            }
            1 => match self.maybe_drop(rng, self.graph.open(options)).await {
                Some(Ok(node)) => self.pool.lock().unwrap().push(node),
                Some(Err(error)) => self.check_refusal(&error),
                None => {}
            },
            _ => match self.maybe_drop(rng, self.graph.del(name)).await {
                Some(Ok(report)) => {
                    assert!(report.is_clean());
                    self.tally.count("closes");
                }
                Some(Err(error)) => self.check_refusal(&error),
                None => {}
            },
        }
    }

    async fn task(self: Arc<Self>, kind: usize, mut rng: Rng) {
        for _ in 0..2 + rng.below(4) {
            match kind {
                0 => self.request(&mut rng, 0).await,
                1 => self.request(&mut rng, 1).await,
                2 | 3 => self.change(&mut rng, true).await,
                4 | 5 => self.drain(&mut rng, 0).await,
                6 => self.filter(&mut rng).await,
                7 => self.hold(&mut rng).await,
                8 => self.open(&mut rng).await,
                _ => assert!(self.graph.reap().await.iter().all(|report| report.is_clean())),
            }
            audit(&self.graph, self.is_threaded);
        }
    }
}

/// The node and everything above it.
fn above(node: &NodeRef) -> Vec<NodeRef> {
    let graph = node.graph();
    let lock = graph.0.core.lock();
    let mut found = vec![node.strong().clone()];
    let mut next = 0;
    while next < found.len() {
        let parents = found[next].parents();
        found.extend(parents.iter().filter_map(|edge| lock.parent_node(edge)));
        next += 1;
    }
    found.into_iter().map(|strong| NodeRef::iterator(graph, strong)).collect()
}

/// Runs the program on real threads, one per task, several times.
pub(super) fn run_on_threads(seed: u64, tally: &Arc<Tally>) {
    let scenario = Scenario::build(Fs::Host, Arc::clone(tally), true);
    let scenario = Arc::new(bds_io::block_on(scenario));
    let mut rng = Rng::new(seed);
    std::thread::scope(|scope| {
        let mut kinds = vec![0, 1, 4];
        kinds.extend((0..2).map(|_| rng.below(10)));
        for kind in kinds {
            let mut rng = Rng::new(rng.next());
            let scenario = Arc::clone(&scenario);
            scope.spawn(move || {
                for _ in 0..8 {
                    let task = Arc::clone(&scenario).task(kind, Rng::new(rng.next()));
                    bds_io::block_on(task);
                }
            });
        }
    });
    bds_io::block_on(check_at_rest(&scenario));
}

/// Runs one seed. Panics if anything goes wrong. Returns a hash that is equal for equal runs.
pub(super) fn run(seed: u64, lock_first: bool, tally: &Arc<Tally>) -> u64 {
    let sim = Sim::new(seed, SimConfig { max_turns: 200_000, ..SimConfig::calm() });
    let mut rng = Rng::new(seed);
    let scenario = Arc::new(sim.block_on(Scenario::build(sim.fs(), Arc::clone(tally), false)));
    scenario.graph.0.core.topology.lock_first.store(lock_first, Ordering::Relaxed);
    let _dump = DumpOnPanic(&scenario);
    sim.block_on(async {
        let mut kinds = vec![0, 1, 4];
        kinds.extend((0..rng.below(4)).map(|_| rng.below(10)));
        let tasks: Vec<_> = kinds
            .into_iter()
            .map(|kind| {
                let rng = Rng::new(rng.next());
                bds_io::spawn(Arc::clone(&scenario).task(kind, rng))
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
    sim.run_until_idle(); // background tasks
    sim.block_on(check_at_rest(&scenario));
    scenario.drivers.fingerprint()
}
