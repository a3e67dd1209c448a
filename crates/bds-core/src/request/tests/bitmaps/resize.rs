//! Tests resizes of nodes with bitmaps: they are checked before anything is touched, also when they
//! come through a filter, or reach a filter from below.

use std::sync::Arc;

use super::{dirty, fine, info, persistent};
use crate::bitmap::MAX_GRANULES;
use crate::driver::{Truncate, WriteFlags};
use crate::error::ErrorKind;
use crate::graph::NodeRef;
use crate::options::Options;
use crate::test_kit::bitmap_store::{FakeStore, InImage};
use crate::test_kit::disk::{Config, DiskGraph, Op, State, backend};
use crate::test_kit::{iov, run};

/// Two filters on a disk.
async fn stack(disks: &DiskGraph) -> ([NodeRef; 3], Arc<State>) {
    let (disk, state) = disks.node("disk", vec![0; 8192], Config::default()).await;
    let filter = |below: &str| Config {
        options: Options::new().with("file", below),
        forwards: true,
        is_filter: true,
        ..Config::default()
    };
    let (mid, _) = disks.node("mid", Vec::new(), filter("disk")).await;
    let (top, _) = disks.node("top", Vec::new(), filter("mid")).await;
    ([disk, mid, top], state)
}

/// Each of the three has a busy bitmap in turn; each of the three is resized. All nine are refused,
/// whatever the way, and nothing was touched.
#[test]
fn a_busy_bitmap_refuses_a_resize_on_any_way() {
    run(1, async {
        let disks = DiskGraph::new();
        let (nodes, state) = stack(&disks).await;
        for busy in &nodes {
            busy.add_bitmap(fine("b")).await.unwrap();
            let lease = busy.lease_bitmap("b", "a backup").unwrap();
            lease.split().unwrap();
            for resized in &nodes {
                let error = backend(resized).truncate(Truncate::to(4096)).await.unwrap_err();
                let text = "Bitmap 'b' is currently in use by another operation and cannot be used";
                assert_eq!((error.kind(), error.message()), (ErrorKind::InUse, text));
                assert_eq!(error.node_name(), Some(busy.name()), "resize of {}", resized.name());
            }
            assert!(state.take_log().is_empty(), "the driver was not called");
            assert_eq!(nodes[2].len(), 8192);
            lease.reclaim();
            busy.remove_bitmap("b").await.unwrap();
        }
        backend(&nodes[2]).truncate(Truncate::to(4096)).await.unwrap();
        assert_eq!(state.take_log(), [Op::Truncate(4096, false)]);
    });
}

/// Bitmaps of all nodes that show the length follow it, in both directions.
#[test]
fn bitmaps_of_filters_follow_a_resize_from_below() {
    run(1, async {
        let disks = DiskGraph::new();
        let (nodes, _) = stack(&disks).await;
        for node in &nodes {
            node.add_bitmap(fine("b")).await.unwrap();
        }
        let disk = backend(&nodes[2]);
        disk.write(0, iov(&[1; 8192], 1), WriteFlags::empty()).await.unwrap();
        backend(&nodes[0]).truncate(Truncate::to(1000)).await.unwrap();
        for node in &nodes {
            assert_eq!(dirty(node, "b"), vec![0..1000], "{}", node.name());
            assert_eq!(info(node, "b").count, 1024);
        }
        backend(&nodes[1]).truncate(Truncate::to(8192)).await.unwrap();
        disk.write(4096, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
        for node in &nodes {
            let copy = node.copy_bitmap("b").unwrap();
            assert_eq!(copy.len(), 8192, "{}", node.name());
            assert!(copy.is_dirty(4096) && copy.is_dirty(0));
        }
        // Growth is a change of the nodes that the resize went through.
        assert_eq!(dirty(&nodes[0], "b"), vec![0..8192]);
        assert_eq!(dirty(&nodes[1], "b"), vec![0..8192]);
        assert_eq!(dirty(&nodes[2], "b"), vec![0..1024, 4096..4608]);
    });
}

#[test]
fn inconsistent_and_too_long_bitmaps_refuse_a_resize() {
    run(1, async {
        let disks = DiskGraph::new();
        let store = FakeStore::with(vec![InImage::in_use("old")]);
        let config = Config { store: Some(store), ..Config::default() };
        let (node, state) = disks.node("disk", vec![0; 4096], config).await;
        let disk = backend(&node);
        let error = disk.truncate(Truncate::to(8192)).await.unwrap_err();
        assert!(error.message().starts_with("Bitmap 'old' is inconsistent and cannot be used"));
        node.remove_bitmap("old").await.unwrap();
        disk.truncate(Truncate::to(8192)).await.unwrap();
        node.add_bitmap(fine("fine")).await.unwrap();
        let error = disk.truncate(Truncate::to((MAX_GRANULES + 1) * 512)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LimitExceeded);
        assert_eq!(state.take_log(), [Op::Truncate(8192, false)]);
    });
}

/// The stored copy is marked by the driver; the bitmap in memory has the new length when it is
/// stored again.
#[test]
fn a_persistent_bitmap_is_stored_with_the_new_length() {
    run(1, async {
        let disks = DiskGraph::new();
        let store = FakeStore::with(Vec::new());
        let config = Config { store: Some(store.clone()), ..Config::default() };
        let (node, _) = disks.node("disk", vec![0; 4096], config).await;
        node.add_bitmap(persistent("b")).await.unwrap();
        backend(&node).truncate(Truncate::to(6000)).await.unwrap();
        assert!(node.close().await.unwrap().is_clean());
        let image = store.image.lock().unwrap();
        assert_eq!((image[0].len, image[0].is_in_use), (6000, false));
        assert_eq!(image[0].stream, [0, 0x0f], "the growth is dirty");
    });
}
