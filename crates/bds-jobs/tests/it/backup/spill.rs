//! Backups with a spill file: policies when it is full, guests that never wait for the target,
//! failures, cancel, what is left.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::NodeRef;
use bds_core::request::Backend;
use bds_core::{ErrorKind, Options};
use bds_io::{Buf, Fs, Sim, SimConfig, Task};
use bds_jobs::backup::{AtLimit, Backup, BackupOptions, BackupSync, OnCbwError, Spill};
use bds_jobs::{JobHandle, JobOptions, JobStatus, OnError};
use bds_testkit::Chance;

use super::disk::{Control, ControlledType};
use super::kit::{World, Writer, content, kept, run, shape, user};

const MIB: u64 = 1 << 20;
const GRANULE: u64 = 64 << 10;

async fn controlled(world: &World, name: &str, len: u64, byte: u8) -> (NodeRef, Arc<Control>) {
    let control = Control::new(vec![byte; len as usize]);
    let driver = Arc::new(ControlledType(control.clone()));
    let options = Options::new().with("node-name", name);
    (world.graph().open_driver(driver, options).await.unwrap(), control)
}

/// Spills into a file of the world's disk.
fn spilled(source: &NodeRef, target: &NodeRef) -> BackupOptions {
    BackupOptions {
        staging_len: 4 * GRANULE,
        spill: Some(Spill::File(PathBuf::from("spill"))),
        spill_len: 8 * GRANULE,
        ..BackupOptions::new(source, target, "job0")
    }
}

/// A guest that writes into each granule of a disk once, at random, at a pace.
struct Load {
    done: AtomicUsize,
    longest_us: AtomicU64,
}

impl Load {
    fn start(disk: Backend, granules: u64, pace: Duration) -> (Arc<Self>, Task<()>) {
        let this = Arc::new(Self { done: AtomicUsize::new(0), longest_us: AtomicU64::new(0) });
        let guest = this.clone();
        let task = bds_io::spawn(async move {
            let mut order: Vec<u64> = (0..granules).collect();
            let mut rng = Chance::new(granules);
            for last in (1..order.len()).rev() {
                order.swap(last, rng.below(last as u64 + 1) as usize);
            }
            for granule in order {
                let begun = bds_io::now();
                let iov = Buf::from_slice(&[7; 4096]).iov();
                disk.write(granule * GRANULE, iov, WriteFlags::empty()).await.unwrap();
                let waited = (bds_io::now() - begun).as_micros() as u64;
                guest.longest_us.fetch_max(waited, Ordering::SeqCst);
                guest.done.fetch_add(1, Ordering::SeqCst);
                bds_io::sleep(pace).await;
            }
        });
        (this, task)
    }
}

/// What scenario 16 found out.
struct Seen {
    job: JobHandle,
    done: usize,
    longest: Duration,
    most_memory: u64,
    most_spilled: u64,
    target_waits: u64,
    copy: Option<Vec<u8>>,
}

