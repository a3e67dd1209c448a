//! Double releases and leaks of QEMU: references, drained sections, places on lists.

use std::sync::Arc;

use crate::holder_kind::HolderKind;
use bds_refcount::{Holder, Release};

use super::scripted_graph::{ScriptedGraph, commit, options, run, run_schedules};
use crate::ErrorKind;
use crate::driver::BoxFuture;
use crate::graph::{
    Access, BitmapOptions, BlockOps, CloseError, JobSlot, NodeRef, Perm, ShutdownStage, Stoppable,
};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;

/// Row 30 (review of dd4118c792). Closing a node began to release all of its children, while
/// drivers and tests still did that themselves. Here a driver has child handles, not references:
/// dropping them early changes nothing.
#[test]
fn double_unref_by_driver_and_close() {
    run(|test| async move {
        let low = test.part("low").await;
        let side = test.part("side").await;
        let top = test.part_on("top", "file=low,other=side,backing=side,clear-children=on").await;
        assert_eq!((low.count(), side.count()), (2, 3));
        assert!(top.close().await.unwrap().is_clean());
        assert_eq!((low.count(), side.count()), (1, 1));
        assert_eq!((low.release(), side.release()), (Release::Last, Release::Last));
        test.assert_empty().await;
        for name in ["low", "side", "top"] {
            assert_eq!(test.script.times(&format!("close {name}")), 1);
        }
    });
}

/// Row 31 (b441dc71c0, 7a26df203c). Attaching a child took over the caller's reference on one
/// failure path and not on another. Here no call takes over a caller's reference: whatever step
/// fails, the counts are as before.
#[test]
fn double_unref_when_attaching_fails() {
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let over = test.part("over").await;
        let fixed = test.open("driver=part,node-name=fixed,read-only=on").await;
        let alone = Access { shared: Perm::empty(), ..Access::ALL };
        let _jealous = root(&over, "exclusive", alone);
        let _guest = root(&top, "guest", Access::ALL);
        let graph = &test.graph;
        let before = test.snapshot();
        let check = |what: &str, kind: Option<ErrorKind>, wanted: ErrorKind| {
            assert_eq!(kind, Some(wanted), "{what}");
            assert_eq!(test.snapshot(), before, "{what}");
        };
        use ErrorKind::{InUse, InvalidInput, ReadOnly};
        let job = |node, access| graph.attach_job(node, "job0", access).err().map(|e| e.kind());
        check("a job beside an exclusive user", job(&over, Access::READ), InUse);
        check("a writer of a fixed node", job(&fixed, Access::ALL), ReadOnly);
        let kind = |result: crate::Result<()>| result.err().map(|error| error.kind());
        check("a loop", kind(graph.set_backing(&base, Some(&top)).await), InvalidInput);
        check("an exclusively used base", kind(graph.set_backing(&top, Some(&over)).await), InUse);
        check("a fixed top", kind(graph.replace(&top, &fixed).await), ReadOnly);
        let child = graph.open(options("driver=part,file=over")).await;
        check("a child by name", kind(child.map(drop)), InUse);
        let child = graph.open(options("driver=sieve,file=base,backing=missing")).await;
        assert!(child.is_err());
        test.fail_every_step(|| graph.set_backing(&top, Some(&fixed))).await;
        assert_eq!((base.count(), fixed.count()), (1, 2));
    });
}

/// Takes what a backup takes; the target is refused if another writer holds it.
async fn backup(test: &ScriptedGraph) -> crate::Result<Vec<crate::graph::JobEdge>> {
    let target = test.graph.find("target")?;
    let source = test.graph.find("source")?;
    let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::ALL };
    let edges = vec![
        test.graph.attach_job(&source, "backup0", Access::READ)?,
        test.graph.attach_job(&target, "backup0", alone)?,
    ];
    source.check_allowed(BlockOps::BACKUP_SOURCE)?;
    target.check_allowed(BlockOps::BACKUP_TARGET)?;
    Ok(edges)
}

/// Row 33 (4da26f138d). A refused backup kept its reference to the target; the process aborted at
/// exit. Here nothing leaks, and the shutdown would name a leak instead of aborting.
#[test]
fn leak_of_the_target_of_a_refused_backup() {
    run(|test| async move {
        for name in ["source", "target"] {
            let text = format!("driver=part,node-name={name}");
            test.graph.add(options(&text)).await.unwrap();
        }
        let target = test.graph.find("target").unwrap();
        let writer = root(&target, "writer", Access::ALL);
        assert_eq!(backup(&test).await.unwrap_err().kind(), ErrorKind::InUse);
        drop(writer);
        let blocker = target.block(BlockOps::BACKUP_TARGET, "it is being exported");
        let error = backup(&test).await.unwrap_err();
        assert!(error.to_string().contains("it is being exported"), "{error}");
        drop((blocker, target));
        for name in ["source", "target"] {
            assert!(test.graph.del(name).await.unwrap().is_clean(), "it has no other holder");
        }
        test.graph.shutdown().await.check_leaks().unwrap();
    });
}

