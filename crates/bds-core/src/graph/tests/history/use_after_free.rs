//! What was used after it had been freed. Ids go stale, edges own their target, and what a change needs it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bds_refcount::{Release, Stale};

use super::super::fakes::{read, root};
use super::scripted_graph::{Point, commit, names_below, options, run, run_schedules};
use crate::ErrorKind;
use crate::graph::{Access, walk};

/// Row 6 (6e57963a77). A node's pointer to its backing node was freed first and cleared later; attaching the next one polled in
/// between, and whoever ran then read the old pointer.
#[test]
fn uaf_backing_link_is_never_half_exchanged() {
    run_schedules(20, |world| async move {
        let top = world.part("top").await;
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
            // Each backing node lives by this one link.
            let name = ["one", "two"][round % 2];
            let next = world.part(name).await;
            world.graph.set_backing(&top, Some(&next)).await.unwrap();
            assert_eq!(next.release(), Release::NotLast);
            if round % 3 == 0 {
                world.graph.set_backing(&top, None).await.unwrap();
            }
            world.graph.reap().await;
        }
        stop.store(true, Ordering::Relaxed);
        assert!(looking.await > 0);
    });
}

/// Row 8 (19ebd13ed4). A commit job gave up the backends that kept its nodes alive and then went on with the bare pointers. Here
/// the job's edges are what it has of its nodes; that a name cannot outlive its reference is `compile_fail/borrowed_name.rs`.
#[test]
fn uaf_commit_completion_uses_nodes_it_holds() {
    run(|world| async move {
        let [top, base] = world.chain(["top", "base"]).await;
        let guest = root(&top, "guest", Access::ALL);
        let (top_id, base_id) = (top.id(), base.id());
        let job_top = world.graph.attach_job(&top, "commit0", Access::READ).unwrap();
        let job_base = world.graph.attach_job(&base, "commit0", Access::NONE).unwrap();
        drop((top, base));
        // Completion: the base takes the place of the top, then the job lets go.
        let (top, base) = (job_top.node(), job_base.node());
        world.graph.replace(&top, &base).await.unwrap();
        drop((job_top, job_base));
        assert_eq!((top.name(), base.name()), ("top", "base"), "still in hand");
        assert_eq!(top.release(), Release::Last);
        drop(base);
        world.graph.reap().await;
        assert_eq!(world.graph.acquire(top_id).unwrap_err(), Stale::Released);
        assert_eq!(guest.target().id(), base_id);
        read(&guest).await.unwrap();
    });
}

/// Row 9 (b1e1af394d). A stream looked its base up, and while it drained, a commit that ran beside it took the base out of the
/// chain. A reference alone would have kept the wrong base alive. Frozen links refuse the commit; who does not freeze
/// learns from the epoch that the graph has moved.
#[test]
fn uaf_stream_does_not_install_a_base_that_left_the_chain() {
    run(|world| async move {
        let [top, mid, base, _root] = world.chain(["top", "mid", "base", "root"]).await;
        let frozen = world.graph.freeze_chain(&top, &base, "job 'stream0'").unwrap();
        let below = walk::next_below(&base).unwrap();
        let error = world.graph.replace(&base, &below).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.to_string().contains("stream0"), "{error}");
        drop(frozen);

        let epoch = world.graph.epoch();
        let looked_up = walk::next_below(&mid).unwrap();
        world.graph.replace(&base, &below).await.unwrap();
        assert_ne!(world.graph.epoch(), epoch, "what was looked up must be looked up again");
        assert_eq!(looked_up.name(), "base", "and is alive meanwhile");
        let again = walk::next_below(&mid).unwrap();
        world.graph.set_backing(&top, Some(&again)).await.unwrap();
        assert_eq!(names_below(&top), ["top", "root"]);
    });
}

