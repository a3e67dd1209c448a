//! More of what was used after it had been freed: walks over lists that changed, lists that kept what they had given up, and names of
//! the dead that found the living.

use std::sync::{Arc, Mutex};

use bds_refcount::Stale;

use super::super::fakes::{read, root};
use super::scripted_graph::{World, commit, names_below, options, run, run_schedules};
use crate::driver::BoxFuture;
use crate::graph::{Access, Graph, NodeRef, Operations, ShutdownStage, Stoppable, walk};
use crate::{ErrorKind, Result};

fn top_names(graph: &Graph) -> Vec<String> {
    graph.top_level().map(|node| node.name().to_owned()).collect()
}

/// Row 13 (178bd438af). A drain went down through the children by pointer while the completion of a request took nodes away. Here a drain
/// holds what it drains, and the end of a node waits for the end of the section.
#[test]
fn uaf_drain_of_children_that_go_meanwhile() {
    run_schedules(30, |world| async move {
        let [top, mid, low] = world.chain(["top", "mid", "low"]).await;
        let guest = root(&top, "guest", Access::READ);
        let request = {
            let guest = Arc::clone(&guest);
            bds_io::spawn(async move { read(&guest).await })
        };
        let low_id = low.id();
        drop(low);
        let cut = {
            let (graph, mid) = (world.graph.clone(), mid.clone());
            bds_io::spawn(async move { graph.set_backing(&mid, None).await })
        };
        let drained = world.graph.drain_subtree(&top).await;
        assert_eq!((top.in_flight(), mid.in_flight()), (0, 0));
        drop(drained);
        request.await.unwrap();
        cut.await.unwrap();
        world.graph.reap().await;
        assert_eq!(names_below(&top), ["top", "mid"]);
        assert_eq!(world.graph.acquire(low_id).unwrap_err(), Stale::Released);
        world.assert_undrained();
    });
}

/// Row 14 (5e003f17ec). The walk over all nodes kept its place as a bare pointer, and the next step read a node that had been deleted. Here the
/// walk is a list of ids, looked up one by one.
#[test]
fn uaf_walk_over_nodes_that_are_deleted_meanwhile() {
    run(|world| async move {
        for name in ["a", "b", "c", "d"] {
            world.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap();
        }
        let mut walk = world.graph.top_level();
        let at = walk.next().unwrap();
        assert_eq!(at.name(), "a");
        let error = world.graph.del("a").await.unwrap_err();
        assert!(error.to_string().contains("iterator 'walk'"), "where the walk stands: {error}");
        drop(at);
        for name in ["a", "b", "d"] {
            world.graph.del(name).await.unwrap();
        }
        world.graph.add(options("driver=part,node-name=e")).await.unwrap();
        let rest: Vec<String> = walk.map(|node| node.name().to_owned()).collect();
        assert_eq!(rest, ["c"], "neither the dead nor the new");
        assert_eq!(top_names(&world.graph), ["c", "e"]);
    });
}

/// Row 15 (RHBZ 2058457; f6d38c9f6d, bac09b093e). A walk computed anew which node it held a reference to; a mirror job had put a filter on top
/// meanwhile, so it gave up somebody else's reference. Here the reference is a value in the walker's hand, wherever it stops.
#[test]
fn uaf_walk_gives_up_the_reference_it_took() {
    run(|world| async move {
        let disk = world.part("disk").await;
        let other = world.part("other").await;
        let roots = [root(&disk, "guest", Access::READ), root(&other, "other", Access::READ)];
        let filter = world.sieve("filter", "disk").await;
        let before = (disk.count(), other.count(), filter.count());
        for stop_after in 0..3 {
            let mut walk = world.graph.top_level();
            let held: Vec<NodeRef> = walk.by_ref().take(stop_after).collect();
            world.graph.insert_filter(&disk, &filter).await.unwrap();
            drop((held, walk));
            world.graph.drop_filter(&filter).await.unwrap();
            assert_eq!((disk.count(), other.count(), filter.count()), before);
        }
        assert_eq!(roots[0].target().id(), disk.id());
    });
}

