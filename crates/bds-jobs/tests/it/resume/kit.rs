//! A world with a source and a target that survive jobs, and counts of what is copied.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::WriteFlags;
use bds_core::graph::{Graph, GraphConfig, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Sim, SimConfig};
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::manifest::{Manifest, ManifestBuilder, VerifyReport};
use bds_jobs::mirror::{Mirror, MirrorOptions};
use bds_jobs::record::{ManifestOptions, RecordOptions};
use bds_jobs::{
    CopyMode, JobDriver, JobEvent, JobEvents, JobHandle, JobManager, JobOptions, RecordUse,
};
use bds_testkit::Chance;

use crate::meter::{Meter, MeteredType};

/// Behind the others in the order of names: so a world after a power cut numbers its files alike.
pub(super) const RECORD: &str = "/z-record";
pub(super) const CHUNK: u64 = 64 << 10;
/// Length of the disks: several pages of a record, and no multiple of a chunk.
pub(super) const LEN: u64 = 320 * CHUNK + 1536;

/// Bytes of which no chunk equals another, with some chunks of zeros.
pub(super) fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut bytes = vec![0; len as usize];
    for chunk in bytes.chunks_mut(CHUNK as usize) {
        if !chance.one_in(8) {
            let stamp = chance.below(u64::MAX).to_le_bytes();
            chunk.chunks_mut(8).for_each(|piece| piece.copy_from_slice(&stamp[..piece.len()]));
        }
    }
    bytes
}

/// A simulated disk with `source`, `target` and a record.
pub(super) struct World {
    pub(super) sim: Sim,
    pub(super) graph: Graph,
    pub(super) jobs: JobManager,
}

/// The kinds of jobs under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Backup,
    Mirror,
    /// A mirror in mode `write-blocking`.
    SyncedMirror,
}

impl Kind {
    /// Bytes of the longest request of [`World::prepare`]'s jobs.
    pub(super) fn request_len(self) -> u64 {
        match self {
            Self::Backup => CHUNK,
            Self::Mirror | Self::SyncedMirror => 16 * CHUNK,
        }
    }
}

pub(super) const KINDS: [Kind; 2] = [Kind::Backup, Kind::Mirror];
/// For tests in which a guest writes during the copy.
pub(super) const ALL_KINDS: [Kind; 3] = [Kind::Backup, Kind::Mirror, Kind::SyncedMirror];

impl World {
    pub(super) fn on(sim: Sim) -> Self {
        let mut config = GraphConfig::new(Arc::new(bds_drivers::registry()));
        config.fs = sim.fs();
        let graph = Graph::new(config);
        let jobs = JobManager::new(&graph);
        Self { sim, graph, jobs }
    }

    /// With a source of random bytes and a target of others.
    pub(super) fn new(seed: u64) -> Self {
        Self::sized(seed, LEN)
    }

    /// As [`World::new`], with disks of this length.
    pub(super) fn sized(seed: u64, len: u64) -> Self {
        let world = Self::on(Sim::new(seed, SimConfig::calm()));
        world.sim.put_file("/source", &pattern(seed, len));
        world.sim.put_file("/target", &vec![0xee; len as usize]);
        world
    }

    pub(super) async fn open(&self, name: &str) -> NodeRef {
        self.try_open(&format!(
            "driver=raw,node-name={name},file.driver=file,file.filename=/{name}"
        ))
        .await
        .unwrap()
    }

    pub(super) async fn try_open(&self, options: &str) -> Result<NodeRef> {
        self.graph.open(Options::parse(options).unwrap()).await
    }

    /// Prepares a job with few requests in flight.
    pub(super) async fn prepare(
        &self,
        kind: Kind,
        (source, target): (&NodeRef, &NodeRef),
        (record, manifest): (Option<RecordOptions>, Option<ManifestOptions>),
    ) -> Result<Box<dyn JobDriver>> {
        Ok(match kind {
            Kind::Backup => {
                let mut options = BackupOptions::new(source, target, "job0");
                (options.max_workers, options.max_chunk) = (2, CHUNK as i64);
                (options.record, options.manifest) = (record, manifest);
                Box::new(Backup::prepare(options).await?)
            }
            Kind::Mirror | Kind::SyncedMirror => {
                let mut options = MirrorOptions::new(source, target, "job0");
                options.buf_size = 2 * CHUNK;
                if kind == Kind::SyncedMirror {
                    options.copy_mode = CopyMode::WriteBlocking;
                }
                (options.record, options.manifest) = (record, manifest);
                Box::new(Mirror::prepare(options).await?)
            }
        })
    }

    /// As [`World::prepare`], started.
    pub(super) async fn start(
        &self,
        kind: Kind,
        sides: (&NodeRef, &NodeRef),
        record: RecordOptions,
    ) -> JobHandle {
        self.start_with(kind, sides, (Some(record), None)).await
    }

