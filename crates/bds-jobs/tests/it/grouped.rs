//! Jobs of different types in one group, under load: all take effect at once, or none.
//!
//! ```text
//! a   guest ─► old                          mirror to 'new'
//! b   guest ─► b2 ─► b1 ─► b0               commit of b1 into b0
//! c   guest ─► c1 ─► c0                     stream of c0 into c1
//! d   guest ─► d                            backup to 'copy'
//! ```
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is their way to fail")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::Options;
use bds_core::graph::reference_gate::TrustAll;
use bds_core::graph::{Graph, GraphConfig, NewImage, NodeRef, walk};
use bds_core::request::{Backend, BackendOptions};
use bds_io::{Sim, SimConfig};

use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::mirror::{Mirror, MirrorOptions};

use bds_jobs::{
    Commit, CommitOptions, JobDriver, JobHandle, JobManager, JobOptions, JobStatus, Stream,
    StreamOptions,
};
use bds_testkit::{Chance, StampedDisk, Tick};

use crate::fake::{Fake, fails, nothing};
use crate::load::Load;

const LEN: u64 = 128 << 10;

/// The four disks, their guests and what these wrote.
struct Disks {
    jobs: JobManager,
    guests: Vec<Backend>,
    disks: Vec<Arc<StampedDisk>>,
    nodes: Vec<NodeRef>,
    new: NodeRef,
    copy: NodeRef,
    /// When the backup began: between these two.
    began: Mutex<(Tick, Tick)>,
}

fn writer(node: &NodeRef, name: &str) -> Backend {
    let options = BackendOptions { writable: true, ..BackendOptions::registered(name) };
    Backend::new(node, options).unwrap()
}

async fn open(graph: &Graph, options: &str) -> NodeRef {
    graph.open(Options::parse(options).unwrap()).await.unwrap()
}

/// Makes a chain of images; each layer is written through when it is the top.
async fn chain(graph: &Graph, names: &[&str], disk: &Arc<StampedDisk>, seed: u64) -> NodeRef {
    let mut below: Option<NodeRef> = None;
    for (n, name) in names.iter().enumerate() {
        let mut options = format!("size={LEN},cluster_size=4096");
        if n > 0 {
            options += &format!(",backing_file={},backing_fmt=qcow2", names[n - 1]);
        }
        let (format, path) = ("qcow2".to_owned(), name.into());
        let options = Options::parse(&options).unwrap();
        let image = NewImage { format, path, options, skip_backing: true };
        graph.create_image(image).await.unwrap();
        let backing =
            below.as_ref().map_or(String::new(), |below| format!(",backing={}", below.name()));
        let options =
            format!("driver=qcow2,node-name={name},file.driver=file,file.filename={name}{backing}");
        let node = open(graph, &options).await;
        let guest = writer(&node, "fill");
        let mut load = Load::resume(&guest, Arc::clone(disk), seed + n as u64);
        bds_io::sleep(Duration::from_micros(500)).await;
        load.stop().await;
        assert_eq!(load.failures(), 0);
        drop(guest);
        below = Some(node);
    }
    below.unwrap()
}

impl Disks {
    async fn make(sim: &Sim, seed: u64) -> Self {
        let gate = Arc::new(TrustAll { may_probe: false });
        let config = GraphConfig::new(Arc::new(bds_drivers::registry()));
        let graph = Graph::new(GraphConfig { fs: sim.fs(), gate, ..config });
        let disks: Vec<_> = (0..4).map(|n| Arc::new(StampedDisk::new(n, LEN))).collect();
        let old = open(&graph, &format!("driver=mem,node-name=old,size={LEN}")).await;
        let new = open(&graph, &format!("driver=mem,node-name=new,size={LEN}")).await;
        let d = open(&graph, &format!("driver=mem,node-name=d,size={LEN}")).await;
        let copy = open(&graph, &format!("driver=mem,node-name=copy,size={LEN}")).await;
        let b = chain(&graph, &["b0", "b1", "b2"], &disks[1], seed).await;
        let c = chain(&graph, &["c0", "c1"], &disks[2], seed).await;
        let nodes = vec![old, b, c, d];
        let names = ["guest-a", "guest-b", "guest-c", "guest-d"];
        let guests = nodes.iter().zip(names).map(|(node, name)| writer(node, name)).collect();
        let (jobs, began) = (JobManager::new(&graph), Mutex::default());
        Self { jobs, guests, disks, nodes, new, copy, began }
    }

    fn load(&self, seed: u64) -> Vec<Load> {
        let pairs = self.guests.iter().zip(&self.disks);
        pairs.map(|(guest, disk)| Load::resume(guest, Arc::clone(disk), seed)).collect()
    }

    /// Starts the four jobs, and one that fails at its plan if wanted.
    async fn start(&self, fails_at_plan: Option<usize>) -> Vec<JobHandle> {
        let graph = self.jobs.graph();
        let mirror = Mirror::prepare(MirrorOptions::new(&self.nodes[0], &self.new, "a"));
        let top = graph.find("b1").unwrap();
        let commit = CommitOptions { top: Some(top), ..CommitOptions::new(&self.nodes[1]) };
        let from = self.disks[3].now();
        let backup = Backup::prepare(BackupOptions::new(&self.nodes[3], &self.copy, "d")).await;
        *self.began.lock().unwrap() = (from, self.disks[3].now());
        let options = |id| JobOptions { auto_finalize: false, ..JobOptions::new(id) };
        let mut group: Vec<(JobOptions, Box<dyn JobDriver>)> = vec![
            (options("a"), Box::new(mirror.await.unwrap())),
            (options("b"), Commit::prepare("b", commit).await.unwrap()),
            (options("c"), Stream::prepare("c", StreamOptions::new(&self.nodes[2])).await.unwrap()),
            (options("d"), Box::new(backup.unwrap())),
        ];
        if let Some(place) = fails_at_plan {
            let fake = Fake { plan: fails("no plan"), ..Fake::running(nothing()) };
            group.insert(place, (options("fails"), Box::new(fake)));
        }
        self.jobs.start_group(group).await.unwrap()
    }