/// Row 16 (307bc43095); 2.11, number 2. At exit the monitor's references were dropped but its list was kept, so that a late inactivation walked
/// over freed nodes. Here the list is the references.
#[test]
fn uaf_monitor_list_after_shutdown() {
    run(|world| async move {
        let id = world.graph.add(options("driver=part,node-name=owned")).await.unwrap();
        let kept = world.part("kept").await;
        world.graph.own(kept.clone()).unwrap();
        let report = world.graph.shutdown().await;
        assert_eq!((report.closed.len(), report.leaked.len()), (1, 1));
        assert!(!world.graph.is_owned(id) && !world.graph.is_owned(kept.id()));
        assert_eq!(top_names(&world.graph), [""; 0]);
        // A migration that comes late inactivates what is left.
        world.graph.inactivate_all().await.unwrap();
        assert!(!kept.is_active());
        drop(kept);
        world.graph.inactivate_all().await.unwrap();
        world.assert_empty().await;
    });
}

/// Row 17 (3cf746b3f1). A node remembered by pointer from whom it had inherited its options; the grandparent was deleted, and the next reopen
/// looked into it. Here it is an id, and it is forgotten when the link ends.
#[test]
fn uaf_parent_whose_options_were_inherited() {
    run(|world| async move {
        let text = "driver=part,node-name=top,file.driver=sieve,file.node-name=mid,\
                    file.file.driver=part,file.file.node-name=low";
        let top = world.open(text).await;
        let mid = world.graph.find("mid").unwrap();
        let low = world.graph.find("low").unwrap();
        assert_eq!(low.inherits_from(), Some(mid.id()));
        commit(world.graph.change().drop_filter(&mid).remove(mid)).await.unwrap();
        assert_eq!(low.inherits_from(), None, "the filter has ended");
        assert_eq!(walk::next_below(&top).map(|node| node.id()), None);
        world.graph.reopen(&top, options("cache.no-flush=on")).await.unwrap();
        assert!(!low.flags().cache.no_flush, "nobody's options reach it any more");

        let text = "driver=part,node-name=two,file.driver=part,file.node-name=under";
        let two = world.open(text).await;
        let under = world.graph.find("under").unwrap();
        assert_eq!(under.inherits_from(), Some(two.id()));
        two.close().await.unwrap();
        assert_eq!(under.inherits_from(), None, "not above it any more");
    });
}

/// Row 19 (d876bf676f). A job's list of edges was walked by somebody else while the job's end freed its entries one by one. Here the drain that
/// walks over a node's parents holds each of them, and those that left are not among them.
#[test]
fn uaf_job_edges_that_go_while_their_nodes_are_drained() {
    run_schedules(30, |world| async move {
        let nodes = [world.part("a").await, world.part("b").await, world.part("c").await];
        let edges: Vec<_> = nodes
            .iter()
            .map(|node| world.graph.attach_job(node, "job0", Access::READ).unwrap())
            .collect();
        let guest = root(&nodes[0], "guest", Access::READ);
        let request = bds_io::spawn(async move { read(&guest).await });
        let end_of_job = bds_io::spawn(async move {
            for edge in edges {
                drop(edge);
                bds_io::yield_now().await;
            }
        });
        let drained = world.graph.drain_all().await;
        bds_io::yield_now().await;
        drop(drained);
        end_of_job.await;
        request.await.unwrap();
        assert!(nodes.iter().all(|node| node.count() == 1));
        world.assert_undrained();
    });
}

/// One of two who are told to stop; the first takes the other with it.
struct Companion {
    graph: Graph,
    name: &'static str,
    other: Mutex<Option<Arc<dyn Stoppable>>>,
    stopped: Arc<Mutex<Vec<&'static str>>>,
}

impl Stoppable for Companion {
    fn name(&self) -> String {
        self.name.into()
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.stopped.lock().unwrap().push(self.name);
            drop(self.other.lock().unwrap().take());
            bds_io::yield_now().await;
            // Comes to the list while it is being walked.
            let late = Companion { name: "late", ..companion(&self.graph, &self.stopped) };
            let late: Arc<dyn Stoppable> = Arc::new(late);
            self.graph.on_shutdown(ShutdownStage::Jobs, &late);
            Ok(())
        })
    }
}

fn companion(graph: &Graph, stopped: &Arc<Mutex<Vec<&'static str>>>) -> Companion {
    let (graph, stopped) = (graph.clone(), Arc::clone(stopped));
    Companion { graph, name: "b", other: Mutex::default(), stopped }
}

