//! Cuts the power at every write, also during the end: the disk that the users had at that moment
//! holds everything that was acknowledged as durable.
//!
//! One schedule of each kind by default; `BDS_TEST_BUDGET=full` takes as many as 10,000 cuts need.

use std::cell::RefCell;
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::NodeRef;
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions, Mirror, MirrorOptions};
use bds_jobs::{CopyMode, JobOptions, JobStatus};

use crate::budget::{CRASH_POINTS, cut_power_holding, is_full, report};

use super::kit::{LEN, World, bytes_of, pattern, writer};

/// What survives outside of the simulated machine.
#[derive(Default)]
struct Record {
    /// The node that the guest used when the last write was acknowledged.
    disk: String,
    /// Writes that were acknowledged as durable: offset and byte.
    durable: Vec<(u64, u8)>,
    ended: bool,
}

const PIECE: usize = 3000;

/// Durable writes to fresh places, one after the other, until there are none.
async fn write_durably(guest: &Backend, record: &RefCell<Record>, until: impl Fn() -> bool) {
    for number in 0..80_u64 {
        let (offset, byte) = (number * 3200 + 64, u8::try_from(number + 1).expect("small"));
        let iov = Buf::from_slice(&[byte; PIECE]).iov();
        guest.write(offset, iov, WriteFlags::FUA).await.expect("written");
        {
            let mut record = record.borrow_mut();
            record.durable.push((offset, byte));
            record.disk = guest.node().expect("it has a medium").name().to_owned();
        }
        bds_io::sleep(Duration::from_micros(300)).await;
        if until() {
            break;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    RawToRaw,
    RawToQcow2,
    Commit,
}

async fn open_all(world: &World, kind: Kind) -> (NodeRef, NodeRef) {
    match kind {
        Kind::RawToRaw => (world.raw("source").await, world.raw("target").await),
        Kind::RawToQcow2 => (world.raw("source").await, world.qcow2("target", "").await),
        Kind::Commit => {
            let base = world.raw("target").await;
            (world.qcow2("source", ",backing=target").await, base)
        }
    }
}

async fn run(world: &World, kind: Kind, mode: CopyMode, record: &RefCell<Record>) {
    let (source, target) = open_all(world, kind).await;
    let guest = writer(&source, "guest");
    "source".clone_into(&mut record.borrow_mut().disk);
    let driver = match kind {
        Kind::Commit => {
            let options = ActiveCommitOptions {
                copy_mode: mode,
                ..ActiveCommitOptions::new(&source, "job0")
            };
            ActiveCommit::prepare(options).await
        }
        Kind::RawToRaw | Kind::RawToQcow2 => {
            let options = MirrorOptions {
                copy_mode: mode,
                granularity: Some(16384),
                ..MirrorOptions::new(&source, &target, "job0")
            };
            Mirror::prepare(options).await
        }
    };
    let driver = Box::new(driver.expect("it can be prepared"));
    let job = world.manager.start(JobOptions::new("job0"), driver).await.expect("it starts");
    let end = async {
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        bds_io::sleep(Duration::from_millis(2)).await;
        job.complete().expect("it completes");
        job.wait().await.expect("it ends well");
        "target".clone_into(&mut record.borrow_mut().disk);
        bds_io::sleep(Duration::from_millis(8)).await;
        record.borrow_mut().ended = true;
    };
    let writes = write_durably(&guest, record, || record.borrow().ended);
    futures_util::future::join(end, writes).await;
}

fn prepared(kind: Kind) -> Sim {
    let world = World::on(Sim::new(1, SimConfig::calm()));
    let bytes = pattern(1, LEN);
    world.block_on(async {
        match kind {
            Kind::RawToRaw => {
                world.put("source", &bytes);
                world.put("target", &pattern(2, LEN));
            }
            Kind::RawToQcow2 => {
                world.put("source", &bytes);
                world.make_qcow2("target", &format!("size={LEN},cluster_size=16384")).await;
            }
            Kind::Commit => {
                world.put("target", &bytes);
                world.make_qcow2("source", &format!("size={LEN},cluster_size=16384")).await;
            }
        }
    });
    let sim = world.sim.clone();
    world.end();
    sim
}

/// Checks the disk after a cut.
fn check(sim: &Sim, kind: Kind, record: &Record, n: u64) {
    for seed in 0..2 {
        let world = World::on(sim.after_cut(seed));
        world.block_on(async {
            let (source, target) = open_all(&world, kind).await;
            let disk = if record.disk == "target" { &target } else { &source };
            let found = bytes_of(disk).await;
            let mut expected = pattern(1, LEN);
            let mut is_known = vec![true; expected.len()];
            // The write under way may be there or not.
            let next = record.durable.len() as u64 * 3200 + 64;
            for (offset, byte) in &record.durable {
                let start = usize::try_from(*offset).expect("small");
                expected[start..start + PIECE].fill(*byte);
            }
            let start = usize::try_from(next).expect("small").min(expected.len());
            let end = (start + PIECE).min(expected.len());
            is_known[start..end].fill(false);
            let wrong = (0..expected.len()).find(|at| is_known[*at] && found[*at] != expected[*at]);
            if let Some(at) = wrong {
                panic!(
                    "{kind:?}, cut at {n}, disk '{}', {} durable writes: byte {at:#x} is {:#x}, not \
                     {:#x}",
                    record.disk,
                    record.durable.len(),
                    found[at],
                    expected[at]
                );
            }
        });
        drop(world.block_on(world.graph.shutdown()));
        let World { sim, graph, manager } = world;
        cut_power_holding(&sim, (graph, manager));
    }
}

/// Returns the number of cuts before the end of the job and after it.
fn sweep(kind: Kind, mode: CopyMode, seed: u64) -> (u64, u64) {
    let (start, seed) = (prepared(kind), seed + 1);
    let record = RefCell::new(Record::default());
    let whole = World::on(start.fork(seed));
    whole.block_on(run(&whole, kind, mode, &record));
    let all = whole.sim.writes();
    drop(whole.block_on(whole.graph.shutdown()));
    assert_eq!(record.borrow().disk, "target");
    let (mut on_source, mut on_target) = (0, 0);
    for n in 1..=all {
        let record = RefCell::new(Record::default());
        let sim = start.fork(seed);
        let world = World::on(sim.clone());
        sim.cut_after_writes(Some(n));
        let ended = sim.run_until_cut(run(&world, kind, mode, &record));
        let World { graph, manager, .. } = world;
        cut_power_holding(&sim, (graph, manager));
        let record = record.into_inner();
        match record.disk.as_str() {
            "target" => on_target += 1,
            _ => on_source += 1,
        }
        if ended.is_none() {
            check(&sim, kind, &record, n);
        }
    }
    (on_source, on_target)
}

fn sweep_all(cases: &[(Kind, CopyMode)]) {
    let (mut on_source, mut on_target) = (0, 0);
    for seed in 0.. {
        for (kind, mode) in cases {
            let (source, target) = sweep(*kind, *mode, seed);
            assert!(source > 3 && target > 3, "{source} cuts on the source, {target} after");
            (on_source, on_target) = (on_source + source, on_target + target);
        }
        if on_source + on_target >= CRASH_POINTS || !is_full() {
            break;
        }
    }
    report(&format!("{on_source} power cuts before the end of {cases:?}, {on_target} after it"));
}

#[test]
fn a_power_cut_at_each_write_of_a_background_mirror_loses_nothing() {
    let mode = CopyMode::Background;
    sweep_all(&[(Kind::RawToRaw, mode), (Kind::RawToQcow2, mode)]);
}

#[test]
fn a_power_cut_at_each_write_of_a_synced_mirror_loses_nothing() {
    let mode = CopyMode::WriteBlocking;
    sweep_all(&[(Kind::RawToRaw, mode), (Kind::RawToQcow2, mode)]);
}

#[test]
fn a_power_cut_at_each_write_of_an_active_commit_loses_nothing() {
    sweep_all(&[(Kind::Commit, CopyMode::Background), (Kind::Commit, CopyMode::WriteBlocking)]);
}
