//! What was given up twice, or never: references, drained sections, places on lists.

use std::sync::Arc;

use bds_refcount::{Holder, HolderKind, Release};

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, World, commit, options, run, run_schedules};
use crate::ErrorKind;
use crate::driver::BoxFuture;
use crate::graph::{
    Access, CloseError, JobSlot, NodeRef, Operations, Perm, ShutdownStage, Stoppable,
};

/// Row 30 (review of dd4118c792). Closing a node began to give up all of its children, while drivers, and tests, still did that themselves.
/// Here a driver has doors, not references: throwing them away early changes nothing.
#[test]
fn double_unref_by_driver_and_close() {
    run(|world| async move {
        let low = world.part("low").await;
        let side = world.part("side").await;
        let top = world.part_on("top", "file=low,other=side,backing=side,lets-go=on").await;
        assert_eq!((low.count(), side.count()), (2, 3));
        assert!(top.close().await.unwrap().is_clean());
        assert_eq!((low.count(), side.count()), (1, 1));
        assert_eq!((low.release(), side.release()), (Release::Last, Release::Last));
        world.assert_empty().await;
        for name in ["low", "side", "top"] {
            assert_eq!(world.script.times(&format!("close {name}")), 1);
        }
    });
}

/// Row 31 (b441dc71c0, 7a26df203c). Attaching a child took the caller's reference over when it failed in one way, and did not when it failed in
/// another. Here nobody's reference is ever taken: whatever fails, at whatever step, the counts are as before.
#[test]
fn double_unref_when_attaching_fails() {
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let over = world.part("over").await;
        let fixed = world.open("driver=part,node-name=fixed,read-only=on").await;
        let alone = Access { shared: Perm::empty(), ..Access::ALL };
        let _jealous = root(&over, "jealous", alone);
        let _guest = root(&top, "guest", Access::ALL);
        let graph = &world.graph;
        let before = world.picture();
        let check = |what: &str, kind: Option<ErrorKind>, wanted: ErrorKind| {
            assert_eq!(kind, Some(wanted), "{what}");
            assert_eq!(world.picture(), before, "{what}");
        };
        use ErrorKind::{InUse, InvalidInput, ReadOnly};
        let job = |node, access| graph.attach_job(node, "job0", access).err().map(|e| e.kind());
        check("a job beside a jealous one", job(&over, Access::READ), InUse);
        check("a writer of a fixed node", job(&fixed, Access::ALL), ReadOnly);
        let kind = |result: crate::Result<()>| result.err().map(|error| error.kind());
        check("a loop", kind(graph.set_backing(&base, Some(&top)).await), InvalidInput);
        check("a jealous base", kind(graph.set_backing(&top, Some(&over)).await), InUse);
        check("a fixed top", kind(graph.replace(&top, &fixed).await), ReadOnly);
        let child = graph.open(options("driver=part,file=over")).await;
        check("a child by name", kind(child.map(drop)), InUse);
        let child = graph.open(options("driver=sieve,file=base,backing=nobody")).await;
        assert!(child.is_err());
        world.fail_every_step(|| graph.set_backing(&top, Some(&fixed))).await;
        assert_eq!((base.count(), fixed.count()), (1, 2));
    });
}

/// Takes what a backup takes; the target is refused if somebody else writes to it.
async fn backup(world: &World) -> crate::Result<Vec<crate::graph::JobEdge>> {
    let target = world.graph.find("target")?;
    let source = world.graph.find("source")?;
    let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::ALL };
    let edges = vec![
        world.graph.attach_job(&source, "backup0", Access::READ)?,
        world.graph.attach_job(&target, "backup0", alone)?,
    ];
    source.check_allowed(Operations::BACKUP_SOURCE)?;
    target.check_allowed(Operations::BACKUP_TARGET)?;
    Ok(edges)
}

/// Row 33 (4da26f138d). A backup that was refused kept its reference to the target; the process aborted when it came to its end. Here
/// nothing is left, and if something were, the shutdown would name it instead of aborting.
#[test]
fn leak_of_the_target_of_a_refused_backup() {
    run(|world| async move {
        for name in ["source", "target"] {
            let text = format!("driver=part,node-name={name}");
            world.graph.add(options(&text)).await.unwrap();
        }
        let target = world.graph.find("target").unwrap();
        let writer = root(&target, "writer", Access::ALL);
        assert_eq!(backup(&world).await.unwrap_err().kind(), ErrorKind::InUse);
        drop(writer);
        let blocker = target.block(Operations::BACKUP_TARGET, "it is being exported");
        let error = backup(&world).await.unwrap_err();
        assert!(error.to_string().contains("it is being exported"), "{error}");
        drop((blocker, target));
        for name in ["source", "target"] {
            assert!(world.graph.del(name).await.unwrap().is_clean(), "nobody holds it");
        }
        world.graph.shutdown().await.check_leaks().unwrap();
    });
}

