//! Media put in, taken out, exchanged and taken away.

use std::sync::Arc;

use bds_io::{Sim, SimConfig};
use bds_refcount::Release;

use super::fake::{Config, House, On, Op};
use super::{ended, iov, run, settle};
use crate::driver::{Prealloc, Precision, Truncate, WriteFlags};
use crate::error::ErrorKind;
use crate::event::Event;
use crate::graph::{BlockOps, NodeRef, Perm};
use crate::options::Options;
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy};

const NONE: WriteFlags = WriteFlags::empty();

fn drive(house: &House, writable: bool) -> Backend {
    let options = BackendOptions { name: "drive".into(), writable, ..Default::default() };
    Backend::empty(house.graph(), options).unwrap()
}

async fn disk(house: &House, name: &str) -> NodeRef {
    house.node(name, vec![7; 1024], Config::default()).await.0
}

async fn slow_disk(house: &House, name: &str) -> NodeRef {
    house.node(name, vec![7; 1024], Config { turns: 20, ..Config::default() }).await.0
}

#[test]
fn a_medium_goes_in_and_comes_out_and_the_handle_stays() {
    run(1, async {
        let house = House::new();
        let node = disk(&house, "disk").await;
        let drive = drive(&house, true);
        assert_eq!((drive.len(), drive.node().is_none()), (0, true));
        let error = drive.read(0, iov(&[0; 16], 1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMedium);
        assert!(error.to_string().contains("backend 'drive'"), "{error}");

        let mut events = house.graph().events();
        let count = node.count();
        drive.insert(&node).await.unwrap();
        assert_eq!(node.count(), count + 1, "its own reference, the caller's untouched");
        drive.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        assert_eq!(drive.len(), 1024);

        let out = drive.eject().await.unwrap().unwrap();
        assert_eq!(out.id(), node.id());
        assert!(drive.eject().await.unwrap().is_none(), "nothing is in");
        for result in [
            drive.read(0, iov(&[0; 16], 1)).await,
            drive.write(0, iov(&[0; 16], 1), NONE).await,
            drive.flush().await,
            drive.discard(0, 16).await,
            drive.write_compressed(0, iov(&[0; 16], 1)).await,
            drive.info().await.map(drop),
            drive.block_status(0, 16, Precision::Exact).await.map(drop),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::NoMedium);
        }
        drop(out);
        assert_eq!(node.count(), count);
        let (backend, medium) = ("drive".to_owned(), "disk".to_owned());
        let told = [
            Event::MediumInserted { backend: backend.clone(), node: medium.clone() },
            Event::GraphChanged { epoch: 1 },
            Event::MediumEjected { backend, node: medium },
            Event::GraphChanged { epoch: 2 },
        ];
        for event in told {
            assert_eq!(events.try_next(), Some(event));
        }
        assert_eq!(events.try_next(), None);
    });
}

#[test]
fn a_refused_medium_changes_nothing() {
    run(2, async {
        let house = House::new();
        let (a, b) = (disk(&house, "a").await, disk(&house, "b").await);
        let ro = Config { options: Options::new().with("read-only", true), ..Config::default() };
        let (ro, _) = house.node("ro", vec![0; 1024], ro).await;
        let drive = drive(&house, true);
        let elsewhere = House::new();
        let foreign = disk(&elsewhere, "foreign").await;
        let selfish = BackendOptions {
            name: "selfish".into(),
            shared: Perm::CONSISTENT_READ,
            ..Default::default()
        };
        let _selfish = Backend::new(&b, selfish).unwrap();

        let check = async |node: &NodeRef, kind, words: &str| {
            let before = house.graph().dump();
            let error = drive.insert(node).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(house.graph().dump(), before);
        };
        check(&ro, ErrorKind::ReadOnly, "'drive'").await;
        check(&b, ErrorKind::InUse, "backend 'selfish'").await;
        check(&foreign, ErrorKind::InvalidInput, "another graph").await;
        drive.insert(&a).await.unwrap();
        check(&a, ErrorKind::InUse, "has the medium 'a'").await;
        let error = drive.replace_medium(&b).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert_eq!(drive.node().unwrap().id(), a.id(), "the old medium stays");
    });
}

