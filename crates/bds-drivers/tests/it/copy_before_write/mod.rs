//! Tests of `copy-before-write` and `snapshot-access`: readers of the snapshot see the start state
//! under random writes; slow, stuck and failing targets; policies; permissions.

mod disk;
mod scenarios;
mod spill;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::event::{Event, Events};
use bds_core::graph::NodeRef;
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_io::{Buf, Sim, SimConfig};
use bds_testkit::Chance;
use serde_json::{Value, json};

use crate::kit::Fixture;
use disk::{Control, ControlledType};

const GRANULE: u64 = 64 << 10;
const LEN: u64 = 20 * GRANULE + 1536;
/// Length of the spill node of the worlds that have one.
const SPILL_LEN: u64 = 8 * GRANULE;

/// A guest's disk with the filter on it, its target, and a reader of the snapshot.
struct World {
    fixture: Fixture,
    source: Arc<Control>,
    target: Arc<Control>,
    spill: Arc<Control>,
    guest: Backend,
    reader: Backend,
    disk: NodeRef,
    copy: NodeRef,
    filter: NodeRef,
    events: Events,
    start: Vec<u8>,
}

fn pattern(salt: u8) -> Vec<u8> {
    (0..LEN).map(|at| (at / 512 % 251) as u8 ^ salt).collect()
}

async fn open(fixture: &Fixture, name: &str, control: &Arc<Control>) -> NodeRef {
    let options = Options::new().with("node-name", name).with("discard", "unmap");
    fixture.graph.open_driver(Arc::new(ControlledType(control.clone())), options).await.unwrap()
}

fn user(node: &NodeRef, name: &str, writable: bool) -> Result<Backend> {
    Backend::new(node, BackendOptions { name: name.into(), writable, ..Default::default() })
}

/// Runs a test in a world whose filter has these options.
fn run<T>(seed: u64, options: Value, test: impl AsyncFnOnce(World) -> T) -> T {
    let fixture = Fixture::with(Sim::new(seed, SimConfig::calm()));
    let sim = fixture.sim.clone();
    sim.block_on(async { test(World::new(fixture, options).await).await })
}

impl World {
    async fn new(fixture: Fixture, mut options: Value) -> Self {
        let start = pattern(1);
        let (source, target) = (Control::new(start.clone()), Control::new(vec![0; LEN as usize]));
        let disk = open(&fixture, "disk", &source).await;
        let copy = open(&fixture, "copy", &target).await;
        let guest = user(&disk, "guest", true).unwrap();
        let spill = Control::new(vec![0xEE; SPILL_LEN as usize]);
        let _node = open(&fixture, "spill", &spill).await;
        if options.get("spill-size").is_some() {
            options["spill"] = json!("spill");
        }
        options["driver"] = json!("copy-before-write");
        options["node-name"] = json!("filter");
        (options["file"], options["target"]) = (json!("disk"), json!("copy"));
        options["discard"] = json!("unmap");
        let filter = fixture.graph.open(Options::from_json(options).unwrap()).await.unwrap();
        fixture.graph.insert_filter(&disk, &filter).await.unwrap();
        let view = json!({"driver": "snapshot-access", "file": "filter", "discard": "unmap"});
        let view = fixture.graph.open(Options::from_json(view).unwrap()).await.unwrap();
        let perm = bds_core::driver::Perm::CONSISTENT_READ | bds_core::driver::Perm::WRITE;
        let reader = BackendOptions { perm: Some(perm), ..Default::default() };
        let reader = Backend::new(&view, reader).unwrap();
        let events = fixture.graph.events();
        Self { fixture, source, target, spill, guest, reader, disk, copy, filter, events, start }
    }

    async fn write(&self, offset: u64, len: u64, byte: u8) -> Result<()> {
        let buf = Buf::from_slice(&vec![byte; len as usize]);
        self.guest.write(offset, buf.iov(), WriteFlags::empty()).await
    }

