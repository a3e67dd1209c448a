//! Which node is it, and is it gone? Wrong answers to the two questions, and rules of the graph that were not kept.

use std::collections::BTreeSet;
use std::sync::Arc;

use bds_refcount::Release;

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, commit, names_below, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, JobSlot, Operations, Perm};

/// Row 54 (4f78a16fee). A commit relied on the end of its job freeing the job, and with it the job's blockers; somebody else still held the job, and the
/// next step met the blockers. Here each effect has its own verb; the object may live on.
#[test]
fn blockers_end_by_their_own_verb() {
    struct Job {
        claims: std::sync::Mutex<Option<(JobSlot, crate::graph::Blocker, crate::graph::JobEdge)>>,
    }
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let claims = (
            top.claim_job("commit0").unwrap(),
            base.block(Operations::all(), "job 'commit0' writes to it"),
            world.graph.attach_job(&base, "commit0", alone).unwrap(),
        );
        let job = Arc::new(Job { claims: std::sync::Mutex::new(Some(claims)) });
        let somebody_else = Arc::clone(&job);
        assert_eq!(
            world.graph.attach_job(&base, "x", Access::ALL).unwrap_err().kind(),
            ErrorKind::InUse
        );
        drop(job.claims.lock().unwrap().take());
        drop(job);
        assert_eq!((top.job(), base.blocked(Operations::all()).len()), (None, 0));
        let next = world.graph.attach_job(&base, "next", Access::ALL);
        assert!(next.is_ok() && top.claim_job("next").is_ok());
        drop(somebody_else);
    });
}

/// Row 56 (3b78420bb1). The replication filter copied another node's pointers to edges and wrote through them without having asked for permission. Here an edge
/// has one parent, a door cannot be copied (`compile_fail/copied_child.rs`), and each edge has its own permissions.
#[test]
fn permissions_belong_to_an_edge_and_its_parent() {
    run(|world| async move {
        let disk = world.part("disk").await;
        let writer = root(&disk, "writer", Access::ALL);
        let reader = root(&disk, "reader", Access::READ);
        let a = world.sieve("a", "disk").await;
        let b = world.sieve("b", "disk").await;
        let above = root(&a, "above", Access::ALL);
        let of = |node: &crate::graph::NodeRef| node.node().child("file").unwrap().access();
        assert!(writer.access().writes() && !reader.access().writes());
        assert!(of(&a).writes() && !of(&b).writes(), "what one may, the other may not");
        drop(above);
        drop(world.graph.0.core.lock());
        assert!(!of(&a).writes(), "and only as long as somebody asks");
    });
}

/// Row 57 (bfb8aa6d58). A snapshot whose overlay was the very node it was taken of: the graph had a circle, and the process died. Here every edge comes
/// and moves through one check, whatever the way round.
#[test]
fn overlay_is_not_the_node_itself() {
    run(|world| async move {
        let [top, mid, base] = world.chain(["top", "mid", "base"]).await;
        let filter = world.sieve("filter", "top").await;
        let graph = &world.graph;
        let before = world.picture();
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
                    // Only all together close the circle.
                    let turned = change.set_backing(&mid, None).set_backing(&base, Some(&mid));
                    turned.set_backing(&mid, Some(&base))
                }
            };
            let error = commit(change).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{number}: {error}");
            assert_eq!(world.picture(), before, "{number}");
        }
    });
}

/// Row 58 (b503de619e). Replacing a node added up what the moved parents share, bit by bit, instead of computing it; a later change met the wrong sum and died. Here
/// permissions are computed anew, whatever has led to the graph.
#[test]
fn permissions_after_a_replacement_are_those_of_the_graph_as_it_is() {
    run(|world| async move {
        let a = world.part("a").await;
        let b = world.part("b").await;
        let low = world.part("low").await;
        world.graph.set_backing(&b, Some(&low)).await.unwrap();
        let careful = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let of_a = root(&a, "careful", careful);
        let of_b = root(&b, "writer", Access::ALL);
        let before = world.picture();
        let error = world.graph.replace(&a, &b).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        let words = error.to_string();
        assert!(words.contains("careful") && words.contains("writer"), "{words}");
        assert_eq!(world.picture(), before);
        drop(of_b);
        world.graph.replace(&a, &b).await.unwrap();
        assert_eq!(of_a.target().id(), b.id());
        let backing = b.node().child("backing").unwrap();
        assert!(!backing.access().shared.contains(Perm::WRITE), "careful above, careful below");
        let error = world.graph.attach_job(&b, "late", Access::ALL).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        // It came, and it goes: the same graph has the same permissions.
        drop(of_a);
        assert!(world.graph.attach_job(&b, "late", Access::ALL).is_ok());
        drop(world.graph.0.core.lock());
        assert!(backing.access().shared.contains(Perm::WRITE));
    });
}

