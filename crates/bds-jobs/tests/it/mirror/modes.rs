//! Tests of the copy modes: background, write-blocking, the change between them, and the governor.

use std::time::Duration;

use bds_core::graph::NodeRef;
use bds_io::sim::{Fault, OpMask};
use bds_jobs::mirror::{Mirror, MirrorOptions, MirrorSync};
use bds_jobs::{CopyMode, JobChange, JobHandle, JobOptions, JobStatus, OnError};

use super::kit::{
    Client, Habits, LEN, Running, World, bytes_of, first_difference, pattern, read, write, writer,
};

fn busy(node: &NodeRef, initial: &[u8], slot: u64) -> Running {
    let habits = Habits { seed: slot + 1, slot, of: 4, cell: 2048, unmaps: true, pause_us: 200 };
    Client::new(writer(node, "client"), initial.to_vec(), habits).start()
}

async fn start(world: &World, options: MirrorOptions, job: JobOptions) -> JobHandle {
    let mirror = Mirror::prepare(options).await.expect("it can be prepared");
    world.manager.start(job, Box::new(mirror)).await.expect("it starts")
}

fn job() -> JobOptions {
    JobOptions::new("mirror0")
}

fn synced(source: &NodeRef, target: &NodeRef) -> MirrorOptions {
    MirrorOptions {
        copy_mode: CopyMode::WriteBlocking,
        ..MirrorOptions::new(source, target, "mirror0")
    }
}

async fn two_disks(world: &World) -> (NodeRef, NodeRef, Vec<u8>) {
    let bytes = pattern(1, LEN);
    world.put("source", &bytes);
    world.put("target", &pattern(2, LEN));
    (world.raw("source").await, world.raw("target").await, bytes)
}

