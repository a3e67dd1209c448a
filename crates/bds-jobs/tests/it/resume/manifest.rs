//! A job's manifest describes what its target holds: nothing less than the source at the promised
//! moment, whatever the guest and the target's disk do.

use bds_core::ErrorKind;
use bds_core::graph::{BitmapOptions, NewImage, NodeRef};
use bds_core::request::Backend;
use bds_core::{Options, Result};
use bds_io::SimConfig;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::backup::{Backup, BackupOptions, BackupSync, BitmapSync};
use bds_jobs::manifest::{MAX_NOTE_LEN, Manifest};
use bds_jobs::record::ManifestOptions;
use bds_jobs::{JobHandle, JobOptions};
use bds_testkit::Chance;

use super::kit::{
    ALL_KINDS, CHUNK, KINDS, Kind, World, content, finish, interrupt_in, manifest, manifest_of,
    pattern, record, verify, wait_written, write, writer,
};
use crate::meter::Lie;

/// Behind the others in the order of names.
const MANIFEST: &str = "/z-manifest";
/// Length of the disks: no multiple of a chunk.
const LEN: u64 = 24 * CHUNK + 1536;

fn wanted() -> Option<ManifestOptions> {
    Some(ManifestOptions { note: "disk0".into(), ..ManifestOptions::new(MANIFEST) })
}

/// Writes to random places while a job runs.
async fn write_randomly(guest: &Backend, seed: u64) {
    let mut chance = Chance::new(seed);
    for _ in 0..30 {
        let len = chance.between(1, 9000);
        let offset = chance.below(LEN - len);
        write(guest, offset, &pattern(chance.draw(), len)).await;
        bds_io::sleep(std::time::Duration::from_micros(chance.between(100, 4000))).await;
    }
}

#[test]
fn a_manifest_describes_the_copy_of_a_disk_in_use() {
    for kind in ALL_KINDS {
        for seed in 0..4 {
            let world = World::sized(seed, LEN);
            let sim = world.sim.clone();
            sim.block_on(async {
                let source = world.open("source").await;
                let target = world.open("target").await;
                let guest = writer(&source);
                let job = world.start_with(kind, (&source, &target), (None, wanted())).await;
                write_randomly(&guest, seed).await;
                finish(kind, &job).await.unwrap();
                let found = manifest(&sim, MANIFEST);
                assert!(verify(&found, &target).await.is_good(), "{kind:?}, seed {seed}");
                let expected = match kind {
                    Kind::Backup => pattern(seed, LEN),
                    Kind::Mirror | Kind::SyncedMirror => content(&source).await,
                };
                let expected = manifest_of(&world.graph, &expected).await;
                assert_eq!(found.hashes(), expected.hashes(), "{kind:?}, seed {seed}");
                assert_eq!((found.note(), found.parent()), ("disk0", None));
            });
            world.end();
        }
    }
}

/// A disk that reports success for a write that it lost, put elsewhere or damaged: what it holds is
/// not what the manifest says, at each chunk.
#[test]
fn a_write_that_went_wrong_silently_is_found_by_verify() {
    let chunks = LEN / CHUNK;
    for at in 0..chunks {
        let elsewhere = (at + 1) % chunks * CHUNK;
        for lie in [Lie::Lost, Lie::Misdirected(elsewhere), Lie::Flipped(777)] {
            let world = World::sized(at, LEN);
            let sim = world.sim.clone();
            // No chunks of zeros, which the target may hold without a write.
            let bytes: Vec<u8> = pattern(at, LEN).iter().map(|byte| byte | 1).collect();
            sim.put_file("/source", &bytes);
            sim.block_on(async {
                let source = world.open("source").await;
                let (target, meter) = world.metered().await;
                meter.lie_at(at * CHUNK, lie);
                let kind = Kind::Backup;
                let job = world.start_with(kind, (&source, &target), (None, wanted())).await;
                finish(kind, &job).await.unwrap();
                let found = verify(&manifest(&sim, MANIFEST), &target).await;
                let bad = at * CHUNK..LEN.min((at + 1) * CHUNK);
                let is_named = found.bad.iter().any(|r| r.start <= bad.start && bad.end <= r.end);
                assert!(is_named, "{lie:?} at chunk {at}: {:?}", found.bad);
            });
            world.end();
        }
    }
}

