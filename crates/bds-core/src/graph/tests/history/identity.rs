//! Mistaken identity and stale state in QEMU: wrong node, wrong permissions, a node that is gone.

use std::collections::BTreeSet;
use std::sync::Arc;

use bds_refcount::Release;

use super::scripted_graph::{commit, names_below, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, BitmapOptions, BlockOps, JobSlot, Perm};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;

/// Row 54 (4f78a16fee). A commit relied on the end of its job freeing the job and with it the job's
/// blockers; another holder kept the job, and the next step met the blockers. Here blockers end
/// with their guard; the object may live on.
#[test]
fn blockers_end_with_their_guard() {
    struct Job {
        claims: std::sync::Mutex<Option<(JobSlot, crate::graph::Blocker, crate::graph::JobEdge)>>,
    }
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let claims = (
            top.claim_job("commit0").unwrap(),
            base.block(BlockOps::all(), "job 'commit0' writes to it"),
            test.graph.attach_job(&base, "commit0", alone).unwrap(),
        );
        let job = Arc::new(Job { claims: std::sync::Mutex::new(Some(claims)) });
        let other_holder = Arc::clone(&job);
        assert_eq!(
            test.graph.attach_job(&base, "x", Access::ALL).unwrap_err().kind(),
            ErrorKind::InUse
        );
        drop(job.claims.lock().unwrap().take());
        drop(job);
        assert_eq!((top.job(), base.blocked(BlockOps::all()).len()), (None, 0));
        let next = test.graph.attach_job(&base, "next", Access::ALL);
        assert!(next.is_ok() && top.claim_job("next").is_ok());
        drop(other_holder);
    });
}

/// Row 56 (3b78420bb1). The replication filter copied another node's pointers to edges and wrote
/// through them without permissions. Here an edge has one parent, a child handle cannot be copied
/// (`compile_fail/copied_child.rs`), and each edge has its own permissions.
#[test]
fn permissions_belong_to_an_edge_and_its_parent() {
    run(|test| async move {
        let disk = test.part("disk").await;
        let writer = root(&disk, "writer", Access::ALL);
        let reader = root(&disk, "reader", Access::READ);
        let a = test.sieve("a", "disk").await;
        let b = test.sieve("b", "disk").await;
        let above = root(&a, "above", Access::ALL);
        let of = |node: &crate::graph::NodeRef| node.node().child("file").unwrap().access();
        assert!(writer.access().writes() && !reader.access().writes());
        assert!(of(&a).writes() && !of(&b).writes(), "each edge has its own permissions");
        drop(above);
        drop(test.graph.0.core.lock());
        assert!(!of(&a).writes(), "and only while a user above needs them");
    });
}

/// Row 57 (bfb8aa6d58). A snapshot's overlay was the node itself: the graph had a loop, and the
/// process crashed. Here every edge that is added or moved passes one check, in either direction.
#[test]
fn overlay_is_not_the_node_itself() {
    run(|test| async move {
        let [top, mid, base] = test.chain(["top", "mid", "base"]).await;
        let filter = test.sieve("filter", "top").await;
        let graph = &test.graph;
        let before = test.snapshot();
        for number in 0..8 {
            let change = graph.change();
            let change = match number {
                0 => change.append(&top, &top),
                1 => change.append(&top, &base),
                2 => change.append(&top, &mid),
                3 => change.append(&filter, &mid),
                4 => change.set_backing(&base, Some(&base)),
                5 => change.set_backing(&base, Some(&filter)),
                6 => change.replace_child(&filter, "file", &filter),
                _ => {
                    // Only all three together close the loop.
                    let turned = change.set_backing(&mid, None).set_backing(&base, Some(&mid));
                    turned.set_backing(&mid, Some(&base))
                }
            };
            let error = commit(change).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{number}: {error}");
            assert_eq!(test.snapshot(), before, "{number}");
        }
    });
}

/// Row 58 (b503de619e). Replacing a node merged the moved parents' shared permissions bit by bit
/// instead of computing them; a later change met the wrong sum and crashed. Here permissions are
/// always recomputed from the graph.
#[test]
fn permissions_after_a_replacement_are_recomputed() {
    run(|test| async move {
        let a = test.part("a").await;
        let b = test.part("b").await;
        let low = test.part("low").await;
        test.graph.set_backing(&b, Some(&low)).await.unwrap();
        let careful = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let of_a = root(&a, "careful", careful);
        let of_b = root(&b, "writer", Access::ALL);
        let before = test.snapshot();
        let error = test.graph.replace(&a, &b).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        let words = error.to_string();
        assert!(words.contains("careful") && words.contains("writer"), "{words}");
        assert_eq!(test.snapshot(), before);
        drop(of_b);
        test.graph.replace(&a, &b).await.unwrap();
        assert_eq!(of_a.target().id(), b.id());
        let backing = b.node().child("backing").unwrap();
        assert!(
            !backing.access().shared.contains(Perm::WRITE),
            "the restriction above applies below"
        );
        let error = test.graph.attach_job(&b, "late", Access::ALL).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        // After it is gone, the same graph has the same permissions again.
        drop(of_a);
        assert!(test.graph.attach_job(&b, "late", Access::ALL).is_ok());
        drop(test.graph.0.core.lock());
        assert!(backing.access().shared.contains(Perm::WRITE));
    });
}