/// Row 59 (a13de40a05, d3007d348a). A child was given to another process although a filter above it still wrote, and a snapshot was loaded into a node that had
/// been given away. Here who may write is asked of all above, and being given away is a state that every writer meets.
#[test]
fn nodes_in_use_are_not_given_away_and_given_nodes_are_not_written() {
    run(|world| async move {
        let disk = world.part("disk").await;
        let filter = world.sieve("filter", "disk").await;
        let writer = root(&filter, "guest", Access::ALL);
        let before = world.picture();
        let error = world.graph.inactivate(&disk).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("filter"), "{error}");
        let error = world.graph.inactivate_all().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Inactive);
        assert!(error.to_string().contains("guest"), "{error}");
        assert_eq!(world.picture(), before);
        drop(writer);
        world.fail_every_step(|| world.graph.inactivate_all()).await;
        assert!(!disk.is_writable() && !filter.is_writable());
        let loading = world.graph.attach_job(&disk, "loadvm", Access::ALL).unwrap_err();
        assert_eq!(loading.kind(), ErrorKind::Inactive);
        let fresh = world.part("fresh").await;
        let error = world.graph.set_backing(&fresh, Some(&disk)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Inactive);
        world.fail_every_step(|| world.graph.activate_all()).await;
        assert!(world.graph.attach_job(&disk, "loadvm", Access::ALL).is_ok());
    });
}

/// Row 60 (20509c4b8b). A stream froze its chain only after a reopen that polled, and meanwhile another job had taken the base away. Here the links are frozen before
/// the first step that waits, and a change that had already begun to drain then finds them frozen.
#[test]
fn chain_is_frozen_before_anybody_waits() {
    run_schedules(40, |world| async move {
        let [top, mid, base] = world.chain(["top", "mid", "base"]).await;
        world.script.at("top", Point::Prepare, || async {
            for _ in 0..4 {
                bds_io::yield_now().await;
            }
            Ok(())
        });
        // Somebody is inside, so the other job's change is under way when the stream begins.
        let guest = root(&top, "guest", Access::READ);
        let mut inside = Box::pin(read(&guest));
        assert!(futures_util::poll!(&mut inside).is_pending());
        let other_job = {
            let (graph, top, base) = (world.graph.clone(), top.clone(), base.clone());
            bds_io::spawn(async move { graph.set_backing(&top, Some(&base)).await })
        };
        while !guest.is_closed() {
            bds_io::yield_now().await;
        }
        let frozen = world.graph.freeze_chain(&top, &mid, "job 'stream0'").unwrap();
        inside.await.unwrap();
        world.graph.reopen(&top, options("cache.no-flush=on")).await.unwrap();
        let error = other_job.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains("stream0"), "{error}");
        assert_eq!(names_below(&top), ["top", "mid", "base"]);
        drop(frozen);
        world.graph.set_backing(&top, Some(&base)).await.unwrap();
        assert_eq!(mid.release(), Release::Last);
    });
}

/// Row 61 (592203e7cf). The migration of bitmaps went over what backends have at their top, and missed nodes that were added by name and those further down. Here
/// one walk finds all there is, and another all that stands at the top.
#[test]
fn every_node_with_a_bitmap_is_found() {
    run(|world| async move {
        let [top, _mid] = world.chain(["top", "mid"]).await;
        let guest = root(&top, "guest", Access::READ);
        for name in ["by-name", "below"] {
            world.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap();
        }
        let over = world.part_on("over", "file=below").await;
        world.graph.own(over).unwrap();
        let all = ["top", "mid", "by-name", "below", "over"];
        for name in all {
            world.graph.find(name).unwrap().add_bitmap("dirty").unwrap();
        }
        let found: BTreeSet<String> = world
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
