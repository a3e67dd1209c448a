//! Tests of the end: the pending window, `replaces`, and where the users are afterwards.

use std::time::Duration;

use bds_core::ErrorKind;
use bds_core::graph::{NodeRef, walk};
use bds_jobs::mirror::{Mirror, MirrorOptions, MirrorSync};
use bds_jobs::{CopyMode, JobHandle, JobOptions, JobStatus};

use super::kit::{
    Client, Habits, LEN, World, bytes_of, first_difference, pattern, shape, write, writer,
};

async fn start(world: &World, options: MirrorOptions, job: JobOptions) -> JobHandle {
    let mirror = Mirror::prepare(options).await.expect("it can be prepared");
    world.manager.start(job, Box::new(mirror)).await.expect("it starts")
}

/// While a mirror is pending, no write is acknowledged, neither of old users nor of new ones, and
/// all of them go on at the target.
#[test]
fn nothing_is_written_while_a_mirror_is_pending() {
    let world = World::new(1);
    world.block_on(async {
        let bytes = pattern(1, LEN);
        world.put("source", &bytes);
        world.put("target", &[0; 262_144]);
        let (source, target) = (world.raw("source").await, world.raw("target").await);
        let habits = |slot| Habits { seed: 7, slot, of: 3, cell: 2048, unmaps: true, pause_us: 90 };
        let old = Client::new(writer(&source, "old"), bytes.clone(), habits(0));
        let backend = old.backend.clone();
        let old = old.start();
        let options = MirrorOptions::new(&source, &target, "mirror0");
        let job = JobOptions { auto_finalize: false, ..JobOptions::new("mirror0") };
        let job = start(&world, options, job).await;
        job.wait_status(JobStatus::Ready).await.expect("it gets ready");
        job.complete().expect("it completes");
        job.wait_status(JobStatus::Pending).await.expect("it is pending");
        let filter = backend.node().expect("it has a medium");
        let error = bds_core::request::Backend::new(
            &source,
            bds_core::request::BackendOptions { writable: true, ..Default::default() },
        )
        .expect_err("writes past the filter would be lost");
        assert_eq!(error.kind(), ErrorKind::InUse);
        let new = Client::new(writer(&filter, "new"), bytes.clone(), habits(1)).start();
        let before = (bytes_of(&source).await, bytes_of(&target).await);
        assert_eq!(first_difference(&before.0, &before.1), None);
        bds_io::sleep(Duration::from_secs(5)).await;
        assert_eq!((bytes_of(&source).await, bytes_of(&target).await), before);
        let late = Client::new(writer(&filter, "late"), bytes, habits(2)).start();
        drop(filter);
        let at = bds_io::now();
        job.finalize().expect("it can be finalized");
        job.wait().await.expect("it ends well");
        assert!(bds_io::now() - at < Duration::from_millis(100));
        bds_io::sleep(Duration::from_millis(20)).await;
        for client in [old, new, late] {
            let client = client.stop().await;
            assert_eq!(client.backend.node().map(|node| node.id()), Some(target.id()));
            client.check().await.expect("nothing is lost");
            assert!(client.acknowledged > 0);
        }
        assert_eq!(bytes_of(&source).await, before.0, "nothing reached the old disk");
        assert_eq!(job.info().cleanup_error, None);
    });
    world.end();
}

/// `throttle ─► disk` and a target, and a mirror of the throttle node that replaces the disk.
async fn replacing(world: &World) -> (NodeRef, NodeRef, JobHandle) {
    world.put("disk", &pattern(1, LEN));
    world.put("target", &[0; 262_144]);
    world.put("third", &[0; 262_144]);
    let disk = world.raw("disk").await;
    let throttle =
        world.open("driver=throttle,node-name=throttle,limits.bps-total=1T,file=disk").await;
    let target = world.raw("target").await;
    let options = MirrorOptions {
        replaces: Some("disk".into()),
        ..MirrorOptions::new(&throttle, &target, "mirror0")
    };
    let job = JobOptions { auto_dismiss: false, ..JobOptions::new("mirror0") };
    let job = start(world, options, job).await;
    job.wait_status(JobStatus::Ready).await.expect("it gets ready");
    drop(disk);
    (throttle, target, job)
}

#[test]
fn the_target_replaces_a_node_below_filters() {
    let world = World::new(1);
    world.block_on(async {
        let (throttle, target, job) = replacing(&world).await;
        job.complete().expect("it completes");
        // A second time changes nothing.
        let second = job.complete();
        job.wait().await.expect("it ends well");
        drop(second);
        assert_eq!(job.info().cleanup_error, None);
        let below = walk::next_below(&throttle).expect("there is one");
        assert_eq!(below.id(), target.id());
        assert_eq!(first_difference(&bytes_of(&throttle).await, &pattern(1, LEN)), None);
    });
    world.end();
}