/// 16 MiB of memory, a spill file of 64 MiB, and a target that takes a fourth of what the guest
/// makes it keep.
async fn staging_full(world: &World, policy: AtLimit) -> Seen {
    let len = 112 * MIB;
    let (disk, _) = controlled(world, "disk", len, 1).await;
    let user = user(&disk, true);
    let (copy, target) = controlled(world, "copy", len, 0).await;
    // Sixteen at once: 64 KiB take 1 ms, and the guest writes each 250 µs.
    target.delay_us.store(16_000, Ordering::SeqCst);
    let options = BackupOptions {
        sync: BackupSync::None,
        staging_len: 16 * MIB,
        spill: Some(Spill::File(PathBuf::from("spill"))),
        spill_len: 64 * MIB,
        staging_policy: policy,
        ..BackupOptions::new(&disk, &copy, "job0")
    };
    let backup = Backup::prepare(options).await.unwrap();
    let snapshot = backup.snapshot().clone();
    let job = world.jobs.start(kept("job0"), Box::new(backup)).await.unwrap();
    let (guest, mut writing) = Load::start(user, len / GRANULE, Duration::from_micros(250));
    let (mut most_memory, mut most_spilled) = (0, 0);
    loop {
        let step = Box::pin(bds_io::sleep(Duration::from_millis(1)));
        let info = snapshot.staging();
        most_memory = most_memory.max(info.memory_bytes);
        most_spilled = most_spilled.max(info.spilled_bytes);
        if let futures_util::future::Either::Left(_) =
            futures_util::future::select(&mut writing, step).await
        {
            break;
        }
    }
    let info = snapshot.staging();
    let mut copied = None;
    if !snapshot.is_off() {
        // What the guest overwrote is on the target in the end.
        while snapshot.staging().memory_bytes + snapshot.staging().spilled_bytes > 0 {
            bds_io::sleep(Duration::from_millis(100)).await;
        }
        copied = Some(target.bytes());
        job.cancel(true).unwrap();
    }
    let _ended = job.wait().await;
    Seen {
        job,
        done: guest.done.load(Ordering::SeqCst),
        longest: Duration::from_micros(guest.longest_us.load(Ordering::SeqCst)),
        most_memory,
        most_spilled,
        target_waits: info.target_waits,
        copy: copied,
    }
}

#[test]
fn scenario_16_staging_full_with_a_slow_target() {
    for policy in [AtLimit::Stall, AtLimit::Throttle, AtLimit::BreakSnapshot] {
        run(1, async |world: World| {
            let mut events = world.graph().events();
            let seen = staging_full(&world, policy).await;
            assert_eq!(seen.done, 112 * 16, "{policy:?}: every write went on");
            assert!(seen.most_memory <= 16 * MIB, "{policy:?}: {} bytes", seen.most_memory);
            assert!(seen.most_spilled <= 64 * MIB, "{policy:?}: {} bytes", seen.most_spilled);
            let broken = std::iter::from_fn(|| events.try_next())
                .filter(|event| event.name() == "SNAPSHOT_BROKEN")
                .count();
            match policy {
                AtLimit::BreakSnapshot => {
                    assert!(seen.most_spilled > 60 * MIB);
                    assert_eq!((broken, seen.target_waits), (1, 0));
                    let error = seen.job.info().error.expect("the job failed");
                    assert!(error.contains("the snapshot is broken"), "{error}");
                    assert!(error.contains("the staging area is full"), "{error}");
                }
                AtLimit::Stall => {
                    assert!(seen.most_spilled > 60 * MIB && seen.target_waits > 0);
                    assert!(seen.copy.unwrap() == vec![1; 112 << 20]);
                }
                AtLimit::Throttle => {
                    assert_eq!(broken, 0);
                    assert!(seen.longest < Duration::from_millis(40), "{:?}", seen.longest);
                    assert!(seen.copy.unwrap() == vec![1; 112 << 20]);
                }
            }
            drop(seen.job);
        });
    }
}

/// A full backup: its own copies hold ranges that the target has not taken yet, and no write waits
/// for those either. Counted: with the target stuck, every write goes on until both are full.
#[test]
fn a_guest_does_not_wait_for_what_the_job_copies() {
    run(1, async |world: World| {
        let len = 64 * GRANULE;
        let (disk, _) = controlled(&world, "disk", len, 1).await;
        let user = user(&disk, true);
        let (copy, target) = controlled(&world, "copy", len, 0).await;
        target.hold();
        let options = BackupOptions { spill_len: 80 * GRANULE, ..spilled(&disk, &copy) };
        let backup = Backup::prepare(options).await.unwrap();
        let snapshot = backup.snapshot().clone();
        let job = world.jobs.start(kept("job0"), Box::new(backup)).await.unwrap();
        // By now the job has claimed all of the disk, and its writes are stuck.
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(snapshot.map().dirty_bytes(), 0);
        let (guest, writing) = Load::start(user, len / GRANULE, Duration::ZERO);
        bds_io::sleep(Duration::from_secs(100)).await;
        assert_eq!(guest.done.load(Ordering::SeqCst), 64, "each of them went on");
        assert_eq!(snapshot.staging().target_waits, 0);
        writing.await;
        target.release();
        job.wait().await.unwrap();
        assert!(target.bytes() == vec![1; len as usize]);
    });
}

