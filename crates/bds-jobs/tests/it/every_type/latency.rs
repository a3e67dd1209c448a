//! How many requests a job has in flight, and how long they are. With 5 ms a request, stream and
//! commit copy about as fast as a backup does (scenario 34); the clock is virtual, so nothing but
//! the number of requests decides. Beside a guest, requests are short.

use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bds_core::graph::{NewImage, NodeRef, walk};
use bds_core::request::Backend;
use bds_core::{Options, Result};
use bds_io::{Buf, Sim, SimConfig};
use bds_jobs::backup::{Backup, BackupOptions};
use bds_jobs::mirror::{Mirror, MirrorOptions};
use bds_jobs::{
    Commit, CommitOptions, JobDriver, JobManager, JobOptions, JobStatus, Stream, StreamOptions,
};
use futures_util::future::{Either, select};

use super::rig::{backend, graph_on};

const CLUSTER: u64 = 64 << 10;
/// A disk of which every second cluster holds data, so that each request is one cluster: enough of
/// them for the copy to find out how many may be in flight.
const LEN: u64 = 2048 * CLUSTER;
const SEEDS: u64 = 4;

/// An image, empty or with data in every so many clusters.
async fn image(
    jobs: &JobManager,
    name: &str,
    below: Option<&NodeRef>,
    data_each: Option<u64>,
    len: u64,
) -> Result<NodeRef> {
    let mut options = Options::new().with("size", len).with("cluster_size", CLUSTER);
    if let Some(below) = below {
        options = options.with("backing_file", below.name()).with("backing_fmt", "qcow2");
    }
    let path = Path::new("/").join(name);
    let image = NewImage { format: "qcow2".into(), path, options, skip_backing: true };
    jobs.graph().create_image(image).await?;
    let mut text = format!("driver=qcow2,node-name={name},file.driver=file,file.filename=/{name}");
    if let Some(below) = below {
        text += &format!(",backing={}", below.name());
    }
    let node = jobs.graph().open(Options::parse(&text)?).await?;
    if let Some(clusters) = data_each {
        let fill: Backend = backend(&node, "fill", true)?;
        let bytes = vec![7; CLUSTER as usize];
        for at in (0..len).step_by((clusters * CLUSTER) as usize) {
            fill.write(at, Buf::from_slice(&bytes).iov(), Default::default()).await?;
        }
        fill.flush().await?;
    }
    Ok(node)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Backup,
    Mirror,
    Stream,
    Commit,
}

/// The images of a job.
struct Disks {
    /// What a guest uses.
    device: NodeRef,
    target: Option<NodeRef>,
}

impl Disks {
    async fn make(jobs: &JobManager, kind: Kind, data_each: u64, len: u64) -> Result<Self> {
        let data = Some(data_each);
        let base_data = data.filter(|_| kind != Kind::Commit);
        let base = image(jobs, "base", None, base_data, len).await?;
        if matches!(kind, Kind::Backup | Kind::Mirror) {
            let target = image(jobs, "copy", None, None, len).await?;
            return Ok(Self { device: base, target: Some(target) });
        }
        let mid_data = data.filter(|_| kind == Kind::Commit);
        let mid = image(jobs, "mid", Some(&base), mid_data, len).await?;
        Ok(Self { device: image(jobs, "top", Some(&mid), None, len).await?, target: None })
    }

    async fn prepare(&self, kind: Kind) -> Result<Box<dyn JobDriver>> {
        let device = &self.device;
        match (kind, &self.target) {
            (Kind::Backup, Some(target)) => {
                let mut options = BackupOptions::new(device, target, "j");
                options.target_is_zero = true;
                Ok(Box::new(Backup::prepare(options).await?))
            }
            (_, Some(target)) => {
                let mut options = MirrorOptions::new(device, target, "j");
                options.target_is_zero = true;
                Ok(Box::new(Mirror::prepare(options).await?))
            }
            (Kind::Stream, None) => Stream::prepare("j", StreamOptions::new(device)).await,
            (_, None) => {
                let top = walk::child(device, "backing").map(|(node, _)| node);
                let options = CommitOptions { top, ..CommitOptions::new(device) };
                Commit::prepare("j", options).await
            }
        }
    }

