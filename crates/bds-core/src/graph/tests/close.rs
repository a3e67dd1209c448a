//! Closing: once each, in order, reported once, in constant stack.

use super::fakes::run;
use crate::graph::CloseError;
use crate::{ErrorKind, Options};
use bds_refcount::{Release, Stale};

const CHAIN: &str = "driver=pass,node-name=top,file.driver=cow,file.node-name=mid,\
                     file.file.driver=file,file.file.node-name=low,file.file.filename=a";

#[test]
fn a_node_is_closed_before_the_children_only_it_held() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(CHAIN).await;
        world.shared.log();
        let report = top.close().await.unwrap();
        assert!(report.is_clean());
        assert_eq!(report.name, "top");
        let below: Vec<&str> = report.below.iter().map(|report| &*report.name).collect();
        assert_eq!(below, ["mid", "low"]);
        assert_eq!(
            world.shared.log(),
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
        assert!(world.graph.reap().await.is_empty(), "nothing is left to close");
    });
}

#[test]
fn a_child_that_others_hold_is_flushed_but_stays() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(CHAIN).await;
        let _mid = world.graph.find("mid").unwrap();
        world.shared.log();
        assert!(top.close().await.unwrap().below.is_empty());
        assert_eq!(world.shared.log(), ["flush top", "flush mid", "close top", "drop top"]);
        assert!(world.graph.find("mid").is_ok());
    });
}

#[test]
fn who_inherited_from_a_closed_node_inherits_from_nobody() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(CHAIN).await;
        let mid = world.graph.find("mid").unwrap();
        assert_eq!(mid.inherits_from(), Some(top.id()));
        top.close().await.unwrap();
        assert_eq!(mid.inherits_from(), None);
        let low = world.graph.find("low").unwrap();
        assert_eq!(low.inherits_from(), Some(mid.id()));
    });
}

#[test]
fn close_of_a_node_in_use_names_the_holders_and_changes_nothing() {
    run(|world| async move {
        world.plain("a");
        let base = world.open("driver=file,node-name=base,filename=a").await;
        let _user = world.open("driver=pass,node-name=user,file=base").await;
        let before = world.graph.dump();
        let CloseError::InUse { node, holders } = base.close().await.unwrap_err();
        assert_eq!(holders.len(), 1);
        assert_eq!(holders[0].name.to_string(), "user.file");
        assert_eq!(world.graph.dump(), before, "nothing has changed");
        let text = CloseError::InUse { node, holders }.to_string();
        assert!(text.starts_with("node 'base' is in use by edge 'user.file' (since "), "{text}");
        assert!(text.contains("graph"), "says where in the program: {text}");
    });
}

#[test]
fn in_use_gives_the_same_reference_back() {
    run(|world| async move {
        world.plain("a");
        let base = world.open("driver=file,node-name=base,filename=a").await;
        let second = base.clone();
        let before = world.graph.dump();
        let id = base.id();
        let CloseError::InUse { node, .. } = base.close().await.unwrap_err();
        assert_eq!((node.id(), node.count()), (id, 2));
        assert_eq!(world.graph.dump(), before);
        drop(second);
        node.close().await.unwrap();
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
    });
}

#[test]
fn a_failed_flush_is_in_exactly_one_report() {
    run(|world| async move {
        world.plain("a");
        for (place, name) in [("", "top"), ("file.", "mid"), ("file.file.", "low")] {
            let top = world.open(&format!("{CHAIN},{place}fail-flush=on")).await;
            let report = top.close().await.unwrap();
            let errors: Vec<String> = report.errors().map(ToString::to_string).collect();
            assert_eq!(errors, [format!("node '{name}': told to fail flushing")]);
            assert_eq!(report.into_result().unwrap_err().kind(), ErrorKind::NoSpace);
            assert!(world.graph.reap().await.is_empty(), "{name}: reported already");
            assert!(world.graph.reports().is_empty(), "{name}: reported already");
        }
    });
}

#[test]
fn what_fails_while_nobody_waits_is_kept_until_asked_for() {
    run(|world| async move {
        world.plain("a");
        drop(world.open(&format!("{CHAIN},file.fail-close=on")).await);
        let _next = world.open("driver=file,filename=a").await; // reaps in passing
        let reports = world.graph.reports();
        assert_eq!(reports.len(), 1, "the clean ones are not kept: {reports:?}");
        assert_eq!(reports[0].name, "mid");
        assert!(reports[0].close_error.is_some() && reports[0].flush_error.is_none());
        assert!(world.graph.reports().is_empty());
    });
}

