//! Cycles of start, and success or cancel at a random moment, of backups, commits and streams, with
//! a second client that comes at a random moment: no acknowledged write is lost, and what the job
//! made is what it promised. Mirrors and active commits, which are completed, have theirs in
//! `mirror/cycles.rs`.
//!
//! Twenty of each by default, `BDS_TEST_BUDGET=full` a thousand, `BDS_TEST_SEED=7` one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bds_core::ErrorKind;
use bds_io::{Sim, SimConfig};
use bds_jobs::{JobHandle, JobOptions};
use bds_testkit::Chance;

use crate::budget;
use crate::load::{Load, Pace};

use super::rig::{Kind, Rig, backend};

const LEN: u64 = 128 << 10;
const CYCLED: [Kind; 4] = [Kind::Backup, Kind::BackupStaged, Kind::Commit, Kind::Stream];

async fn pause(chance: &mut Chance, max_us: u64) {
    bds_io::sleep(Duration::from_micros(chance.below(max_us))).await;
}

/// Lets the job go on, or cancels it after a while; true if it succeeded.
async fn finish(job: &JobHandle, chance: &mut Chance) -> bool {
    if chance.one_in(2) {
        pause(chance, 2000).await;
        // Refused: it has ended.
        let _late = job.cancel(true);
    }
    match job.wait().await {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
            false
        }
    }
}

/// True if the job succeeded.
async fn cycle(sim: &Sim, kind: Kind, seed: u64) -> bool {
    let mut chance = Chance::new(seed ^ 0xc1c1e);
    let words = format!("cycle {seed}");
    let mut rig = Rig::make(sim.fs(), Path::new("/"), kind, LEN, seed).await;
    let pace = Pace { depth: 3, max_pause_us: chance.between(20, 600), most: u64::MAX };
    let load = rig.load_of(seed, pace);
    pause(&mut chance, 1500).await;
    let job = rig.start(JobOptions::new("j")).await.unwrap();
    pause(&mut chance, 1500).await;
    // At the node that the first one uses now: a filter, if the job has one there.
    let late = backend(&rig.guest.node().unwrap(), "late", true).unwrap();
    let mut second = Load::paced(&late, Arc::clone(&rig.model), seed ^ 0x1a7e, pace);
    let succeeded = finish(&job, &mut chance).await;
    pause(&mut chance, 1500).await;
    assert_eq!((load.failures(), second.failures()), (0, 0), "{kind:?} {words}");
    assert_eq!(job.info().cleanup_error, None, "{kind:?} {words}");
    second.stop().await;
    assert_eq!(late.node().unwrap().id(), rig.guest.node().unwrap().id(), "{kind:?} {words}");
    drop((late, second));
    rig.finish(load, succeeded, sim.fs(), &words).await;
    succeeded
}

#[test]
fn no_write_is_lost_over_cycles_of_backups_commits_and_streams() {
    for kind in CYCLED {
        let (mut succeeded, mut cancelled) = (0, 0);
        for seed in budget::seeds(20, budget::CYCLES) {
            let sim = Sim::new(seed, SimConfig::default());
            match sim.block_on(cycle(&sim, kind, seed)) {
                true => succeeded += 1,
                false => cancelled += 1,
            }
        }
        let is_both = succeeded > 0 && cancelled > 0;
        assert!(is_both || succeeded + cancelled < 20, "{kind:?}: {succeeded}, {cancelled}");
        budget::report(&format!("{kind:?}: {succeeded} succeeded, {cancelled} cancelled"));
    }
}