/// A target with discard=unmap lets the map be thinned out by a scan of the source, during which
/// writes are tracked already.
#[test]
fn writes_during_the_start_are_copied() {
    for seed in 0..20 {
        let world = World::new(seed);
        world.block_on(async {
            let initial = vec![0; usize::try_from(LEN).expect("small")];
            world.put("target", &initial);
            world.make_qcow2("source", &format!("size={LEN},cluster_size=4096")).await;
            let (source, target) = (world.qcow2("source", "").await, world.raw("target").await);
            let clients: Vec<Running> = (0..4).map(|n| busy(&source, &initial, n)).collect();
            bds_io::sleep(Duration::from_micros(seed * 37)).await;
            let options = MirrorOptions {
                granularity: Some(4096),
                target_is_zero: true,
                ..MirrorOptions::new(&source, &target, "mirror0")
            };
            let job = start(&world, options, job()).await;
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            job.complete().expect("it completes");
            job.wait().await.expect("it ends well");
            for client in clients {
                client.stop().await.check().await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
        });
        world.end();
    }
}

#[test]
fn a_failing_target_does_not_fail_a_synced_write() {
    let world = World::new(1);
    world.block_on(async {
        let (source, target, bytes) = two_disks(&world).await;
        let guest = writer(&source, "guest");
        let options = JobOptions { on_target_error: OnError::Stop, auto_finalize: false, ..job() };
        let job = start(&world, synced(&source, &target), options).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        bds_io::sleep(Duration::from_millis(300)).await;
        assert_eq!(job.info().actively_synced, Some(true));

        world.sim.fail_nth(0, Fault::sticky(libc_eio()).on(OpMask::WRITE).in_path("target"));
        write(&guest, 1000, &[7; 5000]).await.expect("the guest's write succeeds");
        job.wait_status(JobStatus::Standby).await.expect("the policy pauses it");
        assert_eq!(job.info().actively_synced, Some(false));
        // The guest goes on at the speed of the source.
        write(&guest, 9000, &[8; 5000]).await.expect("the guest's write succeeds");
        let events = world.manager.query();
        assert_eq!(events[0].io_status, bds_jobs::IoStatus::Failed);

        world.sim.clear_faults();
        job.resume().expect("it resumes");
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(job.info().actively_synced, Some(true), "{:?}", job.info());
        write(&guest, 0, &[9; 512]).await.expect("written");
        assert_eq!(read(&writer_free(&target), 0, 512).await, [9; 512], "synced again");
        job.complete().expect("it completes");
        job.wait_status(JobStatus::Pending).await.expect("it is pending");
        let (from, to) = (bytes_of(&source).await, bytes_of(&target).await);
        assert_eq!(first_difference(&from, &to), None);
        job.finalize().expect("it can be finalized");
        job.wait().await.expect("it ends well");
        let mut expected = bytes;
        expected[1000..6000].fill(7);
        expected[9000..14000].fill(8);
        expected[..512].fill(9);
        assert_eq!(first_difference(&bytes_of(&target).await, &expected), None);
    });
    world.end();
}

fn writer_free(node: &NodeRef) -> bds_core::request::Backend {
    bds_core::request::Backend::new(node, Default::default()).expect("it can be read")
}

fn libc_eio() -> i32 {
    5
}

#[test]
fn the_mode_changes_one_way_while_it_runs() {
    let world = World::new(1);
    world.block_on(async {
        let (source, target, _) = two_disks(&world).await;
        let guest = writer(&source, "guest");
        let options = MirrorOptions {
            sync: MirrorSync::None,
            ..MirrorOptions::new(&source, &target, "mirror0")
        };
        let job = start(&world, options, job()).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        assert_ne!(job.info().actively_synced, Some(true));
        let to = |mode| job.change(JobChange::MirrorCopyMode(mode));
        to(CopyMode::Background).expect("no change");
        to(CopyMode::WriteBlocking).expect("it changes");
        to(CopyMode::WriteBlocking).expect("no change");
        let error = to(CopyMode::Background).expect_err("not back");
        assert_eq!(error.message(), "Change to copy mode 'background' is not implemented");
        write(&guest, 512, &[3; 1024]).await.expect("written");
        assert_eq!(read(&writer_free(&target), 512, 1024).await, [3; 1024]);
        job.cancel(true).expect("it can be cancelled");
        job.wait().await.expect_err("it was cancelled");
    });
    world.end();
}

/// Zero writes, discards and writes of less than a granule, on both sides of granules, keep both
/// sides equal at every moment in write-blocking mode.
#[test]
fn small_requests_of_all_kinds_are_synced() {
    use bds_core::driver::ZeroFlags;
    let world = World::new(1);
    world.block_on(async {
        let (source, target, _) = two_disks(&world).await;
        let guest = writer(&source, "guest");
        let options = MirrorOptions { granularity: Some(65536), ..synced(&source, &target) };
        let job = start(&world, options, job()).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        let mut chance = bds_testkit::Chance::new(1);
        for round in 0..300 {
            let offset = chance.below(LEN - 4096);
            let len = chance.between(1, 4096);
            match round % 4 {
                0 => drop(guest.write_zeroes(offset, len, ZeroFlags::MAY_UNMAP).await),
                1 => drop(guest.write_zeroes(offset, len, ZeroFlags::empty()).await),
                2 => guest.discard(offset, len).await.expect("discarded"),
                _ => {
                    let bytes = vec![5; usize::try_from(len).expect("small")];
                    write(&guest, offset, &bytes).await.expect("written");
                }
            }
            if round % 10 == 3 {
                // Discards whose outcome is not zeros are copied in the background.
                bds_io::sleep(Duration::from_millis(250)).await;
                let (from, to) = (bytes_of(&source).await, bytes_of(&target).await);
                assert_eq!(first_difference(&from, &to), None, "round {round}");
                assert_eq!(job.info().actively_synced, Some(true));
            }
        }
        bds_io::sleep(Duration::from_millis(500)).await;
        let (from, to) = (bytes_of(&source).await, bytes_of(&target).await);
        assert_eq!(first_difference(&from, &to), None);
        job.cancel(false).expect("it can be cancelled");
        job.wait().await.expect("it ends in order");
    });
    world.end();
}

/// Clients write three times as fast as the target takes it: the governor slows them down until
/// the job gets ready, and the pivot holds them up for less than the limit.
#[test]
fn a_mirror_under_load_converges_within_the_longest_stall() {
    let world = World::new(1);
    world.block_on(async {
        let initial = pattern(1, LEN);
        world.put("source", &initial);
        world.put("target", &initial);
        let source = world.raw("source").await;
        let target = world
            .open(
                "driver=throttle,node-name=target,limits.bps-write=8M,file.driver=raw,\
                 file.file.driver=file,file.file.filename=/target",
            )
            .await;
        let clients: Vec<Running> = (0..4)
            .map(|slot| {
                let habits =
                    Habits { seed: slot, slot, of: 4, cell: 4096, unmaps: false, pause_us: 10 };
                Client::new(writer(&source, "client"), initial.clone(), habits).start()
            })
            .collect();
        let stall = Duration::from_millis(50);
        let options = MirrorOptions {
            granularity: Some(4096),
            max_pivot_stall: Some(stall),
            ..MirrorOptions::new(&source, &target, "mirror0")
        };
        let job = start(&world, options, job()).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        bds_io::sleep(Duration::from_secs(1)).await;
        let guest = writer(&clients_node(&world), "guest");
        job.complete().expect("it completes");
        // One write after the other: the longest is the stall.
        let mut longest = Duration::ZERO;
        while job.status() != JobStatus::Concluded && job.status() != JobStatus::Null {
            let before = bds_io::now();
            write(&guest, LEN - 512, &[1; 512]).await.expect("written");
            longest = longest.max(bds_io::now() - before);
            bds_io::sleep(Duration::from_micros(100)).await;
        }
        job.wait().await.expect("it ends well");
        // The write may also have been delayed once by the governor, by at most the limit.
        assert!(longest <= 2 * stall, "a write was held up for {longest:?}");
        for client in clients {
            let client = client.stop().await;
            assert_eq!(client.backend.node().map(|node| node.id()), Some(target.id()));
        }
    });
    world.end();
}

/// The node that the users of the source use now.
fn clients_node(world: &World) -> NodeRef {
    let backends = world.graph.backends();
    let client = backends.iter().find(|backend| backend.name() == "client");
    client.and_then(bds_core::request::Backend::node).expect("it has a medium")
}
