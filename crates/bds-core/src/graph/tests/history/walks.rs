//! Uses after free in QEMU, continued: walks over lists that changed, lists with released entries,
//! and names and ids of nodes that are gone.

use std::sync::{Arc, Mutex};

use bds_refcount::Stale;

use super::scripted_graph::{ScriptedGraph, commit, names_below, options, run, run_schedules};
use crate::driver::BoxFuture;
use crate::graph::{
    Access, BitmapOptions, BlockOps, Graph, NodeRef, ShutdownStage, Stoppable, walk,
};
use crate::test_kit::gate_port::{read, root};
use crate::{ErrorKind, Result};

fn top_names(graph: &Graph) -> Vec<String> {
    graph.top_level().map(|node| node.name().to_owned()).collect()
}

/// Row 13 (178bd438af). A drain descended through the children by pointer while the completion of a
/// request removed nodes. Here a drain holds what it drains, and a node is closed only after the
/// section.
#[test]
fn uaf_drain_of_children_detached_meanwhile() {
    run_schedules(30, |test| async move {
        let [top, mid, low] = test.chain(["top", "mid", "low"]).await;
        let guest = root(&top, "guest", Access::READ);
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        let low_id = low.id();
        drop(low);
        let cut = {
            let (graph, mid) = (test.graph.clone(), mid.clone());
            bds_io::spawn(async move { graph.set_backing(&mid, None).await })
        };
        let drained = test.graph.drain_subtree(&top).await;
        assert_eq!((top.in_flight(), mid.in_flight()), (0, 0));
        drop(drained);
        request.await.unwrap();
        cut.await.unwrap();
        test.graph.reap().await;
        assert_eq!(names_below(&top), ["top", "mid"]);
        assert_eq!(test.graph.acquire(low_id).unwrap_err(), Stale::Released);
        test.assert_undrained();
    });
}

/// Row 14 (5e003f17ec). The walk over all nodes kept its position as a bare pointer, and the next
/// step read a deleted node. Here the walk is a list of ids, looked up one by one.
#[test]
fn uaf_walk_over_nodes_that_are_deleted_meanwhile() {
    run(|test| async move {
        for name in ["a", "b", "c", "d"] {
            test.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap();
        }
        let mut walk = test.graph.top_level();
        let at = walk.next().unwrap();
        assert_eq!(at.name(), "a");
        let error = test.graph.del("a").await.unwrap_err();
        assert!(error.to_string().contains("iterator 'walk'"), "the walk holds its node: {error}");
        drop(at);
        for name in ["a", "b", "d"] {
            test.graph.del(name).await.unwrap();
        }
        test.graph.add(options("driver=part,node-name=e")).await.unwrap();
        let rest: Vec<String> = walk.map(|node| node.name().to_owned()).collect();
        assert_eq!(rest, ["c"], "neither deleted nor new nodes");
        assert_eq!(top_names(&test.graph), ["c", "e"]);
    });
}

/// Row 15 (RHBZ 2058457; f6d38c9f6d, bac09b093e). A walk recomputed which node it held a reference
/// to; a mirror job had inserted a filter meanwhile, so the walk released a reference that was not
/// its own. Here the reference is a value, wherever the walk stops.
#[test]
fn uaf_walk_releases_the_reference_it_took() {
    run(|test| async move {
        let disk = test.part("disk").await;
        let other = test.part("other").await;
        let roots = [root(&disk, "guest", Access::READ), root(&other, "other", Access::READ)];
        let filter = test.sieve("filter", "disk").await;
        let before = (disk.count(), other.count(), filter.count());
        for stop_after in 0..3 {
            let mut walk = test.graph.top_level();
            let held: Vec<NodeRef> = walk.by_ref().take(stop_after).collect();
            test.graph.insert_filter(&disk, &filter).await.unwrap();
            drop((held, walk));
            test.graph.drop_filter(&filter).await.unwrap();
            assert_eq!((disk.count(), other.count(), filter.count()), before);
        }
        assert_eq!(roots[0].target().id(), disk.id());
    });
}

