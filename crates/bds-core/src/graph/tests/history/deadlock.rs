//! Deadlocks of QEMU: releases that waited, waits under a lock, waits for the wrong node.

use std::sync::Arc;
use std::time::Duration;

use bds_refcount::Release;

use super::scripted_graph::{ScriptedGraph, commit, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, BlockOps, ShutdownStage, Stoppable};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;

/// Row 43 (ac2ae233a0). Releasing a node under the graph's write lock closed it, closing polled,
/// and polling took the lock again. Here a release decrements a count and takes no lock; neither
/// does the drop of any guard.
#[test]
fn deadlock_release_under_the_graphs_lock() {
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::ALL);
        let job = test.graph.attach_job(&base, "job0", Access::READ).unwrap();
        let guards = (top.claim_job("job0").unwrap(), top.block(BlockOps::all(), "busy"));
        let bitmap = top.add_anonymous_bitmap("job0", None).unwrap();
        test.script.log();
        {
            let _lock = test.graph.0.core.lock();
            drop((guards, bitmap, job, guest));
            assert_eq!(base.release(), Release::NotLast);
            assert_eq!(top.release(), Release::Last);
            assert_eq!(test.script.log(), [""; 0], "no driver was called");
        }
        assert_eq!(test.graph.reap().await.len(), 2);
    });
}

/// Row 44 (b2ab5f545f). A coroutine could not release a node, because that took the write lock, for
/// which a coroutine may not wait. Here a driver in the middle of a request releases the last
/// reference to another node at once.
#[test]
fn deadlock_release_inside_a_request() {
    run(|test| async move {
        let busy = test.part("busy").await;
        let other = test.part("other").await;
        let guest = root(&busy, "guest", Access::READ);
        let last = Arc::new(std::sync::Mutex::new(Some(other)));
        let script = Arc::clone(&test.script);
        test.script.at("busy", Point::Read, move || {
            let (last, script) = (Arc::clone(&last), Arc::clone(&script));
            async move {
                let node = last.lock().unwrap().take().unwrap();
                let graph = node.graph().clone();
                script.log();
                assert_eq!(node.release(), Release::Last);
                assert_eq!(script.log(), [""; 0], "nothing was closed here");
                // Closing is explicit and may be awaited, also inside a request.
                assert_eq!(graph.reap().await.len(), 1);
                Ok(())
            }
        });
        read(&guest).await.unwrap();
        assert_eq!(test.script.times("close other"), 1);
    });
}

/// Requests, drains, changes, opens and closes at once.
async fn all_operations(test: ScriptedGraph) {
    let [top, mid, base] = test.chain(["top", "mid", "base"]).await;
    let over = test.part("over").await;
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
    let (graph, node) = (test.graph.clone(), mid.clone());
    tasks.push(bds_io::spawn(async move {
        let everything = graph.drain_all().await;
        let one = graph.drain(&node).await;
        drop(everything);
        drop(one);
    }));
    let (graph, from, to) = (test.graph.clone(), top.clone(), over.clone());
    tasks.push(bds_io::spawn(async move { graph.append(&from, &to).await.unwrap() }));
    let (graph, from, below) = (test.graph.clone(), mid.clone(), base.clone());
    tasks.push(bds_io::spawn(async move {
        graph.set_backing(&from, None).await.unwrap();
        graph.set_backing(&from, Some(&below)).await.unwrap();
    }));
    let graph = test.graph.clone();
    tasks.push(bds_io::spawn(async move {
        for _ in 0..3 {
            let text = "driver=sieve,node-name=short-lived,file=base";
            let short = graph.open(super::scripted_graph::options(text)).await.unwrap();
            short.close().await.unwrap();
        }
    }));
    for task in tasks {
        task.await;
    }
    test.assert_undrained();
    drop((guest, top, mid, base, over));
    test.graph.shutdown().await.check_leaks().unwrap();
}

/// Row 45 (80fc5d2600, 31b2ddfea3, 6bc0bcc89f, bb092d6d8f, e462c6d27d, 67446e605d, 1dbc7d3442). The
/// graph's lock polled while its holder had locked a thread's context that a polled coroutine
/// needed. Here there is one lock, never held across a wait: drains, changes, opens, closes and
/// requests all complete under each schedule.
#[test]
fn deadlock_of_all_operations_at_once() {
    run_schedules(60, all_operations);
}

