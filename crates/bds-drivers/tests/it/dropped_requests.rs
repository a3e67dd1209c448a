//! Requests whose futures are dropped while their driver works: their writes do not land after
//! later ones, and a drain or close waits for them. Regression: a dropped write of `file` overwrote
//! one that was flushed after it.

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::NewImage;
use bds_core::request::Backend;
use bds_core::{Options, Result};
use bds_io::sim::CutMode;
use bds_io::{Buf, IoVec, OpenOptions, Sim};
use serde_json::{Value, json};

use crate::kit::{Fixture, resize_to};

const LEN: u64 = 64 << 10;
const FILE: &str = "/disks/late";
/// Time between two polls of a request that will be dropped.
const STEP: Duration = Duration::from_micros(37);
/// Longer than any operation takes.
const AGES: Duration = Duration::from_secs(60);

/// The request that is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Write,
    Durable,
    Unaligned,
    Zero,
    Unmap,
    Discard,
    Shrink,
}

const VICTIMS: [Victim; 7] = [
    Victim::Write,
    Victim::Durable,
    Victim::Unaligned,
    Victim::Zero,
    Victim::Unmap,
    Victim::Discard,
    Victim::Shrink,
];

/// The node stack that requests go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stack {
    File,
    Direct,
    Raw,
    Window,
    Throttle,
    CopyOnRead,
    #[cfg(feature = "qcow2")]
    Qcow2,
}

impl Stack {
    fn options(self) -> Value {
        let file = |direct: bool| json!({"driver": "file", "filename": FILE, "cache": {"direct": direct}, "discard": "unmap"});
        let on =
            |driver: &str, file: Value| json!({"driver": driver, "file": file, "discard": "unmap"});
        match self {
            Self::File => file(false),
            Self::Direct => file(true),
            Self::Raw => on("raw", file(true)),
            Self::Window => {
                let mut options = on("raw", file(true));
                options["offset"] = json!(512);
                options
            }
            Self::Throttle => {
                let mut options = on("throttle", file(true));
                options["limits"] = json!({"iops-total": 1_000_000});
                options
            }
            Self::CopyOnRead => on("copy-on-read", file(true)),
            #[cfg(feature = "qcow2")]
            Self::Qcow2 => on("qcow2", file(false)),
        }
    }

    /// qcow2 does not shrink images yet.
    fn can(self, victim: Victim) -> bool {
        match self {
            #[cfg(feature = "qcow2")]
            Self::Qcow2 => victim != Victim::Shrink,
            _ => true,
        }
    }

    /// A simulated disk with this stack on it, full of ones, all durable.
    fn env(self) -> Sim {
        let fixture = Fixture::new(3);
        let disk = match self {
            #[cfg(feature = "qcow2")]
            Self::Qcow2 => {
                let image = NewImage {
                    format: "qcow2".into(),
                    path: FILE.into(),
                    options: Options::new().with("size", LEN).with("cluster_size", 4096_u64),
                    skip_backing: true,
                };
                fixture.sim.block_on(fixture.graph.create_image(image)).unwrap();
                fixture.backend(self.options()).unwrap()
            }
            _ => {
                let create = OpenOptions { create: true, write: true, ..OpenOptions::default() };
                let file = fixture.sim.fs().open(Path::new(FILE), &create).unwrap();
                fixture.sim.block_on(file.set_len(LEN)).unwrap();
                fixture.backend(self.options()).unwrap()
            }
        };
        fixture.sim.block_on(resize(&disk, LEN)).unwrap();
        fixture.write(&disk, 0, &[1; LEN as usize]).unwrap();
        fixture.sim.block_on(disk.flush()).unwrap();
        let node = disk.node().unwrap();
        drop(disk);
        fixture.sim.block_on(node.close()).unwrap().into_result().unwrap();
        fixture.sim
    }
}

