//! Chains with several users: overlays that share an image, jobs side by side, queries meanwhile,
//! a chain of a hundred images.

use std::cell::Cell;
use std::time::Duration;

use bds_core::driver::Precision;
use bds_core::graph::{Graph, NewImage, NodeRef};
use bds_core::{ErrorKind, Options};
use bds_io::sim::{Fault, OpMask};
use bds_io::{Sim, SimConfig};
use bds_jobs::{
    Commit, CommitOptions, JobManager, JobOptions, JobStatus, NewJob, Stream, StreamOptions,
};
use serde_json::json;

use super::kit::{
    Chain, Layer, User, graph_on, names, read_all, reader, run_job, seeds, shape, world, writer,
};

const K: u64 = 1024;

fn layers() -> Vec<Layer> {
    vec![
        Layer::qcow2("base", 100 * K, 4096),
        Layer::qcow2("low", 90 * K, 4096),
        Layer::qcow2("mid", 80 * K, 2048),
        Layer::qcow2("top", 96 * K, 4096),
    ]
}

/// Makes and opens another overlay of an image.
async fn overlay(chain: &Chain, graph: &Graph, name: &str, below: &NodeRef) -> NodeRef {
    let options = json!({"size": 70 * K, "backing_file": below.name(), "backing_fmt": "qcow2"});
    let image = NewImage {
        format: "qcow2".into(),
        path: chain.path(name),
        options: Options::from_json(options).unwrap(),
        skip_backing: true,
    };
    graph.create_image(image).await.unwrap();
    let mut options = chain.by_path(name, name);
    options.set("backing", below.name());
    options.set("read-only", true);
    graph.open(options).await.unwrap()
}

fn commit(nodes: &[NodeRef]) -> CommitOptions {
    CommitOptions { top: Some(nodes[2].clone()), ..CommitOptions::new(&nodes[3]) }
}

#[test]
fn all_overlays_of_the_committed_image_are_rewritten_or_none() {
    for fails in [true, false] {
        let sim = world(21);
        let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), 21));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        sim.block_on(async {
            let mut nodes = chain.open(&graph).await;
            // Its header is written after that of "top".
            let second = overlay(&chain, &graph, "zweiter", &nodes[2]).await;
            let shown = read_all(&reader(&second, "look")).await;
            let before = shape(&graph);
            let job = Commit::prepare("c", commit(&nodes)).await.unwrap();
            let write = Fault::sticky(5).on(OpMask::WRITE).in_path("zweiter");
            if fails {
                sim.fail_nth(0, write);
            }
            let result = run_job(&jobs, "c", job).await;
            sim.clear_faults();
            if fails {
                let error = result.unwrap_err();
                assert!(error.to_string().contains("image 'zweiter'"), "{error}");
                assert_eq!(shape(&graph), before);
            } else {
                result.unwrap();
                nodes.drain(1..3);
            }
            for (node, view) in [(graph.find("top").unwrap(), &chain.views[3]), (second, &shown)] {
                assert!(read_all(&reader(&node, "look")).await == *view, "{}", node.name());
            }
            drop(nodes);
            graph.shutdown().await.check_leaks().unwrap();
            let expected = if fails { "mid" } else { "base" };
            for (name, view) in [("top", &chain.views[3]), ("zweiter", &shown)] {
                let (found, recorded) = chain.found(sim.fs(), name).await;
                assert!(found == *view && recorded.as_deref() == Some(expected), "{name}");
            }
        });
    }
}

#[test]
fn a_base_with_another_overlay_is_not_committed_into() {
    for shared in [0, 1] {
        let sim = world(22);
        let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), 22));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        sim.block_on(async {
            let nodes = chain.open(&graph).await;
            let other = overlay(&chain, &graph, "other", &nodes[shared]).await;
            let error = Commit::prepare("c", commit(&nodes)).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InUse);
            let text = error.to_string();
            let image = nodes[shared].name();
            assert!(
                text.contains(&format!("node '{image}'")) && text.contains("'other'"),
                "{text}"
            );
            let forced = CommitOptions { force: true, ..commit(&nodes) };
            let job = Commit::prepare("c", forced).await.unwrap();
            run_job(&jobs, "c", job).await.unwrap();
            drop(other);
            let job = Commit::prepare("late", CommitOptions::new(&nodes[1])).await;
            drop(job);
        });
    }
}

