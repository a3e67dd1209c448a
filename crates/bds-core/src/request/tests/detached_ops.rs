//! Tests that closes, reaps and the end of a graph wait for detached operations, whose requests
//! were dropped.

use std::sync::Arc;

use futures_util::poll;

use crate::driver::WriteFlags;
use crate::graph::{CloseError, NodeRef};
use crate::options::Options;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, Op, State};
use crate::test_kit::{ended, iov, let_tasks_run, run};

fn slow(options: Options) -> Config {
    Config { turns: 30, options, ..Config::default() }
}

/// Begins a write and drops its request; the driver goes on.
async fn detach_write(disk: &Backend) {
    let mut write = Box::pin(disk.write(0, iov(&[2; 512], 1), WriteFlags::empty()));
    assert!(poll!(write.as_mut()).is_pending());
    drop(write);
}

/// A node with a detached write and without a backend.
async fn node_with_detached_write(disks: &DiskGraph) -> (NodeRef, Arc<State>) {
    let (disk, state) = disks.disk(vec![0; 512], slow(Options::new())).await;
    let node = disk.node().unwrap();
    detach_write(&disk).await;
    drop(disk);
    assert_eq!(state.bytes(), [0; 512], "the driver is at it");
    (node, state)
}

#[test]
fn close_waits_for_a_detached_write() {
    for seed in 0..20 {
        run(seed, async {
            let disks = DiskGraph::new();
            let (node, state) = node_with_detached_write(&disks).await;
            let report = node.close().await.expect("no other holder");
            assert!(report.is_clean());
            assert_eq!(state.bytes(), [2; 512], "seed {seed}: it ended first");
            let log = state.take_log();
            assert_eq!(log.last(), Some(&Op::FlushToDisk), "seed {seed}: and is durable: {log:?}");
        });
    }
}

#[test]
fn close_of_a_node_in_use_fails_at_once() {
    run(1, async {
        let disks = DiskGraph::new();
        let (node, state) = node_with_detached_write(&disks).await;
        let other = node.clone();
        let CloseError::InUse { node, holders } = node.close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
        assert_eq!(state.bytes(), [0; 512], "refused at once");
        drop(other);
        assert!(node.close().await.unwrap().is_clean());
    });
}

#[test]
fn reap_waits_for_a_detached_write() {
    for seed in 0..20 {
        run(seed, async {
            let disks = DiskGraph::new();
            let (node, state) = node_with_detached_write(&disks).await;
            drop(node);
            let reports = disks.graph().reap().await;
            assert_eq!(reports.len(), 1, "seed {seed}: the node was dead");
            assert!(reports[0].is_clean());
            assert_eq!(state.bytes(), [2; 512]);
        });
    }
}

#[test]
fn reap_does_not_wait_for_a_node_in_use() {
    run(2, async {
        let disks = DiskGraph::new();
        let (node, state) = node_with_detached_write(&disks).await;
        let graph = disks.graph().clone();
        let mut reap = Box::pin(graph.reap());
        for _ in 0..20 {
            if let std::task::Poll::Ready(reports) = poll!(reap.as_mut()) {
                assert!(reports.is_empty());
                assert_eq!(state.bytes(), [0; 512], "it did not wait");
                return drop(node);
            }
            bds_io::yield_now().await;
        }
        panic!("a node in use held up the reap");
    });
}

#[test]
fn dropping_the_graph_waits_for_a_detached_write() {
    run(3, async {
        let disks = DiskGraph::new();
        let (node, state) = node_with_detached_write(&disks).await;
        drop((node, disks));
        let watch = Arc::downgrade(&state);
        let_tasks_run().await;
        assert_eq!(state.bytes(), [2; 512]);
        assert_eq!(state.take_log().last(), Some(&Op::FlushToDisk));
        drop(state);
        assert!(watch.upgrade().is_none(), "the driver is closed and gone");
    });
}

/// The child has a detached write; the parent's close waits for it, and the child is closed with
/// its parent.
#[test]
fn close_waits_for_a_detached_write_of_a_child() {
    for seed in 0..20 {
        run(seed, async {
            let disks = DiskGraph::new();
            let (child, state) = disks.node("disk", vec![0; 512], slow(Options::new())).await;
            let options = Options::new().with("file", "disk");
            let top = Config { forwards: true, is_filter: true, options, ..Config::default() };
            let (top, _) = disks.node("top", Vec::new(), top).await;
            let disk = crate::test_kit::disk::backend(&child);
            detach_write(&disk).await;
            drop((disk, child));
            let mut close = bds_io::spawn(top.close());
            let report = ended(&mut close).await.expect("it ends").expect("no other holder");
            let below: Vec<&str> = report.below.iter().map(|report| &*report.name).collect();
            assert_eq!(below, ["disk"], "seed {seed}");
            assert!(report.is_clean());
            assert_eq!(state.bytes(), [2; 512]);
        });
    }
}
