//! Futures of requests and of graph operations, kept without polling or forgotten at every await, on every engine: all
//! other users go on, of the same node and of others, and operations that started complete.
//!
//! On the simulated disk an endless wait is a deadlock, which panics with the seed. On the host a watchdog ends the
//! wait.

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::time::Duration;

use bds_core::Options;
use bds_core::driver::{Prealloc, Truncate, WriteFlags, ZeroFlags};
use bds_core::graph::{Drained, Graph, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Error, Result};
use bds_io::{Buf, EngineKind, IoVec, Sim, SimConfig};
use futures_util::future::{Either, select};
use serde_json::json;

use super::rig::World;

const NONE: WriteFlags = WriteFlags::empty();
/// Clusters of the images.
const CLUSTERS: u64 = 256;
const IMAGES: [&str; 4] = ["disk", "overlay", "beside", "extra"];

/// The operation whose future is abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Read,
    InPlace,
    Fresh,
    Zero,
    Discard,
    Flush,
    Status,
    Truncate,
    Reopen,
    Append,
    Drain,
    Close,
}

const VICTIMS: [Victim; 12] = [
    Victim::Read,
    Victim::InPlace,
    Victim::Fresh,
    Victim::Zero,
    Victim::Discard,
    Victim::Flush,
    Victim::Status,
    Victim::Truncate,
    Victim::Reopen,
    Victim::Append,
    Victim::Drain,
    Victim::Close,
];

/// What happens to a future that is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Keep,
    Forget,
}

/// A future; its result is the section, if it is a drain.
type Begun<'a> = Pin<Box<dyn Future<Output = Result<Option<Drained>>> + 'a>>;

/// Open images, and their users.
struct Stage {
    graph: Graph,
    cluster: u64,
    disk: NodeRef,
    overlay: NodeRef,
    beside: NodeRef,
    /// The user whose future is abandoned.
    one: Backend,
    other: Backend,
    unrelated: Backend,
}

fn make(world: &World, cluster: u64) {
    let graph = world.graph();
    world.block_on(async {
        for name in IMAGES {
            let options = json!({"size": CLUSTERS * cluster, "cluster_size": cluster});
            let image = NewImage {
                format: "qcow2".into(),
                path: world.path(name),
                options: Options::from_json(options).unwrap(),
                skip_backing: true,
            };
            graph.create_image(image).await.unwrap();
        }
    });
}

async fn open(world: &World, graph: &Graph, name: &str) -> NodeRef {
    // Direct, so that reads wait; the simulated disk makes them wait anyway.
    let is_direct = matches!(world, World::Host(..));
    let options = json!({
        "driver": "qcow2", "discard": "unmap", "node-name": name,
        "cache": {"direct": is_direct}, "l2-cache-size": 1024, "refcount-cache-size": 2048,
        "file": {"driver": "file", "filename": world.path(name)},
    });
    graph.open(Options::from_json(options).unwrap()).await.unwrap()
}

fn backend(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { name: name.into(), writable: true, ..Default::default() };
    Backend::new(node, options).unwrap()
}

fn iov(byte: u8, len: u64) -> IoVec {
    let len = usize::try_from(len).unwrap();
    let iov = Buf::zeroed(len, 4096).iov();
    iov.fill(0..len, byte);
    iov
}

fn options(text: &str) -> Options {
    Options::parse(text).unwrap()
}