#[test]
fn a_base_takes_no_new_overlay_while_it_is_committed_into() {
    let sim = world(23);
    let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), 23));
    let graph = graph_on(sim.fs());
    sim.block_on(async {
        let nodes = chain.open(&graph).await;
        let job = Commit::prepare("c", commit(&nodes)).await.unwrap();
        let mut options = chain.by_path("low", "again");
        options.set("backing", "base");
        options.set("read-only", true);
        let overlay = graph.open(options).await.unwrap();
        let error = bds_core::request::Backend::new(&overlay, Default::default()).unwrap_err();
        assert!(error.to_string().contains("job 'c'"), "{error}");
        let options = bds_core::request::BackendOptions { writable: true, ..Default::default() };
        assert!(bds_core::request::Backend::new(&nodes[2], options).is_err(), "nor top a writer");
        drop((job, overlay));
    });
    sim.run_until_idle();
}

#[test]
fn jobs_on_disjoint_parts_of_a_chain_run_side_by_side() {
    for seed in seeds(12) {
        let sim = world(seed);
        let chain = sim.block_on(Chain::new(&six()).make(sim.fs(), seed));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        let model = chain.model();
        sim.block_on(async {
            let nodes = chain.open(&graph).await;
            let disk = writer(&nodes[5], "user");
            let user = User { disk: &disk, model: &model };
            let options =
                StreamOptions { bottom: Some(nodes[3].clone()), ..StreamOptions::new(&nodes[5]) };
            let stream = Stream::prepare("s", options).await.unwrap();
            let options =
                CommitOptions { top: Some(nodes[2].clone()), ..CommitOptions::new(&nodes[5]) };
            let committing = Commit::prepare("c", options).await.unwrap();
            let overlapping = CommitOptions {
                top: Some(nodes[4].clone()),
                base: Some(nodes[2].clone()),
                ..CommitOptions::new(&nodes[5])
            };
            let error = Commit::prepare("x", overlapping).await.err().unwrap().to_string();
            assert!(error.contains("node 'd'") && error.contains("job 's'"), "{error}");
            drop(nodes);
            let workload = chain.workload(seed, 12);
            let (played, streamed, committed) = futures_util::future::join3(
                user.play(&workload),
                run_job(&jobs, "s", stream),
                run_job(&jobs, "c", committing),
            )
            .await;
            played.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
            streamed.unwrap();
            committed.unwrap();
            assert_eq!(names(&disk), ["top", "base"], "seed {seed}");
            user.compare().await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            let expected = read_all(&disk).await;
            disk.flush().await.unwrap();
            drop(disk);
            graph.shutdown().await.check_leaks().unwrap();
            let (found, recorded) = chain.found(sim.fs(), "top").await;
            assert!(found == expected && recorded.as_deref() == Some("base"), "seed {seed}");
        });
    }
}

/// Two jobs whose ends move the same link run one after the other if they are started alone. In one
/// group each would wait for the other: it is refused before it begins, with both named.
#[test]
fn jobs_of_a_group_that_end_at_one_link_are_refused_at_once() {
    for is_stream_first in [true, false] {
        let sim = world(25);
        let chain = sim.block_on(Chain::new(&six()).make(sim.fs(), 25));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        sim.block_on(async {
            let nodes = chain.open(&graph).await;
            let before = shape(&graph);
            let group = group(&nodes, 3, is_stream_first).await;
            let begun = bds_io::now();
            let error = jobs.start_group(group).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse);
            let text = error.to_string();
            assert!(
                ["node 'c'", "'s'", "'c'", "of one group"].iter().all(|part| text.contains(part)),
                "{text}"
            );
            assert!(bds_io::now() - begun < Duration::from_secs(1));
            assert_eq!(shape(&graph), before);
            // Apart from each other they do not wait.
            let members = self::group(&nodes, 4, is_stream_first).await;
            let handles = jobs.start_group(members).await.unwrap();
            let disk = reader(&nodes[5], "look");
            drop(nodes);
            for handle in handles {
                handle.wait().await.unwrap();
            }
            assert_eq!(names(&disk), ["top", "c", "base"]);
            assert!(read_all(&disk).await == chain.views[5]);
        });
    }
}