/// Row 34 (mail by Max Reitz, 29 June 2020). After a failed migration of bitmaps the migration's
/// references remained, and quitting hit an assertion. Here the shutdown names each holder and can
/// be repeated after the release.
#[test]
fn leak_of_a_failed_migration_is_named_at_shutdown() {
    run(|test| async move {
        let node = test.part("disk").await;
        let bitmap = node.add_bitmap(BitmapOptions::named("dirty")).await.unwrap();
        let migration = node.held_as(Holder::new(HolderKind::Other("migration"), "of bitmaps"));
        let lease = test.graph.lease_bitmap(bitmap, "migration").unwrap();
        let report = test.graph.shutdown().await;
        let error = report.check_leaks().unwrap_err();
        let words = error.to_string();
        assert!(words.contains("'disk'") && words.contains("migration 'of bitmaps'"), "{words}");
        assert!(lease.is_valid() && migration.len() == 512, "still usable");
        drop(lease);
        drop(migration);
        let report = test.graph.shutdown().await;
        report.check_leaks().unwrap();
        assert!(report.closed[0].is_clean());
    });
}

/// Row 35 (804db8ea00, 5cb2737e92, e037c09c78). Ending a drained section ran callbacks that changed
/// the graph, so that a parent was undrained twice or never. Here an edge is drained or not;
/// nothing is counted twice, whatever moves while sections overlap.
#[test]
fn undrained_once_when_edges_move_between_sections() {
    run_schedules(30, |test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let other = test.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        // Runs when the last section has ended, and changes the graph.
        let waiting = {
            let (graph, guest) = (test.graph.clone(), Arc::clone(&guest));
            let (top, other) = (top.clone(), other.clone());
            bds_io::spawn(async move {
                read(&guest).await.unwrap();
                graph.set_backing(&top, Some(&other)).await.unwrap();
                graph.set_backing(&top, None).await.unwrap();
            })
        };
        let first = test.graph.drain(&base).await;
        let second = test.graph.drain(&base).await;
        let both = test.graph.drain(&other).await;
        test.graph.set_backing(&top, Some(&other)).await.unwrap();
        assert_eq!((base.quiesce_count(), other.quiesce_count(), top.quiesce_count()), (2, 1, 1));
        drop(first);
        test.graph.set_backing(&top, Some(&base)).await.unwrap();
        assert!(guest.gate_blocked(), "one section is left");
        drop(both);
        drop(second);
        waiting.await;
        test.assert_undrained();
        read(&guest).await.unwrap();
    });
}

/// Row 36 (1a6d3bd229). A node that died inside a section of everything never got its end, so its
/// parents stayed paused. Here the section ends for all live nodes, dead ones are closed after it,
/// and nodes drained only through dead ones are undrained.
#[test]
fn drain_all_while_a_node_dies() {
    run_schedules(20, |test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let guest = root(&base, "guest", Access::READ);
        let everything = test.graph.drain_all().await;
        assert_eq!(top.release(), Release::Last);
        test.graph.reap().await;
        assert_eq!(test.script.times("close top"), 0, "it would write to a drained node");
        let opened = test.sieve("opened", "base").await;
        assert_eq!((base.quiesce_count(), opened.quiesce_count()), (1, 2));
        drop(everything);
        while test.script.times("close top") == 0 {
            bds_io::yield_now().await;
        }
        test.graph.reap().await;
        test.assert_undrained();
        assert_eq!(base.count(), 3, "the guest, the opened node and ours");
        read(&guest).await.unwrap();
    });
}

