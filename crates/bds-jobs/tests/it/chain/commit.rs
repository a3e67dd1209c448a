//! The job `commit`: what it writes, what is left of the chain, what it refuses.

use std::sync::Arc;

use bds_core::Options;
use bds_core::driver::{Precision, StatusFlags};
use bds_core::graph::{Graph, NodeRef};
use bds_core::request::Backend;
use bds_io::Sim;
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions};
use bds_jobs::{Commit, CommitOptions, JobDriver, JobManager, JobOptions, JobStatus};

use super::kit::{
    Chain, Layer, User, graph_on, names, read_all, reader, run_job, seeds, world, writer,
};
use crate::meter::{Meter, MeteredType};

const K: u64 = 1024;

fn layers() -> Vec<Layer> {
    vec![
        Layer::raw("base", 150 * K + 512),
        Layer::qcow2("low", 200 * K, 4096),
        Layer::qcow2("mid", 120 * K, 2048),
        Layer::qcow2("top", 256 * K, 4096),
    ]
}

/// The base longer than what is above it, and then shorter; other kinds of clusters.
fn others() -> Vec<Layer> {
    vec![
        Layer { version: 2, ..Layer::qcow2("base", 300 * K, 512) },
        Layer { extended: true, ..Layer::qcow2("low", 180 * K + 512, 16384) },
        Layer { version: 2, ..Layer::qcow2("mid", 256 * K, 4096) },
        Layer { extended: true, ..Layer::qcow2("top", 320 * K, 16384) },
    ]
}

/// Commits `mid` and what is below it into the image `into` under a guest's load.
fn check(layers: &[Layer], into: usize, seed: u64) {
    let sim = world(seed);
    let chain = sim.block_on(Chain::new(layers).make(sim.fs(), seed));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    let model = chain.model();
    sim.block_on(async {
        let mut nodes = chain.open(&graph).await;
        let disk = writer(&nodes[3], "guest");
        let guest = User { disk: &disk, model: &model };
        let base = nodes[into].clone();
        let options = CommitOptions {
            top: Some(nodes[2].clone()),
            base: Some(base.clone()),
            ..CommitOptions::new(&nodes[3])
        };
        assert!(!options.is_active() && CommitOptions::new(&nodes[3]).is_active());
        nodes.truncate(into + 1);
        let job = Commit::prepare("c", options).await.unwrap();
        let workload = chain.workload(seed, 20);
        let (played, done) =
            futures_util::future::join(guest.play(&workload), run_job(&jobs, "c", job)).await;
        played.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
        done.unwrap();
        guest.compare().await.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
        let mut left = vec!["top".to_owned()];
        left.extend(layers[..=into].iter().rev().map(|l| l.name.to_owned()));
        assert_eq!(names(&disk), left, "seed {seed}");
        assert!(!base.could_write(), "it is read-only again");
        let expected = read_all(&disk).await;
        disk.flush().await.unwrap();
        drop((disk, nodes, base));
        graph.shutdown().await.check_leaks().unwrap();
        let (found, recorded) = chain.found(sim.fs(), "top").await;
        assert!(found == expected, "seed {seed}: another disk behind the header");
        assert_eq!(recorded.as_deref(), Some(layers[into].name), "seed {seed}");
    });
}

#[test]
fn images_are_committed_under_load() {
    for seed in seeds(10) {
        for into in 0..2 {
            check(&layers(), into, seed);
            check(&others(), into, seed);
        }
    }
}

/// Opens a chain whose base counts what is written to it. `filter` lies above the base.
async fn open_metered(
    sim: &Sim,
    graph: &Graph,
    chain: &Chain,
    filter: bool,
) -> (Vec<NodeRef>, Arc<Meter>) {
    let meter = Meter::new(sim, chain.path("base").to_str().unwrap());
    let metered = Arc::new(MeteredType(Arc::clone(&meter)));
    let file = graph.open_driver(metered, Options::new().with("node-name", "file")).await.unwrap();
    let base = Options::parse("driver=raw,node-name=base,read-only=on,file=file").unwrap();
    let mut nodes = vec![graph.open(base).await.unwrap()];
    drop(file);
    let mut below = "base";
    let filter = match filter {
        true => {
            let options =
                Options::parse("driver=throttle,limits.bps-total=1T,node-name=filter,file=base")
                    .unwrap();
            below = "filter";
            Some(graph.open(options.with("read-only", true)).await.unwrap())
        }
        false => None,
    };
    for layer in &chain.layers[1..] {
        let options = chain.by_path(layer.name, layer.name).with("backing", below);
        nodes.push(graph.open(options.with("read-only", layer.name != "top")).await.unwrap());
        below = layer.name;
    }
    drop(filter);
    (nodes, meter)
}