    /// Backing nodes of the guests' disks, filters left out.
    fn shape(&self) -> Vec<String> {
        let below = |guest: &Backend| {
            let chain = walk::backing_chain(&walk::skip_filters(&guest.node().unwrap()));
            chain.iter().map(|node| node.name().to_owned()).collect::<Vec<_>>().join(" ")
        };
        self.guests.iter().map(below).collect()
    }

    /// Stops the load, checks what all disks show, and shuts down.
    async fn finish(self, mut loads: Vec<Load>) {
        for (load, guest) in loads.iter_mut().zip(&self.guests) {
            load.stop().await;
            assert_eq!(load.failures(), 0, "no guest notices");
            load.verify(guest).await;
        }
        let Self { jobs, guests, nodes, new, copy, .. } = self;
        drop((guests, nodes, new, copy));
        let report = jobs.graph().shutdown().await;
        assert!(report.failed.is_empty(), "{report:?}");
        report.check_leaks().unwrap();
    }
}

/// A dump without lengths of files and numbers of generated names, which the load changes.
fn stable(dump: &str) -> Vec<String> {
    let lines = dump.lines().map(|line| {
        let words = line.split(' ').filter(|word| !word.starts_with("len="));
        let words = words.map(|word| if word.starts_with("#block") { "#block" } else { word });
        words.collect::<Vec<_>>().join(" ")
    });
    let mut lines: Vec<String> = lines.collect();
    lines.sort();
    lines
}

async fn pending(handles: &[JobHandle]) {
    let mirror = handles.iter().find(|job| job.id() == "a").unwrap();
    mirror.wait_status(JobStatus::Ready).await.unwrap();
    mirror.complete().unwrap();
    for job in handles {
        job.wait_status(JobStatus::Pending).await.unwrap();
    }
}

fn world(seed: u64) -> Sim {
    Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() })
}

#[test]
fn jobs_of_four_types_take_effect_together() {
    for seed in 0..3 {
        let sim = world(seed);
        sim.block_on(async {
            let disks = Disks::make(&sim, seed).await;
            let loads = disks.load(seed);
            let handles = disks.start(None).await;
            pending(&handles).await;
            assert_eq!(disks.shape(), ["old", "b2 b1 b0", "c1 c0", "d"], "nothing is visible yet");
            handles[2].finalize().unwrap();
            for job in &handles {
                job.wait().await.unwrap();
            }
            assert_eq!(disks.shape(), ["new", "b2 b0", "c1", "d"]);
            let copy = Backend::new(&disks.copy, BackendOptions::default()).unwrap();
            let began = *disks.began.lock().unwrap();
            loads[3].verify_window(&copy, began).await;
            drop(copy);
            bds_io::sleep(Duration::from_millis(2)).await;
            disks.finish(loads).await;
        });
    }
}

#[test]
fn a_member_that_fails_at_its_plan_leaves_all_disks_as_they_were() {
    for place in 0..4 {
        let sim = world(place as u64);
        sim.block_on(async {
            let disks = Disks::make(&sim, 7).await;
            let before = stable(&disks.jobs.graph().dump());
            let loads = disks.load(7);
            let handles = disks.start(Some(place)).await;
            pending(&handles).await;
            handles[0].finalize().unwrap();
            for job in &handles {
                let error = job.wait().await.unwrap_err().to_string();
                let expected = if job.id() == "fails" { "no plan" } else { "Operation canceled" };
                assert_eq!(error, expected, "{}", job.id());
                assert_eq!(job.info().cleanup_error, None, "{}", job.id());
            }
            assert_eq!(disks.shape(), ["old", "b2 b1 b0", "c1 c0", "d"]);
            assert_eq!(stable(&disks.jobs.graph().dump()), before);
            disks.finish(loads).await;
        });
    }
}

#[test]
fn a_cancel_at_any_time_leaves_all_or_none() {
    let (mut committed, mut aborted) = (0, 0);
    for seed in 0..16 {
        let sim = world(seed);
        sim.block_on(async {
            let disks = Disks::make(&sim, seed).await;
            let before = stable(&disks.jobs.graph().dump());
            let loads = disks.load(seed);
            let mut chance = Chance::new(seed);
            let handles = disks.start(None).await;
            let victim = handles[usize::try_from(chance.below(4)).unwrap()].clone();
            let is_late = chance.one_in(2);
            let when = Duration::from_micros(chance.below(if is_late { 30_000 } else { 5000 }));
            if is_late {
                pending(&handles).await;
                handles[0].finalize().unwrap();
            }
            bds_io::sleep(when).await;
            // It may have ended.
            let _refused = victim.cancel(true);
            if !is_late {
                let _refused = handles[0].complete();
            }
            let mut results = Vec::new();
            for job in &handles {
                results.push(job.wait().await.is_ok());
                assert_eq!(job.info().cleanup_error, None, "{}", job.id());
            }
            if results[0] {
                committed += 1;
                assert_eq!(results, [true; 4]);
                assert_eq!(disks.shape(), ["new", "b2 b0", "c1", "d"]);
            } else {
                aborted += 1;
                assert_eq!(results, [false; 4]);
                assert_eq!(stable(&disks.jobs.graph().dump()), before, "seed {seed}");
            }
            disks.finish(loads).await;
        });
    }
    assert!(committed > 1 && aborted > 1, "both: {committed} and {aborted}");
}
