//! Nine places where QEMU 10.0.2 must not be copied; numbers are those of the last table of
//! `docs/lifecycle-bugs.md`.

use bds_refcount::Release;

use super::scripted_graph::{commit, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, BlockOps, CloseError, Perm};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;

/// Number 1. QEMU 10.0.2 takes the lock and then drains. Here the right to move an edge is made of
/// a drained set, which only draining without the lock yields (`compile_fail/drained_by_hand.rs`).
/// While a change waits, the lock is free.
#[test]
fn changes_drain_without_the_lock() {
    run_schedules(20, |test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let other = test.part("other").await;
        let guest = root(&top, "guest", Access::READ);
        let mut request = Box::pin(read(&guest));
        assert!(futures_util::poll!(&mut request).is_pending());
        let changes = test.graph.change().replace(&top, &other).set_backing(&top, None);
        let mut change = Box::pin(changes.commit());
        for _ in 0..20 {
            assert!(futures_util::poll!(&mut change).is_pending());
            assert!(test.graph.0.core.lock_is_free(), "a task waits with the lock held");
            bds_io::yield_now().await;
        }
        request.await.unwrap();
        change.await.unwrap();
        assert_eq!(base.count(), 1);
    });
}

/// Number 2. At exit the monitor's references are released and its list stays. Here an entry of the
/// list is the reference; after shutdown the list is empty (row 16 has the late migration).
#[test]
fn monitor_list_holds_what_it_lists() {
    run(|test| async move {
        let id = test.graph.add(options("driver=part,node-name=a")).await.unwrap();
        assert!(test.graph.is_owned(id));
        assert_eq!(test.graph.count(id), 1, "the list is the only holder");
        let node = test.graph.find("a").unwrap();
        commit(test.graph.change().disown(&node)).await.unwrap();
        assert!(!test.graph.is_owned(id));
        assert_eq!(node.count(), 1, "disown releases the reference");
        test.graph.own(node).unwrap();
        assert_eq!(test.graph.count(id), 1);
        let report = test.graph.shutdown().await;
        assert_eq!(report.closed.len(), 1);
        assert!(!test.graph.is_owned(id) && test.graph.top_level().next().is_none());
    });
}

/// Number 3. QEMU's walk visits backends first and the monitor's nodes second, but starts the
/// second part where the first has stopped: with a backend present, nodes are skipped and not
/// flushed. Here the walk is complete for every mixture.
#[test]
fn top_level_walk_skips_no_node() {
    for (backends, owned) in [(0, 3), (1, 3), (3, 1), (3, 0), (2, 2)] {
        run(|test| async move {
            let mut wanted = Vec::new();
            let mut roots = Vec::new();
            for number in 0..backends {
                let node = test.part(&format!("b{number}")).await;
                roots.push(root(&node, &format!("guest{number}"), Access::READ));
                wanted.push(node.name().to_owned());
            }
            for number in 0..owned {
                let text = format!("driver=part,node-name=m{number}");
                test.graph.add(options(&text)).await.unwrap();
                wanted.push(format!("m{number}"));
            }
            // Below a backend and owned by the monitor: once.
            if let Ok(both) = test.graph.find("b0") {
                test.graph.own(both).unwrap();
            }
            let found: Vec<String> =
                test.graph.top_level().map(|node| node.name().to_owned()).collect();
            assert_eq!(found, wanted);
        });
    }
}

/// Number 4. QEMU's `bdrv_ref` is an unchecked addition: a node that is being deleted can be
/// acquired and deleted twice. Here zero is final, by id, by name, through a parent or a walk, and
/// a clone is made only of a live reference.
#[test]
fn node_at_refcount_zero_is_not_acquired() {
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let (top_id, base_id) = (top.id(), base.id());
        drop(base);
        let graph = test.graph.clone();
        test.script.at("top", Point::Close, move || {
            let graph = graph.clone();
            async move {
                assert!(graph.acquire(top_id).is_err() && graph.find("top").is_err());
                assert!(graph.nodes().iter().all(|node| node.id() != top_id));
                let base = graph.acquire(base_id).unwrap();
                assert_eq!(base.name(), "base", "still held by the closing node");
                assert_eq!(base.release(), Release::NotLast);
                Ok(())
            }
        });
        assert_eq!(top.release(), Release::Last);
        assert_eq!(test.graph.count(top_id), 0);
        let error = test.graph.open(options("driver=sieve,file=top")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        test.graph.reap().await;
        assert_eq!((test.script.times("close top"), test.script.times("close base")), (1, 1));
    });
}

/// Number 5. Undoing a change in QEMU releases references under the write lock, which is safe only
/// while none is the last. Here any may be the last, at each step: the node is closed afterwards,
/// once.
#[test]
fn undo_may_release_the_last_reference() {
    run(|test| async move {
        let top = test.part("top").await;
        let before = test.snapshot();
        for step in 0.. {
            let over = test.part("over").await;
            let id = over.id();
            let change = test.graph.change().append(&top, &over).set_backing(&over, None);
            drop(over);
            test.graph.0.faults.set(Some(step));
            test.script.log();
            let result = commit(change).await;
            let struck = test.graph.0.faults.has_struck();
            test.graph.0.faults.set(None);
            assert_eq!(result.is_err(), struck, "step {step}");
            assert!(test.graph.acquire(id).is_err());
            let closed = test.graph.reap().await;
            assert_eq!((closed.len(), test.script.times("close over")), (1, 1), "step {step}");
            assert_eq!(test.snapshot(), before);
            if !struck {
                break;
            }
        }
    });
}

