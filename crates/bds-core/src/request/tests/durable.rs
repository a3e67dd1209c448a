//! Tests what is durable: writes through a writethrough backend, and closes after writes and failed
//! flushes.

use crate::driver::{Attempt, HostMap, StatusFlags, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::options::Options;
use crate::request::{Backend, BackendOptions};
use crate::stats::Operation;
use crate::test_kit::disk::{Config, DiskGraph, On, Op, State, backend};
use crate::test_kit::{iov, run};

const NONE: WriteFlags = WriteFlags::empty();

fn flushes(state: &State) -> usize {
    state.take_log().iter().filter(|op| **op == Op::FlushToDisk).count()
}

fn inline() -> Config {
    Config { inline: true, ..Config::default() }
}

#[test]
fn every_write_is_durable_through_a_writethrough_backend() {
    for inline in [false, true] {
        run(1, async {
            let disks = DiskGraph::new();
            let options = Options::new().with("cache.writeback", false);
            let config = Config { inline, options, ..Config::default() };
            let (node, state) = disks.node("disk", vec![0; 1024], config).await;
            let (source, other) = disks.node("other", vec![3; 1024], Config::default()).await;
            let source = backend(&source);
            let disk = backend(&node);
            assert!(disk.is_writethrough(), "as the node was opened");
            assert!(disk.try_write(0, &iov(&[1; 16], 1)).is_none(), "it would have to wait");
            disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
            assert_eq!(flushes(&state), 1, "a write, inline {inline}");
            assert_eq!(disk.write_zeroes(0, 16, ZeroFlags::empty()).await.unwrap(), Attempt::Done);
            assert_eq!(flushes(&state), 1, "a zero write, inline {inline}");
            let copied = disk.copy_range_from(&source, 0, 512, 16).await.unwrap();
            assert_eq!(copied, Attempt::Done);
            assert_eq!(flushes(&state), 1, "a copy, inline {inline}");
            assert_eq!(state.bytes()[512..528], [3; 16]);
            disk.set_writethrough(false);
            disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
            let copied = disk.copy_range_from(&source, 0, 512, 16).await.unwrap();
            assert_eq!(copied, Attempt::Done);
            assert_eq!(flushes(&state), 0, "not requested, inline {inline}");
            assert_eq!(flushes(&other), 0);
        });
    }
}

#[test]
fn a_write_with_fua_is_not_done_inline() {
    run(2, async {
        let (disk, state) = DiskGraph::new().disk(vec![0; 1024], inline()).await;
        disk.write(0, iov(&[1; 16], 1), WriteFlags::FUA).await.unwrap();
        assert_eq!(flushes(&state), 1);
    });
}

#[test]
fn a_copy_past_an_end_is_refused_on_either_side() {
    run(3, async {
        let disks = DiskGraph::new();
        let (disk, state) = disks.disk(vec![0; 1024], Config::default()).await;
        let (short, _) = disks.node("short", vec![1; 512], Config::default()).await;
        let short = backend(&short);
        let refused = disk.copy_range_from(&short, 504, 0, 16).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfRange, "past the source's");
        let refused = disk.copy_range_from(&short, 0, 1016, 16).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfRange, "past the target's");
        assert_eq!(state.bytes(), [0; 1024]);
    });
}

#[test]
fn copies_by_the_host_do_not_pass_a_node_that_must_see_writes() {
    for must_see_writes in [false, true] {
        run(3, async {
            let disks = DiskGraph::new();
            let (_disk, state) = disks.node("disk", vec![0; 1024], Config::default()).await;
            let map = Some(HostMap { child: "file", offset: 0 });
            let config = Config {
                is_filter: true,
                must_see_writes,
                forwards: true,
                statuses: vec![(0..1024, StatusFlags::RAW, map)],
                options: Options::new().with("file", "disk"),
                ..Config::default()
            };
            let (filter, _) = disks.node("filter", vec![], config).await;
            let (source, _) = disks.node("source", vec![1; 1024], Config::default()).await;
            let copied = backend(&filter).copy_range_from(&backend(&source), 0, 0, 512).await;
            let expected = if must_see_writes { Attempt::Unsupported } else { Attempt::Done };
            assert_eq!(copied.unwrap(), expected);
            assert_eq!(state.bytes()[0] == 1, !must_see_writes);
        });
    }
}

