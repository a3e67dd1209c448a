//! What each mode copies, under writes: the target is the state of one moment.

use std::time::Duration;

use bds_core::driver::{Precision, StatusFlags};
use bds_jobs::backup::{AtLimit, Backup, BackupOptions, BackupSync};
use bds_jobs::{JobOptions, JobStatus};

use super::Chance;
use super::kit::{LEN, World, Writer, content, kept, run, shape, user};

/// Kinds of target, and whether it is compressed.
const TARGETS: [(&str, bool); 5] =
    [("mem", false), ("raw", false), ("qcow2", false), ("qcow2-2m", false), ("qcow2", true)];

#[test]
fn a_full_backup_is_the_state_of_one_moment() {
    for (number, (kind, compress)) in TARGETS.into_iter().enumerate() {
        for seed in 0..4 {
            run(seed + 100 * number as u64, async |world: World| {
                let source = world.make("disk", if seed % 2 == 0 { "qcow2" } else { "mem" }).await;
                let target = world.make("copy", kind).await;
                let guest = Writer::new(&source).await;
                let mut rng = Chance::new(seed);
                for _ in 0..10 {
                    guest.step(&mut rng).await.unwrap();
                }
                let before = shape(world.graph());
                let writing = guest.run(seed, 400);
                bds_io::sleep(Duration::from_micros(500)).await;
                let first = guest.completed();
                let mut options = BackupOptions::new(&source, &target, "job0");
                options.compress = compress;
                if seed >= 2 {
                    options.staging_len = 1 << 20;
                    options.staging_policy = AtLimit::Throttle;
                }
                let job = world.start(options).await;
                let last = guest.completed() + 1;
                job.wait().await.unwrap();
                guest.stop();
                writing.await;
                let info = job.info();
                assert_eq!(info.current_progress, info.total_progress);
                guest.find(&content(&target).await, first..=last);
                let end = guest.completed();
                assert!(content(&source).await == guest.state(end), "the guest's own disk");
                assert_eq!(shape(world.graph()), before, "the graph is as before");
                world.jobs.dismiss("job0").unwrap();
            });
        }
    }
}

#[test]
fn a_top_backup_copies_the_disks_own_layer() {
    for seed in 0..4 {
        run(seed, async |world: World| {
            let base = world.make("base", "qcow2").await;
            let guest = Writer::new(&base).await;
            let mut rng = Chance::new(seed);
            for _ in 0..20 {
                guest.step(&mut rng).await.unwrap();
            }
            let below = guest.state(guest.completed());
            drop(guest);
            let source = world.make_on("disk", "qcow2", Some("base")).await;
            let target = world.make_on("copy", "qcow2", Some("base")).await;
            let guest = Writer::new(&source).await;
            for _ in 0..5 {
                guest.step(&mut rng).await.unwrap();
            }
            let mut options = BackupOptions::new(&source, &target, "job0");
            options.sync = BackupSync::Top;
            options.staging_len = if seed < 2 { 0 } else { 1 << 20 };
            let backup = Backup::prepare(options).await.unwrap();
            let writing = guest.run(seed, 60);
            let options = JobOptions::new("job0");
            let job = world.jobs.start(options, Box::new(backup)).await.unwrap();
            let _gone = job.wait().await;
            guest.stop();
            writing.await;
            assert!(content(&target).await == guest.state(5));
            // What lies below was not copied.
            let layers = [user(&source, false), user(&target, false)];
            let mut skipped = 0;
            for at in (0..LEN).step_by(64 << 10) {
                let len = (64 << 10).min(LEN - at);
                let mut held = Vec::new();
                for layer in &layers {
                    let run = layer.layer_status(at, len, Precision::Exact).await.unwrap();
                    held.push(run.flags.contains(StatusFlags::ALLOCATED) || run.len < len);
                }
                skipped += u32::from(!held[1]);
                assert!(held[0] || !held[1], "{at} was copied from below");
            }
            assert!(skipped > 0 && below != guest.state(5));
        });
    }
}

/// The target has the disk as backing image and is read while the guest writes.
#[test]
fn a_backup_of_nothing_keeps_a_target_on_the_disk_readable() {
    for seed in 0..4 {
        run(seed, async |world: World| {
            let source = world.make("disk", "qcow2").await;
            let guest = Writer::new(&source).await;
            let mut rng = Chance::new(7);
            for _ in 0..20 {
                guest.step(&mut rng).await.unwrap();
            }
            let target = world.make_on("scratch", "qcow2", Some("disk")).await;
            let mut options = BackupOptions::new(&source, &target, "job0");
            options.sync = BackupSync::None;
            options.staging_len = 1;
            let error = Backup::prepare(options.clone()).await.unwrap_err();
            assert!(error.to_string().contains("would miss staged data"), "{error}");
            options.staging_len = 0;
            let backup = Backup::prepare(options).await.unwrap();
            let options = kept("job0");
            let job = world.jobs.start(options, Box::new(backup)).await.unwrap();
            let writing = guest.run(9, 80);
            for _ in 0..20 {
                assert!(content(&target).await == guest.state(20));
            }
            writing.await;
            job.pause().unwrap();
            job.wait_status(JobStatus::Paused).await.unwrap();
            job.resume().unwrap();
            bds_io::sleep(Duration::from_secs(1)).await;
            assert!(content(&target).await == guest.state(20));
            job.cancel(true).unwrap();
            let error = job.wait().await.unwrap_err();
            assert_eq!(error.kind(), bds_core::ErrorKind::Cancelled);
        });
    }
}

