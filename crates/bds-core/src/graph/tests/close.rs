//! Tests that nodes are closed once, parents first, with one report each, in constant stack.

use crate::graph::CloseError;
use crate::test_kit::logging::run;
use crate::{ErrorKind, Options};
use bds_refcount::{Release, Stale};

const CHAIN: &str = "driver=pass,node-name=top,file.driver=cow,file.node-name=mid,\
                     file.file.driver=file,file.file.node-name=low,file.file.filename=a";

#[test]
fn a_node_is_closed_before_the_children_only_it_held() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(CHAIN).await;
        fixture.drivers.log();
        let report = top.close().await.unwrap();
        assert!(report.is_clean());
        assert_eq!(report.name, "top");
        let below: Vec<&str> = report.below.iter().map(|report| &*report.name).collect();
        assert_eq!(below, ["mid", "low"]);
        assert_eq!(
            fixture.drivers.log(),
            [
                "flush top",
                "close top",
                "drop top",
                "flush mid",
                "close mid",
                "drop mid",
                "flush low",
                "close low",
                "drop low"
            ]
        );
        assert!(fixture.graph.reap().await.is_empty(), "nothing is left to close");
    });
}

#[test]
fn a_child_that_others_hold_is_flushed_but_stays() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(CHAIN).await;
        let _mid = fixture.graph.find("mid").unwrap();
        fixture.drivers.log();
        assert!(top.close().await.unwrap().below.is_empty());
        assert_eq!(fixture.drivers.log(), ["flush top", "flush mid", "close top", "drop top"]);
        assert!(fixture.graph.find("mid").is_ok());
    });
}

#[test]
fn inheritance_ends_when_the_parent_is_closed() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(CHAIN).await;
        let mid = fixture.graph.find("mid").unwrap();
        assert_eq!(mid.inherits_from(), Some(top.id()));
        top.close().await.unwrap();
        assert_eq!(mid.inherits_from(), None);
        let low = fixture.graph.find("low").unwrap();
        assert_eq!(low.inherits_from(), Some(mid.id()));
    });
}

#[test]
fn close_of_a_node_in_use_names_the_holders_and_changes_nothing() {
    run(|fixture| async move {
        fixture.plain("a");
        let base = fixture.open("driver=file,node-name=base,filename=a").await;
        let _user = fixture.open("driver=pass,node-name=user,file=base").await;
        let before = fixture.graph.dump();
        let CloseError::InUse { node, holders } = base.close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].name.to_string(), "user.file");
        assert_eq!(fixture.graph.dump(), before, "nothing has changed");
        let text = CloseError::InUse { node, holders }.to_string();
        assert!(text.starts_with("node 'base' is in use by edge 'user.file' (since "), "{text}");
        assert!(text.contains("test_kit/logging.rs"), "names the source location: {text}");
    });
}

#[test]
fn in_use_returns_the_same_reference() {
    run(|fixture| async move {
        fixture.plain("a");
        let base = fixture.open("driver=file,node-name=base,filename=a").await;
        let second = base.clone();
        let before = fixture.graph.dump();
        let id = base.id();
        let CloseError::InUse { node, .. } = base.close().await.unwrap_err();
        assert_eq!((node.id(), node.count()), (id, 2));
        assert_eq!(fixture.graph.dump(), before);
        drop(second);
        node.close().await.unwrap();
        assert_eq!(fixture.graph.acquire(id).unwrap_err(), Stale::Released);
    });
}

#[test]
fn a_failed_flush_is_in_exactly_one_report() {
    run(|fixture| async move {
        fixture.plain("a");
        for (place, name) in [("", "top"), ("file.", "mid"), ("file.file.", "low")] {
            let top = fixture.open(&format!("{CHAIN},{place}fail-flush=on")).await;
            let report = top.close().await.unwrap();
            let errors: Vec<String> = report.errors().map(ToString::to_string).collect();
            assert_eq!(errors, [format!("node '{name}': injected flush failure")]);
            assert_eq!(report.into_result().unwrap_err().kind(), ErrorKind::NoSpace);
            assert!(fixture.graph.reap().await.is_empty(), "{name}: reported already");
            assert!(fixture.graph.reports().is_empty(), "{name}: reported already");
        }
    });
}

#[test]
fn unawaited_close_failures_are_kept_for_reports() {
    run(|fixture| async move {
        fixture.plain("a");
        drop(fixture.open(&format!("{CHAIN},file.fail-close=on")).await);
        let _next = fixture.open("driver=file,filename=a").await; // reaps in passing
        let reports = fixture.graph.reports();
        assert_eq!(reports.len(), 1, "clean reports are not kept: {reports:?}");
        assert_eq!(reports[0].name, "mid");
        assert!(reports[0].close_error.is_some() && reports[0].flush_error.is_none());
        assert!(fixture.graph.reports().is_empty());
    });
}

