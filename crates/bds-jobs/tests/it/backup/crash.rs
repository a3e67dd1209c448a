//! Power cuts: after COMPLETED the copy is complete; before, the disk is legal.

use std::sync::{Arc, Mutex};

use bds_io::{Sim, SimConfig};
use bds_jobs::backup::BackupOptions;

use super::Chance;
use super::kit::{World, Writer, content, user};

/// What a run found out before the power went.
#[derive(Default)]
struct Seen {
    guest: Option<Arc<Writer>>,
    /// Writes of the world when the job was done.
    completed_at: Option<u64>,
}

/// A backup, then some more writes of the guest without a flush, until the power is cut.
async fn scenario(sim: &Sim, kind: &str, compress: bool, seen: &Mutex<Seen>) {
    let world = &World::on(sim);
    let source = world.make("disk", "qcow2").await;
    let target = world.make("copy", kind).await;
    let guest = Writer::new(&source).await;
    let mut rng = Chance::new(5);
    for _ in 0..12 {
        guest.step(&mut rng).await.unwrap();
    }
    user(&source, true).flush().await.unwrap();
    seen.lock().unwrap().guest = Some(guest.clone());
    let mut options = BackupOptions::new(&source, &target, "job0");
    options.compress = compress;
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

/// Runs the scenario until a cut, and returns the states of the disk that were possible, if it got
/// that far, and whether the job was done.
fn cut_at(cut: Option<u64>, kind: &str, compress: bool) -> (Sim, Vec<Vec<u8>>, Option<u64>) {
    let sim = Sim::new(1, SimConfig::default());
    sim.cut_after_writes(cut);
    let seen = Mutex::new(Seen::default());
    let _lost = sim.run_until_cut(scenario(&sim, kind, compress, &seen));
    let Seen { guest, completed_at } = seen.into_inner().unwrap();
    let states = guest.map(|guest| (12..=guest.begun()).map(|n| guest.state(n)).collect());
    (sim, states.unwrap_or_default(), completed_at)
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
}

#[test]
fn a_power_cut_after_completed_finds_the_whole_copy() {
    for (kind, compress) in [("qcow2", false), ("raw", false), ("qcow2", true)] {
        let (sim, _, completed_at) = cut_at(None, kind, compress);
        let (writes, completed_at) = (sim.writes(), completed_at.unwrap());
        assert!(completed_at < writes);
        // Every write after the job's end, and some before.
        let cuts = (0..completed_at).step_by(7).chain(completed_at..=writes);
        for cut in cuts {
            let (sim, states, completed) = cut_at(Some(cut), kind, compress);
            if states.is_empty() {
                continue;
            }
            for seed in 0..4 {
                let after = sim.after_cut(seed);
                let words = format!("{kind}, cut {cut}, seed {seed}");
                after.block_on(check(&after, kind, &states, completed.is_some(), &words));
            }
        }
    }
}