impl Stage {
    async fn set(world: &World, cluster: u64) -> Result<(Stage, NodeRef)> {
        let graph = world.graph();
        let disk = open(world, &graph, "disk").await;
        let beside = open(world, &graph, "beside").await;
        let overlay = open(world, &graph, "overlay").await;
        let extra = open(world, &graph, "extra").await;
        let stage = Stage {
            one: backend(&disk, "one"),
            other: backend(&disk, "other"),
            unrelated: backend(&beside, "unrelated"),
            graph,
            cluster,
            disk,
            overlay,
            beside,
        };
        let writer = backend(&extra, "writer");
        stage.one.write(0, iov(1, cluster * 32), NONE).await?;
        stage.one.write(cluster * 130, iov(1, cluster), NONE).await?;
        stage.one.write(cluster * 200, iov(1, cluster), NONE).await?;
        stage.one.flush().await?;
        // Data that is not in the files yet.
        for guest in [&stage.one, &stage.unrelated, &writer] {
            guest.write(cluster * 40, iov(2, cluster * 2), NONE).await?;
        }
        stage.one.discard(cluster * 41, cluster).await?;
        // The table that later requests need is evicted from the cache.
        stage.one.read(cluster * 200, iov(0, cluster)).await?;
        // A request that a drain has to wait for.
        let busy = stage.one.clone();
        bds_io::spawn_now(async move {
            busy.write(cluster * 50, iov(4, cluster), NONE).await.expect("nothing fails");
        })
        .detach();
        Ok((stage, extra))
    }

    fn begin(&self, victim: Victim, extra: &mut Option<NodeRef>) -> Begun<'_> {
        let (one, c) = (&self.one, self.cluster);
        let nothing = |done: Result<()>| done.map(|()| None);
        let grown = Truncate {
            len: c * (CLUSTERS + 2),
            exact: true,
            prealloc: Prealloc::Off,
            zero_new: false,
        };
        match victim {
            Victim::Read => Box::pin(async move { nothing(one.read(0, iov(0, c * 8)).await) }),
            Victim::InPlace => {
                Box::pin(async move { nothing(one.write(0, iov(7, c), NONE).await) })
            }
            Victim::Fresh => {
                Box::pin(async move { nothing(one.write(c * 100, iov(7, c * 2), NONE).await) })
            }
            Victim::Zero => Box::pin(async move {
                one.write_zeroes(c * 2, c * 2, ZeroFlags::MAY_UNMAP).await.map(|_| None)
            }),
            Victim::Discard => Box::pin(async move { nothing(one.discard(c * 4, c * 4).await) }),
            Victim::Flush => Box::pin(async move { nothing(one.flush().await) }),
            Victim::Status => {
                Box::pin(async move { one.block_status(c * 130, c, true).await.map(|_| None) })
            }
            Victim::Truncate => Box::pin(async move { nothing(one.truncate(grown).await) }),
            Victim::Reopen => Box::pin(async move {
                nothing(self.graph.reopen(&self.disk, options("lazy-refcounts=off")).await)
            }),
            Victim::Append => {
                Box::pin(async move { nothing(self.graph.append(&self.disk, &self.overlay).await) })
            }
            Victim::Drain => Box::pin(async move { Ok(Some(self.graph.drain(&self.disk).await)) }),
            Victim::Close => {
                let extra = extra.take().expect("closed once");
                Box::pin(async move {
                    let report = extra.close().await.map_err(Error::from)?;
                    nothing(report.into_result())
                })
            }
        }
    }

    /// Does all operations of other users.
    async fn others_go_on(&self, is_drained: bool) -> Result<()> {
        let c = self.cluster;
        for guest in [&self.unrelated, &self.other] {
            let is_own = guest.name() == "other";
            if is_own && is_drained {
                return Ok(());
            }
            guest.write(c * 20, iov(3, c), NONE).await?;
            guest.write(c * 120, iov(3, c * 2), NONE).await?;
            guest.write(c * 125 + 100, iov(3, 50), WriteFlags::FUA).await?;
            guest.read(c * 16, iov(0, c * 8)).await?;
            guest.discard(c * 22, c * 3).await?;
            let _done = guest.write_zeroes(c * 26, c, ZeroFlags::MAY_UNMAP).await?;
            guest.flush().await?;
            guest.block_status(0, c * CLUSTERS, true).await?;
            let node = if is_own { &self.disk } else { &self.beside };
            drop(self.graph.drain(node).await);
            self.graph.reopen(node, options("lazy-refcounts=off")).await?;
        }
        Ok(())
    }

    /// Checks the effect of a completed request.
    async fn check_effect(&self, victim: Victim) -> Result<()> {
        let c = self.cluster;
        let (at, len, byte) = match victim {
            Victim::InPlace => (0, c, 7),
            Victim::Fresh => (c * 100, c * 2, 7),
            Victim::Zero => (c * 2, c * 2, 0),
            Victim::Discard => (c * 4, c * 4, 0),
            _ => (c * 8, c * 8, 1),
        };
        let seen = iov(0xee, len);
        self.other.read(at, seen.clone()).await?;
        assert_eq!(seen.to_vec(0..seen.len()), vec![byte; seen.len()], "{victim:?}");
        let grown = c * if victim == Victim::Truncate { CLUSTERS + 2 } else { CLUSTERS };
        if victim != Victim::Append {
            assert_eq!(self.other.len(), grown, "{victim:?}");
        }
        Ok(())
    }

    /// Closes everything: no node is held by a forgotten future.
    async fn end(self) {
        let Stage { graph, disk, overlay, beside, one, other, unrelated, .. } = self;
        drop((disk, overlay, beside, one, other, unrelated));
        let reports = graph.reap().await;
        assert!(reports.iter().all(bds_core::graph::CloseReport::is_clean), "{reports:?}");
        assert_eq!(graph.nodes().len(), 0);
    }
}

