//! Tests bitmaps of a node: names, owners, leases, removal, and what a close reports of them.

use crate::ErrorKind;
use crate::graph::{BitmapOptions, MAX_BITMAP_NAME_LEN};
use crate::options::Options;
use crate::test_kit::logging::run;

#[test]
fn bitmap_names_are_bounded_and_unique() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        let longest = "x".repeat(MAX_BITMAP_NAME_LEN);
        for wrong in ["", &format!("{longest}x")] {
            assert_eq!(
                node.add_bitmap(BitmapOptions::named(wrong)).await.unwrap_err().kind(),
                ErrorKind::InvalidInput
            );
        }
        let id = node.add_bitmap(BitmapOptions::named(longest.as_str())).await.unwrap();
        assert_eq!(
            node.add_bitmap(BitmapOptions::named(longest.as_str())).await.unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        fixture.graph.remove_bitmap(id).await.unwrap();
        let again = node.add_bitmap(BitmapOptions::named(longest.as_str())).await.unwrap();
        assert_ne!(again, id, "an id is issued once");
        assert_eq!(fixture.graph.remove_bitmap(id).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(node.find_bitmap(&longest), Some(again));
    });
}

#[test]
fn bitmaps_are_listed_in_creation_order() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        let first = node.add_bitmap(BitmapOptions::named("first")).await.unwrap();
        node.add_bitmap(BitmapOptions::named("second")).await.unwrap();
        fixture.graph.remove_bitmap(first).await.unwrap();
        node.add_bitmap(BitmapOptions::named("third")).await.unwrap(); // in the first one's slot
        let names: Vec<_> = node.bitmaps().into_iter().filter_map(|info| info.name).collect();
        assert_eq!(names, ["second".into(), "third".into()]);
    });
}

#[test]
fn a_leased_bitmap_is_neither_leased_again_nor_removed() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        let id = node.add_bitmap(BitmapOptions::named("daily")).await.unwrap();
        for _ in 0..2 {
            let lease = fixture.graph.lease_bitmap(id, "job 'one'").unwrap();
            for refused in [
                fixture.graph.lease_bitmap(id, "job 'two'").unwrap_err(),
                fixture.graph.remove_bitmap(id).await.unwrap_err(),
            ] {
                let words = "node 'n': Bitmap 'daily' is currently in use by another operation and \
                             cannot be used: job 'one' holds it";
                assert_eq!((refused.kind(), &*refused.to_string()), (ErrorKind::InUse, words));
            }
            assert!(lease.is_valid());
            drop(lease);
        }
        fixture.graph.remove_bitmap(id).await.unwrap();
        assert!(node.bitmaps().is_empty());
    });
}

#[test]
fn an_anonymous_bitmap_is_removed_only_by_its_owner() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        let bitmap = node.add_anonymous_bitmap("job 'one'", None).unwrap();
        let refused = fixture.graph.remove_bitmap(bitmap.id()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        assert_eq!(node.bitmaps()[0].owner.as_deref(), Some("job 'one'"));
        drop(bitmap);
        assert!(node.bitmaps().is_empty());
        assert!(node.close().await.unwrap().is_clean());
    });
}

#[test]
fn close_reports_leased_and_anonymous_bitmaps_and_ends_leases() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        node.add_bitmap(BitmapOptions::named("idle")).await.unwrap();
        let id = node.add_bitmap(BitmapOptions::named("daily")).await.unwrap();
        let lease = fixture.graph.lease_bitmap(id, "job 'one'").unwrap();
        let bitmap = node.add_anonymous_bitmap("job 'two'", None).unwrap();
        let report = node.close().await.unwrap();
        let error = report.close_error.expect("two bitmaps were in use");
        let words = "node 'n': the node ended while bitmap 'daily' is in use by job 'one', an anonymous bitmap \
                     of job 'two' was not removed by its owner";
        assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::InUse, words));
        assert!(!lease.is_valid());
        assert_eq!(fixture.graph.lease_bitmap(id, "late").unwrap_err().kind(), ErrorKind::Stale);
        drop((lease, bitmap));
    });
}

/// A change with a rename, a reopen and edits of bitmaps fails at each of its steps in turn.
#[test]
fn a_change_that_fails_at_any_step_leaves_bitmaps_alone() {
    run(|fixture| async move {
        fixture.plain("a");
        let node = fixture.open("driver=file,node-name=n,filename=a").await;
        node.add_bitmap(BitmapOptions::named("old")).await.unwrap();
        let lease = node.lease_bitmap("old", "a job").unwrap();
        let before = node.bitmaps();
        let mut steps = 0;
        loop {
            let change = fixture
                .graph
                .change()
                .add_bitmap(&node, BitmapOptions::named("new"))
                .disable_bitmap(&node, "new")
                .split_bitmap(&lease)
                .rename(&node, "m")
                .reopen(&node, Options::parse("discard=unmap").unwrap());
            fixture.graph.0.faults.set(Some(steps));
            let done = change.commit().await;
            if fixture.graph.0.faults.has_struck() {
                assert_eq!(done.unwrap_err().message(), "injected failure of a step");
                assert_eq!((node.bitmaps(), node.name()), (before.clone(), "n"), "step {steps}");
                assert!(lease.successor().is_none());
                steps += 1;
                continue;
            }
            fixture.graph.0.faults.set(None);
            done.unwrap();
            break;
        }
        assert!(steps > 5, "{steps} steps");
        assert_eq!((node.bitmaps().len(), node.name()), (2, "m"));
        assert!(lease.successor().is_some() && node.flags().discard);
    });
}
