//! Closings, reaps and the end of a graph wait for operations whose requests were dropped.

use std::sync::Arc;

use futures_util::poll;

use super::fake::{Config, House, Op, State};
use super::{ended, iov, run, settle};
use crate::driver::WriteFlags;
use crate::graph::{CloseError, NodeRef};
use crate::options::Options;
use crate::request::Backend;

fn slow(options: Options) -> Config {
    Config { turns: 30, options, ..Config::default() }
}

/// Begins a write and drops its request; the driver goes on with it.
async fn leave_a_write(disk: &Backend) {
    let mut write = Box::pin(disk.write(0, iov(&[2; 512], 1), WriteFlags::empty()));
    assert!(poll!(write.as_mut()).is_pending());
    drop(write);
}

/// A node with a write under way that nobody waits for, and no backend any more.
async fn left_behind(house: &House) -> (NodeRef, Arc<State>) {
    let (disk, state) = house.disk(vec![0; 512], slow(Options::new())).await;
    let node = disk.node().unwrap();
    leave_a_write(&disk).await;
    drop(disk);
    assert_eq!(state.bytes(), [0; 512], "the driver is at it");
    (node, state)
}

#[test]
fn a_close_waits_for_a_write_that_nobody_waits_for() {
    for seed in 0..20 {
        run(seed, async {
            let house = House::new();
            let (node, state) = left_behind(&house).await;
            let report = node.close().await.expect("nobody holds it by name");
            assert!(report.is_clean());
            assert_eq!(state.bytes(), [2; 512], "seed {seed}: it ended first");
            let log = state.take_log();
            assert_eq!(log.last(), Some(&Op::FlushToDisk), "seed {seed}: and is durable: {log:?}");
        });
    }
}

#[test]
fn a_close_that_others_prevent_does_not_wait_first() {
    run(1, async {
        let house = House::new();
        let (node, state) = left_behind(&house).await;
        let other = node.clone();
        let CloseError::InUse { node, holders } = node.close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
        assert_eq!(state.bytes(), [0; 512], "told at once");
        drop(other);
        assert!(node.close().await.unwrap().is_clean());
    });
}

#[test]
fn a_reap_waits_for_a_write_that_nobody_waits_for() {
    for seed in 0..20 {
        run(seed, async {
            let house = House::new();
            let (node, state) = left_behind(&house).await;
            drop(node);
            let reports = house.graph().reap().await;
            assert_eq!(reports.len(), 1, "seed {seed}: the node died of it");
            assert!(reports[0].is_clean());
            assert_eq!(state.bytes(), [2; 512]);
        });
    }
}

#[test]
fn a_reap_does_not_wait_where_somebody_keeps_the_node() {
    run(2, async {
        let house = House::new();
        let (node, state) = left_behind(&house).await;
        let graph = house.graph().clone();
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
fn the_end_of_a_graph_waits_for_a_write_that_nobody_waits_for() {
    run(3, async {
        let house = House::new();
        let (node, state) = left_behind(&house).await;
        drop((node, house));
        let watch = Arc::downgrade(&state);
        settle().await;
        assert_eq!(state.bytes(), [2; 512]);
        assert_eq!(state.take_log().last(), Some(&Op::FlushToDisk));
        drop(state);
        assert!(watch.upgrade().is_none(), "the driver is closed and gone");
    });
}

/// The child's own write was left behind; the parent's close waits for it, and the child ends with its parent.
#[test]
fn a_close_waits_for_what_keeps_a_child_open() {
    for seed in 0..20 {
        run(seed, async {
            let house = House::new();
            let (child, state) = house.node("disk", vec![0; 512], slow(Options::new())).await;
            let options = Options::new().with("file", "disk");
            let top = Config { passes: true, is_filter: true, options, ..Config::default() };
            let (top, _) = house.node("top", Vec::new(), top).await;
            let disk = super::fake::backend(&child);
            leave_a_write(&disk).await;
            drop((disk, child));
            let mut close = bds_io::spawn(top.close());
            let report = ended(&mut close).await.expect("it ends").expect("nobody holds it");
            let below: Vec<&str> = report.below.iter().map(|report| &*report.name).collect();
            assert_eq!(below, ["disk"], "seed {seed}");
            assert!(report.is_clean());
            assert_eq!(state.bytes(), [2; 512]);
        });
    }
}
