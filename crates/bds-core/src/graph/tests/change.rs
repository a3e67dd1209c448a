//! Tests changes of edges: the resulting graph, refusals, and requests in flight during a change.

use std::sync::Arc;

use crate::driver::Role;
use crate::graph::{Access, Edge, NodeRef, walk};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::logging::{Fixture, run};
use crate::{ErrorKind, Options};

const READ: Access = Access::READ;
const WRITE: Access = Access::ALL;

/// Edges as `parent.child -> target`, sorted.
fn edges(fixture: &Fixture) -> Vec<String> {
    let mut edges = Vec::new();
    for node in fixture.graph.nodes() {
        for (child, _, target) in walk::children(&node) {
            edges.push(format!("{}.{child} -> {}", node.name(), target.name()));
        }
    }
    edges
}

async fn file(fixture: &Fixture, name: &'static str) -> NodeRef {
    fixture.plain(name);
    fixture.open(&format!("driver=file,filename={name},node-name={name}")).await
}

/// A format node `name` on a file of its own.
async fn image(fixture: &Fixture, name: &'static str) -> NodeRef {
    let path: &'static str = Box::leak(format!("{name}.img").into_boxed_str());
    fixture.plain(path);
    let text = format!("driver=cow,node-name={name},file.driver=file,file.filename={path}");
    let options = Options::parse(&text).unwrap();
    fixture.graph.open(options).await.unwrap()
}

#[test]
fn append_moves_all_users_to_the_overlay() {
    run(|fixture| async move {
        let top = image(&fixture, "top").await;
        let overlay = image(&fixture, "over").await;
        let user = fixture.open("driver=pass,node-name=user,file=top").await;
        let root = root(&top, "guest", WRITE);
        let counts = (top.count(), overlay.count());
        fixture.graph.append(&top, &overlay).await.unwrap();
        let edges = edges(&fixture);
        assert!(edges.contains(&"over.backing -> top".to_owned()), "{edges:?}");
        assert!(edges.contains(&"user.file -> over".to_owned()), "{edges:?}");
        assert_eq!(root.target().name(), "over");
        // Two users moved and one edge was added; the caller's references are as before.
        assert_eq!((top.count(), overlay.count()), (counts.0 - 2 + 1, counts.1 + 2));
        assert_eq!(top.name(), "top", "a reference denotes the node it did before");
        assert_eq!(walk::backing_chain(&user).len(), 2, "filters are left out");
        drop((root, user, overlay, top));
        assert_eq!(fixture.graph.reap().await.iter().filter(|report| report.is_clean()).count(), 5);
        assert_eq!(fixture.graph.dump(), "");
    });
}

#[test]
fn append_of_an_overlay_opened_on_the_top_keeps_its_edge() {
    run(|fixture| async move {
        let top = image(&fixture, "top").await;
        fixture.plain("o");
        let text = "driver=cow,node-name=over,file.driver=file,file.filename=o,backing=top";
        let overlay = fixture.open(text).await;
        let root = root(&top, "guest", READ);
        fixture.graph.append(&top, &overlay).await.unwrap();
        assert_eq!(root.target().name(), "over");
        assert_eq!(walk::next_below(&overlay).unwrap().id(), top.id());
        // Appending again changes nothing.
        let before = fixture.graph.dump();
        fixture.graph.append(&top, &overlay).await.unwrap();
        assert_eq!(fixture.graph.dump(), before);
    });
}

