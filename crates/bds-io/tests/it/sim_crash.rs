//! Power cuts: flushed changes survive, of the others some.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use bds_io::sim::{CutMode, OpMask};
use bds_io::{File, IoVec, OpenOptions, Sim, SimConfig, ZeroMode};

fn open(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(path), &options).expect("no fault is armed")
}

/// Writes all of it, however short the single writes are.
async fn put(file: &File, offset: u64, byte: u8, len: usize) {
    let iov = IoVec::from(vec![byte; len]);
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        done += file.write(at, iov.slice(done..len), false).await.expect("no fault is armed");
    }
}

#[test]
fn flushed_writes_survive_a_cut_and_others_may_be_lost() {
    let (mut lost, mut kept, mut torn) = (0, 0, 0);
    for seed in 0..1000 {
        // Nothing short or split, so that each sector is written once.
        let sim = Sim::new(seed, SimConfig::calm());
        let file = open(&sim, "a");
        sim.block_on(async {
            put(&file, 0, 1, 8192).await;
            file.sync_data().await.expect("no fault is armed");
            put(&file, 8192, 2, 8192).await;
        });
        let after = sim.after_cut(seed ^ 0x5eed);
        let content = after.snapshot_file("a");
        assert!(content.len() >= 8192, "seed {seed}: the length was flushed too");
        let (flushed, rest) = content.split_at(8192);
        assert!(flushed.iter().all(|byte| *byte == 1), "seed {seed}");
        for sector in rest.chunks(512) {
            assert!(sector.iter().all(|byte| *byte == sector[0]), "seed {seed}: inside a sector");
            assert!([0, 2].contains(&sector[0]), "seed {seed}");
        }
        match rest.iter().filter(|byte| **byte == 2).count() {
            0 => lost += 1,
            8192 => kept += 1,
            _ => torn += 1,
        }
    }
    assert!(lost > 100 && kept > 100 && torn > 100, "lost {lost}, kept {kept}, torn {torn}");
}

#[test]
fn a_torn_append_grows_the_file_by_whole_sectors() {
    let mut lens = BTreeSet::new();
    for seed in 0..400 {
        let sim = Sim::new(seed, SimConfig::calm());
        sim.put_file("a", &[9; 700]);
        let file = open(&sim, "a");
        sim.block_on(put(&file, 700, 1, 1500));
        let content = sim.after_cut_by(seed, CutMode::Tear).snapshot_file("a");
        assert!(
            content[..700].iter().all(|byte| *byte == 9),
            "seed {seed}: a neighbour in the sector"
        );
        lens.insert(content.len());
    }
    assert_eq!(lens, BTreeSet::from([700, 1024, 1536, 2048, 2200]));
}

#[test]
fn a_later_write_may_survive_an_earlier_one() {
    let mut seen = BTreeSet::new();
    for seed in 0..300 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[9; 8192]);
        let file = open(&sim, "a");
        sim.block_on(async {
            put(&file, 0, 1, 4096).await;
            put(&file, 4096, 2, 4096).await;
        });
        let content = sim.after_cut_by(seed, CutMode::Reorder).snapshot_file("a");
        seen.insert((content[0], content[4096]));
    }
    assert_eq!(seen, BTreeSet::from([(9, 9), (1, 9), (9, 2), (1, 2)]));
}

#[test]
fn versions_of_a_sector_build_on_each_other() {
    let mut seen = BTreeSet::new();
    for seed in 0..400 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[0; 512]);
        let file = open(&sim, "a");
        sim.block_on(async {
            for byte in 1..=3u8 {
                put(&file, u64::from(byte), byte, 1).await;
            }
        });
        let content = sim.after_cut_by(seed, CutMode::Tear).snapshot_file("a");
        seen.insert([content[1], content[2], content[3]]);
    }
    assert_eq!(seen, BTreeSet::from([[0, 0, 0], [1, 0, 0], [1, 2, 0], [1, 2, 3]]));
}

#[test]
fn a_write_that_races_with_a_sync_may_be_lost() {
    let mut survived = BTreeSet::new();
    for seed in 0..300 {
        let sim = Sim::new(seed, SimConfig::calm());
        sim.put_file("a", &[0; 4096]);
        let file = open(&sim, "a");
        sim.block_on(async {
            let iov = IoVec::from(vec![1; 512]);
            let (write, sync) = futures_util::join!(file.write(0, iov, false), file.sync_data());
            assert!(write.is_ok() && sync.is_ok());
        });
        survived.insert(sim.after_cut_by(seed, CutMode::LoseAll).snapshot_file("a")[0]);
    }
    assert_eq!(survived, BTreeSet::from([0]), "it was not complete when the sync was submitted");
}

#[test]
fn a_dsync_write_is_durable_when_it_returns() {
    for seed in 0..200 {
        let sim = Sim::new(seed, SimConfig::calm());
        let file = open(&sim, "a");
        sim.block_on(async {
            put(&file, 0, 1, 1024).await;
            file.write(1024, IoVec::from(vec![2; 1024]), true).await.expect("no fault is armed");
        });
        let content = sim.after_cut(seed).snapshot_file("a");
        assert_eq!(content.len(), 2048, "seed {seed}");
        assert!(content[1024..].iter().all(|byte| *byte == 2), "seed {seed}");
    }
}

