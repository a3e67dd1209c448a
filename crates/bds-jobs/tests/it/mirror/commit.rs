//! Tests of the active commit: the chain before, during and after it.

use std::time::Duration;

use bds_core::driver::ZeroFlags;
use bds_core::graph::NodeRef;
use bds_jobs::mirror::{ActiveCommit, ActiveCommitOptions};
use bds_jobs::{JobHandle, JobOptions, JobStatus};

use super::kit::{LEN, World, bytes_of, first_difference, pattern, read, shape, write, writer};

async fn start(world: &World, options: ActiveCommitOptions) -> JobHandle {
    let commit = ActiveCommit::prepare(options).await.expect("it can be prepared");
    let job = JobOptions { auto_dismiss: false, ..JobOptions::new("commit0") };
    world.manager.start(job, Box::new(commit)).await.expect("it starts")
}

/// `top ─► middle ─► base`; the base has this length.
async fn chain(world: &World, base_len: u64, more: &str) -> (NodeRef, NodeRef) {
    world.put("base", &pattern(1, base_len));
    let base = world
        .open(&format!(
            "driver=raw,node-name=base,discard=unmap,file.driver=file,file.filename=/base{more}"
        ))
        .await;
    world.make_qcow2("middle", &format!("size={LEN},cluster_size=4096")).await;
    let middle = world.qcow2("middle", ",backing=base").await;
    let early = writer(&middle, "early");
    write(&early, 4096, &[2; 8192]).await.expect("written");
    early.flush().await.expect("flushed");
    drop(early);
    world.make_qcow2("top", &format!("size={LEN},cluster_size=4096")).await;
    (world.qcow2("top", ",backing=middle").await, base)
}

#[test]
fn a_commit_ends_when_it_is_completed_and_not_before() {
    let world = World::new(1);
    world.block_on(async {
        let (top, base) = chain(&world, LEN, "").await;
        let guest = writer(&top, "guest");
        write(&guest, 0, &[3; 1000]).await.expect("written");
        let expected = read(&guest, 0, LEN).await;
        let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
        assert_eq!(job.info().job_type.as_str(), "commit");
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        bds_io::sleep(Duration::from_secs(60)).await;
        assert_eq!(job.status(), JobStatus::Ready, "it does not end by itself");
        assert_eq!(first_difference(&read(&guest, 0, LEN).await, &expected), None);
        write(&guest, 100_000, &[4; 10_000]).await.expect("written");
        job.complete().expect("it completes");
        job.wait().await.expect("it ends well");
        assert_eq!(job.info().cleanup_error, None);
        assert_eq!(guest.node().map(|node| node.id()), Some(base.id()));
        let mut expected = expected;
        expected[100_000..110_000].fill(4);
        assert_eq!(first_difference(&read(&guest, 0, LEN).await, &expected), None);
        write(&guest, 0, &[5; 512]).await.expect("the base can be written");
    });
    world.end();
}

#[test]
fn a_commit_that_is_cancelled_leaves_a_valid_chain() {
    for soft in [true, false] {
        let world = World::new(1);
        world.block_on(async {
            let (top, base) = chain(&world, LEN, ",read-only=on").await;
            let guest = writer(&top, "guest");
            write(&guest, 0, &[3; 1000]).await.expect("written");
            let expected = read(&guest, 0, LEN).await;
            let before = shape(&world.graph);
            let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
            assert!(base.is_writable(), "it was made writable");
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            job.cancel(!soft).expect("it can be cancelled");
            assert_eq!(job.wait().await.is_ok(), soft);
            assert_eq!(job.info().cleanup_error, None);
            assert!(!base.is_writable(), "read-only again");
            assert_eq!(shape(&world.graph), before);
            assert_eq!(first_difference(&read(&guest, 0, LEN).await, &expected), None);
            if soft {
                assert_eq!(first_difference(&bytes_of(&base).await, &expected), None);
            }
        });
        world.end();
    }
}

/// Nodes below the top cannot be read by others during a commit: the middle alone would show bytes
/// of the top.
#[test]
fn others_cannot_read_below_the_top() {
    let world = World::new(1);
    world.block_on(async {
        let (top, base) = chain(&world, LEN, "").await;
        let middle = world.graph.find("middle").expect("it is there");
        let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
        for node in [&middle, &base] {
            let error = bds_core::request::Backend::new(node, Default::default());
            assert!(error.is_err(), "{}", node.name());
        }
        drop(middle);
        job.cancel(true).expect("it can be cancelled");
        job.wait().await.expect_err("it was cancelled");
    });
    world.end();
}

