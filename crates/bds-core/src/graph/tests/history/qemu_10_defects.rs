//! Nine places where QEMU 10.0.2 must not be copied (2.11 of our notes on lifetimes): it has these defects still, or had when it was read.

use bds_refcount::Release;

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, commit, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, CloseError, Operations, Perm};

/// 2.11, number 1. QEMU 10.0.2 takes the lock and drains then. Here the right to move an edge is made of a drained set, which only waiting without the lock
/// gives (`compile_fail/drained_by_hand.rs`: nobody else can make one). The order, watched: as long as a change waits, the lock is free.
#[test]
fn drain_under_lock_has_no_expression() {
    run_schedules(20, |world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let other = world.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        let mut request = Box::pin(read(&guest));
        assert!(futures_util::poll!(&mut request).is_pending());
        let changes = world.graph.change().replace(&top, &other).set_backing(&top, None);
        let mut change = Box::pin(changes.commit());
        for _ in 0..20 {
            assert!(futures_util::poll!(&mut change).is_pending());
            assert!(world.graph.0.core.lock_is_free(), "somebody waits with the lock held");
            bds_io::yield_now().await;
        }
        request.await.unwrap();
        change.await.unwrap();
        assert_eq!(base.count(), 1);
    });
}

/// 2.11, number 2. At exit the monitor's references go and its list stays. Here an entry of the list is the reference; what can be in the list after shutdown is
/// nothing (row 16 has the migration that came late).
#[test]
fn monitor_list_holds_what_it_lists() {
    run(|world| async move {
        let id = world.graph.add(options("driver=part,node-name=a")).await.unwrap();
        assert!(world.graph.is_owned(id));
        assert_eq!(world.graph.count(id), 1, "the list, and nobody else");
        let node = world.graph.find("a").unwrap();
        commit(world.graph.change().disown(&node)).await.unwrap();
        assert!(!world.graph.is_owned(id));
        assert_eq!(node.count(), 1, "off the list is given up");
        world.graph.own(node).unwrap();
        assert_eq!(world.graph.count(id), 1);
        let report = world.graph.shutdown().await;
        assert_eq!(report.closed.len(), 1);
        assert!(!world.graph.is_owned(id) && world.graph.top_level().next().is_none());
    });
}

/// 2.11, number 3. QEMU's walk goes over backends first and over the monitor's nodes then, but starts the second part where the first has stopped: with a backend in
/// the world, nodes are skipped, and are not flushed. Here the walk is complete, whatever the mixture.
#[test]
fn walk_at_the_top_skips_nobody() {
    for (backends, owned) in [(0, 3), (1, 3), (3, 1), (3, 0), (2, 2)] {
        run(|world| async move {
            let mut wanted = Vec::new();
            let mut roots = Vec::new();
            for number in 0..backends {
                let node = world.part(&format!("b{number}")).await;
                roots.push(root(&node, &format!("guest{number}"), Access::READ));
                wanted.push(node.name().to_owned());
            }
            for number in 0..owned {
                let text = format!("driver=part,node-name=m{number}");
                world.graph.add(options(&text)).await.unwrap();
                wanted.push(format!("m{number}"));
            }
            // At the top of a backend and owned: once.
            if let Ok(both) = world.graph.find("b0") {
                world.graph.own(both).unwrap();
            }
            let found: Vec<String> =
                world.graph.top_level().map(|node| node.name().to_owned()).collect();
            assert_eq!(found, wanted);
        });
    }
}

/// 2.11, number 4. QEMU's reference on a node is an addition that asks nothing: a node that is being deleted can be taken again, and deleted twice. Here there is no
/// way back from zero, by id, by name, through a parent or a walk; and a clone is made of a reference that lives.
#[test]
fn node_at_zero_is_not_taken_again() {
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let (top_id, base_id) = (top.id(), base.id());
        drop(base);
        let graph = world.graph.clone();
        world.script.at("top", Point::Close, move || {
            let graph = graph.clone();
            async move {
                assert!(graph.acquire(top_id).is_err() && graph.find("top").is_err());
                assert!(graph.nodes().iter().all(|node| node.id() != top_id));
                let base = graph.acquire(base_id).unwrap();
                assert_eq!(base.name(), "base", "still held by the one that closes");
                assert_eq!(base.release(), Release::NotLast);
                Ok(())
            }
        });
        assert_eq!(top.release(), Release::Last);
        assert_eq!(world.graph.count(top_id), 0);
        let error = world.graph.open(options("driver=sieve,file=top")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        world.graph.reap().await;
        assert_eq!((world.script.times("close top"), world.script.times("close base")), (1, 1));
    });
}

/// 2.11, number 5. Undoing a change in QEMU gives references up under the write lock, which is safe only while none is the last. Here they may be the last, at each
/// step: the node is closed afterwards, once.
#[test]
fn undoing_may_give_up_the_last_reference() {
    run(|world| async move {
        let top = world.part("top").await;
        let before = world.picture();
        for step in 0.. {
            let over = world.part("over").await;
            let id = over.id();
            let change = world.graph.change().append(&top, &over).set_backing(&over, None);
            drop(over);
            world.graph.0.faults.set(Some(step));
            world.script.log();
            let result = commit(change).await;
            let struck = world.graph.0.faults.has_struck();
            world.graph.0.faults.set(None);
            assert_eq!(result.is_err(), struck, "step {step}");
            assert!(world.graph.acquire(id).is_err());
            let closed = world.graph.reap().await;
            assert_eq!((closed.len(), world.script.times("close over")), (1, 1), "step {step}");
            assert_eq!(world.picture(), before);
            if !struck {
                break;
            }
        }
    });
}

