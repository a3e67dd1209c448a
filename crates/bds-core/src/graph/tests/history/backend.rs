//! Bugs of QEMU around backends. Row numbers are those of `docs/lifecycle-bugs.md`.

use std::sync::Arc;

use bds_io::{IoVec, Task};
use bds_refcount::Release;

use crate::driver::{BoxFuture, WriteFlags};
use crate::error::{ErrorKind, Result};
use crate::event::Event;
use crate::graph::{Access, BlockOps, NodeRef, Perm, ShutdownStage, Stoppable};
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
use crate::test_kit::logging::{Fixture, run};

const READ: Access = Access::READ;

fn options(name: &str) -> BackendOptions {
    BackendOptions { name: name.into(), writable: true, ..Default::default() }
}

async fn file(fixture: &Fixture, name: &'static str) -> NodeRef {
    fixture.plain(name);
    fixture.open(&format!("driver=file,filename={name},node-name={name}")).await
}

async fn filter(fixture: &Fixture, name: &str, below: &str) -> NodeRef {
    fixture.open(&format!("driver=pass,node-name={name},file={below}")).await
}

fn reading(backend: &Backend) -> Task<Result<()>> {
    let backend = backend.clone();
    bds_io::spawn(async move { backend.read(0, bds_io::Buf::zeroed(16, 16).iov()).await })
}

async fn until_inside(backend: &Backend) {
    while backend.in_flight() == 0 {
        bds_io::yield_now().await;
    }
}

fn kind(result: Result<()>) -> ErrorKind {
    result.expect_err("there is no medium").kind()
}

/// Row 1: `drive_del` destroyed the root node while the device held a raw pointer to it.
#[test]
fn uaf_drive_del_under_device() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let id = node.id();
        let device = Backend::new(&node, options("d0")).unwrap().attach_device("ide0").unwrap();
        drop(node);
        let inside = reading(device.backend());
        until_inside(device.backend()).await;
        device.backend().revoke().await.unwrap();
        inside.await.unwrap();
        fixture.graph.reap().await;
        assert!(fixture.graph.acquire(id).is_err(), "the node is closed, and its id is stale");
        let write = device.backend().write(0, IoVec::default(), WriteFlags::empty());
        assert_eq!(kind(write.await), ErrorKind::NoMedium);
        assert_eq!(kind(device.backend().flush().await), ErrorKind::NoMedium);
        assert_eq!(device.backend().device().as_deref(), Some("ide0"));
        // The drive works with a new medium.
        let other = file(&fixture, "other").await;
        device.backend().insert(&other).await.unwrap();
        reading(device.backend()).await.unwrap();
    });
}

/// Row 2: the drive's record was freed while its node was still held.
#[test]
fn record_of_a_drive_lives_as_long_as_the_drive() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, BackendOptions { claims_name: true, ..options("d0") });
        let device = drive.unwrap().attach_device("ide0").unwrap();
        reading(device.backend()).await.unwrap();
        let medium = device.backend().eject().await.unwrap().unwrap();
        // Name, device, counts and policies belong to the drive and need no node; the node needs no
        // drive.
        let drive = fixture.graph.backend("d0").unwrap();
        assert_eq!(drive.device().as_deref(), Some("ide0"));
        assert_eq!(drive.stats().totals(crate::stats::Operation::Read).ops, 1);
        drop((device, drive));
        assert!(fixture.graph.backend("d0").is_err());
        assert_eq!(medium.id(), node.id());
        assert_eq!((medium.release(), node.release()), (Release::NotLast, Release::Last));
    });
}

/// Row 3: an export released its node at "close" while clients still used the export.
#[test]
fn node_stays_until_the_last_user_of_the_export_leaves() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let export = Backend::new(&node, options("export")).unwrap();
        let client = export.clone();
        drop(export); // the server has closed it
        drop(node);
        reading(&client).await.unwrap();
        assert_eq!(fixture.graph.nodes().len(), 1);
        drop(client);
        fixture.graph.reap().await;
        assert_eq!(fixture.graph.dump(), "");
    });
}

/// Row 4: the root was freed while a flush had yielded; the flush's completion read the root.
#[test]
fn uaf_eject_during_a_flush() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, options("d0")).unwrap();
        let guest = drive.clone();
        let flush = bds_io::spawn(async move { guest.flush().await });
        until_inside(&drive).await;
        assert!(drive.eject().await.unwrap().is_some());
        assert_eq!(drive.in_flight(), 0, "eject waited for it");
        flush.await.unwrap();
        assert_eq!(node.release(), Release::Last);
    });
}