#[test]
fn a_medium_is_replaced_in_one_step() {
    run(3, async {
        let house = House::new();
        let (a, b) = (disk(&house, "a").await, disk(&house, "b").await);
        let drive = drive(&house, true);
        drive.insert(&a).await.unwrap();
        let mut events = house.graph().events();
        drive.replace_medium(&b).await.unwrap();
        assert_eq!(drive.node().unwrap().id(), b.id());
        assert_eq!(a.count(), 1, "the drive's reference to the old one is given up");
        let replaced =
            Event::MediumReplaced { backend: "drive".into(), from: "a".into(), node: "b".into() };
        assert_eq!(events.try_next(), Some(replaced));
    });
}

#[test]
fn blockers_stop_eject_replace_revoke_and_resize() {
    run(4, async {
        let house = House::new();
        let (a, b) = (disk(&house, "a").await, disk(&house, "b").await);
        let drive = drive(&house, true);
        drive.insert(&a).await.unwrap();
        let asked = ErrorPolicies { read: ErrorPolicy::Ignore, write: ErrorPolicy::Ignore };
        drive.set_policies(asked);
        let in_use = |error: crate::Error| {
            assert_eq!(error.kind(), ErrorKind::InUse);
            assert!(error.to_string().contains("a backup runs"), "{error}");
        };
        let len = 2048;
        let grow = Truncate { len, exact: true, prealloc: Prealloc::Off, zero_new: false };
        {
            let _blocker = a.block(BlockOps::EJECT, "a backup runs");
            in_use(drive.eject().await.unwrap_err());
            in_use(drive.replace_medium(&b).await.unwrap_err());
            drive.truncate(grow).await.unwrap();
        }
        {
            let _blocker = a.block(BlockOps::RESIZE | BlockOps::DELETE, "a backup runs");
            in_use(drive.truncate(grow).await.unwrap_err());
            in_use(drive.revoke().await.unwrap_err());
            assert_eq!(drive.policies(), asked, "nothing has changed");
        }
        assert_eq!(drive.eject().await.unwrap().unwrap().id(), a.id());
    });
}

#[test]
fn eject_waits_for_requests_inside_and_later_ones_find_no_medium() {
    run(5, async {
        let house = House::new();
        let (node, state) =
            house.node("disk", vec![7; 1024], Config { turns: 20, ..Config::default() }).await;
        let drive = drive(&house, true);
        drive.insert(&node).await.unwrap();
        let guest = drive.clone();
        let first = bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
        while drive.in_flight() == 0 {
            bds_io::yield_now().await;
        }
        let ejecting = drive.clone();
        let eject = bds_io::spawn(async move { ejecting.eject().await });
        while node.quiesce_count() == 0 {
            bds_io::yield_now().await;
        }
        let late = drive.write(32, iov(&[2; 16], 1), NONE).await;
        assert_eq!(late.unwrap_err().kind(), ErrorKind::NoMedium);
        first.await.unwrap();
        assert!(eject.await.unwrap().is_some());
        assert_eq!(state.bytes()[0], 1, "what was inside was done");
        assert_eq!(state.bytes()[32], 7, "what came later was not");
    });
}

