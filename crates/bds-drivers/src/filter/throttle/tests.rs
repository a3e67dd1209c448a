//! Tests of throttle nodes without a graph: drain, dropped and unpolled requests, new limits.

use std::sync::Arc;
use std::time::Duration;

use bds_core::driver::{Precision, ReadFlags, WriteFlags, ZeroFlags};
use bds_core::rate::{Rate, RateLimits};
use bds_core::{Driver, Result};
use bds_io::{Buf, IoVec, Sim, SimConfig, Task, now, sleep, spawn};
use futures_util::future::join_all;
use serde_json::json;

use super::super::test_node;
use super::{Throttle, ThrottleGroups};

const MB: usize = 1 << 20;

/// A simulated disk on which only waiting takes time.
fn sim(seed: u64) -> Sim {
    Sim::new(seed, SimConfig { overtake_rate: 0.0, ..SimConfig::calm() })
}

/// 1 MiB a second, both directions together.
fn group() -> ThrottleGroups {
    let groups = ThrottleGroups::new();
    let bps_total = Rate::per_second(MB as u64);
    groups.create("g", RateLimits { bps_total, ..RateLimits::default() }).unwrap();
    groups
}

async fn node(groups: &ThrottleGroups, name: &str) -> Arc<dyn Driver> {
    let throttle = Throttle::new(groups.clone());
    test_node::open(&throttle, name, json!({"throttle-group": "g"})).await.unwrap()
}

fn one_mib() -> IoVec {
    Buf::zeroed(MB, 1).iov()
}

/// Starts a write of 1 MiB; the task returns when it completed, in milliseconds.
fn write(node: &Arc<dyn Driver>) -> Task<u128> {
    let node = Arc::clone(node);
    spawn(async move {
        paced_write(&*node).await.unwrap();
        now().as_millis()
    })
}

/// Waits as the request path does.
async fn paced_write(node: &dyn Driver) -> Result<()> {
    pace(node, MB as u64).await;
    node.write(0, one_mib(), WriteFlags::empty()).await
}

async fn pace(node: &dyn Driver, len: u64) {
    if let Some(turn) = node.pace(len) {
        turn.await;
    }
}

/// Lets tasks run until they are idle.
async fn run_until_idle() {
    sleep(Duration::from_nanos(1)).await;
}

#[test]
fn drain_releases_requests_of_this_node_only() {
    for seed in 0..20 {
        sim(seed).block_on(async {
            let groups = group();
            let (a, b) = (node(&groups, "a").await, node(&groups, "b").await);
            let first = write(&a).await;
            let ours: Vec<_> = (0..5).map(|_| write(&a)).collect();
            run_until_idle().await;
            let other = write(&b);
            sleep(Duration::from_millis(100)).await;
            a.drain_begin();
            let ended = join_all(ours).await;
            assert_eq!((first, ended), (0, vec![100; 5]), "seed {seed}");
            // A request that comes meanwhile does not wait either, whatever its kind.
            a.read(1 << 29, one_mib(), ReadFlags::empty()).await.unwrap();
            a.try_write(0, &one_mib()).unwrap().unwrap();
            assert_eq!(now().as_millis(), 100);
            a.drain_end();
            // Eight MiB went, of which 0.1 + 0.1 may: the rest has to leak before the next one.
            assert_eq!(other.await, 7900, "seed {seed}");
            assert_eq!(write(&a).await, 8900, "seed {seed}");
        });
    }
}

#[test]
fn limits_hold_between_two_drains() {
    sim(1).block_on(async {
        let groups = group();
        let a = node(&groups, "a").await;
        a.drain_begin();
        a.drain_end();
        write(&a).await;
        let waits = write(&a);
        run_until_idle().await;
        a.drain_begin();
        assert_eq!(waits.await, 0);
        a.drain_end();
        assert_eq!(write(&a).await, 1900);
    });
}