/// As above, where the link came to be shared while the group was pending: it fails at its plan,
/// and does not wait for itself.
#[test]
fn a_link_that_a_group_comes_to_share_fails_it_at_once() {
    for is_stream_first in [true, false] {
        let sim = world(26);
        let chain = sim.block_on(Chain::new(&six()).make(sim.fs(), 26));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        sim.block_on(async {
            let nodes = chain.open(&graph).await;
            let mut group = group(&nodes, 4, is_stream_first).await;
            group[0].0.auto_finalize = false;
            let handles = jobs.start_group(group).await.unwrap();
            handles[0].wait_status(JobStatus::Pending).await.unwrap();
            // The stream's lowest image becomes an overlay of what is committed, as "c" is.
            let links = nodes[3].edges_below();
            let above = links.iter().find(|link| link.name == "backing").unwrap().child;
            let above = graph.acquire(above).unwrap();
            graph.set_backing(&nodes[4], Some(&above)).await.unwrap();
            let begun = bds_io::now();
            handles[0].finalize().unwrap();
            let mut texts = Vec::new();
            for handle in handles {
                texts.push(handle.wait().await.unwrap_err().to_string());
            }
            assert!(bds_io::now() - begun < Duration::from_secs(1));
            let refusals = texts.iter().filter(|text| {
                text.contains("jobs '") && text.contains("of one group") && text.contains("'d'")
            });
            assert_eq!(refusals.count(), 1, "{texts:?}");
        });
    }
}

fn six() -> [Layer; 6] {
    [
        Layer::qcow2("base", 100 * K, 4096),
        Layer::qcow2("a", 90 * K, 2048),
        Layer::qcow2("b", 100 * K, 4096),
        Layer::qcow2("c", 80 * K, 2048),
        Layer::qcow2("d", 90 * K, 4096),
        Layer::qcow2("top", 96 * K, 4096),
    ]
}

/// A stream of the images down to number `bottom`, and a commit of "b" and what is below it.
async fn group(nodes: &[NodeRef], bottom: usize, is_stream_first: bool) -> Vec<NewJob> {
    let options =
        StreamOptions { bottom: Some(nodes[bottom].clone()), ..StreamOptions::new(&nodes[5]) };
    let stream = Stream::prepare("s", options).await.unwrap();
    let options = CommitOptions { top: Some(nodes[2].clone()), ..CommitOptions::new(&nodes[5]) };
    let commit = Commit::prepare("c", options).await.unwrap();
    let mut group = vec![(JobOptions::new("s"), stream), (JobOptions::new("c"), commit)];
    if !is_stream_first {
        group.reverse();
    }
    group
}

