//! Tests of failures: at every write of the target, at every await, at a target that hangs.

use std::time::Duration;

use bds_core::graph::NodeRef;
use bds_core::request::Backend;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::mirror::{Mirror, MirrorOptions};
use bds_jobs::{CopyMode, JobHandle, JobOptions, JobStatus, OnError, RetryPolicy};

use super::kit::{LEN, World, bytes_of, first_difference, pattern, read, shape, write, writer};

const EIO: i32 = 5;

async fn disks(world: &World) -> (NodeRef, NodeRef, Backend) {
    world.put("source", &pattern(1, LEN));
    world.put("target", &pattern(2, LEN));
    let (source, target) = (world.raw("source").await, world.raw("target").await);
    let guest = writer(&source, "guest");
    (source, target, guest)
}

async fn start(world: &World, options: MirrorOptions, job: JobOptions) -> JobHandle {
    let mirror = Mirror::prepare(options).await.expect("it can be prepared");
    world.manager.start(job, Box::new(mirror)).await.expect("it starts")
}

fn job() -> JobOptions {
    JobOptions { auto_dismiss: false, ..JobOptions::new("mirror0") }
}

fn modes() -> [CopyMode; 2] {
    [CopyMode::Background, CopyMode::WriteBlocking]
}

fn small(source: &NodeRef, target: &NodeRef, copy_mode: CopyMode) -> MirrorOptions {
    MirrorOptions {
        copy_mode,
        granularity: Some(16384),
        ..MirrorOptions::new(source, target, "mirror0")
    }
}

/// A guest's writes beside the job: none of them may fail.
async fn guest_writes(guest: &Backend, expected: &mut [u8]) {
    for number in 0..12_u64 {
        let (offset, byte) = (number * 20_000 + 100, u8::try_from(number + 1).expect("small"));
        write(guest, offset, &[byte; 6000]).await.expect("the guest's write succeeds");
        let start = usize::try_from(offset).expect("small");
        expected[start..start + 6000].fill(byte);
        bds_io::sleep(Duration::from_micros(300)).await;
    }
}

/// Fails the n-th operation on the target, for every n: the job fails in order, or survives if the
/// policy says so; the guest sees nothing of it.
#[test]
fn a_failure_at_each_write_of_the_target_is_the_jobs_alone() {
    for mode in modes() {
        for policy in [OnError::Report, OnError::Ignore] {
            let mut hits = 0;
            for n in 0..12 {
                let world = World::new(n);
                world.block_on(async {
                    let (source, target, guest) = disks(&world).await;
                    let before = shape(&world.graph);
                    let mask = OpMask::WRITE | OpMask::ZERO | OpMask::SYNC;
                    world.sim.fail_nth(n, Fault::once(EIO).on(mask).in_path("target"));
                    // A flush that failed once fails again.
                    let retry = RetryPolicy { max_attempts: Some(4), ..RetryPolicy::default() };
                    let options = JobOptions { on_target_error: policy, retry, ..job() };
                    let job = start(&world, small(&source, &target, mode), options).await;
                    let mut expected = pattern(1, LEN);
                    guest_writes(&guest, &mut expected).await;
                    let ready = job.wait_status(JobStatus::Ready).await;
                    if ready.is_ok() {
                        let _refused = job.complete();
                    }
                    let result = job.wait().await;
                    assert_eq!(job.info().cleanup_error, None);
                    match result {
                        Ok(()) => {
                            assert_eq!(guest.node().map(|node| node.id()), Some(target.id()));
                        }
                        Err(error) => {
                            hits += 1;
                            assert_eq!(shape(&world.graph), before, "{error}");
                        }
                    }
                    let found = read(&guest, 0, LEN).await;
                    assert_eq!(first_difference(&found, &expected), None, "fault {n}");
                });
                // A flush that failed is reported by the close of the target.
                drop(world.block_on(world.graph.shutdown()));
            }
            assert!(hits >= 3 || policy == OnError::Ignore, "{mode:?} {policy:?}: {hits} hits");
        }
    }
}

#[test]
fn ready_waits_for_a_flush_of_the_target() {
    let world = World::new(1);
    world.block_on(async {
        let (source, image, _guest) = disks(&world).await;
        let target = world
            .open(
                "driver=blkdebug,node-name=debug,image=target,inject-error.0.iotype=flush,\
                 inject-error.0.once=on",
            )
            .await;
        let options = JobOptions { on_target_error: OnError::Stop, ..job() };
        let job = start(&world, small(&source, &target, CopyMode::Background), options).await;
        job.wait_status(JobStatus::Paused).await.expect("the flush fails");
        assert_eq!(job.info().total_progress, job.info().current_progress, "all is copied");
        job.cancel(true).expect("it can be cancelled");
        job.wait().await.expect_err("it was cancelled");
        drop(image);
    });
    drop(world.block_on(world.graph.shutdown()));
}

