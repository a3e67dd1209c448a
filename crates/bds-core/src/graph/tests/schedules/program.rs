//! Small random programs: a chain of images, two backends, and tasks that read, write, drain, change, open, close and give up
//! half-way. What a task does follows from its dice; who runs next follows from the world's.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;

use bds_io::{Fs, Sim, SimConfig};

use super::audit::{Blame, audit, check_at_rest};
use super::probe::{Census, Probe, ProbeType, block};
use crate::driver::{BoxFuture, Category, Registry, WriteFlags};
use crate::error::{Error, ErrorKind};
use crate::graph::{CloseError, Graph, GraphConfig, NodeId, NodeRef, walk};
use crate::options::Options;
use crate::request::{Backend, BackendOptions};

/// Names in play; few, so that they are fought over.
const NAMES: [&str; 5] = ["base", "mid", "top", "one", "two"];

/// A stream of numbers that follows from a seed (splitmix64).
pub(super) struct Dice(u64);

impl Dice {
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

/// What came to pass, over many worlds: a search in which nothing happens finds nothing.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) changes: AtomicUsize,
    pub(super) refusals: AtomicUsize,
    pub(super) drains: AtomicUsize,
    pub(super) given_up: AtomicUsize,
    pub(super) requests: AtomicUsize,
    pub(super) closings: AtomicUsize,
}