    async fn read_snapshot(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let buf = Buf::zeroed(len as usize, 512);
        self.reader.read(offset, buf.iov()).await?;
        Ok(buf.iov().to_vec(0..len as usize))
    }

    fn was_broken(&mut self) -> Option<(u64, i32)> {
        while let Some(event) = self.events.try_next() {
            if let Event::SnapshotBroken { node, offset, errno } = event {
                assert_eq!(node, "filter");
                return Some((offset, errno));
            }
        }
        None
    }
}

/// Random writes, zero writes and discards, with a model of what the guest sees.
async fn guest(disk: Backend, mut model: Vec<u8>, seed: u64, count: usize) -> Vec<u8> {
    let mut rng = Chance::new(seed);
    for number in 0..count {
        let offset = rng.below(LEN / 512) * 512;
        let len = ((1 + rng.below(300)) * 512).min(LEN - offset);
        let bytes = offset as usize..(offset + len) as usize;
        match rng.below(4) {
            0 => {
                let _done = disk.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await.unwrap();
                model[bytes].fill(0);
            }
            1 => {
                disk.discard(offset, len).await.unwrap();
                model[bytes].fill(0xDD);
            }
            _ => {
                let data = vec![number as u8; len as usize];
                disk.write(offset, Buf::from_slice(&data).iov(), WriteFlags::empty())
                    .await
                    .unwrap();
                model[bytes].fill(number as u8);
            }
        }
    }
    model
}

fn configurations() -> [Value; 7] {
    [
        json!({}),
        json!({"staging-size": 8 << 20}),
        json!({"staging-size": 128 << 10}),
        json!({"staging-size": 256 << 10, "staging-policy": "throttle"}),
        json!({"min-cluster-size": 256 << 10, "staging-size": 1}),
        json!({"staging-size": 256 << 10, "spill-size": 320 << 10}),
        json!({"staging-size": 256 << 10, "spill-size": 0, "staging-policy": "throttle"}),
    ]
}

#[test]
fn readers_of_the_snapshot_see_the_start_state() {
    for (number, options) in configurations().into_iter().enumerate() {
        for seed in 0..8 {
            run(seed, options.clone(), async |world| {
                if seed % 2 == 1 {
                    world.target.delay_us.store(500, Ordering::SeqCst);
                    world.spill.delay_us.store(seed * 40, Ordering::SeqCst);
                }
                let guests: Vec<_> = (0..3)
                    .map(|n| {
                        let disk = world.guest.clone();
                        bds_io::spawn(guest(disk, vec![0; LEN as usize], seed * 3 + n, 40))
                    })
                    .collect();
                let mut rng = Chance::new(seed ^ 99);
                for _ in 0..60 {
                    let offset = rng.below(LEN / 512) * 512;
                    let len = ((1 + rng.below(400)) * 512).min(LEN - offset);
                    let seen = world.read_snapshot(offset, len).await.unwrap();
                    let expected = &world.start[offset as usize..(offset + len) as usize];
                    assert!(
                        seen == expected,
                        "configuration {number}, seed {seed}, {offset}+{len}"
                    );
                    if seed % 3 == 0 {
                        bds_io::sleep(Duration::from_micros(rng.below(900))).await;
                    }
                }
                for guest in guests {
                    guest.await;
                }
                assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
            });
        }
    }
}

#[test]
fn the_guest_sees_its_own_writes() {
    for (seed, options) in configurations().into_iter().enumerate() {
        run(seed as u64, options, async |world| {
            let start = world.start.clone();
            let model = guest(world.guest.clone(), start, seed as u64, 60).await;
            let buf = Buf::zeroed(LEN as usize, 512);
            world.guest.read(0, buf.iov()).await.unwrap();
            assert!(buf.iov().to_vec(0..LEN as usize) == model);
        });
    }
}