#[test]
fn verify_names_the_chunks_that_were_changed_later_and_no_others() {
    let world = World::sized(2, LEN);
    let sim = world.sim.clone();
    sim.block_on(async {
        let (source, target) = (world.open("source").await, world.open("target").await);
        let job = world.start_with(Kind::Mirror, (&source, &target), (None, wanted())).await;
        finish(Kind::Mirror, &job).await.unwrap();
        let found = manifest(&sim, MANIFEST);
        let disk = writer(&target);
        let mut chance = Chance::new(3);
        for _ in 0..40 {
            let at = chance.below(LEN);
            let mut bytes = content(&target).await;
            write(&disk, at, &[bytes[at as usize] ^ (1 << chance.below(8))]).await;
            let start = at / CHUNK * CHUNK;
            let report = verify(&found, &target).await;
            assert_eq!(report.bad, vec![start..LEN.min(start + CHUNK)], "byte {at}");
            bytes.drain(..at as usize);
            write(&disk, at, &bytes[..1]).await;
        }
    });
    world.end();
}

#[test]
fn a_copy_that_goes_on_has_the_manifest_of_all_of_it() {
    for kind in KINDS {
        let (sim, _) = interrupt_in(World::sized(6, LEN), kind, LEN / 2);
        let world = World::on(sim);
        let sim = world.sim.clone();
        sim.block_on(async {
            let source = world.open("source").await;
            write(&writer(&source), 3 * CHUNK + 9, b"later").await;
            let (target, _) = world.metered().await;
            let tracked = (Some(record()), wanted());
            let job = world.start_with(kind, (&source, &target), tracked).await;
            finish(kind, &job).await.unwrap();
            let expected = manifest_of(&world.graph, &content(&source).await).await;
            assert_eq!(manifest(&sim, MANIFEST).hashes(), expected.hashes(), "{kind:?}");
            assert!(verify(&expected, &target).await.is_good(), "{kind:?}");
        });
        world.end();
    }
}

async fn start(world: &World, options: BackupOptions) -> Result<JobHandle> {
    let backup = Backup::prepare(options).await?;
    world.jobs.start(JobOptions::new("job0"), Box::new(backup)).await
}

#[test]
fn an_increment_describes_the_whole_image_and_names_its_base() {
    let world = World::sized(5, LEN);
    let sim = world.sim.clone();
    sim.block_on(async {
        let (source, meter) = world.metered_as("source").await;
        let target = world.open("target").await;
        source.add_bitmap(BitmapOptions::named("since")).await.unwrap();
        let mut options = BackupOptions::new(&source, &target, "job0");
        options.manifest = Some(ManifestOptions::new(MANIFEST));
        start(&world, options).await.unwrap().wait().await.unwrap();
        let base = manifest(&sim, MANIFEST);
        write(&writer(&source), 5 * CHUNK + 100, b"changed").await;
        let read = meter.read();

        let mut options = BackupOptions::new(&source, &target, "job0");
        (options.sync, options.bitmap) = (BackupSync::Bitmap, Some("since".into()));
        options.bitmap_mode = Some(BitmapSync::OnSuccess);
        let base_path = Some(MANIFEST.into());
        options.manifest =
            Some(ManifestOptions { base: base_path, ..ManifestOptions::new("/z-next") });
        start(&world, options).await.unwrap().wait().await.unwrap();
        assert_eq!(meter.read() - read, CHUNK, "what has not changed is not read");
        let next = manifest(&sim, "/z-next");
        assert_eq!(next.parent(), Some(base.root()));
        assert!(verify(&next, &target).await.is_good());
        next.check_parent(&base).unwrap();
        assert_eq!(verify(&base, &target).await.bad, vec![5 * CHUNK..6 * CHUNK]);
    });
    world.end();
}

async fn compressed_target(world: &World) -> NodeRef {
    let image = NewImage {
        format: "qcow2".into(),
        path: "/z-target".into(),
        options: Options::new().with("size", LEN),
        skip_backing: true,
    };
    world.graph.create_image(image).await.unwrap();
    let options = "driver=qcow2,node-name=z,file.driver=file,file.filename=/z-target";
    world.try_open(options).await.unwrap()
}