#[test]
fn close_completes_when_its_future_is_dropped() {
    run(|fixture| async move {
        fixture.plain("a");
        for polls in 1.. {
            let top = fixture.open(&format!("{CHAIN},file.file.fail-flush=on")).await;
            fixture.drivers.log();
            let mut close = Box::pin(top.close());
            let mut ended = false;
            for _ in 0..polls {
                if let std::task::Poll::Ready(report) = futures_util::poll!(&mut close) {
                    assert_eq!(report.unwrap().errors().count(), 1);
                    ended = true;
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(close);
            while fixture.drivers.log.lock().unwrap().last().is_none_or(|line| line != "drop low") {
                bds_io::yield_now().await;
            }
            for _ in 0..8 {
                bds_io::yield_now().await; // lets the task deliver its report
            }
            let kept = fixture.graph.reports();
            assert_eq!(kept.len(), usize::from(!ended), "after {polls} polls, exactly one report");
            if ended {
                break;
            }
        }
    });
}

#[test]
fn release_says_last_once_and_reap_reports_in_order() {
    run(|fixture| async move {
        fixture.plain("a");
        let top = fixture.open(CHAIN).await;
        let second = top.clone();
        let id = top.id();
        let watch = fixture.graph.watch(id);
        assert_eq!(top.release(), Release::NotLast);
        assert!(!watch.has_fired());
        assert_eq!(second.release(), Release::Last);
        assert!(watch.has_fired());
        assert_eq!(fixture.graph.acquire(id).unwrap_err(), Stale::Dying);
        let names: Vec<String> =
            fixture.graph.reap().await.into_iter().map(|report| report.name).collect();
        assert_eq!(names, ["top", "mid", "low"]);
        assert_eq!(fixture.graph.acquire(id).unwrap_err(), Stale::Released);
        fixture.graph.watch(id).await;
    });
}

#[test]
fn a_chain_of_twenty_thousand_nodes_is_closed_in_constant_stack() {
    // A test thread's stack would not hold one frame per node.
    run(|fixture| async move {
        fixture.plain("a");
        let mut top = fixture.open("driver=file,filename=a,node-name=n0").await;
        for level in 1..=20_000 {
            let options = Options::new()
                .with("driver", "pass")
                .with("node-name", format!("n{level}"))
                .with("file", top.name());
            top = fixture.graph.open(options).await.unwrap();
        }
        let report = top.close().await.unwrap();
        assert_eq!(report.below.len(), 20_000);
        assert_eq!(report.below.last().unwrap().name, "n0");
        assert_eq!(fixture.graph.dump(), "");
    });
}

#[test]
fn shutdown_closes_unused_nodes_and_names_leaks() {
    run(|fixture| async move {
        fixture.plain("a");
        fixture.sim.put_file("b", &[0; 512]);
        let kept = fixture.open("driver=file,node-name=kept,filename=b").await;
        drop(fixture.open(CHAIN).await);
        let report = fixture.graph.shutdown().await;
        assert_eq!(report.closed.len(), 3);
        assert_eq!(report.leaked.len(), 1);
        assert_eq!((&*report.leaked[0].name, report.leaked[0].count), ("kept", 1));
        assert_eq!(report.leaked[0].holders.len(), 1);
        let error = fixture.open_error("driver=file,filename=b").await;
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        drop(kept);
        let again = fixture.graph.shutdown().await;
        assert_eq!((again.closed.len(), again.leaked.len()), (1, 0));
    });
}

#[test]
fn dropping_the_graph_closes_dead_nodes() {
    run(|fixture| async move {
        fixture.plain("a");
        let shared = std::sync::Arc::clone(&fixture.drivers);
        drop(fixture.open(CHAIN).await);
        drop(fixture);
        while shared.log.lock().unwrap().last().is_none_or(|line| line != "drop low") {
            bds_io::yield_now().await;
        }
        assert!(shared.log().contains(&"close low".to_owned()));
    });
}

#[test]
fn a_leak_report_has_the_source_location_of_the_open() {
    run(|fixture| async move {
        fixture.plain("a");
        let options = crate::Options::parse("driver=file,node-name=n,filename=a").unwrap();
        let line = line!() + 1;
        let node = fixture.graph.open(options.clone()).await.unwrap();
        let report = fixture.graph.shutdown().await;
        let since = report.leaked[0].holders[0].since;
        assert_eq!((since.file(), since.line()), (file!(), line));
        let words = report.check_leaks().unwrap_err().to_string();
        assert!(words.contains(&format!("owner 'open' (since {}:{line}", file!())), "{words}");
        drop(node);
    });
}

#[test]
fn a_refused_del_has_the_source_location_of_other_holders() {
    run(|fixture| async move {
        fixture.plain("a");
        let options = crate::Options::parse("driver=file,node-name=n,filename=a").unwrap();
        let line = line!() + 1;
        let id = fixture.graph.add(options).await.unwrap();
        let since = fixture.graph.holders(id)[0].since;
        assert_eq!((since.file(), since.line()), (file!(), line));
        let user = fixture.graph.find("n").unwrap();
        let refused = fixture.graph.del("n").await.unwrap_err().to_string();
        assert!(
            refused.contains("user 'reference' (since") && refused.contains(file!()),
            "{refused}"
        );
        drop(user);
        fixture.graph.del("n").await.unwrap();
    });
}