const STACKS: &[Stack] = &[
    Stack::File,
    Stack::Direct,
    Stack::Raw,
    Stack::Window,
    Stack::Throttle,
    Stack::CopyOnRead,
    #[cfg(feature = "qcow2")]
    Stack::Qcow2,
];

fn bytes(value: u8, len: usize) -> IoVec {
    Buf::from_slice(&vec![value; len]).iov()
}

async fn resize(disk: &Backend, len: u64) -> Result<()> {
    disk.truncate(resize_to(len)).await
}

impl Victim {
    async fn run(self, disk: &Backend) {
        // Most of these futures are dropped before they have a result.
        let none = WriteFlags::empty();
        let _ended = match self {
            Self::Write => disk.write(0, bytes(2, 4096), none).await,
            Self::Durable => disk.write(0, bytes(2, 4096), WriteFlags::FUA).await,
            Self::Unaligned => disk.write(0, bytes(2, 100), none).await,
            Self::Zero => disk.write_zeroes(0, 4096, ZeroFlags::empty()).await.map(drop),
            Self::Unmap => disk.write_zeroes(0, 4096, ZeroFlags::MAY_UNMAP).await.map(drop),
            Self::Discard => disk.discard(0, 4096).await,
            Self::Shrink => resize(disk, 512).await,
        };
    }

    /// Offset and length of the next write.
    fn next(self) -> (u64, usize) {
        match self {
            Self::Unaligned => (200, 100),
            Self::Shrink => (4096, 4096),
            _ => (0, 4096),
        }
    }

    /// Polls the request so many times and drops it. True if it completed before.
    async fn drop_after(self, disk: &Backend, polls: usize) -> bool {
        let mut request: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(self.run(disk));
        for poll in 0..polls {
            if poll > 0 {
                bds_io::sleep(STEP).await;
            }
            if futures_util::poll!(request.as_mut()).is_ready() {
                return true;
            }
        }
        false
    }
}

/// Runs `check` with a disk whose request was dropped, for every number of polls and some seeds.
fn sweep(check: impl Fn(Fixture, Backend, Victim, &str)) {
    for &stack in STACKS {
        let base = stack.env();
        for victim in VICTIMS.into_iter().filter(|&victim| stack.can(victim)) {
            for seed in 0..6 {
                for polls in 1.. {
                    let fixture = Fixture::with(base.fork(seed));
                    let disk = fixture.backend(stack.options()).unwrap();
                    let has_ended = fixture.sim.block_on(victim.drop_after(&disk, polls));
                    let what = format!("{stack:?} {victim:?} seed {seed} polled {polls} times");
                    check(fixture, disk, victim, &what);
                    if has_ended {
                        break;
                    }
                }
            }
        }
    }
}

/// Writes to the range of the dropped request, and flushes.
async fn write_after(disk: &Backend, victim: Victim) {
    if victim == Victim::Shrink {
        resize(disk, LEN).await.unwrap();
    }
    let (at, len) = victim.next();
    disk.write(at, bytes(3, len), WriteFlags::empty()).await.unwrap();
    disk.flush().await.unwrap();
}

fn check_disk(fixture: &Fixture, disk: &Backend, victim: Victim, what: &str) {
    let (at, len) = victim.next();
    assert_eq!(disk.len(), LEN, "{what}");
    assert_eq!(fixture.read(disk, at, len).unwrap(), vec![3; len], "{what}");
    if victim == Victim::Unaligned {
        assert_eq!(fixture.read(disk, 100, 100).unwrap(), [1; 100], "{what}: its neighbour");
        assert_eq!(fixture.read(disk, 300, 3796).unwrap(), [1; 3796], "{what}: its neighbour");
    }
    // Zeros: cut off and grown again. Ones: the resize was dropped before it began.
    let rest = fixture.read(disk, 40_960, 4096).unwrap();
    let was_cut = victim == Victim::Shrink && rest[0] == 0;
    assert_eq!(rest, [u8::from(!was_cut); 4096], "{what}");
}