/// Dropped at every await: the medium is in or out, and either way the drive goes on.
#[test]
fn a_dropped_eject_or_insert_leaves_a_working_drive() {
    for is_eject in [true, false] {
        for n in 0..200 {
            let sim = Sim::new(6, SimConfig::calm());
            let (house, drive, node) = sim.block_on(async {
                let house = House::new();
                let node = slow_disk(&house, "disk").await;
                let drive = drive(&house, true);
                if is_eject {
                    drive.insert(&node).await.unwrap();
                }
                (house, drive, node)
            });
            let guest = drive.clone();
            let busy = sim.spawn(async move {
                let _either = guest.write(0, iov(&[1; 16], 1), NONE).await;
            });
            let (mover, medium) = (drive.clone(), node.clone());
            let dropped = sim.drop_at(
                async move {
                    match is_eject {
                        true => drop(mover.eject().await.unwrap()),
                        false => mover.insert(&medium).await.unwrap(),
                    }
                },
                n,
            );
            sim.run_until_idle();
            sim.block_on(async {
                busy.await;
                if drive.node().is_none() {
                    drive.insert(&node).await.unwrap();
                }
                drive.write(0, iov(&[2; 16], 1), NONE).await.unwrap();
                assert_eq!((drive.in_flight(), node.in_flight(), node.quiesce_count()), (0, 0, 0));
                drop(drive);
                assert_eq!(node.release(), Release::Last);
                house.graph().reap().await;
                assert_eq!(house.graph().dump(), "");
            });
            if !dropped {
                break;
            }
            assert!(n < 199, "it never ends");
        }
    }
}

