//! Tests edits of bitmaps in changes: one point in time, all or nothing, whatever step fails and
//! whenever the future is dropped.

use std::sync::Arc;

use futures_util::poll;

use super::{dirty, fine, persistent, snapshot};
use crate::driver::WriteFlags;
use crate::graph::{BitmapLease, BitmapOptions, Change, NodeRef};
use crate::request::Backend;
use crate::test_kit::bitmap_store::FakeStore;
use crate::test_kit::disk::{Config, DiskGraph, State};
use crate::test_kit::{iov, let_tasks_run, run};

/// Two disks with bitmaps, one of them split.
struct Disks {
    graph: DiskGraph,
    one: NodeRef,
    two: NodeRef,
    lease: BitmapLease,
    _states: [Arc<State>; 2],
}

async fn disks(turns: usize) -> Disks {
    let graph = DiskGraph::new();
    let store = FakeStore::with(Vec::new());
    let config = Config { turns, store: Some(store), ..Config::default() };
    let (one, first) = graph.node("one", vec![0; 4096], config).await;
    let config = Config { turns, ..Config::default() };
    let (two, second) = graph.node("two", vec![0; 4096], config).await;
    one.add_bitmap(persistent("daily")).await.unwrap();
    one.add_bitmap(persistent("old")).await.unwrap();
    two.add_bitmap(fine("daily")).await.unwrap();
    for node in [&one, &two] {
        let disk = crate::test_kit::disk::backend(node);
        disk.write(512, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
    }
    let lease = two.lease_bitmap("daily", "a job").unwrap();
    Disks { graph, one, two, lease, _states: [first, second] }
}

impl Disks {
    /// Every verb, on both disks.
    fn checkpoint(&self) -> Change {
        self.checkpoint_with_error(usize::MAX)
    }

    /// As `checkpoint`, with an edit that is refused after `place` others.
    fn checkpoint_with_error(&self, place: usize) -> Change {
        let Self { graph, one, two, lease, .. } = self;
        let copy = BitmapOptions { disabled: true, ..fine("copy") };
        let steps: [&dyn Fn(Change) -> Change; 10] = [
            &|change| change.add_bitmap(one, persistent("next")),
            &|change| change.add_bitmap(two, fine("next")),
            &|change| change.add_bitmap(one, copy.clone()),
            &|change| change.merge_bitmaps(one, "copy", &[(one, "daily"), (one, "old")]),
            &|change| change.clear_bitmap(one, "old"),
            &|change| change.disable_bitmap(one, "daily"),
            &|change| change.enable_bitmap(one, "copy"),
            &|change| change.split_bitmap(lease),
            &|change| change.remove_bitmap(one, "old"),
            &|change| change.rename(one, "renamed"),
        ];
        let mut change = graph.graph().change();
        for (number, step) in steps.into_iter().enumerate() {
            if number == place {
                change = change.clear_bitmap(two, "no such bitmap");
            }
            change = step(change);
        }
        if place == steps.len() { change.clear_bitmap(two, "no such bitmap") } else { change }
    }

    fn snapshot(&self) -> (String, Vec<impl PartialEq + std::fmt::Debug + use<>>, bool) {
        let mut all = snapshot(&self.one);
        all.extend(snapshot(&self.two));
        (self.one.name().to_owned(), all, self.lease.successor().is_some())
    }

    fn check_done(&self) {
        let names = |node: &NodeRef| -> Vec<String> {
            node.bitmaps().iter().filter_map(|it| it.name.as_deref().map(str::to_owned)).collect()
        };
        assert_eq!(names(&self.one), ["daily", "next", "copy"]);
        assert_eq!(names(&self.two), ["daily", "next"]);
        assert_eq!(dirty(&self.one, "copy"), [512..1024]);
        assert!(self.lease.successor().is_some());
        assert_eq!(self.one.name(), "renamed");
    }
}

/// The future is dropped after any number of polls: all has happened, or nothing.
#[test]
fn a_dropped_change_has_done_everything_or_nothing() {
    let mut done = [0, 0];
    for polls in 0..60 {
        run(polls, async {
            let disks = disks(3).await;
            let before = disks.snapshot();
            let mut commit = Box::pin(disks.checkpoint().commit());
            for _ in 0..polls {
                if poll!(commit.as_mut()).is_ready() {
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(commit);
            let_tasks_run().await;
            match disks.snapshot() == before {
                true => done[0] += 1,
                false => {
                    disks.check_done();
                    done[1] += 1;
                }
            }
        });
    }
    assert!(done[0] > 0 && done[1] > 0, "both happen: {done:?}");
}

/// An edit that is refused, at each place among the others.
#[test]
fn a_refused_edit_at_any_place_refuses_all() {
    run(1, async {
        let disks = disks(0).await;
        let before = disks.snapshot();
        for place in 0..=10 {
            let error = disks.checkpoint_with_error(place).commit().await.unwrap_err();
            assert_eq!(error.message(), "Dirty bitmap 'no such bitmap' not found");
            assert_eq!(disks.snapshot(), before, "at {place}");
        }
        disks.checkpoint().commit().await.unwrap();
        disks.check_done();
    });
}

/// Writers that write the same number to both disks: a checkpoint cuts both at one moment, so no
/// write is behind it on one disk that was acknowledged before one that is in front of it.
#[test]
fn a_change_cuts_all_disks_at_one_point_in_time() {
    for seed in 0..40 {
        run(seed, async {
            let disks = disks(2).await;
            let writer = |node: &NodeRef| crate::test_kit::disk::backend(node);
            let (one, two) = (writer(&disks.one), writer(&disks.two));
            // To one, then to two, block by block.
            let load = bds_io::spawn(async move {
                for block in 2..8 {
                    write(&one, block * 512).await;
                    write(&two, block * 512).await;
                }
            });
            bds_io::yield_now().await;
            for _ in 0..seed {
                bds_io::yield_now().await;
            }
            disks.checkpoint().commit().await.unwrap();
            load.await;
            // What the old and the new bitmaps have: each block is in one of them.
            let cut = |old: &[std::ops::Range<u64>]| old.last().map_or(0, |area| area.end);
            let first = dirty(&disks.one, "daily");
            let second: Vec<_> = disks.lease.bits().areas(0..u64::MAX).collect();
            let (first, second) = (cut(&first), cut(&second));
            assert!(first == second || first == second + 512, "{first} {second} seed {seed}");
            let rest = |from: u64| if from < 4096 { vec![from..4096] } else { vec![] };
            assert_eq!(dirty(&disks.one, "next"), rest(first.max(1024)));
            assert_eq!(dirty(&disks.two, "next"), rest(second.max(1024)));
            let successor = disks.lease.successor().unwrap();
            assert_eq!(successor.areas(0..u64::MAX).collect::<Vec<_>>(), rest(second.max(1024)));
        });
    }
}

async fn write(disk: &Backend, at: u64) {
    disk.write(at, iov(&[1; 512], 1), WriteFlags::empty()).await.unwrap();
}
