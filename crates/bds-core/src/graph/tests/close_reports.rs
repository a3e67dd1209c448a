//! Tests flushes and reports of closes beside other users: dead nodes, children acquired meanwhile,
//! frozen links, drained sections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::ErrorKind;
use crate::graph::{Access, NodeRef, Perm};
use crate::test_kit::logging::{Fixture, run, run_seeded};

/// A format node on a file of its own.
const PAIR: &str = "driver=cow,node-name=top,file.driver=file,file.node-name=low,file.filename=a";

/// Counts the schedules, of `count`, in which the test met its case.
fn count_met(count: u64, test: impl AsyncFn(Fixture) -> bool) -> usize {
    let met = AtomicUsize::new(0);
    for seed in 0..count {
        run_seeded(
            seed,
            |_| {},
            async |fixture| {
                met.fetch_add(usize::from(test(fixture).await), Ordering::Relaxed);
            },
        );
    }
    met.into_inner()
}

fn names(reports: &[crate::graph::CloseReport]) -> Vec<&str> {
    reports.iter().map(|report| &*report.name).collect()
}

/// Lets background tasks run.
async fn idle() {
    for _ in 0..100 {
        bds_io::yield_now().await;
    }
}

fn has(fixture: &Fixture, line: &str) -> bool {
    fixture.drivers.log.lock().unwrap().iter().any(|known| known == line)
}

#[test]
fn close_does_not_report_dead_nodes_of_other_holders() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let other = fixture
            .open("driver=file,node-name=other,filename=b,fail-flush=on,fail-close=on")
            .await;
        let own = fixture.open(PAIR).await;
        drop(other);
        let report = own.close().await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(names(&report.below), ["low"], "the other node was not held by this one");
        let kept = fixture.graph.reports();
        assert_eq!(names(&kept), ["other"]);
        assert!(kept[0].flush_error.is_some() && kept[0].close_error.is_some());
        assert!(fixture.graph.reap().await.is_empty(), "once");
    });
}

/// Closes [`PAIR`] while `low` gets another holder between the look at its count and its release:
/// `low` is then flushed after all.
async fn close_while_the_child_is_acquired(fixture: &Fixture, options: &str) -> Option<NodeRef> {
    fixture.plain("a");
    let top = fixture.open(options).await;
    fixture.drivers.log();
    let close = bds_io::spawn(top.close());
    while !has(fixture, "flush top") {
        bds_io::yield_now().await;
    }
    // Before the release, or not at all.
    let low = fixture.graph.find("low").ok();
    let report = close.await.unwrap();
    let has_error = report.errors().next().is_some();
    assert_eq!(has_error, options.contains("fail-flush"), "{report:?}");
    assert_eq!(report.errors().count(), usize::from(has_error));
    if low.is_some() {
        assert!(report.below.is_empty(), "the child lives");
        assert_eq!(report.flush_error.is_some(), has_error, "the loss is reported at once");
    }
    low
}

#[test]
fn a_child_acquired_during_close_is_flushed_late() {
    let met = count_met(40, async |fixture| {
        let Some(low) = close_while_the_child_is_acquired(&fixture, PAIR).await else {
            return false;
        };
        let log = fixture.drivers.log();
        assert_eq!(log, ["flush top", "close top", "drop top", "flush low"]);
        assert!(low.close().await.unwrap().is_clean());
        true
    });
    assert!(met >= 10, "of 40 schedules only {met} acquired the child in time");
}

#[test]
fn a_late_flush_that_fails_is_in_the_report() {
    let met = count_met(40, async |fixture| {
        let options = format!("{PAIR},file.fail-flush=on");
        close_while_the_child_is_acquired(&fixture, &options).await.is_some()
    });
    assert!(met >= 10, "of 40 schedules only {met} acquired the child in time");
}

/// The report has the first failure; the late one is reported by the child's own close.
#[test]
fn a_late_flush_does_not_replace_an_earlier_failure() {
    run(|fixture| async move {
        fixture.plain("a");
        let options = format!("{PAIR},fail-flush=on,file.fail-flush=on");
        let top = fixture.open(&options).await;
        let low = fixture.graph.find("low").unwrap();
        let report = top.close().await.unwrap();
        let error = report.flush_error.as_ref().expect("both were configured to fail");
        assert_eq!(error.to_string(), "node 'top': injected flush failure");
        let report = low.close().await.unwrap();
        assert_eq!(report.errors().count(), 1, "the child's own failure is in its own report");
    });
}

