//! Crash consistency on random workloads: after a cut a sector has its content of one moment, not
//! older than the last completed sync.

use std::path::Path;
use std::sync::{Arc, Mutex};

use bds_io::sim::CutMode;
use bds_io::{File, IoVec, OpenOptions, Sim, SimConfig, ZeroMode};

fn index(at: u64) -> usize {
    usize::try_from(at).expect("a small file")
}

/// One state-changing step of a random workload on one file.
#[derive(Clone, Debug)]
enum Step {
    Write { offset: u64, len: usize, byte: u8, is_dsync: bool },
    Zero { offset: u64, len: u64, mode: ZeroMode },
    SetLen(u64),
    Sync,
}

fn steps(seed: u64) -> Vec<Step> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |bound: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    };
    (1..=20u8)
        .map(|byte| {
            let (offset, len) = (below(9000), 1 + below(3000));
            match below(8) {
                0..=3 => Step::Write { offset, len: index(len), byte, is_dsync: below(8) == 0 },
                4 => Step::Zero { offset, len, mode: ZeroMode::PunchHole },
                5 => Step::Zero { offset, len, mode: ZeroMode::Allocate },
                6 => Step::SetLen(below(12_000)),
                _ => Step::Sync,
            }
        })
        .collect()
}

/// The same step on plain bytes.
fn model(content: &mut Vec<u8>, step: &Step) {
    let mut put = |offset: u64, len: usize, byte: u8, may_grow: bool| {
        let (start, mut end) = (index(offset), index(offset) + len);
        if may_grow && content.len() < end {
            content.resize(end, 0);
        }
        end = end.min(content.len());
        if start < end {
            content[start..end].fill(byte);
        }
    };
    match step {
        Step::Write { offset, len, byte, .. } => put(*offset, *len, *byte, true),
        Step::Zero { offset, len, mode } => {
            put(*offset, index(*len), 0, *mode == ZeroMode::Allocate);
        }
        Step::SetLen(len) => content.resize(index(*len), 0),
        Step::Sync => {}
    }
}

async fn play(file: &File, step: &Step) {
    match step.clone() {
        Step::Write { offset, len, byte, is_dsync } => {
            let iov = IoVec::from(vec![byte; len]);
            assert_eq!(file.write(offset, iov, is_dsync).await.expect("no fault is armed"), len);
        }
        Step::Zero { offset, len, mode } => {
            file.zero_range(offset..offset + len, mode).await.expect("no fault is armed");
        }
        Step::SetLen(len) => file.set_len(len).await.expect("no fault is armed"),
        Step::Sync => file.sync_data().await.expect("no fault is armed"),
    }
}

/// After a cut anywhere in a sequential workload each sector is as it was at one moment since the
/// last sync, and the length is too.
#[test]
fn each_sector_has_one_of_its_versions_after_a_cut() {
    for seed in 0..400u64 {
        let steps = steps(seed);
        let cut = seed % (steps.len() as u64 + 1);
        let sim = Sim::new(seed, SimConfig::calm());
        sim.put_file("a", &[99; 5000]);
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = sim.fs().open(Path::new("a"), &options).expect("no fault is armed");
        sim.cut_after_writes(Some(cut));
        let end = sim.run_until_cut(async {
            for step in &steps {
                play(&file, step).await;
            }
        });
        assert_eq!(end.is_some(), cut == steps.len() as u64);
        let mut versions = vec![vec![99; 5000]];
        for (number, step) in (0u64..).zip(&steps).take(index(cut) + 1) {
            let mut next = versions.last().expect("never empty").clone();
            model(&mut next, step);
            // The step in flight at the cut makes nothing durable.
            if matches!(step, Step::Sync) && number < cut {
                versions.clear();
            }
            versions.push(next);
        }
        for again in 0..8 {
            check_versions(&sim.after_cut(again).snapshot_file("a"), &versions, seed);
        }
        let all = sim.after_cut_by(0, CutMode::KeepAll).snapshot_file("a");
        assert_eq!(Some(&all), versions.last(), "seed {seed}: everything kept");
        let none = sim.after_cut_by(0, CutMode::LoseAll).snapshot_file("a");
        check_versions(&none, &versions, seed);
    }
}

fn check_versions(content: &[u8], versions: &[Vec<u8>], seed: u64) {
    let least = versions.iter().map(Vec::len).min().expect("never empty");
    let most = versions.iter().map(Vec::len).max().expect("never empty");
    assert!((least..=most).contains(&content.len()), "seed {seed}: {} bytes left", content.len());
    for (number, sector) in content.chunks(512).enumerate() {
        let is_version = |version: &Vec<u8>| {
            let byte = |at: usize| version.get(number * 512 + at).copied().unwrap_or(0);
            sector.iter().enumerate().all(|(at, kept)| *kept == byte(at))
        };
        assert!(
            versions.iter().any(is_version),
            "seed {seed}: sector {number} was never like this"
        );
    }
}

/// Versions written by four writers, each in a region of its own.
#[derive(Default)]
struct Known {
    submitted: [u8; 4],
    acked: [u8; 4],
    flushed: [u8; 4],
}

const REGION_LEN: usize = 4096;

async fn writer(file: File, region: usize, known: Arc<Mutex<Known>>) {
    let with =
        |look: &mut dyn FnMut(&mut Known)| look(&mut known.lock().expect("no holder panicked"));
    for version in 1..=12 {
        with(&mut |known| known.submitted[region] = version);
        let mut done = 0;
        while done < REGION_LEN {
            let iov = IoVec::from(vec![version; REGION_LEN - done]);
            let at = (region * REGION_LEN + done) as u64;
            done += file.write(at, iov, false).await.expect("no fault is armed");
        }
        with(&mut |known| known.acked[region] = version);
        if usize::from(version) % 4 == region {
            // A sync covers all completed writes, not only those of its caller.
            let mut acked = [0; 4];
            with(&mut |known| acked = known.acked);
            file.sync_data().await.expect("no fault is armed");
            with(&mut |known| {
                for (flushed, acked) in known.flushed.iter_mut().zip(acked) {
                    *flushed = acked.max(*flushed);
                }
            });
        }
    }
}

#[test]
fn a_sync_covers_all_writes_completed_before_it() {
    for seed in 0..400 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[0; 4 * REGION_LEN]);
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let file = sim.fs().open(Path::new("a"), &options).expect("no fault is armed");
        sim.cut_after_writes(Some(seed % 60));
        let known = Arc::new(Mutex::new(Known::default()));
        let _ = sim.run_until_cut(async {
            let start = |region| bds_io::spawn(writer(file.clone(), region, known.clone()));
            for task in (0..4).map(start).collect::<Vec<_>>() {
                task.await;
            }
        });
        let known = known.lock().expect("no holder panicked");
        for again in 0..4 {
            let content = sim.after_cut(again).snapshot_file("a");
            for (region, bytes) in content.chunks(REGION_LEN).enumerate() {
                let legal = known.flushed[region]..=known.submitted[region];
                let stray = bytes.iter().find(|version| !legal.contains(version));
                assert_eq!(stray, None, "seed {seed}, region {region}: {legal:?}");
            }
        }
    }
}