    pub(super) async fn start_with(
        &self,
        kind: Kind,
        sides: (&NodeRef, &NodeRef),
        tracked: (Option<RecordOptions>, Option<ManifestOptions>),
    ) -> JobHandle {
        let driver = self.prepare(kind, sides, tracked).await.unwrap();
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("job0") };
        self.jobs.start(options, driver).await.unwrap()
    }

    /// The target, as a node that counts what is written.
    pub(super) async fn metered(&self) -> (NodeRef, Arc<Meter>) {
        self.metered_as("target").await
    }

    /// An image, as a node that counts what is read and written.
    pub(super) async fn metered_as(&self, name: &str) -> (NodeRef, Arc<Meter>) {
        let meter = Meter::new(&self.sim, &format!("/{name}"));
        let driver = Arc::new(MeteredType(Arc::clone(&meter)));
        let options = Options::new().with("node-name", name);
        (self.graph.open_driver(driver, options).await.unwrap(), meter)
    }

    pub(super) fn end(self) {
        self.sim.block_on(self.graph.shutdown()).check_leaks().expect("no leaks");
    }
}

/// Ends a job that copies: waits for a backup, cancels a mirror without force once it is ready.
pub(super) async fn finish(kind: Kind, job: &JobHandle) -> Result<()> {
    if kind != Kind::Backup {
        job.wait_status(bds_jobs::JobStatus::Ready).await?;
        job.cancel(false)?;
    }
    job.wait().await
}

/// Waits until this many bytes were written to the target.
pub(super) async fn wait_written(meter: &Meter, bytes: u64) {
    while meter.written() < bytes {
        bds_io::sleep(Duration::from_micros(100)).await;
    }
}

/// Runs a job until it has written this many bytes, then takes the power away.
pub(super) fn interrupt(kind: Kind, seed: u64, bytes: u64) -> (Sim, u64) {
    interrupt_in(World::new(seed), kind, bytes)
}

/// As [`interrupt`], in a world of the caller's.
pub(super) fn interrupt_in(world: World, kind: Kind, bytes: u64) -> (Sim, u64) {
    let sim = world.sim.clone();
    let copied = Mutex::new(0);
    let run = async {
        let source = world.open("source").await;
        let (target, meter) = world.metered().await;
        let _job = world.start(kind, (&source, &target), record()).await;
        wait_written(&meter, bytes).await;
        *copied.lock().unwrap() = meter.written();
        sim.power_cut();
        std::future::pending::<()>().await;
    };
    assert!(sim.run_until_cut(run).is_none());
    let copied = *copied.lock().unwrap();
    (sim.after_cut(sim.seed()), copied)
}

/// The usual record, brought up to date often.
pub(super) fn record() -> RecordOptions {
    RecordOptions {
        interval_bytes: CHUNK,
        interval: Duration::from_millis(50),
        ..RecordOptions::new(RECORD)
    }
}

pub(super) fn writer(node: &NodeRef) -> Backend {
    let options = BackendOptions { name: "guest".into(), writable: true, ..Default::default() };
    Backend::new(node, options).unwrap()
}

pub(super) async fn write(backend: &Backend, offset: u64, bytes: &[u8]) {
    backend.write(offset, Buf::from_slice(bytes).iov(), WriteFlags::empty()).await.unwrap();
}

pub(super) async fn content(node: &NodeRef) -> Vec<u8> {
    let reader = Backend::new(node, BackendOptions::default()).unwrap();
    let iov = Buf::zeroed(reader.len() as usize, 4096).iov();
    reader.read(0, iov.clone()).await.unwrap();
    iov.to_vec(0..iov.len())
}

/// The manifest in this file.
pub(super) fn manifest(sim: &Sim, path: &str) -> Manifest {
    Manifest::parse(&sim.snapshot_file(path)).unwrap()
}

/// Compares an image with a manifest.
pub(super) async fn verify(manifest: &Manifest, node: &NodeRef) -> VerifyReport {
    let image = Backend::new(node, BackendOptions::default()).unwrap();
    manifest.verify(&image, |_, _| true).await.unwrap()
}

/// The manifest of these bytes, of which all but `note` and parent are as a job's.
pub(super) async fn manifest_of(graph: &Graph, bytes: &[u8]) -> Manifest {
    let options = format!("driver=mem,size={}", bytes.len());
    let node = graph.open(Options::parse(&options).unwrap()).await.unwrap();
    let image = writer(&node);
    write(&image, 0, bytes).await;
    let builder = ManifestBuilder::new(bytes.len() as u64).unwrap();
    builder.finish(&image, None, "", |_, _| true).await.unwrap()
}

/// What the job has said of its record so far.
pub(super) fn uses(events: &mut JobEvents) -> Vec<(RecordUse, u64)> {
    let all = std::iter::from_fn(|| events.try_next());
    all.filter_map(|event| match event {
        JobEvent::Record { what, bytes, .. } => Some((what, bytes)),
        _ => None,
    })
    .collect()
}