/// Row 38 (2842ff2d81). A failed transaction did not end its drained section, and the guest's disk
/// hung. Here each step fails once, and the guest's requests complete each time.
#[test]
fn undrained_after_a_change_failed_at_any_step() {
    run(|test| async move {
        let [top, _base] = test.chain(["top", "base"]).await;
        let over = test.part("over").await;
        let guest = root(&top, "guest", Access::ALL);
        let act = async || {
            let change =
                test.graph.change().append(&top, &over).reopen(&top, options("discard=unmap"));
            let result = commit(change).await;
            test.assert_undrained();
            read(&guest).await.unwrap();
            result
        };
        test.fail_every_step(act).await;
        assert_eq!(guest.target().id(), over.id());
        // A driver that fails to prepare, and one that refuses.
        let before = test.snapshot();
        test.script.fail_at("top", Point::Prepare);
        let reopened = test.graph.reopen(&top, options("cache.no-flush=on")).await;
        assert_eq!(reopened.unwrap_err().kind(), ErrorKind::Io);
        test.script.fail_at("top", Point::SetBacking);
        assert_eq!(test.graph.set_backing(&top, None).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(test.snapshot(), before);
        test.assert_undrained();
    });
}

/// Row 39 (50a3efb0f0, d470ad42ac). A corrupt image lost its driver; closing it then skipped its
/// children, which leaked, and others called the missing driver. Here the driver stays, and closing
/// does not depend on the node's state.
#[test]
fn leak_of_the_children_of_a_corrupt_image() {
    run(|test| async move {
        for poison in [false, true] {
            let [image, base] = test.chain(["image", "base"]).await;
            drop(base);
            let guest = root(&image, "guest", Access::READ);
            for point in [Point::Read, Point::Flush, Point::Close] {
                test.script.fail_at("image", point);
            }
            assert_eq!(read(&guest).await.unwrap_err().kind(), ErrorKind::Io);
            if poison {
                image.poison();
            }
            drop(guest);
            test.script.log();
            let report = image.close().await.unwrap();
            assert!(report.close_error.is_some() && report.flush_error.is_some());
            assert_eq!(report.below.len(), 1, "the child ended with it");
            assert!(report.below[0].is_clean());
            assert_eq!(test.script.times("close base"), 1);
            test.assert_empty().await;
        }
    });
}

/// Row 40 (e878bb1293, e3fc91aaaa). An early return left a transaction neither committed nor
/// aborted. Here an uncommitted change does nothing (the compiler warns, see the example at
/// `Change`), and one dropped at any await leaves no trace.
#[test]
fn change_dropped_at_any_await_leaves_no_trace() {
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let over = test.part("over").await;
        let guest = root(&top, "guest", Access::ALL);
        let before = test.snapshot();
        drop(test.graph.change().append(&top, &over).remove(base.clone()));
        assert_eq!(test.snapshot(), before);
        for polls in 0.. {
            let mut request = Box::pin(read(&guest));
            assert!(futures_util::poll!(&mut request).is_pending());
            let change =
                test.graph.change().append(&top, &over).reopen(&top, options("discard=unmap"));
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
            test.assert_undrained();
            if guest.target().id() == over.id() {
                break; // Dropped after it had taken effect.
            }
            assert_eq!(test.snapshot(), before, "after {polls} polls");
        }
        test.assert_undrained();
        assert_eq!(guest.target().id(), over.id());
    });
}

/// Stands for a job in a transaction: its place in the group is a guard.
struct Member {
    _slot: JobSlot,
}

impl Stoppable for Member {
    fn name(&self) -> String {
        "member".into()
    }

    fn stop(&self) -> BoxFuture<'_, crate::Result<()>> {
        Box::pin(async { panic!("a job that failed to start is stopped") })
    }
}

fn join(test: &ScriptedGraph, node: &NodeRef) -> crate::Result<Arc<Member>> {
    let member = Arc::new(Member { _slot: node.claim_job("member")? });
    let known: Arc<dyn Stoppable> = member.clone();
    test.graph.on_shutdown(ShutdownStage::Jobs, &known);
    // Fails after it has joined.
    node.check_allowed(BlockOps::STREAM)?;
    Ok(member)
}

/// Row 41 (a865cebb82, 1e93b9fba2). A job that failed to start stayed in the list of its
/// transaction, and was aborted with the others after it had been freed. Here a place on a list is
/// a guard or a weak link.
#[test]
fn failed_job_leaves_every_list() {
    run(|test| async move {
        let node = test.part("disk").await;
        let blocker = node.block(BlockOps::STREAM, "not now");
        for _ in 0..2 {
            assert_eq!(join(&test, &node).err().unwrap().kind(), ErrorKind::InUse);
            assert_eq!(node.job(), None);
        }
        drop(blocker);
        drop(join(&test, &node).unwrap());
        drop(node);
        let report = test.graph.shutdown().await;
        assert!(report.failed.is_empty() && report.leaked.is_empty());
    });
}

/// Row 42 (377410f6fb). Undoing a change pointed parents back at a node whose context the change
/// had moved, and did not move the context back. There are no contexts here; the state derived from
/// a node's place (limits, permissions, flags, inheritance) is restored.
#[test]
fn undone_change_restores_derived_state() {
    run(|test| async move {
        test.fixture.plain("n");
        let narrow = "driver=file,node-name=narrow,filename=n,max-transfer=512";
        let narrow = test.open(narrow).await;
        let top = test.open("driver=part,node-name=top,file.driver=part,file.node-name=low").await;
        let user = test.sieve("user", "top").await;
        let guest = root(&user, "guest", Access::READ);
        let change = || {
            let change = test.graph.change().set_backing(&top, Some(&narrow));
            let change = change.reopen(&user, options("read-only=on"));
            commit(change.reopen(&top, options("read-only=on,detect-zeroes=on")).own(&top))
        };
        test.fail_every_step(change).await;
        assert_eq!((user.limits().max_transfer, top.is_writable()), (512, false));
        // And back.
        let back = || {
            let change = test.graph.change().set_backing(&top, None).disown(&top);
            let change = change.reopen(&user, options("read-only=off"));
            commit(change.reopen(&top, options("read-only=off,detect-zeroes=off")))
        };
        test.fail_every_step(back).await;
        assert_eq!((user.limits().max_transfer, top.is_writable()), (0, true));
        let CloseError::InUse { node, .. } = top.close().await.unwrap_err();
        drop((guest, node));
    });
}