#[test]
fn a_drain_of_a_child_waits_for_its_late_flush() {
    let late = AtomicUsize::new(0);
    for seed in 0..60 {
        run_seeded(
            seed,
            |_| {},
            async |fixture| {
                fixture.plain("a");
                let top = fixture.open(PAIR).await;
                fixture.drivers.log();
                let close = bds_io::spawn(top.close());
                while !has(&fixture, "flush top") {
                    bds_io::yield_now().await;
                }
                if let Ok(low) = fixture.graph.find("low") {
                    // At any point: also when the parent's edge is gone and the edge of the late
                    // flush exists.
                    for _ in 0..seed % 6 {
                        bds_io::yield_now().await;
                    }
                    let drained = fixture.graph.drain(&low).await;
                    let is_flushed = has(&fixture, "flush low");
                    assert!(is_flushed, "seed {seed}: the drain ended before the late flush");
                    idle().await;
                    let log = fixture.drivers.log();
                    assert_eq!(log.iter().filter(|line| *line == "flush low").count(), 1);
                    drop(drained);
                    late.fetch_add(1, Ordering::Relaxed);
                }
                assert!(close.await.unwrap().is_clean());
            },
        );
    }
    let late = late.into_inner();
    assert!(late >= 10, "of 60 schedules only {late} drained the child in time");
}

#[test]
fn close_flushes_children_that_hold_its_data() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let base = fixture.open("driver=file,node-name=base,filename=b").await;
        let top = fixture.open(&format!("{PAIR},backing=base")).await;
        let low = fixture.graph.find("low").unwrap();
        fixture.drivers.log();
        assert!(top.close().await.unwrap().is_clean());
        let log = fixture.drivers.log();
        assert_eq!(
            log,
            ["flush top", "flush low", "close top", "drop top"],
            "not the backing node"
        );
        drop((base, low));
    });
}

#[test]
fn a_read_only_node_is_closed_without_a_flush() {
    run(|fixture| async move {
        fixture.plain("a");
        let low =
            fixture.open("driver=file,node-name=low,filename=a,read-only=on,fail-flush=on").await;
        fixture.drivers.log();
        assert!(low.close().await.unwrap().is_clean());
        assert_eq!(fixture.drivers.log(), ["close low", "drop low"]);
    });
}

#[test]
fn a_failed_flush_of_a_shared_child_is_reported_and_the_node_closes() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(&format!("{PAIR},file.fail-flush=on")).await;
        let low = fixture.graph.find("low").unwrap();
        fixture.drivers.log();
        let report = top.close().await.unwrap();
        let error = report.flush_error.expect("the child was configured to fail");
        assert_eq!((error.kind(), error.message()), (ErrorKind::NoSpace, "injected flush failure"));
        assert_eq!(fixture.drivers.log(), ["flush top", "flush low", "close top", "drop top"]);
        assert!(fixture.graph.acquire(low.id()).is_ok());
    });
}

#[test]
fn a_report_lists_its_own_failures_and_those_below() {
    run(|fixture| async move {
        fixture.plain("a");
        let options =
            format!("{PAIR},fail-flush=on,fail-close=on,file.fail-flush=on,file.fail-close=on");
        let report = fixture.open(&options).await.close().await.unwrap();
        let errors: Vec<String> = report.errors().map(ToString::to_string).collect();
        let wanted = [
            "node 'top': injected flush failure",
            "node 'top': injected close failure",
            "node 'low': injected flush failure",
            "node 'low': injected close failure",
        ];
        assert_eq!(errors, wanted);
        let only_close = format!("{PAIR},fail-close=on").replace("top", "t2").replace("low", "l2");
        let report = fixture.open(&only_close).await.close().await.unwrap();
        assert_eq!(report.into_result().unwrap_err().message(), "injected close failure");
        let only_below = format!("{PAIR},file.fail-close=on").replace("top", "t3");
        let report = fixture.open(&only_below.replace("low", "l3")).await.close().await.unwrap();
        assert_eq!(
            report.into_result().unwrap_err().to_string(),
            "node 'l3': injected close failure"
        );
    });
}

