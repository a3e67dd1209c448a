//! Graph operations whose futures are kept without being polled, or dropped when they have ended: nothing waits for them, and no
//! report is lost.

use bds_io::{Sim, SimConfig};

use crate::example;
use crate::graph::{Graph, NodeRef};
use crate::options::Options;
use crate::request::{Backend, BackendOptions};

/// A world with a graph, and a node that was written to and will fail to flush.
fn world(seed: u64) -> (Sim, Graph, NodeRef) {
    let sim = Sim::new(seed, SimConfig::calm());
    let graph = example::graph();
    let node = sim.block_on(async {
        let node =
            example::open(&graph, "driver=memory,node-name=disk,size=1M,fail-flush=on").await;
        let node = node.unwrap();
        let writer = BackendOptions { writable: true, ..Default::default() };
        Backend::new(&node, writer).unwrap().write_at(0, b"x").unwrap();
        node
    });
    (sim, graph, node)
}

/// Keeps the operation after `n` polls of the world until everything has come to rest, and then drops it. False: it had ended.
fn ends_unheard<F: Future>(
    n: usize,
    operation: impl FnOnce(Graph, NodeRef) -> F,
    what: &str,
) -> bool {
    let (sim, graph, node) = world(7);
    let Some(kept) = sim.keep_at(operation(graph.clone(), node), n) else { return false };
    sim.block_on(async {
        // The turn of changes is free, whatever the operation was about to do.
        let other = example::open(&graph, "driver=memory,node-name=other,size=1M").await;
        let options = Options::parse("read-only=off").unwrap();
        if let Ok(other) = other {
            graph.change().own(&other).commit().await.unwrap();
            let _unsupported = graph.reopen(&other, options).await;
            drop(graph.drain(&other).await);
        }
    });
    if n > 0 {
        assert!(graph.find("disk").is_err(), "{what} kept at {n}: it has ended");
    }
    drop(kept);
    sim.run_until_idle();
    if n > 0 {
        let reports = sim.block_on(async { graph.reports() });
        let names: Vec<&str> = reports.iter().map(|report| report.name.as_str()).collect();
        assert_eq!(names, ["disk"], "{what} kept at {n}");
        assert!(reports[0].flush_error.is_some());
    }
    true
}

#[test]
fn a_closing_that_is_kept_and_never_asked_leaves_its_report_to_the_graph() {
    let close = |n| ends_unheard(n, |_, node| node.close(), "close");
    let points = (0..100).take_while(|n| close(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}

#[test]
fn a_removal_that_is_kept_and_never_asked_leaves_its_report_to_the_graph() {
    let remove = |n| ends_unheard(n, |graph, node| graph.change().remove(node).commit(), "remove");
    let points = (0..100).take_while(|n| remove(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}

#[test]
fn a_shutdown_that_is_kept_and_never_asked_leaves_its_report_to_the_graph() {
    let shutdown = |n| {
        let shut = |graph: Graph, node: NodeRef| async move {
            drop(node);
            graph.shutdown().await
        };
        ends_unheard(n, shut, "shutdown")
    };
    let points = (0..100).take_while(|n| shutdown(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}
