//! Uses after free in QEMU. Here ids go stale, edges own their target, and a change holds what it
//! needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_refcount::{Release, Stale};

use super::scripted_graph::{commit, names_below, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, walk};
use crate::test_kit::gate_port::{read, root};
use crate::test_kit::scripted::Point;

/// Row 6 (6e57963a77). A node's pointer to its backing node was freed first and cleared later;
/// attaching the next one polled in between, and a coroutine read the old pointer.
#[test]
fn uaf_backing_link_is_never_half_exchanged() {
    run_schedules(20, |test| async move {
        let top = test.part("top").await;
        let stop = Arc::new(AtomicBool::new(false));
        let look = |top: crate::graph::NodeRef, stop: Arc<AtomicBool>| async move {
            let mut seen = 0;
            while !stop.load(Ordering::Relaxed) {
                if let Some(below) = walk::next_below(&top) {
                    assert!(["one", "two"].contains(&below.name()) && below.len() == 512);
                    seen += 1;
                }
                bds_io::yield_now().await;
            }
            seen
        };
        let looking = bds_io::spawn(look(top.clone(), Arc::clone(&stop)));
        for round in 0..10 {
            // Each backing node is held by this one link.
            let name = ["one", "two"][round % 2];
            let next = test.part(name).await;
            test.graph.set_backing(&top, Some(&next)).await.unwrap();
            assert_eq!(next.release(), Release::NotLast);
            if round % 3 == 0 {
                test.graph.set_backing(&top, None).await.unwrap();
            }
            test.graph.reap().await;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(looking.await > 0);
    });
}

/// Row 8 (19ebd13ed4). A commit job released the backends that kept its nodes alive and then used
/// the bare pointers. Here the job's edges are its only access to its nodes; a name cannot outlive
/// its reference (`compile_fail/borrowed_name.rs`).
#[test]
fn uaf_commit_completion_uses_nodes_it_holds() {
    run(|test| async move {
        let [top, base] = test.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::ALL);
        let (top_id, base_id) = (top.id(), base.id());
        let job_top = test.graph.attach_job(&top, "commit0", Access::READ).unwrap();
        let job_base = test.graph.attach_job(&base, "commit0", Access::NONE).unwrap();
        drop((top, base));
        // Completion: the base replaces the top, then the job ends.
        let (top, base) = (job_top.node(), job_base.node());
        test.graph.replace(&top, &base).await.unwrap();
        drop((job_top, job_base));
        assert_eq!((top.name(), base.name()), ("top", "base"), "still held here");
        assert_eq!(top.release(), Release::Last);
        drop(base);
        test.graph.reap().await;
        assert_eq!(test.graph.acquire(top_id).unwrap_err(), Stale::Released);
        assert_eq!(guest.target().id(), base_id);
        read(&guest).await.unwrap();
    });
}

/// Row 9 (b1e1af394d). A stream looked up its base, and while it drained, a concurrent commit
/// removed the base from the chain. A reference alone would have kept the wrong base alive. Frozen
/// links refuse the commit; without freezing, the epoch shows that the graph has changed.
#[test]
fn uaf_stream_does_not_install_a_base_that_left_the_chain() {
    run(|test| async move {
        let [top, mid, base, _root] = test.chain(["top", "mid", "base", "root"]).await;
        let frozen = test.graph.freeze_chain(&top, &base, "job 'stream0'").unwrap();
        let below = walk::next_below(&base).unwrap();
        let error = test.graph.replace(&base, &below).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains("stream0"), "{error}");
        drop(frozen);

        let epoch = test.graph.epoch();
        let looked_up = walk::next_below(&mid).unwrap();
        test.graph.replace(&base, &below).await.unwrap();
        assert_ne!(test.graph.epoch(), epoch, "what was looked up must be looked up again");
        assert_eq!(looked_up.name(), "base", "and is alive meanwhile");
        let again = walk::next_below(&mid).unwrap();
        test.graph.set_backing(&top, Some(&again)).await.unwrap();
        assert_eq!(names_below(&top), ["top", "root"]);
    });
}

