//! Tests of staging with a spill file: what waits for what, policies when memory and spill file are
//! full, spill files that fail or hang, what readers see and give up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bds_core::ErrorKind;
use bds_core::driver::WriteFlags;
use bds_core::request::Backend;
use bds_io::{Buf, Task};
use serde_json::{Value, json};

use super::{GRANULE, LEN, Options, SPILL_LEN, World, run, user};

/// Four granules of memory, eight of the spill file.
fn small() -> Value {
    json!({"staging-size": 4 * GRANULE, "spill-size": SPILL_LEN})
}

fn with(mut options: Value, key: &str, value: impl Into<Value>) -> Value {
    options[key] = value.into();
    options
}

/// Writes to the first `count` granules, one after the other, in a task; counts those done.
fn write_granules(world: &World, count: u64) -> (Arc<AtomicUsize>, Task<bds_core::Result<()>>) {
    let done = Arc::new(AtomicUsize::new(0));
    let (guest, counter): (Backend, _) = (world.guest.clone(), done.clone());
    let task = bds_io::spawn(async move {
        for granule in 0..count {
            let iov = Buf::from_slice(&[7; 512]).iov();
            guest.write(granule * GRANULE, iov, WriteFlags::empty()).await?;
            counter.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    });
    (done, task)
}

async fn whole(world: &World) {
    assert!(world.read_snapshot(0, LEN).await.unwrap() == world.start);
}

/// The shape of a guest's latency, counted: no write waits for the target while memory or the spill
/// file has space.
#[test]
fn no_write_waits_for_the_target_until_memory_and_spill_file_are_full() {
    run(1, small(), async |world| {
        world.target.hold();
        let (done, writes) = write_granules(&world, 20);
        bds_io::sleep(Duration::from_secs(100)).await;
        assert_eq!(done.load(Ordering::SeqCst), 12, "four in memory, eight in the spill file");
        assert_eq!(world.spill.writes.load(Ordering::SeqCst), 8, "each once");
        whole(&world).await;
        // What is kept may be written again at once.
        world.write(5 * GRANULE, 512, 8).await.unwrap();
        world.target.release();
        writes.await.unwrap();
        whole(&world).await;
        // Space is used again, for the rest of the disk.
        let (_, more) = write_granules(&world, 21);
        more.await.unwrap();
        whole(&world).await;
    });
}

#[test]
fn a_target_that_keeps_up_needs_no_spill_file() {
    run(1, small(), async |world| {
        for granule in 0..20 {
            world.write(granule * GRANULE, 512, 7).await.unwrap();
            bds_io::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(world.spill.writes.load(Ordering::SeqCst), 0);
        whole(&world).await;
    });
}

#[test]
fn policies_when_memory_and_spill_file_are_full_by_table() {
    // policy, the rest of the options; writes that go on beside a stuck target, errno that breaks
    let table = [
        (json!({"staging-policy": "stall"}), 12, None),
        (json!({"staging-policy": "throttle"}), 12, None),
        (json!({"staging-policy": "break-snapshot"}), 20, Some(libc::ENOMEM)),
        (json!({"cbw-timeout": 2, "on-cbw-error": "break-snapshot"}), 20, Some(libc::ETIMEDOUT)),
    ];
    for (more, expected, broken) in table {
        let mut options = small();
        options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        run(1, options, async |mut world| {
            world.target.hold();
            let (done, writes) = write_granules(&world, 20);
            bds_io::sleep(Duration::from_secs(100)).await;
            assert_eq!(done.load(Ordering::SeqCst), expected, "{more}");
            assert_eq!(world.was_broken().map(|(_, errno)| errno), broken, "{more}");
            world.target.release();
            writes.await.unwrap();
            match broken {
                None => whole(&world).await,
                Some(errno) => {
                    let error = world.read_snapshot(0, 512).await.unwrap_err();
                    assert_eq!(error.errno(), errno);
                }
            }
        });
    }
}

/// The policy `throttle` spreads the wait over the writes from half of both on.
#[test]
fn the_policy_throttle_counts_the_spill_file_too() {
    run(1, with(small(), "staging-policy", "throttle"), async |world| {
        world.target.delay_us.store(10_000, Ordering::SeqCst);
        let mut longest = Duration::ZERO;
        for granule in 0..20 {
            let begun = bds_io::now();
            world.write(granule * GRANULE, 512, 7).await.unwrap();
            longest = longest.max(bds_io::now() - begun);
        }
        assert!(longest <= Duration::from_millis(40), "{longest:?}");
        whole(&world).await;
    });
}

/// A spill file that is full or broken is no error of the guest: the policy decides as if there
/// were none, with the spill file's error.
#[test]
fn a_failing_spill_file_leaves_it_to_the_policy() {
    for policy in ["stall", "throttle", "break-snapshot"] {
        let options = with(small(), "staging-policy", policy);
        run(1, options, async |mut world| {
            world.target.hold();
            world.spill.errno.store(libc::ENOSPC as u64, Ordering::SeqCst);
            let (done, writes) = write_granules(&world, 10);
            bds_io::sleep(Duration::from_millis(500)).await;
            if policy == "break-snapshot" {
                assert_eq!(done.load(Ordering::SeqCst), 10);
                assert_eq!(world.was_broken().map(|(_, errno)| errno), Some(libc::ENOSPC));
                let error = world.read_snapshot(0, 512).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::NoSpace);
                assert!(error.to_string().contains("cannot be spilled"), "{error}");
            } else {
                assert_eq!(done.load(Ordering::SeqCst), 4, "{policy}: memory alone");
                whole(&world).await;
                // There is space again, which is noticed.
                world.spill.errno.store(0, Ordering::SeqCst);
                bds_io::sleep(Duration::from_secs(3)).await;
                assert_eq!(done.load(Ordering::SeqCst), 10, "{policy}");
                whole(&world).await;
            }
            world.target.release();
            writes.await.unwrap();
        });
    }
}

#[test]
fn spilled_data_that_cannot_be_read_is_an_error_of_the_reader_and_is_tried_again() {
    run(1, small(), async |mut world| {
        world.target.hold();
        let (_, writes) = write_granules(&world, 10);
        writes.await.unwrap();
        world.spill.read_errno.store(libc::EIO as u64, Ordering::SeqCst);
        let error = world.read_snapshot(0, LEN).await.unwrap_err();
        assert!(error.to_string().contains("cannot read the spill file"), "{error}");
        assert_eq!(error.errno(), libc::EIO);
        world.write(15 * GRANULE, 512, 9).await.unwrap();
        world.target.release();
        bds_io::sleep(Duration::from_secs(5)).await;
        assert_eq!(world.was_broken(), None);
        world.spill.read_errno.store(0, Ordering::SeqCst);
        whole(&world).await;
        bds_io::sleep(Duration::from_secs(5)).await;
        // All of it is on the target by now.
        world.spill.read_errno.store(libc::EIO as u64, Ordering::SeqCst);
        whole(&world).await;
    });
}

/// Both hang: after the timeout the guest's writes go on and the filter goes at once.
#[test]
fn the_filter_goes_at_once_with_requests_stuck_in_the_target_and_the_spill_file() {
    let options = with(with(small(), "cbw-timeout", 2), "on-cbw-error", "break-snapshot");
    run(1, options, async |mut world| {
        world.target.hold();
        world.spill.hold();
        let (done, writes) = write_granules(&world, 10);
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(done.load(Ordering::SeqCst), 4);
        assert_eq!(world.spill.writes.load(Ordering::SeqCst), 2);
        writes.await.unwrap();
        assert_eq!(world.was_broken().map(|(_, errno)| errno), Some(libc::ETIMEDOUT));
        let begun = bds_io::now();
        let World { fixture, guest, reader, filter, spill, target, .. } = world;
        // Its close would wait for its request.
        let _node = fixture.graph.find("spill").unwrap();
        drop((reader, guest));
        fixture.graph.reap().await;
        fixture.graph.drop_filter(&filter).await.unwrap();
        filter.close().await.unwrap().into_result().unwrap();
        assert!(bds_io::now() - begun <= Duration::from_millis(10));
        target.release();
        spill.release();
    });
}

/// A task that waited for the end of the snapshot once all its writes were under way ran in circles
/// then, until the target answered: in simulated time for ever.
#[test]
fn a_snapshot_that_ends_with_many_writes_stuck_ends_its_tasks() {
    run(1, json!({"staging-size": 32 * GRANULE}), async |world| {
        world.target.hold();
        let (_, writes) = write_granules(&world, 20);
        writes.await.unwrap();
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(world.target.writes.load(Ordering::SeqCst), 16);
        let World { fixture, guest, reader, filter, target, .. } = world;
        drop(reader);
        fixture.graph.reap().await;
        fixture.graph.drop_filter(&filter).await.unwrap();
        filter.close().await.unwrap().into_result().unwrap();
        drop(guest);
        target.release();
    });
}

/// What the reader has fetched and gives up needs neither target nor space.
#[test]
fn what_a_reader_discards_leaves_the_staging_area() {
    run(1, small(), async |world| {
        world.target.hold();
        let (done, writes) = write_granules(&world, 20);
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(done.load(Ordering::SeqCst), 12);
        let reader = world.reader.clone();
        // Two are being written to the target; the discard of those waits.
        let give_up = bds_io::spawn(async move { reader.discard(2 * GRANULE, 8 * GRANULE).await });
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!(done.load(Ordering::SeqCst), 20, "their space serves the next");
        for (at, len) in [(0, 2 * GRANULE), (10 * GRANULE, LEN - 10 * GRANULE)] {
            let seen = world.read_snapshot(at, len).await.unwrap();
            assert!(seen == world.start[at as usize..(at + len) as usize]);
        }
        let refused = world.read_snapshot(3 * GRANULE, 512).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::PermissionDenied);
        world.target.release();
        writes.await.unwrap();
        give_up.await.unwrap();
    });
}

