//! Tests error policies: report, ignore, stop, and stop on ENOSPC.

use crate::driver::{Attempt, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::event::{ErrorAction, Event};
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy, IoStatus};
use crate::stats::Operation;
use crate::test_kit::disk::{Config, DiskGraph, On, State};
use crate::test_kit::{ended, iov, let_tasks_run, run};

const NONE: WriteFlags = WriteFlags::empty();

async fn disk(
    disks: &DiskGraph,
    inline: bool,
    read: ErrorPolicy,
    write: ErrorPolicy,
) -> (Backend, std::sync::Arc<State>) {
    let config = Config { inline, ..Config::default() };
    let (node, state) = disks.node("disk", vec![0; 1024], config).await;
    let policy = ErrorPolicies { read, write };
    let name = "d0".to_owned();
    let options =
        BackendOptions { name, writable: true, policy: Some(policy), ..Default::default() };
    (Backend::new(&node, options).unwrap(), state)
}

fn writing(disk: &Backend, offset: u64) -> bds_io::Task<crate::Result<()>> {
    let disk = disk.clone();
    bds_io::spawn(async move { disk.write(offset, iov(&[1; 16], 1), NONE).await })
}

/// A device gets QEMU's defaults; a tool, which could not decide, gets every error and is never
/// stopped.
#[test]
fn defaults_depend_on_whether_there_is_a_device() {
    run(8, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let options = BackendOptions { writable: true, ..Default::default() };
        let disk = Backend::new(&node, options).unwrap();
        state.fail_with(On::Write, ErrorKind::NoSpace);
        let mut reported = writing(&disk, 0);
        assert_eq!(ended(&mut reported).await.unwrap().unwrap_err().kind(), ErrorKind::NoSpace);
        let device = disk.attach_device("virtio0").unwrap();
        let policies = disk.policies();
        assert_eq!((policies.read, policies.write), (ErrorPolicy::Report, ErrorPolicy::Enospc));
        let mut held = writing(&disk, 0);
        assert!(ended(&mut held).await.is_none());
        disk.set_policies(ErrorPolicies::REPORT);
        disk.resume();
        assert!(ended(&mut held).await.unwrap().is_err(), "the policy set last applies");
        drop(device);
        let device = disk.attach_device("virtio0").unwrap();
        assert_eq!(disk.policies(), policies, "and is reset when the device is detached");
        drop(device);
    });
}

/// Policy, kind of failure, outcome: reported (false), success (true), or waiting (`None`).
#[test]
fn policies_by_table() {
    use ErrorKind::{Io, NoSpace, NotSupported};
    use ErrorPolicy::{Enospc, Ignore, Report, Stop};
    let table = [
        (Report, Io, Some(false)),
        (Report, NoSpace, Some(false)),
        (Ignore, Io, Some(true)),
        (Ignore, NoSpace, Some(true)),
        (Stop, Io, None),
        (Stop, NoSpace, None),
        (Enospc, Io, Some(false)),
        (Enospc, NoSpace, None),
        // Not an error of the medium.
        (Stop, NotSupported, Some(false)),
        (Ignore, NotSupported, Some(false)),
    ];
    for inline in [false, true] {
        for (policy, kind, expected) in table {
            for is_read in [true, false] {
                run(1, async {
                    let disks = DiskGraph::new();
                    let (read, write) = if is_read { (policy, Report) } else { (Report, policy) };
                    let (disk, state) = disk(&disks, inline, read, write).await;
                    state.fail_with(if is_read { On::Read } else { On::Write }, kind);
                    let guest = disk.clone();
                    let mut task = bds_io::spawn(async move {
                        match is_read {
                            true => guest.read(0, iov(&[0; 16], 1)).await,
                            false => guest.write(0, iov(&[1; 16], 1), NONE).await,
                        }
                    });
                    let what = format!("{policy:?} {kind:?} read {is_read} inline {inline}");
                    let outcome = ended(&mut task).await.map(|result| result.is_ok());
                    assert_eq!(outcome, expected, "{what}");
                    let operation = if is_read { Operation::Read } else { Operation::Write };
                    let totals = disk.stats().totals(operation);
                    let failed = u64::from(expected.is_some());
                    assert_eq!((totals.ops, totals.failed), (failed, failed), "{what}");
                    assert_eq!(totals.bytes, 0, "{what}");
                    let status = match (expected, kind) {
                        (Some(_), _) => IoStatus::Ok,
                        (None, NoSpace) => IoStatus::NoSpace,
                        (None, _) => IoStatus::Failed,
                    };
                    assert_eq!(disk.io_status(), status, "{what}");
                });
            }
        }
    }
}

