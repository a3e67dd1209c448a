//! Checkpoints over many disks: one point in time, and all or nothing wherever one fails.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is their way to fail")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::{BitmapOptions, Graph, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::sim::{Fault, OpMask};
use bds_io::{Buf, Sim, Task};
use bds_jobs::backup::{BackupOptions, BackupSync, BitmapSync, OnCbwError};
use bds_jobs::{Checkpoint, JobEvent, JobManager, JobOptions};
use bds_testkit::Chance;

use crate::fake;

const LEN: u64 = 256 << 10;
/// Where the number of a write lies.
const PLACE: u64 = 64 << 10;

struct World {
    jobs: JobManager,
}

impl World {
    fn on(sim: &Sim) -> Self {
        Self { jobs: fake::manager(sim) }
    }

    fn graph(&self) -> &Graph {
        self.jobs.graph()
    }

    async fn disk(&self, name: &str) -> NodeRef {
        let options = format!("driver=mem,node-name={name},size={LEN}");
        self.graph().open(Options::parse(&options).unwrap()).await.unwrap()
    }

    async fn qcow2(&self, name: &str) -> NodeRef {
        let options = Options::new().with("size", LEN);
        let (format, path) = ("qcow2".into(), name.into());
        let image = bds_core::graph::NewImage { format, path, options, skip_backing: true };
        self.graph().create_image(image).await.unwrap();
        self.overlay(name).await
    }

    /// Opens an image that was made, without a backing node.
    async fn overlay(&self, name: &str) -> NodeRef {
        let options =
            format!("driver=qcow2,node-name={name},file.driver=file,file.filename={name}");
        self.graph().open(Options::parse(&options).unwrap()).await.unwrap()
    }

    /// Nodes, edges, bitmaps and jobs; without lengths of files and numbers of generated names.
    fn state(&self, disks: &[&NodeRef]) -> Vec<String> {
        let dump = self.graph().dump();
        let mut lines: Vec<String> = dump
            .lines()
            .map(|line| {
                let words = line.split(' ').filter(|word| !word.starts_with("len="));
                words.collect::<Vec<_>>().join(" ")
            })
            .collect();
        for disk in disks {
            lines.extend(disk.bitmaps().iter().map(|bitmap| {
                let (name, count) = (bitmap.name.as_deref().unwrap_or_default(), bitmap.count);
                format!("{} {name} {count} {} {}", disk.name(), bitmap.recording, bitmap.busy)
            }));
        }
        lines.extend(self.jobs.query().iter().map(|job| job.id.clone()));
        lines.sort();
        lines
    }
}

fn user(node: &NodeRef) -> Backend {
    Backend::new(node, BackendOptions { writable: true, ..Default::default() }).unwrap()
}

async fn put(disk: &Backend, number: u64) -> Result<()> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    disk.write(PLACE, Buf::from_slice(&bytes).iov(), WriteFlags::empty()).await
}

async fn number(node: &NodeRef) -> u64 {
    let buf = Buf::zeroed(512, 512);
    let reader = Backend::new(node, BackendOptions::default()).unwrap();
    reader.read(PLACE, buf.iov()).await.unwrap();
    u64::from_le_bytes(buf.iov().to_vec(0..8).try_into().unwrap())
}

/// A guest that writes the next number to the first disk, then to the second, and so on.
struct OrderedWriter {
    is_stopped: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    task: Task<()>,
}