/// Panics if the work takes too long.
async fn watched<T>(what: &str, work: impl Future<Output = T>) -> T {
    match select(pin!(work), pin!(bds_io::sleep(Duration::from_secs(120)))).await {
        Either::Left((done, _)) => done,
        Either::Right(_) => panic!("{what}: hangs"),
    }
}

/// Polls the future once, and turns its Context `k - 1` times. `None`: it completed at once.
fn stop_on_host<F: Future>(world: &World, future: F, k: usize) -> Option<Pin<Box<F>>> {
    let World::Host(context, _) = world else { unreachable!("the caller checked") };
    let mut future = Box::pin(future);
    let is_done = context.block_on(std::future::poll_fn(|cx| {
        std::task::Poll::Ready(future.as_mut().poll(cx).is_ready())
    }));
    for _ in 1..k {
        context.turn(Some(Duration::ZERO)).unwrap();
    }
    (!is_done).then_some(future)
}

/// What happened to the victim.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It completed before.
    Ended,
    /// It was abandoned, and everything was closed afterwards.
    Closed,
    /// It was forgotten as a drained section, or before its first poll with what it owns: its node stays open.
    StaysOpen,
}

/// Abandons the victim after `k` polls of the tasks.
fn run(world: &World, cluster: u64, victim: Victim, how: How, k: usize) -> Fate {
    let what = format!("{victim:?} {how:?} at {k}, clusters of {cluster}");
    let (stage, extra) = world.block_on(Stage::set(world, cluster)).expect("nothing fails");
    let mut extra = Some(extra);
    let is_begun = Cell::new(false);
    let victim_future = stage.begin(victim, &mut extra);
    // The scheduler picks the first task: the polls may all have been those of others.
    let future = async {
        is_begun.set(true);
        victim_future.await
    };
    let kept = match world {
        World::Sim(sim) => sim.keep_at(future, k),
        World::Host(..) => stop_on_host(world, future, k),
    };
    let is_drained = victim == Victim::Drain && is_begun.get();
    let others = |is_drained| {
        world.block_on(watched(&what, stage.others_go_on(is_drained))).expect("nothing fails");
    };
    let (was_abandoned, has_ended) = match (kept, how) {
        (None, _) => (false, true),
        (Some(kept), How::Keep) => {
            others(is_drained);
            let done = world.block_on(watched(&what, kept));
            drop(done.unwrap_or_else(|error| panic!("{what}: {error}")));
            (true, true)
        }
        (Some(kept), How::Forget) => {
            std::mem::forget(kept);
            others(is_drained);
            (true, is_begun.get())
        }
    };
    if was_abandoned && how == How::Forget && (is_drained || !has_ended) {
        // A forgotten section never ends, like one whose guard is forgotten: its node stays, and its requests wait.
        let read = world.block_on(async { stage.other.try_read(0, &iov(0, cluster)) });
        assert!(!is_drained || read.is_none());
        std::mem::forget((stage, extra));
        return Fate::StaysOpen;
    }
    world.block_on(watched(&what, async {
        stage.others_go_on(false).await.expect("nothing fails");
        stage.check_effect(victim).await.expect("nothing fails");
        drop(extra);
        stage.end().await;
    }));
    if was_abandoned { Fate::Closed } else { Fate::Ended }
}