#[test]
fn refused_changes_change_nothing() {
    run(|fixture| async move {
        let top = image(&fixture, "top").await;
        let base = image(&fixture, "base").await;
        let other = image(&fixture, "other").await;
        let plain = file(&fixture, "plain").await;
        let ro = fixture.open("driver=pass,node-name=ro,file=other,read-only=on").await;
        fixture.plain("s");
        let refusing =
            "driver=cow,node-name=refusing,file.driver=file,file.filename=s,fail-close=on";
        let refusing = fixture.open(refusing).await;
        fixture.graph.set_backing(&top, Some(&base)).await.unwrap();
        let _root = root(&top, "guest", WRITE);
        let graph = &fixture.graph;
        let before = graph.dump();
        use ErrorKind::{InvalidInput, NotSupported, ReadOnly};
        let check = async |what: &str, change: crate::Result<()>, kind| {
            assert_eq!(change.unwrap_err().kind(), kind, "{what}");
            assert_eq!(graph.dump(), before, "{what}");
        };
        check("loop", graph.set_backing(&base, Some(&top)).await, InvalidInput).await;
        check("self", graph.set_backing(&base, Some(&base)).await, InvalidInput).await;
        check("append below", graph.append(&top, &base).await, InvalidInput).await;
        check("append self", graph.append(&other, &other).await, InvalidInput).await;
        check("backed elsewhere", graph.append(&other, &top).await, InvalidInput).await;
        check("no backing", graph.set_backing(&plain, Some(&other)).await, NotSupported).await;
        check("driver refuses", graph.set_backing(&refusing, Some(&other)).await, NotSupported)
            .await;
        check("driver refuses", graph.append(&other, &refusing).await, NotSupported).await;
        check("read-only", graph.replace(&top, &ro).await, ReadOnly).await;
        check("no filter", graph.insert_filter(&top, &ro).await, InvalidInput).await;
        check("no filter", graph.drop_filter(&top).await, InvalidInput).await;
    });
}

#[test]
fn nodes_of_another_graph_are_refused() {
    run(|fixture| async move {
        let ours = image(&fixture, "ours").await;
        let other = crate::graph::Graph::with_ports(fixture.graph.config().clone(), |_| {
            unreachable!("no edge is made")
        });
        let error = other.set_backing(&ours, None).await.unwrap_err();
        assert!(error.to_string().contains("another graph"), "{error}");
    });
}

#[test]
fn set_backing_attaches_exchanges_and_detaches() {
    run(|fixture| async move {
        let top = image(&fixture, "top").await;
        let one = image(&fixture, "one").await;
        let two = image(&fixture, "two").await;
        let backing = || walk::next_below(&top).map(|node| node.name().to_owned());
        fixture.graph.set_backing(&top, None).await.unwrap();
        for (to, name) in [(&one, "one"), (&two, "two"), (&two, "two")] {
            fixture.graph.set_backing(&top, Some(to)).await.unwrap();
            assert_eq!(backing().as_deref(), Some(name));
        }
        assert_eq!((one.count(), two.count()), (1, 2));
        fixture.graph.set_backing(&top, None).await.unwrap();
        assert_eq!((backing(), two.count()), (None, 1));
        assert_eq!(walk::children(&top).len(), 1);
    });
}

#[test]
fn a_filter_is_inserted_and_dropped() {
    run(|fixture| async move {
        let node = image(&fixture, "node").await;
        let user = fixture.open("driver=pass,node-name=user,file=node").await;
        let before = edges(&fixture);
        let filter = fixture.open("driver=pass,node-name=filter,file=node").await;
        fixture.graph.insert_filter(&node, &filter).await.unwrap();
        assert_eq!(walk::next_below(&user).unwrap().name(), "filter");
        assert_eq!(walk::next_below(&filter).unwrap().name(), "node");
        assert_eq!(walk::skip_filters(&user).name(), "node");
        fixture.graph.drop_filter(&filter).await.unwrap();
        drop(filter);
        fixture.graph.reap().await;
        assert_eq!(edges(&fixture), before);
    });
}

#[test]
fn a_filter_is_dropped_and_closed_in_one_change() {
    run(|fixture| async move {
        let node = image(&fixture, "node").await;
        let user = fixture.open("driver=pass,node-name=user,file=node").await;
        let before = fixture.graph.dump();
        let filter = fixture.open("driver=pass,node-name=filter,file=node").await;
        fixture.graph.insert_filter(&node, &filter).await.unwrap();
        // References held by edits of the same change do not block the removal; another holder's
        // does.
        let mine = filter.clone();
        let change = fixture.graph.change().drop_filter(&filter).remove(filter);
        let error = change.commit().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert_eq!(walk::next_below(&user).unwrap().name(), "filter");
        let change = fixture.graph.change().drop_filter(&mine).remove(mine);
        let report = change.commit().await.unwrap();
        let closed: Vec<&str> = report.closed.iter().map(|report| &*report.name).collect();
        assert_eq!(closed, ["filter"]);
        assert_eq!(fixture.graph.dump(), before);
    });
}

