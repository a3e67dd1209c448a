//! Targets that fail, fill up, or hang; sources that cannot be read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bds_jobs::backup::{AtLimit, Backup, BackupOptions, OnCbwError};
use bds_jobs::{IoStatus, JobEvent, JobOptions, JobStatus, OnError};
use futures_util::future::{Either, select};

use super::Chance;
use super::disk::Control;
use super::kit::{World, Writer, content, kept, run, shape, user};

/// A disk in memory with a random state, its guest, and a target under control.
async fn scene(world: &World, seed: u64) -> (Arc<Writer>, Arc<Control>, BackupOptions, Vec<u8>) {
    let source = world.make("disk", "mem").await;
    let (target, control) = world.controlled("copy").await;
    let guest = Writer::new(&source).await;
    let mut rng = Chance::new(seed);
    for _ in 0..30 {
        guest.step(&mut rng).await.unwrap();
    }
    let start = guest.state(30);
    (guest, control, BackupOptions::new(&source, &target, "job0"), start)
}

#[test]
fn a_stopped_job_goes_on_with_the_same_point_in_time() {
    for (errno, policy, status) in [
        (libc::EIO, OnError::Stop, IoStatus::Failed),
        (libc::ENOSPC, OnError::Enospc, IoStatus::Nospace),
    ] {
        for staging in [0, 32 << 20] {
            run(1, async |world: World| {
                let (guest, control, mut options, start) = scene(&world, 1).await;
                options.staging_len = staging;
                let target = options.target.clone();
                control.errno.store(errno as u64, Ordering::SeqCst);
                let mut events = world.jobs.events();
                let job = JobOptions { on_target_error: policy, ..kept("job0") };
                let job = world.start_with(options, job).await;
                job.wait_status(JobStatus::Paused).await.unwrap();
                assert_eq!(job.info().io_status, status);
                let mut errors = 0;
                while let Some(event) = events.try_next() {
                    errors += u32::from(matches!(event, JobEvent::Error { .. }));
                }
                assert_eq!(errors, 1);
                // Staged writes fail too; the guest does not notice.
                if staging != 0 {
                    guest.run(6, 20).await;
                    bds_io::sleep(Duration::from_secs(3)).await;
                    assert_eq!(job.status(), JobStatus::Paused);
                }
                control.errno.store(0, Ordering::SeqCst);
                guest.run(5, 50).await;
                job.resume().unwrap();
                job.wait().await.unwrap();
                assert_eq!(job.info().io_status, IoStatus::Ok);
                assert!(content(&target).await == start);
            });
        }
    }
}

#[test]
fn an_ignored_error_is_tried_again_with_a_back_off_and_can_be_cancelled() {
    run(1, async |world: World| {
        let (guest, control, options, _) = scene(&world, 1).await;
        control.errno.store(libc::EIO as u64, Ordering::SeqCst);
        let mut events = world.jobs.events();
        let job = JobOptions { on_target_error: OnError::Ignore, ..kept("job0") };
        let job = world.start_with(options, job).await;
        bds_io::sleep(Duration::from_secs(10)).await;
        let mut errors = 0;
        while let Some(event) = events.try_next() {
            errors += u32::from(matches!(event, JobEvent::Error { .. }));
        }
        assert!((1..=110).contains(&errors), "{errors} events in 10 s");
        let begun = bds_io::now();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert!(bds_io::now() - begun <= Duration::from_secs(1));
        drop(guest);
    });
}

#[test]
fn a_failed_backup_leaves_the_graph_and_the_guest_alone() {
    run(1, async |world: World| {
        let (guest, control, options, _) = scene(&world, 1).await;
        let (source, _target) = (options.source.clone(), options.target.clone());
        let before = shape(world.graph());
        control.errno.store(libc::EIO as u64, Ordering::SeqCst);
        let job = world.start(options).await;
        let error = job.wait().await.unwrap_err();
        guest.run(4, 50).await;
        assert_eq!(error.errno(), libc::EIO);
        assert!(error.to_string().contains("cannot write the target"), "{error}");
        assert!(content(&source).await == guest.state(guest.completed()));
        assert_eq!(shape(world.graph()), before);
        assert_eq!(job.info().cleanup_error, None);
    });
}

