//! Defects that the search has found, each as a small test.

use std::sync::atomic::Ordering;

use bds_io::{Sim, SimConfig};

use super::audit::audit;
use super::program::{backend, graph, image};
use crate::ErrorKind;
use crate::driver::WriteFlags;
use crate::graph::{Graph, walk};
use crate::options::Options;
use crate::test_kit::forwarding::block;
use crate::test_kit::yield_times;

/// Runs a test under many schedules.
pub(super) fn under_schedules<F: Future<Output = ()>>(count: u64, test: impl Fn(Graph) -> F) {
    for seed in 0..count {
        let sim = Sim::new(seed, SimConfig { max_turns: 100_000, ..SimConfig::calm() });
        let (graph, _) = graph(sim.fs());
        sim.block_on(test(graph.clone()));
        sim.run_until_idle();
        sim.block_on(async {
            audit(&graph, false);
            let report = graph.shutdown().await;
            assert!(report.leaked.is_empty(), "seed {seed}: {:?}", report.leaked);
        });
    }
}

pub(super) fn discard() -> Options {
    Options::parse("discard=unmap").unwrap()
}

#[test]
fn an_edge_added_and_moved_in_one_change_has_one_target() {
    under_schedules(1, |graph| async move {
        let a = graph.open(image("a", None)).await.unwrap();
        let b = graph.open(image("b", None)).await.unwrap();
        let c = graph.open(image("c", None)).await.unwrap();
        let change = graph.change().set_backing(&a, Some(&b)).set_backing(&a, Some(&c));
        change.commit().await.unwrap();
        assert_eq!(walk::next_below(&a).unwrap().name(), "c");
        assert_eq!((b.parents().len(), c.parents().len()), (0, 1));
        audit(&graph, false);
        // A drain of the node that the edge only passed does not reach the parent.
        let drained = graph.drain(&b).await;
        assert_eq!(a.quiesce_count(), 0);
        drop(drained);
        // Added, moved and removed again.
        let other = graph.open(image("d", None)).await.unwrap();
        let change = graph.change().set_backing(&other, Some(&b)).set_backing(&other, Some(&c));
        change.set_backing(&other, None).commit().await.unwrap();
        assert_eq!((b.parents().len(), c.parents().len()), (0, 1));
        assert_eq!((b.count(), c.count()), (1, 2));
    });
}

#[test]
fn a_change_that_owns_a_node_twice_is_refused() {
    under_schedules(1, |graph| async move {
        let a = graph.open(image("a", None)).await.unwrap();
        let twice = graph.change().own(&a).own(&a).commit().await.unwrap_err();
        assert_eq!(twice.kind(), ErrorKind::AlreadyExists);
        assert!(!graph.is_owned(a.id()));
        graph.change().own(&a).disown(&a).own(&a).commit().await.unwrap();
        assert!(graph.is_owned(a.id()));
    });
}

/// A node is being closed, and its child seems to die with it and is not flushed yet; just then the
/// child is acquired and drained. The late flush used to wait at the child's gate while it held the
/// core, and a reap (or open, or change) inside the drained section waited for the core.
#[test]
fn reaping_inside_a_drained_section_does_not_wait_for_its_end() {
    for turns in 0..24 {
        under_schedules(8, |graph| async move {
            let node = graph.open(image("node", None)).await.unwrap();
            let guest = backend(&node, "guest", true);
            guest.write(0, block(), WriteFlags::empty()).await.unwrap();
            let leaf = walk::child(&node, "file").unwrap().0.id();
            drop(guest);
            drop(node);
            let reaping = {
                let graph = graph.clone();
                bds_io::spawn(async move { graph.reap().await })
            };
            yield_times(turns).await;
            if let Ok(leaf) = graph.acquire(leaf) {
                let drained = graph.drain(&leaf).await;
                assert_eq!(leaf.in_flight(), 0);
                assert!(graph.reap().await.iter().all(|report| report.is_clean()));
                yield_times(2).await;
                assert_eq!(leaf.in_flight(), 0);
                drop(drained);
            }
            reaping.await;
        });
    }
}

