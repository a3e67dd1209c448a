//! Bitmaps of backups: what they hold after success, failure and cancel, and chains of increments.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bds_core::driver::{Truncate, WriteFlags};
use bds_core::graph::{BitmapOptions, NodeRef};
use bds_core::{ErrorKind, Options};
use bds_io::Buf;
use bds_jobs::backup::{BackupOptions, BackupSync, BitmapSync};

use super::kit::{LEN, World, Writer, content, run, user};

const GRANULE: u64 = 64 << 10;

/// The granules that are dirty in a bitmap.
fn dirty(node: &NodeRef, name: &str) -> Vec<u64> {
    let lease = node.lease_bitmap(name, "test").unwrap();
    let bits = lease.bits();
    (0..LEN.div_ceil(GRANULE)).filter(|granule| bits.is_dirty(granule * GRANULE)).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Success,
    Failure,
    Cancel,
}

/// Granules 1, 3 and 5 are dirty before the backup, 7 is written meanwhile. In the failure, 5
/// cannot be written to the target.
fn outcome(mode: BitmapSync, end: End) -> Vec<u64> {
    let mut found = Vec::new();
    run(1, async |world: World| {
        let source = world.make("disk", "mem").await;
        let (target, control) = world.controlled("copy").await;
        source
            .add_bitmap(BitmapOptions { granularity: Some(65536), ..BitmapOptions::named("b") })
            .await
            .unwrap();
        let guest = user(&source, true);
        let write = |granule: u64| {
            guest.write(
                granule * GRANULE,
                bds_io::Buf::from_slice(&[7; 512]).iov(),
                Default::default(),
            )
        };
        for granule in [1, 3, 5] {
            write(granule).await.unwrap();
        }
        let mut options = BackupOptions::new(&source, &target, "job0");
        (options.sync, options.bitmap_mode) = (BackupSync::Bitmap, Some(mode));
        options.bitmap = Some("b".into());
        options.max_workers = 1;
        options.max_chunk = GRANULE as i64;
        control.delay_us.store(1000, Ordering::SeqCst);
        let job = world.start(options).await;
        assert!(source.bitmaps()[0].busy);
        write(7).await.unwrap();
        // Until the second of three is copied.
        while end != End::Success && control.bytes()[3 << 16] != 7 {
            bds_io::sleep(Duration::from_micros(100)).await;
        }
        match end {
            End::Success => job.wait().await.unwrap(),
            End::Failure => {
                control.errno.store(libc::EIO as u64, Ordering::SeqCst);
                job.wait().await.unwrap_err();
                control.errno.store(0, Ordering::SeqCst);
            }
            End::Cancel => {
                control.hold();
                bds_io::sleep(Duration::from_micros(100)).await;
                job.cancel(true).unwrap();
                control.release();
                job.wait().await.unwrap_err();
            }
        }
        assert!(!source.bitmaps()[0].busy);
        found = dirty(&source, "b");
        if end == End::Success {
            let copy = content(&target).await;
            assert!([1, 3, 5].iter().all(|g| copy[(g * GRANULE) as usize] == 7));
        }
    });
    found
}

#[test]
fn bitmaps_after_each_end_by_table() {
    use BitmapSync::{Always, Never, OnSuccess};
    let all = vec![1, 3, 5, 7];
    for mode in [OnSuccess, Never, Always] {
        let expected = if mode == Never { all.clone() } else { vec![7] };
        assert_eq!(outcome(mode, End::Success), expected, "{mode:?}");
        for end in [End::Failure, End::Cancel] {
            let found = outcome(mode, end);
            if mode == Always {
                // 1 and 3 were copied by then, and the target was flushed.
                assert!(found.contains(&5) && found.contains(&7), "{end:?} {found:?}");
                assert!(!found.contains(&1), "{end:?} {found:?}");
            } else {
                assert_eq!(found, all, "{mode:?} {end:?}");
            }
        }
    }
}