/// Row 16 (307bc43095). At exit the monitor's references were dropped but its list was kept, so
/// that a late inactivation walked over freed nodes. Here the list is the references.
#[test]
fn uaf_monitor_list_after_shutdown() {
    run(|test| async move {
        let id = test.graph.add(options("driver=part,node-name=owned")).await.unwrap();
        let kept = test.part("kept").await;
        test.graph.own(kept.clone()).unwrap();
        let report = test.graph.shutdown().await;
        assert_eq!((report.closed.len(), report.leaked.len()), (1, 1));
        assert!(!test.graph.is_owned(id) && !test.graph.is_owned(kept.id()));
        assert_eq!(top_names(&test.graph), [""; 0]);
        // A late migration inactivates what is left.
        test.graph.inactivate_all().await.unwrap();
        assert!(!kept.is_active());
        drop(kept);
        test.graph.inactivate_all().await.unwrap();
        test.assert_empty().await;
    });
}

/// Row 17 (3cf746b3f1). A node kept a pointer to the node whose options it had inherited; that one
/// was deleted, and the next reopen read it. Here it is an id, cleared when the link ends.
#[test]
fn uaf_parent_whose_options_were_inherited() {
    run(|test| async move {
        let text = "driver=part,node-name=top,file.driver=sieve,file.node-name=mid,\
                    file.file.driver=part,file.file.node-name=low";
        let top = test.open(text).await;
        let mid = test.graph.find("mid").unwrap();
        let low = test.graph.find("low").unwrap();
        assert_eq!(low.inherits_from(), Some(mid.id()));
        commit(test.graph.change().drop_filter(&mid).remove(mid)).await.unwrap();
        assert_eq!(low.inherits_from(), None, "the filter has ended");
        assert_eq!(walk::next_below(&top).map(|node| node.id()), None);
        test.graph.reopen(&top, options("cache.no-flush=on")).await.unwrap();
        assert!(!low.flags().cache.no_flush, "it inherits no options any more");

        let text = "driver=part,node-name=two,file.driver=part,file.node-name=under";
        let two = test.open(text).await;
        let under = test.graph.find("under").unwrap();
        assert_eq!(under.inherits_from(), Some(two.id()));
        two.close().await.unwrap();
        assert_eq!(under.inherits_from(), None, "not above it any more");
    });
}

/// Row 19 (d876bf676f). A job's list of edges was walked while the job's end freed its entries one
/// by one. Here a drain that walks over a node's parents holds each of them.
#[test]
fn uaf_job_edges_detached_while_their_nodes_are_drained() {
    run_schedules(30, |test| async move {
        let nodes = [test.part("a").await, test.part("b").await, test.part("c").await];
        let edges: Vec<_> = nodes
            .iter()
            .map(|node| test.graph.attach_job(node, "job0", Access::READ).unwrap())
            .collect();
        let guest = root(&nodes[0], "guest", Access::READ);
        let request = bds_io::spawn(async move { read(&guest).await });
        let end_of_job = bds_io::spawn(async move {
            for edge in edges {
                drop(edge);
                bds_io::yield_now().await;
            }
        });
        let drained = test.graph.drain_all().await;
        bds_io::yield_now().await;
        drop(drained);
        end_of_job.await;
        request.await.unwrap();
        assert!(nodes.iter().all(|node| node.count() == 1));
        test.assert_undrained();
    });
}

/// One of two jobs that are stopped; stopping the first releases the other.
struct LinkedJob {
    graph: Graph,
    name: &'static str,
    other: Mutex<Option<Arc<dyn Stoppable>>>,
    stopped: Arc<Mutex<Vec<&'static str>>>,
}

impl Stoppable for LinkedJob {
    fn name(&self) -> String {
        self.name.into()
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.stopped.lock().unwrap().push(self.name);
            drop(self.other.lock().unwrap().take());
            bds_io::yield_now().await;
            // Is added to the list during the walk.
            let late = LinkedJob { name: "late", ..linked_job(&self.graph, &self.stopped) };
            let late: Arc<dyn Stoppable> = Arc::new(late);
            self.graph.on_shutdown(ShutdownStage::Jobs, &late);
            Ok(())
        })
    }
}

fn linked_job(graph: &Graph, stopped: &Arc<Mutex<Vec<&'static str>>>) -> LinkedJob {
    let (graph, stopped) = (graph.clone(), Arc::clone(stopped));
    LinkedJob { graph, name: "b", other: Mutex::default(), stopped }
}

