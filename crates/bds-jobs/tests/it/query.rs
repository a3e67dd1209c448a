//! What queries show, and what a slow reader of events learns.

use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};

use bds_core::graph::{Graph, GraphConfig};
use bds_jobs::{JobEvent, JobInfo, JobManager, JobOptions, JobStatus, JobType, QUEUE_LEN};
use serde_json::json;

use crate::fake::{Fake, endless, fails, mirror, part, run, settle};

#[test]
fn jobs_are_shown_newest_first_with_qemus_keys() {
    run(|jobs| async move {
        let work = part(|ctx| {
            Box::pin(async {
                ctx.progress().set_remaining(100);
                ctx.progress().advance(30);
                ctx.set_actively_synced(true);
                ctx.ready().await;
                std::future::pending().await
            })
        });
        let fake = Fake { job_type: JobType::Mirror, ..Fake::running(work) };
        let options = JobOptions { speed: 7, auto_finalize: false, ..JobOptions::new("m") };
        jobs.start(options, Box::new(fake)).await.unwrap();
        let options = JobOptions { auto_dismiss: false, ..JobOptions::new("b") };
        jobs.start(options, Box::new(Fake::running(fails("broken")))).await.unwrap();
        settle().await;
        let queried = jobs.query();
        assert_eq!(
            queried.iter().map(JobInfo::to_query_jobs).collect::<Vec<_>>(),
            [
                json!({
                    "id": "b", "type": "backup", "status": "concluded",
                    "current-progress": 0, "total-progress": 0, "error": "broken",
                }),
                json!({
                    "id": "m", "type": "mirror", "status": "ready",
                    "current-progress": 30, "total-progress": 100,
                }),
            ]
        );
        assert_eq!(
            queried[1].to_query_block_jobs().unwrap().to_string(),
            json!({
                "type": "mirror", "device": "m", "len": 100, "offset": 30, "busy": true,
                "paused": false, "speed": 7, "io-status": "ok", "ready": true, "status": "ready",
                "auto-finalize": false, "auto-dismiss": true, "actively-synced": true,
            })
            .to_string()
        );
        let copy: JobInfo =
            serde_json::from_value(serde_json::to_value(&queried[1]).unwrap()).unwrap();
        assert_eq!(copy, queried[1]);
        jobs.cancel("m", true).unwrap();
        jobs.dismiss("b").unwrap();
    });
}

#[test]
fn final_events_have_the_fields_of_the_job() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let fake = Fake { job_type: JobType::Mirror, is_mirror: true, ..Fake::running(mirror()) };
        let options = JobOptions { speed: 9, auto_finalize: false, ..JobOptions::new("m") };
        let job = jobs.start(options, Box::new(fake)).await.unwrap();
        job.wait_status(JobStatus::Ready).await.unwrap();
        job.complete().unwrap();
        job.wait_status(JobStatus::Pending).await.unwrap();
        job.finalize().unwrap();
        job.wait().await.unwrap();
        let point = r#""type":"mirror","device":"m","len":0,"offset":0,"speed":9"#;
        let lines: Vec<String> = std::iter::from_fn(|| events.try_next())
            .filter(|event| event.name() != "JOB_STATUS_CHANGE")
            .map(|event| event.to_json().to_string())
            .collect();
        assert_eq!(
            lines,
            [
                format!(r#"{{"event":"BLOCK_JOB_READY","data":{{{point}}}}}"#),
                r#"{"event":"BLOCK_JOB_PENDING","data":{"type":"mirror","id":"m"}}"#.to_owned(),
                format!(r#"{{"event":"BLOCK_JOB_COMPLETED","data":{{{point}}}}}"#),
            ]
        );
    });
}

#[test]
fn a_slow_reader_learns_how_many_events_it_lost() {
    run(|jobs| async move {
        let mut events = jobs.events();
        for _ in 0..QUEUE_LEN / 7 + 1 {
            jobs.start(JobOptions::new("j"), Box::new(Fake::new())).await.unwrap();
            settle().await;
        }
        let lost = events.try_next();
        assert!(matches!(lost, Some(JobEvent::EventsLost { count: 1..=7 })), "{lost:?}");
    });
}

/// Runs a future on this thread without bds's executor.
fn foreign_block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        thread::park();
    }
}

#[test]
fn jobs_run_under_foreign_executors_and_on_many_threads() {
    let graph = Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())));
    let jobs = JobManager::new(&graph);
    thread::scope(|scope| {
        for n in 0..4 {
            let jobs = &jobs;
            scope.spawn(move || {
                for round in 0..50 {
                    let id = format!("j{n}");
                    let work = if round % 2 == 0 { Fake::new() } else { Fake::running(endless()) };
                    let start = jobs.start(JobOptions::new(id), Box::new(work));
                    let job = foreign_block_on(start).expect("the id is free again");
                    if round % 2 == 1 {
                        job.pause().expect("it works");
                        job.cancel(true).expect("it works");
                    }
                    assert_eq!(foreign_block_on(job.wait()).is_ok(), round % 2 == 0);
                }
            });
        }
    });
    foreign_block_on(graph.shutdown()).check_leaks().expect("no leak");
}