#[test]
fn a_node_that_dies_in_drain_all_is_closed_afterwards() {
    under_schedules(20, |graph| async move {
        let options = Options::new().with("driver", "leaf").with("node-name", "leaf");
        let leaf = graph.open(options).await.unwrap();
        let drained = graph.drain_all().await;
        drop(leaf);
        assert!(graph.reap().await.is_empty(), "closed in a section of everything");
        yield_times(3).await;
        drop(drained);
        yield_times(20).await;
        assert_eq!(graph.dump(), "");
    });
}

/// A reopen holds the turn of changes, and its driver must write to a node that another task has
/// drained, which commits a change before it ends the section. Each used to wait for the other.
#[test]
fn a_reopen_does_not_block_changes_inside_a_section_below_it() {
    under_schedules(200, |graph| async move {
        let node = graph.open(image("node", None)).await.unwrap();
        let guest = backend(&node, "guest", true);
        guest.write(0, block(), WriteFlags::empty()).await.unwrap();
        let leaf = walk::child(&node, "file").unwrap().0;
        let reopening = {
            let (graph, node) = (graph.clone(), node.clone());
            bds_io::spawn(async move { graph.reopen(&node, discard()).await })
        };
        let drained = graph.drain(&leaf).await;
        yield_times(3).await;
        graph.change().own(&node).commit().await.unwrap();
        yield_times(3).await;
        assert_eq!(leaf.in_flight(), 0);
        drop(drained);
        reopening.await.unwrap();
        assert!(node.flags().discard);
    });
}

/// The same for a handover, which writes everything back.
#[test]
fn a_handover_does_not_block_changes_inside_a_section_below_it() {
    under_schedules(200, |graph| async move {
        let node = graph.open(image("node", None)).await.unwrap();
        let guest = backend(&node, "guest", true);
        guest.write(0, block(), WriteFlags::empty()).await.unwrap();
        drop(guest);
        let leaf = walk::child(&node, "file").unwrap().0;
        for is_active in [false, true] {
            let handing_over = {
                let (graph, node) = (graph.clone(), node.clone());
                bds_io::spawn(async move {
                    match is_active {
                        true => graph.activate(&node).await,
                        false => graph.inactivate(&node).await,
                    }
                })
            };
            let drained = graph.drain(&leaf).await;
            yield_times(3).await;
            let change = graph.change();
            let change = if is_active { change.disown(&node) } else { change.own(&node) };
            change.commit().await.unwrap();
            drop(drained);
            handing_over.await.unwrap();
            assert_eq!((node.is_active(), leaf.is_active()), (is_active, is_active));
        }
    });
}

/// A change held an edge while it closed what it removed; a drain waited for that edge, and the
/// close waited for the drain.
#[test]
fn a_removed_node_whose_own_edge_was_moved_is_closed_under_drains() {
    under_schedules(200, |graph| async move {
        let node = graph.open(image("node", None)).await.unwrap();
        let other = graph.open(image("other", None)).await.unwrap();
        let leaf = walk::child(&other, "file").unwrap().0;
        let filter = Options::new().with("driver", "filter").with("node-name", "filter");
        let filter = graph.open(filter.with("file", "node")).await.unwrap();
        let draining = {
            let (graph, leaf) = (graph.clone(), leaf.clone());
            bds_io::spawn(async move {
                for _ in 0..3 {
                    let drained = graph.drain(&leaf).await;
                    yield_times(2).await;
                    drop(drained);
                }
            })
        };
        yield_times(2).await;
        let change = graph.change().replace_child(&filter, "file", &other).remove(filter);
        assert_eq!(change.commit().await.unwrap().closed.len(), 1);
        draining.await;
        drop(node);
    });
}