impl OrderedWriter {
    fn start(disks: &[NodeRef], seed: u64) -> Self {
        let (is_stopped, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let disks: Vec<Backend> = disks.iter().map(user).collect();
        let (stop, count) = (Arc::clone(&is_stopped), Arc::clone(&written));
        let task = bds_io::spawn(async move {
            let mut chance = Chance::new(seed);
            while !stop.load(Ordering::Relaxed) {
                let next = count.load(Ordering::Relaxed) + 1;
                for disk in &disks {
                    put(disk, next).await.unwrap();
                    if chance.one_in(3) {
                        bds_io::sleep(Duration::from_micros(chance.below(40))).await;
                    }
                    bds_io::yield_now().await;
                }
                count.store(next, Ordering::Relaxed);
            }
        });
        Self { is_stopped, written, task }
    }

    async fn stop(self) -> u64 {
        self.is_stopped.store(true, Ordering::Relaxed);
        self.task.await;
        self.written.load(Ordering::Relaxed)
    }
}

/// Eight disks, many checkpoints: none may hold a write without those that came before it.
#[test]
fn no_checkpoint_holds_a_write_without_the_one_before_it() {
    let rounds =
        if std::env::var("BDS_TEST_BUDGET").is_ok_and(|b| b == "full") { 1000 } else { 40 };
    for seed in 0..3 {
        let sim = fake::calm(seed);
        let world = World::on(&sim);
        sim.block_on(async {
            let (mut disks, mut copies) = (Vec::new(), Vec::new());
            for n in 0..8 {
                disks.push(world.disk(&format!("disk{n}")).await);
                copies.push(world.disk(&format!("copy{n}")).await);
            }
            let writer = OrderedWriter::start(&disks, seed);
            let (mut chance, mut between) = (Chance::new(seed), 0);
            for round in 0..rounds / 3 + 1 {
                bds_io::sleep(Duration::from_micros(chance.below(300))).await;
                let mut checkpoint = Checkpoint::new(&world.jobs).grouped(chance.one_in(2));
                for (n, (disk, copy)) in disks.iter().zip(&copies).enumerate() {
                    let id = format!("job{n}");
                    let options = BackupOptions::new(disk, copy, &*id);
                    checkpoint = checkpoint
                        .backup(options, JobOptions::new(&*id))
                        .add_bitmap(disk, BitmapOptions::named(format!("since{round}")));
                    if round > 0 {
                        checkpoint = checkpoint.remove_bitmap(disk, &format!("since{}", round - 1));
                    }
                }
                let taken = checkpoint.take().await.unwrap();
                assert_eq!(taken.holds.len(), 8);
                assert!(taken.longest_hold() < Duration::from_secs(1), "virtual time");
                for job in &taken.jobs {
                    job.wait().await.unwrap();
                }
                let mut seen = Vec::new();
                for copy in &copies {
                    seen.push(number(copy).await);
                }
                let is_ordered = seen.windows(2).all(|pair| pair[0] >= pair[1]);
                assert!(is_ordered && seen[0] <= seen[7] + 1, "seed {seed}: {seen:?}");
                between += u64::from(seen[0] != seen[7]);
            }
            assert!(writer.stop().await > 10 && between > 0, "some fell between two writes");
            drop((disks, copies));
        });
        sim.block_on(world.graph().shutdown()).check_leaks().unwrap();
    }
}

/// A disk of each kind of edit, and the edits up to `failing`, at whose place one that is refused.
async fn checkpoint(world: &World, disks: &Disks, failing: Option<usize>) -> Checkpoint {
    let Disks { snapped, over, bare, kept, copies } = disks;
    let by_bitmap = BackupOptions {
        sync: BackupSync::Bitmap,
        bitmap: Some("old".into()),
        bitmap_mode: Some(BitmapSync::OnSuccess),
        ..BackupOptions::new(kept, &copies[1], "second")
    };
    let mut this = Checkpoint::new(&world.jobs);
    for place in 0..=9 {
        if failing == Some(place) {
            // Each is refused at another moment.
            this = match place % 4 {
                0 => this.reset_bitmap(bare, "missing"),
                1 => this.snapshot(bare, snapped),
                2 => this.backup(BackupOptions::new(bare, bare, "bad"), JobOptions::new("bad")),
                _ => {
                    let options = BackupOptions::new(over, &copies[2], "other");
                    this.backup(options, JobOptions::new("not an id"))
                }
            };
        }
        this = match place {
            0 => this.snapshot(snapped, over),
            1 => this.add_bitmap(bare, BitmapOptions::named("new")),
            2 => this.merge_bitmaps(bare, "new", &[(bare, "old")]),
            3 => {
                this.backup(BackupOptions::new(bare, &copies[0], "first"), JobOptions::new("first"))
            }
            4 => this.reset_bitmap(bare, "old"),
            5 => this.disable_bitmap(bare, "old"),
            6 => this.backup(by_bitmap.clone(), JobOptions::new("second")),
            7 => this.add_bitmap(
                kept,
                BitmapOptions { persistent: true, ..BitmapOptions::named("stored") },
            ),
            8 => this.remove_bitmap(kept, "unused"),
            _ => this.enable_bitmap(kept, "idle"),
        };
    }
    this
}

struct Disks {
    snapped: NodeRef,
    over: NodeRef,
    bare: NodeRef,
    kept: NodeRef,
    copies: Vec<NodeRef>,
}

impl Disks {
    async fn make(world: &World) -> Self {
        let disks = Self {
            snapped: world.disk("snapped").await,
            over: world.qcow2("over").await,
            bare: world.disk("bare").await,
            kept: world.qcow2("kept").await,
            copies: vec![world.disk("c0").await, world.disk("c1").await, world.disk("c2").await],
        };
        let named = BitmapOptions::named;
        for disk in [&disks.bare, &disks.kept] {
            disk.add_bitmap(named("old")).await.unwrap();
        }
        disks.kept.add_bitmap(named("unused")).await.unwrap();
        let idle = BitmapOptions { disabled: true, persistent: true, ..named("idle") };
        disks.kept.add_bitmap(idle).await.unwrap();
        for (disk, text) in [(&disks.bare, 7), (&disks.kept, 8), (&disks.snapped, 9)] {
            put(&user(disk), text).await.unwrap();
        }
        disks
    }

