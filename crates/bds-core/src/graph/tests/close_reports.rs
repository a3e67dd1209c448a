//! Flushes and reports of closings that meet other users: dead nodes beside them, children that find another holder in time,
//! frozen links, drained sections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fakes::{Fixture, run, run_seeded};
use crate::ErrorKind;
use crate::graph::{Access, NodeRef, Perm};

/// A format node on a file of its own.
const PAIR: &str = "driver=cow,node-name=top,file.driver=file,file.node-name=low,file.filename=a";

/// How many of `count` schedules met what the test is about.
fn met(count: u64, test: impl AsyncFn(Fixture) -> bool) -> usize {
    let met = AtomicUsize::new(0);
    for seed in 0..count {
        run_seeded(
            seed,
            |_| {},
            async |world| {
                met.fetch_add(usize::from(test(world).await), Ordering::Relaxed);
            },
        );
    }
    met.into_inner()
}

fn names(reports: &[crate::graph::CloseReport]) -> Vec<&str> {
    reports.iter().map(|report| &*report.name).collect()
}

/// Lets what runs in the background go on.
async fn idle() {
    for _ in 0..100 {
        bds_io::yield_now().await;
    }
}

fn has(world: &Fixture, line: &str) -> bool {
    world.shared.log.lock().unwrap().iter().any(|known| known == line)
}

#[test]
fn a_dead_node_of_others_that_a_close_meets_is_reported_to_them() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        let other =
            world.open("driver=file,node-name=other,filename=b,fail-flush=on,fail-close=on").await;
        let own = world.open(PAIR).await;
        drop(other);
        let report = own.close().await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(names(&report.below), ["low"], "the other node was not held by this one");
        let kept = world.graph.reports();
        assert_eq!(names(&kept), ["other"]);
        assert!(kept[0].flush_error.is_some() && kept[0].close_error.is_some());
        assert!(world.graph.reap().await.is_empty(), "once");
    });
}

/// As [`PAIR`], and `low` gets another holder between the look at its count and its release: then it is flushed after all.
async fn close_while_the_child_is_acquired(world: &Fixture, options: &str) -> Option<NodeRef> {
    world.plain("a");
    let top = world.open(options).await;
    world.shared.log();
    let close = bds_io::spawn(top.close());
    while !has(world, "flush top") {
        bds_io::yield_now().await;
    }
    // Before the release, or not at all.
    let low = world.graph.find("low").ok();
    let report = close.await.unwrap();
    let has_error = report.errors().next().is_some();
    assert_eq!(has_error, options.contains("fail-flush"), "{report:?}");
    assert_eq!(report.errors().count(), usize::from(has_error));
    if low.is_some() {
        assert!(report.below.is_empty(), "it lives");
        assert_eq!(report.flush_error.is_some(), has_error, "what was lost is told at once");
    }
    low
}

#[test]
fn a_child_that_finds_another_holder_in_time_is_flushed_late() {
    let met = met(40, async |world| {
        let Some(low) = close_while_the_child_is_acquired(&world, PAIR).await else { return false };
        let log = world.shared.log();
        assert_eq!(log, ["flush top", "close top", "drop top", "flush low"]);
        assert!(low.close().await.unwrap().is_clean());
        true
    });
    assert!(met >= 10, "of 40 schedules only {met} acquired the child in time");
}

#[test]
fn a_late_flush_that_fails_is_in_the_report() {
    let met = met(40, async |world| {
        let options = format!("{PAIR},file.fail-flush=on");
        close_while_the_child_is_acquired(&world, &options).await.is_some()
    });
    assert!(met >= 10, "of 40 schedules only {met} acquired the child in time");
}

/// The first failure is told; the late one is not lost sight of by being told instead.
#[test]
fn a_late_flush_does_not_replace_an_earlier_failure() {
    run(|world| async move {
        world.plain("a");
        let options = format!("{PAIR},fail-flush=on,file.fail-flush=on");
        let top = world.open(&options).await;
        let low = world.graph.find("low").unwrap();
        let report = top.close().await.unwrap();
        let error = report.flush_error.as_ref().expect("both were told to fail");
        assert_eq!(error.to_string(), "node 'top': told to fail flushing");
        let report = low.close().await.unwrap();
        assert_eq!(report.errors().count(), 1, "the child's own is its own close's");
    });
}

