//! A record lets a copy go on: after a power cut, a failure of the target, a cancel.

use std::sync::atomic::Ordering;

use bds_core::ErrorKind;
use bds_core::graph::BitmapOptions;
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::record::{CheckTarget, RecordOptions, RecordState, look_at_record};
use bds_jobs::{JobOptions, JobStatus, RecordUse};

use super::kit::{
    CHUNK, KINDS, Kind, LEN, RECORD, World, content, finish, interrupt, pattern, record, uses,
    wait_written, write, writer,
};

#[test]
fn a_copy_goes_on_where_the_power_went_away() {
    for kind in KINDS {
        for percent in [10, 50, 90] {
            let (sim, before) = interrupt(kind, 7, LEN * percent / 100);
            let world = World::on(sim);
            let sim = world.sim.clone();
            sim.block_on(async {
                let source = world.open("source").await;
                let (target, meter) = world.metered().await;
                let mut events = world.jobs.events();
                let job = world.start(kind, (&source, &target), record()).await;
                finish(kind, &job).await.unwrap();
                assert!(content(&target).await == pattern(7, LEN), "{kind:?} {percent} %");
                // A checkpoint after each request, and one request since the last one.
                let (again, remained) = (meter.written(), LEN.saturating_sub(before));
                assert!(
                    again <= remained + LEN / 50 + kind.request_len(),
                    "{kind:?}, {percent} %: {again} bytes after {before}, {remained} remained"
                );
                let resumed = job.info().resumed_bytes.unwrap();
                assert_eq!(resumed + again, LEN);
                let reported = uses(&mut events);
                assert!(matches!(reported[0], (RecordUse::Continued, bytes) if bytes >= resumed));
                assert!(!sim.exists(RECORD), "it is removed at success");
                world.jobs.dismiss("job0").unwrap();
                let history = world.jobs.history();
                let last = history.last("job0").unwrap();
                assert_eq!(last.to_query_jobs()["resumed-bytes"], resumed);
            });
            world.end();
        }
    }
}

/// A record that stays at success has all of the copy: a job that uses it again copies nothing.
#[test]
fn a_record_that_is_kept_at_success_is_complete() {
    for kind in KINDS {
        let world = World::new(11);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            let (target, meter) = world.metered().await;
            let kept = || RecordOptions { keep_at_success: true, ..RecordOptions::new(RECORD) };
            for (run, expected) in [(1, LEN), (2, LEN)] {
                let job = world.start(kind, (&source, &target), kept()).await;
                finish(kind, &job).await.unwrap();
                assert_eq!(meter.written(), expected, "{kind:?} run {run}");
                let found = look_at_record(RECORD.as_ref(), &source, &target).await;
                assert_eq!(found.unwrap(), RecordState::Fits, "{kind:?}");
                world.jobs.dismiss("job0").unwrap();
            }
            let job = world.start(kind, (&source, &target), record()).await;
            finish(kind, &job).await.unwrap();
            assert_eq!(job.info().resumed_bytes, Some(LEN));
            assert!(!sim.exists(RECORD));
        });
        world.end();
    }
}

#[test]
fn look_at_record_says_what_a_job_would_do() {
    let (sim, _) = interrupt(Kind::Backup, 5, LEN / 2);
    let world = World::on(sim.clone());
    sim.put_file("/short", &pattern(5, LEN / 2));
    let mut damaged = sim.snapshot_file(RECORD);
    damaged[8..8192].fill(1);
    damaged[4096..4104].copy_from_slice(&sim.snapshot_file(RECORD)[..8]);
    sim.put_file("/damaged", &damaged);
    sim.put_file("/letter", b"dear reader");
    sim.block_on(async {
        let (source, target) = (world.open("source").await, world.open("target").await);
        let short = world.open("short").await;
        for (path, expected) in [
            (RECORD, RecordState::Fits),
            ("/none", RecordState::Missing),
            ("/damaged", RecordState::Damaged),
        ] {
            let found = look_at_record(path.as_ref(), &source, &target).await.unwrap();
            assert_eq!(found, expected, "{path}");
        }
        for (path, source, target) in
            [("/letter", &source, &target), (RECORD, &short, &target), (RECORD, &target, &source)]
        {
            let error = look_at_record(path.as_ref(), source, target).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}: {error}");
        }
        assert_eq!(sim.snapshot_file("/damaged"), damaged);
    });
    world.end();
}