/// Row 5: the edge was freed first and the field cleared later; a drain of everything in between
/// read it.
#[test]
fn uaf_drain_all_during_an_eject() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, options("d0")).unwrap();
        drop(node);
        let inside = reading(&drive);
        until_inside(&drive).await;
        let (graph, ejecting) = (fixture.graph.clone(), drive.clone());
        let all = bds_io::spawn(async move { drop(graph.drain_all().await) });
        let out = bds_io::spawn(async move { ejecting.eject().await.map(drop) });
        all.await;
        out.await.unwrap();
        inside.await.unwrap();
        assert!(drive.node().is_none());
        drop(fixture.graph.drain_all().await);
        fixture.graph.reap().await;
        assert_eq!(fixture.graph.dump(), "");
    });
}

/// Row 7: a drain remembered the node at its root; a filter there was removed meanwhile, and the
/// end of the drain went to a freed node.
#[test]
fn uaf_filter_removed_during_a_backends_drain() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let top = filter(&fixture, "top", "disk").await;
        let drive = Backend::new(&top, options("d0")).unwrap();
        let inside = reading(&drive);
        until_inside(&drive).await;
        let draining = drive.clone();
        let drain = bds_io::spawn(async move { draining.drain().await });
        bds_io::yield_now().await;
        fixture.graph.drop_filter(&top).await.unwrap();
        let drained = drain.await;
        inside.await.unwrap();
        top.close().await.unwrap();
        let late = reading(&drive);
        drop(drained);
        late.await.unwrap();
        assert_eq!(drive.node().unwrap().id(), node.id());
        assert_eq!(node.quiesce_count(), 0);
    });
}

/// Row 29: at refcount zero a drain ran a callback that took and released a reference; the second
/// zero deleted the object again.
#[test]
fn resurrection_is_impossible_after_the_last_handle() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let named = BackendOptions { claims_name: true, ..options("d0") };
        let drive = Backend::new(&node, named.clone()).unwrap();
        let mut events = fixture.graph.events();
        let inside = reading(&drive);
        until_inside(&drive).await;
        // The request in flight holds the backend: the drain happens while the count is positive.
        fixture.graph.own_backend(drive).unwrap();
        assert_eq!(fixture.graph.del_backend("d0").unwrap(), Release::NotLast);
        inside.await.unwrap();
        assert!(fixture.graph.backend("d0").is_err(), "it cannot be acquired again");
        assert!(fixture.graph.backends().is_empty());
        assert_eq!(node.release(), Release::Last);
        fixture.graph.reap().await;
        let closings = std::iter::from_fn(|| events.try_next())
            .filter(|event| matches!(event, Event::NodeClosed { .. }));
        assert_eq!(closings.count(), 1);
        Backend::empty(&fixture.graph, named).unwrap();
    });
}

/// Row 37: an error path did not decrement the in-flight count, and the next drain hung.
#[test]
fn hang_failed_requests_are_counted_out() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, options("d0")).unwrap();
        let past = drive.read(510, bds_io::Buf::zeroed(16, 16).iov()).await;
        assert_eq!(past.unwrap_err().kind(), ErrorKind::OutOfRange);
        let reader = Backend::new(&node, BackendOptions::default()).unwrap();
        let denied = reader.write(0, bds_io::Buf::zeroed(16, 16).iov(), WriteFlags::empty()).await;
        assert_eq!(denied.unwrap_err().kind(), ErrorKind::PermissionDenied);
        node.poison();
        assert!(reader.flush().await.is_err());
        let medium = drive.eject().await.unwrap();
        assert!(drive.flush().await.is_err());
        drop(medium);
        for backend in [&drive, &reader] {
            assert_eq!(backend.in_flight(), 0);
            drop(backend.drain().await);
        }
        assert_eq!(node.in_flight(), 0);
    });
}

/// Row 48: a queued request counted as in flight, so the drain waited for a request that waited for
/// the end of the drain.
#[test]
fn hang_queued_is_not_in_flight() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, options("d0")).unwrap();
        let outer = fixture.graph.drain(&node).await;
        let queued = reading(&drive);
        for _ in 0..20 {
            bds_io::yield_now().await;
        }
        assert_eq!((drive.in_flight(), node.in_flight()), (0, 0));
        let inner = fixture.graph.drain_all().await;
        let own = drive.drain().await;
        let medium = drive.eject().await.unwrap().unwrap();
        drive.insert(&medium).await.unwrap();
        drop((outer, inner, own));
        queued.await.unwrap();
    });
}

/// Records, at its stage of the shutdown, whether the drive still has its medium.
struct MediumRecorder {
    drive: Backend,
    seen: std::sync::Mutex<Option<bool>>,
}

