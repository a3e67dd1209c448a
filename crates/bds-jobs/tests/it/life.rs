//! The life of one job: its states, its events, and what is called when.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bds_core::ErrorKind;
use bds_jobs::{JobOptions, JobStatus, JobType};

use crate::fake::{Fake, endless, fails, manual, mirror, part, run, settle, trace};

/// The last words of each line: a trace of one job without its id.
fn words(lines: Vec<String>) -> String {
    let words = lines.iter().map(|line| line.split_once(' ').map_or("", |(_, word)| word));
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn success() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake::new();
        let log = fake.log.clone();
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        job.wait().await.unwrap();
        settle().await;
        let expected = "created running waiting pending COMPLETED concluded null";
        assert_eq!(words(trace(&mut events)), expected);
        assert_eq!(*log.lock().unwrap(), ["plan j", "retire j: committed"]);
        assert!(jobs.query().is_empty());
        assert!(jobs.history().last("j").is_some());
        job.wait().await.expect("the result outlives the job");
    });
}

#[test]
fn failure_of_the_work() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake::running(fails("broken"));
        let log = fake.log.clone();
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        assert_eq!(job.wait().await.unwrap_err().to_string(), "broken");
        settle().await;
        let expected = "created running aborting COMPLETED: broken concluded null";
        assert_eq!(words(trace(&mut events)), expected);
        assert_eq!(*log.lock().unwrap(), ["retire j: broken"]);
    });
}

#[test]
fn failure_of_the_plan_and_of_the_retirement() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake { plan: fails("no plan"), retire: fails("left over"), ..Fake::new() };
        let job = jobs.start(manual("j"), Box::new(fake)).await.unwrap();
        job.wait_status(JobStatus::Pending).await.unwrap();
        job.finalize().unwrap();
        assert_eq!(job.wait().await.unwrap_err().to_string(), "no plan");
        let expected =
            "created running waiting pending PENDING aborting COMPLETED: no plan concluded";
        assert_eq!(words(trace(&mut events)), expected);
        assert_eq!(job.info().cleanup_error.as_deref(), Some("left over"));
        jobs.dismiss("j").unwrap();
        assert_eq!(jobs.history().last("j").unwrap().cleanup_error.as_deref(), Some("left over"));

        let fake = Fake { retire: fails("left over"), ..Fake::new() };
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        job.wait().await.expect("its effect stays");
        assert_eq!(job.info().cleanup_error.as_deref(), Some("left over"));
    });
}

#[test]
fn panics_of_its_code_are_failures() {
    run(|jobs| async move {
        let panic = || part(|_| Box::pin(async { panic!("oops {}", 1) }));
        for fake in [Fake::running(panic()), Fake { plan: panic(), ..Fake::new() }] {
            let log = fake.log.clone();
            let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
            let error = job.wait().await.unwrap_err().to_string();
            assert_eq!(error, "the job's code panicked: oops 1");
            assert!(log.lock().unwrap().last().unwrap().starts_with("retire j: the job's code"));
        }
        let fake = Fake { retire: panic(), ..Fake::new() };
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        job.wait().await.unwrap();
        assert!(job.info().cleanup_error.unwrap().contains("oops"));
    });
}

#[test]
fn manual_finalize_and_dismiss() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let job = jobs.start(manual("j"), Box::new(Fake::new())).await.unwrap();
        settle().await;
        assert_eq!(words(trace(&mut events)), "created running waiting pending PENDING");
        jobs.finalize("j").unwrap();
        job.wait().await.unwrap();
        assert_eq!(words(trace(&mut events)), "COMPLETED concluded");
        let taken = jobs.start(JobOptions::new("j"), Box::new(Fake::new())).await.unwrap_err();
        assert_eq!(taken.to_string(), "Job ID 'j' already in use");
        jobs.dismiss("j").unwrap();
        assert_eq!(words(trace(&mut events)), "null");
        assert_eq!(jobs.dismiss("j").unwrap_err().to_string(), "Job not found");
    });
}

#[test]
fn a_mirror_is_ready_and_completes() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake { job_type: JobType::Mirror, is_mirror: true, ..Fake::running(mirror()) };
        let job = jobs.start(JobOptions::new("m"), Box::new(fake)).await.unwrap();
        job.wait_status(JobStatus::Ready).await.unwrap();
        assert_eq!(words(trace(&mut events)), "created running ready READY");
        job.pause().unwrap();
        settle().await;
        job.complete().expect("accepted in standby");
        settle().await;
        assert_eq!(words(trace(&mut events)), "standby", "nothing happens until it is resumed");
        job.resume().unwrap();
        job.wait().await.unwrap();
        settle().await;
        let expected = "ready waiting pending COMPLETED concluded null";
        assert_eq!(words(trace(&mut events)), expected);
    });
}

