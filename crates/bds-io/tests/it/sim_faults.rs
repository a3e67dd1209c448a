//! Fault injection: failing operations, short transfers, a full disk.

use std::collections::BTreeSet;
use std::path::Path;

use bds_io::sim::{CutMode, Fault, OpMask, SyncFailure};
use bds_io::{File, IoVec, OpenOptions, Sim, SimConfig, ZeroMode};

fn open(sim: &Sim, path: &str) -> File {
    let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
    sim.fs().open(Path::new(path), &options).expect("no fault is armed")
}

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

async fn five(file: &File) -> Vec<Option<i32>> {
    let iov = || IoVec::from(vec![1; 512]);
    vec![
        errno(file.write(0, iov(), false).await),
        errno(file.read(0, iov()).await),
        errno(file.sync_data().await),
        errno(file.set_len(10_000).await),
        errno(file.zero_range(0..4096, ZeroMode::PunchHole).await),
    ]
}

#[test]
fn the_nth_operation_fails_once_or_from_then_on() {
    for n in 0..5 {
        for is_sticky in [false, true] {
            let sim = Sim::new(1, SimConfig::calm());
            let file = open(&sim, "a");
            let fault = if is_sticky { Fault::sticky(libc::EIO) } else { Fault::once(libc::EIO) };
            sim.fail_nth(n as u64, fault);
            let results = sim.block_on(five(&file));
            assert_eq!(sim.ops(), 5);
            for (at, result) in results.into_iter().enumerate() {
                let fails = if is_sticky { at >= n } else { at == n };
                assert_eq!(result, fails.then_some(libc::EIO), "op {at}, fault at {n}");
            }
        }
    }
}

#[test]
fn faults_choose_by_kind_and_by_path() {
    let sim = Sim::new(1, SimConfig::calm());
    let (base, overlay) = (open(&sim, "base.raw"), open(&sim, "overlay.qcow2"));
    sim.fail_nth(1, Fault::once(libc::ENOSPC).on(OpMask::WRITE).in_path("overlay"));
    sim.block_on(async {
        let write = async |file: &File| errno(file.write(0, IoVec::from(vec![1; 8]), false).await);
        assert_eq!(write(&overlay).await, None, "one passes");
        assert_eq!(write(&base).await, None, "another path");
        assert_eq!(errno(overlay.sync_data().await), None, "another kind");
        assert_eq!(write(&overlay).await, Some(libc::ENOSPC));
        assert_eq!(write(&overlay).await, None, "once");
    });
    sim.fail_nth(0, Fault::once(libc::EACCES).on(OpMask::OPEN));
    let opened = sim.fs().open(Path::new("base.raw"), &OpenOptions::default());
    assert_eq!(errno(opened), Some(libc::EACCES));
}

#[test]
fn a_failed_write_does_nothing_or_a_part() {
    for is_partial in [false, true] {
        let mut left = BTreeSet::new();
        for seed in 0..100 {
            let sim = Sim::new(seed, SimConfig::default());
            let file = open(&sim, "a");
            let fault = Fault::once(libc::EIO);
            sim.fail_nth(0, if is_partial { fault.partially() } else { fault });
            let result = sim.block_on(file.write(0, IoVec::from(vec![1; 4096]), false));
            assert_eq!(errno(result), Some(libc::EIO));
            left.insert(sim.snapshot_file("a").len());
        }
        if is_partial {
            assert!(left.len() > 20, "{left:?}");
            assert!(left.iter().all(|len| *len < 4096));
        } else {
            assert_eq!(left, BTreeSet::from([0]));
        }
    }
}

#[test]
fn a_failed_sync_loses_the_writes_it_covers() {
    for (policy, survives) in [(SyncFailure::DropDirty, 0), (SyncFailure::KeepDirty, 1)] {
        let config = SimConfig { sync_failure: policy, ..SimConfig::calm() };
        let sim = Sim::new(1, config);
        sim.put_file("a", &[0; 512]);
        let file = open(&sim, "a");
        sim.fail_nth(0, Fault::once(libc::EIO).on(OpMask::SYNC));
        sim.block_on(async {
            file.write(0, IoVec::from(vec![1; 512]), false).await.expect("not a sync");
            assert_eq!(errno(file.sync_data().await), Some(libc::EIO));
            file.sync_data().await.expect("the second sync says all is well");
        });
        assert_eq!(sim.snapshot_file("a")[0], 1, "reads see it all the same");
        assert_eq!(sim.after_cut_by(1, CutMode::LoseAll).snapshot_file("a")[0], survives);
    }
}