/// Row 10 (7a25fcd056). When a mirror job could not start, deleting it released the last reference
/// to its filter, and the next two lines used the filter.
#[test]
fn uaf_filter_of_a_mirror_that_does_not_start() {
    run(|test| async move {
        let source = test.part("source").await;
        let guest = root(&source, "guest", Access::ALL);
        let start = || async {
            let filter =
                test.graph.open(options("driver=sieve,node-name=filter,file=source")).await?;
            let insert = test.graph.change().insert_filter(&source, &filter).own(&filter);
            if let Err(error) = commit(insert).await {
                // The change released its references; ours remains.
                assert_eq!((filter.name(), filter.count()), ("filter", 1));
                return Err(error);
            }
            Ok(())
        };
        test.fail_every_step(start).await;
        assert_eq!(guest.target().name(), "filter");
        test.script.log();
        let filter = test.graph.find("filter").unwrap();
        commit(test.graph.change().drop_filter(&filter).remove(filter)).await.unwrap();
        assert_eq!(test.script.times("close filter"), 1);
    });
}

/// Row 11 (0df62f45c1). The function that dropped backup's filter freed it, and its caller went on
/// using it. Here the reference is moved into the change (`compile_fail/removed_filter.rs`), and
/// ids of it are stale.
#[test]
fn uaf_filter_after_it_was_dropped() {
    run(|test| async move {
        let source = test.part("source").await;
        let guest = root(&source, "guest", Access::READ);
        let filter = test.sieve("filter", "source").await;
        test.graph.insert_filter(&source, &filter).await.unwrap();
        let id = filter.id();
        let report = commit(test.graph.change().drop_filter(&filter).remove(filter)).await.unwrap();
        assert_eq!((report.closed.len(), report.closed[0].node), (1, id));
        assert_eq!(test.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(test.graph.count(id), 0);
        read(&guest).await.unwrap();
    });
}

/// Row 12 (f93c3add3a). Completing a mirror job failed half-way; aborting then ran the same
/// function on what the first run had freed. Here a commit consumes the change (the example at
/// `Change::commit`), and after a failed one the job still has what it had, so that aborting or
/// retrying is an ordinary change.
#[test]
fn uaf_job_exit_after_a_failed_completion() {
    run(|test| async move {
        let source = test.part("source").await;
        let target = test.part("target").await;
        let guest = root(&source, "guest", Access::ALL);
        let before = test.snapshot();
        let job = test.graph.attach_job(&target, "mirror0", Access::ALL).unwrap();
        test.graph.0.faults.set(Some(2));
        let complete = test.graph.change().replace(&source, &job.node());
        assert_eq!(commit(complete).await.unwrap_err().kind(), ErrorKind::Io);
        assert!(test.graph.0.faults.has_struck());
        assert_eq!((guest.target().name(), job.node().name()), ("source", "target"));
        // Aborted.
        drop(job);
        assert_eq!(test.snapshot(), before);
        assert_eq!((source.count(), target.count()), (2, 1));
    });
}

/// Row 18 (bcfd86d6a6, 6d17e28798). A driver kept a copy of the pointer to its data file's edge; a
/// reopen installed another edge, and the driver used the freed one. Here a driver's child handle
/// stays and leads to the new node.
#[test]
fn uaf_driver_follows_its_child_through_a_reopen() {
    run(|test| async move {
        let old = test.part("old").await;
        let new = test.part("new").await;
        let image = test.part_on("image", "other=old").await;
        let guest = root(&image, "guest", Access::READ);
        test.script.log();
        read(&guest).await.unwrap();
        test.graph.reopen(&image, options("other=new")).await.unwrap();
        assert_eq!(old.release(), Release::Last);
        test.graph.reap().await;
        read(&guest).await.unwrap();
        let log = test.script.log();
        let reads: Vec<&String> = log.iter().filter(|line| line.starts_with("read")).collect();
        assert_eq!(reads, ["read image Child(other -> old)", "read image Child(other -> new)"]);
        assert_eq!(new.count(), 2);
    });
}

/// Row 21 (3d5d319e12). A job that was only paused finished while nodes were being reopened, and
/// released nodes in the reopen's queue. Here the queue holds references. The hook that releases
/// the node while a driver prepares stands for the job.
#[test]
fn uaf_reopen_holds_the_nodes_in_its_queue() {
    run_schedules(20, |test| async move {
        let top = test
            .open("driver=part,node-name=top,file.driver=part,file.node-name=low,file.file.driver=part")
            .await;
        let id = top.id();
        let job = Arc::new(std::sync::Mutex::new(Some(top.clone())));
        test.script.at("low", Point::Prepare, move || {
            let job = Arc::clone(&job);
            async move {
                bds_io::yield_now().await;
                drop(job.lock().unwrap().take());
                Ok(())
            }
        });
        let graph = test.graph.clone();
        let reopen = bds_io::spawn(async move {
            let change = graph.change().reopen(&top, options("cache.no-flush=on"));
            drop(top);
            change.commit().await
        });
        reopen.await.unwrap();
        assert_eq!(test.script.times("reopened top"), 1);
        assert_eq!(
            test.graph.acquire(id).unwrap_err(),
            Stale::Dying,
            "it lived until the reopen was done"
        );
        test.assert_empty().await;
    });
}

/// Row 25 (0267101af6). The thread that connects to a server was detached and freed while a
/// coroutine still used it. Here a driver's helper task outlives an open dropped at any await; it
/// owns what it uses, and nothing else remains.
#[test]
fn uaf_helper_of_a_dropped_open() {
    run(|test| async move {
        let reached = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&reached);
        test.script.at("remote", Point::Open, move || {
            let flag = Arc::clone(&flag);
            async move {
                let connect = bds_io::spawn(async move {
                    for _ in 0..5 {
                        bds_io::yield_now().await;
                    }
                    flag.store(true, Ordering::SeqCst);
                });
                connect.await;
                Ok(())
            }
        });
        for polls in 0.. {
            let text = "driver=part,node-name=remote,file.driver=part,file.node-name=below";
            let mut open = Box::pin(test.graph.open(options(text)));
            let mut is_open = false;
            for _ in 0..polls {
                if futures_util::poll!(&mut open).is_ready() {
                    is_open = true;
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(open);
            test.idle().await;
            test.assert_empty().await;
            if is_open {
                break;
            }
        }
        assert!(reached.load(Ordering::SeqCst), "the helper completed");
    });
}

/// Row 27 (CVE-2017-9524). A client that failed its first handshake was removed from a list it had
/// never been on. Here an open that fails at any point leaves no name, no monitor entry and no
/// child, and only opened drivers are closed.
#[test]
fn uaf_half_built_nodes_are_on_no_list() {
    run(|test| async move {
        let text = "driver=part,node-name=a,file.driver=part,file.node-name=b,backing.driver=part,backing.node-name=c";
        for half in ["a", "b", "c"] {
            test.script.fail_at(half, Point::Open);
            test.script.log();
            assert_eq!(test.graph.add(options(text)).await.unwrap_err().kind(), ErrorKind::Io);
            assert_eq!(test.graph.top_level().count(), 0);
            assert_eq!(test.script.times(&format!("close {half}")), 0, "it was never open");
            let log = test.script.log();
            let count = |word: &str| log.iter().filter(|line| line.starts_with(word)).count();
            assert_eq!(count("open"), count("close"), "{log:?}");
            test.assert_empty().await;
            test.script.clear(half, Point::Open);
        }
        let id = test.graph.add(options(text)).await.unwrap();
        assert!(test.graph.is_owned(id));
    });
}

/// Row 28 (998cbd6a44, 8961be33e8, 57b6bdf37c). Opening took over its options even when it failed;
/// error paths freed them again. Here they are moved (`compile_fail/options_used_again.rs`); a
/// failure at any point leaves the same state.
#[test]
fn uaf_options_of_an_open_that_fails() {
    run(|test| async move {
        let base = test.part("base").await;
        let given = options("driver=part,node-name=top,backing=base");
        for bad in ["backing=missing", "read-only=perhaps", "colour=red", "driver=nothing"] {
            let mut wrong = options(&format!("node-name=top,{bad}"));
            if !bad.starts_with("driver") {
                wrong = wrong.with("driver", "part");
            }
            let error = test.graph.open(wrong).await.unwrap_err();
            assert!([ErrorKind::NotFound, ErrorKind::InvalidInput].contains(&error.kind()));
            assert_eq!(base.count(), 1, "{bad}");
        }
        // The caller's copy is independent.
        test.graph.open(given.clone()).await.unwrap();
        test.graph.reap().await;
        let top = test.graph.open(given).await.unwrap();
        assert_eq!(names_below(&top), ["top", "base"]);
    });
}