/// With staging the target is not on the guest's way.
#[test]
fn a_stuck_target_holds_up_no_guest_until_the_area_is_full() {
    let options = json!({"staging-size": 4 * GRANULE});
    run(1, options, async |world| {
        world.target.hold();
        for granule in 0..4 {
            world.write(granule * GRANULE, 512, 7).await.unwrap();
        }
        assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start, "from memory");
        let has_ended = Arc::new(AtomicBool::new(false));
        let (disk, ended) = (world.guest.clone(), has_ended.clone());
        let fifth = bds_io::spawn(async move {
            let buf = Buf::from_slice(&[9; 512]);
            let result = disk.write(4 * GRANULE, buf.iov(), WriteFlags::empty()).await;
            ended.store(true, Ordering::SeqCst);
            result
        });
        bds_io::sleep(Duration::from_secs(100)).await;
        assert!(!has_ended.load(Ordering::SeqCst), "it stalls");
        // What is staged may be written again at once.
        world.write(GRANULE, 512, 8).await.unwrap();
        world.target.release();
        fifth.await.unwrap();
        assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
    });
}

#[test]
fn policies_at_the_limit_and_the_timeout_by_table() {
    // options beside a stuck target; does the write fail, is the snapshot broken, with which errno
    let table = [
        (json!({"cbw-timeout": 2}), true, None),
        (json!({"cbw-timeout": 2, "on-cbw-error": "break-snapshot"}), false, Some(libc::ETIMEDOUT)),
        (json!({"cbw-timeout": 2, "staging-size": 1}), true, None),
        (
            json!({"cbw-timeout": 2, "staging-size": 1, "on-cbw-error": "break-snapshot"}),
            false,
            Some(libc::ETIMEDOUT),
        ),
        (json!({"staging-size": 1, "staging-policy": "break-snapshot"}), false, Some(libc::ENOMEM)),
    ];
    for (options, fails, broken) in table {
        run(1, options.clone(), async |mut world| {
            world.target.hold();
            let begun = bds_io::now();
            // The first one goes into the staging area, if there is one.
            let first = world.write(0, 512, 7).await;
            let staged = options.get("staging-size").is_some();
            assert_eq!(first.is_err(), fails && !staged, "{options}");
            let second = world.write(2 * GRANULE, 512, 7).await;
            assert_eq!(second.is_err(), fails, "{options}");
            assert!(bds_io::now() - begun <= Duration::from_secs(4), "{options}");
            assert_eq!(world.was_broken().map(|(_, errno)| errno), broken, "{options}");
            match broken {
                None => {
                    assert_eq!(second.unwrap_err().errno(), libc::ETIMEDOUT);
                    let at = 2 * GRANULE as usize;
                    assert_eq!(world.source.bytes()[at], world.start[at], "untouched");
                    assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
                }
                Some(errno) => {
                    let error = world.read_snapshot(LEN - 512, 512).await.unwrap_err();
                    assert_eq!(error.errno(), errno);
                    assert!(error.to_string().contains("the snapshot is broken"), "{error}");
                    world.write(5 * GRANULE, 512, 7).await.unwrap();
                }
            }
            // The target is stuck still; the filter goes at once.
            let World { fixture, guest, reader, filter, .. } = world;
            drop(reader);
            let graph = &fixture.graph;
            let ended = Box::pin(async {
                graph.reap().await;
                graph.drop_filter(&filter).await.unwrap();
                filter.close().await.unwrap().into_result().unwrap();
            });
            let late = Box::pin(bds_io::sleep(Duration::from_secs(60)));
            let first = futures_util::future::select(ended, late).await;
            assert!(matches!(first, futures_util::future::Either::Left(_)), "{options}");
            drop(guest);
        });
    }
}