/// A stream into an image in the middle, which is read-only and has an overlay that is written to.
#[test]
fn queries_are_answered_while_a_stream_into_the_middle_ends() {
    for seed in seeds(6) {
        let sim = world(seed);
        let chain = sim.block_on(Chain::new(&layers()).make(sim.fs(), seed));
        let graph = graph_on(sim.fs());
        let jobs = JobManager::new(&graph);
        let model = chain.model();
        sim.block_on(async {
            let mut nodes = chain.open(&graph).await;
            let disk = writer(&nodes[3], "user");
            let user = User { disk: &disk, model: &model };
            let job = Stream::prepare("s", StreamOptions::new(&nodes[2])).await.unwrap();
            nodes.drain(..2);
            let ended = Cell::new(false);
            let mut queries = 0;
            let query = async {
                while !ended.get() {
                    assert!(graph.dump().contains("top qcow2"));
                    assert!(graph.query_graph()["nodes"].is_array());
                    assert!(graph.dot().starts_with("digraph"));
                    let run = disk.block_status(0, 96 * K, Precision::Exact).await.unwrap();
                    assert!(run.len > 0);
                    assert!(!jobs.query().is_empty() || jobs.history().last("s").is_some());
                    queries += 1;
                    bds_io::sleep(Duration::from_micros(30)).await;
                }
            };
            let workload = chain.workload(seed, 10);
            let work = async {
                run_job(&jobs, "s", job).await.unwrap();
                ended.set(true);
            };
            let (played, (), ()) =
                futures_util::future::join3(user.play(&workload), work, query).await;
            played.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
            assert!(queries > 20, "{queries}");
            assert_eq!(names(&disk), ["top", "mid"]);
            assert!(!nodes[0].could_write(), "it is read-only again");
            user.compare().await.unwrap();
        });
    }
}

#[test]
fn a_chain_of_a_hundred_overlays_is_compacted() {
    let names_of: Vec<&'static str> =
        (0..100).map(|n| &*Box::leak(format!("i{n:03}").into_boxed_str())).collect();
    let layers: Vec<Layer> =
        names_of.iter().map(|name| Layer::qcow2(name, 256 * K, 4096)).collect();
    let sim = Sim::new(5, SimConfig::calm());
    let chain = sim.block_on(Chain::new(&layers).make(sim.fs(), 5));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    sim.block_on(async {
        let nodes = chain.open(&graph).await;
        let options = CommitOptions {
            top: Some(nodes[50].clone()),
            base: Some(nodes[1].clone()),
            ..CommitOptions::new(&nodes[99])
        };
        let job = Commit::prepare("c", options).await.unwrap();
        run_job(&jobs, "c", job).await.unwrap();
        let disk = writer(&nodes[99], "user");
        assert_eq!(names(&disk).len(), 51);
        assert!(read_all(&disk).await == chain.views[99]);
        let job = Stream::prepare("s", StreamOptions::new(&nodes[99])).await.unwrap();
        run_job(&jobs, "s", job).await.unwrap();
        assert_eq!(names(&disk), ["i099"]);
        assert!(read_all(&disk).await == chain.views[99]);
    });
}

/// With 5 ms a request, one at a time would take two of them for each 512 KiB.
#[test]
fn requests_with_latency_run_side_by_side() {
    let latency = Duration::from_millis(5);
    let config = SimConfig {
        latency_min: latency,
        latency_max: latency,
        trace_len: 600,
        ..SimConfig::calm()
    };
    let sim = Sim::new(6, config);
    let mib = 1024 * K;
    let layers = [
        Layer::raw("base", 32 * mib),
        Layer::qcow2("mid", 32 * mib, 65536),
        Layer::qcow2("top", 32 * mib, 65536),
    ];
    let chain = sim.block_on(Chain::new(&layers).make(sim.fs(), 6));
    let graph = graph_on(sim.fs());
    let jobs = JobManager::new(&graph);
    sim.block_on(async {
        let fill = graph.open(chain.by_path("base", "fill")).await.unwrap();
        let all = writer(&fill, "fill");
        for at in (0..32 * mib).step_by(usize::try_from(mib).unwrap()) {
            let bytes = bds_testkit::pattern(9, at, usize::try_from(mib).unwrap());
            all.write(at, bds_io::Buf::from_slice(&bytes).iov(), Default::default()).await.unwrap();
        }
        drop((all, fill));
        graph.reap().await;
        let nodes = chain.open(&graph).await;
        let began = bds_io::now();
        let job = Stream::prepare("s", StreamOptions::new(&nodes[2])).await.unwrap();
        run_job(&jobs, "s", job).await.unwrap();
        let took = bds_io::now() - began;
        // One request in sixteen takes sixteen times as long.
        let serial = latency * 2 * 2 * 64;
        assert!(took * 3 < serial, "{took:?} instead of a third of {serial:?}");
    });
}
