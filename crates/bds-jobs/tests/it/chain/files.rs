//! Stream and commit on files of the host, compared with QEMU's view of the images.

use bds_io::{Context, ContextOptions, Fs};
use bds_jobs::{Commit, CommitOptions, JobManager, Stream, StreamOptions};
use bds_testkit::{Scratch, qemu_img};

use super::kit::{Chain, Layer, graph_on, run_job};

const K: u64 = 1024;

fn layers() -> Vec<Layer> {
    vec![
        Layer::qcow2("base", 900 * K, 65536),
        Layer::qcow2("low", 2048 * K, 4096),
        Layer::qcow2("mid", 1500 * K, 65536),
        Layer::qcow2("top", 2048 * K, 65536),
    ]
}

/// Runs a job on files and lets QEMU compare the top image before and after.
fn check(seed: u64, recorded: Option<&str>, is_stream: bool) {
    let Some(img) = qemu_img() else { return };
    let scratch = Scratch::new();
    let context = Context::new(ContextOptions::default()).unwrap();
    let top = scratch.path("top");
    let top = top.to_str().unwrap();
    let before = scratch.path("before.raw");
    let before = before.to_str().unwrap();
    context.block_on(async {
        let chain = Chain::in_dir(&layers(), scratch.dir()).make(Fs::Host, seed).await;
        img.must(["convert", "-O", "raw", top, before]);
        let graph = graph_on(Fs::Host);
        let jobs = JobManager::new(&graph);
        let nodes = chain.open(&graph).await;
        let base = recorded.map(|_| nodes[1].clone());
        let job = if is_stream {
            Stream::prepare("j", StreamOptions { base, ..StreamOptions::new(&nodes[3]) }).await
        } else {
            let mid = Some(nodes[2].clone());
            Commit::prepare("j", CommitOptions { top: mid, base, ..CommitOptions::new(&nodes[3]) })
                .await
        };
        drop(nodes);
        run_job(&jobs, "j", job.unwrap()).await.unwrap();
        graph.shutdown().await.check_leaks().unwrap();
    });
    img.must(["compare", "-f", "raw", "-F", "qcow2", before, top]);
    let info = img.must(["info", "--output=json", top]).json();
    assert_eq!(info["backing-filename"].as_str(), recorded, "seed {seed}");
    for image in ["base", "low", "top"] {
        img.must(["check", scratch.path(image).to_str().unwrap()]);
    }
}

#[test]
fn qemu_finds_the_same_disk_after_a_stream() {
    for seed in 0..3 {
        check(seed, None, true);
        check(seed, Some("low"), true);
    }
}

#[test]
fn qemu_finds_the_same_disk_after_a_commit() {
    for seed in 0..3 {
        check(seed, Some("low"), false);
    }
}
