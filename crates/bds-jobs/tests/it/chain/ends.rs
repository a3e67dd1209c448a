//! How jobs end: cancelled at any moment, dropped during the set-up, failing at any operation.

use std::time::Duration;

use bds_core::graph::{Graph, NodeRef};
use bds_core::{ErrorKind, Result};
use bds_io::Sim;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::{
    Commit, CommitOptions, JobDriver, JobManager, JobOptions, OnError, Stream, StreamOptions,
};

use super::kit::{
    Chain, Layer, graph_on, is_full, names, read_all, reader, run_job, shape, world, writer,
};

const K: u64 = 1024;

fn layers() -> Vec<Layer> {
    vec![
        Layer::raw("base", 100 * K),
        Layer::qcow2("low", 90 * K, 4096),
        Layer::qcow2("mid", 80 * K, 2048),
        Layer::qcow2("top", 96 * K, 4096),
    ]
}

async fn prepare(is_stream: bool, nodes: &[NodeRef]) -> Result<Box<dyn JobDriver>> {
    if is_stream {
        let base = Some(nodes[0].clone());
        return Stream::prepare("j", StreamOptions { base, ..StreamOptions::new(&nodes[3]) }).await;
    }
    let top = Some(nodes[2].clone());
    Commit::prepare("j", CommitOptions { top, ..CommitOptions::new(&nodes[3]) }).await
}

/// An open chain with a user of the top.
struct Open {
    sim: Sim,
    graph: Graph,
    nodes: Vec<NodeRef>,
}

fn open(base: &Sim, chain: &Chain, seed: u64) -> Open {
    let sim = base.fork(seed);
    let graph = graph_on(sim.fs());
    let nodes = sim.block_on(chain.open(&graph));
    Open { sim, graph, nodes }
}

/// What the top shows is what it showed, also to a reader that follows the headers.
fn check_content(open: Open, chain: &Chain, what: &str) {
    let Open { sim, graph, nodes } = open;
    sim.block_on(async {
        let disk = reader(&nodes[3], "look");
        assert!(read_all(&disk).await == chain.views[3], "{what}: the disk shows something else");
        drop((disk, nodes));
        graph.shutdown().await.check_leaks().unwrap();
        let (found, _) = chain.found(sim.fs(), "top").await;
        assert!(found == chain.views[3], "{what}: another disk behind the header");
    });
}

#[test]
fn a_job_that_is_cancelled_at_any_moment_leaves_nothing_and_can_be_repeated() {
    for is_stream in [true, false] {
        let base = world(11);
        let chain = base.block_on(Chain::new(&layers()).make(base.fs(), 11));
        let (mut cancelled, mut done) = (0, 0);
        let step = if is_full() { 5 } else { 60 };
        for n in 0.. {
            let open = open(&base, &chain, n);
            let what = format!("stream {is_stream}, cancelled at {n}");
            let jobs = JobManager::new(&open.graph);
            let ended = open.sim.block_on(async {
                let disk = writer(&open.nodes[3], "user");
                let before = shape(&open.graph);
                let job = prepare(is_stream, &open.nodes).await.unwrap();
                let job = jobs.start(JobOptions::new("j"), job).await.unwrap();
                bds_io::sleep(Duration::from_micros(n * step)).await;
                // `Err`: it has ended already.
                let _late = job.cancel(true);
                match job.wait().await {
                    Ok(()) => true,
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::Cancelled, "{what}: {error}");
                        assert_eq!(shape(&open.graph), before, "{what}");
                        let again = prepare(is_stream, &open.nodes).await.unwrap();
                        run_job(&jobs, "again", again).await.unwrap();
                        assert_eq!(names(&disk), ["top", "base"], "{what}");
                        false
                    }
                }
            });
            if ended {
                done += 1
            } else {
                cancelled += 1
            }
            check_content(open, &chain, &what);
            if done == 3 {
                break;
            }
        }
        assert!(cancelled > 20, "{cancelled}");
    }
}