/// A query that holds the filter's node does not keep it in the graph, however the job ends.
#[test]
fn a_query_that_holds_the_filter_does_not_keep_it_in_the_chain() {
    for is_cancelled in [false, true] {
        run(1, async |world: World| {
            let (guest, control, options, _) = scene(&world, 1).await;
            let (source, _target) = (options.source.clone(), options.target.clone());
            let before = shape(world.graph());
            if is_cancelled {
                control.hold();
            }
            let job = world.start(options).await;
            let held = world.graph().nodes();
            assert!(held.iter().any(|node| node.driver_name() == "copy-before-write"));
            if is_cancelled {
                job.cancel(true).unwrap();
                control.release();
            }
            assert_eq!(job.wait().await.is_err(), is_cancelled);
            assert_eq!(job.info().cleanup_error, None);
            assert_eq!(guest.disk.node().unwrap().id(), source.id(), "no filter between");
            drop(held);
            world.graph().reap().await;
            assert_eq!(shape(world.graph()), before);
        });
    }
}

/// With the policy to break the snapshot the job fails, and no write of the guest does.
#[test]
fn a_broken_snapshot_fails_the_job() {
    for staging in [0, 64 << 10] {
        run(1, async |world: World| {
            let (guest, control, mut options, _) = scene(&world, 1).await;
            options.on_cbw_error = OnCbwError::BreakSnapshot;
            options.cbw_timeout = Some(Duration::from_secs(2));
            options.staging_len = staging;
            let mut core_events = world.graph().events();
            let job = world.start(options).await;
            control.hold();
            let begun = bds_io::now();
            guest.run(4, 50).await;
            assert!(bds_io::now() - begun < Duration::from_secs(20));
            let error = job.wait().await.unwrap_err();
            assert!(error.to_string().contains("the snapshot is broken"), "{error}");
            let broken = std::iter::from_fn(|| core_events.try_next())
                .filter(|event| event.name() == "SNAPSHOT_BROKEN")
                .count();
            assert_eq!(broken, 1);
        });
    }
}

/// The target hangs for good: the guest is not stuck with staging, and a cancel ends the job.
#[test]
fn a_stuck_target_does_not_keep_the_job() {
    for (staging, policy) in [(0, AtLimit::Stall), (32 << 20, AtLimit::Stall)] {
        run(1, async |world: World| {
            let (guest, control, mut options, _) = scene(&world, 1).await;
            let (source, target) = (options.source.clone(), options.target.clone());
            options.staging_len = staging;
            options.staging_policy = policy;
            control.hold();
            let job = JobOptions { cancel_timeout: Duration::from_secs(1), ..kept("job0") };
            let job = world.start_with(options, job).await;
            let writing = guest.run(4, 60);
            bds_io::sleep(Duration::from_secs(5)).await;
            if staging != 0 {
                // Background requests hold 1 MiB of the disk; the guest waits for those alone.
                assert!(world.graph().find("disk").is_ok());
            }
            let begun = bds_io::now();
            let stuck_at = guest.completed();
            job.cancel(true).unwrap();
            // A write that waits in the filter goes on at once, not after the timeout.
            bds_io::sleep(Duration::from_millis(50)).await;
            assert!(guest.completed() > stuck_at || guest.completed() == 90);
            job.wait().await.unwrap_err();
            assert!(bds_io::now() - begun <= Duration::from_millis(1500), "it took too long");
            assert!(target.is_poisoned());
            writing.await;
            assert!(content(&source).await == guest.state(guest.completed()));
            control.release();
        });
    }
}