    async fn run(&self, jobs: &JobManager, kind: Kind) -> Result<()> {
        let job = jobs.start(JobOptions::new("j"), self.prepare(kind).await?).await?;
        if kind == Kind::Mirror {
            job.wait_status(JobStatus::Ready).await?;
            job.complete()?;
        }
        job.wait().await
    }
}

fn world(latency: Duration, trace_len: usize, seed: u64) -> Sim {
    let config =
        SimConfig { latency_min: latency, latency_max: latency, trace_len, ..SimConfig::calm() };
    Sim::new(seed, config)
}

/// Virtual time of a job that copies half of the disk.
fn duration_of(kind: Kind, seed: u64) -> Duration {
    let sim = world(Duration::from_millis(5), 0, seed);
    sim.block_on(async {
        let jobs = JobManager::new(&graph_on(sim.fs()));
        let disks = Disks::make(&jobs, kind, 2, LEN).await.unwrap();
        let began = bds_io::now();
        disks.run(&jobs, kind).await.unwrap();
        let took = bds_io::now() - began;
        drop(disks);
        jobs.graph().shutdown().await.check_leaks().unwrap();
        took
    })
}

#[test]
fn stream_and_commit_keep_as_many_requests_in_flight_as_a_backup() {
    let time_of = |kind| (0..SEEDS).map(|seed| duration_of(kind, seed)).sum::<Duration>();
    let backup = time_of(Kind::Backup);
    for kind in [Kind::Mirror, Kind::Stream, Kind::Commit] {
        let took = time_of(kind);
        println!("{kind:?}: {took:?}; a backup: {backup:?}");
        // 0.9 of a backup's throughput, at least.
        assert!(took * 9 <= backup * 10, "{kind:?} takes {took:?}, a backup {backup:?}");
    }
}

/// Requests of more than 256 KiB that a job sends, beside a guest that always has a write in
/// flight, or alone.
fn long_requests(kind: Kind, has_guest: bool) -> usize {
    let sim = world(Duration::from_millis(1), 1 << 20, 1);
    sim.block_on(async {
        let jobs = JobManager::new(&graph_on(sim.fs()));
        let disks = Disks::make(&jobs, kind, 1, 16 << 20).await.unwrap();
        let guest = backend(&disks.device, "guest", true).unwrap();
        let before = sim.trace().len();
        let write_on = async {
            let block = Buf::from_slice(&[9; 4096]);
            for at in (0..).map(|n| n * 7 % 4096 * 4096) {
                match has_guest {
                    true => guest.write(at, block.iov(), Default::default()).await.unwrap(),
                    false => std::future::pending().await,
                }
            }
        };
        match select(pin!(disks.run(&jobs, kind)), pin!(write_on)).await {
            Either::Left((done, _)) => done.unwrap(),
            Either::Right(_) => unreachable!("it writes for ever"),
        }
        let trace = sim.trace();
        drop((disks, guest));
        jobs.graph().shutdown().await.check_leaks().unwrap();
        let submitted = trace[before..].iter().filter(|line| line.contains(" submitted "));
        submitted.filter(|line| len_of(line) > 256 << 10).count()
    })
}

/// The bytes of a traced operation: `offset+len` is one of its words.
fn len_of(line: &str) -> u64 {
    let ranges = line.split_whitespace().filter_map(|word| word.split_once('+'));
    ranges.filter_map(|(_, len)| len.parse().ok()).next_back().unwrap_or(0)
}

#[test]
fn beside_a_guest_each_job_keeps_its_requests_short() {
    for kind in [Kind::Backup, Kind::Mirror, Kind::Stream, Kind::Commit] {
        let (alone, beside) = (long_requests(kind, false), long_requests(kind, true));
        assert!(alone >= 16, "{kind:?}: {alone} long requests of a disk of 16 MiB");
        assert!(beside <= 8, "{kind:?}: {beside} long requests beside a guest");
    }
}