#[test]
fn a_replaced_node_that_is_gone_is_an_error_of_the_command() {
    let world = World::new(1);
    world.block_on(async {
        let (throttle, target, job) = replacing(&world).await;
        let disk = world.graph.find("disk").expect("it is there");
        world.graph.change().rename(&disk, "renamed").commit().await.expect("renamed");
        let error = job.complete().expect_err("it is not found");
        assert_eq!(error.message(), "Node name 'disk' not found");
        assert_eq!(job.status(), JobStatus::Ready);

        // Another node has the name now.
        let third = world.raw("third").await;
        world.graph.change().rename(&third, "disk").commit().await.expect("renamed");
        let error = job.complete().expect_err("it cannot be replaced");
        assert!(error.message().starts_with("Cannot replace 'disk'"), "{error}");
        assert_eq!(job.status(), JobStatus::Ready);

        let rename = world.graph.change().rename(&third, "third").rename(&disk, "disk");
        rename.commit().await.expect("renamed");
        drop(disk);
        job.complete().expect("it completes");
        job.wait().await.expect("it ends well");
        assert_eq!(walk::next_below(&throttle).map(|node| node.id()), Some(target.id()));
    });
    world.end();
}

/// Two mirrors of one group pivot together or not at all.
#[test]
fn a_group_pivots_together_or_not_at_all() {
    for fails in [false, true] {
        let world = World::new(1);
        world.block_on(async {
            let mut guests = Vec::new();
            let mut group: Vec<(JobOptions, Box<dyn bds_jobs::JobDriver>)> = Vec::new();
            let mut targets = Vec::new();
            for name in ["one", "two"] {
                let (from, to) = (format!("{name}-old"), format!("{name}-new"));
                world.put(&from, &pattern(1, LEN));
                world.put(&to, &pattern(2, LEN));
                let (source, target) = (world.raw(&from).await, world.raw(&to).await);
                guests.push(writer(&source, name));
                let mirror = Mirror::prepare(MirrorOptions::new(&source, &target, name)).await;
                let mirror = Box::new(mirror.expect("it can be prepared"));
                group.push((JobOptions::new(name), mirror));
                targets.push(target.id());
            }
            let jobs = world.manager.start_group(group).await.expect("it starts");
            for job in &jobs {
                job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            }
            jobs[0].complete().expect("it completes");
            jobs[0].wait_status(JobStatus::Waiting).await.expect("it waits for the other");
            let used = |guest: &bds_core::request::Backend| guest.node().map(|node| node.id());
            assert_ne!(used(&guests[0]), Some(targets[0]), "it waits for the other");
            match fails {
                true => jobs[1].cancel(true).expect("it can be cancelled"),
                false => jobs[1].complete().expect("it completes"),
            }
            for (job, (guest, target)) in jobs.iter().zip(guests.iter().zip(&targets)) {
                assert_eq!(job.wait().await.is_err(), fails);
                assert_eq!(job.info().cleanup_error, None);
                assert_eq!(used(guest) == Some(*target), !fails);
                write(guest, 0, &[1; 512]).await.expect("it goes on");
            }
            assert!(!shape(&world.graph).contains("mirror_top"));
        });
        world.end();
    }
}

/// Mirrors of two disks begin at one moment, with a change that the caller makes.
#[test]
fn two_mirrors_begin_in_one_change() {
    for is_possible in [true, false] {
        let world = World::new(1);
        world.block_on(async {
            let mut staged = Vec::new();
            for name in ["one", "two"] {
                let (from, to) = (format!("{name}-old"), format!("{name}-new"));
                world.put(&from, &pattern(1, LEN));
                world.put(&to, &pattern(2, LEN));
                let (source, target) = (world.raw(&from).await, world.raw(&to).await);
                let options = MirrorOptions::new(&source, &target, name);
                let mirror = Mirror::prepare_staged(options).await;
                staged.push((writer(&source, name), mirror.expect("it can be prepared")));
            }
            let mut change = world.graph.change();
            for (_, mirror) in &staged {
                change = mirror.stage(change);
            }
            if !is_possible {
                // The second edit of the same kind makes the whole change impossible.
                change = staged[0].1.stage(change);
            }
            assert_eq!(change.commit().await.is_ok(), is_possible);
            for (guest, mirror) in staged {
                match is_possible {
                    true => {
                        assert_eq!(guest.node().map(|node| node.driver_name()), Some("mirror_top"));
                        let mirror = mirror.inserted().await.expect("the chain is free");
                        let job = JobOptions::new(guest.name());
                        let job = world.manager.start(job, Box::new(mirror)).await;
                        job.expect("it starts").cancel(true).expect("it can be cancelled");
                    }
                    false => mirror.discard().await.expect("nothing to do"),
                }
            }
            for job in world.manager.jobs() {
                job.wait().await.expect_err("it was cancelled");
            }
            assert!(!shape(&world.graph).contains("mirror_top"));
        });
        world.end();
    }
}

