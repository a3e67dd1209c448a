//! Tests requests whose futures are not polled again, as `select!` keeps them, or leaked: all other
//! users go on.
//!
//! A simulation in which a task waits for ever is a deadlock, and panics.

use bds_io::{Sim, SimConfig};
use futures_util::{FutureExt, poll};

use crate::driver::{
    BoxFuture, Limits, Prealloc, Precision, StatusFlags, Truncate, WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::graph::{NodeRef, Release};
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph, backend};
use crate::test_kit::iov;

type Request = fn(&Backend) -> BoxFuture<'_, Result<()>>;

/// One of each request. None touches the last 512 bytes.
const REQUESTS: [(&str, Request); 12] = [
    ("read", |disk| Box::pin(async { disk.read(3, iov(&[0; 600], 1)).await })),
    ("write", |disk| Box::pin(async { disk.write(512, iov(&[1; 512], 1), NONE).await })),
    ("unaligned", |disk| {
        Box::pin(async { disk.write(3, iov(&[1; 600], 1), WriteFlags::FUA).await })
    }),
    ("zero", |disk| Box::pin(async { disk.write_zeroes(3, 600, ZeroFlags::FUA).await.map(drop) })),
    ("discard", |disk| Box::pin(async { disk.discard(0, 1024).await })),
    ("flush", |disk| Box::pin(async { disk.flush().await })),
    ("status", |disk| {
        Box::pin(async { disk.block_status(0, 1024, Precision::Exact).await.map(drop) })
    }),
    ("is_zero", |disk| Box::pin(async { disk.is_zero(0, 1024).await.map(drop) })),
    ("copy_up", |disk| Box::pin(async { disk.copy_up(0, 600).await })),
    ("copy_range", |disk| {
        Box::pin(async { disk.copy_range_from(disk, 0, 512, 512).await.map(drop) })
    }),
    ("truncate", |disk| Box::pin(async { disk.truncate(grow(4096)).await })),
    ("drain", |disk| {
        Box::pin(async {
            drop(disk.drain().await);
            Ok(())
        })
    }),
];

const NONE: WriteFlags = WriteFlags::empty();

fn grow(len: u64) -> Truncate {
    Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false }
}

/// The least number of awaits at which a request can be abandoned. The fake completes some at once.
fn least(name: &str) -> usize {
    match name {
        "discard" | "status" | "is_zero" | "copy_range" | "drain" => 1,
        _ => 4,
    }
}

struct Setup {
    sim: Sim,
    disks: DiskGraph,
    disk: Backend,
    other: Backend,
    beside: Backend,
}

fn setup(seed: u64) -> Setup {
    let slow = || Config {
        turns: 3,
        limits: Limits { request_alignment: 512, ..Limits::default() },
        zero_flags: Some(ZeroFlags::empty()),
        statuses: vec![(512..1024, StatusFlags::empty(), None)],
        options: crate::Options::new().with("discard", "unmap"),
        ..Config::default()
    };
    let sim = Sim::new(seed, SimConfig::calm());
    let (disks, disk, beside) = sim.block_on(async {
        let disks = DiskGraph::new();
        let (disk, _) = disks.node("disk", vec![1; 2048], slow()).await;
        let (beside, _) = disks.node("beside", vec![1; 2048], slow()).await;
        (disks, disk, beside)
    });
    let setup = Setup {
        disk: backend(&disk),
        other: backend(&disk),
        beside: backend(&beside),
        sim: sim.clone(),
        disks,
    };
    sim.block_on(async {
        setup.other.write(0, iov(&[2; 512], 1), NONE).await.unwrap();
        drop((disk, beside));
    });
    setup
}

impl Setup {
    fn node(&self) -> NodeRef {
        self.disk.node().expect("it has a medium")
    }

    /// Runs every kind of request of other users, on the same node and on another one.
    async fn check_other_users(&self) {
        for guest in [&self.beside, &self.other] {
            guest.write(1536, iov(&[9; 512], 1), NONE).await.unwrap();
            guest.flush().await.unwrap();
            // These exclude everything that overlaps them, or wait for everything.
            guest.write(1, iov(&[8; 1200], 1), WriteFlags::FUA).await.unwrap();
            let _done = guest.write_zeroes(0, 512, ZeroFlags::empty()).await.unwrap();
            guest.discard(512, 512).await.unwrap();
            guest.read(0, iov(&[0; 2048], 1)).await.unwrap();
            guest.truncate(grow(guest.len() + 512)).await.unwrap();
            let node = guest.node().unwrap();
            drop(self.disks.graph().drain(&node).await);
            drop(guest.drain().await);
            guest.eject().await.unwrap();
            guest.insert(&node).await.unwrap();
        }
        assert_eq!(self.node().in_flight(), 0);
    }

