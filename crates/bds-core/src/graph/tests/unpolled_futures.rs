//! Tests graph operations whose futures are not polled again, or dropped when they have completed:
//! nothing waits for them, and no report is lost.

use bds_io::{Sim, SimConfig};

use crate::graph::{Graph, NodeRef};
use crate::options::Options;
use crate::request::{Backend, BackendOptions};
use crate::test_kit::disk::{Config, DiskGraph, On};

/// A graph with a node that was written to and will fail to flush.
fn setup(seed: u64) -> (Sim, DiskGraph, NodeRef) {
    let sim = Sim::new(seed, SimConfig::calm());
    let disks = DiskGraph::new();
    let node = sim.block_on(async {
        let config = Config { inline: true, ..Config::default() };
        let (node, state) = disks.node("disk", vec![0; 1 << 20], config).await;
        state.fail_always(On::FlushToDisk, None);
        let writer = BackendOptions { writable: true, ..Default::default() };
        Backend::new(&node, writer).unwrap().write_at(0, b"x").unwrap();
        node
    });
    (sim, disks, node)
}

/// Stops polling the operation after `n` polls until everything has come to rest, and then drops
/// it. False if it had completed.
fn completes_unpolled<F: Future>(
    n: usize,
    operation: impl FnOnce(Graph, NodeRef) -> F,
    what: &str,
) -> bool {
    let (sim, disks, node) = setup(7);
    let graph = disks.graph().clone();
    let Some(unpolled) = sim.keep_at(operation(graph.clone(), node), n) else { return false };
    sim.block_on(async {
        // The turn of changes is free, whatever the operation was doing.
        let other = disks.open_node("other", vec![0; 1 << 20], Config::default()).await;
        let options = Options::parse("read-only=off").unwrap();
        if let Ok((other, _)) = other {
            graph.change().own(&other).commit().await.unwrap();
            let _unsupported = graph.reopen(&other, options).await;
            drop(graph.drain(&other).await);
        }
    });
    if n > 0 {
        assert!(graph.find("disk").is_err(), "{what} unpolled at {n}: it has completed");
    }
    drop(unpolled);
    sim.run_until_idle();
    if n > 0 {
        let reports = sim.block_on(async { graph.reports() });
        let names: Vec<&str> = reports.iter().map(|report| report.name.as_str()).collect();
        assert_eq!(names, ["disk"], "{what} unpolled at {n}");
        assert!(reports[0].flush_error.is_some());
    }
    true
}

#[test]
fn an_unpolled_close_completes_and_its_report_is_kept() {
    let close = |n| completes_unpolled(n, |_, node| node.close(), "close");
    let points = (0..100).take_while(|n| close(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}

#[test]
fn an_unpolled_remove_completes_and_its_report_is_kept() {
    let remove =
        |n| completes_unpolled(n, |graph, node| graph.change().remove(node).commit(), "remove");
    let points = (0..100).take_while(|n| remove(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}

#[test]
fn an_unpolled_shutdown_completes_and_its_report_is_kept() {
    let shutdown = |n| {
        let shut = |graph: Graph, node: NodeRef| async move {
            drop(node);
            graph.shutdown().await
        };
        completes_unpolled(n, shut, "shutdown")
    };
    let points = (0..100).take_while(|n| shutdown(*n)).count();
    assert!((2..100).contains(&points), "{points}");
}