#[test]
fn a_drain_of_a_child_waits_for_its_late_flush() {
    let late = AtomicUsize::new(0);
    for seed in 0..60 {
        run_seeded(
            seed,
            |_| {},
            async |world| {
                world.plain("a");
                let top = world.open(PAIR).await;
                world.shared.log();
                let close = bds_io::spawn(top.close());
                while !has(&world, "flush top") {
                    bds_io::yield_now().await;
                }
                if let Ok(low) = world.graph.find("low") {
                    // At any moment: also when the parent's edge is gone and that of the late flush is there.
                    for _ in 0..seed % 6 {
                        bds_io::yield_now().await;
                    }
                    let drained = world.graph.drain(&low).await;
                    let is_flushed = has(&world, "flush low");
                    assert!(
                        is_flushed,
                        "seed {seed}: the drain was over before the parent had written"
                    );
                    idle().await;
                    let log = world.shared.log();
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
fn flushes_reach_children_by_what_they_hold() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        let base = world.open("driver=file,node-name=base,filename=b").await;
        let top = world.open(&format!("{PAIR},backing=base")).await;
        let low = world.graph.find("low").unwrap();
        world.shared.log();
        assert!(top.close().await.unwrap().is_clean());
        let log = world.shared.log();
        assert_eq!(
            log,
            ["flush top", "flush low", "close top", "drop top"],
            "not the backing node"
        );
        drop((base, low));
    });
}

#[test]
fn a_node_that_is_only_read_is_closed_without_a_flush() {
    run(|world| async move {
        world.plain("a");
        let low =
            world.open("driver=file,node-name=low,filename=a,read-only=on,fail-flush=on").await;
        world.shared.log();
        assert!(low.close().await.unwrap().is_clean());
        assert_eq!(world.shared.log(), ["close low", "drop low"]);
    });
}

#[test]
fn a_failed_flush_of_a_child_that_others_keep_is_in_the_report_and_the_node_is_closed() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(&format!("{PAIR},file.fail-flush=on")).await;
        let low = world.graph.find("low").unwrap();
        world.shared.log();
        let report = top.close().await.unwrap();
        let error = report.flush_error.expect("the child was told to fail");
        assert_eq!((error.kind(), error.message()), (ErrorKind::NoSpace, "told to fail flushing"));
        assert_eq!(world.shared.log(), ["flush top", "flush low", "close top", "drop top"]);
        assert!(world.graph.acquire(low.id()).is_ok());
    });
}

#[test]
fn a_report_lists_its_own_failures_and_those_below() {
    run(|world| async move {
        world.plain("a");
        let options =
            format!("{PAIR},fail-flush=on,fail-close=on,file.fail-flush=on,file.fail-close=on");
        let report = world.open(&options).await.close().await.unwrap();
        let errors: Vec<String> = report.errors().map(ToString::to_string).collect();
        let wanted = [
            "node 'top': told to fail flushing",
            "node 'top': told to fail closing",
            "node 'low': told to fail flushing",
            "node 'low': told to fail closing",
        ];
        assert_eq!(errors, wanted);
        let only_close = format!("{PAIR},fail-close=on").replace("top", "t2").replace("low", "l2");
        let report = world.open(&only_close).await.close().await.unwrap();
        assert_eq!(report.into_result().unwrap_err().message(), "told to fail closing");
        let only_below = format!("{PAIR},file.fail-close=on").replace("top", "t3");
        let report = world.open(&only_below.replace("low", "l3")).await.close().await.unwrap();
        assert_eq!(
            report.into_result().unwrap_err().to_string(),
            "node 'l3': told to fail closing"
        );
    });
}