#[test]
fn stop_holds_requests_until_resume_and_retries_failed_ones() {
    for inline in [false, true] {
        run(2, async {
            let disks = DiskGraph::new();
            let (disk, state) =
                disk(&disks, inline, ErrorPolicy::Report, ErrorPolicy::Enospc).await;
            let mut events = disks.graph().events();
            state.fail_with(On::Write, ErrorKind::NoSpace);
            let mut first = writing(&disk, 0);
            assert!(ended(&mut first).await.is_none());
            let event = events.try_next().unwrap();
            let Event::BlockIoError { backend, node, is_read, action, nospace, reason } = &event
            else {
                panic!("{event:?}")
            };
            assert_eq!((backend.as_str(), node.as_deref()), ("d0", Some("disk")));
            assert_eq!((*is_read, *action, *nospace), (false, ErrorAction::Stop, true));
            assert!(reason.contains("injected"), "{reason}");
            assert_eq!(event.to_json()["event"], "BLOCK_IO_ERROR");
            assert_eq!(event.to_json()["data"]["operation"], "write");

            state.clear_faults();
            let mut second = writing(&disk, 32);
            let reader = disk.clone();
            let mut third = bds_io::spawn(async move { reader.read(0, iov(&[0; 16], 1)).await });
            assert!(ended(&mut second).await.is_none(), "later requests wait too");
            assert!(ended(&mut third).await.is_none(), "reads as well");
            assert!(disk.try_write(64, &iov(&[1; 16], 1)).is_none());
            assert_eq!(state.bytes()[0..64], [0; 64]);

            disk.resume();
            assert_eq!(disk.io_status(), IoStatus::Ok);
            for task in [first, second, third] {
                task.await.unwrap();
            }
            assert_eq!((state.bytes()[0], state.bytes()[32]), (1, 1));
            let totals = disk.stats().totals(Operation::Write);
            assert_eq!((totals.ops, totals.failed, totals.bytes), (2, 0, 32), "once each");
            assert_eq!(events.try_next(), None);
        });
    }
}

