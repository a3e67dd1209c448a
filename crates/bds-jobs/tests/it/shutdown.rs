//! The graph's shutdown ends all jobs, in whatever state they are.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bds_core::{ErrorKind, Options};
use bds_jobs::{JobDriver, JobManager, JobOptions, JobStatus};
use bds_testkit::Chance;
use futures_util::future::{Either, select};

use crate::fake::{Fake, calm, endless, manager, manual, mirror, nothing, part, settle};

#[test]
fn shutdown_in_every_state() {
    for wait_ms in 0..30 {
        let sim = calm(wait_ms);
        let jobs = manager(&sim);
        sim.block_on(async {
            let lives = part(|ctx| {
                Box::pin(async {
                    bds_io::sleep(Duration::from_millis(5)).await;
                    ctx.pause_point().await;
                    ctx.ready().await;
                    bds_io::sleep(Duration::from_millis(5)).await;
                    Ok(())
                })
            });
            let slow = || {
                part(|_| {
                    Box::pin(async {
                        bds_io::sleep(Duration::from_millis(5)).await;
                        Ok(())
                    })
                })
            };
            let fake = Fake { plan: slow(), retire: slow(), ..Fake::running(lives) };
            let mut handles = vec![jobs.start(manual("a"), Box::new(fake)).await.unwrap()];
            for (id, run) in [("b", endless()), ("c", mirror()), ("d", nothing())] {
                let fake = Fake { is_mirror: id == "c", ..Fake::running(run) };
                handles.push(jobs.start(manual(id), Box::new(fake)).await.unwrap());
            }
            handles[1].pause().unwrap();
            if wait_ms > 15 {
                bds_io::sleep(Duration::from_millis(15)).await;
                handles[0].finalize().unwrap();
                bds_io::sleep(Duration::from_millis(wait_ms - 15)).await;
            } else {
                bds_io::sleep(Duration::from_millis(wait_ms)).await;
            }
            let report = jobs.graph().shutdown().await;
            assert!(report.failed.is_empty(), "{report:?}");
            for handle in &handles {
                assert_eq!(handle.status(), JobStatus::Null);
                let result = handle.wait().await;
                let was_late = handle.id() == "a" && wait_ms > 19;
                assert!(was_late || result.is_err());
            }
            assert!(jobs.query().is_empty());
            assert_eq!(jobs.history().records.len(), 4);
            let late = jobs.start(JobOptions::new("e"), Box::new(Fake::new())).await.unwrap_err();
            assert_eq!(late.kind(), ErrorKind::Cancelled);
        });
    }
}

#[test]
fn what_could_not_be_given_back_is_in_the_report() {
    let sim = calm(1);
    let jobs = manager(&sim);
    sim.block_on(async {
        let fake = Fake { retire: crate::fake::fails("left over"), ..Fake::running(endless()) };
        let job: Box<dyn JobDriver> = Box::new(fake);
        jobs.start(JobOptions::new("j"), job).await.unwrap();
        settle().await;
        let report = jobs.graph().shutdown().await;
        assert_eq!(report.failed.len(), 1);
        assert_eq!(report.failed[0].0, "block jobs");
        assert!(report.failed[0].1.to_string().contains("left over"));
    });
}

fn parsed(text: &str) -> Options {
    Options::parse(text).expect("well-formed")
}

/// What a client of the graph does until `stop` is set; refusals are part of it.
async fn change_things(jobs: JobManager, number: u64, mut chance: Chance, stop: Arc<AtomicBool>) {
    let graph = jobs.graph().clone();
    for round in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let node = graph.find(&format!("n{}", chance.below(3)));
        let result = match (chance.below(9), node) {
            (0, _) => {
                let text = format!("driver=mem,node-name=x{number}-{round},size=64k");
                graph.open(parsed(&text)).await.map(drop)
            }
            (1 | 2, Ok(node)) => {
                drop(graph.drain(&node).await);
                Ok(())
            }
            (3, _) => {
                drop(graph.drain_all().await);
                Ok(())
            }
            (4 | 5, Ok(node)) => {
                let id = format!("j{number}-{round}");
                let on = format!("driver=throttle,limits.iops-total=1G,file={}", node.name());
                match graph.open(parsed(&on)).await {
                    Ok(filter) => {
                        let inserted = graph.insert_filter(&node, &filter).await;
                        let job = Box::new(Fake::running(endless()));
                        let _refused = jobs.start(JobOptions::new(id), job).await;
                        inserted.and(graph.drop_filter(&filter).await)
                    }
                    Err(error) => Err(error),
                }
            }
            (6, Ok(node)) => graph.change().rename(&node, node.name()).commit().await.map(drop),
            (7, _) => {
                let _closed = graph.reap().await;
                Ok(())
            }
            _ => {
                assert!(graph.nodes().len() < 1000);
                Ok(())
            }
        };
        let _refused = result;
        bds_io::sleep(Duration::from_micros(chance.below(40))).await;
    }
}

/// Holders of the graph's lock come, wait and leave beside a shutdown, at every order that the
/// scheduler finds: no wake-up is lost, so it ends. Sixty seeds by default, `BDS_TEST_BUDGET=full`
/// five thousand.
#[test]
fn a_shutdown_beside_changes_drains_and_jobs_ends() {
    for seed in crate::budget::seeds(60, 5000) {
        let sim = calm(seed);
        let jobs = manager(&sim);
        sim.block_on(async {
            let mut chance = Chance::new(seed);
            for n in 0..3 {
                let text = format!("driver=mem,node-name=n{n},size=64k");
                let node = jobs.graph().open(Options::parse(&text).unwrap()).await.unwrap();
                jobs.graph().change().own(&node).commit().await.unwrap();
            }
            let stop = Arc::<AtomicBool>::default();
            let clients: Vec<_> = (0..4)
                .map(|number| {
                    let chance = Chance::new(chance.draw());
                    bds_io::spawn(change_things(jobs.clone(), number, chance, Arc::clone(&stop)))
                })
                .collect();
            bds_io::sleep(Duration::from_micros(chance.below(400))).await;
            let ends = pin!(jobs.graph().shutdown());
            let limit = pin!(bds_io::sleep(Duration::from_secs(60)));
            if let Either::Right(_) = select(ends, limit).await {
                panic!("seed {seed}: the shutdown hangs\n{}", jobs.graph().dump());
            }
            stop.store(true, Ordering::SeqCst);
            for client in clients {
                client.await;
            }
            jobs.graph().shutdown().await.check_leaks().unwrap();
            assert!(jobs.query().is_empty(), "seed {seed}");
        });
    }
}
