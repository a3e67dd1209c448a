//! The graph's shutdown ends all jobs, in whatever state they are.

use std::time::Duration;

use bds_core::ErrorKind;
use bds_jobs::{JobDriver, JobOptions, JobStatus};

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
