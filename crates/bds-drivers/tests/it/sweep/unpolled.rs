//! Futures of requests and of graph operations, kept without polling or forgotten at every await,
//! on every engine: all other users go on, of the same node and of others, and operations that
//! started complete.
//!
//! On the simulated disk an endless wait is a deadlock, which panics with the seed. On the host a
//! watchdog ends the wait.

use std::cell::Cell;
use std::pin::Pin;
use std::time::Duration;

use bds_core::Options;
use bds_core::driver::{Precision, WriteFlags, ZeroFlags};
use bds_core::graph::{Drained, Graph, NewImage, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, Result};
use bds_io::{EngineKind, Sim, SimConfig};
use serde_json::json;

use crate::kit::{TestEnv, filled, resize_to, within, writer};

const NONE: WriteFlags = WriteFlags::empty();
/// Time after which a run counts as hanging.
const LIMIT: Duration = Duration::from_secs(120);
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
enum Abandon {
    Keep,
    Forget,
}

/// A future; its result is the section, if it is a drain.
type VictimFuture<'a> = Pin<Box<dyn Future<Output = Result<Option<Drained>>> + 'a>>;

/// Open images, and their users.
struct Setup {
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

fn make(env: &TestEnv, cluster: u64) {
    let graph = env.graph();
    env.block_on(async {
        for name in IMAGES {
            let options = json!({"size": CLUSTERS * cluster, "cluster_size": cluster});
            let image = NewImage {
                format: "qcow2".into(),
                path: env.path(name),
                options: Options::from_json(options).unwrap(),
                skip_backing: true,
            };
            graph.create_image(image).await.unwrap();
        }
    });
}

async fn open(env: &TestEnv, graph: &Graph, name: &str) -> NodeRef {
    // Direct, so that reads wait; the simulated disk makes them wait anyway.
    let is_direct = matches!(env, TestEnv::Host(..));
    let options = json!({
        "driver": "qcow2", "discard": "unmap", "node-name": name,
        "cache": {"direct": is_direct}, "l2-cache-size": 1024, "refcount-cache-size": 2048,
        "file": {"driver": "file", "filename": env.path(name)},
    });
    graph.open(Options::from_json(options).unwrap()).await.unwrap()
}

fn options(text: &str) -> Options {
    Options::parse(text).unwrap()
}

impl Setup {
    async fn open(env: &TestEnv, cluster: u64) -> Result<(Setup, NodeRef)> {
        let graph = env.graph();
        let disk = open(env, &graph, "disk").await;
        let beside = open(env, &graph, "beside").await;
        let overlay = open(env, &graph, "overlay").await;
        let extra = open(env, &graph, "extra").await;
        let setup = Setup {
            one: writer(&disk, "one"),
            other: writer(&disk, "other"),
            unrelated: writer(&beside, "unrelated"),
            graph,
            cluster,
            disk,
            overlay,
            beside,
        };
        let writer = writer(&extra, "writer");
        setup.one.write(0, filled(1, cluster * 32), NONE).await?;
        setup.one.write(cluster * 130, filled(1, cluster), NONE).await?;
        setup.one.write(cluster * 200, filled(1, cluster), NONE).await?;
        setup.one.flush().await?;
        // Data that is not in the files yet.
        for user in [&setup.one, &setup.unrelated, &writer] {
            user.write(cluster * 40, filled(2, cluster * 2), NONE).await?;
        }
        setup.one.discard(cluster * 41, cluster).await?;
        // The table that later requests need is evicted from the cache.
        setup.one.read(cluster * 200, filled(0, cluster)).await?;
        // A request that a drain has to wait for.
        let busy = setup.one.clone();
        bds_io::spawn_now(async move {
            busy.write(cluster * 50, filled(4, cluster), NONE).await.expect("nothing fails");
        })
        .detach();
        Ok((setup, extra))
    }