/// Row 20 (e2626874a3). The loop that cancels all jobs went on at a job that the cancelled one had
/// freed. Here the loop holds every job it is going to stop.
#[test]
fn uaf_loop_over_jobs_of_which_one_ends_another() {
    run(|test| async move {
        let stopped = Arc::default();
        let other: Arc<dyn Stoppable> = Arc::new(linked_job(&test.graph, &stopped));
        let first = linked_job(&test.graph, &stopped);
        let first = LinkedJob { name: "a", other: Mutex::new(Some(Arc::clone(&other))), ..first };
        let first: Arc<dyn Stoppable> = Arc::new(first);
        test.graph.on_shutdown(ShutdownStage::Jobs, &first);
        test.graph.on_shutdown(ShutdownStage::Jobs, &other);
        drop(other);
        let report = test.graph.shutdown().await;
        assert!(report.failed.is_empty());
        assert_eq!(*stopped.lock().unwrap(), ["a", "b"], "each once, although 'a' released 'b'");
    });
}

/// Row 24 (90ce8a061b). Swapping the contents of two nodes gave a name to a node that was on no
/// list of names; removing it crashed. Here contents are not swapped: a name leads to the same
/// node, wherever that node is in the graph.
#[test]
fn uaf_name_of_a_node_that_was_replaced() {
    for first_to_go in ["old", "new"] {
        run(|test| async move {
            let ids = [add(&test, "old").await, add(&test, "new").await];
            let guest = root(&test.graph.find("old").unwrap(), "guest", Access::READ);
            let (old, new) = (test.graph.find("old").unwrap(), test.graph.find("new").unwrap());
            test.graph.replace(&old, &new).await.unwrap();
            drop((old, new));
            assert_eq!(guest.target().id(), ids[1]);
            drop(guest);
            for (name, id) in ["old", "new"].into_iter().zip(ids) {
                assert_eq!(test.graph.find(name).unwrap().id(), id);
            }
            test.graph.del(first_to_go).await.unwrap();
            assert_eq!(test.graph.find(first_to_go).unwrap_err().kind(), ErrorKind::NotFound);
            let again = add(&test, first_to_go).await;
            assert!(!ids.contains(&again), "a new node under a free name");
            test.graph.shutdown().await;
            test.assert_empty().await;
        });
    }
}

async fn add(test: &ScriptedGraph, name: &str) -> crate::graph::NodeId {
    test.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap()
}

/// The slot number in an id.
fn slot(id: crate::graph::NodeId) -> u64 {
    id.to_u64() & 0xFF_FFFF
}

/// Row 26 (CVE-2024-7409: 3e7ef738c8, 3874f5f73c). Clients outlived their NBD server and, when they
/// left, were removed from the lists of the next server. Here the next one even has the same name
/// and the same slot.
#[test]
fn uaf_late_clients_do_not_touch_the_successor() {
    run(|test| async move {
        let first = test.part("server").await;
        let id = first.id();
        let bitmap = first.add_bitmap(BitmapOptions::named("clients")).await.unwrap();
        let lease = test.graph.lease_bitmap(bitmap, "client").unwrap();
        let late = (first.claim_job("client").unwrap(), first.block(BlockOps::all(), "client"));
        let own_bitmap = first.add_anonymous_bitmap("client", None).unwrap();
        let closed = first.close().await.unwrap();
        assert!(!closed.is_clean(), "the report names the remaining clients");

        let next = test.part("server").await;
        assert_eq!(slot(next.id()), slot(id), "the slot is reused");
        assert_ne!(next.id(), id);
        let _job = next.claim_job("its own client").unwrap();
        let _block = next.block(BlockOps::DELETE, "its own client");
        let bitmap_of_next = next.add_bitmap(BitmapOptions::named("clients")).await.unwrap();
        let _lease = test.graph.lease_bitmap(bitmap_of_next, "its own client").unwrap();
        let watch = test.graph.watch(id);
        assert!(watch.has_fired() && !lease.is_valid());
        drop((lease, late, own_bitmap));
        assert_eq!(test.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(test.graph.remove_bitmap(bitmap).await.unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(next.job().as_deref(), Some("its own client"));
        assert_eq!(next.blocked(BlockOps::DELETE).len(), 1);
        assert_eq!(next.bitmaps()[0].leased_by.as_deref(), Some("its own client"));
        assert_eq!(next.count(), 1);
    });
}