/// A full backup and increments of it under writes: each restores its point.
#[test]
fn a_chain_of_increments_restores_each_point() {
    for seed in 0..6 {
        run(seed, async |world: World| {
            let source = world.make("disk", "qcow2").await;
            let granularity = Some(if seed % 2 == 0 { 4096 } else { 128 << 10 });
            let bitmap = BitmapOptions { granularity, ..BitmapOptions::named("b") };
            source.add_bitmap(bitmap).await.unwrap();
            let guest = Writer::new(&source).await;
            let mut copies = Vec::new();
            for number in 0..4_usize {
                let writing = guest.run(seed * 10 + number as u64, 25);
                bds_io::sleep(Duration::from_micros(700)).await;
                let name = format!("copy{number}");
                let below = number.checked_sub(1).map(|n| format!("copy{n}"));
                let target = world.make_on(&name, "qcow2", below.as_deref()).await;
                let mut options = BackupOptions::new(&source, &target, "job0");
                options.bitmap = Some("b".into());
                options.bitmap_mode = Some(BitmapSync::OnSuccess);
                if number > 0 {
                    options.sync = BackupSync::Incremental;
                }
                options.staging_len = if seed < 3 { 0 } else { 1 << 20 };
                let first = guest.completed();
                let job = world.start(options).await;
                let last = guest.completed() + 1;
                job.wait().await.unwrap();
                world.jobs.dismiss("job0").unwrap();
                writing.await;
                copies.push((target, first..=last));
            }
            for (target, between) in copies {
                guest.find(&content(&target).await, between);
            }
        });
    }
}

/// Scenario 38: commands for bitmaps while a backup holds one. What does not fit is refused by its
/// kind, nothing changes, and the job ends well.
#[test]
fn scenario_38_commands_for_bitmaps_beside_a_backup() {
    run(3, async |world: World| {
        let source = world.make("disk", "mem").await;
        let text = "driver=mem,node-name=other,size=1M";
        let other = world.graph().open(Options::parse(text).unwrap()).await.unwrap();
        let fine =
            |name: &str| BitmapOptions { granularity: Some(512), ..BitmapOptions::named(name) };
        for (node, options) in [
            (&source, BitmapOptions::named("busy")),
            (&source, BitmapOptions::named("sum")),
            (&source, fine("fine")),
            (&other, BitmapOptions::named("long")),
        ] {
            node.add_bitmap(options).await.unwrap();
        }
        let guest = user(&source, true);
        guest.write(GRANULE, Buf::from_slice(&[1; 512]).iov(), WriteFlags::empty()).await.unwrap();
        let (target, control) = world.controlled("copy").await;
        control.hold();
        let mut options = BackupOptions::new(&source, &target, "job0");
        options.sync = BackupSync::Incremental;
        options.bitmap = Some("busy".into());
        options.bitmap_mode = Some(BitmapSync::OnSuccess);
        let job = world.start(options).await;
        let state = || format!("{:?}", source.bitmaps());
        let before = state();

        let refusals = [
            source.clear_bitmap("busy").await,
            source.enable_bitmap("busy").await,
            source.disable_bitmap("busy").await,
            source.remove_bitmap("busy").await,
            source.merge_bitmaps("busy", &[]).await,
            source.merge_bitmaps("busy", &[(&source, "fine")]).await,
            source.merge_bitmaps("sum", &[(&source, "busy")]).await,
            source.merge_bitmaps("sum", &[(&source, "fine"), (&source, "busy")]).await,
        ];
        for refused in refusals {
            let error = refused.unwrap_err();
            let text = "Bitmap 'busy' is currently in use by another operation and cannot be used";
            assert_eq!((error.kind(), error.message()), (ErrorKind::InUse, text));
        }
        let error = source.merge_bitmaps("sum", &[(&other, "long")]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.message().contains("are of different sizes"), "{error}");
        guest.truncate(Truncate::to(LEN * 2)).await.unwrap_err();
        assert_eq!((state(), source.len()), (before.clone(), LEN));
        // A merge of nothing does nothing; one of another granularity rounds outwards.
        source.merge_bitmaps("sum", &[]).await.unwrap();
        assert_eq!(state(), before);
        source.clear_bitmap("sum").await.unwrap();
        source.merge_bitmaps("sum", &[(&source, "fine")]).await.unwrap();
        assert_eq!(dirty(&source, "sum"), [1]);

        control.release();
        job.wait().await.unwrap();
        assert_eq!(dirty(&source, "busy"), Vec::<u64>::new());
        source.remove_bitmap("busy").await.unwrap();
        guest.truncate(Truncate::to(LEN * 2)).await.unwrap();
    });
}