/// A shutdown ends a mirror in whatever state it is, and nothing is left.
#[test]
fn a_shutdown_ends_a_mirror() {
    for wait in [None, Some(JobStatus::Ready), Some(JobStatus::Pending)] {
        let world = World::new(1);
        world.block_on(async {
            world.put("source", &pattern(1, LEN));
            world.put("target", &pattern(2, LEN));
            let (source, target) = (world.raw("source").await, world.raw("target").await);
            let options = MirrorOptions::new(&source, &target, "mirror0");
            let job = JobOptions { auto_finalize: false, ..JobOptions::new("mirror0") };
            let job = start(&world, options, job).await;
            if let Some(status) = wait {
                job.wait_status(JobStatus::Ready).await.expect("it gets ready");
                if status == JobStatus::Pending {
                    job.complete().expect("it completes");
                    job.wait_status(status).await.expect("it is pending");
                }
            }
        });
        world.end();
    }
}

/// The job's failure, or its end, leaves the graph as it was before.
#[test]
fn the_graph_is_as_before_after_every_end_without_a_pivot() {
    for (mode, soft) in [
        (CopyMode::Background, true),
        (CopyMode::WriteBlocking, true),
        (CopyMode::Background, false),
    ] {
        let world = World::new(1);
        world.block_on(async {
            world.put("source", &pattern(1, LEN));
            world.put("target", &[0; 262_144]);
            let (source, target) = (world.raw("source").await, world.raw("target").await);
            let guest = writer(&source, "guest");
            let before = shape(&world.graph);
            let options = MirrorOptions {
                copy_mode: mode,
                ..MirrorOptions::new(&source, &target, "mirror0")
            };
            let job = start(&world, options, JobOptions::new("mirror0")).await;
            assert!(shape(&world.graph).contains("mirror_top"));
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            write(&guest, 100, &[1; 10_000]).await.expect("written");
            job.cancel(!soft).expect("it can be cancelled");
            assert_eq!(job.wait().await.is_ok(), soft);
            assert_eq!(job.info().cleanup_error, None);
            assert_eq!(shape(&world.graph), before);
            if soft {
                assert_eq!(bytes_of(&source).await, bytes_of(&target).await);
            }
        });
        world.end();
    }
}

/// Clusters of the target are larger than granules, and its backing node comes later: what the
/// clusters hold beside copied granules must not be stale then.
#[test]
fn clusters_of_a_target_without_its_backing_node_are_copied_whole() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        for seed in 0..10 {
            let world = World::new(seed);
            world.block_on(async {
                let bytes = pattern(seed, LEN);
                world.put("lowest", &bytes);
                let lowest = world.raw("lowest").await;
                let mut top = lowest.clone();
                for (name, below) in [("middle", "lowest"), ("top", "middle")] {
                    world.make_qcow2(name, &format!("size={LEN},cluster_size=4096")).await;
                    top = world.qcow2(name, &format!(",backing={below}")).await;
                }
                let create =
                    format!("size={LEN},cluster_size=65536,backing_file=/middle,backing_fmt=qcow2");
                world.make_qcow2("target", &create).await;
                let target = world
                    .graph
                    .open(
                        bds_core::Options::parse(
                            "driver=qcow2,node-name=target,discard=unmap,file.driver=file,\
                             file.filename=/target",
                        )
                        .expect("well-formed")
                        .with("backing", serde_json::Value::Null),
                    )
                    .await
                    .expect("it can be opened");
                let habits =
                    Habits { seed, slot: 0, of: 2, cell: 2048, unmaps: true, pause_us: 50 };
                let client = Client::new(writer(&top, "client"), bytes, habits).start();
                let options = MirrorOptions {
                    sync: MirrorSync::Top,
                    granularity: Some(4096),
                    copy_mode: mode,
                    ..MirrorOptions::new(&top, &target, "mirror0")
                };
                let job = JobOptions { auto_finalize: false, ..JobOptions::new("mirror0") };
                bds_io::sleep(Duration::from_micros(700)).await;
                let job = start(&world, options, job).await;
                job.wait_status(JobStatus::Ready).await.expect("it gets ready");
                bds_io::sleep(Duration::from_millis(5)).await;
                job.complete().expect("it completes");
                job.wait_status(JobStatus::Pending).await.expect("it is pending");
                let middle = world.graph.find("middle").expect("it is there");
                world.graph.set_backing(&target, Some(&middle)).await.expect("it gets it");
                let (from, to) = (bytes_of(&top).await, bytes_of(&target).await);
                let difference = first_difference(&from, &to);
                assert_eq!(difference, None, "seed {seed}, {mode:?}");
                drop(middle);
                job.finalize().expect("it can be finalized");
                job.wait().await.expect("it ends well");
                client.stop().await.check().await.expect("nothing is lost");
            });
            world.end();
        }
    }
}