#[test]
fn a_request_that_fails_again_stops_again() {
    run(3, async {
        let disks = DiskGraph::new();
        let (disk, state) = disk(&disks, false, ErrorPolicy::Stop, ErrorPolicy::Stop).await;
        state.fail_with(On::Write, ErrorKind::Io);
        let mut tasks = [writing(&disk, 0), writing(&disk, 32), writing(&disk, 64)];
        for round in 0..3 {
            for task in &mut tasks {
                assert!(ended(task).await.is_none(), "round {round}");
            }
            assert_eq!(disk.io_status(), IoStatus::Failed);
            disk.resume();
        }
        let_tasks_run().await;
        state.clear_faults();
        disk.resume();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

/// All are inside when the first fails: the gate is closed once, and one decision opens it. The
/// first failure is shown.
#[test]
fn requests_that_fail_at_once_wait_for_one_decision() {
    run(9, async {
        let disks = DiskGraph::new();
        let config = Config { turns: 20, ..Config::default() };
        let (node, state) = disks.node("disk", vec![0; 1024], config).await;
        let policy = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let options = BackendOptions { writable: true, policy: Some(policy), ..Default::default() };
        let disk = Backend::new(&node, options).unwrap();
        state.fail_once(On::Write, Some(0..16));
        let mut tasks = vec![writing(&disk, 0)];
        while disk.in_flight() < 1 {
            bds_io::yield_now().await;
        }
        for _ in 0..8 {
            bds_io::yield_now().await; // after the first has begun
        }
        tasks.extend([writing(&disk, 32), writing(&disk, 64)]);
        while disk.in_flight() < 3 {
            bds_io::yield_now().await;
        }
        while disk.io_status() == IoStatus::Ok {
            bds_io::yield_now().await;
        }
        assert_eq!((disk.io_status(), disk.in_flight()), (IoStatus::Failed, 2), "the first alone");
        state.fail_with(On::Write, ErrorKind::NoSpace);
        let_tasks_run().await;
        assert_eq!(disk.io_status(), IoStatus::Failed, "the first failure since the last decision");
        assert_eq!(disk.in_flight(), 0);
        state.clear_faults();
        disk.resume();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!((state.bytes()[0], state.bytes()[32], state.bytes()[64]), (1, 1, 1));
        let totals = disk.stats().totals(Operation::Write);
        assert_eq!((totals.ops, totals.failed), (3, 0), "once each");
    });
}

/// A request that fails after the shutdown is reported, since nothing decides any more.
#[test]
fn a_failure_after_shutdown_is_reported() {
    run(10, async {
        let disks = DiskGraph::new();
        let config = Config { turns: 20, ..Config::default() };
        let (node, state) = disks.node("disk", vec![0; 1024], config).await;
        let policy = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let options = BackendOptions { writable: true, policy: Some(policy), ..Default::default() };
        let disk = Backend::new(&node, options).unwrap();
        state.fail_with(On::Write, ErrorKind::NoSpace);
        let inside = writing(&disk, 0);
        while disk.in_flight() == 0 {
            bds_io::yield_now().await;
        }
        drop(node);
        let report = disks.graph().shutdown().await;
        assert!(report.failed.is_empty() && report.check_leaks().is_ok());
        assert_eq!(inside.await.unwrap_err().kind(), ErrorKind::NoSpace, "its own failure");
        assert_eq!(disk.io_status(), IoStatus::Ok, "nothing waits for a decision");
    });
}

/// Every kind of error that is not the medium's, under any policy.
#[test]
fn errors_not_of_the_medium_are_always_reported() {
    use ErrorKind::{
        Cancelled, Inactive, InvalidInput, NoMedium, NotSupported, OutOfRange, ReadOnly, WouldWait,
    };
    for kind in
        [Cancelled, Inactive, InvalidInput, NoMedium, NotSupported, OutOfRange, ReadOnly, WouldWait]
    {
        for policy in [ErrorPolicy::Stop, ErrorPolicy::Ignore] {
            run(11, async {
                let disks = DiskGraph::new();
                let (disk, state) = disk(&disks, false, policy, policy).await;
                let mut events = disks.graph().events();
                state.fail_with(On::Write, kind);
                let mut task = writing(&disk, 0);
                let error = ended(&mut task).await.expect("nothing waits").unwrap_err();
                assert_eq!((error.kind(), disk.io_status()), (kind, IoStatus::Ok), "{policy:?}");
                assert_eq!(events.try_next(), None, "{kind:?} emits no event");
            });
        }
    }
}

#[test]
fn a_stopped_request_can_be_dropped() {
    run(4, async {
        let disks = DiskGraph::new();
        let (disk, state) = disk(&disks, false, ErrorPolicy::Stop, ErrorPolicy::Stop).await;
        state.fail_with(On::Write, ErrorKind::Io);
        let mut stopped = writing(&disk, 0);
        assert!(ended(&mut stopped).await.is_none());
        drop(stopped);
        let_tasks_run().await;
        state.clear_faults();
        assert_eq!(disk.io_status(), IoStatus::Failed, "the decision is still to come");
        disk.resume();
        disk.write(32, iov(&[1; 16], 1), NONE).await.unwrap();
        assert_eq!(state.bytes()[0], 0);
        assert_eq!(disk.stats().totals(Operation::Write).failed, 1);
    });
}

#[test]
fn flushes_and_zero_writes_obey_the_write_policy() {
    run(5, async {
        let disks = DiskGraph::new();
        let (disk, state) = disk(&disks, false, ErrorPolicy::Report, ErrorPolicy::Ignore).await;
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        state.fail_with(On::FlushToDisk, ErrorKind::Io);
        disk.flush().await.unwrap();
        assert_eq!(disk.stats().totals(Operation::Flush).failed, 1);
        state.fail_with(On::Write, ErrorKind::Io);
        // The fake has no zero writes of its own: zeros are written from a buffer.
        assert_eq!(disk.write_zeroes(0, 16, ZeroFlags::empty()).await.unwrap(), Attempt::Done);
        assert_eq!(disk.stats().totals(Operation::Zero).failed, 1);
    });
}

#[test]
fn invalid_requests_and_no_medium_are_reported_under_any_policy() {
    run(6, async {
        let disks = DiskGraph::new();
        let (disk, _state) = disk(&disks, false, ErrorPolicy::Stop, ErrorPolicy::Stop).await;
        let mut events = disks.graph().events();
        let past = disk.write(1020, iov(&[1; 16], 1), NONE).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::OutOfRange);
        let totals = disk.stats().totals(Operation::Write);
        assert_eq!((totals.invalid, totals.failed), (1, 0));
        disk.eject().await.unwrap();
        let out = disk.read(0, iov(&[0; 16], 1)).await.unwrap_err();
        assert_eq!(out.kind(), ErrorKind::NoMedium);
        assert_eq!(disk.io_status(), IoStatus::Ok);
        let io_error = std::iter::from_fn(|| events.try_next())
            .find(|event| matches!(event, Event::BlockIoError { .. }));
        assert_eq!(io_error, None);
    });
}

#[test]
fn shutdown_fails_stopped_requests_and_does_not_wait_for_them() {
    for inline in [false, true] {
        run(7, async {
            let disks = DiskGraph::new();
            let (disk, state) = disk(&disks, inline, ErrorPolicy::Stop, ErrorPolicy::Stop).await;
            state.fail_with(On::Write, ErrorKind::Io);
            let mut stopped = writing(&disk, 0);
            assert!(ended(&mut stopped).await.is_none());
            let mut later = writing(&disk, 32);
            assert!(ended(&mut later).await.is_none());
            let report = disks.graph().shutdown().await;
            assert!(report.failed.is_empty() && report.check_leaks().is_ok());
            for task in [stopped, later] {
                assert_eq!(task.await.unwrap_err().kind(), ErrorKind::Cancelled);
            }
            let after = disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap_err();
            assert_eq!(after.kind(), ErrorKind::NoMedium);
        });
    }
}
