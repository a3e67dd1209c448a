//! The job `stream`: what it copies, what is left of the chain, what it refuses.

use bds_jobs::{JobManager, JobOptions, Stream, StreamOptions};

use super::kit::{Chain, Layer, User, graph_on, names, read_all, run_job, seeds, world, writer};

const K: u64 = 1024;

fn layers() -> Vec<Layer> {
    vec![
        Layer::raw("base", 150 * K + 512),
        Layer::qcow2("low", 200 * K, 4096),
        Layer::qcow2("mid", 120 * K, 2048),
        Layer::qcow2("top", 256 * K, 4096),
    ]
}

/// A chain of other shapes: subclusters, version 2, large clusters above small ones.
fn others() -> Vec<Layer> {
    vec![
        Layer { version: 2, ..Layer::qcow2("base", 300 * K, 512) },
        Layer { extended: true, ..Layer::qcow2("low", 180 * K + 512, 16384) },
        Layer { version: 2, ..Layer::qcow2("mid", 256 * K, 4096) },
        Layer { extended: true, ..Layer::qcow2("top", 280 * K, 16384) },
    ]
}

/// Streams under a guest's load and compares everything that can be seen.
fn check(layers: &[Layer], base: Option<usize>, seed: u64) {
    let sim = world(seed);
    let chain = sim.block_on(Chain::new(layers).make(sim.fs(), seed));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    let model = chain.model();
    let last = layers.len() - 1;
    sim.block_on(async {
        let mut nodes = chain.open(&graph).await;
        let disk = writer(&nodes[last], "guest");
        let guest = User { disk: &disk, model: &model };
        let options = match base {
            None => StreamOptions::new(&nodes[last]),
            Some(n) if seed.is_multiple_of(2) => {
                StreamOptions { base: Some(nodes[n].clone()), ..StreamOptions::new(&nodes[last]) }
            }
            Some(n) => {
                let bottom = Some(nodes[n + 1].clone());
                StreamOptions { bottom, ..StreamOptions::new(&nodes[last]) }
            }
        };
        nodes.truncate(base.map_or(0, |n| n + 1));
        let job = Stream::prepare("s", options).await.unwrap();
        let workload = chain.workload(seed, 20);
        let (played, done) =
            futures_util::future::join(guest.play(&workload), run_job(&jobs, "s", job)).await;
        played.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
        done.unwrap();
        guest.compare().await.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
        let mut left = vec!["top".to_owned()];
        left.extend(layers[..base.map_or(0, |n| n + 1)].iter().rev().map(|l| l.name.to_owned()));
        assert_eq!(names(&disk), left, "seed {seed}");
        let expected = read_all(&disk).await;
        disk.flush().await.unwrap();
        drop((disk, nodes));
        graph.shutdown().await.check_leaks().unwrap();
        let (found, recorded) = chain.found(sim.fs(), "top").await;
        assert!(found == expected, "seed {seed}: another disk behind the header");
        assert_eq!(recorded.as_deref(), base.map(|n| layers[n].name), "seed {seed}");
    });
}

#[test]
fn the_whole_chain_is_copied_under_load() {
    for seed in seeds(12) {
        check(&layers(), None, seed);
        check(&others(), None, seed);
    }
}

#[test]
fn the_images_above_a_base_are_copied_under_load() {
    for seed in seeds(8) {
        for base in 0..2 {
            check(&layers(), Some(base), seed);
            check(&others(), Some(base), seed);
        }
    }
}

#[test]
fn an_image_directly_above_the_base_has_nothing_to_do() {
    check(&layers(), Some(2), 0);
    check(&layers(), Some(2), 1);
}

#[test]
fn wrong_options_are_refused_with_qemus_words() {
    let sim = world(1);
    let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), 1));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    sim.block_on(async {
        let nodes = chain.open(&graph).await;
        let (base, mid, top) = (&nodes[0], &nodes[2], &nodes[3]);
        let filter =
            bds_core::Options::parse("driver=copy-on-read,node-name=cor,file=top").unwrap();
        let filter = graph.open(filter).await.unwrap();
        let before = graph.dump();
        let to = |device| StreamOptions::new(device);
        let cases = [
            (
                StreamOptions { base: Some(base.clone()), bottom: Some(mid.clone()), ..to(top) },
                "'base-node' and 'bottom' cannot be specified at the same time",
            ),
            (
                StreamOptions { base: Some(top.clone()), ..to(mid) },
                "Node 'top' is not a backing image of 'mid'",
            ),
            (
                StreamOptions { bottom: Some(filter.clone()), ..to(top) },
                "Node 'cor' is a filter, use a non-filter node as 'bottom'",
            ),
            (
                StreamOptions { bottom: Some(top.clone()), ..to(mid) },
                "Node 'top' is not in a chain starting from 'mid'",
            ),
            (
                StreamOptions { backing_file: Some("x".into()), ..to(top) },
                "backing file specified, but streaming the entire chain",
            ),
        ];
        for (options, words) in cases {
            let error = Stream::prepare("s", options).await.err().expect(words);
            assert_eq!(error.to_string(), words);
        }
        assert_eq!(graph.dump(), before);
        drop(filter);
        graph.reap().await;

        let before = graph.dump();
        let first = Stream::prepare("one", to(top)).await.unwrap();
        let error = Stream::prepare("two", to(mid)).await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "node 'mid': job 'one' works on it: wait for it, or cancel it"
        );
        let error = graph.set_backing(top, None).await.unwrap_err().to_string();
        assert!(error.contains("edge 'top.backing' is frozen by job 'one'"), "{error}");
        let job = jobs.start(JobOptions::new("one"), first).await.unwrap();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert_eq!(graph.dump(), before, "a cancelled job leaves nothing");
    });
}