#[test]
fn cancels_in_every_state() {
    // The state in which it is cancelled, force, and the events from there on.
    let table = [
        ("created", true, "aborting concluded null"),
        ("running", true, "aborting CANCELLED concluded null"),
        ("running", false, "aborting CANCELLED concluded null"),
        ("paused", true, "running aborting CANCELLED concluded null"),
        ("ready", true, "aborting CANCELLED concluded null"),
        ("ready", false, "waiting pending PENDING"),
        ("standby", true, "ready aborting CANCELLED concluded null"),
        ("pending", true, "aborting CANCELLED concluded null"),
    ];
    for (status, is_forced, expected) in table {
        run(move |jobs| async move {
            let mut events = jobs.events();
            let is_ready = ["ready", "standby"].contains(&status);
            let run = match status {
                "pending" => crate::fake::nothing(),
                _ if is_ready => mirror(),
                _ => endless(),
            };
            let fake = Fake { is_mirror: is_ready, ..Fake::running(run) };
            let log = fake.log.clone();
            let options = JobOptions { auto_finalize: false, ..JobOptions::new("j") };
            let job = jobs.start(options, Box::new(fake)).await.unwrap();
            if status != "created" {
                settle().await;
            }
            if ["paused", "standby"].contains(&status) {
                job.pause().unwrap();
                settle().await;
            }
            assert_eq!(job.status().as_str(), status);
            trace(&mut events);
            job.cancel(is_forced).unwrap();
            settle().await;
            assert_eq!(words(trace(&mut events)), expected, "{status}, forced {is_forced}");
            if job.status() == JobStatus::Pending {
                job.finalize().unwrap();
                job.wait().await.expect("a cancel without force of a ready job is a success");
                return;
            }
            let error = job.wait().await.unwrap_err();
            assert_eq!(
                (error.kind(), error.to_string().as_str()),
                (ErrorKind::Cancelled, "Operation canceled",)
            );
            assert_eq!(*log.lock().unwrap(), ["retire j: Operation canceled"]);
        });
    }
}

#[test]
fn a_forced_cancel_drops_the_work_at_its_await() {
    struct OnDrop(Arc<AtomicU32>);
    impl Drop for OnDrop {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    run(|jobs| async move {
        let dropped = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&dropped);
        let hangs = part(move |_| {
            let guard = OnDrop(Arc::clone(&count));
            Box::pin(async move {
                let _guard = guard;
                std::future::pending::<()>().await;
                Ok(())
            })
        });
        let job = jobs.start(JobOptions::new("j"), Box::new(Fake::running(hangs))).await.unwrap();
        settle().await;
        let begun = bds_io::now();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        assert!(bds_io::now() - begun < Duration::from_millis(1));
    });
}

#[test]
fn a_hanging_plan_can_be_cancelled() {
    run(|jobs| async move {
        let hangs = part(|_| Box::pin(std::future::pending()));
        let fake = Fake { plan: hangs, ..Fake::new() };
        let log = fake.log.clone();
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        settle().await;
        assert_eq!(job.status(), JobStatus::Pending);
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert_eq!(*log.lock().unwrap(), ["plan j", "retire j: Operation canceled"]);
    });
}

#[test]
fn jobs_without_nodes_have_no_events_of_block_jobs() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake { job_type: JobType::Create, ..Fake::new() };
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("c") };
        jobs.start(options, Box::new(fake)).await.unwrap().wait().await.unwrap();
        assert_eq!(words(trace(&mut events)), "created running waiting pending concluded");
        assert_eq!(jobs.block_job("c").unwrap_err().to_string(), "Block job 'c' not found");
        jobs.dismiss("c").unwrap();
    });
}

#[test]
fn an_id_that_is_refused_leaves_nothing() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake::new();
        let log = fake.log.clone();
        let error = jobs.start(JobOptions::new("0"), Box::new(fake)).await.unwrap_err();
        assert_eq!(error.to_string(), "Invalid job ID '0'");
        assert_eq!(*log.lock().unwrap(), ["retire 0: Invalid job ID '0'"]);
        assert!(trace(&mut events).is_empty() && jobs.query().is_empty());
    });
}

#[test]
fn the_history_keeps_the_last_records_and_counts_the_others() {
    run(|jobs| async move {
        for number in 0..bds_jobs::HISTORY_LEN + 3 {
            let options = JobOptions::new(format!("j{number}"));
            jobs.start(options, Box::new(Fake::new())).await.unwrap().wait().await.unwrap();
        }
        settle().await;
        let history = jobs.history();
        assert_eq!((history.records.len(), history.dropped), (bds_jobs::HISTORY_LEN, 3));
        assert_eq!(history.records[0].id, "j3");
        assert!(history.last("j2").is_none());
    });
}