#[test]
fn failures_at_a_rate_are_replayed_by_the_seed() {
    let config = SimConfig { fault_rate: 0.3, fault_errno: libc::EIO, ..SimConfig::default() };
    let run = |seed| {
        let sim = Sim::new(seed, config.clone());
        let file = open(&sim, "a");
        sim.block_on(five(&file))
    };
    let runs: BTreeSet<Vec<Option<i32>>> = (0..50).map(run).collect();
    assert!(runs.len() > 10);
    assert_eq!(run(12), run(12));
}

#[test]
fn transfers_are_short_by_seed_but_never_empty() {
    let config = SimConfig { short_io_rate: 0.5, ..SimConfig::default() };
    let mut lens = BTreeSet::new();
    for seed in 0..200 {
        let sim = Sim::new(seed, config.clone());
        let file = open(&sim, "a");
        let done =
            sim.block_on(file.write(0, IoVec::from(vec![1; 1000]), false)).expect("no fault");
        assert_eq!(sim.snapshot_file("a"), vec![1; done]);
        let buf = bds_io::Buf::zeroed(1000, 1);
        let got = sim.block_on(file.read(0, buf.iov())).expect("no fault");
        assert!(got >= 1 && got <= done);
        lens.insert(done);
    }
    assert!(lens.contains(&1000) && lens.len() > 50 && !lens.contains(&0));
}

#[test]
fn a_full_disk_writes_what_fits_then_fails() {
    let config = SimConfig { capacity_bytes: 3 * 4096, ..SimConfig::calm() };
    let sim = Sim::new(1, config);
    let file = open(&sim, "a");
    sim.block_on(async {
        let write = |offset, len| file.write(offset, IoVec::from(vec![1; len]), false);
        assert_eq!(write(4096, 4 * 4096).await.expect("a part fits"), 3 * 4096);
        assert_eq!(errno(write(0, 1).await), Some(libc::ENOSPC));
        assert_eq!(write(4096, 4096).await.expect("no new space"), 4096);
        assert_eq!(errno(file.zero_range(0..4096, ZeroMode::Extend).await), Some(libc::ENOSPC));
        file.zero_range(4096..8192, ZeroMode::PunchHole).await.expect("frees space");
        assert_eq!(write(0, 1).await.expect("a page is free"), 1);
    });
    assert_eq!(file.allocated_len().expect("regular"), 3 * 4096);
    drop(file);
    sim.fs().remove(Path::new("a")).expect("it is there");
    let other = open(&sim, "b");
    let iov = IoVec::from(vec![1; 3 * 4096]);
    assert_eq!(sim.block_on(other.write(0, iov, false)).expect("all is free"), 3 * 4096);
}

#[test]
fn unsupported_operations_report_so() {
    let unsupported = OpMask::ZERO | OpMask::COPY | OpMask::EXTENT;
    let sim = Sim::new(1, SimConfig { unsupported, ..SimConfig::calm() });
    let (file, other) = (open(&sim, "a"), open(&sim, "b"));
    sim.block_on(async {
        file.set_len(8192).await.expect("supported");
        let zero = file.zero_range(0..4096, ZeroMode::Allocate).await;
        assert_eq!(errno(zero), Some(libc::EOPNOTSUPP));
        assert_eq!(
            file.copy_range_to(0, &other, 0, 4096).await.expect("not supported, no error"),
            0
        );
    });
    let extent = file.extent(0).expect("answers").expect("not at the end");
    assert!(extent.is_data && extent.len == 8192);
}

#[test]
fn inline_and_waiting_transfers_both_occur() {
    let mut inline = BTreeSet::new();
    for seed in 0..64 {
        let sim = Sim::new(seed, SimConfig::default());
        sim.put_file("a", &[5; 512]);
        let file = open(&sim, "a");
        let buf = bds_io::Buf::zeroed(512, 512);
        let result = file.try_read(0, &buf.iov());
        if let Some(result) = &result {
            assert!(result.as_ref().expect("no fault") > &0);
        }
        inline.insert(result.is_some());
    }
    assert_eq!(inline.len(), 2);
}