/// The holder of a frozen link keeps it beyond its parent; for all others it is gone.
#[test]
fn a_frozen_link_of_a_closed_node_is_no_parent() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let base = fixture.open("driver=file,node-name=base,filename=b").await;
        let top = fixture.open(&format!("{PAIR},backing=base")).await;
        let frozen = fixture.graph.freeze_chain(&top, &base, "a test").unwrap();
        assert_eq!(frozen.len(), 1);
        assert!(top.close().await.unwrap().is_clean());
        assert!(base.node().parents().is_empty(), "no edge of a node that is gone");
        assert_eq!(base.count(), 2, "the frozen link holds its target");
        // Nothing is drained through it, and its parent's permissions are free.
        drop(fixture.graph.drain(&base).await);
        let drained = fixture.graph.drain(&base).await;
        assert_eq!(base.quiesce_count(), 1);
        drop((drained, frozen));
        assert_eq!(base.count(), 1);
        assert!(base.close().await.unwrap().is_clean());
    });
}

#[test]
fn a_frozen_link_of_a_closed_node_has_no_permissions() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture
            .open("driver=pass,node-name=top,file.driver=file,file.node-name=low,file.filename=a")
            .await;
        let low = fixture.graph.find("low").unwrap();
        let exclusive = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
        let reader = crate::test_kit::gate_port::root(&top, "reader", exclusive);
        let frozen = fixture.graph.freeze_chain(&top, &low, "a test").unwrap();
        assert_eq!(frozen.len(), 1);
        drop(reader);
        assert!(top.close().await.unwrap().is_clean());
        let writer = crate::test_kit::gate_port::root(&low, "writer", Access::ALL);
        assert_eq!(writer.access(), Access::ALL);
        drop(frozen);
    });
}

/// Permissions taken through the retained edge are free, at any depth.
#[test]
fn a_retained_edge_of_a_closed_node_has_no_permissions() {
    run(|fixture| async move {
        fixture.plain("a");
        let low = fixture.open("driver=file,node-name=low,filename=a").await;
        let mid = fixture.open("driver=pass,node-name=mid,file=low").await;
        let top = fixture.open("driver=cow,node-name=top,file=mid").await;
        let edge = Arc::clone(&mid.node().parents()[0]);
        assert!(mid.node().children()[0].access().writes(), "as its parent does");
        assert!(top.close().await.unwrap().is_clean());
        let read = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let reader = crate::test_kit::gate_port::root(&low, "reader", read);
        assert!(!mid.node().children()[0].access().writes());
        drop((edge, reader));
    });
}

/// A reader may retain an edge for long; neither the close nor a drain waits for it.
#[test]
fn close_does_not_wait_for_a_retained_edge() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(PAIR).await;
        let low = fixture.graph.find("low").unwrap();
        let edge = Arc::clone(&low.node().parents()[0]);
        assert!(top.close().await.unwrap().is_clean());
        assert!(low.node().parents().is_empty(), "for all others it is gone");
        drop(fixture.graph.drain(&low).await);
        drop(edge);
        assert!(low.close().await.unwrap().is_clean());
    });
}

#[test]
fn closing_frees_the_name_unless_a_successor_took_it() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let name_count = || fixture.graph.0.core.lock_names().claims.len();
        let first = fixture.open("driver=file,node-name=disk,filename=a").await;
        assert_eq!(name_count(), 1);
        assert!(first.close().await.unwrap().is_clean());
        assert_eq!(name_count(), 0, "a closed node leaves no entry");
        // Dead but not closed, because everything is drained; the name is free.
        let first = fixture.open("driver=file,node-name=disk,filename=a").await;
        let drained = fixture.graph.drain_all().await;
        drop(first);
        let second = fixture.open("driver=file,node-name=disk,filename=b").await;
        drop(drained);
        idle().await;
        assert!(has(&fixture, "close disk"), "the first was closed after the section");
        assert_eq!(
            fixture.graph.find("disk").unwrap().id(),
            second.id(),
            "the name is the second's"
        );
    });
}