/// Zeros inside a granule of data become zero writes if that is asked for.
#[test]
fn zeros_in_data_are_stored_as_such() {
    let mut bytes = pattern(12, LEN);
    let zeros = CHUNK as usize + 16_384..CHUNK as usize + 32_768;
    assert!(bytes[zeros.clone()].iter().any(|byte| *byte != 0));
    bytes[zeros.clone()].fill(0);
    let written = [0, 4096].map(|sparse_len| {
        let world = World::new(12);
        let sim = world.sim.clone();
        sim.put_file("/source", &bytes);
        sim.put_file("/target", &vec![0; LEN as usize]);
        let written = sim.block_on(async {
            let source = world.open("source").await;
            let (target, meter) = world.metered().await;
            let mut options = BackupOptions::new(&source, &target, "job0");
            (options.sparse_len, options.target_is_zero) = (sparse_len, true);
            options.record = Some(record());
            let backup = Box::new(Backup::prepare(options).await.unwrap());
            world.jobs.start(JobOptions::new("job0"), backup).await.unwrap().wait().await.unwrap();
            assert!(content(&target).await == bytes);
            meter.written()
        });
        world.end();
        written
    });
    assert_eq!(written[0] - written[1], zeros.len() as u64);
}

#[test]
fn what_has_changed_meanwhile_is_copied() {
    for kind in KINDS {
        let (sim, _) = interrupt(kind, 9, LEN * 8 / 10);
        let world = World::on(sim);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            let guest = writer(&source);
            let mut expected = pattern(9, LEN);
            for offset in [5 * CHUNK, 100 * CHUNK + 70, LEN - 5] {
                write(&guest, offset, b"other").await;
                expected[offset as usize..][..5].copy_from_slice(b"other");
            }
            let (target, meter) = world.metered().await;
            let job = world.start(kind, (&source, &target), record()).await;
            // A guest's write meets a chunk that was copied before, and is of a later moment.
            write(&guest, 50 * CHUNK, b"later").await;
            if kind == Kind::Mirror {
                expected[50 * CHUNK as usize..][..5].copy_from_slice(b"later");
            }
            finish(kind, &job).await.unwrap();
            assert!(content(&target).await == expected, "{kind:?}");
            assert!(meter.written() < LEN / 3, "{kind:?}: {}", meter.written());
        });
        world.end();
    }
}

#[test]
fn a_copy_goes_on_after_its_target_has_failed() {
    for kind in KINDS {
        let world = World::new(3);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            let (target, meter) = world.metered().await;
            let job = world.start(kind, (&source, &target), record()).await;
            wait_written(&meter, LEN / 2).await;
            meter.fails.store(true, Ordering::SeqCst);
            let error = job.wait().await.unwrap_err();
            assert!(error.to_string().contains("injected"), "{error}");
            assert!(sim.exists(RECORD), "it is kept");
            world.jobs.dismiss("job0").unwrap();
            drop(target);
            world.graph.reap().await;

            let before = meter.written();
            let (target, meter) = world.metered().await;
            let job = world.start(kind, (&source, &target), record()).await;
            finish(kind, &job).await.unwrap();
            assert!(content(&target).await == pattern(3, LEN));
            assert!(
                meter.written() <= LEN - before + LEN / 50 + kind.request_len(),
                "{kind:?}: {}",
                meter.written()
            );
        });
        world.end();
    }
}