/// Writes disk A, then disk B, over and over: no pair of copies may hold a B without its A.
#[test]
fn two_disks_in_one_change_have_one_point_in_time() {
    for seed in 0..6 {
        run(seed, async |world: World| {
            let (a, b) = (world.make("a", "qcow2").await, world.make("b", "mem").await);
            let (copy_a, copy_b) = (world.make("ca", "raw").await, world.make("cb", "qcow2").await);
            let (guest_a, guest_b) = (Writer::new(&a).await, Writer::new(&b).await);
            let writer = {
                let (a, b) = (guest_a.clone(), guest_b.clone());
                bds_io::spawn(async move {
                    let mut rng = Chance::new(seed);
                    for _ in 0..60 {
                        a.step(&mut rng).await.unwrap();
                        b.step(&mut rng).await.unwrap();
                    }
                })
            };
            bds_io::sleep(Duration::from_micros(300 * seed)).await;
            let mut first = BackupOptions::new(&a, &copy_a, "job-a");
            first.staging_len = 1 << 20;
            let first = Backup::prepare_staged(first).await.unwrap();
            let second = BackupOptions::new(&b, &copy_b, "job-b");
            let second = Backup::prepare_staged(second).await.unwrap();
            let change = second.stage(first.stage(world.graph().change()));
            change.commit().await.unwrap();
            let group: Vec<(JobOptions, Box<dyn bds_jobs::JobDriver>)> =
                vec![(kept("job-a"), Box::new(first)), (kept("job-b"), Box::new(second))];
            for job in world.jobs.start_group(group).await.unwrap() {
                job.wait().await.unwrap();
            }
            writer.await;
            let at_a = guest_a.find(&content(&copy_a).await, 0..=60);
            let at_b = guest_b.find(&content(&copy_b).await, 0..=60);
            assert!(at_a == at_b || at_a == at_b + 1, "a at {at_a}, b at {at_b}");
        });
    }
}

/// A throttled job is paused and resumed at any moment; the copy is right and the pause holds.
#[test]
fn pauses_of_a_throttled_backup() {
    for seed in 0..10 {
        run(seed, async |world: World| {
            let (source, target) =
                (world.make("disk", "mem").await, world.make("copy", "qcow2").await);
            let guest = Writer::new(&source).await;
            let mut rng = Chance::new(seed);
            for _ in 0..30 {
                guest.step(&mut rng).await.unwrap();
            }
            let mut options = BackupOptions::new(&source, &target, "job0");
            options.max_chunk = 64 << 10;
            let backup = Backup::prepare(options).await.unwrap();
            let options = JobOptions { speed: 256 << 10, ..kept("job0") };
            let job = world.jobs.start(options, Box::new(backup)).await.unwrap();
            guest.discards.store(true, std::sync::atomic::Ordering::SeqCst);
            let writing = guest.run(seed, 200);
            for _ in 0..6 {
                bds_io::sleep(Duration::from_millis(rng.below(400))).await;
                if job.pause().is_err() || job.wait_status(JobStatus::Paused).await.is_err() {
                    break;
                }
                job.set_speed(64 << rng.between(10, 14)).unwrap();
                bds_io::sleep(Duration::from_secs(2)).await;
                assert_eq!(job.status(), JobStatus::Paused);
                job.resume().unwrap();
            }
            let _may_be_over = job.set_speed(0);
            job.wait().await.unwrap();
            guest.stop();
            writing.await;
            assert!(content(&target).await == guest.state(30));
        });
    }
}

/// The images are equal for another program too.
#[test]
fn qemu_finds_the_copy_intact() {
    let Some(img) = bds_testkit::qemu_img() else { return };
    let scratch = bds_testkit::Scratch::new();
    let world = World::in_dir(bds_io::Fs::Host, scratch.dir().to_owned());
    bds_io::block_on(async {
        let source = world.make("disk", "qcow2").await;
        let target = world.make("copy", "qcow2").await;
        let guest = Writer::new(&source).await;
        let mut rng = Chance::new(3);
        for _ in 0..40 {
            guest.step(&mut rng).await.unwrap();
        }
        let job = world.start(BackupOptions::new(&source, &target, "job0")).await;
        job.wait().await.unwrap();
        drop((guest, source, target));
        world.graph().shutdown().await.check_leaks().unwrap();
    });
    let (disk, copy) = (scratch.path("disk"), scratch.path("copy"));
    img.must([
        "compare".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-F".as_ref(),
        "qcow2".as_ref(),
        disk.as_os_str(),
        copy.as_os_str(),
    ]);
    img.must(["check".as_ref(), "-f".as_ref(), "qcow2".as_ref(), copy.as_os_str()]);
}
