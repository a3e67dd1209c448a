//! Scenarios of the reference in which a copy goes on after a crash: the source or target that is
//! left is legal, and nothing but the rest is copied.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::request::Backend;
use bds_io::{Buf, Sim, SimConfig};
use bds_jobs::JobStatus;
use bds_jobs::record::{CheckTarget, ManifestOptions, RecordOptions};
use bds_testkit::{BLOCK, Chance, StampedDisk, Tick};

use super::kit::{
    CHUNK, Kind, RECORD, World, content, finish, interrupt_in, manifest, pattern, record, verify,
    wait_written, write, writer,
};
use crate::load::Load;

const MANIFEST: &str = "/z-manifest";
/// Length of the disks under load.
const LOADED: u64 = 24 * CHUNK;

/// The power goes at a random moment of a backup under load.
fn cut_backup(seed: u64) -> (Sim, Arc<StampedDisk>, bool) {
    let sim = Sim::new(seed, SimConfig::default());
    sim.put_file("/source", &vec![0; LOADED as usize]);
    sim.put_file("/target", &vec![0xee; LOADED as usize]);
    let world = World::on(sim.clone());
    let disk = Arc::new(StampedDisk::new(seed, LOADED));
    let is_completed = RefCell::new(false);
    let run = async {
        let source = world.open("source").await;
        let (target, meter) = world.metered().await;
        let guest = writer(&source);
        let _load = Load::resume(&guest, Arc::clone(&disk), seed);
        bds_io::sleep(Duration::from_millis(5)).await;
        let tracked = (Some(record()), Some(ManifestOptions::new(MANIFEST)));
        let job = world.start_with(Kind::Backup, (&source, &target), tracked).await;
        let cut = async {
            wait_written(&meter, Chance::new(seed).below(LOADED)).await;
            sim.power_cut();
        };
        let ended = async {
            job.wait().await.unwrap();
            *is_completed.borrow_mut() = true;
        };
        futures_util::future::join(cut, ended).await;
        std::future::pending::<()>().await;
    };
    assert!(sim.run_until_cut(run).is_none());
    (sim, disk, is_completed.into_inner())
}

/// Each block of the disk holds what was durable, or something that was written later.
async fn check_legal(image: &Backend, disk: &StampedDisk, (from, to): (Tick, Tick), words: &str) {
    for block in 0..disk.blocks() {
        let iov = Buf::zeroed(BLOCK as usize, 4096).iov();
        image.read(block * BLOCK, iov.clone()).await.unwrap();
        let checked = disk.check(block, &iov.to_vec(0..iov.len()), from, to);
        checked.unwrap_or_else(|error| panic!("{words}: {error}"));
    }
}

/// Scenario 3: a power cut before COMPLETED. The source is legal, the target is recognisably
/// incomplete (it has a record, and no manifest), and the backup goes on: at a new point in time.
#[test]
fn scenario_3_a_backup_that_was_cut_off_is_recognised_and_goes_on() {
    for seed in 1..13 {
        let (sim, disk, is_completed) = cut_backup(seed);
        let world = World::on(sim.after_cut(seed));
        let words = format!("seed {seed}");
        let sim = world.sim.clone();
        sim.block_on(async {
            assert!(!is_completed && sim.exists(RECORD) && !sim.exists(MANIFEST), "{words}");
            let source = world.open("source").await;
            let guest = writer(&source);
            // The simulated disk tears writes at sectors, as real ones do; a block that was being
            // written may hold parts of two states, which the stamps cannot name.
            let (durable, now) = (disk.durable(), disk.now());
            check_legal(&guest, &disk, (durable, now), &words).await;
            let expected = content(&source).await;
            let (target, _) = world.metered().await;
            let tracked = (Some(record()), Some(ManifestOptions::new(MANIFEST)));
            let job = world.start_with(Kind::Backup, (&source, &target), tracked).await;
            let mut chance = Chance::new(seed);
            let writes = async {
                for _ in 0..40 {
                    write(&guest, chance.below(LOADED - 9000), &pattern(chance.draw(), 9000)).await;
                    bds_io::sleep(Duration::from_micros(500)).await;
                }
            };
            futures_util::future::join(job.wait(), writes).await.0.unwrap();
            assert!(content(&target).await == expected, "{words}");
            assert!(verify(&manifest(&sim, MANIFEST), &target).await.is_good(), "{words}");
            assert!(!sim.exists(RECORD), "{words}");
        });
        world.end();
    }
}

/// What a management program knows after a crash.
#[derive(Default)]
struct Management {
    disk: &'static str,
    /// Writes that were acknowledged as durable: offset and byte.
    durable: Vec<(u64, u8)>,
    ended: bool,
}

const MIRRORED: u64 = 12 * CHUNK;
const PIECE: usize = 3000;