#[test]
fn a_node_that_a_waiting_change_refers_to_is_not_removed() {
    run(|fixture| async move {
        let node = image(&fixture, "node").await;
        let other = image(&fixture, "other").await;
        let waiting = fixture.graph.change().set_backing(&other, Some(&node));
        let error = fixture.graph.change().remove(node).commit().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        waiting.commit().await.unwrap();
        let second = fixture.graph.find("node").unwrap();
        fixture.graph.set_backing(&other, None).await.unwrap();
        let report = fixture.graph.change().remove(second).commit().await.unwrap();
        assert_eq!(report.closed[0].name, "node");
    });
}

/// A query is no user: the node leaves the graph, and is closed when the query has ended.
#[test]
fn a_node_that_a_query_looks_at_is_removed() {
    run(|fixture| async move {
        let node = image(&fixture, "node").await;
        let top = image(&fixture, "top").await;
        fixture.graph.set_backing(&top, Some(&node)).await.unwrap();
        let looked_at: Vec<_> = fixture.graph.nodes();
        let change = fixture.graph.change().set_backing(&top, None).remove(node);
        let report = change.commit().await.unwrap();
        assert!(report.closed.iter().all(|closed| closed.name != "node"), "it lives on");
        assert!(top.edges_below().iter().all(|edge| edge.child_name != "node"));
        drop(looked_at);
        let closed = fixture.graph.reap().await;
        assert!(closed.iter().any(|closed| closed.name == "node"), "the reap reports it");
        assert!(fixture.graph.find("node").is_err());
    });
}

#[test]
fn limits_follow_the_graph() {
    run(|fixture| async move {
        let top = image(&fixture, "top").await;
        let user = fixture.open("driver=pass,node-name=user,file=top").await;
        assert_eq!(user.limits().max_transfer, 4096, "the file's, two levels up");
        fixture.plain("n");
        let narrow = fixture.open("driver=file,node-name=narrow,filename=n,max-transfer=512").await;
        fixture.graph.set_backing(&top, Some(&narrow)).await.unwrap();
        assert_eq!(user.limits().max_transfer, 512, "the new backing node's");
        fixture.graph.set_backing(&top, None).await.unwrap();
        assert_eq!(user.limits().max_transfer, 4096);
    });
}

#[test]
fn common_backing_is_the_first_shared_image() {
    run(|fixture| async move {
        let base = image(&fixture, "base").await;
        let a = image(&fixture, "a").await;
        let b = image(&fixture, "b").await;
        assert!(walk::common_backing(&a, &b).is_none());
        fixture.graph.set_backing(&a, Some(&base)).await.unwrap();
        fixture.graph.set_backing(&b, Some(&base)).await.unwrap();
        assert_eq!(walk::common_backing(&a, &b).unwrap().id(), base.id());
        fixture.graph.set_backing(&b, Some(&a)).await.unwrap();
        assert_eq!(walk::common_backing(&b, &a).unwrap().id(), a.id());
    });
}

/// Reads through an edge until `stop` is set. Returns the number of reads.
async fn keep_reading(edge: Arc<Edge>, stop: Arc<std::sync::atomic::AtomicBool>) -> usize {
    let mut count = 0;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        read(&edge).await.unwrap();
        count += 1;
        bds_io::yield_now().await;
    }
    count
}