/// Bytes that the layers above the base hold.
async fn held_above(top: &Backend, base: &NodeRef) -> u64 {
    let (mut at, mut held) = (0, 0);
    while at < top.len() {
        let run = top.status_above(base.id(), at, top.len() - at, Precision::Exact).await.unwrap();
        held += run.len * u64::from(run.flags.contains(StatusFlags::ALLOCATED));
        at += run.len;
    }
    held
}

/// The base's own bytes are not written to it again, whatever filters lie in between: the job's
/// own, and a user's.
#[test]
fn a_commit_writes_only_what_the_images_above_hold() {
    let layers = [
        Layer::raw("base", 256 * K),
        Layer::qcow2("low", 256 * K, 4096),
        Layer::qcow2("mid", 256 * K, 4096),
        Layer::qcow2("top", 256 * K, 4096),
    ];
    for (is_active, has_filter) in [(false, false), (false, true), (true, false), (true, true)] {
        let sim = world(7);
        let chain = sim.block_on(Chain::new(&layers).make(sim.fs(), 7));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        sim.block_on(async {
            let (nodes, meter) = open_metered(&sim, &graph, &chain, has_filter).await;
            let top = reader(&nodes[if is_active { 3 } else { 2 }], "status");
            let held = held_above(&top, &nodes[0]).await;
            assert!(held > 0 && held < 256 * K, "{held}");
            drop(top);
            let (base, mid) = (Some(nodes[0].clone()), Some(nodes[2].clone()));
            let job: Box<dyn JobDriver> = if is_active {
                let granularity = Some(4096);
                let of_top = ActiveCommitOptions::new(&nodes[3], "c");
                let options = ActiveCommitOptions { base, granularity, ..of_top };
                Box::new(ActiveCommit::prepare(options).await.unwrap())
            } else {
                let options = CommitOptions { base, top: mid, ..CommitOptions::new(&nodes[3]) };
                Commit::prepare("c", options).await.unwrap()
            };
            let options = JobOptions { auto_dismiss: true, ..JobOptions::new("c") };
            let job = jobs.start(options, job).await.unwrap();
            if is_active {
                job.wait_status(JobStatus::Ready).await.unwrap();
                job.complete().unwrap();
            }
            job.wait().await.unwrap();
            let context = format!("active: {is_active}, filter: {has_filter}");
            assert_eq!(meter.written(), held, "{context}");
            drop((nodes, job));
        });
        drop(jobs);
        sim.block_on(graph.shutdown()).check_leaks().unwrap();
    }
}

#[test]
fn wrong_options_are_refused_with_qemus_words() {
    let sim = world(1);
    let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), 1));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    sim.block_on(async {
        let nodes = chain.open(&graph).await;
        let (base, low, mid, top) = (&nodes[0], &nodes[1], &nodes[2], &nodes[3]);
        let to = |device| CommitOptions::new(device);
        let before = graph.dump();
        let (some_top, some_mid) = (Some(top.clone()), Some(mid.clone()));
        let cases = [
            (CommitOptions { top: some_top, ..to(mid) }, "'top' is not in this backing file chain"),
            (
                CommitOptions { base: Some(mid.clone()), top: some_mid.clone(), ..to(top) },
                "cannot commit an image into itself",
            ),
            (
                CommitOptions { base: some_mid, top: Some(low.clone()), ..to(top) },
                "'mid' is not in this backing file chain",
            ),
            (to(base), "There is no backimg image"),
        ];
        for (options, words) in cases {
            let error = Commit::prepare("c", options).await.err().expect(words);
            assert_eq!(error.to_string(), words);
        }
        assert_eq!(graph.dump(), before);

        let guest = writer(top, "guest");
        let error = Commit::prepare("c", to(top)).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "node 'top': it has a writer: only an active commit can follow that"
        );
        let options = || CommitOptions { top: Some(mid.clone()), ..to(top) };
        let before = graph.dump();
        let first = Commit::prepare("one", options()).await.unwrap();
        let error = Commit::prepare("two", options()).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "node 'mid': job 'one' works on it: wait for it, or cancel it"
        );
        let error = graph.set_backing(low, None).await.unwrap_err().to_string();
        assert!(error.contains("edge 'low.backing' is frozen by job 'one'"), "{error}");
        let job = jobs.start(JobOptions::new("one"), first).await.unwrap();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert_eq!(graph.dump(), before, "a cancelled job leaves nothing");
        drop(guest);
    });
}
