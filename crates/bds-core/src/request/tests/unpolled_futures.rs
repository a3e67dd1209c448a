//! Requests whose futures are kept without being polled, as `select!` keeps them, or forgotten: every other user goes on.
//!
//! A simulated world in which something waits for ever is a deadlock, and panics.

use bds_io::{Sim, SimConfig};
use futures_util::{FutureExt, poll};

use super::fake::{Config, House, backend};
use super::iov;
use crate::driver::{BoxFuture, Limits, Prealloc, StatusFlags, Truncate, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::graph::{NodeRef, Release};
use crate::request::Backend;

type Victim = fn(&Backend) -> BoxFuture<'_, Result<()>>;

/// One of each request. None asks for the last 512 bytes.
const VICTIMS: [(&str, Victim); 12] = [
    ("read", |disk| Box::pin(async { disk.read(3, iov(&[0; 600], 1)).await })),
    ("write", |disk| Box::pin(async { disk.write(512, iov(&[1; 512], 1), NONE).await })),
    ("unaligned", |disk| {
        Box::pin(async { disk.write(3, iov(&[1; 600], 1), WriteFlags::FUA).await })
    }),
    ("zero", |disk| Box::pin(async { disk.write_zeroes(3, 600, ZeroFlags::FUA).await.map(drop) })),
    ("discard", |disk| Box::pin(async { disk.discard(0, 1024).await })),
    ("flush", |disk| Box::pin(async { disk.flush().await })),
    ("status", |disk| Box::pin(async { disk.block_status(0, 1024, true).await.map(drop) })),
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

/// At how many awaits a request can be abandoned at least. The fake answers some at once.
fn least(name: &str) -> usize {
    match name {
        "discard" | "status" | "is_zero" | "copy_range" | "drain" => 1,
        _ => 4,
    }
}

struct World {
    sim: Sim,
    house: House,
    disk: Backend,
    other: Backend,
    beside: Backend,
}

fn world(seed: u64) -> World {
    let slow = || Config {
        turns: 3,
        limits: Limits { request_alignment: 512, ..Limits::default() },
        zero_flags: Some(ZeroFlags::empty()),
        statuses: vec![(512..1024, StatusFlags::empty(), None)],
        options: crate::Options::new().with("discard", "unmap"),
        ..Config::default()
    };
    let sim = Sim::new(seed, SimConfig::calm());
    let (house, disk, beside) = sim.block_on(async {
        let house = House::new();
        let (disk, _) = house.node("disk", vec![1; 2048], slow()).await;
        let (beside, _) = house.node("beside", vec![1; 2048], slow()).await;
        (house, disk, beside)
    });
    let world = World {
        disk: backend(&disk),
        other: backend(&disk),
        beside: backend(&beside),
        sim: sim.clone(),
        house,
    };
    sim.block_on(async {
        world.other.write(0, iov(&[2; 512], 1), NONE).await.unwrap();
        drop((disk, beside));
    });
    world
}

impl World {
    fn node(&self) -> NodeRef {
        self.disk.node().expect("it has a medium")
    }

    /// All that others may want, of the same node and of another one.
    async fn others_go_on(&self) {
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
            drop(self.house.graph().drain(&node).await);
            drop(guest.drain().await);
            guest.eject().await.unwrap();
            guest.insert(&node).await.unwrap();
        }
        assert_eq!(self.node().in_flight(), 0);
    }

    /// No node is held any more by what was kept or forgotten.
    async fn ends(self) {
        let nodes = [self.node(), self.beside.node().unwrap()];
        let Self { house, disk, other, beside, .. } = self;
        drop((disk, other, beside));
        for node in nodes {
            assert_eq!(node.release(), Release::Last);
        }
        house.graph().reap().await;
        assert_eq!(house.graph().dump(), "");
    }
}

#[test]
fn a_request_kept_at_any_await_holds_up_no_other_and_has_ended_when_it_is_polled_again() {
    for (name, victim) in VICTIMS {
        let mut points = 0;
        for n in 0..400 {
            let world = world(n);
            let at = usize::try_from(n).unwrap();
            let Some(kept) = world.sim.keep_at(victim(&world.disk), at) else { break };
            points += 1;
            world.sim.block_on(world.others_go_on());
            if n == 0 {
                drop(kept);
            } else {
                let ended = world.sim.block_on(async { kept.now_or_never() });
                assert!(matches!(ended, Some(Ok(()))), "{name} kept at {n}: {ended:?}");
            }
            world.sim.clone().block_on(world.ends());
        }
        assert!((least(name)..400).contains(&points), "{name}: {points} points");
    }
}

#[test]
fn a_request_forgotten_at_any_await_holds_up_no_other_and_ends() {
    // A forgotten section is one that lasts for ever: that is not a request.
    for (name, victim) in VICTIMS.into_iter().filter(|(name, _)| *name != "drain") {
        let mut points = 0;
        for n in 0..400 {
            let world = world(n);
            let at = usize::try_from(n).unwrap();
            if !world.sim.forget_at(victim(&world.disk), at) {
                break;
            }
            points += 1;
            world.sim.block_on(world.others_go_on());
            world.sim.clone().block_on(world.ends());
        }
        assert!((least(name)..400).contains(&points), "{name}: {points} points");
    }
}

/// A section that is being taken and not polled is taken all the same. The node's own requests wait, and nothing else.
#[test]
fn a_drain_kept_while_it_waits_takes_its_section_and_lets_others_change_the_graph() {
    let mut waited = 0;
    for seed in 0..50 {
        let world = world(seed);
        let graph = world.house.graph().clone();
        let busy = world.disk.clone();
        #[expect(clippy::async_yields_async, reason = "the task is awaited later")]
        let busy = world.sim.block_on(async {
            bds_io::spawn_now(async move { busy.write(0, iov(&[3; 512], 1), NONE).await })
        });
        let node = world.node();
        let mut kept = Box::pin(graph.drain(&node));
        if world.sim.block_on(async { poll!(kept.as_mut()).is_ready() }) {
            // The write was over before: there was nothing to wait for.
            continue;
        }
        waited += 1;
        world.sim.block_on(async {
            busy.await.unwrap();
            // The section's task goes on without being polled by its owner.
            for _ in 0..1000 {
                if node.quiesce_count() == 1 {
                    break;
                }
                bds_io::yield_now().await;
            }
            assert_eq!((node.in_flight(), node.quiesce_count()), (0, 1));
            let medium = world.beside.node().unwrap();
            world.beside.write(1, iov(&[8; 1200], 1), WriteFlags::FUA).await.unwrap();
            world.beside.eject().await.unwrap();
            world.beside.insert(&medium).await.unwrap();
            assert!(world.other.try_read(0, &iov(&[0; 512], 1)).is_none());
        });
        drop(kept);
        assert_eq!(node.quiesce_count(), 0, "dropped: the section is over");
        drop(node);
        world.sim.block_on(world.others_go_on());
        world.sim.clone().block_on(world.ends());
    }
    assert!(waited >= 10, "a write was inside in {waited} of 50 worlds");
}

/// The task and the future in it are one allocation, which async-task makes of less than 2048 bytes.
#[test]
fn requests_are_small_enough_for_one_allocation() {
    let world = world(1);
    let len = world.disk.task_len();
    assert!(len < 2048 - 64, "{len} bytes");
    world.sim.clone().block_on(world.ends());
}