/// A mirror with a record, which is completed while a guest writes durably.
async fn mirror_and_pivot(world: &World, kind: Kind, management: &RefCell<Management>) {
    let source = world.open("source").await;
    let target = world.open("target").await;
    let guest = writer(&source);
    management.borrow_mut().disk = "source";
    let job = world.start(kind, (&source, &target), record()).await;
    let end = async {
        job.wait_status(JobStatus::Ready).await.unwrap();
        job.complete().unwrap();
        job.wait().await.unwrap();
        management.borrow_mut().disk = "target";
        bds_io::sleep(Duration::from_millis(4)).await;
        management.borrow_mut().ended = true;
    };
    let writes = async {
        for number in 0_u8..100 {
            let (offset, byte) = (u64::from(number) * 3200 + 64, number + 1);
            let iov = Buf::from_slice(&[byte; PIECE]).iov();
            guest.write(offset, iov, WriteFlags::FUA).await.unwrap();
            let node = guest.node().expect("it has a medium");
            {
                let mut management = management.borrow_mut();
                management.durable.push((offset, byte));
                management.disk = if node.name() == "target" { "target" } else { "source" };
                if management.ended {
                    break;
                }
            }
            bds_io::sleep(Duration::from_micros(700)).await;
        }
    };
    futures_util::future::join(end, writes).await;
}

/// Checks the disk that management names, and ends the mirror if there is anything left of it.
fn check_mirror(sim: Sim, kind: Kind, management: &Management, words: &str) {
    let world = World::on(sim);
    let sim = world.sim.clone();
    sim.block_on(async {
        let disk = world.open(management.disk).await;
        let found = content(&disk).await;
        let mut expected = pattern(4, MIRRORED);
        for (offset, byte) in &management.durable {
            expected[*offset as usize..][..PIECE].fill(*byte);
        }
        // The write under way may be there, in part or not.
        let next = management.durable.len() * 3200 + 64;
        let legal = found[..next] == expected[..next]
            && found[(next + PIECE).min(found.len())..]
                == expected[(next + PIECE).min(found.len())..];
        assert!(legal, "{words}: the disk '{}' is not legal", management.disk);
        if management.disk == "source" && sim.exists(RECORD) {
            let target = world.open("target").await;
            let trusting = RecordOptions { check_target: CheckTarget::None, ..record() };
            let job = world.start(kind, (&disk, &target), trusting).await;
            finish(kind, &job).await.unwrap();
            let copy = content(&target).await;
            let wrong = (0..found.len()).find(|at| copy[*at] != found[*at]);
            assert_eq!(wrong, None, "{words}: the mirror is wrong");
        }
    });
    world.end();
}

/// Scenario 25: a power cut at any point of a mirror, also during its pivot. The disk that
/// management names is legal: the source before the change of the graph, the target after it.
#[test]
fn scenario_25_a_power_cut_at_each_write_of_a_mirror_leaves_a_legal_disk_and_a_right_record() {
    for kind in [Kind::Mirror, Kind::SyncedMirror] {
        let start = World::sized(4, MIRRORED);
        let start = start.sim.fork(1);
        let world = World::on(start.fork(1));
        let management = RefCell::new(Management::default());
        world.sim.block_on(mirror_and_pivot(&world, kind, &management));
        let all = world.sim.writes();
        world.end();
        let (mut on_source, mut on_target) = (0, 0);
        for n in 1..=all {
            let management = RefCell::new(Management::default());
            let sim = start.fork(1);
            let world = World::on(sim.clone());
            sim.cut_after_writes(Some(n));
            let ended = sim.run_until_cut(mirror_and_pivot(&world, kind, &management));
            drop(world);
            let management = management.into_inner();
            match management.disk {
                "target" => on_target += 1,
                _ => on_source += 1,
            }
            if ended.is_none() && !management.disk.is_empty() {
                let words = format!("{kind:?}, cut at {n}");
                check_mirror(sim.after_cut(n), kind, &management, &words);
            }
        }
        assert!(on_source > 10 && on_target > 2, "{kind:?}: {on_source}, {on_target}");
    }
}

/// Scenario 26: a mirror is killed at its half and goes on: at most 1.05 times what remained is
/// copied, and 2 % of the disk again. (With a real SIGKILL: `bds-cli`'s tests of `mirror`.)
#[test]
fn scenario_26_a_mirror_killed_at_its_half_copies_the_rest_only() {
    const LEN: u64 = 128 << 20;
    for kind in [Kind::Mirror, Kind::Backup] {
        let (sim, before) = interrupt_in(World::sized(26, LEN), kind, LEN / 2);
        let world = World::on(sim);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            let (target, meter) = world.metered().await;
            let job = world.start(kind, (&source, &target), record()).await;
            finish(kind, &job).await.unwrap();
            assert!(content(&target).await == pattern(26, LEN), "{kind:?}");
            let (copied, remained) = (meter.written(), LEN - before);
            let again = copied.saturating_sub(remained);
            assert!(copied * 100 <= remained * 105, "{kind:?}: {copied} of {remained}");
            assert!(again * 100 <= LEN * 2, "{kind:?}: {again} bytes again of {LEN}");
        });
        world.end();
    }
}