fn count(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A world's graph and what its tasks share.
pub(super) struct Stage {
    pub(super) graph: Graph,
    pub(super) census: Arc<Census>,
    pub(super) backends: Mutex<Vec<Arc<Backend>>>,
    /// References that no task has in hand now.
    pub(super) pool: Mutex<Vec<NodeRef>>,
    ids: Vec<NodeId>,
    tally: Arc<Tally>,
    filters: AtomicUsize,
    /// Other threads go on between any two instructions: then some facts cannot be asked for exactly.
    pub(super) is_threaded: bool,
}

/// An empty graph of probes.
pub(super) fn graph(fs: Fs) -> (Graph, Arc<Census>) {
    let census = Arc::new(Census::default());
    let mut registry = Registry::new();
    for (name, category) in
        [("leaf", Category::Protocol), ("image", Category::Format), ("filter", Category::Filter)]
    {
        let census = Arc::clone(&census);
        registry.register(Arc::new(ProbeType { name, category, census })).unwrap();
    }
    let mut config = GraphConfig::new(Arc::new(registry));
    config.fs = fs;
    (Graph::new(config), census)
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

/// Drops `future` after so many turns, unless it has ended. It is work in a task that goes on in between, so it is not the polls of
/// `future` itself that count.
pub(super) async fn give_up_after<T>(future: impl Future<Output = T>, turns: usize) -> Option<T> {
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

impl Stage {
    async fn build(fs: Fs, tally: Arc<Tally>, is_threaded: bool) -> Self {
        let (graph, census) = graph(fs);
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
            census,
            backends: Mutex::new(backends),
            pool: Mutex::new(pool),
            ids,
            tally,
            filters: AtomicUsize::new(0),
            is_threaded,
        }
    }

    fn name(dice: &mut Dice) -> &'static str {
        NAMES[dice.below(NAMES.len())]
    }

    fn pick(&self, dice: &mut Dice) -> Option<NodeRef> {
        self.graph.find(Self::name(dice)).ok()
    }

    fn backend(&self, index: usize) -> Arc<Backend> {
        Arc::clone(&self.backends.lock().unwrap()[index])
    }

    /// Now and then the future is dropped half-way.
    async fn perhaps<T>(&self, dice: &mut Dice, future: impl Future<Output = T>) -> Option<T> {
        if !dice.one_in(5) {
            return Some(future.await);
        }
        let done = give_up_after(future, 1 + dice.below(8)).await;
        if done.is_none() {
            count(&self.tally.given_up);
        }
        done
    }

    /// Refusals that can come of others' doings; anything else is a failure.
    fn refused(&self, error: &Error) {
        use ErrorKind::{AlreadyExists, InUse, InvalidInput, NotFound, NotSupported, Stale};
        let may_be = [AlreadyExists, InUse, InvalidInput, NotFound, NotSupported, Stale];
        assert!(may_be.contains(&error.kind()), "{error}");
        count(&self.tally.refusals);
    }

    // ---- what tasks do

    async fn request(&self, dice: &mut Dice, index: usize) {
        let backend = self.backend(index);
        let done = match dice.below(if index == 0 { 6 } else { 4 }) {
            0..=3 => self.perhaps(dice, backend.read(0, block())).await,
            4 => self.perhaps(dice, backend.write(0, block(), WriteFlags::empty())).await,
            _ => self.perhaps(dice, backend.flush()).await,
        };
        if let Some(result) = done {
            result.unwrap();
            count(&self.tally.requests);
        }
    }

    async fn change(&self, dice: &mut Dice, may_wait_for_drains: bool) {
        let mut change = self.graph.change();
        for _ in 0..1 + dice.below(3) {
            let (Some(a), Some(b)) = (self.pick(dice), self.pick(dice)) else { return };
            change = match dice.below(if may_wait_for_drains { 9 } else { 7 }) {
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
        match self.perhaps(dice, change.commit()).await {
            Some(Ok(report)) => {
                assert!(report.closed.iter().all(|report| report.is_clean()));
                count(&self.tally.changes);
            }
            Some(Err(error)) => self.refused(&error),
            None => {}
        }
    }

    /// A filter comes, stays a while and goes.
    async fn filter(&self, dice: &mut Dice) {
        let Some(node) = self.pick(dice) else { return };
        let name = format!("filter{}", self.filters.fetch_add(1, Ordering::Relaxed));
        let options = Options::new().with("driver", "filter").with("node-name", name);
        let opened = self.graph.open(options.with("file", node.name())).await;
        let Ok(filter) = opened.map_err(|error| self.refused(&error)) else { return };
        match self.perhaps(dice, self.graph.insert_filter(&node, &filter)).await {
            Some(Ok(())) => count(&self.tally.changes),
            Some(Err(error)) => self.refused(&error),
            None => {}
        }
        drop(node);
        wait(dice.below(4)).await;
        let change = self.graph.change().drop_filter(&filter).remove(filter);
        match self.perhaps(dice, change.commit()).await {
            Some(Ok(report)) => assert!(report.closed.iter().all(|report| report.is_clean())),
            Some(Err(error)) => self.refused(&error),
            None => {}
        }
    }

    /// Some nodes are drained for a while; others are drained, and the graph changed, within.
    fn drain<'a>(&'a self, dice: &'a mut Dice, depth: usize) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let Some(node) = self.pick(dice) else { return };
            let mut quiet = vec![node.clone()];
            let drained = match dice.below(4) {
                0 | 1 => self.perhaps(dice, self.graph.drain(&node)).await,
                2 => {
                    let mut below = Vec::new();
                    walk::each_below_strong(node.strong(), &mut |node| below.push(node.clone()));
                    let below = below.into_iter().map(|s| NodeRef::iterator(&self.graph, s));
                    quiet = below.collect();
                    self.perhaps(dice, self.graph.drain_subtree(&node)).await
                }
                _ => {
                    let all = self.perhaps(dice, self.graph.drain_all()).await;
                    quiet = self.graph.nodes();
                    all
                }
            };
            let Some(drained) = drained else { return };
            count(&self.tally.drains);
            // Nobody can have got in above since the last of them was seen to be empty.
            // (With threads one may be counted in for a moment until he sees that the gate is shut.)
            let is_idle = |node: NodeRef| self.is_threaded || node.in_flight() == 0;
            assert!(quiet.iter().flat_map(above).all(is_idle), "inside a drained node");
            quiet.iter().for_each(|node| Probe::of(node).forbid());
            audit(&self.graph, self.is_threaded);
            wait(dice.below(4)).await;
            match dice.below(4) {
                0 if depth < 2 => self.drain(dice, depth + 1).await,
                1 => self.change(dice, false).await,
                2 => assert!(self.graph.reap().await.iter().all(|report| report.is_clean())),
                _ => {}
            }
            wait(dice.below(3)).await;
            quiet.iter().for_each(|node| Probe::of(node).allow());
            drop(quiet);
            drop(drained);
        })
    }

    async fn hold(&self, dice: &mut Dice) {
        match dice.below(5) {
            0 => {
                let Some(node) = self.pick(dice) else { return };
                let other = node.clone();
                wait(dice.below(3)).await;
                drop(node);
                other.release();
            }
            1 => {
                let id = self.ids[dice.below(self.ids.len())];
                let Ok(node) = self.graph.acquire(id) else { return };
                wait(dice.below(3)).await;
                self.pool.lock().unwrap().push(node);
            }
            2 => drop(self.take(dice)),
            _ => {
                let Some(node) = self.take(dice) else { return };
                match self.perhaps(dice, node.close()).await {
                    Some(Ok(report)) => {
                        assert!(report.is_clean());
                        count(&self.tally.closings);
                    }
                    Some(Err(CloseError::InUse { node, .. })) => {
                        self.pool.lock().unwrap().push(node);
                    }
                    None => {}
                }
            }
        }
    }

    fn take(&self, dice: &mut Dice) -> Option<NodeRef> {
        let mut pool = self.pool.lock().unwrap();
        let index = dice.below(pool.len().max(1));
        (index < pool.len()).then(|| pool.swap_remove(index))
    }

    async fn open(&self, dice: &mut Dice) {
        let name = Self::name(dice);
        let backing = dice.one_in(2).then(|| Self::name(dice));
        let options = image(name, backing);
        match dice.below(3) {
            0 => {
                if let Some(Err(error)) = self.perhaps(dice, self.graph.add(options)).await {
                    self.refused(&error);
                }
            }
            1 => match self.perhaps(dice, self.graph.open(options)).await {
                Some(Ok(node)) => self.pool.lock().unwrap().push(node),
                Some(Err(error)) => self.refused(&error),
                None => {}
            },
            _ => match self.perhaps(dice, self.graph.del(name)).await {
                Some(Ok(report)) => {
                    assert!(report.is_clean());
                    count(&self.tally.closings);
                }
                Some(Err(error)) => self.refused(&error),
                None => {}
            },
        }
    }

    async fn task(self: Arc<Self>, kind: usize, mut dice: Dice) {
        for _ in 0..2 + dice.below(4) {
            match kind {
                0 => self.request(&mut dice, 0).await,
                1 => self.request(&mut dice, 1).await,
                2 | 3 => self.change(&mut dice, true).await,
                4 | 5 => self.drain(&mut dice, 0).await,
                6 => self.filter(&mut dice).await,
                7 => self.hold(&mut dice).await,
                8 => self.open(&mut dice).await,
                _ => assert!(self.graph.reap().await.iter().all(|report| report.is_clean())),
            }
            audit(&self.graph, self.is_threaded);
        }
    }
}