#[test]
fn a_shorter_base_grows_with_zeros_and_a_longer_one_keeps_its_length() {
    for base_len in [LEN / 2 + 512, LEN * 2] {
        let world = World::new(1);
        world.block_on(async {
            let (top, base) = chain(&world, base_len, "").await;
            let guest = writer(&top, "guest");
            write(&guest, LEN - 5000, &[6; 100]).await.expect("written");
            let expected = read(&guest, 0, LEN).await;
            let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            assert_eq!(first_difference(&read(&guest, 0, LEN).await, &expected), None);
            job.complete().expect("it completes");
            job.wait().await.expect("it ends well");
            assert_eq!(base.len(), base_len.max(LEN));
            let found = bytes_of(&base).await;
            assert_eq!(first_difference(&found[..expected.len()], &expected), None);
            if base_len > LEN {
                let tail = &pattern(1, base_len)[expected.len()..];
                assert_eq!(first_difference(&found[expected.len()..], tail), None);
            }
        });
        world.end();
    }
}

/// The overlay above the base does not note any more what the base showed once that is written: a
/// cancelled commit, or a power cut, leaves a chain that can be opened.
#[test]
fn a_commit_drops_the_note_of_a_base_that_it_writes() {
    let world = World::new(1);
    world.block_on(async {
        world.put("base", &pattern(1, LEN));
        let base = world.raw("base").await;
        let record = format!("size={LEN},cluster_size=4096,backing_file=/base,backing_fmt=raw");
        world.make_qcow2("top", &record).await;
        let top = world.qcow2("top", ",backing=base").await;
        let guest = writer(&top, "guest");
        assert!(guest.mark_base().await.expect("it is noted"));
        write(&guest, 0, &[3; 8192]).await.expect("written");
        assert!(guest.info().await.expect("known").marks_base, "writes keep it");
        let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        assert!(!guest.info().await.expect("known").marks_base);
        job.cancel(true).expect("it is cancelled");
        job.wait().await.expect_err("it was cancelled");
        assert!(bytes_of(&base).await[..8192] == [3; 8192], "the base was written");
        assert!(!guest.info().await.expect("known").marks_base);
    });
    world.end();
}

/// Zeros of the layers above become zeros of the base, not bytes.
#[test]
fn zeros_stay_zeros_in_a_commit() {
    let world = World::new(1);
    world.block_on(async {
        world.make_qcow2("base", &format!("size={LEN},cluster_size=4096")).await;
        let base = world.qcow2("base", "").await;
        let fill = writer(&base, "fill");
        write(&fill, 0, &[1; 262_144]).await.expect("written");
        drop(fill);
        let before = allocated(&base).await;
        world.make_qcow2("top", &format!("size={LEN},cluster_size=4096")).await;
        let top = world.qcow2("top", ",backing=base").await;
        let guest = writer(&top, "guest");
        let _done = guest.write_zeroes(0, LEN / 2, ZeroFlags::MAY_UNMAP).await.expect("zeroed");
        let job = start(&world, ActiveCommitOptions::new(&top, "commit0")).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        job.complete().expect("it completes");
        job.wait().await.expect("it ends well");
        let found = read(&guest, 0, LEN).await;
        assert!(found[..131_072].iter().all(|byte| *byte == 0));
        assert!(found[131_072..].iter().all(|byte| *byte == 1));
        let after = allocated(&base).await;
        assert!(after < before, "{after} bytes are allocated, {before} before");
    });
    world.end();
}

/// Bytes that are allocated in the node's own layer and not zero.
async fn allocated(node: &NodeRef) -> u64 {
    let reader = bds_core::request::Backend::new(node, Default::default()).expect("readable");
    let (mut at, mut sum) = (0, 0);
    while at < node.len() {
        let run = reader.block_status(at, node.len() - at, bds_core::driver::Precision::Exact);
        let run = run.await.expect("it answers");
        if !run.flags.contains(bds_core::driver::StatusFlags::ZERO) {
            sum += run.len;
        }
        at += run.len;
    }
    sum
}