/// Row 20 (e2626874a3). The loop that cancels all jobs went on at a job that the cancelled one had freed. Here the loop holds all whom it
/// is going to ask.
#[test]
fn uaf_loop_over_jobs_of_which_one_ends_another() {
    run(|world| async move {
        let stopped = Arc::default();
        let other: Arc<dyn Stoppable> = Arc::new(companion(&world.graph, &stopped));
        let first = companion(&world.graph, &stopped);
        let first = Companion { name: "a", other: Mutex::new(Some(Arc::clone(&other))), ..first };
        let first: Arc<dyn Stoppable> = Arc::new(first);
        world.graph.on_shutdown(ShutdownStage::Jobs, &first);
        world.graph.on_shutdown(ShutdownStage::Jobs, &other);
        drop(other);
        let report = world.graph.shutdown().await;
        assert!(report.failed.is_empty());
        assert_eq!(*stopped.lock().unwrap(), ["a", "b"], "each once, though 'a' let go of 'b'");
    });
}

/// Row 24 (90ce8a061b). A swap of two nodes' contents gave a name to a node that was on no list of names; taking it off crashed. Here contents
/// are not swapped: a name leads to the node it always led to, whoever stands where.
#[test]
fn uaf_name_of_a_node_that_was_replaced() {
    for first_to_go in ["old", "new"] {
        run(|world| async move {
            let ids = [add(&world, "old").await, add(&world, "new").await];
            let guest = root(&world.graph.find("old").unwrap(), "guest", Access::READ);
            let (old, new) = (world.graph.find("old").unwrap(), world.graph.find("new").unwrap());
            world.graph.replace(&old, &new).await.unwrap();
            drop((old, new));
            assert_eq!(guest.target().id(), ids[1]);
            drop(guest);
            for (name, id) in ["old", "new"].into_iter().zip(ids) {
                assert_eq!(world.graph.find(name).unwrap().id(), id);
            }
            world.graph.del(first_to_go).await.unwrap();
            assert_eq!(world.graph.find(first_to_go).unwrap_err().kind(), ErrorKind::NotFound);
            let again = add(&world, first_to_go).await;
            assert!(!ids.contains(&again), "a new node under a free name");
            world.graph.shutdown().await;
            world.assert_empty().await;
        });
    }
}

async fn add(world: &World, name: &str) -> crate::graph::NodeId {
    world.graph.add(options(&format!("driver=part,node-name={name}"))).await.unwrap()
}

/// The number of the slot in an id.
fn slot(id: crate::graph::NodeId) -> u64 {
    id.to_u64() & 0xFF_FFFF
}

/// Row 26 (CVE-2024-7409: 3e7ef738c8, 3874f5f73c). Clients outlived their NBD server; when they left late they took themselves off the books of
/// the next server, which was none of theirs. Here the next one even has the same name and the same slot.
#[test]
fn uaf_late_guests_do_not_touch_the_successor() {
    run(|world| async move {
        let first = world.part("server").await;
        let id = first.id();
        let bitmap = first.add_bitmap("clients").unwrap();
        let lease = world.graph.lease_bitmap(bitmap, "client").unwrap();
        let late = (first.claim_job("client").unwrap(), first.block(Operations::all(), "client"));
        let own_bitmap = first.add_anonymous_bitmap("client");
        let closed = first.close().await.unwrap();
        assert!(!closed.is_clean(), "it ended under its clients, and says so");

        let next = world.part("server").await;
        assert_eq!(slot(next.id()), slot(id), "the test means the same slot");
        assert_ne!(next.id(), id);
        let _job = next.claim_job("its own client").unwrap();
        let _block = next.block(Operations::DELETE, "its own client");
        let bitmap_of_next = next.add_bitmap("clients").unwrap();
        let _lease = world.graph.lease_bitmap(bitmap_of_next, "its own client").unwrap();
        let watch = world.graph.watch(id);
        assert!(watch.has_fired() && !lease.is_valid());
        drop((lease, late, own_bitmap));
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(world.graph.remove_bitmap(bitmap).unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(next.job().as_deref(), Some("its own client"));
        assert_eq!(next.blocked(Operations::DELETE).len(), 1);
        assert_eq!(next.bitmaps()[0].leased_by.as_deref(), Some("its own client"));
        assert_eq!(next.count(), 1);
    });
}