/// Row 59 (a13de40a05, d3007d348a). A child was handed to another process although a filter above
/// it still wrote, and a snapshot was loaded into a node that had been handed over. Here
/// inactivation checks all users above, and every writer checks that the node is active.
#[test]
fn nodes_in_use_are_not_inactivated_and_inactive_nodes_are_not_written() {
    run(|test| async move {
        let disk = test.part("disk").await;
        let filter = test.sieve("filter", "disk").await;
        let writer = root(&filter, "guest", Access::ALL);
        let before = test.snapshot();
        let error = test.graph.inactivate(&disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("filter"), "{error}");
        let error = test.graph.inactivate_all().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Inactive);
        assert!(error.to_string().contains("guest"), "{error}");
        assert_eq!(test.snapshot(), before);
        drop(writer);
        test.fail_every_step(|| test.graph.inactivate_all()).await;
        assert!(!disk.is_writable() && !filter.is_writable());
        let loading = test.graph.attach_job(&disk, "loadvm", Access::ALL).unwrap_err();
        assert_eq!(loading.kind(), ErrorKind::Inactive);
        let fresh = test.part("fresh").await;
        let error = test.graph.set_backing(&fresh, Some(&disk)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Inactive);
        test.fail_every_step(|| test.graph.activate_all()).await;
        assert!(test.graph.attach_job(&disk, "loadvm", Access::ALL).is_ok());
    });
}

/// Row 60 (20509c4b8b). A stream froze its chain only after a reopen that polled; meanwhile another
/// job had removed the base. Here the links are frozen before the first await, and a change that is
/// draining finds them frozen afterwards.
#[test]
fn chain_is_frozen_before_the_first_await() {
    run_schedules(40, |test| async move {
        let [top, mid, base] = test.chain(["top", "mid", "base"]).await;
        test.script.at("top", Point::Prepare, || async {
            for _ in 0..4 {
                bds_io::yield_now().await;
            }
            Ok(())
        });
        // A request is inside, so the other job's change is in progress when the stream begins.
        let guest = root(&top, "guest", Access::READ);
        let mut inside = Box::pin(read(&guest));
        assert!(futures_util::poll!(&mut inside).is_pending());
        let other_job = {
            let (graph, top, base) = (test.graph.clone(), top.clone(), base.clone());
            bds_io::spawn(async move { graph.set_backing(&top, Some(&base)).await })
        };
        while !guest.gate_blocked() {
            bds_io::yield_now().await;
        }
        let frozen = test.graph.freeze_chain(&top, &mid, "job 'stream0'").unwrap();
        inside.await.unwrap();
        test.graph.reopen(&top, options("cache.no-flush=on")).await.unwrap();
        let error = other_job.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains("stream0"), "{error}");
        assert_eq!(names_below(&top), ["top", "mid", "base"]);
        drop(frozen);
        test.graph.set_backing(&top, Some(&base)).await.unwrap();
        assert_eq!(mid.release(), Release::Last);
    });
}

/// Row 61 (592203e7cf). The migration of bitmaps visited the top nodes of backends and missed nodes
/// added by name and nodes further down. Here one walk visits all nodes, and another all top-level
/// ones.
#[test]
fn every_node_with_a_bitmap_is_found() {
    run(|test| async move {
        let [top, _mid] = test.chain(["top", "mid"]).await;
        let guest = root(&top, "guest", Access::READ);
        for name in ["by-name", "below"] {
            test.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap();
        }
        let over = test.part_on("over", "file=below").await;
        test.graph.own(over).unwrap();
        let all = ["top", "mid", "by-name", "below", "over"];
        for name in all {
            let node = test.graph.find(name).unwrap();
            node.add_bitmap(BitmapOptions::named("dirty")).await.unwrap();
        }
        let found: BTreeSet<String> = test
            .graph
            .nodes()
            .iter()
            .filter(|node| node.find_bitmap("dirty").is_some())
            .map(|node| node.name().to_owned())
            .collect();
        assert_eq!(found, all.iter().map(|name| (*name).to_owned()).collect());
        drop(guest);
    });
}