#[test]
fn a_query_that_holds_a_jobs_filter_does_not_keep_it_in_the_chain() {
    for is_stream in [true, false] {
        let base = world(13);
        let chain = base.block_on(Chain::new(&layers()).make(base.fs(), 13));
        let open = open(&base, &chain, 1);
        let jobs = JobManager::new(&open.graph);
        open.sim.block_on(async {
            let disk = writer(&open.nodes[3], "user");
            let before = shape(&open.graph);
            let ids: Vec<_> = open.graph.nodes().iter().map(NodeRef::id).collect();
            let job = prepare(is_stream, &open.nodes).await.unwrap();
            let mut held = open.graph.nodes();
            held.retain(|node| !ids.contains(&node.id()));
            assert!(!held.is_empty(), "the job has a filter");
            let job = jobs.start(JobOptions::new("j"), job).await.unwrap();
            job.cancel(true).unwrap();
            assert_eq!(job.wait().await.unwrap_err().kind(), ErrorKind::Cancelled);
            let ended = jobs.history().last("j").unwrap().clone();
            assert_eq!(ended.cleanup_error, None, "stream {is_stream}");
            assert_eq!(disk.node().unwrap().id(), open.nodes[3].id(), "stream {is_stream}");
            drop(held);
            open.graph.reap().await;
            assert_eq!(shape(&open.graph), before, "stream {is_stream}");
        });
        drop(jobs);
        check_content(open, &chain, "held");
    }
}

#[test]
fn a_set_up_that_is_dropped_at_any_await_leaves_nothing() {
    for is_stream in [true, false] {
        let base = world(12);
        let chain = base.block_on(Chain::new(&layers()).make(base.fs(), 12));
        for n in 0.. {
            let open = open(&base, &chain, n as u64);
            let before = shape(&open.graph);
            let dropped = open.sim.drop_at(prepare(is_stream, &open.nodes), n);
            open.sim.run_until_idle();
            open.sim.block_on(open.graph.reap());
            let what = format!("stream {is_stream}, dropped at {n}");
            assert_eq!(shape(&open.graph), before, "{what}");
            check_content(open, &chain, &what);
            if !dropped {
                break;
            }
        }
    }
}

#[test]
fn a_failure_at_any_operation_leaves_a_chain_that_shows_the_same() {
    for is_stream in [true, false] {
        let base = world(13);
        let chain = base.block_on(Chain::new(&layers()).make(base.fs(), 13));
        let (mut failed, mut done) = (0, 0);
        let step = if is_full() { 1 } else { 3 };
        for n in (0..).step_by(step) {
            let errno = if n % 2 == 0 { 5 } else { 28 };
            let open = open(&base, &chain, n);
            let what = format!("stream {is_stream}, errno {errno} at {n}");
            let jobs = JobManager::new(&open.graph);
            open.sim.fail_nth(n, Fault::once(errno));
            let result = open.sim.block_on(async {
                let job = prepare(is_stream, &open.nodes).await?;
                run_job(&jobs, "j", job).await
            });
            open.sim.clear_faults();
            if result.is_ok() {
                done += 1
            } else {
                failed += 1
            }
            check_content(open, &chain, &what);
            if done > 8 {
                break;
            }
        }
        assert!(failed > 5, "{failed}");
    }
}

#[test]
fn errors_that_are_ignored_make_a_stream_fail_at_its_end_and_keep_the_chain() {
    let base = world(14);
    let chain = base.block_on(Chain::new(&layers()).make(base.fs(), 14));
    let open = open(&base, &chain, 1);
    let jobs = JobManager::new(&open.graph);
    open.sim.block_on(async {
        let job = prepare(true, &open.nodes).await.unwrap();
        open.sim.fail_nth(0, Fault::sticky(5).on(OpMask::READ).in_path("mid"));
        let options = JobOptions {
            on_source_error: OnError::Ignore,
            on_target_error: OnError::Ignore,
            ..JobOptions::new("j")
        };
        let job = jobs.start(options, job).await.unwrap();
        let error = job.wait().await.unwrap_err();
        open.sim.clear_faults();
        assert!(error.to_string().contains("keeps its backing file"), "{error}");
        let disk = reader(&open.nodes[3], "look");
        assert_eq!(names(&disk), ["top", "mid", "low", "base"]);
        drop(disk);
        // Restarted, it copies what is missing.
        let again = prepare(true, &open.nodes).await.unwrap();
        run_job(&jobs, "again", again).await.unwrap();
    });
    check_content(open, &chain, "ignored error");
}