/// QEMU's 6fccbb475b: a member left its group while it owned the group's timer, and the requests of
/// the others hung.
#[test]
fn others_go_on_when_a_member_leaves() {
    for seed in 0..20 {
        sim(seed).block_on(async {
            let groups = group();
            let (a, b) = (node(&groups, "a").await, node(&groups, "b").await);
            write(&a).await;
            let ours: Vec<_> = (0..3).map(|_| write(&a)).collect();
            run_until_idle().await;
            let others: Vec<_> = (0..2).map(|_| write(&b)).collect();
            sleep(Duration::from_millis(500)).await;
            drop(ours);
            run_until_idle().await;
            assert_eq!(Arc::strong_count(&a), 1);
            drop(a);
            assert_eq!(groups.list()[0].members, ["b"]);
            let mut ended = join_all(others).await;
            ended.sort_unstable();
            assert_eq!(ended, [900, 1900], "seed {seed}");
            drop(b);
            groups.remove("g").unwrap();
        });
    }
}

/// A future that is neither polled nor dropped keeps its place in the queue, is granted, and blocks
/// no other.
#[test]
fn an_unpolled_request_blocks_no_other() {
    for seed in 0..20 {
        sim(seed).block_on(async {
            let groups = group();
            let (a, b) = (node(&groups, "a").await, node(&groups, "b").await);
            write(&a).await;
            let mut idle = Box::pin(paced_write(&*a));
            assert!(futures_util::poll!(idle.as_mut()).is_pending());
            let mut behind = Box::pin(paced_write(&*a));
            assert!(futures_util::poll!(behind.as_mut()).is_pending());
            let other = write(&b);
            behind.await.unwrap();
            // All three are granted, one a second, whichever is polled.
            assert!([1900, 2900].contains(&now().as_millis()), "seed {seed}");
            assert!([900, 1900, 2900].contains(&other.await), "seed {seed}");
            idle.await.unwrap();
            assert_eq!(write(&b).await, 3900, "seed {seed}");
        });
    }
}

#[test]
fn inline_requests_need_an_empty_queue_and_cost_only_if_done() {
    sim(1).block_on(async {
        let groups = group();
        let a = node(&groups, "a").await;
        // Declined by the child: costs nothing.
        assert!(a.try_read(1 << 29, &one_mib()).is_none());
        a.try_read(0, &one_mib()).unwrap().unwrap();
        assert!(a.try_read(0, &one_mib()).is_none());
        let waits = write(&a);
        run_until_idle().await;
        assert!(a.try_read(0, &Buf::zeroed(1, 1).iov()).is_none());
        assert_eq!(waits.await, 900);
        sleep(Duration::from_secs(5)).await;
        a.try_write(0, &one_mib()).unwrap().unwrap();
        assert_eq!(write(&a).await, 900 + 5000 + 900);
    });
}

#[test]
fn zero_writes_discards_and_compressed_writes_are_writes() {
    sim(1).block_on(async {
        let groups = ThrottleGroups::new();
        let bps_write = Rate::per_second(MB as u64);
        groups.create("g", RateLimits { bps_write, ..RateLimits::default() }).unwrap();
        let a = node(&groups, "a").await;
        let len = MB as u64;
        pace(&*a, len).await;
        let _done = a.write_zeroes(0, len, ZeroFlags::empty()).await.unwrap();
        pace(&*a, len).await;
        let _done = a.discard(0, len).await.unwrap();
        assert_eq!(now().as_millis(), 900);
        pace(&*a, len).await;
        a.write_compressed(0, one_mib()).await.unwrap();
        assert_eq!(now().as_millis(), 1900);
        write(&a).await;
        // Operations that write nothing do not wait.
        a.read(0, one_mib(), ReadFlags::empty()).await.unwrap();
        a.flush_to_disk().await.unwrap();
        a.block_status(0, len, Precision::Exact).await.unwrap();
        assert_eq!(now().as_millis(), 2900);
    });
}

#[test]
fn new_limits_apply_to_queued_requests() {
    sim(1).block_on(async {
        let groups = group();
        let a = node(&groups, "a").await;
        write(&a).await;
        let waits: Vec<_> = (0..3).map(|_| write(&a)).collect();
        sleep(Duration::from_millis(10)).await;
        let bps_total = Rate::per_second(10 * MB as u64);
        groups.set_limits("g", RateLimits { bps_total, ..RateLimits::default() }).unwrap();
        assert_eq!(join_all(waits).await, [10, 10, 110]);
        groups.set_limits("g", RateLimits::default()).unwrap();
        assert_eq!(write(&a).await, 110);
        let wrong = RateLimits { iops_size: 1, ..RateLimits::default() };
        assert!(groups.set_limits("g", wrong).is_err());
        assert!(groups.set_limits("h", RateLimits::default()).is_err());
    });
}