/// 2.11, number 6. A QEMU job whose last reference is gone stays on the list of jobs while it is torn down, which polls: whoever looks finds a job with a count of
/// zero. Here what ends is off every list before its end begins. Nodes stand for jobs.
#[test]
fn what_is_being_closed_is_on_no_list() {
    run(|world| async move {
        let id = world.graph.add(options("driver=part,node-name=dying")).await.unwrap();
        let watch = world.graph.watch(id);
        let graph = world.graph.clone();
        world.script.at("dying", Point::Close, move || {
            let graph = graph.clone();
            async move {
                for _ in 0..10 {
                    bds_io::yield_now().await;
                    assert!(graph.nodes().is_empty() && graph.top_level().next().is_none());
                    assert!(!graph.is_owned(id) && graph.find("dying").is_err());
                    assert_eq!((graph.count(id), graph.holders(id).len()), (0, 0));
                }
                Ok(())
            }
        });
        let mut del = Box::pin(world.graph.del("dying"));
        assert!(futures_util::poll!(&mut del).is_pending());
        assert!(watch.has_fired(), "before the end of the closing");
        // The name is free already.
        let next = world.part("next").await;
        assert_eq!(world.graph.del("dying").await.unwrap_err().kind(), ErrorKind::NotFound);
        drop(next);
        del.await.unwrap();
    });
}

/// 2.11, number 7. A node opened inside two sections is told of a drain twice in QEMU and of its end once: a throttled disk would stay unthrottled. Here a driver hears
/// of both in turn (the scripted driver asserts it), however many sections there are.
#[test]
fn born_in_two_sections_is_told_once() {
    run(|world| async move {
        let base = world.part("base").await;
        let one = world.graph.drain_all().await;
        let two = world.graph.drain_all().await;
        let three = world.graph.drain(&base).await;
        let born = world.sieve("born", "base").await;
        assert!(born.quiesce_count() >= 3 - 1);
        let guest = root(&born, "guest", Access::READ);
        assert!(guest.is_closed());
        assert_eq!(world.script.times("drain begin born"), 1);
        for section in [two, three, one] {
            assert_eq!(world.script.times("drain end born"), 0);
            drop(section);
        }
        assert_eq!(world.script.times("drain end born"), 1);
        assert_eq!(born.quiesce_count(), 0);
        read(&guest).await.unwrap();
    });
}

/// 2.11, number 8. QEMU loses the error of the flush at the last release, and does not take back half an inactivation. Here the first is reported, once, and the
/// second is undone at each step.
#[test]
fn no_failure_at_the_end_is_lost_and_none_in_the_middle_stays() {
    run(|world| async move {
        let doomed = world.part("doomed").await;
        world.script.fail_at("doomed", Point::Flush);
        assert_eq!(doomed.release(), Release::Last);
        let other = world.part("other").await; // reaps in passing
        let reports = world.graph.reports();
        assert!(reports.len() == 1 && reports[0].flush_error.is_some(), "{reports:?}");
        assert!(world.graph.reports().is_empty());

        let [_top, _mid, _base] = world.chain(["top", "mid", "base"]).await;
        let before = world.picture();
        for node in ["top", "mid", "base", "other"] {
            for point in [Point::Inactivate, Point::Flush] {
                world.script.fail_at(node, point);
                assert_eq!(world.graph.inactivate_all().await.unwrap_err().kind(), ErrorKind::Io);
                assert_eq!(world.picture(), before, "{node} {point:?}");
                world.script.forget(node, point);
            }
        }
        world.fail_every_step(|| world.graph.inactivate_all()).await;
        let given = world.picture();
        for node in ["top", "mid", "base", "other"] {
            world.script.fail_at(node, Point::Activate);
            assert_eq!(world.graph.activate_all().await.unwrap_err().kind(), ErrorKind::Io);
            assert_eq!(world.picture(), given, "{node}");
            world.script.forget(node, Point::Activate);
        }
        world.graph.activate_all().await.unwrap();
        assert_eq!(world.picture(), before);
        drop(other);
    });
}

/// 2.11, number 9. QEMU has permissions and, beside them, blockers, and each must be asked and taken back by hand. Here a claim is a guard, whatever its kind; each kind
/// alone is in the way, names itself, keeps no node open, and is gone with its guard.
#[test]
fn claims_of_every_kind_are_guards_and_name_themselves() {
    type Guard = Box<dyn std::any::Any>;
    run(|world| async move {
        let [top, _base] = world.chain(["top", "base"]).await;
        let other = world.part("other").await;
        let guest = root(&top, "guest", Access::ALL);
        let before = world.picture();
        let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let claim = async |kind: &str| {
            let guard: Guard = match kind {
                "blocker" => Box::new(top.block(Operations::REPLACE, "by a blocker")),
                "frozen" => {
                    let over = world.sieve("over", "top").await;
                    let who = "by a frozen link";
                    Box::new((world.graph.freeze_chain(&over, &top, who).unwrap(), over))
                }
                _ => Box::new(world.graph.attach_job(&other, "by a permission", alone).unwrap()),
            };
            guard
        };
        for kind in ["blocker", "frozen", "permission"] {
            let guard = claim(kind).await;
            let error = world.graph.replace(&top, &other).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{kind}");
            assert!(error.to_string().contains(kind), "{kind}: {error}");
            drop(guard);
            world.graph.reap().await;
            assert_eq!(world.picture(), before, "{kind}");
        }
        // A blocker is no reference: the node ends in spite of it.
        let blocker = other.block(Operations::all(), "not a holder");
        let job = other.claim_job("job0").unwrap();
        other.close().await.unwrap();
        drop((blocker, job));
        world.graph.replace(&top, &world.part("third").await).await.unwrap();
        assert_eq!(guest.target().name(), "third");
        let CloseError::InUse { holders, .. } =
            world.graph.find("third").unwrap().close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
    });
}
