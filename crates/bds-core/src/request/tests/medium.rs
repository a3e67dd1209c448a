//! Tests insert, eject, replacement and revocation of media.

use std::sync::Arc;

use bds_io::{Sim, SimConfig};
use bds_refcount::Release;

use crate::driver::{Prealloc, Precision, Truncate, WriteFlags};
use crate::error::ErrorKind;
use crate::event::Event;
use crate::graph::{BlockOps, NodeRef, Perm};
use crate::options::Options;
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy};
use crate::test_kit::disk::{Config, DiskGraph, On, Op};
use crate::test_kit::{ended, iov, let_tasks_run, run};

const NONE: WriteFlags = WriteFlags::empty();

fn drive(disks: &DiskGraph, writable: bool) -> Backend {
    let options = BackendOptions { name: "drive".into(), writable, ..Default::default() };
    Backend::empty(disks.graph(), options).unwrap()
}

async fn disk(disks: &DiskGraph, name: &str) -> NodeRef {
    disks.node(name, vec![7; 1024], Config::default()).await.0
}

async fn slow_disk(disks: &DiskGraph, name: &str) -> NodeRef {
    disks.node(name, vec![7; 1024], Config { turns: 20, ..Config::default() }).await.0
}

#[test]
fn insert_and_eject_keep_the_handle() {
    run(1, async {
        let disks = DiskGraph::new();
        let node = disk(&disks, "disk").await;
        let drive = drive(&disks, true);
        assert_eq!((drive.len(), drive.node().is_none()), (0, true));
        let error = drive.read(0, iov(&[0; 16], 1)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMedium);
        assert!(error.to_string().contains("backend 'drive'"), "{error}");

        let mut events = disks.graph().events();
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
        let expected = [
            Event::MediumInserted { backend: backend.clone(), node: medium.clone() },
            Event::GraphChanged { epoch: 1 },
            Event::MediumEjected { backend, node: medium },
            Event::GraphChanged { epoch: 2 },
        ];
        for event in expected {
            assert_eq!(events.try_next(), Some(event));
        }
        assert_eq!(events.try_next(), None);
    });
}

#[test]
fn a_refused_medium_changes_nothing() {
    run(2, async {
        let disks = DiskGraph::new();
        let (a, b) = (disk(&disks, "a").await, disk(&disks, "b").await);
        let ro = Config { options: Options::new().with("read-only", true), ..Config::default() };
        let (ro, _) = disks.node("ro", vec![0; 1024], ro).await;
        let drive = drive(&disks, true);
        let elsewhere = DiskGraph::new();
        let foreign = disk(&elsewhere, "foreign").await;
        let exclusive = BackendOptions {
            name: "exclusive".into(),
            shared: Perm::CONSISTENT_READ,
            ..Default::default()
        };
        let _selfish = Backend::new(&b, exclusive).unwrap();

        let check = async |node: &NodeRef, kind, words: &str| {
            let before = disks.graph().dump();
            let error = drive.insert(node).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(disks.graph().dump(), before);
        };
        check(&ro, ErrorKind::ReadOnly, "'drive'").await;
        check(&b, ErrorKind::InUse, "backend 'exclusive'").await;
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
        let disks = DiskGraph::new();
        let (a, b) = (disk(&disks, "a").await, disk(&disks, "b").await);
        let drive = drive(&disks, true);
        drive.insert(&a).await.unwrap();
        let mut events = disks.graph().events();
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
        let disks = DiskGraph::new();
        let (a, b) = (disk(&disks, "a").await, disk(&disks, "b").await);
        let drive = drive(&disks, true);
        drive.insert(&a).await.unwrap();
        let policies = ErrorPolicies { read: ErrorPolicy::Ignore, write: ErrorPolicy::Ignore };
        drive.set_policies(policies);
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
            assert_eq!(drive.policies(), policies, "nothing has changed");
        }
        assert_eq!(drive.eject().await.unwrap().unwrap().id(), a.id());
    });
}

#[test]
fn eject_waits_for_requests_and_later_ones_fail() {
    run(5, async {
        let disks = DiskGraph::new();
        let (node, state) =
            disks.node("disk", vec![7; 1024], Config { turns: 20, ..Config::default() }).await;
        let drive = drive(&disks, true);
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
        assert_eq!(state.bytes()[0], 1, "the request inside completed");
        assert_eq!(state.bytes()[32], 7, "the later one failed");
    });
}

/// Dropped at every await: the medium is in or out, and either way the drive works.
#[test]
fn a_dropped_eject_or_insert_leaves_a_working_drive() {
    for is_eject in [true, false] {
        for n in 0..200 {
            let sim = Sim::new(6, SimConfig::calm());
            let (disks, drive, node) = sim.block_on(async {
                let disks = DiskGraph::new();
                let node = slow_disk(&disks, "disk").await;
                let drive = drive(&disks, true);
                if is_eject {
                    drive.insert(&node).await.unwrap();
                }
                (disks, drive, node)
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
                disks.graph().reap().await;
                assert_eq!(disks.graph().dump(), "");
            });
            if !dropped {
                break;
            }
            assert!(n < 199, "it never ends");
        }
    }
}

