//! Tests what images store: loads, stores at the end of writing, marks before edits, failures.

use std::sync::Arc;

use super::{dirty, fine, info, persistent, snapshot};
use crate::driver::WriteFlags;
use crate::error::ErrorKind;
use crate::graph::NodeRef;
use crate::options::Options;
use crate::test_kit::bitmap_store::{FakeStore, InImage};
use crate::test_kit::disk::{Config, DiskGraph, State, backend};
use crate::test_kit::{iov, lock, run};

fn config(store: &Arc<FakeStore>, is_read_only: bool) -> Config {
    Config {
        store: Some(Arc::clone(store)),
        options: Options::new().with("read-only", is_read_only),
        ..Config::default()
    }
}

async fn open(disks: &DiskGraph, store: &Arc<FakeStore>) -> (NodeRef, Arc<State>) {
    disks.node("disk", vec![0; 4096], config(store, false)).await
}

/// A valid bitmap with block 0 dirty.
fn stored(name: &str) -> InImage {
    InImage {
        granularity: 512,
        len: 4096,
        stream: vec![1],
        is_in_use: false,
        ..InImage::in_use(name)
    }
}

async fn write(node: &NodeRef, at: u64) {
    backend(node).write(at, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
}

#[test]
fn bitmaps_survive_many_clean_cycles() {
    run(1, async {
        let store = FakeStore::with(Vec::new());
        for round in 0..20_u64 {
            let disks = DiskGraph::new();
            let (node, _) = open(&disks, &store).await;
            if round == 0 {
                node.add_bitmap(persistent("b")).await.unwrap();
                node.add_bitmap(fine("not stored")).await.unwrap();
            }
            let facts = info(&node, "b");
            assert_eq!((facts.count, facts.persistent), (round.min(8) * 512, true));
            assert_eq!(node.bitmaps().len(), if round == 0 { 2 } else { 1 });
            write(&node, round % 8 * 512).await;
            assert!(node.close().await.unwrap().is_clean());
            assert_eq!(store.list(), [("b".to_owned(), false)]);
        }
    });
}

/// After a crash the stored copy is marked in use: the bitmap can only be removed.
#[test]
fn a_crash_makes_a_stored_bitmap_inconsistent() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        assert_eq!(store.list(), [("b".to_owned(), false)], "nothing was written yet");
        write(&node, 512).await;
        let crashed = FakeStore::with(lock(&store.image).clone());
        let (disks, old) = (DiskGraph::new(), disks);
        let (node, _) = open(&disks, &crashed).await;
        let facts = info(&node, "b");
        assert_eq!((facts.inconsistent, facts.recording, facts.count), (true, false, 0));
        assert_eq!(facts.to_json()["inconsistent"], true);
        assert!(node.copy_bitmap("b").is_err());
        // A close stores it as it is; a removal is at once.
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(crashed.list(), [("b".to_owned(), true)]);
        let (node, _) = open(&disks, &crashed).await;
        node.remove_bitmap("b").await.unwrap();
        assert_eq!(crashed.list(), []);
        drop(old);
    });
}

/// Each edit of a persistent bitmap is preceded by a mark; of others, by nothing.
#[test]
fn edits_mark_the_stored_copies_first() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        node.add_bitmap(fine("ram")).await.unwrap();
        node.clear_bitmap("ram").await.unwrap();
        node.merge_bitmaps("ram", &[(&node, "b")]).await.unwrap();
        node.merge_bitmaps("b", &[]).await.unwrap();
        assert_eq!(store.take_log(), ["load"], "nothing stored has changed");
        node.disable_bitmap("b").await.unwrap();
        node.enable_bitmap("b").await.unwrap();
        node.clear_bitmap("b").await.unwrap();
        node.merge_bitmaps("b", &[(&node, "ram")]).await.unwrap();
        node.add_bitmap(persistent("c")).await.unwrap();
        assert_eq!(store.take_log(), ["mark_in_use"; 5]);
        let change = disks.graph().change().clear_bitmap(&node, "b").remove_bitmap(&node, "c");
        change.commit().await.unwrap();
        assert_eq!(store.take_log(), ["mark_in_use", "remove"]);
        // A mark that fails: nothing has changed.
        let before = snapshot(&node);
        store.fail(Some("mark_in_use"));
        let alone = node.clear_bitmap("b").await.unwrap_err();
        let change = disks.graph().change().add_bitmap(&node, fine("new")).clear_bitmap(&node, "b");
        let changed = change.commit().await.unwrap_err();
        for error in [alone, changed] {
            assert_eq!((error.kind(), error.node_name()), (ErrorKind::Io, Some("disk")));
        }
        assert_eq!(snapshot(&node), before);
        store.fail(None);
    });
}

/// A successor that takes over changes the bitmap without any write: a close stores it all the
/// same.
#[test]
fn an_abdication_reaches_the_image() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        let lease = node.lease_bitmap("b", "a backup").unwrap();
        lease.split().unwrap();
        lease.abdicate().unwrap();
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(store.take_log(), ["load", "mark_in_use", "store"]);
        assert_eq!(lock(&store.image)[0].stream, [0]);
    });
}

