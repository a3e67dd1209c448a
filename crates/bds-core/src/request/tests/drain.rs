//! Tests the drain of a backend: what it waits for, and what waits for it.

use std::sync::{Arc, Barrier};

use bds_io::{Sim, SimConfig};
use futures_util::FutureExt;

use crate::driver::WriteFlags;
use crate::error::ErrorKind;
use crate::request::{Backend, BackendOptions, ErrorPolicies, ErrorPolicy};
use crate::stats::Operation;
use crate::test_kit::disk::{Config, DiskGraph, On};
use crate::test_kit::{ended, iov, let_tasks_run, run};

const NONE: WriteFlags = WriteFlags::empty();

fn slow() -> Config {
    Config { turns: 20, ..Config::default() }
}

fn writing(disk: &Backend, offset: u64) -> bds_io::Task<crate::Result<()>> {
    let disk = disk.clone();
    bds_io::spawn(async move { disk.write(offset, iov(&[1; 16], 1), NONE).await })
}

#[test]
fn a_drained_backend_is_empty_and_its_requests_are_counted() {
    for seed in 0..20 {
        run(seed, async {
            let (disk, state) = DiskGraph::new().disk(vec![0; 1024], slow()).await;
            let tasks: Vec<_> = (0..4).map(|i| writing(&disk, i * 32)).collect();
            while disk.in_flight() < 4 {
                bds_io::yield_now().await;
            }
            let drained = disk.drain().await;
            assert_eq!((disk.in_flight(), drained.backend().in_flight()), (0, 0));
            assert_eq!(disk.stats().totals(Operation::Write).ops, 4, "counted while in flight");
            let mut late = writing(&disk, 512);
            assert!(ended(&mut late).await.is_none(), "it waits at the gate");
            assert_eq!(disk.in_flight(), 0, "queued is not in flight");
            assert!(disk.try_read(0, &iov(&[0; 16], 1)).is_none());
            let nested = disk.drain().await;
            drop(drained);
            assert!(ended(&mut late).await.is_none(), "sections nest");
            assert_eq!(state.bytes()[512], 0);
            drop(nested);
            late.await.unwrap();
            assert_eq!(state.bytes()[512], 1);
            for task in tasks {
                task.await.unwrap();
            }
        });
    }
}

#[test]
fn draining_a_backend_does_not_drain_other_backends_of_the_node() {
    run(1, async {
        let disks = DiskGraph::new();
        let (disk, _state) = disks.disk(vec![0; 1024], slow()).await;
        let node = disk.node().unwrap();
        let options = BackendOptions { writable: true, ..Default::default() };
        let other = Backend::new(&node, options).unwrap();
        let mut other_write = writing(&other, 0);
        let drained = disk.drain().await;
        assert!(ended(&mut other_write).await.is_some(), "it completed meanwhile");
        other.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        drop(drained);
    });
}

/// In one task: a request queued by one section is not waited for by the other.
#[test]
fn draining_a_backend_does_not_wait_for_queued_requests() {
    run(2, async {
        let disks = DiskGraph::new();
        let (disk, _state) = disks.disk(vec![0; 1024], slow()).await;
        let node = disk.node().unwrap();
        let of_node = disks.graph().drain(&node).await;
        let mut queued = writing(&disk, 0);
        assert!(ended(&mut queued).await.is_none());
        let of_backend = disk.drain().await;
        drop(of_node);
        assert!(ended(&mut queued).await.is_none());
        drop(of_backend);
        queued.await.unwrap();
    });
}

#[test]
fn an_empty_drive_can_be_drained_and_gets_a_medium_meanwhile() {
    run(3, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let options = BackendOptions { writable: true, ..Default::default() };
        let drive = Backend::empty(disks.graph(), options).unwrap();
        let drained = drive.drain().await;
        let mut queued = writing(&drive, 0);
        assert!(ended(&mut queued).await.is_none(), "not failed with NoMedium either");
        drive.insert(&node).await.unwrap();
        assert!(ended(&mut queued).await.is_none());
        drop(drained);
        queued.await.unwrap();
        assert_eq!(state.bytes()[0], 1);
    });
}

