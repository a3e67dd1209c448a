//! What is refused, with its text; nothing is left behind.

use bds_core::ErrorKind;
use bds_core::graph::{BitmapOptions, BlockOps, Perm};
use bds_core::request::{Backend, BackendOptions};
use bds_jobs::backup::{Backup, BackupOptions, BackupSync, BitmapSync};

use super::kit::{World, run, shape};

#[test]
fn texts_of_wrong_options() {
    run(1, async |world: World| {
        let source = world.make("disk", "mem").await;
        let target = world.make("copy", "raw").await;
        source.add_bitmap(BitmapOptions::named("b")).await.unwrap();
        let before = shape(world.graph());
        type Edit = fn(&mut BackupOptions);
        let table: [(Edit, &str); 15] = [
            (|o| o.target = o.source.clone(), "Source and target cannot be the same"),
            (|o| o.compress = true, "Compression is not supported for this drive copy"),
            (|o| o.max_workers = 0, "max-workers must be between 1 and 2147483647"),
            (|o| o.max_workers = 1 << 40, "max-workers must be between 1 and 2147483647"),
            (|o| o.max_chunk = -1, "max-chunk must be zero (which means no limit) or positive"),
            (
                |o| o.max_chunk = 4096,
                "Required max-chunk (4096) is less than backup cluster size (65536)",
            ),
            (|o| o.min_cluster_size = 3000, "min-cluster-size needs to be a power of 2"),
            (
                |o| o.sync = BackupSync::Incremental,
                "must provide a valid bitmap name for 'incremental' sync mode",
            ),
            (
                |o| o.sync = BackupSync::Bitmap,
                "must provide a valid bitmap name for 'bitmap' sync mode",
            ),
            (|o| o.bitmap = Some("c".into()), "Bitmap 'c' could not be found"),
            (
                |o| o.bitmap = Some("b".into()),
                "Bitmap sync mode must be given when providing a bitmap",
            ),
            (
                |o| {
                    o.sync = BackupSync::Incremental;
                    (o.bitmap, o.bitmap_mode) = (Some("b".into()), Some(BitmapSync::Never));
                },
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            ),
            (
                |o| {
                    o.sync = BackupSync::None;
                    (o.bitmap, o.bitmap_mode) = (Some("b".into()), Some(BitmapSync::Always));
                },
                "sync mode 'none' does not produce meaningful bitmap outputs",
            ),
            (
                |o| (o.bitmap, o.bitmap_mode) = (Some("b".into()), Some(BitmapSync::Never)),
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode \
                 'full'",
            ),
            (
                |o| o.bitmap_mode = Some(BitmapSync::Never),
                "Cannot specify bitmap sync mode without a bitmap",
            ),
        ];
        for (edit, text) in table {
            let mut options = BackupOptions::new(&source, &target, "job0");
            edit(&mut options);
            let error = Backup::prepare(options).await.unwrap_err();
            assert_eq!(error.message(), text);
        }
        assert_eq!(shape(world.graph()), before);
        assert!(!source.bitmaps()[0].busy);
    });
}

#[test]
fn a_backup_ends_while_its_nodes_may_not_be_ejected() {
    for is_cancelled in [false, true] {
        run(1, async |world: World| {
            let source = world.make("disk", "mem").await;
            let target = world.make("copy", "mem").await;
            let _blockers = [&source, &target].map(|node| node.block(BlockOps::all(), "a user"));
            let mut options = BackupOptions::new(&source, &target, "job0");
            if is_cancelled {
                options.sync = BackupSync::None;
            }
            let job = world.start(options).await;
            if is_cancelled {
                job.cancel(true).unwrap();
            }
            assert_eq!(job.wait().await.is_ok(), !is_cancelled);
            let report = world.graph().shutdown().await;
            assert!(report.failed.is_empty(), "{report:?}");
        });
    }
}

#[test]
fn a_backup_ends_whatever_the_disks_user_shares() {
    run(1, async |world: World| {
        let source = world.make("disk", "mem").await;
        let target = world.make("copy", "mem").await;
        let guest = Backend::new(&source, BackendOptions::default()).unwrap();
        let mut options = BackupOptions::new(&source, &target, "job0");
        options.sync = BackupSync::None;
        let job = world.start(options).await;
        // Its filter's copies have no consistent disk to read from any more.
        guest.set_access(Perm::empty(), Perm::WRITE).await.unwrap();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert_eq!(guest.node().unwrap().id(), source.id());
        let report = world.graph().shutdown().await;
        assert!(report.failed.is_empty(), "{report:?}");
    });
}

#[test]
fn other_users_of_the_nodes_are_named() {
    run(1, async |world: World| {
        let source = world.make("disk", "mem").await;
        let (target, other) = (world.make("copy", "mem").await, world.make("other", "mem").await);
        let first = Backup::prepare(BackupOptions::new(&source, &target, "job0")).await.unwrap();
        let again = Backup::prepare(BackupOptions::new(&source, &other, "job1")).await;
        let error = again.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains("job0"), "{error}");
        let resize = target.block(BlockOps::RESIZE, "also");
        drop(resize);
        // A start that fails gives everything back.
        let before = world.graph().find("disk").unwrap();
        let wrong = bds_jobs::JobOptions::new("0 is no id");
        world.jobs.start(wrong, Box::new(first)).await.unwrap_err();
        drop(before);
        let second = Backup::prepare(BackupOptions::new(&source, &other, "job1")).await.unwrap();
        second.discard().await.unwrap();
    });
}