#[test]
fn lengths_zeros_and_holes_are_volatile_until_synced() {
    let mut seen = BTreeSet::new();
    for seed in 0..600 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[9; 16384]);
        let file = open(&sim, "a");
        sim.block_on(async {
            file.zero_range(0..4096, ZeroMode::PunchHole).await.expect("no fault is armed");
            file.zero_range(4096..8192, ZeroMode::Allocate).await.expect("no fault is armed");
            file.set_len(12288).await.expect("no fault is armed");
        });
        assert_eq!(sim.durable_file("a"), vec![9; 16384], "seed {seed}");
        let content = sim.after_cut_by(seed, CutMode::Reorder).snapshot_file("a");
        seen.insert((content[0], content[4096], content.len()));
    }
    assert_eq!(seen.len(), 8, "each on its own: {seen:?}");
}

#[test]
fn a_truncated_file_does_not_get_old_bytes_back() {
    for seed in 0..500 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[9; 8192]);
        let file = open(&sim, "a");
        sim.block_on(async {
            file.set_len(0).await.expect("no fault is armed");
            file.set_len(8192).await.expect("no fault is armed");
            put(&file, 4096, 2, 512).await;
        });
        let content = sim.after_cut(seed).snapshot_file("a");
        let old = content.iter().filter(|byte| **byte == 9).count();
        // The truncation survived or not, with everything after it.
        assert!(
            old == 8192 || (old == 0 && (content.is_empty() || content.len() == 8192)),
            "seed {seed}"
        );
    }
}

#[test]
fn a_crash_sweep_covers_every_state_changing_operation() {
    let work = |file: File| async move {
        put(&file, 0, 1, 2048).await;
        file.sync_data().await.expect("no fault is armed");
        file.set_len(100_000).await.expect("no fault is armed");
        file.sync_data().await.expect("no fault is armed");
    };
    for seed in 0..20 {
        let whole = Sim::new(seed, SimConfig::default());
        whole.block_on(work(open(&whole, "a")));
        let writes = whole.writes();
        assert_eq!(writes, whole.ops_of(OpMask::CHANGE));
        for n in 0..=writes {
            let sim = Sim::new(seed, SimConfig::default());
            let file = open(&sim, "a");
            sim.cut_after_writes(Some(n));
            let end = sim.run_until_cut(work(file));
            assert_eq!(end.is_some(), n == writes, "seed {seed}, cut at {n} of {writes}");
            let len = sim.after_cut(seed).snapshot_file("a").len();
            if n + 2 >= writes {
                assert!(len >= 2048, "seed {seed}, cut at {n} of {writes}: {len} bytes left");
            }
            if n == writes {
                assert_eq!(len, 100_000);
            }
        }
    }
}

#[test]
fn one_cut_is_followed_by_a_world_for_each_seed() {
    let sim = Sim::new(1, SimConfig::default());
    sim.put_file("a", &[9; 65536]);
    let file = open(&sim, "a");
    sim.block_on(put(&file, 0, 1, 65536));
    let images: BTreeSet<Vec<u8>> =
        (0..50).map(|seed| sim.after_cut(seed).snapshot_file("a")).collect();
    assert!(images.len() > 10, "{} images", images.len());
    let again = |seed| sim.after_cut(seed).snapshot_file("a");
    assert_eq!(again(7), again(7));
}

#[test]
fn a_world_after_a_cut_works_and_can_be_cut_again() {
    let sim = Sim::new(1, SimConfig::default());
    let file = open(&sim, "a");
    sim.block_on(async {
        put(&file, 0, 1, 4096).await;
        file.sync_data().await.expect("no fault is armed");
    });
    let second = sim.after_cut(2);
    let file = open(&second, "a");
    second.block_on(async {
        put(&file, 0, 2, 512).await;
        file.sync_data().await.expect("no fault is armed");
        put(&file, 512, 3, 512).await;
    });
    let content = second.after_cut_by(3, CutMode::LoseAll).snapshot_file("a");
    assert_eq!((content[0], content[512], content[4095]), (2, 1, 1));
}

#[test]
fn an_unsynced_name_may_be_lost_if_names_are_volatile() {
    let config = SimConfig { volatile_names: true, ..SimConfig::default() };
    let mut seen = BTreeSet::new();
    for seed in 0..100 {
        let sim = Sim::new(seed, config.clone());
        let (synced, unsynced) = (open(&sim, "synced"), open(&sim, "unsynced"));
        sim.block_on(async {
            put(&unsynced, 0, 1, 512).await;
            synced.sync_data().await.expect("no fault is armed");
        });
        let after = sim.after_cut(seed);
        assert!(after.exists("synced"), "seed {seed}");
        seen.insert(after.exists("unsynced"));
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn a_fork_starts_from_the_visible_content_and_is_independent() {
    let sim = Sim::new(1, SimConfig::default());
    let file = open(&sim, "a");
    sim.block_on(put(&file, 0, 1, 4096));
    let fork = sim.fork(2);
    let other = open(&fork, "a");
    fork.block_on(put(&other, 0, 2, 512));
    assert_eq!(sim.snapshot_file("a"), vec![1; 4096]);
    assert_eq!(fork.snapshot_file("a")[..1024], [vec![2; 512], vec![1; 512]].concat());
    assert_eq!(fork.durable_file("a"), vec![1; 4096], "a prepared image is durable");
}

#[test]
fn a_cut_at_a_moment_ends_sleepers_and_io() {
    let sim = Sim::new(1, SimConfig::default());
    let file = open(&sim, "a");
    sim.cut_at(Duration::from_secs(5));
    let end = sim.run_until_cut(async {
        loop {
            bds_io::sleep(Duration::from_secs(1)).await;
            put(&file, 0, 1, 512).await;
        }
    });
    assert_eq!((end, sim.now()), (None::<()>, Duration::from_secs(5)));
    assert!(sim.writes() >= 4);
    sim.run_until_idle();
    assert!(sim.run_until_cut(file.sync_data()).is_none(), "nothing goes on after a cut");
}