/// A bitmap that is split when it is stored is stored with what its successor has recorded.
#[test]
fn a_split_bitmap_is_stored_as_a_whole() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        let lease = node.lease_bitmap("b", "a backup").unwrap();
        lease.split().unwrap();
        write(&node, 1024).await;
        disks.graph().change().store_bitmaps(&node).commit().await.unwrap();
        assert_eq!(lock(&store.image)[0].stream, [0b101]);
        assert_eq!(store.list(), [("b".to_owned(), false)]);
        write(&node, 2048).await;
        assert_eq!(store.list(), [("b".to_owned(), true)], "stale again");
        let report = node.close().await.unwrap();
        assert!(report.close_error.unwrap().message().contains("in use by a backup"));
        assert_eq!(lock(&store.image)[0].stream, [0b10101], "stored all the same");
        drop(lease);
    });
}

/// As above, where a parent's write past the end made the node longer meanwhile: the successor
/// alone has followed.
#[test]
fn a_split_bitmap_is_stored_with_what_was_written_past_the_end() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (file, _) = open(&disks, &store).await;
        let lease = file.lease_bitmap("b", "a backup").unwrap();
        lease.split().unwrap();
        let options = Options::new().with("file", "disk");
        let top = Config { options, forwards: true, ..Config::default() };
        let (top, _) = disks.node("top", Vec::new(), top).await;
        let _writer = backend(&top);
        let child = super::super::super::port::make(top.child("file").unwrap());
        child.write(8192, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
        assert_eq!(file.len(), 8704);
        disks.graph().change().store_bitmaps(&file).commit().await.unwrap();
        assert_eq!(lock(&store.image)[0].len, 8704);
        assert_eq!(lock(&store.image)[0].stream, [1, 0, 1], "blocks 0 and 16");
        drop(lease);
        assert_eq!(dirty(&file, "b"), [0..512, 8192..8704]);
    });
}

/// The close report says what was lost, beside what else failed.
#[test]
fn a_failed_store_is_in_the_close_report() {
    run(1, async {
        let store = FakeStore::with(Vec::new());
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        node.add_bitmap(persistent("b")).await.unwrap();
        let _left = node.add_anonymous_bitmap("a job", None).unwrap();
        store.fail(Some("store"));
        let error = node.close().await.unwrap().close_error.unwrap();
        let text = "node 'disk': Lost persistent bitmaps during inactivation of node 'disk': \
                    cannot store its persistent bitmaps: 'store' fails: node 'disk': the node ended \
                    while an anonymous bitmap of a job was not removed by its owner";
        assert_eq!(error.to_string().replace(": node 'disk': the node", ": the node"), {
            text.replace(": node 'disk': the node", ": the node")
        });
        // A poisoned node stores nothing.
        store.fail(None);
        let (node, _) = open(&disks, &store).await;
        node.add_bitmap(persistent("b")).await.unwrap();
        node.poison();
        let error = node.close().await.unwrap().close_error.unwrap();
        assert!(error.message().starts_with("Lost persistent bitmaps"), "{error}");
        assert_eq!(store.list(), []);
    });
}

#[test]
fn persistence_is_refused_where_nothing_would_be_stored() {
    run(1, async {
        let disks = DiskGraph::new();
        let store = FakeStore::limited(1);
        let (read_only, _) = disks.node("ro", vec![0; 4096], config(&store, true)).await;
        let (plain, _) = disks.node("plain", vec![0; 4096], Config::default()).await;
        let (disk, _) = open(&disks, &store).await;
        disk.add_bitmap(persistent("first")).await.unwrap();
        let table = [
            (
                &read_only,
                ErrorKind::ReadOnly,
                "Can't make bitmap 'b' persistent in 'ro': the node is read-only, the bitmap would \
                 be lost",
            ),
            (
                &plain,
                ErrorKind::NotSupported,
                "Can't store persistent bitmaps to plain: Operation not supported",
            ),
            (
                &disk,
                ErrorKind::LimitExceeded,
                "Can't make bitmap 'b' persistent in 'disk': Maximum number of persistent bitmaps \
                 is already reached",
            ),
        ];
        for (node, kind, text) in table {
            let error = node.add_bitmap(persistent("b")).await.unwrap_err();
            assert_eq!((error.kind(), error.message()), (kind, text));
            let change = disks.graph().change().add_bitmap(node, persistent("b"));
            assert_eq!(change.commit().await.unwrap_err().message(), text);
            assert_eq!(node.find_bitmap("b"), None);
        }
        disks.graph().inactivate(&disk).await.unwrap();
        let error = disk.add_bitmap(persistent("b")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Inactive);
    });
}