/// The link outlives its parent in the hands of whoever froze it; to everybody else it is gone.
#[test]
fn a_frozen_link_of_a_closed_node_is_nobodys_parent() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        let base = world.open("driver=file,node-name=base,filename=b").await;
        let top = world.open(&format!("{PAIR},backing=base")).await;
        let frozen = world.graph.freeze_chain(&top, &base, "a test").unwrap();
        assert_eq!(frozen.len(), 1);
        assert!(top.close().await.unwrap().is_clean());
        assert!(base.node().parents().is_empty(), "no edge of a node that is gone");
        assert_eq!(base.count(), 2, "the frozen link holds its target");
        // Nothing is drained on its behalf, and what its parent did is allowed to others.
        drop(world.graph.drain(&base).await);
        let drained = world.graph.drain(&base).await;
        assert_eq!(base.quiesce_count(), 1);
        drop((drained, frozen));
        assert_eq!(base.count(), 1);
        assert!(base.close().await.unwrap().is_clean());
    });
}

#[test]
fn what_a_closed_node_did_through_a_frozen_link_is_allowed_to_others() {
    run(|world| async move {
        world.plain("a");
        let top = world
            .open("driver=pass,node-name=top,file.driver=file,file.node-name=low,file.filename=a")
            .await;
        let low = world.graph.find("low").unwrap();
        let selfish = Access { perm: Perm::CONSISTENT_READ, shared: Perm::CONSISTENT_READ };
        let reader = super::fakes::root(&top, "reader", selfish);
        let frozen = world.graph.freeze_chain(&top, &low, "a test").unwrap();
        assert_eq!(frozen.len(), 1);
        drop(reader);
        assert!(top.close().await.unwrap().is_clean());
        let writer = super::fakes::root(&low, "writer", Access::ALL);
        assert_eq!(writer.access(), Access::ALL);
        drop(frozen);
    });
}

/// What the closed node did through it does not stand in the way of others, however far below.
#[test]
fn an_edge_that_somebody_keeps_in_hand_forbids_nothing() {
    run(|world| async move {
        world.plain("a");
        let low = world.open("driver=file,node-name=low,filename=a").await;
        let mid = world.open("driver=pass,node-name=mid,file=low").await;
        let top = world.open("driver=cow,node-name=top,file=mid").await;
        let edge = Arc::clone(&mid.node().parents()[0]);
        assert!(mid.node().children()[0].access().writes(), "as its parent does");
        assert!(top.close().await.unwrap().is_clean());
        let read = Access { shared: Perm::CONSISTENT_READ, ..Access::READ };
        let reader = super::fakes::root(&low, "reader", read);
        assert!(!mid.node().children()[0].access().writes());
        drop((edge, reader));
    });
}

/// One that looks through an edge for long keeps it; the close does not wait for ever, and no drain waits for it either.
#[test]
fn an_edge_that_somebody_keeps_in_hand_does_not_hold_up_the_close() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(PAIR).await;
        let low = world.graph.find("low").unwrap();
        let edge = Arc::clone(&low.node().parents()[0]);
        assert!(top.close().await.unwrap().is_clean());
        assert!(low.node().parents().is_empty(), "to everybody else it is gone");
        drop(world.graph.drain(&low).await);
        drop(edge);
        assert!(low.close().await.unwrap().is_clean());
    });
}

#[test]
fn names_of_closed_nodes_are_forgotten_and_those_of_their_successors_are_not() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        let names = || world.graph.0.core.lock_names().claims.len();
        let first = world.open("driver=file,node-name=disk,filename=a").await;
        assert_eq!(names(), 1);
        assert!(first.close().await.unwrap().is_clean());
        assert_eq!(names(), 0, "no entry is left of a node that is gone");
        // Dead, not closed yet, because everything is drained; its name is free.
        let first = world.open("driver=file,node-name=disk,filename=a").await;
        let drained = world.graph.drain_all().await;
        drop(first);
        let second = world.open("driver=file,node-name=disk,filename=b").await;
        drop(drained);
        idle().await;
        assert!(has(&world, "close disk"), "the first was closed after the section");
        assert_eq!(world.graph.find("disk").unwrap().id(), second.id(), "the name is the second's");
    });
}