/// Row 10 (7a25fcd056). When a mirror job could not start, deleting it gave up the last reference to its filter, and the next two
/// lines used the filter.
#[test]
fn uaf_filter_of_a_mirror_that_does_not_start() {
    run(|world| async move {
        let source = world.part("source").await;
        let guest = root(&source, "guest", Access::ALL);
        let start = || async {
            let filter =
                world.graph.open(options("driver=sieve,node-name=filter,file=source")).await?;
            let insert = world.graph.change().insert_filter(&source, &filter).own(&filter);
            if let Err(error) = commit(insert).await {
                // The change gave up what it held; we still have ours.
                assert_eq!((filter.name(), filter.count()), ("filter", 1));
                return Err(error);
            }
            Ok(())
        };
        world.fail_every_step(start).await;
        assert_eq!(guest.target().name(), "filter");
        world.script.log();
        let filter = world.graph.find("filter").unwrap();
        commit(world.graph.change().drop_filter(&filter).remove(filter)).await.unwrap();
        assert_eq!(world.script.times("close filter"), 1);
    });
}

/// Row 11 (0df62f45c1). The function that dropped backup's filter freed it, and its caller went on using it. Here the reference is moved
/// into the change (`compile_fail/removed_filter.rs`), and ids of it are stale.
#[test]
fn uaf_filter_after_it_was_dropped() {
    run(|world| async move {
        let source = world.part("source").await;
        let guest = root(&source, "guest", Access::READ);
        let filter = world.sieve("filter", "source").await;
        world.graph.insert_filter(&source, &filter).await.unwrap();
        let id = filter.id();
        let report =
            commit(world.graph.change().drop_filter(&filter).remove(filter)).await.unwrap();
        assert_eq!((report.closed.len(), report.closed[0].node), (1, id));
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Released);
        assert_eq!(world.graph.count(id), 0);
        read(&guest).await.unwrap();
    });
}

/// Row 12 (f93c3add3a). Completing a mirror job failed half-way, then aborting ran the same function again on what the first run had freed.
/// A change is used up by its commit (the example at `Change::commit`), and after a failed one the job still has what it had, so that
/// aborting, or trying again, is an ordinary change.
#[test]
fn uaf_job_exit_after_a_failed_completion() {
    run(|world| async move {
        let source = world.part("source").await;
        let target = world.part("target").await;
        let guest = root(&source, "guest", Access::ALL);
        let before = world.picture();
        let job = world.graph.attach_job(&target, "mirror0", Access::ALL).unwrap();
        world.graph.0.faults.set(Some(2));
        let complete = world.graph.change().replace(&source, &job.node());
        assert_eq!(commit(complete).await.unwrap_err().kind(), ErrorKind::Io);
        assert!(world.graph.0.faults.has_struck());
        assert_eq!((guest.target().name(), job.node().name()), ("source", "target"));
        // Aborted.
        drop(job);
        assert_eq!(world.picture(), before);
        assert_eq!((source.count(), target.count()), (2, 1));
    });
}

/// Row 18 (bcfd86d6a6, 6d17e28798). A driver kept a copy of the pointer to its data file's edge; a reopen put another edge there, and
/// the driver went on with the freed one. Here a driver's door stays the same edge and leads elsewhere.
#[test]
fn uaf_driver_follows_its_child_through_a_reopen() {
    run(|world| async move {
        let old = world.part("old").await;
        let new = world.part("new").await;
        let image = world.part_on("image", "other=old").await;
        let guest = root(&image, "guest", Access::READ);
        world.script.log();
        read(&guest).await.unwrap();
        world.graph.reopen(&image, options("other=new")).await.unwrap();
        assert_eq!(old.release(), Release::Last);
        world.graph.reap().await;
        read(&guest).await.unwrap();
        let log = world.script.log();
        let reads: Vec<&String> = log.iter().filter(|line| line.starts_with("read")).collect();
        assert_eq!(reads, ["read image Child(other -> old)", "read image Child(other -> new)"]);
        assert_eq!(new.count(), 2);
    });
}

/// Row 21 (3d5d319e12). A job that was only paused finished while nodes were being reopened, and gave up nodes that waited in the
/// reopen's queue. Here the queue holds references. The job is whoever gives the node up while a driver prepares.
#[test]
fn uaf_reopen_holds_the_nodes_in_its_queue() {
    run_schedules(20, |world| async move {
        let top = world
            .open("driver=part,node-name=top,file.driver=part,file.node-name=low,file.file.driver=part")
            .await;
        let id = top.id();
        let job = Arc::new(std::sync::Mutex::new(Some(top.clone())));
        world.script.at("low", Point::Prepare, move || {
            let job = Arc::clone(&job);
            async move {
                bds_io::yield_now().await;
                drop(job.lock().unwrap().take());
                Ok(())
            }
        });
        let graph = world.graph.clone();
        let reopen = bds_io::spawn(async move {
            let change = graph.change().reopen(&top, options("cache.no-flush=on"));
            drop(top);
            change.commit().await
        });
        reopen.await.unwrap();
        assert_eq!(world.script.times("reopened top"), 1);
        assert_eq!(world.graph.acquire(id).unwrap_err(), Stale::Dying, "it lived until then");
        world.assert_empty().await;
    });
}