impl Stoppable for MediumRecorder {
    fn name(&self) -> String {
        "recorder".into()
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        *self.seen.lock().unwrap() = Some(self.drive.node().is_some());
        Box::pin(async { Ok(()) })
    }
}

/// Row 51: exports were closed after the drain, and hung in the drained queue.
#[test]
fn hang_shutdown_ejects_after_exports_and_jobs_and_is_idempotent() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        fixture.graph.own(node.clone()).unwrap();
        let drive = Backend::new(&node, BackendOptions { claims_name: true, ..options("d0") });
        let drive = drive.unwrap();
        fixture.graph.own_backend(drive.clone()).unwrap();
        let blocked = file(&fixture, "blocked").await;
        let _blocker = blocked.block(BlockOps::all(), "a job that never ends");
        let other = Backend::new(&blocked, options("d1")).unwrap();
        drop((node, blocked));
        let recorder =
            || Arc::new(MediumRecorder { drive: drive.clone(), seen: Default::default() });
        let (export, job) = (recorder(), recorder());
        let export_dyn: Arc<dyn Stoppable> = export.clone();
        let job_dyn: Arc<dyn Stoppable> = job.clone();
        fixture.graph.on_shutdown(ShutdownStage::Jobs, &job_dyn);
        fixture.graph.on_shutdown(ShutdownStage::Exports, &export_dyn);
        // A request is queued in a drained section that the shutdown does not own.
        let section = other.drain().await;
        let queued = reading(&other);
        let inside = reading(&drive);
        until_inside(&drive).await;
        let mut events = fixture.graph.events();

        let report = fixture.graph.shutdown().await;
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        report.check_leaks().unwrap();
        assert_eq!(report.closed.len(), 2);
        inside.await.unwrap();
        assert_eq!(*export.seen.lock().unwrap(), Some(true), "exports stop before the eject");
        assert_eq!(*job.seen.lock().unwrap(), Some(true), "jobs too");
        let seen: Vec<Event> = std::iter::from_fn(|| events.try_next()).collect();
        let place = |wanted: fn(&Event) -> bool| seen.iter().position(wanted).unwrap();
        let ejected = place(|event| matches!(event, Event::MediumEjected { .. }));
        let closed = place(|event| matches!(event, Event::NodeClosed { .. }));
        assert!(
            ejected < closed,
            "media are ejected before the monitor's nodes are closed: {seen:?}"
        );
        assert_eq!(seen.last(), Some(&Event::GraphShutdown));
        assert!(drive.node().is_none() && other.node().is_none());
        drop(section);
        assert_eq!(kind(queued.await), ErrorKind::Cancelled);

        let again = fixture.graph.shutdown().await;
        assert!(again.failed.is_empty() && again.closed.is_empty());
        assert_eq!(
            fixture.graph.backends().len(),
            2,
            "the monitor's list is empty, users' handles live"
        );
        drop((export, job, export_dyn, job_dyn, drive));
        assert!(fixture.graph.backend("d0").is_err());
    });
}

/// Row 53: code relied on a release destroying the backend at once to drop its permissions; an
/// outer drain held it a little longer.
#[test]
fn permissions_are_dropped_without_a_release() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let exclusive = BackendOptions { shared: Perm::CONSISTENT_READ, ..options("target") };
        let target = Backend::new(&node, exclusive).unwrap();
        let held = target.drain().await;
        assert!(Backend::new(&node, options("other")).is_err());
        target.set_access(READ.perm, Perm::all()).await.unwrap();
        let other = Backend::new(&node, options("other")).unwrap();
        drop(other);
        target.eject().await.unwrap();
        assert_eq!(held.backend().in_flight(), 0, "the holder has a valid backend");
        drop(target);
        assert_eq!(node.release(), Release::Last, "no release of a backend was needed");
    });
}

/// Row 55: after an append, a subscriber of a backend was subscribed at one node and unsubscribed
/// at another.
#[test]
fn subscriptions_follow_the_backend_and_not_the_node() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let drive = Backend::new(&node, options("d0")).unwrap();
        let mut events = fixture.graph.events();
        let top = filter(&fixture, "top", "disk").await;
        fixture.graph.insert_filter(&node, &top).await.unwrap();
        fixture.graph.drop_filter(&top).await.unwrap();
        let mut moves = Vec::new();
        while let Some(event) = events.try_next() {
            if let Event::MediumReplaced { backend, from, node } = event {
                moves.push(format!("{backend}: {from} -> {node}"));
            }
        }
        assert_eq!(moves, ["d0: disk -> top", "d0: top -> disk"]);
        let (count, drives) = (node.count(), fixture.graph.backends().len());
        drop(events);
        assert_eq!((node.count(), drives), (count, 1), "a subscription holds nothing");
        drop(drive);
    });
}