/// A file whose flush failed fails all later ones: the policy `ignore` ends then, whatever
/// the guest does.
#[test]
fn a_flush_that_keeps_failing_ends_a_mirror_that_ignores_errors() {
    for mode in modes() {
        let world = World::new(1);
        world.block_on(async {
            let (source, target, guest) = disks(&world).await;
            let before = shape(&world.graph);
            world.sim.fail_nth(0, Fault::sticky(EIO).on(OpMask::SYNC).in_path("target"));
            let options = JobOptions { on_target_error: OnError::Ignore, ..job() };
            let begun = bds_io::now();
            let job = start(&world, small(&source, &target, mode), options).await;
            let mut expected = pattern(1, LEN);
            guest_writes(&guest, &mut expected).await;
            let error = job.wait().await.expect_err("the flush never succeeds");
            assert!(error.to_string().contains("cannot flush the target"), "{error}");
            assert_eq!(error.errno(), EIO);
            // 0.1 + 0.2 + 0.4 + 0.8 s between five attempts.
            assert!(bds_io::now() - begun < Duration::from_secs(3));
            assert_eq!(shape(&world.graph), before);
            assert_eq!(first_difference(&read(&guest, 0, LEN).await, &expected), None);
        });
        drop(world.block_on(world.graph.shutdown()));
    }
}

/// A query that holds the filter's node does not keep it in the graph, however the job ends.
#[test]
fn a_query_that_holds_the_filter_does_not_keep_it_in_the_chain() {
    for completes in [true, false] {
        let world = World::new(3);
        world.block_on(async {
            let (source, target, guest) = disks(&world).await;
            let before = shape(&world.graph);
            let options = small(&source, &target, CopyMode::Background);
            let job = start(&world, options, job()).await;
            let held = world.graph.nodes();
            assert!(held.iter().any(|node| node.driver_name() == "mirror_top"));
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            match completes {
                true => job.complete().expect("it completes"),
                false => job.cancel(true).expect("it can be cancelled"),
            }
            assert_eq!(job.wait().await.is_ok(), completes);
            assert_eq!(job.info().cleanup_error, None);
            let disk = if completes { &target } else { &source };
            assert_eq!(guest.node().map(|node| node.id()), Some(disk.id()), "no filter between");
            drop(held);
            world.graph.reap().await;
            if !completes {
                assert_eq!(shape(&world.graph), before);
            }
        });
        world.end();
    }
}

/// A cancel without force of a ready mirror whose target fails for good ends after a few attempts,
/// whatever the policy.
#[test]
fn a_soft_cancel_with_a_target_that_fails_is_bounded() {
    for mode in modes() {
        for policy in [OnError::Report, OnError::Ignore, OnError::Stop] {
            let world = World::new(1);
            world.block_on(async {
                let (source, target, guest) = disks(&world).await;
                let before = shape(&world.graph);
                let retry = RetryPolicy { max_attempts: None, ..RetryPolicy::default() };
                let options = JobOptions { on_target_error: policy, retry, ..job() };
                let job = start(&world, small(&source, &target, mode), options).await;
                job.wait_status(JobStatus::Ready).await.expect("it gets ready");
                world.sim.fail_nth(0, Fault::sticky(EIO).in_path("target"));
                job.cancel(false).expect("it can be cancelled");
                // Dirties both sides while it ends.
                write(&guest, 5, &[9; 3000]).await.expect("the guest's write succeeds");
                let at = bds_io::now();
                let result = job.wait().await;
                assert!(bds_io::now() - at < Duration::from_secs(5), "{policy:?}");
                // If the write came too late for the copy, only the flush had to succeed.
                if result.is_err() {
                    assert_eq!(shape(&world.graph), before);
                }
                assert_eq!(read(&guest, 5, 3000).await, [9; 3000]);
            });
            drop(world.block_on(world.graph.shutdown()));
        }
    }
}

/// A target whose requests never end: the job ends within its timeout, and the guest goes on.
#[test]
fn a_target_that_hangs_does_not_hold_up_the_guest_or_the_cancel() {
    for mode in modes() {
        let world = World::new(1);
        world.block_on(async {
            world.put("source", &pattern(1, LEN));
            let source = world.raw("source").await;
            let hangs =
                format!("driver=null-co,node-name=target,size={LEN},latency-ns=1000000000000000");
            let target = world.open(&hangs).await;
            let guest = writer(&source, "guest");
            let before = shape(&world.graph);
            let timeout = Duration::from_secs(1);
            let options = JobOptions { cancel_timeout: timeout, ..job() };
            let job = start(&world, small(&source, &target, mode), options).await;
            let (late, done) = (guest.clone(), bds_io::sync::oneshot::channel());
            let (sender, receiver) = done;
            bds_io::spawn(async move {
                let written = write(&late, 0, &[1; 512]).await;
                let _gone = sender.send(written);
            })
            .detach();
            bds_io::sleep(Duration::from_millis(100)).await;
            // A drain of the disk does not wait for the target.
            let at = bds_io::now();
            drop(world.graph.drain(&source).await);
            assert!(bds_io::now() - at < Duration::from_millis(100), "{mode:?}");
            receiver.await.expect("it ends").expect("the guest's write succeeds");
            let at = bds_io::now();
            job.cancel(true).expect("it can be cancelled");
            job.wait().await.expect_err("it was cancelled");
            assert!(bds_io::now() - at <= timeout + Duration::from_millis(100));
            let after = shape(&world.graph);
            assert_eq!(after.replace(",poisoned", ""), before);
            assert_ne!(after, before, "its requests are not waited for any more");
            write(&guest, 0, &[2; 512]).await.expect("the guest goes on");
        });
        drop(world.block_on(world.graph.shutdown()));
    }
}