    fn begin(&self, victim: Victim, extra: &mut Option<NodeRef>) -> VictimFuture<'_> {
        let (one, c) = (&self.one, self.cluster);
        let nothing = |done: Result<()>| done.map(|()| None);
        let grown = resize_to(c * (CLUSTERS + 2));
        match victim {
            Victim::Read => Box::pin(async move { nothing(one.read(0, filled(0, c * 8)).await) }),
            Victim::InPlace => {
                Box::pin(async move { nothing(one.write(0, filled(7, c), NONE).await) })
            }
            Victim::Fresh => {
                Box::pin(async move { nothing(one.write(c * 100, filled(7, c * 2), NONE).await) })
            }
            Victim::Zero => Box::pin(async move {
                one.write_zeroes(c * 2, c * 2, ZeroFlags::MAY_UNMAP).await.map(|_| None)
            }),
            Victim::Discard => Box::pin(async move { nothing(one.discard(c * 4, c * 4).await) }),
            Victim::Flush => Box::pin(async move { nothing(one.flush().await) }),
            Victim::Status => Box::pin(async move {
                one.block_status(c * 130, c, Precision::Exact).await.map(|_| None)
            }),
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
    async fn run_other_requests(&self, is_drained: bool) -> Result<()> {
        let c = self.cluster;
        for user in [&self.unrelated, &self.other] {
            let is_own = user.name() == "other";
            if is_own && is_drained {
                return Ok(());
            }
            user.write(c * 20, filled(3, c), NONE).await?;
            user.write(c * 120, filled(3, c * 2), NONE).await?;
            user.write(c * 125 + 100, filled(3, 50), WriteFlags::FUA).await?;
            user.read(c * 16, filled(0, c * 8)).await?;
            user.discard(c * 22, c * 3).await?;
            let _done = user.write_zeroes(c * 26, c, ZeroFlags::MAY_UNMAP).await?;
            user.flush().await?;
            user.block_status(0, c * CLUSTERS, Precision::Exact).await?;
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
        let seen = filled(0xee, len);
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
        let Setup { graph, disk, overlay, beside, one, other, unrelated, .. } = self;
        drop((disk, overlay, beside, one, other, unrelated));
        let reports = graph.reap().await;
        assert!(reports.iter().all(bds_core::graph::CloseReport::is_clean), "{reports:?}");
        assert_eq!(graph.nodes().len(), 0);
    }
}

/// Polls the future once, and turns its Context `k - 1` times. `None`: it completed at once.
fn stop_on_host<F: Future>(env: &TestEnv, future: F, k: usize) -> Option<Pin<Box<F>>> {
    let TestEnv::Host(context, _) = env else { unreachable!("the caller checked") };
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
    /// It was forgotten as a drained section, or before its first poll with what it owns: its node
    /// stays open.
    StaysOpen,
}

/// Abandons the victim after `k` polls of the tasks.
fn run(env: &TestEnv, cluster: u64, victim: Victim, how: Abandon, k: usize) -> Fate {
    let what = format!("{victim:?} {how:?} at {k}, clusters of {cluster}");
    let (setup, extra) = env.block_on(Setup::open(env, cluster)).expect("nothing fails");
    let mut extra = Some(extra);
    let is_polled = Cell::new(false);
    let victim_future = setup.begin(victim, &mut extra);
    // The scheduler picks the first task: the polls may all have been those of others.
    let future = async {
        is_polled.set(true);
        victim_future.await
    };
    let kept = match env {
        TestEnv::Sim(sim) => sim.keep_at(future, k),
        TestEnv::Host(..) => stop_on_host(env, future, k),
    };
    let is_drained = victim == Victim::Drain && is_polled.get();
    let others = |is_drained| {
        env.block_on(within(LIMIT, &what, setup.run_other_requests(is_drained)))
            .expect("nothing fails");
    };
    let (was_abandoned, has_ended) = match (kept, how) {
        (None, _) => (false, true),
        (Some(kept), Abandon::Keep) => {
            others(is_drained);
            let done = env.block_on(within(LIMIT, &what, kept));
            drop(done.unwrap_or_else(|error| panic!("{what}: {error}")));
            (true, true)
        }
        (Some(kept), Abandon::Forget) => {
            std::mem::forget(kept);
            others(is_drained);
            (true, is_polled.get())
        }
    };
    if was_abandoned && how == Abandon::Forget && (is_drained || !has_ended) {
        // A forgotten section never ends, like one whose guard is forgotten: its node stays, and
        // its requests wait.
        let read = env.block_on(async { setup.other.try_read(0, &filled(0, cluster)) });
        assert!(!is_drained || read.is_none());
        std::mem::forget((setup, extra));
        return Fate::StaysOpen;
    }
    env.block_on(within(LIMIT, &what, async {
        setup.run_other_requests(false).await.expect("nothing fails");
        setup.check_effect(victim).await.expect("nothing fails");
        drop(extra);
        setup.end().await;
    }));
    if was_abandoned { Fate::Closed } else { Fate::Ended }
}

/// Checks the images.
fn check_images(env: &TestEnv, what: &str) {
    let graph = env.graph();
    env.block_on(async {
        for name in IMAGES.into_iter().filter(|name| *name != "overlay") {
            let node = open(env, &graph, name).await;
            let report = writer(&node, "look").check(&|_, _| {}).await.unwrap();
            let found = (report.corruptions, report.check_errors, report.leaks);
            assert_eq!(found, (0, 0, 0), "{what} {name}: {report:?}");
            drop(node);
        }
        graph.reap().await;
    });
}

fn sweep(how: Abandon) {
    let mut runs = Vec::new();
    for cluster in [512, 4096] {
        let base = Sim::new(cluster, SimConfig { inline_rate: 0.0, ..SimConfig::default() });
        make(&TestEnv::Sim(base.clone()), cluster);
        for victim in VICTIMS {
            let (mut points, mut checks) = (0, 0);
            for k in 1.. {
                let env = TestEnv::Sim(base.fork(k as u64));
                let fate = run(&env, cluster, victim, how, k);
                if fate == Fate::Ended {
                    break;
                }
                points += 1;
                if fate == Fate::Closed {
                    checks += 1;
                    check_images(&env, &format!("{victim:?} {how:?} at {k}"));
                }
            }
            // Clusters of 4096 bytes have their tables in memory, and a status query needs no more.
            let may_be_at_once = victim == Victim::Status && cluster == 4096;
            assert!(points >= 2 || may_be_at_once, "{victim:?}: {points} awaits");
            let stays_open = (victim, how) == (Victim::Drain, Abandon::Forget);
            assert!(
                checks * 2 >= points || stays_open || may_be_at_once,
                "{victim:?}: {checks} looks at {points}"
            );
            runs.push((cluster, victim, points));
        }
    }
    #[expect(clippy::print_stdout, reason = "the coverage is logged")]
    {
        println!("{runs:?}");
    }
}

#[test]
fn others_go_on_while_a_future_is_kept_at_every_await() {
    sweep(Abandon::Keep);
}

#[test]
fn others_go_on_while_a_future_is_forgotten_at_every_await() {
    sweep(Abandon::Forget);
}

#[test]
fn others_go_on_on_every_engine_of_the_host() {
    for engine in [EngineKind::Uring, EngineKind::Pool] {
        let env = match TestEnv::host(engine) {
            Ok(env) => env,
            Err(error) => {
                bds_testkit::skip(&format!("no {engine:?} engine: {error}"));
                continue;
            }
        };
        // Once suffices: every run leaves images that the next can use.
        make(&env, 4096);
        for victim in VICTIMS {
            for (how, k) in
                [(Abandon::Keep, 1), (Abandon::Keep, 3), (Abandon::Forget, 1), (Abandon::Forget, 3)]
            {
                // A forgotten section keeps its images open, and locked.
                if (victim, how) == (Victim::Drain, Abandon::Forget) {
                    continue;
                }
                assert!(
                    run(&env, 4096, victim, how, k) != Fate::StaysOpen,
                    "its images stay locked"
                );
                if matches!(victim, Victim::Append | Victim::Truncate) {
                    for name in IMAGES {
                        std::fs::remove_file(env.path(name)).unwrap();
                    }
                    make(&env, 4096);
                }
            }
        }
        check_images(&env, &format!("{engine:?}"));
    }
}
