//! Deadlocks of QEMU (2013 to 2025), re-created on this graph and run under many schedules. Row
//! numbers are those of `docs/lifecycle-bugs.md`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bds_io::{Sim, SimConfig};

use super::program::{backend, graph, image};
use super::regressions::{discard, under_schedules};
use crate::ErrorKind;
use crate::driver::WriteFlags;
use crate::graph::{Graph, NodeRef, walk};
use crate::request::Backend;
use crate::test_kit::forwarding::{Forwarder, block};
use crate::test_kit::yield_times;

async fn open(graph: &Graph, name: &str, backing: Option<&str>) -> NodeRef {
    graph.open(image(name, backing)).await.unwrap()
}

/// Reads until the other handles are dropped.
async fn keep_reading(backend: Arc<Backend>) -> usize {
    let mut count = 0;
    while Arc::strong_count(&backend) > 1 {
        backend.read(0, block()).await.unwrap();
        count += 1;
        bds_io::yield_now().await;
    }
    count
}

/// Row 45. The taker of the graph's write lock waited for others while it held something that they
/// needed. Here it is a drained section: two tasks hold one on the same nodes, and both change the
/// graph inside.
#[test]
fn changes_inside_two_drained_sections_do_not_block_each_other() {
    under_schedules(200, |graph| async move {
        let base = open(&graph, "base", None).await;
        let top = open(&graph, "top", Some("base")).await;
        let other = open(&graph, "other", None).await;
        let guest = backend(&top, "guest", true);
        let reader = bds_io::spawn(keep_reading(Arc::clone(&guest)));
        let change = |to: Option<NodeRef>| {
            let (graph, base, top) = (graph.clone(), base.clone(), top.clone());
            async move {
                let drained = graph.drain(&base).await;
                graph.set_backing(&top, to.as_ref()).await.unwrap();
                yield_times(2).await;
                drop(drained);
            }
        };
        let one = bds_io::spawn(change(None));
        let two = bds_io::spawn(change(Some(other.clone())));
        one.await;
        two.await;
        drop(guest);
        reader.await;
    });
}

/// Row 46. One thread takes the lock and then waits until a parent is empty; a request inside that
/// parent needs the lock to go on. Here the inner gate of a chain is drained and re-pointed while
/// requests are on their way to it.
#[test]
fn a_request_passes_an_inner_gate_before_it_is_closed() {
    under_schedules(300, |graph| async move {
        let base = open(&graph, "base", None).await;
        let mid = open(&graph, "mid", Some("base")).await;
        let top = open(&graph, "top", Some("mid")).await;
        let other = open(&graph, "other", None).await;
        let backends = ["one", "two"].map(|name| backend(&top, name, false));
        let readers =
            backends.each_ref().map(|guest| bds_io::spawn(keep_reading(Arc::clone(guest))));
        yield_times(3).await;
        graph.set_backing(&mid, Some(&other)).await.unwrap();
        let drained = graph.drain(&other).await;
        assert_eq!((top.in_flight(), mid.in_flight(), other.in_flight()), (0, 0, 0));
        drop(drained);
        graph.replace(&other, &base).await.unwrap();
        drop(backends);
        for reader in readers {
            reader.await;
        }
    });
}

/// The same in the order that deadlocks: found within a few schedules.
#[test]
#[should_panic(expected = "deadlock")]
fn closing_the_inner_gate_first_deadlocks() {
    for seed in 0..20 {
        let sim = Sim::new(seed, SimConfig::calm());
        let (graph, _) = graph(sim.fs());
        graph.0.core.topology.lock_first.store(true, Ordering::Relaxed);
        sim.block_on(async {
            let base = open(&graph, "base", None).await;
            let top = open(&graph, "top", Some("base")).await;
            let guest = backend(&top, "guest", false);
            let reader = bds_io::spawn(keep_reading(Arc::clone(&guest)));
            yield_times(4).await;
            drop(graph.drain(&base).await);
            drop(guest);
            reader.await;
        });
    }
}