#[test]
fn closing_runs_to_its_end_when_the_caller_goes_away() {
    run(|world| async move {
        world.plain("a");
        for polls in 1.. {
            let top = world.open(&format!("{CHAIN},file.file.fail-flush=on")).await;
            world.shared.log();
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
            while world.shared.log.lock().unwrap().last().is_none_or(|line| line != "drop low") {
                bds_io::yield_now().await;
            }
            for _ in 0..8 {
                bds_io::yield_now().await; // lets the task deliver
            }
            let kept = world.graph.reports();
            assert_eq!(kept.len(), usize::from(!ended), "after {polls} polls, exactly one report");
            if ended {
                break;
            }
        }
    });
}

#[test]
fn release_says_last_once_and_reap_reports_in_order() {
    run(|world| async move {
        world.plain("a");
        let top = world.open(CHAIN).await;
        let second = top.clone();
        let id = top.id();
        let watch = world.graph.watch(id);
        assert_eq!(top.release(), Release::NotLast);
        assert!(!watch.has_fired());
        assert_eq!(second.release(), Release::Last);
        assert!(watch.has_fired());
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Dying);
        let names: Vec<String> =
            world.graph.reap().await.into_iter().map(|report| report.name).collect();
        assert_eq!(names, ["top", "mid", "low"]);
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
        world.graph.watch(id).await;
    });
}

#[test]
fn a_chain_of_twenty_thousand_nodes_is_closed_in_constant_stack() {
    // The stack that a test thread has would not hold a frame for each.
    run(|world| async move {
        world.plain("a");
        let mut top = world.open("driver=file,filename=a,node-name=n0").await;
        for level in 1..=20_000 {
            let options = Options::new()
                .with("driver", "pass")
                .with("node-name", format!("n{level}"))
                .with("file", top.name());
            top = world.graph.open(options).await.unwrap();
        }
        let report = top.close().await.unwrap();
        assert_eq!(report.below.len(), 20_000);
        assert_eq!(report.below.last().unwrap().name, "n0");
        assert_eq!(world.graph.dump(), "");
    });
}

#[test]
fn shutdown_closes_what_it_can_and_names_the_rest() {
    run(|world| async move {
        world.plain("a");
        world.sim.put_file("b", &[0; 512]);
        let kept = world.open("driver=file,node-name=kept,filename=b").await;
        drop(world.open(CHAIN).await);
        let report = world.graph.shutdown().await;
        assert_eq!(report.closed.len(), 3);
        assert_eq!(report.leaked.len(), 1);
        assert_eq!((&*report.leaked[0].name, report.leaked[0].count), ("kept", 1));
        assert_eq!(report.leaked[0].holders.len(), 1);
        let error = world.refusal("driver=file,filename=b").await;
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        drop(kept);
        let again = world.graph.shutdown().await;
        assert_eq!((again.closed.len(), again.leaked.len()), (1, 0));
    });
}

#[test]
fn the_end_of_a_graph_closes_what_is_dead() {
    run(|world| async move {
        world.plain("a");
        let shared = std::sync::Arc::clone(&world.shared);
        drop(world.open(CHAIN).await);
        drop(world);
        while shared.log.lock().unwrap().last().is_none_or(|line| line != "drop low") {
            bds_io::yield_now().await;
        }
        assert!(shared.log().contains(&"close low".to_owned()));
    });
}

#[test]
fn a_leak_says_where_in_the_program_the_node_was_opened() {
    run(|world| async move {
        world.plain("a");
        let options = crate::Options::parse("driver=file,node-name=n,filename=a").unwrap();
        let line = line!() + 1;
        let node = world.graph.open(options.clone()).await.unwrap();
        let report = world.graph.shutdown().await;
        let since = report.leaked[0].holders[0].since;
        assert_eq!((since.file(), since.line()), (file!(), line));
        let words = report.check_leaks().unwrap_err().to_string();
        assert!(words.contains(&format!("owner 'open' (since {}:{line}", file!())), "{words}");
        drop(node);
    });
}

#[test]
fn a_refused_deletion_says_where_the_others_took_hold() {
    run(|world| async move {
        world.plain("a");
        let options = crate::Options::parse("driver=file,node-name=n,filename=a").unwrap();
        let line = line!() + 1;
        let id = world.graph.add(options).await.unwrap();
        let since = world.graph.holders(id)[0].since;
        assert_eq!((since.file(), since.line()), (file!(), line));
        let user = world.graph.find("n").unwrap();
        let refused = world.graph.del("n").await.unwrap_err().to_string();
        assert!(
            refused.contains("user 'reference' (since") && refused.contains(file!()),
            "{refused}"
        );
        drop(user);
        world.graph.del("n").await.unwrap();
    });
}