#[test]
fn a_write_after_a_dropped_request_is_not_overwritten() {
    sweep(|fixture, disk, victim, what| {
        fixture.sim.block_on(write_after(&disk, victim));
        fixture.sim.run_until_idle();
        check_disk(&fixture, &disk, victim, what);
        let node = disk.node().unwrap();
        drop(disk);
        fixture.sim.block_on(node.close()).unwrap().into_result().unwrap();
    });
}

#[test]
fn a_flushed_write_after_a_dropped_request_survives_a_power_cut() {
    sweep(|fixture, disk, victim, what| {
        fixture.sim.block_on(write_after(&disk, victim));
        let options = {
            let stack = STACKS.iter().find(|stack| what.starts_with(&format!("{stack:?} ")));
            stack.unwrap().options()
        };
        for mode in [CutMode::LoseAll, CutMode::KeepAll] {
            let after = Fixture::with(fixture.sim.after_cut_by(7, mode));
            let disk = after.backend(options.clone()).unwrap();
            check_disk(&after, &disk, victim, what);
        }
        drop(disk);
    });
}

/// Nothing happens on the disk any more, except completions of dropped reads.
fn is_quiet(fixture: &Fixture, what: &str) {
    let last = fixture.sim.trace().pop();
    fixture.sim.block_on(bds_io::sleep(AGES));
    let lines = fixture.sim.trace();
    let known = lines.iter().position(|line| Some(line) == last.as_ref());
    let news = &lines[known.map_or(0, |at| at + 1)..];
    assert!(news.iter().all(|line| line.contains(" READ ")), "{what}: {news:#?}");
}

#[test]
fn a_drain_waits_for_the_operation_of_a_dropped_request() {
    sweep(|fixture, disk, _, what| {
        let drained = fixture.sim.block_on(fixture.graph.drain(&disk.node().unwrap()));
        assert_eq!(disk.node().unwrap().in_flight(), 0, "{what}");
        is_quiet(&fixture, what);
        drop(drained);
        fixture.write(&disk, 0, &[4; 512]).unwrap();
    });
    // The same for a drain of this backend's requests only.
    sweep(|fixture, disk, _, what| {
        let drained = fixture.sim.block_on(disk.drain());
        is_quiet(&fixture, what);
        drop(drained);
    });
}

#[test]
fn a_close_waits_for_the_operation_of_a_dropped_request() {
    sweep(|fixture, disk, _, what| {
        let node = disk.node().unwrap();
        drop(disk);
        fixture.sim.block_on(node.close()).unwrap().into_result().unwrap();
        is_quiet(&fixture, what);
    });
    // The same if the last reference is dropped without `close`.
    sweep(|fixture, disk, _, what| {
        drop(disk);
        let reports = fixture.sim.block_on(fixture.graph.reap());
        let are_clean = !reports.is_empty() && reports.iter().all(|report| report.is_clean());
        assert!(are_clean, "{what}: {reports:?} {:?}", fixture.graph.nodes());
        is_quiet(&fixture, what);
        assert!(fixture.graph.nodes().is_empty(), "{what}");
    });
}

#[test]
fn a_change_waits_for_the_operation_of_a_dropped_request() {
    sweep(|fixture, disk, victim, what| {
        let node = disk.node().unwrap();
        let options = Options::new().with("detect-zeroes", "on");
        let below = Options::new().with("detect-zeroes", "on");
        fixture.sim.block_on(async {
            fixture.graph.reopen(&node, options).await.unwrap();
            for child in fixture.graph.nodes() {
                if child.id() != node.id() {
                    fixture.graph.reopen(&child, below.clone()).await.unwrap();
                }
            }
        });
        is_quiet(&fixture, what);
        fixture.sim.block_on(write_after(&disk, victim));
        check_disk(&fixture, &disk, victim, what);
    });
}
