//! Waiting in a circle: releases that waited, locks that were held while somebody waited, waits for the wrong one.

use std::sync::Arc;
use std::time::Duration;

use bds_refcount::Release;

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, World, commit, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, Operations, ShutdownStage, Stoppable};

/// Row 43 (ac2ae233a0). Giving up a node under the graph's write lock closed it, closing polled, and polling took the lock again. Here a release
/// counts down and takes no lock; whatever else can be given up under the lock does not either.
#[test]
fn deadlock_release_under_the_graphs_lock() {
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::ALL);
        let job = world.graph.attach_job(&base, "job0", Access::READ).unwrap();
        let guards = (top.claim_job("job0").unwrap(), top.block(Operations::all(), "busy"));
        let bitmap = top.add_anonymous_bitmap("job0");
        world.script.log();
        {
            let _lock = world.graph.0.core.lock();
            drop((guards, bitmap, job, guest));
            assert_eq!(base.release(), Release::NotLast);
            assert_eq!(top.release(), Release::Last);
            assert_eq!(world.script.log(), [""; 0], "no driver was called");
        }
        assert_eq!(world.graph.reap().await.len(), 2);
    });
}

/// Row 44 (b2ab5f545f). A coroutine could not give a node up, because that took the write lock, which a coroutine may not wait for. Here a driver in
/// the middle of a request gives up the last reference to another node, at once.
#[test]
fn deadlock_release_inside_a_request() {
    run(|world| async move {
        let busy = world.part("busy").await;
        let other = world.part("other").await;
        let guest = root(&busy, "guest", Access::READ);
        let last = Arc::new(std::sync::Mutex::new(Some(other)));
        let script = Arc::clone(&world.script);
        world.script.at("busy", Point::Read, move || {
            let (last, script) = (Arc::clone(&last), Arc::clone(&script));
            async move {
                let node = last.lock().unwrap().take().unwrap();
                let graph = node.graph().clone();
                script.log();
                assert_eq!(node.release(), Release::Last);
                assert_eq!(script.log(), [""; 0], "nothing was closed here");
                // Whoever wants it closed says so, and may wait, in a request too.
                assert_eq!(graph.reap().await.len(), 1);
                Ok(())
            }
        });
        read(&guest).await.unwrap();
        assert_eq!(world.script.times("close other"), 1);
    });
}

/// All sorts of work at once.
async fn everybody(world: World) {
    let [top, mid, base] = world.chain(["top", "mid", "base"]).await;
    let over = world.part("over").await;
    let guest = root(&top, "guest", Access::READ);
    let mut tasks = Vec::new();
    for _ in 0..3 {
        let guest = Arc::clone(&guest);
        tasks.push(bds_io::spawn(async move {
            for _ in 0..5 {
                read(&guest).await.unwrap();
            }
        }));
    }
    let (graph, node) = (world.graph.clone(), mid.clone());
    tasks.push(bds_io::spawn(async move {
        let everything = graph.drain_all().await;
        let one = graph.drain(&node).await;
        drop(everything);
        drop(one);
    }));
    let (graph, from, to) = (world.graph.clone(), top.clone(), over.clone());
    tasks.push(bds_io::spawn(async move { graph.append(&from, &to).await.unwrap() }));
    let (graph, from, below) = (world.graph.clone(), mid.clone(), base.clone());
    tasks.push(bds_io::spawn(async move {
        graph.set_backing(&from, None).await.unwrap();
        graph.set_backing(&from, Some(&below)).await.unwrap();
    }));
    let graph = world.graph.clone();
    tasks.push(bds_io::spawn(async move {
        for _ in 0..3 {
            let text = "driver=sieve,node-name=guest-of-base,file=base";
            let short = graph.open(super::scripted_graph::options(text)).await.unwrap();
            short.close().await.unwrap();
        }
    }));
    for task in tasks {
        task.await;
    }
    world.assert_undrained();
    drop((guest, top, mid, base, over));
    world.graph.shutdown().await.check_leaks().unwrap();
}

/// Row 45 (80fc5d2600, 31b2ddfea3, 6bc0bcc89f, bb092d6d8f, e462c6d27d, 67446e605d, 1dbc7d3442). The graph's lock polled while its taker held the lock of
/// a thread's context, which somebody polled for needed. Here there is one lock and nobody waits while holding it: drains, changes,
/// openings, closings and requests all come to their end, under each schedule.
#[test]
fn deadlock_of_everybody_at_once() {
    run_schedules(60, everybody);
}