/// A close inside a drained section, of everything or of a node that it writes to, is deferred to
/// the end of the section.
#[test]
fn closes_wait_for_drained_sections() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        for is_all in [true, false] {
            let top = fixture.open(PAIR).await;
            let low = fixture.graph.find("low").unwrap();
            let drained = match is_all {
                true => fixture.graph.drain_all().await,
                false => fixture.graph.drain(&low).await,
            };
            drop(low);
            fixture.drivers.log();
            drop(top);
            assert!(fixture.graph.reap().await.is_empty(), "it waits");
            idle().await;
            assert_eq!(fixture.drivers.log(), [""; 0], "all {is_all}");
            drop(drained);
            idle().await;
            let log = fixture.drivers.log();
            let wanted =
                ["flush top", "close top", "drop top", "flush low", "close low", "drop low"];
            assert_eq!(log, wanted, "all {is_all}: in the background, after the section");
        }
        assert_eq!(fixture.graph.dump(), "");
    });
}

/// An explicit close waits too; dead nodes of others that cannot be closed yet are deferred.
#[test]
fn close_defers_dead_nodes_above_drained_nodes() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        let top = fixture.open(PAIR).await;
        let low = fixture.graph.find("low").unwrap();
        let own = fixture.open("driver=file,node-name=own,filename=b").await;
        let drained = fixture.graph.drain(&low).await;
        drop(top);
        fixture.drivers.log();
        assert!(own.close().await.unwrap().below.is_empty());
        assert_eq!(fixture.drivers.log(), ["flush own", "close own", "drop own"]);
        drop((drained, low));
        idle().await;
        let log = fixture.drivers.log();
        assert!(log.contains(&"close top".to_owned()) && log.contains(&"close low".to_owned()));
        assert_eq!(fixture.graph.dump(), "");
    });
}

/// Failures of background closes are kept.
#[test]
fn failures_of_deferred_closes_are_kept() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(&format!("{PAIR},fail-close=on")).await;
        let drained = fixture.graph.drain_all().await;
        drop(top);
        assert!(fixture.graph.reap().await.is_empty());
        drop(drained);
        idle().await;
        let kept = fixture.graph.reports();
        assert_eq!(names(&kept), ["top"]);
        assert!(fixture.graph.reports().is_empty(), "once");
    });
}

/// The next reap returns kept failures first; reports of clean background closes are dropped.
#[test]
fn reap_returns_earlier_kept_failures_first() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.plain("b");
        drop(fixture.open("driver=file,node-name=first,filename=a,fail-close=on").await);
        // reaps in passing
        let second = fixture.open("driver=file,node-name=second,filename=b").await;
        drop(second);
        assert_eq!(names(&fixture.graph.reap().await), ["first", "second"]);
        assert!(fixture.graph.reap().await.is_empty());
    });
}

/// Each of two concurrent closes reports its own nodes.
#[test]
fn concurrent_closes_report_their_own_nodes() {
    for seed in 0..30 {
        run_seeded(
            seed,
            |_| {},
            async |fixture| {
                fixture.plain("a");
                fixture.plain("b");
                fixture.plain("c");
                fixture.plain("d");
                // Two children each: the second is dead while the first is being closed.
                let one =
                    format!("{PAIR},backing.driver=file,backing.node-name=base,backing.filename=c");
                let two =
                    one.replace("filename=a", "filename=b").replace("filename=c", "filename=d");
                let two =
                    two.replace("top", "top2").replace("low", "low2").replace("base", "base2");
                let (one, two) = (fixture.open(&one).await, fixture.open(&two).await);
                let (one, two) = (bds_io::spawn(one.close()), bds_io::spawn(two.close()));
                let (one, two) = (one.await.unwrap(), two.await.unwrap());
                assert_eq!(
                    (names(&one.below), names(&two.below)),
                    (vec!["low", "base"], vec!["low2", "base2"])
                );
                assert!(fixture.graph.reports().is_empty() && one.is_clean() && two.is_clean());
            },
        );
    }
}