/// A closing that meets a drained section of everything, or of what it writes to, waits for its end, and is done then by itself.
#[test]
fn closings_wait_for_drained_sections_and_happen_after_them() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        for is_all in [true, false] {
            let top = world.open(PAIR).await;
            let low = world.graph.find("low").unwrap();
            let drained = match is_all {
                true => world.graph.drain_all().await,
                false => world.graph.drain(&low).await,
            };
            drop(low);
            world.shared.log();
            drop(top);
            assert!(world.graph.reap().await.is_empty(), "it waits");
            idle().await;
            assert_eq!(world.shared.log(), [""; 0], "all {is_all}");
            drop(drained);
            idle().await;
            let log = world.shared.log();
            let wanted =
                ["flush top", "close top", "drop top", "flush low", "close low", "drop low"];
            assert_eq!(log, wanted, "all {is_all}: by itself, once the section is over");
        }
        assert_eq!(world.graph.dump(), "");
    });
}

/// A close that is asked for waits too, and meets others' dead that cannot be closed yet: they are left for later.
#[test]
fn a_close_leaves_what_writes_to_drained_nodes_for_later() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        let top = world.open(PAIR).await;
        let low = world.graph.find("low").unwrap();
        let own = world.open("driver=file,node-name=own,filename=b").await;
        let drained = world.graph.drain(&low).await;
        drop(top);
        world.shared.log();
        assert!(own.close().await.unwrap().below.is_empty());
        assert_eq!(world.shared.log(), ["flush own", "close own", "drop own"]);
        drop((drained, low));
        idle().await;
        let log = world.shared.log();
        assert!(log.contains(&"close top".to_owned()) && log.contains(&"close low".to_owned()));
        assert_eq!(world.graph.dump(), "");
    });
}

/// What fails in the background, where nobody waits, is kept.
#[test]
fn failures_of_closings_after_a_section_are_kept() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(&format!("{PAIR},fail-close=on")).await;
        let drained = world.graph.drain_all().await;
        drop(top);
        assert!(world.graph.reap().await.is_empty());
        drop(drained);
        idle().await;
        let kept = world.graph.reports();
        assert_eq!(names(&kept), ["top"]);
        assert!(world.graph.reports().is_empty(), "once");
    });
}

/// Failures that were kept are told by the next reap, first; clean closings are told only to who waits for them.
#[test]
fn a_reap_tells_what_was_kept_before_it() {
    run(|world| async move {
        world.plain("a");
        world.plain("b");
        drop(world.open("driver=file,node-name=first,filename=a,fail-close=on").await);
        let second = world.open("driver=file,node-name=second,filename=b").await; // reaps in passing
        drop(second);
        assert_eq!(names(&world.graph.reap().await), ["first", "second"]);
        assert!(world.graph.reap().await.is_empty());
    });
}

/// Two closings at once do not mix up whose dead are whose.
#[test]
fn closings_at_once_report_their_own_dead() {
    for seed in 0..30 {
        run_seeded(
            seed,
            |_| {},
            async |world| {
                world.plain("a");
                world.plain("b");
                world.plain("c");
                world.plain("d");
                // Two children each: the second lies dead while the first is closed.
                let one =
                    format!("{PAIR},backing.driver=file,backing.node-name=base,backing.filename=c");
                let two =
                    one.replace("filename=a", "filename=b").replace("filename=c", "filename=d");
                let two =
                    two.replace("top", "top2").replace("low", "low2").replace("base", "base2");
                let (one, two) = (world.open(&one).await, world.open(&two).await);
                let (one, two) = (bds_io::spawn(one.close()), bds_io::spawn(two.close()));
                let (one, two) = (one.await.unwrap(), two.await.unwrap());
                assert_eq!(
                    (names(&one.below), names(&two.below)),
                    (vec!["low", "base"], vec!["low2", "base2"])
                );
                assert!(world.graph.reports().is_empty() && one.is_clean() && two.is_clean());
            },
        );
    }
}