/// Row 34 (mail by Max Reitz, 29 June 2020). A migration of bitmaps had failed and the user quit: the migration's references were still there, and
/// an assertion ended the process. Here the shutdown says who holds what; it can be done again when he has let go.
#[test]
fn leak_of_a_failed_migration_is_named_at_shutdown() {
    run(|world| async move {
        let node = world.part("disk").await;
        let bitmap = node.add_bitmap("dirty").unwrap();
        let migration = node.held_as(Holder::new(HolderKind::Other("migration"), "of bitmaps"));
        let lease = world.graph.lease_bitmap(bitmap, "migration").unwrap();
        let report = world.graph.shutdown().await;
        let error = report.check_leaks().unwrap_err();
        let words = error.to_string();
        assert!(words.contains("'disk'") && words.contains("migration 'of bitmaps'"), "{words}");
        assert!(lease.is_valid() && migration.len() == 512, "still usable");
        drop(lease);
        drop(migration);
        let report = world.graph.shutdown().await;
        report.check_leaks().unwrap();
        assert!(report.closed[0].is_clean());
    });
}

/// Row 35 (804db8ea00, 5cb2737e92, e037c09c78). Ending a drained section ran callbacks that changed the graph, so that a parent was let go
/// twice, or not at all. Here an edge is drained or not, and nothing is counted twice, whatever moves while sections overlap.
#[test]
fn undrained_once_though_edges_move_between_sections() {
    run_schedules(30, |world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let other = world.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        // Goes on the moment the last section has ended, and changes the graph.
        let waiting = {
            let (graph, guest) = (world.graph.clone(), Arc::clone(&guest));
            let (top, other) = (top.clone(), other.clone());
            bds_io::spawn(async move {
                read(&guest).await.unwrap();
                graph.set_backing(&top, Some(&other)).await.unwrap();
                graph.set_backing(&top, None).await.unwrap();
            })
        };
        let first = world.graph.drain(&base).await;
        let second = world.graph.drain(&base).await;
        let both = world.graph.drain(&other).await;
        world.graph.set_backing(&top, Some(&other)).await.unwrap();
        assert_eq!((base.quiesce_count(), other.quiesce_count(), top.quiesce_count()), (2, 1, 1));
        drop(first);
        world.graph.set_backing(&top, Some(&base)).await.unwrap();
        assert!(guest.is_closed(), "one section is left");
        drop(both);
        drop(second);
        waiting.await;
        world.assert_undrained();
        read(&guest).await.unwrap();
    });
}

/// Row 36 (1a6d3bd229). A node ended inside a section of everything and never heard of its end, so what it had paused stayed paused. Here the
/// section ends for all who are there, the dead are closed after it, and who only the dead had drained is let go.
#[test]
fn drained_everything_while_a_node_ends() {
    run_schedules(20, |world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let guest = root(&base, "guest", Access::READ);
        let everything = world.graph.drain_all().await;
        assert_eq!(top.release(), Release::Last);
        world.graph.reap().await;
        assert_eq!(world.script.times("close top"), 0, "it would write to a drained node");
        let born = world.sieve("born", "base").await;
        assert_eq!((base.quiesce_count(), born.quiesce_count()), (1, 2));
        drop(everything);
        while world.script.times("close top") == 0 {
            bds_io::yield_now().await;
        }
        world.graph.reap().await;
        world.assert_undrained();
        assert_eq!(base.count(), 3, "guest, born and us");
        read(&guest).await.unwrap();
    });
}