/// The job's copies of what the guest has changed since fail: they are made of the old data that
/// was staged, by the job or by the staging area.
#[test]
fn a_copy_that_fails_is_made_again_from_old_data() {
    for seed in 0..12 {
        run(seed, async |world: World| {
            let source = world.make("disk", "mem").await;
            let (target, control) = world.controlled("copy").await;
            let guest = Writer::new(&source).await;
            let mut rng = Chance::new(seed);
            for _ in 0..30 {
                guest.step(&mut rng).await.unwrap();
            }
            let start = guest.state(30);
            control.hold();
            let policy = if seed % 2 == 0 { OnError::Stop } else { OnError::Ignore };
            let job = JobOptions { on_target_error: policy, ..kept("job0") };
            // Never full, so that no write of the guest fails with the target.
            let options = BackupOptions { spill_len: 16 * GRANULE, ..spilled(&source, &target) };
            let job = world.start_with(options, job).await;
            let writing = guest.run(seed, 40);
            bds_io::sleep(Duration::from_millis(20)).await;
            control.errno.store(libc::EIO as u64, Ordering::SeqCst);
            control.release();
            bds_io::sleep(Duration::from_millis(seed * 40)).await;
            control.errno.store(0, Ordering::SeqCst);
            writing.await;
            if job.status() == JobStatus::Paused {
                job.resume().unwrap();
            }
            job.wait().await.unwrap();
            assert!(content(&target).await == start, "seed {seed}");
            assert!(content(&source).await == guest.state(guest.completed()));
        });
    }
}

/// Modes under random writes, with small limits, against the state at the start.
#[test]
fn the_copy_is_of_the_moment_of_the_start() {
    for seed in 0..24 {
        run(seed, async |world: World| {
            let source = world.make("disk", ["mem", "qcow2"][seed as usize % 2]).await;
            let (target, control) = world.controlled("copy").await;
            let guest = Writer::new(&source).await;
            let mut rng = Chance::new(seed);
            for _ in 0..20 {
                guest.step(&mut rng).await.unwrap();
            }
            let start = guest.state(20);
            control.delay_us.store(seed % 5 * 200, Ordering::SeqCst);
            let options = BackupOptions {
                staging_policy: [AtLimit::Stall, AtLimit::Throttle][seed as usize / 2 % 2],
                max_workers: 1 + seed as i64 % 4,
                ..spilled(&source, &target)
            };
            let job = world.start(options).await;
            guest.discards.store(true, Ordering::SeqCst);
            let writing = guest.run(seed, 60);
            job.wait().await.unwrap();
            writing.await;
            assert!(content(&target).await == start, "seed {seed}");
            assert!(content(&source).await == guest.state(guest.completed()));
        });
    }
}

/// Cancelled at any moment: everything is given back, nothing is left on the host's disk.
#[test]
fn cancelled_at_any_moment_with_a_spill_file() {
    for seed in 0..30 {
        let sim = Sim::new(seed, SimConfig::calm());
        let world = World::on(&sim);
        let graph = world.graph().clone();
        sim.block_on(async {
            let source = world.make("disk", "mem").await;
            let (target, control) = world.controlled("copy").await;
            let guest = Writer::new(&source).await;
            control.delay_us.store(300, Ordering::SeqCst);
            let before = shape(world.graph());
            let job = world.start(spilled(&source, &target)).await;
            let writing = guest.run(seed, 60);
            bds_io::sleep(Duration::from_micros(seed * 57)).await;
            let _may_be_over = job.cancel(true);
            let _ended = job.wait().await;
            writing.await;
            assert!(content(&source).await == guest.state(guest.completed()));
            assert_eq!(shape(world.graph()), before);
            assert_eq!(job.info().cleanup_error, None);
            let named = sim.fs().stat(&PathBuf::from("spill"));
            assert!(named.is_err(), "its name is gone");
            drop(target);
        });
        drop(world);
        sim.run_until_idle();
        sim.block_on(async { graph.shutdown().await.check_leaks() }).expect("no leak");
    }
}