#[test]
fn a_removal_that_fails_leaves_the_bitmap() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        let before = snapshot(&node);
        store.fail(Some("remove"));
        node.remove_bitmap("b").await.unwrap_err();
        assert_eq!(snapshot(&node), before);
        assert_eq!(store.list(), [("b".to_owned(), false)]);
        // In a change it is removed from memory; what is left in the image is reported, and goes
        // with the next store.
        let report = disks.graph().change().remove_bitmap(&node, "b").commit().await.unwrap();
        let left = &report.stored_bitmaps_left[0];
        assert!(left.message().contains("cannot remove the stored bitmap 'b'"), "{left}");
        assert_eq!((node.bitmaps().len(), store.list().len()), (0, 1));
        store.fail(None);
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(store.list(), []);
    });
}

/// A change that fails after an edit removed a bitmap: the image still has it.
#[test]
fn a_failed_change_removes_nothing_from_the_image() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let (node, _) = open(&disks, &store).await;
        let change = disks.graph().change().remove_bitmap(&node, "b").clear_bitmap(&node, "none");
        change.commit().await.unwrap_err();
        assert_eq!(store.take_log(), ["load"]);
        assert_eq!((dirty(&node, "b"), store.list().len()), (vec![0..512], 1));
    });
}

/// Read-only: stored first, then fixed. Writable again: the next write marks them.
#[test]
fn a_reopen_as_read_only_stores_bitmaps() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b")]);
        let disks = DiskGraph::new();
        let graph = disks.graph();
        let (node, _) = open(&disks, &store).await;
        write(&node, 512).await;
        let to = |word| Options::new().with("read-only", word);
        store.fail(Some("store"));
        let error = graph.reopen(&node, to(true)).await.unwrap_err();
        assert!(error.message().contains("cannot store its persistent bitmaps"), "{error}");
        assert!(node.is_writable() && !info(&node, "b").readonly);
        store.fail(None);
        graph.reopen(&node, to(true)).await.unwrap();
        assert_eq!(store.list(), [("b".to_owned(), false)]);
        assert_eq!(lock(&store.image)[0].stream, [0b11]);
        assert!(info(&node, "b").readonly);
        assert_eq!(node.clear_bitmap("b").await.unwrap_err().kind(), ErrorKind::ReadOnly);
        graph.reopen(&node, to(false)).await.unwrap();
        assert!(!info(&node, "b").readonly);
        write(&node, 1024).await;
        assert_eq!(store.list(), [("b".to_owned(), true)]);
        assert_eq!(dirty(&node, "b"), [0..1536]);
        assert!(node.close().await.unwrap().is_clean());
        assert_eq!(lock(&store.image)[0].stream, [0b111]);
    });
}

/// While the node is inactive another process has the image: what it did to bitmaps is seen
/// afterwards. A lease goes on, with at least what it had.
#[test]
fn bitmaps_are_handed_over_with_the_image() {
    run(1, async {
        let store = FakeStore::with(vec![stored("b"), stored("gone"), stored("leased")]);
        let disks = DiskGraph::new();
        let graph = disks.graph();
        let (node, _) = open(&disks, &store).await;
        write(&node, 512).await;
        let lease = node.lease_bitmap("leased", "an export").unwrap();
        store.fail(Some("store"));
        graph.inactivate(&node).await.unwrap_err();
        assert!(node.is_active());
        write(&node, 1024).await;
        store.fail(None);
        graph.inactivate(&node).await.unwrap();
        assert!(info(&node, "b").readonly);
        assert_eq!(lock(&store.image)[0].stream, [0b111]);
        {
            let mut image = lock(&store.image);
            image.retain(|it| it.name != "gone");
            image[0].stream = vec![0x80];
            image.push(stored("new"));
        }
        store.fail(Some("load"));
        graph.activate(&node).await.unwrap_err();
        assert!(!node.is_active());
        store.fail(None);
        graph.activate(&node).await.unwrap();
        let names: Vec<_> = node.bitmaps().into_iter().filter_map(|info| info.name).collect();
        assert_eq!(names, ["leased".into(), "b".into(), "new".into()]);
        assert_eq!(dirty(&node, "b"), [3584..4096]);
        assert_eq!(dirty(&node, "leased"), [0..1536]);
        write(&node, 2048).await;
        assert_eq!(dirty(&node, "leased"), [0..1536, 2048..2560]);
        drop(lease);
    });
}

#[test]
fn a_broken_list_of_bitmaps_fails_the_open() {
    run(1, async {
        let disks = DiskGraph::new();
        for image in [
            vec![stored("b"), stored("b")],
            vec![stored("")],
            vec![InImage { granularity: 1000, ..InImage::in_use("b") }],
        ] {
            let store = FakeStore::with(image);
            let error = disks.open_node("disk", vec![0; 4096], config(&store, false)).await;
            assert_eq!(error.err().unwrap().kind(), ErrorKind::InvalidImage);
        }
        let store = FakeStore::with(vec![stored("b")]);
        store.fail(Some("load"));
        let error = disks.open_node("disk", vec![0; 4096], config(&store, false)).await;
        assert!(error.err().unwrap().message().contains("cannot load its bitmaps"));
        assert!(disks.graph().find("disk").is_err());
    });
}