/// Row 25 (0267101af6). The thread that connects to a server was detached and freed while a coroutine still used it. Here: a driver's
/// helper outlives an open that was given up, at every moment. It owns what it uses; nothing else is left.
#[test]
fn uaf_helper_of_an_open_that_was_given_up() {
    run(|world| async move {
        let reached = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&reached);
        world.script.at("remote", Point::Open, move || {
            let told = Arc::clone(&told);
            async move {
                let connect = bds_io::spawn(async move {
                    for _ in 0..5 {
                        bds_io::yield_now().await;
                    }
                    told.store(true, Ordering::SeqCst);
                });
                connect.await;
                Ok(())
            }
        });
        for polls in 0.. {
            let text = "driver=part,node-name=remote,file.driver=part,file.node-name=below";
            let mut open = Box::pin(world.graph.open(options(text)));
            let mut is_open = false;
            for _ in 0..polls {
                if futures_util::poll!(&mut open).is_ready() {
                    is_open = true;
                    break;
                }
                bds_io::yield_now().await;
            }
            drop(open);
            world.idle().await;
            world.assert_empty().await;
            if is_open {
                break;
            }
        }
        assert!(reached.load(Ordering::SeqCst), "the helper came to its end");
    });
}

/// Row 27 (CVE-2017-9524). A client that failed its first handshake was taken off a list that it had never been on. Here what is
/// half built is on no list: an open that fails at any point leaves no name, no monitor entry and no child, and only drivers that had
/// opened are closed.
#[test]
fn uaf_half_built_nodes_are_on_no_list() {
    run(|world| async move {
        let text = "driver=part,node-name=a,file.driver=part,file.node-name=b,backing.driver=part,backing.node-name=c";
        for half in ["a", "b", "c"] {
            world.script.fail_at(half, Point::Open);
            world.script.log();
            assert_eq!(world.graph.add(options(text)).await.unwrap_err().kind(), ErrorKind::Io);
            assert_eq!(world.graph.top_level().count(), 0);
            assert_eq!(world.script.times(&format!("close {half}")), 0, "it was never open");
            let log = world.script.log();
            let count = |word: &str| log.iter().filter(|line| line.starts_with(word)).count();
            assert_eq!(count("open"), count("close"), "{log:?}");
            world.assert_empty().await;
            world.script.forget(half, Point::Open);
        }
        let id = world.graph.add(options(text)).await.unwrap();
        assert!(world.graph.is_owned(id));
    });
}

/// Row 28 (998cbd6a44, 8961be33e8, 57b6bdf37c). Opening took its options over even when it failed, error paths forgot that, and they were
/// freed twice. Here they are moved (`compile_fail/options_used_again.rs`); failing at any point leaves the same.
#[test]
fn uaf_options_of_an_open_that_fails() {
    run(|world| async move {
        let base = world.part("base").await;
        let given = options("driver=part,node-name=top,backing=base");
        for bad in ["backing=nobody", "read-only=perhaps", "colour=red", "driver=nothing"] {
            let mut wrong = options(&format!("node-name=top,{bad}"));
            if !bad.starts_with("driver") {
                wrong = wrong.with("driver", "part");
            }
            let error = world.graph.open(wrong).await.unwrap_err();
            assert!([ErrorKind::NotFound, ErrorKind::InvalidInput].contains(&error.kind()));
            assert_eq!(base.count(), 1, "{bad}");
        }
        // The caller's copy is his own.
        world.graph.open(given.clone()).await.unwrap();
        world.graph.reap().await;
        let top = world.graph.open(given).await.unwrap();
        assert_eq!(names_below(&top), ["top", "base"]);
    });
}