/// Checks the images.
fn look(world: &World, what: &str) {
    let graph = world.graph();
    world.block_on(async {
        for name in IMAGES.into_iter().filter(|name| *name != "overlay") {
            let node = open(world, &graph, name).await;
            let report = backend(&node, "look").check(&|_, _| {}).await.unwrap();
            let found = (report.corruptions, report.check_errors, report.leaks);
            assert_eq!(found, (0, 0, 0), "{what} {name}: {report:?}");
            drop(node);
        }
        graph.reap().await;
    });
}

fn sweep(how: How) {
    let mut runs = Vec::new();
    for cluster in [512, 4096] {
        let base = Sim::new(cluster, SimConfig { inline_rate: 0.0, ..SimConfig::default() });
        make(&World::Sim(base.clone()), cluster);
        for victim in VICTIMS {
            let (mut points, mut looks) = (0, 0);
            for k in 1.. {
                let world = World::Sim(base.fork(k as u64));
                let fate = run(&world, cluster, victim, how, k);
                if fate == Fate::Ended {
                    break;
                }
                points += 1;
                if fate == Fate::Closed {
                    looks += 1;
                    look(&world, &format!("{victim:?} {how:?} at {k}"));
                }
            }
            // Clusters of 4096 bytes have their tables in memory, and a status query needs no more.
            let may_be_at_once = victim == Victim::Status && cluster == 4096;
            assert!(points >= 2 || may_be_at_once, "{victim:?}: {points} awaits");
            let stays_open = (victim, how) == (Victim::Drain, How::Forget);
            assert!(
                looks * 2 >= points || stays_open || may_be_at_once,
                "{victim:?}: {looks} looks at {points}"
            );
            runs.push((cluster, victim, points));
        }
    }
    #[expect(clippy::print_stdout, reason = "what was covered belongs into the log")]
    {
        println!("{runs:?}");
    }
}

#[test]
fn others_go_on_while_a_future_is_kept_at_every_await() {
    sweep(How::Keep);
}

#[test]
fn others_go_on_while_a_future_is_forgotten_at_every_await() {
    sweep(How::Forget);
}

#[test]
fn others_go_on_on_every_engine_of_the_host() {
    for engine in [EngineKind::Uring, EngineKind::Pool] {
        let world = match World::host(engine) {
            Ok(world) => world,
            Err(error) => {
                println!("skipped: no {engine:?} engine here: {error}");
                continue;
            }
        };
        // Once suffices: every run leaves images that the next can use.
        make(&world, 4096);
        for victim in VICTIMS {
            for (how, k) in [(How::Keep, 1), (How::Keep, 3), (How::Forget, 1), (How::Forget, 3)] {
                // A forgotten section keeps its images open, and locked.
                if (victim, how) == (Victim::Drain, How::Forget) {
                    continue;
                }
                assert!(
                    run(&world, 4096, victim, how, k) != Fate::StaysOpen,
                    "its images stay locked"
                );
                if matches!(victim, Victim::Append | Victim::Truncate) {
                    for name in IMAGES {
                        std::fs::remove_file(world.path(name)).unwrap();
                    }
                    make(&world, 4096);
                }
            }
        }
        look(&world, &format!("{engine:?}"));
    }
}