/// Every numbered step of a move fails once: nothing changes, and the next attempt succeeds.
#[test]
fn a_move_that_fails_at_any_step_changes_nothing() {
    run(|fixture| async move {
        let (a, b) = (file(&fixture, "a").await, file(&fixture, "b").await);
        let drive = Backend::new(&a, options("d0")).unwrap();
        type Verb = for<'a> fn(&'a Backend, &'a NodeRef) -> BoxFuture<'a, Result<()>>;
        let verbs: [Verb; 3] = [
            |drive, b| Box::pin(drive.replace_medium(b)),
            |drive, _| Box::pin(async move { drive.eject().await.map(drop) }),
            |drive, b| Box::pin(drive.insert(b)),
        ];
        for verb in verbs {
            for step in 0..20 {
                let before = (fixture.graph.dump(), fixture.graph.epoch());
                fixture.graph.0.faults.set(Some(step));
                let done = verb(&drive, &b).await;
                let struck = fixture.graph.0.faults.has_struck();
                fixture.graph.0.faults.set(None);
                assert_eq!(struck, done.is_err(), "step {step}: {done:?}");
                if done.is_ok() {
                    break;
                }
                assert_eq!((fixture.graph.dump(), fixture.graph.epoch()), before, "step {step}");
                assert_eq!((a.quiesce_count(), b.quiesce_count(), drive.in_flight()), (0, 0, 0));
                assert!(step < 19, "it never succeeds");
            }
        }
    });
}

/// Queries of a drive hide the filters that jobs inserted.
#[test]
fn implicit_filters_are_hidden_in_queries_of_backends() {
    run(|fixture| async move {
        let node = file(&fixture, "disk").await;
        let text = "driver=pass,node-name=hidden,file=disk";
        let flags = crate::driver::OpenFlags { is_implicit: true, ..Default::default() };
        let opened = fixture.graph.open_with(crate::Options::parse(text).unwrap(), flags).await;
        let hidden = opened.unwrap();
        let drive = Backend::new(&hidden, options("d0")).unwrap();
        assert_eq!(drive.node().unwrap().name(), "hidden");
        assert_eq!(drive.shown_node().unwrap().id(), node.id());
        let shown = fixture.graph.query_backends();
        assert_eq!(shown[0]["inserted"]["node-name"], "disk");
        // Any number of filters.
        let text = "driver=pass,node-name=hidden2,file=hidden";
        let opened = fixture.graph.open_with(crate::Options::parse(text).unwrap(), flags).await;
        drive.replace_medium(&opened.unwrap()).await.unwrap();
        assert_eq!(drive.node().unwrap().name(), "hidden2");
        assert_eq!(drive.shown_node().unwrap().id(), node.id());
        assert_eq!(fixture.graph.query_backends()[0]["inserted"]["node-name"], "disk");
    });
}

/// A medium is revoked while requests of its device wait for a decision that nothing else would
/// make.
#[test]
fn hang_revoked_while_requests_are_stopped() {
    run(|fixture| async move {
        fixture.plain("disk");
        let node = fixture.open("driver=file,filename=disk,node-name=disk,fail-flush=on").await;
        let stop = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let options = BackendOptions { policy: Some(stop), ..options("d0") };
        let device = Backend::new(&node, options).unwrap().attach_device("ide0").unwrap();
        device.backend().set_policies(stop);
        drop(node);
        let block = || bds_io::Buf::zeroed(16, 16).iov();
        device.backend().write(0, block(), WriteFlags::empty()).await.unwrap();
        let guest = device.backend().clone();
        let stopped = bds_io::spawn(async move { guest.flush().await });
        while device.backend().io_status() == IoStatus::Ok {
            bds_io::yield_now().await;
        }
        let queued = reading(device.backend());
        device.backend().revoke().await.unwrap();
        assert_eq!(kind(stopped.await), ErrorKind::NoMedium);
        assert_eq!(kind(queued.await), ErrorKind::NoMedium);
        assert_eq!(device.backend().io_status(), IoStatus::Ok);
        assert_eq!(device.backend().in_flight(), 0);
        let reports = fixture.graph.reap().await;
        assert_eq!(reports.len(), 1, "the medium is closed and reports the loss");
        assert!(reports[0].flush_error.is_some());
        // The device works with a new medium.
        let other = file(&fixture, "other").await;
        device.backend().insert(&other).await.unwrap();
        reading(device.backend()).await.unwrap();
    });
}