#[test]
fn drain_does_not_wait_for_stopped_requests() {
    run(4, async {
        let disks = DiskGraph::new();
        let (node, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
        let policy = ErrorPolicies { read: ErrorPolicy::Stop, write: ErrorPolicy::Stop };
        let options = BackendOptions { writable: true, policy: Some(policy), ..Default::default() };
        let disk = Backend::new(&node, options).unwrap();
        state.fail_with(On::Write, ErrorKind::Io);
        let mut stopped = writing(&disk, 0);
        assert!(ended(&mut stopped).await.is_none());
        assert_eq!((disk.in_flight(), node.in_flight()), (0, 0));
        let of_backend = disk.drain().await;
        let of_node = disks.graph().drain(&node).await;
        state.clear_faults();
        disk.resume();
        assert!(ended(&mut stopped).await.is_none(), "drained all the same");
        drop((of_backend, of_node));
        stopped.await.unwrap();
    });
}

#[test]
fn drain_does_not_wait_for_a_poisoned_medium() {
    run(5, async {
        let (disk, _state) =
            DiskGraph::new().disk(vec![0; 1024], Config { turns: 5000, ..Config::default() }).await;
        let _stuck = writing(&disk, 0);
        while disk.in_flight() == 0 {
            bds_io::yield_now().await;
        }
        let drain = disk.clone();
        let mut drain = bds_io::spawn(async move { drain.drain().await });
        assert!(ended(&mut drain).await.is_none());
        disk.node().unwrap().poison();
        assert!(ended(&mut drain).await.is_some());
    });
}

/// Another thread is in the middle of an inline write, which is not counted as in flight; the drain
/// waits for it all the same.
#[test]
fn a_drain_waits_for_inline_requests_of_other_threads() {
    bds_io::block_on(async {
        let barrier = Arc::new(Barrier::new(2));
        let config = Config { inline: true, barrier: Some(barrier.clone()), ..Config::default() };
        let (disk, state) = DiskGraph::new().disk(vec![0; 1024], config).await;
        let guest = disk.clone();
        let thread = std::thread::spawn(move || {
            guest.try_write(0, &iov(&[1; 16], 1)).expect("nothing to wait for").unwrap();
        });
        barrier.wait();
        let mut drain = Box::pin(disk.drain());
        assert!((&mut drain).now_or_never().is_none(), "the write is inside");
        barrier.wait();
        let drained = drain.await;
        assert_eq!(state.bytes()[0], 1);
        assert_eq!(disk.stats().totals(Operation::Write).ops, 1, "counted while inside");
        drop(drained);
        thread.join().unwrap();
    });
}

#[test]
fn a_drain_dropped_at_any_await_opens_the_gate_again() {
    for n in 0..200 {
        let sim = Sim::new(8, SimConfig::calm());
        let (disk, _state) = sim.block_on(DiskGraph::new().disk(vec![0; 1024], slow()));
        let busy = disk.clone();
        let busy = sim.spawn(async move { busy.write(0, iov(&[1; 16], 1), NONE).await });
        let drain = disk.clone();
        let dropped = sim.drop_at(async move { drop(drain.drain().await) }, n);
        sim.run_until_idle();
        sim.block_on(async {
            busy.await.unwrap();
            disk.write(0, iov(&[2; 16], 1), NONE).await.unwrap();
            let_tasks_run().await;
            assert_eq!(disk.in_flight(), 0);
            drop(disk);
        });
        if !dropped {
            return;
        }
    }
    panic!("the drain never ends");
}

/// Requests wait in a drive without a medium; its drain waits for them.
#[test]
fn a_drain_of_an_empty_drive_waits_for_requests_that_find_no_medium() {
    for seed in 0..20 {
        run(seed, async {
            let disks = DiskGraph::new();
            let drive = Backend::empty(disks.graph(), BackendOptions::default()).unwrap();
            let reads: Vec<_> = (0..4)
                .map(|_| {
                    let drive = drive.clone();
                    bds_io::spawn(async move { drive.read(0, iov(&[0; 16], 1)).await })
                })
                .collect();
            bds_io::yield_now().await;
            let drained = drive.drain().await;
            assert_eq!(drive.in_flight(), 0);
            let before = drive.stats().totals(Operation::Read).failed;
            let_tasks_run().await;
            let after = drive.stats().totals(Operation::Read).failed;
            assert_eq!(before, after, "seed {seed}: nothing ends inside a drained section");
            drop(drained);
            for read in reads {
                assert_eq!(read.await.unwrap_err().kind(), ErrorKind::NoMedium);
            }
            assert_eq!(drive.stats().totals(Operation::Read).failed, 4);
        });
    }
}