#[test]
fn a_compressed_backup_has_a_manifest_and_goes_on() {
    let world = World::sized(7, LEN);
    let sim = world.sim.clone();
    sim.block_on(async {
        let source = world.open("source").await;
        let target = compressed_target(&world).await;
        for round in 0..2 {
            let mut options = BackupOptions::new(&source, &target, "job0");
            (options.compress, options.record) = (true, Some(record()));
            options.manifest = Some(ManifestOptions::new(MANIFEST));
            (options.max_workers, options.max_chunk) = (1, CHUNK as i64);
            let job = start(&world, options).await.unwrap();
            if round == 0 {
                // After some clusters; a simulated compression takes no time of its own.
                while job.info().current_progress < LEN / 2 {
                    bds_io::sleep(std::time::Duration::from_micros(10)).await;
                }
                job.cancel(true).unwrap();
                job.wait().await.unwrap_err();
                continue;
            }
            job.wait().await.unwrap();
            assert!(job.info().resumed_bytes.is_some_and(|bytes| bytes >= LEN / 3));
        }
        let found = manifest(&sim, MANIFEST);
        assert!(verify(&found, &target).await.is_good());
        assert!(verify(&found, &source).await.is_good());
    });
    world.end();
}

#[test]
fn what_makes_no_manifest_is_refused_before_anything_is_made() {
    let other_shape = |bytes: &[u8]| {
        let config = SimConfig::calm();
        let world = World::on(bds_io::Sim::new(1, config));
        let manifest = world.sim.block_on(manifest_of(&world.graph, bytes));
        world.end();
        manifest.to_bytes()
    };
    let longer = other_shape(&vec![1; LEN as usize + 512]);
    for kind in KINDS {
        let world = World::sized(1, LEN);
        let sim = world.sim.clone();
        sim.put_file("/z-foreign", b"a letter");
        sim.put_file("/z-longer", &longer);
        sim.block_on(async {
            let (source, target) = (world.open("source").await, world.open("target").await);
            let refused = async |manifest: ManifestOptions| {
                let tracked = (Some(record()), Some(manifest));
                let prepared = world.prepare(kind, (&source, &target), tracked).await;
                prepared.err().expect("it is refused")
            };
            let error = refused(ManifestOptions::new("/z-foreign")).await;
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
            assert!(error.to_string().contains("/z-foreign"), "{error}");
            let note = "x".repeat(MAX_NOTE_LEN + 1);
            let error = refused(ManifestOptions { note, ..ManifestOptions::new(MANIFEST) }).await;
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            for (base, expected) in [
                ("/z-longer", ErrorKind::InvalidInput),
                ("/z-foreign", ErrorKind::InvalidImage),
                ("/z-none", ErrorKind::NotFound),
            ] {
                let base_path = Some(base.into());
                let options = ManifestOptions { base: base_path, ..ManifestOptions::new(MANIFEST) };
                let error = refused(options).await;
                assert_eq!(error.kind(), expected, "{error}");
                assert!(error.to_string().contains(base), "{error}");
            }
        });
        assert!(sim.snapshot_file("/z-foreign") == b"a letter");
        assert!(!sim.exists(MANIFEST) && !sim.exists(super::kit::RECORD), "{kind:?}");
        world.end();
    }
}

/// The older manifest stays until the newer one is complete, and a job whose manifest could not be
/// written has failed.
#[test]
fn a_failure_leaves_the_manifest_that_was_there() {
    for kind in KINDS {
        for fails_at_manifest in [false, true] {
            let world = World::sized(8, LEN);
            let sim = world.sim.clone();
            let older = sim.block_on(manifest_of(&world.graph, b"older")).to_bytes();
            sim.put_file(MANIFEST, &older);
            sim.block_on(async {
                let source = world.open("source").await;
                let (target, meter) = world.metered().await;
                let job = world.start_with(kind, (&source, &target), (None, wanted())).await;
                wait_written(&meter, LEN / 2).await;
                match fails_at_manifest {
                    true => sim.fail_nth(
                        0,
                        Fault::sticky(libc::EIO).on(OpMask::WRITE).in_path("z-manifest"),
                    ),
                    false => meter.fails.store(true, std::sync::atomic::Ordering::SeqCst),
                }
                let error = finish(kind, &job).await.unwrap_err();
                let is_named = error.to_string().contains(MANIFEST);
                assert_eq!(is_named, fails_at_manifest, "{kind:?}: {error}");
            });
            assert_eq!(Manifest::parse(&sim.snapshot_file(MANIFEST)).unwrap().to_bytes(), older);
            let is_left = |path: &std::path::PathBuf| path.to_string_lossy().contains(".tmp");
            assert!(!sim.paths().iter().any(is_left), "no temporary file is left");
            world.end();
        }
    }
}