#[test]
fn a_failing_target_fails_only_writes_whose_old_data_is_lost() {
    for staging in [0, 1] {
        run(1, json!({"staging-size": staging}), async |mut world| {
            world.write(0, 512, 7).await.unwrap();
            world.target.errno.store(libc::EIO as u64, Ordering::SeqCst);
            world.write(512, 512, 7).await.unwrap();
            // Staged data is in memory; the next one finds no space and a target that fails.
            if staging == 1 {
                world.write(3 * GRANULE, 512, 7).await.unwrap();
            }
            let error = world.write(2 * GRANULE, 512, 7).await.unwrap_err();
            assert_eq!(error.errno(), libc::EIO);
            assert!(error.to_string().contains("cannot keep old data before the write"), "{error}");
            assert_eq!(
                world.source.bytes()[2 * GRANULE as usize],
                world.start[2 * GRANULE as usize]
            );
            assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
            assert_eq!(world.was_broken(), None);
            world.target.errno.store(0, Ordering::SeqCst);
            world.write(2 * GRANULE, 512, 7).await.unwrap();
            assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
        });
    }
}

#[test]
fn staged_data_that_cannot_be_written_breaks_the_snapshot_if_the_policy_says_so() {
    let options = json!({"staging-size": 1 << 20, "on-cbw-error": "break-snapshot"});
    run(1, options, async |mut world| {
        world.target.errno.store(libc::ENOSPC as u64, Ordering::SeqCst);
        world.target.delay_us.store(1000, Ordering::SeqCst);
        world.write(0, 512, 7).await.unwrap();
        assert_eq!(world.was_broken(), None);
        bds_io::sleep(Duration::from_millis(5)).await;
        assert_eq!(world.was_broken(), Some((0, libc::ENOSPC)));
        world.write(GRANULE, 512, 7).await.unwrap();
        let error = world.read_snapshot(0, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    });
}

/// Writes are as fast as the target in the end, and no write waits for a whole area.
#[test]
fn the_policy_throttle_spreads_the_wait() {
    let mut longest = [Duration::ZERO; 2];
    for (n, policy) in ["stall", "throttle"].into_iter().enumerate() {
        let options = json!({"staging-size": 8 * GRANULE, "staging-policy": policy});
        longest[n] = run(1, options, async |world| {
            world.target.delay_us.store(10_000, Ordering::SeqCst);
            let mut longest = Duration::ZERO;
            for granule in 0..20 {
                let begun = bds_io::now();
                world.write(granule * GRANULE, 512, 7).await.unwrap();
                longest = longest.max(bds_io::now() - begun);
                bds_io::sleep(Duration::from_micros(600)).await;
            }
            assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
            longest
        });
    }
    assert!(longest[1] <= longest[0] + Duration::from_millis(10), "{longest:?}");
}

#[test]
fn writes_pass_inline_once_their_granules_are_kept() {
    run(1, json!({}), async |world| {
        let iov = Buf::from_slice(&[7; 512]).iov();
        assert!(world.guest.try_write(512, &iov).is_none(), "old data must be kept first");
        world.guest.write(512, iov.clone(), WriteFlags::empty()).await.unwrap();
        assert!(matches!(world.guest.try_write(1024, &iov), Some(Ok(()))));
        assert!(world.guest.try_write(GRANULE, &iov).is_none());
        assert!(world.guest.try_write(GRANULE - 512, &Buf::from_slice(&[7; 1024]).iov()).is_none());
        let copies = world.target.writes.load(Ordering::SeqCst);
        world.write(2048, 4096, 8).await.unwrap();
        assert_eq!(world.target.writes.load(Ordering::SeqCst), copies, "copied once");
        assert_eq!(world.read_snapshot(0, LEN).await.unwrap(), world.start);
    });
}

#[test]
fn what_a_reader_discards_is_neither_kept_nor_readable() {
    run(1, json!({}), async |world| {
        world.reader.discard(GRANULE - 512, 2 * GRANULE).await.unwrap();
        // Whole granules alone.
        world.read_snapshot(0, GRANULE).await.unwrap();
        let error = world.read_snapshot(GRANULE, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied);
        world.read_snapshot(2 * GRANULE, GRANULE).await.unwrap();
        world.write(GRANULE + 512, 512, 7).await.unwrap();
        let copy = world.target.bytes();
        assert!(copy[GRANULE as usize..2 * GRANULE as usize].iter().all(|b| *b != 7 && *b != 1));
        assert!(world.reader.write_at(0, &[1; 512]).is_err(), "a snapshot is not written");
    });
}

#[test]
fn with_a_bitmap_only_what_is_dirty_in_it_is_kept() {
    let fixture = Fixture::with(Sim::new(1, SimConfig::calm()));
    let sim = fixture.sim.clone();
    sim.block_on(async {
        let target = Control::new(vec![0; LEN as usize]);
        let disk = open(&fixture, "disk", &Control::new(pattern(1))).await;
        let copy = open(&fixture, "copy", &target).await;
        disk.add_bitmap(bds_core::graph::BitmapOptions::named("b")).await.unwrap();
        let guest = user(&disk, "guest", true).unwrap();
        let write = |granule: u64| {
            let buf = Buf::from_slice(&[7; 512]);
            guest.write(granule * GRANULE, buf.iov(), WriteFlags::empty())
        };
        write(3).await.unwrap();
        let options = |node: &str, name: &str| {
            let options = json!({
                "driver": "copy-before-write", "node-name": "filter", "file": "disk",
                "target": "copy", "bitmap": {"node": node, "name": name},
            });
            Options::from_json(options).unwrap()
        };
        let wrong = fixture.graph.open(options("copy", "b")).await.unwrap_err();
        assert!(wrong.to_string().contains("must be one of the file's node"), "{wrong}");
        let wrong = fixture.graph.open(options("disk", "c")).await.unwrap_err();
        assert_eq!(wrong.kind(), ErrorKind::NotFound);
        let filter = fixture.graph.open(options("disk", "b")).await.unwrap();
        fixture.graph.insert_filter(&disk, &filter).await.unwrap();
        write(3).await.unwrap();
        write(5).await.unwrap();
        let kept = target.bytes();
        assert_eq!((kept[3 << 16], kept[5 << 16]), (7, 0));
        let view = json!({"driver": "snapshot-access", "file": "filter"});
        let view = fixture.graph.open(Options::from_json(view).unwrap()).await.unwrap();
        let view = user(&view, "view", false).unwrap();
        let buf = Buf::zeroed(512, 512);
        view.read(3 << 16, buf.iov()).await.unwrap();
        let refused = view.read(5 << 16, buf.iov()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        drop(copy);
    });
}

#[test]
fn permissions_of_the_filter() {
    run(1, json!({}), async |world| {
        let past = user(&world.disk, "intruder", true).unwrap_err();
        assert!(past.to_string().contains("filter.file"), "{past}");
        user(&world.disk, "onlooker", false).unwrap();
        let resize = BackendOptions {
            perm: Some(bds_core::driver::Perm::RESIZE),
            ..BackendOptions::default()
        };
        assert!(Backend::new(&world.copy, resize).is_err(), "the target keeps its length");
        user(&world.copy, "reader", false).unwrap();
        let change = bds_core::driver::Truncate::to(LEN + 512);
        assert!(world.guest.truncate(change).await.is_err());
    });
}

#[test]
fn wrong_options_are_refused() {
    let fixture = Fixture::with(Sim::new(1, SimConfig::calm()));
    let sim = fixture.sim.clone();
    sim.block_on(async {
        let disk = open(&fixture, "disk", &Control::new(pattern(1))).await;
        let copy = open(&fixture, "copy", &Control::new(vec![0; 512])).await;
        let filter = |more: Value| {
            let mut options =
                json!({"driver": "copy-before-write", "file": "disk", "target": "copy"});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            fixture.graph.open(Options::from_json(options).unwrap())
        };
        let error = filter(json!({})).await.unwrap_err();
        assert_eq!(error.message(), "Source and target image have different sizes");
        let error = filter(json!({"min-cluster-size": 3000})).await.unwrap_err();
        assert_eq!(error.message(), "min-cluster-size needs to be a power of 2");
        let view = json!({"driver": "snapshot-access", "file": "disk"});
        let error = fixture.graph.open(Options::from_json(view).unwrap()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotSupported);
        drop((disk, copy));
    });
}
