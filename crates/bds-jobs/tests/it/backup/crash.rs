//! Power cuts: after COMPLETED the copy is complete; before, the disk is legal.
//!
//! A sample by default; `BDS_TEST_BUDGET=full` cuts 10,000 times.

use std::sync::{Arc, Mutex};

use bds_io::{Sim, SimConfig};
use bds_jobs::backup::BackupOptions;

use crate::budget::{CRASH_POINTS, cut_power_holding, is_full, report};

use super::Chance;
use super::kit::{World, Writer, content, user};

/// One way to run it.
#[derive(Clone, Copy, Debug)]
struct Case {
    kind: &'static str,
    compress: bool,
    seed: u64,
}

/// What a run found out before the power went.
#[derive(Default)]
struct Seen {
    guest: Option<Arc<Writer>>,
    /// Writes of the world when the job was done.
    completed_at: Option<u64>,
}

/// A backup, then some more writes of the guest without a flush, until the power is cut.
async fn scenario(sim: &Sim, case: Case, seen: &Mutex<Seen>) {
    let Case { kind, compress, seed } = case;
    let world = &World::on(sim);
    let source = world.make("disk", "qcow2").await;
    let target = world.make("copy", kind).await;
    let guest = Writer::new(&source).await;
    let mut rng = Chance::new(5 + seed);
    for _ in 0..12 {
        guest.step(&mut rng).await.unwrap();
    }
    user(&source, true).flush().await.unwrap();
    seen.lock().unwrap().guest = Some(guest.clone());
    let mut options = BackupOptions::new(&source, &target, "job0");
    options.compress = compress;
    options.staging_len = if seed.is_multiple_of(2) { 0 } else { 1 << 20 };
    let job = world.start(options).await;
    for _ in 0..6 {
        guest.step(&mut rng).await.unwrap();
    }
    job.wait().await.unwrap();
    seen.lock().unwrap().completed_at = Some(sim.writes());
    for _ in 0..4 {
        guest.step(&mut rng).await.unwrap();
    }
}

/// What is left of a run.
struct Run {
    sim: Sim,
    writes: u64,
    /// None if it did not get that far.
    guest: Option<Arc<Writer>>,
    /// Writes of the world when the job was done.
    completed_at: Option<u64>,
}

/// Runs the scenario until a cut, or to its end.
fn cut_at(cut: Option<u64>, case: Case) -> Run {
    let sim = Sim::new(1 + case.seed, SimConfig::default());
    sim.cut_after_writes(cut);
    let seen = Mutex::new(Seen::default());
    let _lost = sim.run_until_cut(scenario(&sim, case, &seen));
    let Seen { guest, completed_at } = seen.into_inner().unwrap();
    let writes = sim.writes();
    sim.power_cut();
    Run { sim, writes, guest, completed_at }
}

/// The states of the disk from the start of the job on, up to the last request that was begun.
fn states(guest: &Writer) -> Vec<Vec<u8>> {
    (12..=guest.begun()).map(|n| guest.state(n)).collect()
}

async fn check(after: &Sim, kind: &str, states: &[Vec<u8>], is_completed: bool, words: &str) {
    let world = World::on(after);
    if is_completed {
        let copy = world.open("copy", kind, None).await;
        assert!(content(&copy).await == states[0], "{words}: the copy is not whole");
    }
    // What was flushed is there, unless a later write changed it.
    let disk = content(&world.open("disk", "qcow2", None).await).await;
    for (number, sector) in disk.chunks(512).enumerate() {
        let at = number * 512;
        let is_legal = |range: std::ops::Range<usize>| {
            states.iter().any(|state| state[range.clone()] == disk[range.clone()])
        };
        // The write in flight may be torn anywhere.
        let mut bytes = at..at + sector.len();
        let legal = is_legal(bytes.clone()) || bytes.all(|byte| is_legal(byte..byte + 1));
        assert!(legal, "{words}: sector {number} of the disk");
    }
    drop(disk);
    drop(world.graph().shutdown().await);
}

/// Cuts at every write after the job's end, and at every `step`th before. Returns how many cuts.
fn sweep(case: Case, step: usize) -> u64 {
    let Run { sim, writes, guest, completed_at } = cut_at(None, case);
    let completed_at = completed_at.unwrap();
    assert!(completed_at < writes);
    // Its requests are the same in all runs: only their number differs.
    let all = guest.as_deref().map(states).unwrap();
    cut_power_holding(&sim, guest);
    let mut count = 0;
    for cut in (0..completed_at).step_by(step).chain(completed_at..=writes) {
        let Run { sim, guest, completed_at: completed, .. } = cut_at(Some(cut), case);
        let begun = guest.as_ref().map(|guest| guest.begun());
        cut_power_holding(&sim, guest);
        let Some(begun) = begun else { continue };
        let states = &all[..=begun - 12];
        count += 1;
        for seed in 0..4 {
            let after = sim.after_cut(seed);
            let words = format!("{case:?}, cut {cut}, seed {seed}");
            after.block_on(check(&after, case.kind, states, completed.is_some(), &words));
        }
    }
    count
}

#[test]
fn a_power_cut_after_completed_finds_the_whole_copy() {
    let mut count = 0;
    for seed in 0.. {
        for (kind, compress) in [("qcow2", false), ("raw", false), ("qcow2", true)] {
            count += sweep(Case { kind, compress, seed }, if is_full() { 1 } else { 7 });
        }
        if count >= CRASH_POINTS || !is_full() {
            break;
        }
    }
    report(&format!("{count} power cuts of a backup"));
}
