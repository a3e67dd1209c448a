//! Tests how leases end: what the bitmap holds after a backup that succeeded, failed or was
//! cancelled.

use super::{dirty, fine, info};
use crate::bitmap::HBitmap;
use crate::error::ErrorKind;
use crate::graph::{BitmapLease, BitmapOptions, NodeRef};
use crate::request::Backend;
use crate::test_kit::disk::{Config, DiskGraph};
use crate::test_kit::run;

/// A disk whose bitmap has block 0 ("old"), and is split; block 1 was written since ("new").
async fn backup(disks: &DiskGraph, options: BitmapOptions) -> (Backend, NodeRef, BitmapLease) {
    let config = Config { inline: true, ..Config::default() };
    let (disk, _) = disks.disk(vec![0; 4096], config).await;
    let node = disk.node().unwrap();
    node.add_bitmap(options).await.unwrap();
    disk.write_at(0, &[1; 512]).unwrap();
    let lease = node.lease_bitmap("b", "job 'backup'").unwrap();
    lease.split().unwrap();
    disk.write_at(512, &[1; 512]).unwrap();
    (disk, node, lease)
}

fn areas(bits: &HBitmap) -> Vec<std::ops::Range<u64>> {
    bits.areas(0..u64::MAX).collect()
}

#[test]
fn a_split_freezes_the_bitmap_and_its_successor_records() {
    run(1, async {
        let disks = DiskGraph::new();
        let (disk, node, lease) = backup(&disks, fine("b")).await;
        assert_eq!(areas(&lease.bits()), [0..512]);
        assert_eq!(areas(&lease.successor().unwrap()), [512..1024]);
        let facts = info(&node, "b");
        assert_eq!((facts.count, facts.busy, facts.recording), (512, true, true));
        assert_eq!(lease.split().unwrap_err().kind(), ErrorKind::InvalidInput, "once");
        drop(disk);
    });
}

/// Old and new remain, however the lease goes.
#[test]
fn reclaiming_keeps_old_and_new() {
    for is_dropped in [true, false] {
        run(1, async {
            let disks = DiskGraph::new();
            let (disk, node, lease) = backup(&disks, fine("b")).await;
            match is_dropped {
                true => drop(lease),
                false => lease.reclaim(),
            }
            assert_eq!(dirty(&node, "b"), [0..1024]);
            disk.write_at(2048, &[1; 512]).unwrap();
            assert_eq!(dirty(&node, "b"), [0..1024, 2048..2560], "it records again");
            assert!(!info(&node, "b").busy);
        });
    }
}

#[test]
fn abdicating_keeps_what_came_since() {
    run(1, async {
        let disks = DiskGraph::new();
        let (disk, node, lease) = backup(&disks, fine("b")).await;
        let id = lease.id();
        lease.abdicate().unwrap();
        disk.write_at(2048, &[1; 512]).unwrap();
        assert_eq!(dirty(&node, "b"), [512..1024, 2048..2560]);
        assert_eq!(node.find_bitmap("b"), Some(id), "the same bitmap");
    });
}

/// A backup that failed half-way: what it did not copy is dirty still.
#[test]
fn abdicating_may_keep_what_was_not_copied() {
    run(1, async {
        let disks = DiskGraph::new();
        let (_disk, node, lease) = backup(&disks, fine("b")).await;
        let uncopied = HBitmap::new(4096, 1024).unwrap();
        uncopied.set(3000..3001);
        lease.abdicate_keeping(&uncopied).unwrap();
        assert_eq!(dirty(&node, "b"), [512..1024, 2048..3072]);
        // Of another length: refused, and reclaimed.
        let lease = node.lease_bitmap("b", "another").unwrap();
        lease.split().unwrap();
        let error = lease.abdicate_keeping(&HBitmap::new(512, 512).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(dirty(&node, "b"), [512..1024, 2048..3072]);
        assert!(!info(&node, "b").busy);
    });
}

#[test]
fn a_lease_that_was_not_split_cannot_abdicate() {
    run(1, async {
        let disks = DiskGraph::new();
        let (disk, _) = disks.disk(vec![0; 4096], Config::default()).await;
        let node = disk.node().unwrap();
        node.add_bitmap(fine("b")).await.unwrap();
        let lease = node.lease_bitmap("b", "an export").unwrap();
        disk.write_at(0, &[1; 512]).unwrap();
        assert_eq!(areas(&lease.bits()), [0..512], "leased, it records");
        assert_eq!(lease.abdicate().unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(dirty(&node, "b"), [0..512]);
        assert!(!info(&node, "b").busy);
    });
}

/// A disabled bitmap has a disabled successor: what is written during the backup is not recorded.
#[test]
fn the_successor_of_a_disabled_bitmap_is_disabled() {
    run(1, async {
        let disks = DiskGraph::new();
        let options = BitmapOptions { disabled: true, ..fine("b") };
        let (_disk, node, lease) = backup(&disks, options).await;
        assert_eq!(lease.successor().unwrap().dirty_granules(), 0);
        lease.abdicate().unwrap();
        let facts = info(&node, "b");
        assert_eq!((facts.count, facts.recording), (0, false));
    });
}

/// A lease outlives its end in a change, and the next lease: dropping it does nothing.
#[test]
fn an_ended_lease_does_not_end_the_next_one() {
    run(1, async {
        let disks = DiskGraph::new();
        let (_disk, node, first) = backup(&disks, fine("b")).await;
        disks.graph().change().abdicate_bitmap(&first, None).commit().await.unwrap();
        let second = node.lease_bitmap("b", "second").unwrap();
        assert_eq!(first.split().unwrap_err().kind(), ErrorKind::Stale);
        drop(first);
        assert_eq!(info(&node, "b").leased_by.as_deref(), Some("second"));
        drop(second);
        assert_eq!(dirty(&node, "b"), [512..1024]);
    });
}

/// The bits of a lease stay readable after the node has ended; nothing else works.
#[test]
fn a_lease_keeps_neither_node_nor_bitmap() {
    run(1, async {
        let disks = DiskGraph::new();
        let (disk, node, lease) = backup(&disks, fine("b")).await;
        drop(disk);
        let report = node.close().await.unwrap();
        let error = report.close_error.unwrap();
        let text = "the node ended while bitmap 'b' is in use by job 'backup'";
        assert_eq!(error.message(), text);
        assert!(!lease.is_valid());
        assert_eq!(areas(&lease.bits()), [0..512]);
        assert_eq!(lease.split().unwrap_err().kind(), ErrorKind::Stale);
        let change = disks.graph().change().split_bitmap(&lease);
        assert_eq!(change.commit().await.unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(lease.abdicate().unwrap_err().kind(), ErrorKind::Stale);
    });
}