/// A spill node that hangs is given up like a target.
#[test]
fn a_stuck_spill_node_does_not_keep_the_job() {
    run(1, async |world: World| {
        let (disk, _) = controlled(&world, "disk", 40 * GRANULE, 1).await;
        let user = user(&disk, true);
        let (copy, target) = controlled(&world, "copy", 40 * GRANULE, 0).await;
        let (node, spill) = controlled(&world, "spare", 8 * GRANULE, 0).await;
        target.delay_us.store(50_000, Ordering::SeqCst);
        spill.hold();
        let options = BackupOptions {
            sync: BackupSync::None,
            spill: Some(Spill::Node(node.clone())),
            ..spilled(&disk, &copy)
        };
        let job = JobOptions { cancel_timeout: Duration::from_secs(1), ..kept("job0") };
        let job = world.start_with(options, job).await;
        let (guest, writing) = Load::start(user, 40, Duration::ZERO);
        bds_io::sleep(Duration::from_secs(5)).await;
        let begun = bds_io::now();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert!(bds_io::now() - begun <= Duration::from_millis(2500), "it took too long");
        assert!(node.is_poisoned() && !copy.is_poisoned());
        writing.await;
        assert_eq!(guest.done.load(Ordering::SeqCst), 40);
        spill.release();
    });
}

#[test]
fn options_of_the_spill_file_are_checked_and_a_file_that_exists_is_kept() {
    let sim = Sim::new(1, SimConfig::calm());
    let world = World::on(&sim);
    sim.block_on(async {
        let source = world.make("disk", "mem").await;
        let target = world.make("copy", "raw").await;
        let before = shape(world.graph());
        let good = spilled(&source, &target);
        let node = Some(Spill::Node(target.clone()));
        for (wrong, words) in [
            (BackupOptions { spill: None, ..good.clone() }, "needs a spill file or node"),
            (BackupOptions { spill_len: 0, ..good.clone() }, "needs a spill-size"),
            (BackupOptions { staging_len: 0, ..good.clone() }, "needs a staging-size"),
            (BackupOptions { spill_len: 1, ..good.clone() }, "must be 262144 bytes at least"),
            (BackupOptions { staging_len: 1, ..good.clone() }, "must be 262144 bytes at least"),
            (BackupOptions { spill: node, ..good.clone() }, "copy"),
        ] {
            let error = Backup::prepare(wrong).await.unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
        let path = PathBuf::from("copy");
        let exists = BackupOptions { spill: Some(Spill::File(path)), ..good.clone() };
        let error = Backup::prepare(exists).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(sim.fs().stat(&PathBuf::from("copy")).is_ok());
        world.graph().reap().await;
        assert_eq!(shape(world.graph()), before);
        let broken = BackupOptions { on_cbw_error: OnCbwError::BreakSnapshot, ..good };
        world.start(broken).await.wait().await.unwrap();
    });
}

/// On a real file system the space is given back with the job.
#[test]
fn a_spill_file_of_the_host_has_no_name() {
    let dir = bds_testkit::Scratch::new();
    let world = World::in_dir(Fs::Host, dir.dir().to_owned());
    bds_io::block_on(async {
        let source = world.make("disk", "mem").await;
        let target = world.make("copy", "raw").await;
        let guest = Writer::new(&source).await;
        let mut rng = Chance::new(3);
        for _ in 0..20 {
            guest.step(&mut rng).await.unwrap();
        }
        let path = dir.path("spill");
        let options = BackupOptions {
            spill: Some(Spill::File(path.clone())),
            staging_policy: AtLimit::Stall,
            ..spilled(&source, &target)
        };
        let job = world.start(options).await;
        assert!(!path.exists());
        let writing = guest.run(1, 60);
        job.wait().await.unwrap();
        writing.await;
        assert!(content(&target).await == guest.state(20));
    });
}