/// Row 47. When a child had been detached, the wait that followed used the child's side, which had
/// been cleared already, and not the parent's. Here no request is inside the parent while its child
/// is exchanged (the driver asserts it), and a drain of the parent waits for the parent's own
/// requests.
#[test]
fn a_drain_waits_for_the_parent_after_its_child_is_detached() {
    under_schedules(200, |graph| async move {
        let base = open(&graph, "base", None).await;
        let top = open(&graph, "top", Some("base")).await;
        let guest = backend(&top, "guest", false);
        let reader = bds_io::spawn(keep_reading(Arc::clone(&guest)));
        for to in [None, Some(&base), None] {
            yield_times(2).await;
            graph.set_backing(&top, to).await.unwrap();
            let drained = graph.drain(&top).await;
            assert_eq!(top.in_flight(), 0);
            Forwarder::of_node(&top).forbid();
            yield_times(2).await;
            Forwarder::of_node(&top).allow();
            drop(drained);
        }
        drop(guest);
        reader.await;
    });
}

/// Row 49. The last release of a node, deep inside the end of a job, closed and flushed it on the
/// spot, while another thread waited for a lock that the first one held. Here a release only
/// decrements a count; closing is awaited by the caller of reap.
#[test]
fn the_last_release_does_no_io_where_it_happens() {
    under_schedules(200, |graph| async move {
        let base = open(&graph, "base", None).await;
        let top = open(&graph, "top", Some("base")).await;
        let guest = backend(&top, "guest", true);
        guest.write(0, block(), WriteFlags::empty()).await.unwrap();
        let changing_task = {
            let (graph, base) = (graph.clone(), base.clone());
            bds_io::spawn(async move { graph.reopen(&base, discard()).await })
        };
        let leaf = walk::child(&top, "file").unwrap().0;
        let drained = graph.drain(&base).await;
        let top_id = top.id();
        drop(guest);
        drop(top);
        assert!(graph.acquire(top_id).is_err(), "gone at once");
        assert_eq!(leaf.in_flight(), 0);
        yield_times(3).await;
        // Its last writes would go below a drained section: they are deferred, and reap does not
        // wait for them.
        assert!(graph.reap().await.is_empty());
        drop(drained);
        changing_task.await.unwrap();
        drop(leaf);
        // In the background or here, but not before the section has ended.
        assert!(graph.reap().await.iter().all(|report| report.is_clean()));
    });
}

/// Row 50. A drain inside a coroutine blocked the coroutine it waited for. Here a drain is a
/// future: one task may wait for its own request and for the drain at once.
#[test]
fn a_task_may_drain_a_node_that_its_own_request_is_in() {
    under_schedules(200, |graph| async move {
        let base = open(&graph, "base", None).await;
        let top = open(&graph, "top", Some("base")).await;
        let guest = backend(&top, "guest", false);
        let mut read = Box::pin(guest.read(0, block()));
        assert!(futures_util::poll!(&mut read).is_pending());
        let (read, drained) = futures_util::join!(read, graph.drain(&base));
        read.unwrap();
        assert_eq!(top.in_flight(), 0);
        drop(drained);
        guest.read(0, block()).await.unwrap();
    });
}

/// Row 60. A job froze its chain only after it had reopened a node, which let others run; one of
/// them removed the base. Here the chain is frozen before the first await: later changes are
/// refused, earlier ones are seen.
#[test]
fn a_chain_frozen_before_the_first_await_keeps_its_base() {
    under_schedules(300, |graph| async move {
        let base = open(&graph, "base", None).await;
        let mid = open(&graph, "mid", Some("base")).await;
        let top = open(&graph, "top", Some("mid")).await;
        let other = {
            let (graph, mid) = (graph.clone(), mid.clone());
            bds_io::spawn(async move { graph.set_backing(&mid, None).await })
        };
        yield_times(1).await;
        let job = async {
            let frozen = graph.freeze_chain(&top, &base, "job 'stream0'")?;
            graph.reopen(&top, discard()).await?;
            yield_times(3).await;
            assert_eq!(walk::next_below(&mid).unwrap().id(), base.id(), "the base stayed");
            drop(frozen);
            Ok::<(), crate::Error>(())
        };
        match (job.await, other.await) {
            (Ok(()), Err(refused)) => assert_eq!(refused.kind(), ErrorKind::InUse),
            // The change came after the job.
            (Ok(()), Ok(())) => {}
            (Err(error), Ok(())) => assert_eq!(error.kind(), ErrorKind::InvalidInput),
            (Err(one), Err(two)) => panic!("one of the two goes through: {one}; {two}"),
        }
    });
}
