//! Records that do not belong to a copy, and files that are none.

use bds_core::ErrorKind;
use bds_io::Sim;
use bds_jobs::RecordUse;
use bds_jobs::record::{CheckTarget, RecordOptions};

use super::kit::{
    CHUNK, KINDS, Kind, LEN, RECORD, World, content, finish, pattern, record, uses, wait_written,
};

/// A record of a copy that was cancelled at its half.
fn with_record(seed: u64) -> Sim {
    let world = World::new(seed);
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let (target, meter) = world.metered().await;
        let job = world.start(Kind::Backup, (&source, &target), record()).await;
        wait_written(&meter, LEN / 2).await;
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        world.jobs.dismiss("job0").unwrap();
    });
    world.end();
    sim.fork(1)
}

#[test]
fn a_file_that_is_no_record_is_left_alone() {
    let other_version = [&b"bds-job\x02"[..], &[0; 9000]].concat();
    let files: [(&[u8], ErrorKind); 4] = [
        (b"a letter", ErrorKind::InvalidInput),
        (b"", ErrorKind::InvalidInput),
        (&[0; 8192], ErrorKind::InvalidInput),
        (&other_version, ErrorKind::NotSupported),
    ];
    for (bytes, expected) in files {
        for kind in KINDS {
            let world = World::new(1);
            world.sim.put_file(RECORD, bytes);
            world.sim.block_on(async {
                let source = world.open("source").await;
                let (target, _) = world.metered().await;
                let prepared =
                    world.prepare(kind, (&source, &target), (Some(record()), None)).await;
                let error = prepared.err().expect("it is refused");
                assert_eq!(error.kind(), expected, "{error}");
                assert!(error.to_string().contains(RECORD), "{error}");
            });
            assert!(world.sim.snapshot_file(RECORD) == bytes);
            world.end();
        }
    }
}

#[test]
fn a_record_of_another_copy_is_refused_with_both_named() {
    let sim = with_record(2);
    sim.put_file("/z-other", &vec![1; LEN as usize]);
    sim.put_file("/z-shorter", &vec![1; (LEN - CHUNK) as usize]);
    let before = sim.snapshot_file(RECORD);
    let world = World::on(sim.fork(1));
    world.sim.block_on(async {
        let source = world.open("source").await;
        let target = world.open("z-other").await;
        for kind in KINDS {
            let prepared = world.prepare(kind, (&source, &target), (Some(record()), None)).await;
            let text = prepared.err().expect("it is refused").to_string();
            for part in [RECORD, "/target", "/z-other", "remove"] {
                assert!(text.contains(part), "{part}: {text}");
            }
        }
        let (source, target) = (world.open("z-shorter").await, world.open("target").await);
        drop((source, target));
    });
    assert!(world.sim.snapshot_file(RECORD) == before);
    world.end();
}

/// What is known of one file is not believed of another of its name, by the job that finds that out
/// or by a later one.
#[test]
fn another_file_of_the_same_name_is_checked_in_full_until_the_record_ends() {
    let sim = with_record(6);
    sim.fs().remove("/target".as_ref()).unwrap();
    // As the other was, but for one byte.
    let mut bytes = pattern(6, LEN);
    bytes[2 * CHUNK as usize] ^= 1;
    sim.put_file("/target", &bytes);
    // Not a fork, in which it would have the number of the other.
    let world = World::on(sim.clone());
    sim.block_on(async {
        let source = world.open("source").await;
        let trusting = || RecordOptions { check_target: CheckTarget::None, ..record() };
        let (target, _) = world.metered().await;
        // Ends before it has looked at anything.
        let tracked = (Some(trusting()), None);
        let prepared = world.prepare(Kind::Backup, (&source, &target), tracked).await.unwrap();
        let job = world.jobs.start(bds_jobs::JobOptions::new("job0"), prepared).await.unwrap();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        let job = world.start(Kind::Backup, (&source, &target), trusting()).await;
        finish(Kind::Backup, &job).await.unwrap();
        assert!(content(&target).await == pattern(6, LEN));
    });
    world.end();
}

#[test]
fn a_damaged_record_is_begun_anew_and_that_is_reported() {
    let sim = with_record(3);
    let mut bytes = sim.snapshot_file(RECORD);
    bytes[20] ^= 1;
    bytes[4096 + 20] ^= 1;
    sim.put_file(RECORD, &bytes);
    let world = World::on(sim.fork(1));
    world.sim.block_on(async {
        let source = world.open("source").await;
        let (target, meter) = world.metered().await;
        let mut events = world.jobs.events();
        let job = world.start(Kind::Backup, (&source, &target), record()).await;
        finish(Kind::Backup, &job).await.unwrap();
        assert!(content(&target).await == pattern(3, LEN));
        assert_eq!(meter.written(), LEN);
        let reported = uses(&mut events);
        assert!(matches!(&reported[0].0, RecordUse::Ignored { why } if why.contains("damaged")));
    });
    world.end();
}

#[test]
fn damaged_pages_say_nothing() {
    let sim = with_record(4);
    let mut bytes = sim.snapshot_file(RECORD);
    // Every page of hashes but the first, in both versions.
    bytes[4 * 4096..].chunks_mut(4096).for_each(|page| page[2000] ^= 1);
    sim.put_file(RECORD, &bytes);
    let world = World::on(sim.fork(1));
    world.sim.block_on(async {
        let source = world.open("source").await;
        let (target, _) = world.metered().await;
        let job = world.start(Kind::Backup, (&source, &target), record()).await;
        finish(Kind::Backup, &job).await.unwrap();
        assert!(content(&target).await == pattern(4, LEN));
        assert_eq!(job.info().resumed_bytes, Some(126 * CHUNK));
    });
    world.end();
}

#[test]
fn options_that_cannot_be_kept_are_refused_before_anything_is_made() {
    let world = World::new(5);
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let (target, _) = world.metered().await;
        for kind in KINDS {
            let options = RecordOptions { bitmap: Some("none".into()), ..record() };
            let prepared = world.prepare(kind, (&source, &target), (Some(options), None)).await;
            let error = prepared.err().expect("it is refused");
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        }
        let mut options = bds_jobs::backup::BackupOptions::new(&source, &target, "job0");
        options.sync = bds_jobs::backup::BackupSync::None;
        options.record = Some(record());
        let error = bds_jobs::backup::Backup::prepare(options).await.unwrap_err();
        assert!(error.to_string().contains("'none'"), "{error}");
    });
    assert!(!sim.exists(RECORD));
    world.end();
}
