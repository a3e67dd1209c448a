//! Tests which requests are recorded, for which ranges, and when.

use futures_util::poll;

use super::{dirty, fine, info};
use crate::driver::{Attempt, Limits, StatusFlags, Truncate, WriteFlags, ZeroFlags};
use crate::error::ErrorKind;
use crate::graph::BitmapOptions;
use crate::options::Options;
use crate::test_kit::disk::{Config, DiskGraph, On, backend};
use crate::test_kit::{iov, let_tasks_run, run};

/// The blocks around an unaligned write are written anew, and a failed write may leave any of them
/// torn.
#[test]
fn a_widened_write_is_recorded_with_its_blocks() {
    run(1, async {
        let limits = Limits { request_alignment: 4096, ..Limits::default() };
        let config = Config { limits, zero_flags: Some(ZeroFlags::empty()), ..Config::default() };
        let (disk, state) = DiskGraph::new().disk(vec![0; 65536], config).await;
        let node = disk.node().unwrap();
        node.add_bitmap(fine("b")).await.unwrap();
        disk.write(5000, iov(&[1; 10], 1), WriteFlags::empty()).await.unwrap();
        assert_eq!(dirty(&node, "b"), [4096..8192]);
        let _done = disk.write_zeroes(20_000, 10_000, ZeroFlags::empty()).await.unwrap();
        assert_eq!(dirty(&node, "b"), [4096..8192, 16384..32768]);
        // Nothing is written if a read around it fails; too much is recorded all the same.
        state.fail_once(On::Read, None);
        disk.write(40_961, iov(&[1; 10], 1), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(dirty(&node, "b").last(), Some(&(40_960..45_056)));
    });
}

#[test]
fn an_inline_write_is_recorded_before_it_returns() {
    run(1, async {
        let config = Config { inline: true, ..Config::default() };
        let (disk, state) = DiskGraph::new().disk(vec![0; 65536], config).await;
        let node = disk.node().unwrap();
        node.add_bitmap(fine("b")).await.unwrap();
        disk.try_write(512, &iov(&[1; 512], 1)).expect("inline").unwrap();
        assert_eq!(dirty(&node, "b"), [512..1024]);
        state.fail_once(On::Write, None);
        disk.try_write(4096, &iov(&[1; 512], 1)).expect("inline").unwrap_err();
        assert_eq!(dirty(&node, "b"), [512..1024, 4096..4608], "a failed one too");
    });
}

/// What is copied up on a read, or written back as it was, changes no byte that a reader sees.
#[test]
fn unchanged_writes_are_not_recorded() {
    run(1, async {
        let disks = DiskGraph::new();
        let read_only = Options::new().with("read-only", true);
        let base = Config { options: read_only, ..Config::default() };
        let (_base, _) = disks.node("base", vec![1; 65536], base).await;
        let config = Config {
            supports_backing: true,
            write_flags: WriteFlags::UNCHANGED,
            zero_flags: Some(ZeroFlags::UNCHANGED),
            statuses: vec![(0..65536, StatusFlags::empty(), None)],
            options: Options::new().with("backing", "base"),
            ..Config::default()
        };
        let (top, _) = disks.node("top", vec![1; 65536], config).await;
        top.add_bitmap(fine("b")).await.unwrap();
        let disk = backend(&top);
        disk.copy_up(0, 8192).await.unwrap();
        disk.write(0, iov(&[1; 512], 1), WriteFlags::UNCHANGED).await.unwrap();
        let _done = disk.write_zeroes(0, 512, ZeroFlags::UNCHANGED).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(info(&top, "b").count, 0);
        disk.write(0, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
        assert_eq!(info(&top, "b").count, 512);
    });
}

/// A discard that the node ignores changes nothing; otherwise the whole blocks inside are recorded.
#[test]
fn discards_are_recorded_where_they_reach_the_driver() {
    run(1, async {
        let disks = DiskGraph::new();
        let limits = Limits { request_alignment: 4096, ..Limits::default() };
        let config = |word: &str| Config {
            limits,
            options: Options::new().with("discard", word),
            ..Config::default()
        };
        for (name, word, wanted) in
            [("keeps", "ignore", vec![]), ("unmaps", "unmap", vec![4096..8192])]
        {
            let (node, _) = disks.node(name, vec![0; 65536], config(word)).await;
            node.add_bitmap(fine("b")).await.unwrap();
            backend(&node).discard(1000, 8000).await.unwrap();
            assert_eq!(dirty(&node, "b"), wanted);
        }
    });
}

/// A copy between files is recorded at every node it passes on its way down.
#[test]
fn copied_ranges_are_recorded() {
    run(1, async {
        let disks = DiskGraph::new();
        let (from, _) = disks.node("from", vec![7; 65536], Config::default()).await;
        let (to, _) = disks.node("to", vec![0; 65536], Config::default()).await;
        to.add_bitmap(fine("b")).await.unwrap();
        from.add_bitmap(fine("b")).await.unwrap();
        let (source, target) = (backend(&from), backend(&to));
        let copied = target.copy_range_from(&source, 0, 8192, 4096).await.unwrap();
        assert_eq!(copied, Attempt::Done);
        assert_eq!(dirty(&to, "b"), [8192..12288]);
        assert_eq!(info(&from, "b").count, 0);
    });
}

/// A driver that was polled goes on without its request. It may change bytes after the request was
/// dropped, and after the bitmap was cleared.
#[test]
fn a_dropped_write_is_recorded_when_its_driver_ends() {
    for seed in 0..50 {
        run(seed, async {
            let config = Config { turns: 5, ..Config::default() };
            let (disk, state) = DiskGraph::new().disk(vec![0; 4096], config).await;
            let node = disk.node().unwrap();
            node.add_bitmap(fine("b")).await.unwrap();
            let mut write = Box::pin(disk.write(512, iov(&[2; 512], 1), WriteFlags::empty()));
            assert!(poll!(write.as_mut()).is_pending());
            drop(write);
            node.clear_bitmap("b").await.unwrap();
            let was_written = state.bytes()[512] == 2;
            let_tasks_run().await;
            assert_eq!(state.bytes()[512], 2);
            if !was_written {
                assert_eq!(dirty(&node, "b"), [512..1024], "seed {seed}");
            }
        });
    }
}

#[test]
fn a_dropped_growth_is_recorded_when_its_driver_ends() {
    run(3, async {
        let config = Config { turns: 5, ..Config::default() };
        let (disk, _) = DiskGraph::new().disk(vec![0; 4096], config).await;
        let node = disk.node().unwrap();
        node.add_bitmap(fine("b")).await.unwrap();
        let mut grow = Box::pin(disk.truncate(Truncate::to(8192)));
        assert!(poll!(grow.as_mut()).is_pending());
        drop(grow);
        let_tasks_run().await;
        assert_eq!((node.len(), dirty(&node, "b")), (8192, vec![4096..8192]));
    });
}

/// A parent inside the graph may write past the end, which makes the node longer: bitmaps follow.
#[test]
fn a_write_past_the_end_makes_bitmaps_longer() {
    run(1, async {
        let disks = DiskGraph::new();
        let (file, _) = disks.node("file", vec![0; 4096], Config::default()).await;
        for options in [fine("on"), BitmapOptions { disabled: true, ..fine("off") }] {
            file.add_bitmap(options).await.unwrap();
        }
        let lease = file.lease_bitmap("on", "a test").unwrap();
        lease.split().unwrap();
        let options = Options::new().with("file", "file");
        let top = Config { options, forwards: true, ..Config::default() };
        let (top, _) = disks.node("top", Vec::new(), top).await;
        let _writer = backend(&top);
        let edge = top.child("file").unwrap();
        let child = super::super::super::port::make(edge);
        child.write(8192, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
        assert_eq!(file.len(), 8704);
        drop(lease);
        assert_eq!(dirty(&file, "on"), [8192..8704]);
        let next = |range| file.next_dirty_in_bitmap("on", range).unwrap();
        assert_eq!(
            (next(0..8192), next(0..8704), next(8300..8704)),
            (None, Some(8192), Some(8300))
        );
        assert!(file.next_dirty_in_bitmap("none", 0..1).is_err());
        assert_eq!(file.copy_bitmap("off").unwrap().len(), 8704);
    });
}

/// A read-only bitmap would be wrong after a write: the node refuses it, inline and waiting, with
/// QEMU's text.
#[test]
fn a_readonly_bitmap_refuses_writes_to_its_node() {
    run(1, async {
        let config = Config {
            inline: true,
            store: Some(crate::test_kit::bitmap_store::FakeStore::with(Vec::new())),
            options: Options::new().with("discard", "unmap"),
            ..Config::default()
        };
        let (disk, state) = DiskGraph::new().disk(vec![0; 4096], config).await;
        let node = disk.node().unwrap();
        node.add_bitmap(super::persistent("b")).await.unwrap();
        node.set_bitmaps_readonly(true);
        assert!(disk.try_write(0, &iov(&[1; 512], 1)).is_none(), "declined");
        let text = "node 'disk': Bitmap 'b' is readonly and cannot be modified";
        for refused in [
            disk.write(0, iov(&[1; 512], 1), WriteFlags::empty()).await,
            disk.write_zeroes(0, 512, ZeroFlags::empty()).await.map(drop),
            disk.discard(0, 512).await,
            disk.truncate(Truncate::to(512)).await,
        ] {
            let error = refused.unwrap_err();
            assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::ReadOnly, text));
            assert_eq!(error.errno(), libc::EPERM);
        }
        assert_eq!(state.bytes(), [0; 4096]);
        node.set_bitmaps_readonly(false);
        disk.write(0, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
    });
}

#[test]
fn the_default_granularity_follows_the_clusters() {
    run(1, async {
        let disks = DiskGraph::new();
        // cluster size: granularity
        let table = [
            (None, 65536),
            (Some(512), 4096),
            (Some(8192), 8192),
            (Some(65536), 65536),
            (Some(2 << 20), 65536),
            (Some(3000), 65536),
        ];
        for (number, (cluster_size, wanted)) in table.into_iter().enumerate() {
            let name = format!("n{number}");
            let config = Config { cluster_size, ..Config::default() };
            let (node, _) = disks.node(&name, vec![0; 4096], config).await;
            let options = Options::new().with("file", &*name);
            let filter = Config { options, forwards: true, is_filter: true, ..Config::default() };
            let (filter, _) = disks.node(&format!("f{number}"), Vec::new(), filter).await;
            for node in [&node, &filter] {
                node.add_bitmap(BitmapOptions::named("alone")).await.unwrap();
                let change = disks.graph().change();
                change.add_bitmap(node, BitmapOptions::named("b")).commit().await.unwrap();
                assert_eq!(info(node, "alone").granularity, wanted);
                assert_eq!(info(node, "b").granularity, wanted, "{cluster_size:?}");
            }
        }
    });
}