#[test]
fn one_change_moves_a_medium_between_drives_or_fails_whole() {
    run(7, async {
        let disks = DiskGraph::new();
        let node = disk(&disks, "disk").await;
        let options = |name: &str| BackendOptions {
            name: name.into(),
            shared: Perm::CONSISTENT_READ,
            writable: true,
            ..Default::default()
        };
        let one = Backend::new(&node, options("one")).unwrap();
        let two = Backend::empty(disks.graph(), options("two")).unwrap();
        assert!(two.insert(&node).await.is_err(), "both write and share nothing");
        let change = || disks.graph().change().eject(&one).insert(&two, &node);
        let refused = change().insert(&one, &node).commit().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse, "the final state is checked");
        assert_eq!(
            (one.node().is_some(), two.node().is_none()),
            (true, true),
            "nothing has changed"
        );
        change().commit().await.unwrap();
        assert_eq!((one.node().is_none(), two.node().is_some()), (true, true));
        let elsewhere = DiskGraph::new();
        let foreign = elsewhere.graph().change().eject(&two).commit().await.unwrap_err();
        assert_eq!(foreign.kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn writes_to_an_inserted_write_through_medium_are_durable() {
    run(8, async {
        let disks = DiskGraph::new();
        let options = Options::new().with("cache.writeback", false);
        let (node, state) =
            disks.node("disk", vec![0; 1024], Config { options, ..Config::default() }).await;
        let drive = drive(&disks, true);
        assert!(!drive.is_writethrough());
        drive.insert(&node).await.unwrap();
        drive.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        assert!(state.take_log().contains(&Op::FlushToDisk));
    });
}

/// A medium's cache mode applies to that medium alone; the backend's setting stays.
#[test]
fn a_refused_medium_does_not_change_writethrough() {
    run(11, async {
        let disks = DiskGraph::new();
        let node = disk(&disks, "disk").await;
        let options = Options::new().with("cache.writeback", false).with("read-only", true);
        let config = Config { options, ..Config::default() };
        let (through, _) = disks.node("through", vec![0; 1024], config).await;
        let drive = drive(&disks, true);
        let refused = drive.insert(&through).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        assert!(!drive.is_writethrough(), "nothing has changed");
        drive.set_writethrough(true);
        drive.insert(&node).await.unwrap();
        assert!(drive.is_writethrough(), "a medium never turns it off");
    });
}

#[test]
fn a_change_inserts_only_into_an_empty_drive() {
    run(12, async {
        let disks = DiskGraph::new();
        let (one, two) = (disk(&disks, "one").await, disk(&disks, "two").await);
        let drive = drive(&disks, true);
        drive.insert(&one).await.unwrap();
        let change = disks.graph().change().insert(&drive, &two);
        assert_eq!(change.commit().await.unwrap_err().kind(), ErrorKind::InUse);
        assert_eq!(drive.node().unwrap().id(), one.id(), "nothing has changed");
    });
}

/// Requests wait for a decision, and the medium is ejected before: revoke ends their waiting.
#[test]
fn revoke_of_an_empty_drive_fails_stopped_requests() {
    run(13, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![7; 1024], Config::default()).await;
        let policy = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let drive = drive(&disks, true);
        drive.set_policies(policy);
        drive.insert(&node).await.unwrap();
        state.fail_with(On::Write, ErrorKind::Io);
        let guest = drive.clone();
        let mut stopped =
            bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
        assert!(ended(&mut stopped).await.is_none());
        assert!(drive.eject().await.unwrap().is_some(), "a stopped request is not inside");
        assert!(ended(&mut stopped).await.is_none(), "the decision is still to come");
        drive.revoke().await.unwrap();
        assert_eq!(stopped.await.unwrap_err().kind(), ErrorKind::NoMedium);
        assert_eq!(drive.policies(), ErrorPolicies::REPORT);
    });
}

#[test]
fn revoke_drops_access_and_keeps_handle_and_device() {
    run(9, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![7; 1024], Config::default()).await;
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
        let error = stopped.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoMedium, "a stopped request fails");
        assert_eq!(device.backend().device().as_deref(), Some("virtio0"));
        assert_eq!(drive.policies(), ErrorPolicies::REPORT);
        assert_eq!(node.release(), Release::Last, "nothing holds the node");
        drive.revoke().await.unwrap();
    });
}

#[test]
fn access_is_set_with_and_without_a_medium() {
    run(10, async {
        let disks = DiskGraph::new();
        let node = disk(&disks, "disk").await;
        let other = Backend::new(&node, BackendOptions { writable: true, ..Default::default() });
        let other = other.unwrap();
        let drive = drive(&disks, false);
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
fn concurrent_ejects_return_the_medium_once() {
    for seed in 0..20 {
        run(seed, async {
            let disks = DiskGraph::new();
            let node = slow_disk(&disks, "disk").await;
            let drive = Arc::new(drive(&disks, true));
            drive.insert(&node).await.unwrap();
            // Both wait to eject the same medium.
            let guest = drive.clone();
            let inside = bds_io::spawn(async move { guest.write(0, iov(&[1; 16], 1), NONE).await });
            while drive.in_flight() == 0 {
                bds_io::yield_now().await;
            }
            let eject = |drive: Arc<Backend>| bds_io::spawn(async move { drive.eject().await });
            let (a, b) = (eject(drive.clone()), eject(drive.clone()));
            inside.await.unwrap();
            let_tasks_run().await;
            let won = [a.await.unwrap(), b.await.unwrap()].iter().flatten().count();
            assert_eq!(won, 1, "seed {seed}");
        });
    }
}