#[test]
fn the_spill_node_has_no_other_writer() {
    run(1, small(), async |world| {
        let spill = world.fixture.graph.find("spill").unwrap();
        let error = user(&spill, "intruder", true).unwrap_err();
        assert!(error.to_string().contains("filter.spill"), "{error}");
        user(&spill, "onlooker", false).unwrap();
        // Nor may it be the disk, or the target.
        for name in ["disk", "copy"] {
            let options = json!({
                "driver": "copy-before-write", "file": "disk", "target": "copy", "spill": name,
                "staging-size": 4 * GRANULE,
            });
            let opened = world.fixture.graph.open(Options::from_json(options).unwrap()).await;
            let used = match opened {
                Ok(node) => user(&node, "guest", true).err(),
                Err(error) => Some(error),
            };
            assert!(used.is_some(), "{name}");
        }
    });
}

#[test]
fn wrong_options_of_a_spill_file_are_refused() {
    run(1, small(), async |world| {
        let graph = &world.fixture.graph;
        let options = |more: Value| {
            let mut options =
                json!({"driver": "copy-before-write", "file": "disk", "target": "copy"});
            options.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            graph.open(Options::from_json(options).unwrap())
        };
        let mem = |len: u64| json!({"driver": "mem", "size": len});
        for (wrong, words) in [
            (json!({"spill-size": GRANULE}), "needs a node as 'spill'"),
            (json!({"spill": mem(SPILL_LEN)}), "must be 262144 bytes at least"),
            (
                json!({"spill": mem(SPILL_LEN), "staging-size": 3 * GRANULE}),
                "must be 262144 bytes at least",
            ),
            (
                json!({"spill": mem(GRANULE), "staging-size": SPILL_LEN}),
                "must be 262144 bytes at least",
            ),
            (
                json!({"spill": mem(SPILL_LEN), "spill-size": LEN, "staging-size": SPILL_LEN}),
                "has only 524288 bytes: make it larger",
            ),
        ] {
            let error = options(wrong.clone()).await.unwrap_err();
            assert!(error.to_string().contains(words), "{wrong}: {error}");
        }
        options(json!({"spill": mem(SPILL_LEN), "staging-size": SPILL_LEN})).await.unwrap();
    });
}