/// Row 38 (2842ff2d81). A transaction that failed forgot to end its drained section: the guest's disk stood still for ever. Here each step fails
/// once, and the guest goes on each time.
#[test]
fn undrained_after_a_change_failed_at_any_step() {
    run(|world| async move {
        let [top, _base] = world.chain(["top", "base"]).await;
        let over = world.part("over").await;
        let guest = root(&top, "guest", Access::ALL);
        let act = async || {
            let change =
                world.graph.change().append(&top, &over).reopen(&top, options("discard=unmap"));
            let result = commit(change).await;
            world.assert_undrained();
            read(&guest).await.unwrap();
            result
        };
        world.fail_every_step(act).await;
        assert_eq!(guest.target().id(), over.id());
        // A driver that fails to prepare, and one that refuses.
        let before = world.picture();
        world.script.fail_at("top", Point::Prepare);
        let reopened = world.graph.reopen(&top, options("cache.no-flush=on")).await;
        assert_eq!(reopened.unwrap_err().kind(), ErrorKind::Io);
        world.script.fail_at("top", Point::SetBacking);
        assert_eq!(world.graph.set_backing(&top, None).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(world.picture(), before);
        world.assert_undrained();
    });
}

/// Row 39 (50a3efb0f0, d470ad42ac). An image that turned out corrupt lost its driver; closing it then skipped the children, which leaked, and
/// others called the driver that was not there. Here the driver stays, and the end of a node does not ask in which state it is.
#[test]
fn leak_of_the_children_of_a_corrupt_image() {
    run(|world| async move {
        for poison in [false, true] {
            let [image, base] = world.chain(["image", "base"]).await;
            drop(base);
            let guest = root(&image, "guest", Access::READ);
            for point in [Point::Read, Point::Flush, Point::Close] {
                world.script.fail_at("image", point);
            }
            assert_eq!(read(&guest).await.unwrap_err().kind(), ErrorKind::Io);
            if poison {
                image.poison();
            }
            drop(guest);
            world.script.log();
            let report = image.close().await.unwrap();
            assert!(report.close_error.is_some() && report.flush_error.is_some());
            assert_eq!(report.below.len(), 1, "the child ended with it");
            assert!(report.below[0].is_clean());
            assert_eq!(world.script.times("close base"), 1);
            world.assert_empty().await;
        }
    });
}

/// Row 40 (e878bb1293, e3fc91aaaa). A function returned early and left its transaction neither committed nor aborted. Here a change that is not committed
/// does nothing (the example at `Change` has the compiler say so), and one that is given up at any moment leaves no trace.
#[test]
fn change_given_up_at_any_moment_leaves_no_trace() {
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let over = world.part("over").await;
        let guest = root(&top, "guest", Access::ALL);
        let before = world.picture();
        drop(world.graph.change().append(&top, &over).remove(base.clone()));
        assert_eq!(world.picture(), before);
        for polls in 0.. {
            let mut request = Box::pin(read(&guest));
            assert!(futures_util::poll!(&mut request).is_pending());
            let change =
                world.graph.change().append(&top, &over).reopen(&top, options("discard=unmap"));
            let mut change = Box::pin(change.commit());
            let mut is_done = false;
            for _ in 0..polls {
                is_done = futures_util::poll!(&mut change).is_ready();
                if is_done {
                    break;
                }
                let _ = futures_util::poll!(&mut request);
                bds_io::yield_now().await;
            }
            drop(change);
            if is_done {
                break;
            }
            drop(request);
            world.assert_undrained();
            if guest.target().id() == over.id() {
                break; // Given up after it had taken effect.
            }
            assert_eq!(world.picture(), before, "after {polls} polls");
        }
        world.assert_undrained();
        assert_eq!(guest.target().id(), over.id());
    });
}

/// Stands for a job in a group that ends together: its place in the group is a guard.
struct Member {
    _slot: JobSlot,
}

impl Stoppable for Member {
    fn name(&self) -> String {
        "member".into()
    }

    fn stop(&self) -> BoxFuture<'_, crate::Result<()>> {
        Box::pin(async { panic!("a job that failed to start is asked to stop") })
    }
}

fn join(world: &World, node: &NodeRef) -> crate::Result<Arc<Member>> {
    let member = Arc::new(Member { _slot: node.claim_job("member")? });
    let known: Arc<dyn Stoppable> = member.clone();
    world.graph.on_shutdown(ShutdownStage::Jobs, &known);
    // It fails after it has joined.
    node.check_allowed(Operations::STREAM)?;
    Ok(member)
}

/// Row 41 (a865cebb82, 1e93b9fba2). A job that failed to start stayed in the list of its transaction, and was aborted with the others after it had been
/// freed. Here a place on a list is a guard or a weak link.
#[test]
fn failed_job_leaves_its_places() {
    run(|world| async move {
        let node = world.part("disk").await;
        let blocker = node.block(Operations::STREAM, "not now");
        for _ in 0..2 {
            assert_eq!(join(&world, &node).err().unwrap().kind(), ErrorKind::InUse);
            assert_eq!(node.job(), None);
        }
        drop(blocker);
        drop(join(&world, &node).unwrap());
        drop(node);
        let report = world.graph.shutdown().await;
        assert!(report.failed.is_empty() && report.leaked.is_empty());
    });
}

/// Row 42 (377410f6fb). Undoing a change pointed parents back at a node whose context the change had moved, and did not move that back. There are no contexts to
/// move here; what a node derives from its place (limits, permissions, flags, from whom it inherits) is what could be left behind.
#[test]
fn undone_change_leaves_nothing_derived_behind() {
    run(|world| async move {
        world.fixture.plain("n");
        let narrow = "driver=file,node-name=narrow,filename=n,max-transfer=512";
        let narrow = world.open(narrow).await;
        let top = world.open("driver=part,node-name=top,file.driver=part,file.node-name=low").await;
        let user = world.sieve("user", "top").await;
        let guest = root(&user, "guest", Access::READ);
        let change = || {
            let change = world.graph.change().set_backing(&top, Some(&narrow));
            let change = change.reopen(&user, options("read-only=on"));
            commit(change.reopen(&top, options("read-only=on,detect-zeroes=on")).own(&top))
        };
        world.fail_every_step(change).await;
        assert_eq!((user.limits().max_transfer, top.is_writable()), (512, false));
        // And back.
        let back = || {
            let change = world.graph.change().set_backing(&top, None).disown(&top);
            let change = change.reopen(&user, options("read-only=off"));
            commit(change.reopen(&top, options("read-only=off,detect-zeroes=off")))
        };
        world.fail_every_step(back).await;
        assert_eq!((user.limits().max_transfer, top.is_writable()), (0, true));
        let CloseError::InUse { node, .. } = top.close().await.unwrap_err();
        drop((guest, node));
    });
}