    /// Asserts that the abandoned futures hold no node.
    async fn check_released(self) {
        let nodes = [self.node(), self.beside.node().unwrap()];
        let Self { disks, disk, other, beside, .. } = self;
        drop((disk, other, beside));
        for node in nodes {
            assert_eq!(node.release(), Release::Last);
        }
        disks.graph().reap().await;
        assert_eq!(disks.graph().dump(), "");
    }
}

#[test]
fn an_unpolled_request_blocks_no_other_and_completes() {
    for (name, request) in REQUESTS {
        let mut points = 0;
        for n in 0..400 {
            let setup = setup(n);
            let at = usize::try_from(n).unwrap();
            let Some(kept) = setup.sim.keep_at(request(&setup.disk), at) else { break };
            points += 1;
            setup.sim.block_on(setup.check_other_users());
            if n == 0 {
                drop(kept);
            } else {
                let ended = setup.sim.block_on(async { kept.now_or_never() });
                assert!(matches!(ended, Some(Ok(()))), "{name} kept at {n}: {ended:?}");
            }
            setup.sim.clone().block_on(setup.check_released());
        }
        assert!((least(name)..400).contains(&points), "{name}: {points} points");
    }
}

#[test]
fn a_leaked_request_blocks_no_other_and_completes() {
    // A leaked section lasts for ever: it is not a request.
    for (name, request) in REQUESTS.into_iter().filter(|(name, _)| *name != "drain") {
        let mut points = 0;
        for n in 0..400 {
            let setup = setup(n);
            let at = usize::try_from(n).unwrap();
            if !setup.sim.forget_at(request(&setup.disk), at) {
                break;
            }
            points += 1;
            setup.sim.block_on(setup.check_other_users());
            setup.sim.clone().block_on(setup.check_released());
        }
        assert!((least(name)..400).contains(&points), "{name}: {points} points");
    }
}

/// A drain that is not polled takes its section all the same. Only requests of the node itself
/// wait.
#[test]
fn an_unpolled_drain_takes_its_section_and_blocks_no_change() {
    let mut waited = 0;
    for seed in 0..50 {
        let setup = setup(seed);
        let graph = setup.disks.graph().clone();
        let busy = setup.disk.clone();
        #[expect(clippy::async_yields_async, reason = "the task is awaited later")]
        let busy = setup.sim.block_on(async {
            bds_io::spawn_now(async move { busy.write(0, iov(&[3; 512], 1), NONE).await })
        });
        let node = setup.node();
        let mut kept = Box::pin(graph.drain(&node));
        if setup.sim.block_on(async { poll!(kept.as_mut()).is_ready() }) {
            // The write had completed: there was nothing to wait for.
            continue;
        }
        waited += 1;
        setup.sim.block_on(async {
            busy.await.unwrap();
            // The section's task runs without being polled by its owner.
            for _ in 0..1000 {
                if node.quiesce_count() == 1 {
                    break;
                }
                bds_io::yield_now().await;
            }
            assert_eq!((node.in_flight(), node.quiesce_count()), (0, 1));
            let medium = setup.beside.node().unwrap();
            setup.beside.write(1, iov(&[8; 1200], 1), WriteFlags::FUA).await.unwrap();
            setup.beside.eject().await.unwrap();
            setup.beside.insert(&medium).await.unwrap();
            assert!(setup.other.try_read(0, &iov(&[0; 512], 1)).is_none());
        });
        drop(kept);
        assert_eq!(node.quiesce_count(), 0, "dropped: the section is over");
        drop(node);
        setup.sim.block_on(setup.check_other_users());
        setup.sim.clone().block_on(setup.check_released());
    }
    assert!(waited >= 10, "a write was inside in {waited} of 50 runs");
}

/// The task and the future in it are one allocation, which async-task makes of less than 2048
/// bytes.
#[test]
fn requests_are_small_enough_for_one_allocation() {
    let setup = setup(1);
    let len = setup.disk.task_len();
    assert!(len < 2048 - 64, "{len} bytes");
    setup.sim.clone().block_on(setup.check_released());
}