/// Cancels a mirror at each of its steps.
#[test]
fn a_cancel_at_each_operation_leaves_the_graph_as_it_was() {
    for mode in modes() {
        for n in 0..70 {
            let world = World::new(n);
            world.block_on(async {
                let (source, target, guest) = disks(&world).await;
                let before = shape(&world.graph);
                let options = small(&source, &target, mode);
                let job = start(&world, options, job()).await;
                let mut expected = pattern(1, LEN);
                let until = world.sim.ops() + n;
                let writes = guest_writes(&guest, &mut expected);
                let cancel = async {
                    while world.sim.ops() < until && job.status() != JobStatus::Ready {
                        bds_io::yield_now().await;
                        bds_io::sleep(Duration::from_micros(1)).await;
                    }
                    job.cancel(true).expect("it can be cancelled");
                    job.wait().await.expect_err("it was cancelled");
                };
                futures_util::future::join(writes, cancel).await;
                assert_eq!(job.info().cleanup_error, None);
                assert_eq!(shape(&world.graph), before);
                let found = read(&guest, 0, LEN).await;
                assert_eq!(first_difference(&found, &expected), None, "cancel at {n}");
            });
            world.end();
        }
    }
}

/// Drops the set-up at each await.
#[test]
fn a_set_up_that_is_dropped_leaves_nothing() {
    let mut n = 1;
    loop {
        let world = World::new(n as u64);
        let (source, target, _guest) = world.block_on(disks(&world));
        let before = shape(&world.graph);
        let options = small(&source, &target, CopyMode::Background);
        let set_up = async {
            let mirror = Mirror::prepare(options).await.expect("it can be prepared");
            mirror.discard().await.expect("it is discarded");
        };
        let was_dropped = world.sim.drop_at(set_up, n);
        let _closed = world.block_on(world.graph.reap());
        let after = shape(&world.graph);
        assert_eq!(after, before, "dropped at {n}");
        drop((source, target, _guest));
        drop(world.block_on(world.graph.shutdown()));
        if !was_dropped {
            break;
        }
        n += 1;
    }
    assert!(n > 2, "{n} awaits");
}

/// A synced write that fails at the target before the scan comes by leaves unknown bytes
/// there: the scan must not take the range for zeros of the target.
#[test]
fn a_scan_leaves_nothing_alone_where_a_synced_write_failed() {
    for seed in 0..10 {
        let world = World::new(seed);
        world.block_on(async {
            world.make_qcow2("source", &format!("size={LEN},cluster_size=4096")).await;
            world.put("target", &[0; 262_144]);
            let (source, target) = (world.qcow2("source", "").await, world.raw("target").await);
            let guest = writer(&source, "guest");
            let options = MirrorOptions {
                target_is_zero: true,
                granularity: Some(4096),
                ..small(&source, &target, CopyMode::WriteBlocking)
            };
            let options = (options, JobOptions { on_target_error: OnError::Ignore, ..job() });
            let job = start(&world, options.0, options.1).await;
            job.pause().expect("it pauses");
            job.wait_status(JobStatus::Paused).await.expect("it is paused");
            let fault = Fault::once(EIO).on(OpMask::WRITE).in_path("target").partially();
            world.sim.fail_nth(0, fault);
            write(&guest, 65536, &[7; 4096]).await.expect("the guest's write succeeds");
            guest
                .write_zeroes(65536, 4096, bds_core::driver::ZeroFlags::empty())
                .await
                .map(drop)
                .expect("zeroed");
            job.resume().expect("it resumes");
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            job.cancel(false).expect("it can be cancelled");
            job.wait().await.expect("it ends in order");
            let (from, to) = (bytes_of(&source).await, bytes_of(&target).await);
            assert_eq!(first_difference(&from, &to), None, "seed {seed}");
        });
        world.end();
    }
}

#[test]
fn source_errors_follow_the_policy_of_the_source() {
    let world = World::new(1);
    world.block_on(async {
        let (source, target, guest) = disks(&world).await;
        world.sim.fail_nth(0, Fault::once(EIO).on(OpMask::READ).in_path("source"));
        let options = JobOptions { on_source_error: OnError::Stop, ..job() };
        let job = start(&world, small(&source, &target, CopyMode::Background), options).await;
        job.wait_status(JobStatus::Paused).await.expect("the policy pauses it");
        job.resume().expect("it resumes");
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        job.complete().expect("it completes");
        job.wait().await.expect("it ends well");
        let found = bytes_of(&target).await;
        assert_eq!(first_difference(&found, &pattern(1, LEN)), None);
        drop(guest);
    });
    world.end();
}