#[test]
fn a_bigger_change_moves_a_medium_from_one_drive_to_another_or_not_at_all() {
    run(7, async {
        let house = House::new();
        let node = disk(&house, "disk").await;
        let options = |name: &str| BackendOptions {
            name: name.into(),
            shared: Perm::CONSISTENT_READ,
            writable: true,
            ..Default::default()
        };
        let one = Backend::new(&node, options("one")).unwrap();
        let two = Backend::empty(house.graph(), options("two")).unwrap();
        assert!(two.insert(&node).await.is_err(), "both write and share nothing");
        let change = || house.graph().change().eject(&one).insert(&two, &node);
        let frozen_out = change().insert(&one, &node).commit().await.unwrap_err();
        assert_eq!(frozen_out.kind(), ErrorKind::InUse, "the outcome counts");
        assert_eq!(
            (one.node().is_some(), two.node().is_none()),
            (true, true),
            "nothing has changed"
        );
        change().commit().await.unwrap();
        assert_eq!((one.node().is_none(), two.node().is_some()), (true, true));
        let elsewhere = House::new();
        let foreign = elsewhere.graph().change().eject(&two).commit().await.unwrap_err();
        assert_eq!(foreign.kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn writes_to_an_inserted_write_through_medium_are_durable() {
    run(8, async {
        let house = House::new();
        let options = Options::new().with("cache.writeback", false);
        let (node, state) =
            house.node("disk", vec![0; 1024], Config { options, ..Config::default() }).await;
        let drive = drive(&house, true);
        assert!(!drive.is_writethrough());
        drive.insert(&node).await.unwrap();
        drive.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        assert!(state.take_log().contains(&Op::FlushToDisk));
    });
}

/// What a medium was inserted with counts for it alone; what the user asked for stays.
#[test]
fn writethrough_is_the_users_and_a_refused_medium_does_not_change_it() {
    run(11, async {
        let house = House::new();
        let node = disk(&house, "disk").await;
        let options = Options::new().with("cache.writeback", false).with("read-only", true);
        let config = Config { options, ..Config::default() };
        let (through, _) = house.node("through", vec![0; 1024], config).await;
        let drive = drive(&house, true);
        let refused = drive.insert(&through).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        assert!(!drive.is_writethrough(), "nothing has changed");
        drive.set_writethrough(true);
        drive.insert(&node).await.unwrap();
        assert!(drive.is_writethrough(), "a medium never turns it off");
    });
}

#[test]
fn a_change_puts_a_medium_only_into_an_empty_drive() {
    run(12, async {
        let house = House::new();
        let (one, two) = (disk(&house, "one").await, disk(&house, "two").await);
        let drive = drive(&house, true);
        drive.insert(&one).await.unwrap();
        let change = house.graph().change().insert(&drive, &two);
        assert_eq!(change.commit().await.unwrap_err().kind(), ErrorKind::InUse);
        assert_eq!(drive.node().unwrap().id(), one.id(), "nothing has changed");
    });
}

/// Requests wait for a decision, and the medium goes before that: there is nothing to revoke but their waiting.
#[test]
fn revoke_of_an_empty_drive_tells_those_who_wait() {
    run(13, async {
        let house = House::new();
        let (node, state) = house.node("disk", vec![7; 1024], Config::default()).await;
        let policy = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let drive = drive(&house, true);
        drive.set_policies(policy);
        drive.insert(&node).await.unwrap();
        state.fail_with(On::Write, ErrorKind::Io);
        let guest = drive.clone();
        let mut stopped =
            bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
        assert!(ended(&mut stopped).await.is_none());
        assert!(drive.eject().await.unwrap().is_some(), "who waits is not inside");
        assert!(ended(&mut stopped).await.is_none(), "the decision is still to come");
        drive.revoke().await.unwrap();
        assert_eq!(stopped.await.unwrap_err().kind(), ErrorKind::NoMedium);
        assert_eq!(drive.policies(), ErrorPolicies::REPORT);
    });
}

#[test]
fn revoke_takes_access_and_leaves_the_handle_and_the_device() {
    run(9, async {
        let house = House::new();
        let (node, state) = house.node("disk", vec![7; 1024], Config::default()).await;
        let options = BackendOptions {
            name: "drive".into(),
            writable: true,
            policy: Some(ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop }),
            ..Default::default()
        };
        let drive = Backend::new(&node, options).unwrap();
        let device = drive.attach_device("virtio0").unwrap();
        state.fail_with(On::Write, ErrorKind::Io);
        let guest = drive.clone();
        let mut stopped =
            bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
        assert!(ended(&mut stopped).await.is_none());
        drive.revoke().await.unwrap();
        let told = stopped.await.unwrap_err();
        assert_eq!(told.kind(), ErrorKind::NoMedium, "who waited for a decision is told");
        assert_eq!(device.backend().device().as_deref(), Some("virtio0"));
        assert_eq!(drive.policies(), ErrorPolicies::REPORT);
        assert_eq!(node.release(), Release::Last, "nothing holds the node");
        drive.revoke().await.unwrap();
    });
}

#[test]
fn access_can_be_asked_for_with_and_without_a_medium() {
    run(10, async {
        let house = House::new();
        let node = disk(&house, "disk").await;
        let other = Backend::new(&node, BackendOptions { writable: true, ..Default::default() });
        let other = other.unwrap();
        let drive = drive(&house, false);
        drive.set_access(Perm::CONSISTENT_READ, Perm::CONSISTENT_READ).await.unwrap();
        assert_eq!(drive.insert(&node).await.unwrap_err().kind(), ErrorKind::InUse);
        drive.set_access(Perm::CONSISTENT_READ, Perm::all()).await.unwrap();
        drive.insert(&node).await.unwrap();
        let refused = drive.set_access(Perm::CONSISTENT_READ, Perm::empty()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        assert_eq!(drive.access().shared, Perm::all(), "nothing has changed");
        drop(other);
        drive.set_access(Perm::CONSISTENT_READ, Perm::empty()).await.unwrap();
    });
}

#[test]
fn two_ejects_at_once_give_the_medium_to_one_of_them() {
    for seed in 0..20 {
        run(seed, async {
            let house = House::new();
            let node = slow_disk(&house, "disk").await;
            let drive = Arc::new(drive(&house, true));
            drive.insert(&node).await.unwrap();
            // Both wait for it, each with the same medium in mind.
            let guest = drive.clone();
            let inside = bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
            while drive.in_flight() == 0 {
                bds_io::yield_now().await;
            }
            let eject = |drive: Arc<Backend>| bds_io::spawn(async move { drive.eject().await });
            let (a, b) = (eject(drive.clone()), eject(drive.clone()));
            inside.await.unwrap();
            settle().await;
            let won = [a.await.unwrap(), b.await.unwrap()].iter().flatten().count();
            assert_eq!(won, 1, "seed {seed}");
        });
    }
}
