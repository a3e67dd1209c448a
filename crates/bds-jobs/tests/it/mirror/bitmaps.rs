//! Tests of the hand-over of named dirty bitmaps.

use bds_core::graph::{BitmapOptions, NodeRef};
use bds_jobs::mirror::{BitmapTransfer, Mirror, MirrorOptions};
use bds_jobs::{JobOptions, JobStatus};

use super::kit::{LEN, World, pattern, write, writer};

/// Name, dirty bytes, and whether it records, of each bitmap.
fn list(node: &NodeRef) -> Vec<(String, u64, bool)> {
    let bitmaps = node.bitmaps().into_iter();
    bitmaps
        .map(|bitmap| {
            (bitmap.name.as_deref().unwrap_or("").to_owned(), bitmap.count, bitmap.recording)
        })
        .collect()
}

#[test]
fn the_targets_bitmaps_go_on_where_the_sources_ended() {
    for transfer in [BitmapTransfer::None, BitmapTransfer::Copy, BitmapTransfer::Move] {
        let world = World::new(1);
        world.block_on(async {
            world.put("source", &pattern(1, LEN));
            world.put("target", &[0; 262_144]);
            let (source, target) = (world.raw("source").await, world.raw("target").await);
            let named = |name: &str| BitmapOptions {
                granularity: Some(4096),
                ..BitmapOptions::named(name)
            };
            source.add_bitmap(named("daily")).await.expect("added");
            let off = BitmapOptions { disabled: true, ..named("off") };
            source.add_bitmap(off).await.expect("added");
            let guest = writer(&source, "guest");
            write(&guest, 0, &[1; 4096]).await.expect("written");
            let options = MirrorOptions {
                bitmaps: transfer,
                ..MirrorOptions::new(&source, &target, "mirror0")
            };
            let mirror = Mirror::prepare(options).await.expect("it can be prepared");
            assert_eq!(list(&target), [], "a trial leaves nothing");
            let job = world.manager.start(JobOptions::new("mirror0"), Box::new(mirror)).await;
            let job = job.expect("it starts");
            job.wait_status(JobStatus::Ready).await.expect("it gets ready");
            write(&guest, 8192, &[1; 4096]).await.expect("written");
            job.complete().expect("it completes");
            job.wait().await.expect("it ends well");
            write(&guest, 65536, &[1; 4096]).await.expect("written");
            let stays = [("daily".to_owned(), 8192, true), ("off".to_owned(), 0, false)];
            let goes_on = [("daily".to_owned(), 12288, true), ("off".to_owned(), 0, false)];
            let (source, target) = (list(&source), list(&target));
            match transfer {
                BitmapTransfer::None => assert_eq!((&*source, &*target), (&stays[..], &[][..])),
                BitmapTransfer::Copy => {
                    assert_eq!((&*source, &*target), (&stays[..], &goes_on[..]))
                }
                BitmapTransfer::Move => assert_eq!((&*source, &*target), (&[][..], &goes_on[..])),
            }
        });
        world.end();
    }
}

#[test]
fn bitmaps_that_the_target_cannot_take_are_refused_at_the_start() {
    let world = World::new(1);
    world.block_on(async {
        world.put("source", &pattern(1, LEN));
        world.put("target", &[0; 262_144]);
        let (source, target) = (world.raw("source").await, world.raw("target").await);
        source.add_bitmap(BitmapOptions::named("daily")).await.expect("added");
        target.add_bitmap(BitmapOptions::named("daily")).await.expect("added");
        let options = || MirrorOptions {
            bitmaps: BitmapTransfer::Copy,
            ..MirrorOptions::new(&source, &target, "mirror0")
        };
        let error = Mirror::prepare(options()).await.expect_err("the name is taken");
        assert!(error.to_string().contains("daily"), "{error}");
        target.remove_bitmap("daily").await.expect("removed");
        let lease = source.lease_bitmap("daily", "a backup").expect("leased");
        let error = Mirror::prepare(options()).await.expect_err("it is in use");
        assert!(error.to_string().contains("another operation uses it"), "{error}");
        drop(lease);
        let mirror = Mirror::prepare(options()).await.expect("it can be prepared");
        mirror.discard().await.expect("discarded");
    });
    world.end();
}
