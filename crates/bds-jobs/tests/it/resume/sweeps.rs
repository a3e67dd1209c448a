//! Power cuts at every write, failures of every operation, and cancels at every moment, of copies
//! that go on with a record.
//!
//! The job that goes on afterwards believes the record (`check-target=none`): where the record said
//! of one chunk what is not so, the copy would be wrong.

use std::time::Duration;

use bds_io::Sim;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::record::{CheckTarget, ManifestOptions, RecordOptions};

use super::kit::{
    CHUNK, KINDS, Kind, RECORD, World, content, finish, interrupt_in, manifest, record, verify,
    write, writer,
};

const MANIFEST: &str = "/z-manifest";
/// Length of the small disks: no multiple of a chunk.
const LEN: u64 = 20 * CHUNK + 1536;
/// Two pages of a record, and a bit.
const LONG: u64 = 260 * CHUNK + 512;

/// `BDS_TEST_BUDGET=full` runs everything.
fn step(usual: usize) -> usize {
    let is_full = std::env::var("BDS_TEST_BUDGET").is_ok_and(|budget| budget == "full");
    if is_full { 1 } else { usual }
}

/// A copy that was interrupted at its half, of which the source has changed since.
fn interrupted(kind: Kind, len: u64) -> Sim {
    let (sim, _) = interrupt_in(World::sized(1, len), kind, len / 2);
    let world = World::on(sim);
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let guest = writer(&source);
        for chunk in [2, 6, len / CHUNK - 2] {
            write(&guest, chunk * CHUNK + 5, b"changed").await;
        }
        guest.flush().await.unwrap();
    });
    world.end();
    sim.fork(1)
}

/// Goes on with it, while a guest writes.
async fn go_on(world: &World, kind: Kind) -> bds_core::Result<()> {
    let source = world.open("source").await;
    let (target, _) = world.metered().await;
    let guest = writer(&source);
    let tracked = (Some(record()), Some(ManifestOptions::new(MANIFEST)));
    let driver = world.prepare(kind, (&source, &target), tracked).await?;
    let job = world.jobs.start(bds_jobs::JobOptions::new("job0"), driver).await?;
    let writes = async {
        for number in 0..6 {
            // The guest's disk may fail too.
            let at = (number * 3 + 1) * CHUNK + 70;
            let iov = bds_io::Buf::from_slice(b"in use").iov();
            let _written = guest.write(at, iov, bds_core::driver::WriteFlags::empty()).await;
            bds_io::sleep(Duration::from_millis(3)).await;
        }
    };
    futures_util::future::join(finish(kind, &job), writes).await.0
}

/// Ends an interrupted copy, believing its record, and compares.
fn check(sim: Sim, kind: Kind, words: &str) {
    let world = World::on(sim);
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let (target, meter) = world.metered().await;
        let trusting = RecordOptions { check_target: CheckTarget::None, ..record() };
        let tracked = (Some(trusting), Some(ManifestOptions::new(MANIFEST)));
        let job = world.start_with(kind, (&source, &target), tracked).await;
        finish(kind, &job).await.unwrap();
        // Chunks that a guest's write covers in part are read for the manifest, and no others.
        assert_eq!(meter.read(), 0, "{words}: the record was believed");
        assert!(content(&target).await == content(&source).await, "{words}: the copy is wrong");
        assert!(verify(&manifest(&sim, MANIFEST), &target).await.is_good(), "{words}");
        assert!(!sim.exists(RECORD), "{words}");
    });
    world.end();
}

fn sweep_power_cuts(kind: Kind, len: u64, step: usize) {
    let start = interrupted(kind, len);
    let whole = World::on(start.fork(1));
    whole.sim.block_on(go_on(&whole, kind)).unwrap();
    let all = whole.sim.writes();
    whole.end();
    for n in (1..=all).step_by(step) {
        let sim = start.fork(1);
        sim.cut_after_writes(Some(n));
        let world = World::on(sim.clone());
        if sim.run_until_cut(go_on(&world, kind)).is_some() {
            continue;
        }
        drop(world);
        for seed in 0..2 {
            check(sim.after_cut(seed), kind, &format!("{kind:?}, cut at {n}, seed {seed}"));
        }
    }
}

#[test]
fn a_power_cut_at_each_write_of_a_resumed_copy_leaves_a_right_record() {
    for kind in KINDS {
        sweep_power_cuts(kind, LEN, step(2));
    }
}

#[test]
fn a_power_cut_of_a_resumed_copy_with_many_pages_leaves_a_right_record() {
    for kind in KINDS {
        sweep_power_cuts(kind, LONG, step(79));
    }
}

#[test]
fn a_failure_of_each_operation_of_a_resumed_copy_leaves_a_right_record() {
    for kind in KINDS {
        let start = interrupted(kind, LEN);
        let whole = World::on(start.fork(1));
        whole.sim.block_on(go_on(&whole, kind)).unwrap();
        let all = whole.sim.ops_of(OpMask::IO | OpMask::OPEN);
        whole.end();
        let mut failed = 0;
        for n in (0..all).step_by(step(3)) {
            let world = World::on(start.fork(1));
            let sim = world.sim.clone();
            let fault = Fault::once(libc::EIO).on(OpMask::IO | OpMask::OPEN).partially();
            sim.fail_nth(n, fault.in_path("z-"));
            let done = sim.block_on(go_on(&world, kind));
            failed += u32::from(done.is_err());
            sim.clear_faults();
            world.end();
            check(sim.fork(1), kind, &format!("{kind:?}, operation {n} failed: {done:?}"));
        }
        assert!(failed > 3, "{kind:?}: {failed} failures");
    }
}

#[test]
fn a_cancel_at_each_moment_of_a_resumed_copy_leaves_a_right_record() {
    for kind in KINDS {
        let start = interrupted(kind, LEN);
        for moment in (0..60).step_by(step(3)) {
            let world = World::on(start.fork(1));
            let sim = world.sim.clone();
            let cancel = async {
                bds_io::sleep(Duration::from_micros(moment * 700)).await;
                if let Ok(job) = world.jobs.job("job0") {
                    let _ended = job.cancel(true);
                }
            };
            let both = futures_util::future::join(go_on(&world, kind), cancel);
            let (done, ()) = sim.block_on(both);
            world.end();
            check(sim.fork(1), kind, &format!("{kind:?}, cancel at {moment}: {done:?}"));
        }
    }
}