#[test]
fn inline_requests_are_counted() {
    run(4, async {
        let (disk, _state) = DiskGraph::new().disk(vec![0; 1024], inline()).await;
        disk.try_read(0, &iov(&[0; 16], 1)).expect("nothing to wait for").unwrap();
        disk.try_write(0, &iov(&[1; 32], 1)).expect("nothing to wait for").unwrap();
        let of = |operation| {
            let totals = disk.stats().totals(operation);
            (totals.ops, totals.bytes)
        };
        assert_eq!((of(Operation::Read), of(Operation::Write)), ((1, 16), (1, 32)));
    });
}

#[test]
fn a_writable_backend_is_refused_on_a_read_only_node() {
    run(5, async {
        let disks = DiskGraph::new();
        let options = Options::new().with("read-only", true);
        let config = Config { options, ..Config::default() };
        let (node, _) = disks.node("disk", vec![0; 1024], config).await;
        let options = BackendOptions { writable: true, ..Default::default() };
        let refused = Backend::new(&node, options).unwrap_err();
        let words = "node 'disk': the node is read-only; open it for writing";
        assert_eq!((refused.kind(), &*refused.to_string()), (ErrorKind::ReadOnly, words));
    });
}

// ---- closes

/// The medium may have lost earlier writes although the close itself has nothing to flush.
#[test]
fn a_close_reports_a_flush_that_failed_before() {
    run(6, async {
        let disks = DiskGraph::new();
        let (disk, state) = disks.disk(vec![0; 1024], Config::default()).await;
        let node = disk.node().unwrap();
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        state.fail_once(On::FlushToDisk, None);
        assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Io);
        state.clear_faults();
        drop(disk);
        let report = node.close().await.unwrap();
        let error = report.flush_error.as_ref().expect("it is not forgotten");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("an earlier flush failed"), "{error}");
        assert!(error.to_string().contains("node 'disk'"), "{error}");
        assert!(report.close_error.is_none());
    });
}

#[test]
fn close_flushes_only_after_writes() {
    run(7, async {
        let disks = DiskGraph::new();
        let (disk, state) = disks.disk(vec![0; 1024], Config::default()).await;
        let node = disk.node().unwrap();
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        drop(disk);
        state.take_log();
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(state.take_log(), [Op::FlushToOs, Op::FlushToDisk]);

        let (disk, state) = disks.disk(vec![0; 1024], Config::default()).await;
        let node = disk.node().unwrap();
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        disk.flush().await.unwrap();
        drop(disk);
        state.take_log();
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(state.take_log(), [Op::FlushToOs], "nothing was written since the last flush");
    });
}

#[test]
fn a_failed_flush_of_a_close_is_in_its_report() {
    run(8, async {
        let disks = DiskGraph::new();
        let (disk, state) = disks.disk(vec![0; 1024], Config::default()).await;
        let node = disk.node().unwrap();
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        drop(disk);
        state.fail_always(On::FlushToDisk, None);
        let report = node.close().await.unwrap();
        assert_eq!(report.flush_error.map(|error| error.kind()), Some(ErrorKind::Io));
    });
}

#[test]
fn close_with_no_flush_writes_back_without_flushing() {
    run(9, async {
        let disks = DiskGraph::new();
        let options = Options::new().with("cache.no-flush", true);
        let config = Config { options, ..Config::default() };
        let (disk, state) = disks.disk(vec![0; 1024], config).await;
        let node = disk.node().unwrap();
        disk.write(0, iov(&[1; 16], 1), NONE).await.unwrap();
        drop(disk);
        state.take_log();
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(state.take_log(), [Op::FlushToOs]);
    });
}
