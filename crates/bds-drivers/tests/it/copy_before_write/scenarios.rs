//! Scenarios of fleecing: a target that hangs, one that fails, a reader that gives up what it read.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bds_io::Buf;
use bds_testkit::Chance;
use serde_json::json;

use super::{GRANULE, LEN, World, guest, run};

/// Scenario 13: a target hangs under a filter with a timeout and the policy to break the snapshot.
/// The guest waits no longer than that, readers get an error of their own, and all can be removed.
#[test]
fn scenario_13_a_target_hangs_and_the_snapshot_breaks() {
    for staging in [json!({}), json!({"staging-size": 4 * GRANULE, "spill-size": 4 * GRANULE})] {
        let mut options = json!({"cbw-timeout": 2, "on-cbw-error": "break-snapshot"});
        options.as_object_mut().unwrap().extend(staging.as_object().unwrap().clone());
        run(1, options, async |mut world| {
            world.target.hold();
            let mut longest = Duration::ZERO;
            for granule in 0..20 {
                let begun = bds_io::now();
                world.write(granule * GRANULE, 512, 7).await.unwrap();
                longest = longest.max(bds_io::now() - begun);
            }
            assert!(longest <= Duration::from_millis(2100), "{longest:?}");
            let (_, errno) = world.was_broken().expect("an event says so");
            assert_eq!(errno, libc::ETIMEDOUT);
            assert_eq!(world.was_broken(), None, "once");
            let error = world.read_snapshot(19 * GRANULE, 512).await.unwrap_err();
            assert!(error.to_string().contains("the snapshot is broken"), "{error}");
            assert_eq!(error.errno(), libc::ETIMEDOUT);
            // Reader and filter go at once, with the target stuck as before.
            let World { fixture, guest, reader, filter, target, .. } = world;
            let begun = bds_io::now();
            drop(reader);
            fixture.graph.reap().await;
            fixture.graph.drop_filter(&filter).await.unwrap();
            filter.close().await.unwrap().into_result().unwrap();
            assert!(bds_io::now() - begun <= Duration::from_millis(10));
            let buf = Buf::zeroed(512, 512);
            guest.read(0, buf.iov()).await.unwrap();
            target.release();
        });
    }
}

/// Scenario 14: the target fails in one place. The writes that need it fail, all others go on; the
/// snapshot stays whole.
#[test]
fn scenario_14_a_target_fails_and_only_affected_writes_do() {
    run(1, json!({}), async |mut world| {
        for granule in 0..20 {
            let fails = granule % 3 == 1;
            let errno = if fails { libc::EIO as u64 } else { 0 };
            world.target.errno.store(errno, Ordering::SeqCst);
            let written = world.write(granule * GRANULE + 512, 1024, 7).await;
            assert_eq!(
                written.as_ref().err().map(bds_core::Error::errno),
                fails.then_some(libc::EIO)
            );
            let at = (granule * GRANULE + 512) as usize;
            assert_eq!(world.source.bytes()[at] == 7, !fails, "granule {granule}");
        }
        assert_eq!(world.was_broken(), None);
        assert!(world.read_snapshot(0, LEN).await.unwrap() == world.start);
        world.target.errno.store(0, Ordering::SeqCst);
        world.write(GRANULE, 512, 8).await.unwrap();
        assert!(world.read_snapshot(0, LEN).await.unwrap() == world.start);
    });
}

/// Scenario 15: a reader fetches the snapshot under writes and gives up what it has read. It sees
/// the start state or an error, never a later byte; what it gave up takes no space any more.
#[test]
fn scenario_15_a_reader_gives_up_what_it_has_read() {
    let spilled = json!({"staging-size": 4 * GRANULE, "spill-size": 8 * GRANULE});
    for (number, options) in [json!({}), spilled].into_iter().enumerate() {
        for seed in 0..12 {
            run(seed, options.clone(), async |world| {
                world.target.delay_us.store(seed % 3 * 300, Ordering::SeqCst);
                let guests: Vec<_> = (0..3)
                    .map(|n| {
                        let disk = world.guest.clone();
                        bds_io::spawn(guest(disk, vec![0; LEN as usize], seed * 7 + n, 40))
                    })
                    .collect();
                let mut rng = Chance::new(seed);
                let mut fetched = [false; 21];
                while fetched.contains(&false) {
                    let granule = rng.below(21) as usize;
                    let at = granule as u64 * GRANULE;
                    let len = GRANULE.min(LEN - at);
                    match world.read_snapshot(at, len).await {
                        Ok(seen) => {
                            let bytes = &world.start[at as usize..(at + len) as usize];
                            assert!(seen == bytes, "options {number}, seed {seed}, {granule}");
                            assert!(!fetched[granule], "it was given up");
                        }
                        Err(error) => {
                            assert!(fetched[granule], "options {number}, seed {seed}: {error}");
                        }
                    }
                    world.reader.discard(at, len).await.unwrap();
                    fetched[granule] = true;
                }
                for guest in guests {
                    guest.await;
                }
                // Nothing is kept any more: writes pass inline.
                let copies = world.target.writes.load(Ordering::SeqCst);
                world.write(0, LEN, 9).await.unwrap();
                assert_eq!(world.target.writes.load(Ordering::SeqCst), copies);
            });
        }
    }
}