    fn all(&self) -> [&NodeRef; 4] {
        [&self.snapped, &self.over, &self.bare, &self.kept]
    }
}

#[test]
fn a_checkpoint_is_taken_as_a_whole() {
    let sim = fake::calm(1);
    let world = World::on(&sim);
    sim.block_on(async {
        let disks = Disks::make(&world).await;
        let guest = user(&disks.snapped);
        let taken = checkpoint(&world, &disks, None).await.take().await.unwrap();
        assert_eq!(guest.node().unwrap().id(), disks.over.id(), "the guest writes the overlay");
        let names: Vec<_> = taken.holds.iter().map(|hold| hold.node.as_str()).collect();
        assert_eq!(names, ["snapped", "bare", "kept"]);
        for job in &taken.jobs {
            job.wait().await.unwrap();
        }
        assert_eq!((number(&disks.copies[0]).await, number(&disks.copies[1]).await), (7, 8));
        let state = world.state(&disks.all());
        for line in [
            "bare new 65536 true false",
            "bare old 0 false false",
            "kept old 0 true false",
            "kept stored 0 true false",
            "kept idle 0 true false",
        ] {
            assert!(state.iter().any(|known| known == line), "{line}: {state:#?}");
        }
        assert!(!state.iter().any(|line| line.contains("unused")), "{state:#?}");
        drop((disks, guest, taken));
    });
    sim.block_on(world.graph().shutdown()).check_leaks().unwrap();
}

#[test]
fn a_failure_at_any_position_changes_nothing() {
    for place in 0..=9 {
        let sim = fake::calm(place as u64);
        let world = World::on(&sim);
        sim.block_on(async {
            let disks = Disks::make(&world).await;
            let guest = user(&disks.snapped);
            let before = world.state(&disks.all());
            let refused = checkpoint(&world, &disks, Some(place)).await.take().await;
            let error = refused.unwrap_err();
            assert_eq!(world.state(&disks.all()), before, "position {place}: {error}");
            // And it can be taken afterwards.
            let taken = checkpoint(&world, &disks, None).await.take().await.unwrap();
            for job in &taken.jobs {
                job.wait().await.unwrap();
            }
            assert_eq!(number(&disks.copies[0]).await, 7);
            drop((disks, guest, taken));
        });
        sim.block_on(world.graph().shutdown()).check_leaks().unwrap();
    }
}

/// Scenario 10: grouped increments of two disks under an ordered writer. Where the target of the
/// second fails after most of it was copied, both end, the second with its error and the first as
/// cancelled, and both bitmaps keep everything; where both succeed, no copy of the second disk
/// holds a write that the first lacks.
#[test]
fn scenario_10_grouped_increments_of_two_disks_of_which_one_fails() {
    for seed in 0..4 {
        let sim = fake::calm(seed);
        let world = World::on(&sim);
        sim.block_on(async {
            let (mut disks, mut copies) = (Vec::new(), Vec::new());
            for n in 0..2 {
                disks.push(world.disk(&format!("disk{n}")).await);
                let name = format!("copy{n}");
                sim.put_file(&name, &[0; 256 << 10]);
                let text = format!("driver=file,node-name={name},filename={name}");
                copies.push(world.graph().open(Options::parse(&text).unwrap()).await.unwrap());
            }
            let writer = OrderedWriter::start(&disks, seed);
            let mut rounds = [0; 2];
            for round in 0..12_u8 {
                let fails = round % 3 == 2;
                for disk in &disks {
                    for granule in [0, 2, 3] {
                        let byte = Buf::from_slice(&[round + 1; 512]);
                        let at = granule * PLACE;
                        user(disk).write(at, byte.iov(), WriteFlags::empty()).await.unwrap();
                    }
                }
                if fails {
                    let fault = Fault::sticky(libc::EIO).on(OpMask::WRITE).in_path("copy1");
                    sim.fail_nth(3, fault);
                }
                let is_ok = round_of_increments(&world, &disks, &copies, round == 0).await;
                sim.clear_faults();
                assert_eq!(is_ok, !fails, "seed {seed}, round {round}");
                rounds[usize::from(is_ok)] += 1;
                if is_ok {
                    let seen = [number(&copies[0]).await, number(&copies[1]).await];
                    let is_ordered = seen[0] == seen[1] || seen[0] == seen[1] + 1;
                    assert!(is_ordered, "seed {seed}, round {round}: {seen:?}");
                }
            }
            assert_eq!(rounds, [4, 8]);
            assert!(writer.stop().await > 10);
            drop((disks, copies));
        });
        // A file whose write failed is closed with that error at most.
        sim.block_on(world.graph().shutdown()).check_leaks().unwrap();
    }
}

/// Backs up both disks in a group. Returns whether both succeeded, and checks the failure.
async fn round_of_increments(
    world: &World,
    disks: &[NodeRef],
    copies: &[NodeRef],
    is_first: bool,
) -> bool {
    let mut events = world.jobs.events();
    let mut checkpoint = Checkpoint::new(&world.jobs).grouped(true);
    for (n, (disk, copy)) in disks.iter().zip(copies).enumerate() {
        let id = format!("j{}", n + 1);
        let mut options = BackupOptions::new(disk, copy, &*id);
        // The guest does not fail with the target.
        options.staging_len = 1 << 20;
        options.max_chunk = 64 << 10;
        options.on_cbw_error = OnCbwError::BreakSnapshot;
        if is_first {
            checkpoint = checkpoint.add_bitmap(disk, BitmapOptions::named("since"));
        } else {
            options.sync = BackupSync::Incremental;
            options.bitmap = Some("since".into());
            options.bitmap_mode = Some(BitmapSync::OnSuccess);
        }
        checkpoint = checkpoint.backup(options, JobOptions::new(&*id));
    }
    let taken = checkpoint.take().await.unwrap();
    let mut results = Vec::new();
    for job in &taken.jobs {
        results.push(job.wait().await.map_err(|error| error.errno()));
    }
    let is_final =
        |event: &JobEvent| matches!(event.name(), "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED");
    let mut ends: Vec<String> = std::iter::from_fn(|| events.try_next())
        .filter(is_final)
        .map(|event| format!("{} {}", event.id().unwrap(), event.name()))
        .collect();
    ends.sort();
    for disk in disks {
        let bitmap = &disk.bitmaps()[0];
        assert!(!bitmap.busy && bitmap.recording, "{bitmap:?}");
    }
    if results.iter().all(Result::is_ok) {
        assert_eq!(ends, ["j1 BLOCK_JOB_COMPLETED", "j2 BLOCK_JOB_COMPLETED"]);
        return true;
    }
    assert_eq!(results, [Err(libc::ECANCELED), Err(libc::EIO)]);
    assert_eq!(ends, ["j1 BLOCK_JOB_CANCELLED", "j2 BLOCK_JOB_COMPLETED"]);
    for disk in disks {
        assert_eq!(disk.bitmaps()[0].count, LEN, "nothing was taken from it");
    }
    false
}

/// A group whose second member fails: no bitmap has advanced, and all targets are free again.
#[test]
fn a_backup_of_a_checkpoint_that_fails_takes_its_group_along() {
    let sim = fake::calm(5);
    let world = World::on(&sim);
    sim.block_on(async {
        let (a, b) = (world.disk("a").await, world.disk("b").await);
        let (copy, small) = (world.disk("copy").await, world.disk("small").await);
        a.add_bitmap(BitmapOptions::named("since")).await.unwrap();
        put(&user(&a), 3).await.unwrap();
        let first = BackupOptions {
            bitmap: Some("since".into()),
            bitmap_mode: Some(BitmapSync::OnSuccess),
            ..BackupOptions::new(&a, &copy, "first")
        };
        let waits = JobOptions { auto_finalize: false, ..JobOptions::new("second") };
        let taken = Checkpoint::new(&world.jobs)
            .backup(first, JobOptions::new("first"))
            .backup(BackupOptions::new(&b, &small, "second"), waits)
            .take()
            .await
            .unwrap();
        taken.jobs[0].wait_status(bds_jobs::JobStatus::Pending).await.unwrap();
        taken.jobs[1].cancel(true).unwrap();
        assert!(taken.jobs[0].wait().await.is_err());
        let bitmap = &a.bitmaps()[0];
        assert_eq!((bitmap.count, bitmap.busy), (65536, false));
        drop((a, b, copy, small, taken));
    });
    sim.block_on(world.graph().shutdown()).check_leaks().unwrap();
}
