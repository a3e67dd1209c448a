//! With 5 ms a request, stream and commit copy about as fast as a backup does (scenario 34). The
//! clock is virtual: nothing but the number of requests in flight decides.

use std::path::Path;
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

use super::rig::{backend, graph_on};

const CLUSTER: u64 = 64 << 10;
/// Two lengths of a disk of which every second cluster holds data, so that each request is one
/// cluster: eight or sixteen for each of the 64 that may be in flight. What the longer disk takes
/// more is the time of the copy; headers and flushes cost the same in both.
const LENS: [u64; 2] = [1024 * CLUSTER, 2048 * CLUSTER];
const SEEDS: u64 = 3;

/// An image, filled with data or empty.
async fn image(
    jobs: &JobManager,
    name: &str,
    below: Option<&NodeRef>,
    filled: bool,
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
    if filled {
        let fill: Backend = backend(&node, "fill", true)?;
        let bytes = vec![7; CLUSTER as usize];
        for at in (0..len).step_by(2 * CLUSTER as usize) {
            fill.write(at, Buf::from_slice(&bytes).iov(), Default::default()).await?;
        }
        fill.flush().await?;
    }
    Ok(node)
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Backup,
    Mirror,
    Stream,
    Commit,
}

/// Virtual time of a job that copies half of the disk.
fn duration_of(kind: Kind, len: u64, seed: u64) -> Duration {
    let latency = Duration::from_millis(5);
    let config =
        SimConfig { latency_min: latency, latency_max: latency, trace_len: 0, ..SimConfig::calm() };
    let sim = Sim::new(seed, config);
    sim.block_on(async {
        let jobs = JobManager::new(&graph_on(sim.fs()));
        let is_copy = matches!(kind, Kind::Backup | Kind::Mirror);
        let fills_base = !matches!(kind, Kind::Commit);
        let base = image(&jobs, "base", None, fills_base, len).await.unwrap();
        let device = match is_copy {
            true => base,
            false => {
                let base = base;
                let is_commit = matches!(kind, Kind::Commit);
                let mid = image(&jobs, "mid", Some(&base), is_commit, len).await.unwrap();
                image(&jobs, "top", Some(&mid), false, len).await.unwrap()
            }
        };
        let mut target = None;
        if is_copy {
            target = Some(image(&jobs, "copy", None, false, len).await.unwrap());
        }
        let began = bds_io::now();
        let driver: Box<dyn JobDriver> = match (kind, &target) {
            (Kind::Backup, Some(target)) => {
                let mut options = BackupOptions::new(&device, target, "j");
                options.target_is_zero = true;
                Box::new(Backup::prepare(options).await.unwrap())
            }
            (_, Some(target)) => {
                let mut options = MirrorOptions::new(&device, target, "j");
                options.target_is_zero = true;
                Box::new(Mirror::prepare(options).await.unwrap())
            }
            (Kind::Stream, None) => {
                Stream::prepare("j", StreamOptions::new(&device)).await.unwrap()
            }
            (_, None) => {
                let top = walk::child(&device, "backing").map(|(node, _)| node);
                let options = CommitOptions { top, ..CommitOptions::new(&device) };
                Commit::prepare("j", options).await.unwrap()
            }
        };
        let job = jobs.start(JobOptions::new("j"), driver).await.unwrap();
        if matches!(kind, Kind::Mirror) {
            job.wait_status(JobStatus::Ready).await.unwrap();
            job.complete().unwrap();
        }
        job.wait().await.unwrap();
        let took = bds_io::now() - began;
        drop((device, target));
        jobs.graph().shutdown().await.check_leaks().unwrap();
        took
    })
}

#[test]
fn stream_and_commit_keep_as_many_requests_in_flight_as_a_backup() {
    let time_of = |kind| {
        let of_len = |len| (0..SEEDS).map(|seed| duration_of(kind, len, seed)).sum::<Duration>();
        let [short, long] = LENS.map(of_len);
        long - short
    };
    let backup = time_of(Kind::Backup);
    // Tenths of a backup's throughput, at least. A commit reaches about half of it: known, and to
    // be mended in the copy of a commit.
    for (kind, tenths) in [(Kind::Mirror, 9), (Kind::Stream, 9), (Kind::Commit, 4)] {
        let took = time_of(kind);
        println!("{kind:?}: {took:?}; a backup: {backup:?}");
        assert!(took * tenths <= backup * 10, "{kind:?} takes {took:?}, a backup {backup:?}");
    }
}