pub(super) async fn wait(turns: usize) {
    for _ in 0..turns {
        bds_io::yield_now().await;
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

/// The same on real threads, a task a thread, again and again.
pub(super) fn run_on_threads(seed: u64, tally: &Arc<Tally>) {
    let stage = Stage::build(Fs::Host, Arc::clone(tally), true);
    let stage = Arc::new(bds_io::block_on(stage));
    let mut dice = Dice::new(seed);
    std::thread::scope(|scope| {
        let mut kinds = vec![0, 1, 4];
        kinds.extend((0..2).map(|_| dice.below(10)));
        for kind in kinds {
            let mut dice = Dice::new(dice.next());
            let stage = Arc::clone(&stage);
            scope.spawn(move || {
                for _ in 0..8 {
                    let task = Arc::clone(&stage).task(kind, Dice::new(dice.next()));
                    bds_io::block_on(task);
                }
            });
        }
    });
    bds_io::block_on(check_at_rest(&stage));
}

/// One world from start to end. Panics if anything goes wrong. The answer is the same whenever the run was the same.
pub(super) fn run(seed: u64, lock_first: bool, tally: &Arc<Tally>) -> u64 {
    let sim = Sim::new(seed, SimConfig { max_turns: 200_000, ..SimConfig::calm() });
    let mut dice = Dice::new(seed);
    let stage = Arc::new(sim.block_on(Stage::build(sim.fs(), Arc::clone(tally), false)));
    stage.graph.0.core.topology.lock_first.store(lock_first, Ordering::Relaxed);
    let _blame = Blame(&stage);
    sim.block_on(async {
        let mut kinds = vec![0, 1, 4];
        kinds.extend((0..dice.below(4)).map(|_| dice.below(10)));
        let tasks: Vec<_> = kinds
            .into_iter()
            .map(|kind| {
                let dice = Dice::new(dice.next());
                bds_io::spawn(Arc::clone(&stage).task(kind, dice))
            })
            .collect();
        for task in tasks {
            task.await;
        }
    });
    sim.run_until_idle(); // what was left to run in the background
    sim.block_on(check_at_rest(&stage));
    stage.census.fingerprint()
}