/// Row 46 (f1bf3be14b to 91ba0e1c38 and fc1d2f3eac; 10.0.2 still has it). The main thread took the
/// write lock and then drained; a request inside wanted the lock for reading, and each waited for
/// the other. Here a change drains without the lock: the request takes it and completes.
/// `graph/tests/schedules` searches all schedules for the deadlock.
#[test]
fn deadlock_change_against_a_request_that_takes_the_lock() {
    run_schedules(60, |test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let other = test.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        let (graph, node) = (test.graph.clone(), top.clone());
        test.script.at("top", Point::Read, move || {
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
        let change = test.graph.change().replace(&top, &other);
        commit(change).await.unwrap();
        request.await.unwrap();
        assert_eq!((top.count(), base.count()), (2, 2), "ours, and the script's");
    });
}

/// Row 47 (ace5a161ea). After an edge had been removed, the drain looked up the thread to wait in
/// at the child's end of the edge, which was empty by then. Here a drain waits for the node that is
/// drained, whatever happens to edges meanwhile.
#[test]
fn deadlock_drain_of_a_child_that_is_detached() {
    run_schedules(40, |test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::READ);
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        let drain = {
            let (graph, base) = (test.graph.clone(), base.clone());
            bds_io::spawn(async move {
                let section = graph.drain(&base).await;
                bds_io::yield_now().await;
                drop(section);
            })
        };
        test.graph.set_backing(&top, None).await.unwrap();
        drain.await;
        request.await.unwrap();
        assert_eq!(base.count(), 1);
        test.assert_undrained();
    });
}

/// The exit of a job: releases all its nodes.
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

/// Row 49 (794f01414f; GitLab 780). A job's exit released a node, which deleted, closed and flushed
/// it, all nested inside the exit, while another thread waited for the lock that the exit held.
/// Here a release does no I/O; closing is a separate, awaited step, one node after the other.
#[test]
fn deadlock_close_and_flush_inside_a_jobs_exit() {
    run(|test| async move {
        let chain = test.chain(["top", "mid", "base"]).await;
        let job = Arc::new(Exit(std::sync::Mutex::new(chain.into())));
        let known: Arc<dyn Stoppable> = job.clone();
        test.graph.on_shutdown(ShutdownStage::Jobs, &known);
        test.script.log();
        job.stop().await.unwrap();
        assert_eq!(test.script.log(), [""; 0]);
        // A flush that does not complete blocks only the task that awaits it.
        test.script.at("top", Point::Flush, || async {
            bds_io::sleep(Duration::from_secs(3600)).await;
            Ok(())
        });
        let mut reap = Box::pin(test.graph.reap());
        assert!(futures_util::poll!(&mut reap).is_pending());
        test.idle().await;
        let meanwhile = {
            let _lock = test.graph.0.core.lock();
            test.script.log()
        };
        assert_eq!(meanwhile, ["flush top"]);
        let closed: Vec<String> = reap.await.into_iter().map(|report| report.name).collect();
        assert_eq!(closed, ["top", "mid", "base"]);
        let log = test.script.log();
        assert_eq!(log, ["close top", "flush mid", "close mid", "flush base", "close base"]);
    });
}

/// Row 50 (a77fd4bb29, 960d5fb3e8). A drain that looped inside a coroutine blocked the coroutine it
/// waited for. Here a drain inside a request waits as any other: other tasks run, the timeout
/// expires, and when the request completes, the node is drained.
#[test]
fn deadlock_drain_started_inside_a_request() {
    run(|test| async move {
        let node = test.part("disk").await;
        let other = test.part("other").await;
        let guest = root(&node, "guest", Access::READ);
        let (graph, inner) = (test.graph.clone(), node.clone());
        test.script.at("disk", Point::Read, move || {
            let (graph, inner) = (graph.clone(), inner.clone());
            async move {
                let timeout = Duration::from_millis(10);
                let error = graph.drain_within(&inner, timeout).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::WouldWait);
                assert!(error.to_string().contains("1 requests"), "{error}");
                Ok(())
            }
        });
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        test.idle().await;
        let bystander = root(&other, "bystander", Access::READ);
        read(&bystander).await.unwrap();
        let drained = test.graph.drain(&node).await;
        assert_eq!(node.in_flight(), 0);
        drop(drained);
        request.await.unwrap();
        test.assert_undrained();
    });
}
