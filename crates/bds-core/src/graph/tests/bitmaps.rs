//! Bitmaps as things that are owned, leased and released: refusals, ends, and what a closing says of them.

use super::fakes::run;
use crate::ErrorKind;
use crate::graph::MAX_BITMAP_NAME_LEN;

#[test]
fn names_are_one_to_so_many_bytes_and_each_is_taken_once() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,node-name=n,filename=a").await;
        let longest = "x".repeat(MAX_BITMAP_NAME_LEN);
        for wrong in ["", &format!("{longest}x")] {
            assert_eq!(node.add_bitmap(wrong).unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        let id = node.add_bitmap(&longest).unwrap();
        assert_eq!(node.add_bitmap(&longest).unwrap_err().kind(), ErrorKind::AlreadyExists);
        world.graph.remove_bitmap(id).unwrap();
        let again = node.add_bitmap(&longest).unwrap();
        assert_ne!(again, id, "an id is issued once");
        assert_eq!(world.graph.remove_bitmap(id).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(node.find_bitmap(&longest), Some(again));
    });
}

#[test]
fn they_are_listed_in_the_order_in_which_they_were_made() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,node-name=n,filename=a").await;
        let first = node.add_bitmap("first").unwrap();
        node.add_bitmap("second").unwrap();
        world.graph.remove_bitmap(first).unwrap();
        node.add_bitmap("third").unwrap(); // where the first was
        let names: Vec<_> = node.bitmaps().into_iter().filter_map(|info| info.name).collect();
        assert_eq!(names, ["second".into(), "third".into()]);
    });
}

#[test]
fn a_leased_one_is_neither_leased_again_nor_removed_until_the_lease_ends() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,node-name=n,filename=a").await;
        let id = node.add_bitmap("daily").unwrap();
        for _ in 0..2 {
            let lease = world.graph.lease_bitmap(id, "job 'one'").unwrap();
            for refused in [
                world.graph.lease_bitmap(id, "job 'two'").unwrap_err(),
                world.graph.remove_bitmap(id).unwrap_err(),
            ] {
                let words = "node 'n': bitmap 'daily' is in use by job 'one'";
                assert_eq!((refused.kind(), &*refused.to_string()), (ErrorKind::InUse, words));
            }
            assert!(lease.is_valid());
            drop(lease);
        }
        world.graph.remove_bitmap(id).unwrap();
        assert!(node.bitmaps().is_empty());
    });
}

#[test]
fn an_anonymous_one_goes_with_its_owner_and_by_no_other_way() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,node-name=n,filename=a").await;
        let bitmap = node.add_anonymous_bitmap("job 'one'");
        let refused = world.graph.remove_bitmap(bitmap.id()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        assert_eq!(node.bitmaps()[0].owner.as_deref(), Some("job 'one'"));
        drop(bitmap);
        assert!(node.bitmaps().is_empty());
        assert!(node.close().await.unwrap().is_clean());
    });
}

#[test]
fn a_close_says_what_was_leased_or_not_given_back_and_ends_the_leases() {
    run(|world| async move {
        world.plain("a");
        let node = world.open("driver=file,node-name=n,filename=a").await;
        node.add_bitmap("idle").unwrap();
        let id = node.add_bitmap("daily").unwrap();
        let lease = world.graph.lease_bitmap(id, "job 'one'").unwrap();
        let bitmap = node.add_anonymous_bitmap("job 'two'");
        let report = node.close().await.unwrap();
        let error = report.close_error.expect("two were in use");
        let words = "node 'n': the node ended while bitmap 'daily' is in use by job 'one', an anonymous bitmap \
                     of job 'two' was not removed by its owner";
        assert_eq!((error.kind(), &*error.to_string()), (ErrorKind::InUse, words));
        assert!(!lease.is_valid());
        assert_eq!(world.graph.lease_bitmap(id, "late").unwrap_err().kind(), ErrorKind::Stale);
        drop((lease, bitmap));
    });
}