/// Row 46 (f1bf3be14b to 91ba0e1c38 and fc1d2f3eac; 10.0.2 still has it). The main thread took the write lock and drained then; a request that was
/// inside wanted the lock to read, and each waited for the other. Here a change drains without the lock: the request takes it, and
/// leaves. What searches all schedules for the circle is in the tests of schedules.
#[test]
fn deadlock_change_against_a_request_that_takes_the_lock() {
    run_schedules(60, |world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let other = world.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        let (graph, node) = (world.graph.clone(), top.clone());
        world.script.at("top", Point::Read, move || {
            let (graph, node) = (graph.clone(), node.clone());
            async move {
                for _ in 0..3 {
                    bds_io::yield_now().await;
                    drop(graph.attach_job(&node, "inside", Access::READ)?);
                }
                Ok(())
            }
        });
        let request = bds_io::spawn(async move { read(&guest).await });
        let change = world.graph.change().replace(&top, &other);
        commit(change).await.unwrap();
        request.await.unwrap();
        assert_eq!((top.count(), base.count()), (2, 2), "ours, and the script's");
    });
}

/// Row 47 (ace5a161ea). After an edge had been taken away, the drain looked for the thread to wait in at the child's end of the edge, which was empty
/// by then. Here who is waited for is the node that is drained, whatever happens to edges meanwhile.
#[test]
fn deadlock_drain_of_a_child_that_is_detached() {
    run_schedules(40, |world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::READ);
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        let drain = {
            let (graph, base) = (world.graph.clone(), base.clone());
            bds_io::spawn(async move {
                let section = graph.drain(&base).await;
                bds_io::yield_now().await;
                drop(section);
            })
        };
        world.graph.set_backing(&top, None).await.unwrap();
        drain.await;
        request.await.unwrap();
        assert_eq!(base.count(), 1);
        world.assert_undrained();
    });
}

/// The exit of a job: gives everything up.
struct Exit(std::sync::Mutex<Vec<crate::graph::NodeRef>>);

impl Stoppable for Exit {
    fn name(&self) -> String {
        "job0".into()
    }

    fn stop(&self) -> crate::driver::BoxFuture<'_, crate::Result<()>> {
        self.0.lock().unwrap().clear();
        Box::pin(async { Ok(()) })
    }
}

/// Row 49 (794f01414f; GitLab 780). A job's exit gave up a node, which deleted it, which closed it, which flushed it, all nested inside the exit, while
/// another thread waited for the lock that the exit held. Here giving up does no I/O; closing is a step of its own that somebody awaits, and
/// one node after the other.
#[test]
fn deadlock_close_and_flush_inside_a_jobs_exit() {
    run(|world| async move {
        let chain = world.chain(["top", "mid", "base"]).await;
        let job = Arc::new(Exit(std::sync::Mutex::new(chain.into())));
        let known: Arc<dyn Stoppable> = job.clone();
        world.graph.on_shutdown(ShutdownStage::Jobs, &known);
        world.script.log();
        job.stop().await.unwrap();
        assert_eq!(world.script.log(), [""; 0]);
        // A flush that does not come to its end holds nobody up but who waits for it.
        world.script.at("top", Point::Flush, || async {
            bds_io::sleep(Duration::from_secs(3600)).await;
            Ok(())
        });
        let mut reap = Box::pin(world.graph.reap());
        assert!(futures_util::poll!(&mut reap).is_pending());
        world.idle().await;
        let meanwhile = {
            let _lock = world.graph.0.core.lock();
            world.script.log()
        };
        assert_eq!(meanwhile, ["flush top"]);
        let closed: Vec<String> = reap.await.into_iter().map(|report| report.name).collect();
        assert_eq!(closed, ["top", "mid", "base"]);
        let log = world.script.log();
        assert_eq!(log, ["close top", "flush mid", "close mid", "flush base", "close base"]);
    });
}

/// Row 50 (a77fd4bb29, 960d5fb3e8). A drain that looped inside a coroutine held up the very coroutine that it waited for. Here a drain asked for inside a request
/// waits like anybody else: others go on, patience ends, and when the request leaves, the node is drained.
#[test]
fn deadlock_drain_asked_for_inside_a_request() {
    run(|world| async move {
        let node = world.part("disk").await;
        let other = world.part("other").await;
        let guest = root(&node, "guest", Access::READ);
        let (graph, inner) = (world.graph.clone(), node.clone());
        world.script.at("disk", Point::Read, move || {
            let (graph, inner) = (graph.clone(), inner.clone());
            async move {
                let patience = Duration::from_millis(10);
                let error = graph.drain_within(&inner, patience).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::WouldWait);
                assert!(error.to_string().contains("1 requests"), "{error}");
                Ok(())
            }
        });
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        world.idle().await;
        let bystander = root(&other, "bystander", Access::READ);
        read(&bystander).await.unwrap();
        let drained = world.graph.drain(&node).await;
        assert_eq!(node.in_flight(), 0);
        drop(drained);
        request.await.unwrap();
        world.assert_undrained();
    });
}