#[test]
fn a_source_that_cannot_be_read_fails_the_job_and_not_the_guest() {
    run(1, async |world: World| {
        let source = world.make("disk", "raw").await;
        let debug = bds_core::Options::from_json(serde_json::json!({
            "driver": "blkdebug", "node-name": "debug", "image": "disk",
            "inject-error": [{"event": "none", "iotype": "read", "errno": 5}],
        }))
        .unwrap();
        let debug = world.graph().open(debug).await.unwrap();
        let target = world.make("copy", "raw").await;
        let guest = user(&debug, true);
        guest
            .write(0, bds_io::Buf::from_slice(&vec![7; 128 << 10]).iov(), Default::default())
            .await
            .unwrap();
        let job = world.start(BackupOptions::new(&debug, &target, "job0")).await;
        let error = job.wait().await.unwrap_err();
        assert!(error.to_string().contains("cannot read the source"), "{error}");
        assert_eq!(error.errno(), libc::EIO);
        guest
            .write(0, bds_io::Buf::from_slice(&vec![8; 512]).iov(), Default::default())
            .await
            .unwrap();
        drop(source);
    });
}

/// The job is cancelled at any moment: everything is given back, the guest's disk is right.
#[test]
fn cancelled_at_any_moment() {
    for seed in 0..40 {
        run(seed, async |world: World| {
            let (guest, control, mut options, _) = scene(&world, seed).await;
            let (source, _target) = (options.source.clone(), options.target.clone());
            options.staging_len = if seed % 2 == 0 { 0 } else { 256 << 10 };
            control.delay_us.store(100, Ordering::SeqCst);
            let before = shape(world.graph());
            let backup = Backup::prepare(options).await.unwrap();
            let job = world.jobs.start(kept("job0"), Box::new(backup)).await.unwrap();
            guest.discards.store(true, std::sync::atomic::Ordering::SeqCst);
            let writing = guest.run(seed, 60);
            bds_io::sleep(Duration::from_micros(seed * 23)).await;
            let _may_be_over = job.cancel(true);
            let _ended = job.wait().await;
            writing.await;
            assert!(content(&source).await == guest.state(guest.completed()));
            assert_eq!(shape(world.graph()), before);
            assert_eq!(job.info().cleanup_error, None);
        });
    }
}

/// Drained sections of everything, of the disk and of the target, at any moment of a backup under
/// writes: each is granted, though writes in the filter wait for what the job has claimed, and the
/// requests of the job wait at their gates.
#[test]
fn a_drain_waits_for_no_copy_that_waits_for_the_drain() {
    for seed in 0..60 {
        run(seed, async |world: World| {
            let source = world.make("disk", "qcow2").await;
            let (target, control) = world.controlled("copy").await;
            let guest = Writer::new(&source).await;
            let mut rng = Chance::new(seed);
            for _ in 0..30 {
                guest.step(&mut rng).await.unwrap();
            }
            let start = guest.state(30);
            let mut options = BackupOptions::new(&source, &target, "job0");
            options.staging_len = [0, 256 << 10][seed as usize % 2];
            options.max_workers = 2;
            control.delay_us.store(300, Ordering::SeqCst);
            let job = world.start(options).await;
            let writing = guest.run(seed, 60);
            for _ in 0..6 {
                bds_io::sleep(Duration::from_micros(rng.below(400))).await;
                // A paused job is left alone, and goes on when it is resumed.
                let _late = if rng.one_in(2) { job.pause() } else { job.resume() };
                let section = async {
                    match rng.below(3) {
                        0 => drop(world.graph().drain_all().await),
                        1 => drop(world.graph().drain(&source).await),
                        _ => drop(world.graph().drain(&target).await),
                    }
                };
                let section = std::pin::pin!(section);
                let limit = std::pin::pin!(bds_io::sleep(Duration::from_secs(10)));
                let granted = select(section, limit).await;
                assert!(matches!(granted, Either::Left(_)), "seed {seed}: a drain hangs");
            }
            writing.await;
            let _not_paused = job.resume();
            job.wait().await.unwrap();
            assert!(content(&target).await == start, "seed {seed}");
        });
    }
}