/// Number 6. A QEMU job without references stays on the list of jobs while its teardown polls, so
/// that a walk finds a job with a count of zero. Here an object leaves every list before its
/// teardown begins. Nodes stand for jobs.
#[test]
fn closing_node_is_on_no_list() {
    run(|test| async move {
        let id = test.graph.add(options("driver=part,node-name=dying")).await.unwrap();
        let watch = test.graph.watch(id);
        let graph = test.graph.clone();
        test.script.at("dying", Point::Close, move || {
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
        let mut del = Box::pin(test.graph.del("dying"));
        assert!(futures_util::poll!(&mut del).is_pending());
        assert!(watch.has_fired(), "before the close has completed");
        // The name is free already.
        let next = test.part("next").await;
        assert_eq!(test.graph.del("dying").await.unwrap_err().kind(), ErrorKind::NotFound);
        drop(next);
        del.await.unwrap();
    });
}

/// Number 7. In QEMU a node opened inside two sections gets two drain callbacks and one end, so a
/// throttled disk would stay unthrottled. Here a driver gets both in turn (the fake driver asserts
/// it), however many sections there are.
#[test]
fn node_opened_in_two_sections_is_drained_once() {
    run(|test| async move {
        let base = test.part("base").await;
        let one = test.graph.drain_all().await;
        let two = test.graph.drain_all().await;
        let three = test.graph.drain(&base).await;
        let opened = test.sieve("opened", "base").await;
        assert!(opened.quiesce_count() >= 3 - 1);
        let guest = root(&opened, "guest", Access::READ);
        assert!(guest.gate_blocked());
        assert_eq!(test.script.times("drain begin opened"), 1);
        for section in [two, three, one] {
            assert_eq!(test.script.times("drain end opened"), 0);
            drop(section);
        }
        assert_eq!(test.script.times("drain end opened"), 1);
        assert_eq!(opened.quiesce_count(), 0);
        read(&guest).await.unwrap();
    });
}

/// Number 8. QEMU loses the error of the flush at the last release, and does not undo half an
/// inactivation. Here the error is reported once, and inactivation is undone at each step.
#[test]
fn flush_errors_are_reported_and_failed_inactivation_is_undone() {
    run(|test| async move {
        let failing = test.part("failing").await;
        test.script.fail_at("failing", Point::Flush);
        assert_eq!(failing.release(), Release::Last);
        let other = test.part("other").await; // reaps in passing
        let reports = test.graph.reports();
        assert!(reports.len() == 1 && reports[0].flush_error.is_some(), "{reports:?}");
        assert!(test.graph.reports().is_empty());

        let [_top, _mid, _base] = test.chain(["top", "mid", "base"]).await;
        let before = test.snapshot();
        for node in ["top", "mid", "base", "other"] {
            for point in [Point::Inactivate, Point::Flush] {
                test.script.fail_at(node, point);
                assert_eq!(test.graph.inactivate_all().await.unwrap_err().kind(), ErrorKind::Io);
                assert_eq!(test.snapshot(), before, "{node} {point:?}");
                test.script.clear(node, point);
            }
        }
        test.fail_every_step(|| test.graph.inactivate_all()).await;
        let inactive = test.snapshot();
        for node in ["top", "mid", "base", "other"] {
            test.script.fail_at(node, Point::Activate);
            assert_eq!(test.graph.activate_all().await.unwrap_err().kind(), ErrorKind::Io);
            assert_eq!(test.snapshot(), inactive, "{node}");
            test.script.clear(node, Point::Activate);
        }
        test.graph.activate_all().await.unwrap();
        assert_eq!(test.snapshot(), before);
        drop(other);
    });
}

/// Number 9. QEMU has permissions and, beside them, blockers, each checked and removed by hand.
/// Here every claim is a guard: each kind alone blocks, names itself, keeps no node open, and ends
/// with its guard.
#[test]
fn claims_of_every_kind_are_guards_and_name_themselves() {
    type Guard = Box<dyn std::any::Any>;
    run(|test| async move {
        let [top, _base] = test.chain(["top", "base"]).await;
        let other = test.part("other").await;
        let guest = root(&top, "guest", Access::ALL);
        let before = test.snapshot();
        let alone = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let claim = async |kind: &str| {
            let guard: Guard = match kind {
                "blocker" => Box::new(top.block(BlockOps::REPLACE, "by a blocker")),
                "frozen" => {
                    let over = test.sieve("over", "top").await;
                    let owner = "by a frozen link";
                    Box::new((test.graph.freeze_chain(&over, &top, owner).unwrap(), over))
                }
                _ => Box::new(test.graph.attach_job(&other, "by a permission", alone).unwrap()),
            };
            guard
        };
        for kind in ["blocker", "frozen", "permission"] {
            let guard = claim(kind).await;
            let error = test.graph.replace(&top, &other).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{kind}");
            assert!(error.to_string().contains(kind), "{kind}: {error}");
            drop(guard);
            test.graph.reap().await;
            assert_eq!(test.snapshot(), before, "{kind}");
        }
        // A blocker is no reference: the node closes in spite of it.
        let blocker = other.block(BlockOps::all(), "not a holder");
        let job = other.claim_job("job0").unwrap();
        other.close().await.unwrap();
        drop((blocker, job));
        test.graph.replace(&top, &test.part("third").await).await.unwrap();
        assert_eq!(guest.target().name(), "third");
        let CloseError::InUse { holders, .. } =
            test.graph.find("third").unwrap().close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
    });
}