/// Gates to a node above another one that the same change drains used to stay closed for the driver
/// that prepares.
#[test]
fn a_reopen_may_write_through_a_child_that_the_same_change_drains() {
    under_schedules(20, |graph| async move {
        let _old = graph.open(image("old", None)).await.unwrap();
        let new = graph.open(image("new", None)).await.unwrap();
        let below = graph.open(image("below", Some("old"))).await.unwrap();
        let options = Options::new().with("driver", "image").with("node-name", "above");
        let above = graph.open(options.with("file", "below")).await.unwrap();
        let guest = backend(&above, "guest", true);
        guest.write(0, block(), WriteFlags::empty()).await.unwrap();
        let change = graph.change().set_backing(&below, Some(&new)).reopen(&above, discard());
        change.commit().await.unwrap();
        assert_eq!(walk::next_below(&below).unwrap().name(), "new");
        guest.read(0, block()).await.unwrap();
    });
}

/// The change's other edits of the same node used to count as another user.
#[test]
fn a_node_may_be_replaced_and_removed_in_one_change() {
    under_schedules(5, |graph| async move {
        let node = graph.open(image("node", None)).await.unwrap();
        let guest = backend(&node, "guest", true);
        let filter = Options::new().with("driver", "filter").with("node-name", "filter");
        let filter = graph.open(filter.with("file", "node")).await.unwrap();
        graph.insert_filter(&node, &filter).await.unwrap();
        let report = graph.change().drop_filter(&filter).remove(filter).commit().await.unwrap();
        assert_eq!(report.closed.len(), 1);
        let overlay = graph.open(image("overlay", Some("node"))).await.unwrap();
        graph.append(&node, &overlay).await.unwrap();
        let change = graph.change().replace(&overlay, &node).remove(overlay.clone());
        let refused = change.commit().await.unwrap_err();
        assert!(
            refused.to_string().contains("in use by owner"),
            "our reference is left: {refused}"
        );
        let change = graph.change().replace(&overlay, &node).remove(overlay);
        assert!(change.commit().await.unwrap().closed.iter().all(|report| report.is_clean()));
        assert_eq!(guest.node().unwrap().name(), "node");
    });
}

/// A chain of 100,000 nodes (20,000 in an ordinary run), released at the top: closed in a loop,
/// parents first, on a stack too small for one frame per node.
#[test]
fn a_chain_of_any_length_is_closed_without_recursion() {
    let nodes = usize::try_from(super::budget()).unwrap().max(20_000);
    let test = move || {
        let sim = Sim::new(1, SimConfig::calm());
        let (graph, _) = graph(sim.fs());
        sim.block_on(async {
            let leaf = Options::new().with("driver", "leaf").with("node-name", "n0");
            let mut top = graph.open(leaf).await.unwrap();
            for number in 1..nodes {
                let filter = Options::new().with("driver", "filter").with("file", top.name());
                let filter = filter.with("node-name", format!("n{number}"));
                top = graph.open(filter).await.unwrap();
            }
            drop(top);
            let reports = graph.reap().await;
            assert_eq!(reports.len(), nodes);
            assert_eq!(reports[nodes - 1].name, "n0", "the lowest last");
            assert_eq!(graph.dump(), "");
        });
    };
    std::thread::Builder::new().stack_size(512 << 10).spawn(test).unwrap().join().unwrap();
}

/// A child's permissions used to be computed with its parents' old use first, which went down the
/// chain and back.
#[test]
fn append_cost_does_not_depend_on_the_chain_length() {
    let sim = Sim::new(1, SimConfig::calm());
    let (graph, drivers) = graph(sim.fs());
    sim.block_on(async {
        let mut top = graph.open(image("n0", None)).await.unwrap();
        let _guest = backend(&top, "guest", true);
        let mut costs = Vec::new();
        for number in 1..100 {
            let overlay = image(&format!("n{number}"), Some(top.name()));
            let overlay = graph.open(overlay).await.unwrap();
            let before = drivers.access_queries.load(Ordering::Relaxed);
            graph.append(&top, &overlay).await.unwrap();
            costs.push(drivers.access_queries.load(Ordering::Relaxed) - before);
            top = overlay;
        }
        assert_eq!(costs[10], costs[98], "{costs:?}");
    });
}