#[test]
fn requests_in_flight_succeed_during_changes() {
    run(|fixture| async move {
        let a = image(&fixture, "a").await;
        let b = image(&fixture, "b").await;
        let base = image(&fixture, "base").await;
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let root = root(&a, "guest", READ);
        let readers: Vec<_> = (0..6)
            .map(|_| bds_io::spawn(keep_reading(Arc::clone(&root), Arc::clone(&stop))))
            .collect();
        for round in 0..50 {
            let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
            fixture.graph.replace(from, to).await.unwrap();
            assert_eq!(root.target().id(), to.id());
            assert_eq!(from.node().tracker().in_flight(), 0, "no request stayed in the old node");
            // The fake driver asserts that no request is inside while its child is exchanged.
            fixture.graph.set_backing(to, Some(&base)).await.unwrap();
            bds_io::yield_now().await;
            fixture.graph.set_backing(to, None).await.unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let mut total = 0;
        for reader in readers {
            total += reader.await;
        }
        assert!(total >= 6, "no reader starved: {total}");
        let log = fixture.drivers.log();
        assert!(log.contains(&"read a".into()) && log.contains(&"read b".into()));
    });
}

#[test]
fn a_change_that_is_dropped_while_it_drains_changes_nothing() {
    run(|fixture| async move {
        let a = image(&fixture, "a").await;
        let b = image(&fixture, "b").await;
        let root = root(&a, "guest", READ);
        let before = fixture.graph.dump();
        let mut busy = Box::pin(read(&root));
        assert!(futures_util::poll!(&mut busy).is_pending());
        let mut change = Box::pin(fixture.graph.replace(&a, &b));
        for _ in 0..3 {
            assert!(futures_util::poll!(&mut change).is_pending());
            bds_io::yield_now().await;
        }
        assert!(root.gate_blocked());
        // A new request waits, also through a new edge.
        let late = crate::test_kit::gate_port::root(&a, "late", READ);
        let mut queued = Box::pin(read(&late));
        assert!(futures_util::poll!(&mut queued).is_pending());
        drop(late.clone());
        drop(change);
        assert!(!root.gate_blocked() && !late.gate_blocked());
        busy.await.unwrap();
        queued.await.unwrap();
        drop(late);
        assert_eq!(fixture.graph.dump(), before);
        fixture.graph.replace(&a, &b).await.unwrap();
        assert_eq!(root.target().id(), b.id());
    });
}

#[test]
fn roles_exclude_each_other() {
    let primary = Role::DATA | Role::PRIMARY;
    for (others, role, fits) in [
        (vec![], primary, true),
        (vec![primary], Role::COW, true),
        (vec![primary, Role::COW], Role::DATA, true),
        (vec![primary], Role::METADATA | Role::PRIMARY, false),
        (vec![Role::COW], Role::COW, false),
        (vec![Role::FILTERED], Role::FILTERED, false),
        (vec![], Role::FILTERED | Role::PRIMARY, true),
        (vec![], Role::FILTERED | Role::DATA, false),
        (vec![], Role::FILTERED | Role::COW, false),
    ] {
        let found = crate::graph::model::edge::check_role(others.iter().copied(), "x", role);
        assert_eq!(found.is_ok(), fits, "{others:?} + {role:?}");
    }
}

#[test]
fn nodes_swap_names_in_one_change_and_references_keep_their_nodes() {
    run(|fixture| async move {
        let top = image(&fixture, "disk").await;
        let overlay = image(&fixture, "new").await;
        let graph = &fixture.graph;
        let change = graph.change().append(&top, &overlay);
        change.rename(&top, "old").rename(&overlay, "disk").commit().await.unwrap();
        assert_eq!((top.name(), overlay.name()), ("old", "disk"));
        assert_eq!(graph.find("disk").unwrap().id(), overlay.id());
        assert_eq!(graph.find("old").unwrap().id(), top.id());
        assert_eq!(graph.find("new").unwrap_err().kind(), ErrorKind::NotFound, "free again");
        let before = graph.dump();
        for (node, name, kind) in
            [(&top, "disk", ErrorKind::AlreadyExists), (&top, "0", ErrorKind::InvalidInput)]
        {
            let refused = graph.change().rename(node, name).set_backing(&overlay, None).commit();
            assert_eq!(refused.await.unwrap_err().kind(), kind);
            assert_eq!(graph.dump(), before, "the whole change is refused");
        }
        let both = graph.change().rename(&top, "x").rename(&overlay, "x").commit().await;
        assert_eq!(both.unwrap_err().kind(), ErrorKind::AlreadyExists);
        // A name is freed with its node.
        drop((top, overlay));
        graph.reap().await;
        assert!(graph.find("disk").is_err() && graph.find("old").is_err());
        drop(image(&fixture, "old").await);
    });
}

#[test]
fn a_node_in_another_drained_section_is_not_removed() {
    run(|fixture| async move {
        let below = image(&fixture, "below").await;
        let filter = fixture.open("driver=pass,node-name=filter,file=below").await;
        let drained = fixture.graph.drain(&filter).await;
        let refused = fixture.graph.change().remove(filter.clone()).commit().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        assert!(refused.to_string().contains("drained section"), "{refused}");
        drop(drained);
        let report = fixture.graph.change().remove(filter).commit().await.unwrap();
        assert_eq!(report.closed.len(), 1);
        drop(below);
    });
}
