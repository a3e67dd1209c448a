//! A world with disks, guests that write in order, and backups.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::{WriteFlags, ZeroFlags};
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{Options, Result};
use bds_io::{Buf, Fs, Sim, SimConfig, Task};
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::{JobHandle, JobManager, JobOptions};

use super::disk::{Control, ControlledType};

/// Length of the disks: no multiple of a cluster.
pub(super) const LEN: u64 = 12 * (64 << 10) + 1536;

/// A graph on a simulated disk, and its jobs.
pub(super) struct World {
    pub(super) jobs: JobManager,
    /// Where images are; empty on a simulated disk.
    dir: PathBuf,
}

impl World {
    pub(super) fn on(sim: &Sim) -> Self {
        Self::in_dir(sim.fs(), PathBuf::new())
    }

    pub(super) fn in_dir(fs: Fs, dir: PathBuf) -> Self {
        let mut config = GraphConfig::new(Arc::new(bds_drivers::registry()));
        config.fs = fs;
        config.gate = Arc::new(bds_core::graph::reference_gate::TrustAll { may_probe: false });
        Self { jobs: JobManager::new(&Graph::new(config)), dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn graph(&self) -> &Graph {
        self.jobs.graph()
    }

    /// A new image: `qcow2`, `qcow2-2m`, `raw`, or a disk in memory without a name on the disk.
    pub(super) async fn make(&self, name: &str, kind: &str) -> NodeRef {
        self.make_on(name, kind, None).await
    }

    /// As [`World::make`], on a backing image.
    pub(super) async fn make_on(&self, name: &str, kind: &str, backing: Option<&str>) -> NodeRef {
        let format = if kind.starts_with("qcow2") { "qcow2" } else { kind };
        if format != "mem" {
            let mut options = Options::new().with("size", LEN);
            if kind == "qcow2-2m" {
                options = options.with("cluster_size", 2 << 20);
            }
            if let Some(backing) = backing {
                options = options.with("backing_file", backing).with("backing_fmt", "qcow2");
            }
            let path = self.path(name);
            let image = NewImage { format: format.into(), path, options, skip_backing: true };
            self.graph().create_image(image).await.unwrap();
        }
        self.open(name, kind, backing).await
    }

    pub(super) async fn open(&self, name: &str, kind: &str, backing: Option<&str>) -> NodeRef {
        let format = if kind.starts_with("qcow2") { "qcow2" } else { kind };
        let mut text = match format {
            "mem" => format!("driver=mem,size={LEN},node-name={name},discard=unmap"),
            _ => format!(
                "driver={format},node-name={name},discard=unmap,file.driver=file,\
                 file.filename={},file.discard=unmap",
                self.path(name).display()
            ),
        };
        if let Some(backing) = backing {
            text += &format!(",backing={backing}");
        }
        self.graph().open(Options::parse(&text).unwrap()).await.unwrap()
    }

    /// A disk that the test controls.
    pub(super) async fn controlled(&self, name: &str) -> (NodeRef, Arc<Control>) {
        let control = Control::new(vec![0; LEN as usize]);
        let options = Options::new().with("node-name", name);
        let driver = Arc::new(ControlledType(control.clone()));
        (self.graph().open_driver(driver, options).await.unwrap(), control)
    }

    /// Prepares a backup and starts it.
    pub(super) async fn start(&self, options: BackupOptions) -> JobHandle {
        let job = kept(&options.job);
        self.start_with(options, job).await
    }

    pub(super) async fn start_with(&self, options: BackupOptions, job: JobOptions) -> JobHandle {
        let backup = Backup::prepare(options).await.unwrap();
        self.jobs.start(job, Box::new(backup)).await.unwrap()
    }
}

/// Options of a job that stays until it is dismissed.
pub(super) fn kept(id: &str) -> JobOptions {
    JobOptions { auto_dismiss: false, ..JobOptions::new(id) }
}

pub(super) fn user(node: &NodeRef, writable: bool) -> Backend {
    Backend::new(node, BackendOptions { name: "user".into(), writable, ..Default::default() })
        .unwrap()
}

/// All bytes of a node.
pub(super) async fn content(node: &NodeRef) -> Vec<u8> {
    let buf = Buf::zeroed(LEN as usize, 512);
    user(node, false).read(0, buf.iov()).await.unwrap();
    buf.iov().to_vec(0..LEN as usize)
}

/// Nodes, edges and permissions in text, without lengths of files and holders of nodes.
pub(super) fn shape(graph: &Graph) -> Vec<String> {
    let dump = graph.dump();
    let lines = dump.lines().filter(|line| !line.contains("held by"));
    let start = |line: &str| line.split(" len=").next().unwrap_or_default().to_owned();
    lines.map(start).collect()
}

/// A change that a guest made.
#[derive(Clone, Debug)]
struct Step {
    range: std::ops::Range<usize>,
    byte: u8,
}

/// Writes one request after the other, and remembers each.
pub(super) struct Writer {
    pub(super) disk: Backend,
    start: Vec<u8>,
    steps: Mutex<Vec<Step>>,
    completed: AtomicUsize,
    stop: AtomicBool,
    /// Discards before some of the writes.
    pub(super) discards: AtomicBool,
}

impl Writer {
    pub(super) async fn new(node: &NodeRef) -> Arc<Self> {
        Arc::new(Self {
            disk: user(node, true),
            start: content(node).await,
            steps: Mutex::default(),
            completed: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            discards: AtomicBool::new(false),
        })
    }

    /// Writes at random until [`Writer::stop`], or this many requests.
    pub(super) fn run(self: &Arc<Self>, seed: u64, count: usize) -> Task<()> {
        let this = self.clone();
        bds_io::spawn(async move {
            let mut rng = super::Chance::new(seed);
            for _ in 0..count {
                if this.stop.load(Ordering::SeqCst) {
                    return;
                }
                this.step(&mut rng).await.unwrap();
                if rng.one_in(4) {
                    bds_io::sleep(Duration::from_micros(rng.below(300))).await;
                }
            }
        })
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// One random write or zero write.
    pub(super) async fn step(&self, rng: &mut super::Chance) -> Result<()> {
        let offset = rng.below(LEN / 512) * 512;
        let len = ((1 + rng.below(200)) * 512).min(LEN - offset);
        let byte = if rng.one_in(5) { 0 } else { 1 + rng.below(255) as u8 };
        let range = offset as usize..(offset + len) as usize;
        self.steps.lock().unwrap().push(Step { range, byte });
        if self.discards.load(Ordering::SeqCst) && rng.one_in(3) {
            self.disk.discard(offset, len).await?;
        }
        if byte == 0 {
            let _done = self.disk.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await?;
        } else {
            let data = Buf::from_slice(&vec![byte; len as usize]);
            self.disk.write(offset, data.iov(), WriteFlags::empty()).await?;
        }
        self.completed.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Requests that were begun.
    pub(super) fn begun(&self) -> usize {
        self.steps.lock().unwrap().len()
    }

    pub(super) fn completed(&self) -> usize {
        self.completed.load(Ordering::SeqCst)
    }

    /// What the disk held after this many requests.
    pub(super) fn state(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.start.clone();
        for step in &self.steps.lock().unwrap()[..count] {
            bytes[step.range.clone()].fill(step.byte);
        }
        bytes
    }

    /// Which of the states between two moments the bytes are.
    pub(super) fn find(&self, bytes: &[u8], between: std::ops::RangeInclusive<usize>) -> usize {
        let found = between.clone().find(|count| self.state(*count) == bytes);
        found.unwrap_or_else(|| panic!("it is none of the states {between:?}"))
    }
}

/// Runs a test in a calm world, then all that is left, and checks that nothing was left behind.
pub(super) fn run<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(World) -> F) {
    let sim = Sim::new(seed, SimConfig::calm());
    let world = World::on(&sim);
    let graph = world.graph().clone();
    sim.block_on(test(world));
    sim.run_until_idle();
    sim.block_on(async { graph.shutdown().await.check_leaks() }).expect("no leak");
}