#[test]
fn a_copy_goes_on_after_a_cancel() {
    for kind in KINDS {
        let world = World::new(4);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            let (target, meter) = world.metered().await;
            let job = world.start(kind, (&source, &target), record()).await;
            wait_written(&meter, LEN / 2).await;
            job.cancel(true).unwrap();
            job.wait().await.unwrap_err();
            world.jobs.dismiss("job0").unwrap();
            let before = meter.written();
            // A job of the other type goes on with it.
            let other = if kind == Kind::Backup { Kind::Mirror } else { Kind::Backup };
            let job = world.start(other, (&source, &target), record()).await;
            finish(other, &job).await.unwrap();
            assert!(content(&target).await == pattern(4, LEN));
            // What was in flight is all that is copied again.
            let again = meter.written() - before;
            assert!(again <= LEN - before + 4 * CHUNK, "{kind:?}: {again} after {before}");
        });
        world.end();
    }
}

#[test]
fn a_target_that_something_else_has_written_is_found_out() {
    let checks = [CheckTarget::Full, CheckTarget::Sample, CheckTarget::None];
    for (check, is_checked) in checks.into_iter().zip([true, false, false]) {
        for kind in KINDS {
            let (sim, _) = interrupt(kind, 5, LEN / 2);
            let mut bytes = sim.snapshot_file("/target");
            bytes[3 * CHUNK as usize + 9] ^= 1;
            sim.put_file("/target", &bytes);
            // The same file, for `None`.
            let sim = sim.fork(1);
            let world = World::on(sim);
            let sim = world.sim.clone();
            sim.block_on(async {
                let source = world.open("source").await;
                let (target, meter) = world.metered().await;
                let mut events = world.jobs.events();
                let options = RecordOptions { check_target: check, ..record() };
                let job = world.start(kind, (&source, &target), options).await;
                finish(kind, &job).await.unwrap();
                let expected = pattern(5, LEN);
                let is_right = content(&target).await == expected;
                let reported = uses(&mut events);
                let differs =
                    reported.contains(&(RecordUse::TargetDiffers { offset: 3 * CHUNK }, CHUNK));
                if is_checked {
                    assert!(is_right && differs, "{check:?}, {kind:?}: {reported:?}");
                }
                assert!(meter.written() < LEN * 6 / 10);
                assert_eq!(is_right, differs, "{check:?}, {kind:?}");
            });
            world.end();
        }
    }
}

#[test]
fn a_sample_finds_a_target_that_was_made_anew() {
    let (sim, _) = interrupt(Kind::Backup, 6, LEN / 2);
    sim.put_file("/target", &vec![0; LEN as usize]);
    let world = World::on(sim.fork(1));
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let (target, _) = world.metered().await;
        let options = RecordOptions { check_target: CheckTarget::Sample, ..record() };
        let job = world.start(Kind::Backup, (&source, &target), options).await;
        job.wait().await.unwrap();
        assert!(content(&target).await == pattern(6, LEN));
        assert_eq!(job.status(), JobStatus::Concluded);
    });
    world.end();
}

#[test]
fn chunks_that_are_clean_in_a_bitmap_are_not_read() {
    for kind in KINDS {
        let world = World::new(8);
        let sim = world.sim.clone();
        sim.block_on(async {
            let (source, meter) = world.metered_as("source").await;
            let (target, written) = world.metered().await;
            source.add_bitmap(BitmapOptions::named("since")).await.unwrap();
            let options = || RecordOptions { bitmap: Some("since".into()), ..record() };
            let job = world.start(kind, (&source, &target), options()).await;
            wait_written(&written, LEN / 2).await;
            job.cancel(true).unwrap();
            job.wait().await.unwrap_err();
            world.jobs.dismiss("job0").unwrap();

            let mut expected = pattern(8, LEN);
            let guest = writer(&source);
            write(&guest, 7 * CHUNK, b"other").await;
            expected[7 * CHUNK as usize..][..5].copy_from_slice(b"other");
            let (read, wrote) = (meter.read(), written.written());
            let job = world.start(kind, (&source, &target), options()).await;
            finish(kind, &job).await.unwrap();
            assert!(content(&target).await == expected, "{kind:?}");
            let (read, wrote) = (meter.read() - read, written.written() - wrote);
            assert!(read <= wrote + 2 * CHUNK && wrote < LEN * 6 / 10, "{kind:?}: {read}, {wrote}");
        });
        world.end();
    }
}
