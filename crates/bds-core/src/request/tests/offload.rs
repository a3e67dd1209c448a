//! Tests that a copy by the host, which is in flight at two nodes, waits for neither while it is in
//! flight at the other: a drain of both would wait for the copy, and the copy for its end.

use bds_io::Task;
use futures_util::future::{join, join_all};

use crate::driver::{Attempt, WriteFlags};
use crate::error::Result;
use crate::graph::NodeRef;
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, backend};
use crate::test_kit::{ended, iov, run, yield_times};

/// Two disks that requests stay in for some turns.
async fn two(disks: &DiskGraph, turns: usize) -> (NodeRef, NodeRef) {
    let slow = || Config { turns, ..Config::default() };
    let (one, _) = disks.node("one", vec![1; 1024], slow()).await;
    let (other, _) = disks.node("other", vec![2; 1024], slow()).await;
    (one, other)
}

fn copying(from: &Backend, to: &Backend) -> Task<Result<Attempt>> {
    let (from, to) = (from.clone(), to.clone());
    bds_io::spawn(async move { to.copy_range_from(&from, 0, 512, 16).await })
}

#[test]
fn a_copy_that_waits_at_the_gate_of_its_target_holds_up_no_drain_of_its_source() {
    run(1, async {
        let disks = DiskGraph::new();
        let (one, other) = two(&disks, 0).await;
        let (from, to) = (backend(&one), backend(&other));
        let of_target = disks.graph().drain(&other).await;
        let mut copy = copying(&from, &to);
        assert!(ended(&mut copy).await.is_none(), "it waits");
        assert_eq!((one.in_flight(), from.in_flight()), (0, 0), "queued is not in flight");
        let of_source = disks.graph().drain(&one).await;
        let of_backend = from.drain().await;
        drop(of_target);
        assert!(ended(&mut copy).await.is_none());
        assert_eq!((other.in_flight(), to.in_flight()), (0, 0));
        drop((of_source, of_backend));
        assert_eq!(copy.await.unwrap(), Attempt::Done);
    });
}

#[test]
fn a_copy_that_waits_for_a_request_in_its_target_is_not_in_flight_at_its_source() {
    run(2, async {
        let disks = DiskGraph::new();
        let (one, other) = two(&disks, 1000).await;
        let (from, to) = (backend(&one), backend(&other));
        let writer = to.clone();
        let alone = bds_io::spawn(async move {
            writer.write(512, iov(&[7; 16], 1), WriteFlags::SERIALISING).await
        });
        yield_times(20).await;
        assert_eq!(other.in_flight(), 1);
        let mut copy = copying(&from, &to);
        assert!(ended(&mut copy).await.is_none(), "it waits");
        assert_eq!(one.in_flight(), 0);
        alone.await.unwrap();
        assert_eq!(copy.await.unwrap(), Attempt::Done);
    });
}

/// Copies both ways, among requests that exclude them, meet drains of everything.
#[test]
fn copies_both_ways_and_drains_all_end() {
    for seed in 0..300 {
        run(seed, async {
            let disks = DiskGraph::new();
            let (one, other) = two(&disks, 2).await;
            let (a, b) = (backend(&one), backend(&other));
            let copies = (0..8).map(|i| if i % 2 == 0 { copying(&a, &b) } else { copying(&b, &a) });
            let copies = join_all(copies);
            let writes = [a.clone(), b.clone()].map(|disk| {
                let data = iov(&[7; 600], 1);
                bds_io::spawn(async move { disk.write(0, data, WriteFlags::SERIALISING).await })
            });
            let drains = async {
                for _ in 0..4 {
                    drop(disks.graph().drain_all().await);
                    yield_times(3).await;
                }
            };
            let (copies, ()) = join(copies, drains).await;
            copies.into_iter().for_each(|copy| assert_eq!(copy.unwrap(), Attempt::Done));
            for write in writes {
                write.await.unwrap();
            }
            assert_eq!((one.in_flight(), other.in_flight()), (0, 0), "seed {seed}");
        });
    }
}
