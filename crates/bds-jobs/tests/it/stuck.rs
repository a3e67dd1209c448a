//! Requests that never end, and callers that lose interest: a job ends all the same.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bds_core::driver::{BoxFuture, WriteFlags};
use bds_core::graph::{Access, Change, NodeId, NodeRef};
use bds_core::request::{Backend, BackendOptions};
use bds_core::{ErrorKind, Options, Result};
use bds_jobs::{JobContext, JobDriver, JobManager, JobOptions, JobStatus, JobType, Outcome};

use crate::fake::{Fake, Part, calm, endless, manager, nothing, part, run, settle};

async fn open(jobs: &JobManager, options: &str) -> NodeRef {
    jobs.graph().open(Options::parse(options).expect("right")).await.expect("it can be opened")
}

/// A disk whose requests take half an hour.
const SLOW: &str = "driver=null-co,size=1M,latency-ns=1800000000000";

/// A job that writes to a target, and whose plan drops a filter.
struct Writer {
    target: Option<Backend>,
    id: NodeId,
    filter: Option<NodeRef>,
    run: Part,
}

impl JobDriver for Writer {
    fn job_type(&self) -> JobType {
        JobType::Backup
    }
    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            (self.run)(ctx).await?;
            let Some(target) = &self.target else { return Ok(()) };
            target.write(0, vec![1; 4096].into(), WriteFlags::empty()).await
        })
    }
    fn plan<'a>(&'a mut self, _: &'a JobContext, change: Change) -> BoxFuture<'a, Result<Change>> {
        Box::pin(async {
            Ok(match &self.filter {
                Some(filter) => change.drop_filter(filter),
                None => change,
            })
        })
    }
    fn retire<'a>(&'a mut self, _: &'a JobContext, _: Outcome<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            self.target = None;
            self.filter = None;
            Ok(())
        })
    }
    fn target_nodes(&self) -> Vec<NodeId> {
        vec![self.id]
    }
}

#[test]
fn a_target_that_hangs_is_poisoned_after_the_timeout() {
    run(|jobs| async move {
        let file = open(&jobs, &format!("{SLOW},node-name=file")).await;
        let target = open(&jobs, "driver=raw,node-name=target,file=file").await;
        let access = Access::ALL;
        let backend = Backend::new(&target, BackendOptions::job("j", access)).unwrap();
        let writer =
            Writer { target: Some(backend), id: target.id(), filter: None, run: nothing() };
        let options = JobOptions { cancel_timeout: Duration::from_secs(1), ..JobOptions::new("j") };
        let job = jobs.start(options, Box::new(writer)).await.unwrap();
        settle().await;
        let begun = bds_io::now();
        job.cancel(true).unwrap();
        assert_eq!(job.wait().await.unwrap_err().kind(), ErrorKind::Cancelled);
        let waited = bds_io::now() - begun;
        assert!((1000..1100).contains(&waited.as_millis()), "{waited:?}");
        assert!(target.is_poisoned() && file.is_poisoned(), "and what stores for it");
        let note = job.info().cleanup_error.unwrap();
        assert!(note.contains("the target was poisoned"), "{note}");
        drop(file);
        target.close().await.expect("closing waits for nothing");
    });
}

#[test]
fn a_target_that_answers_in_time_is_not_poisoned() {
    run(|jobs| async move {
        let slow = "driver=null-co,node-name=target,size=1M,latency-ns=300000000";
        let target = open(&jobs, slow).await;
        let backend = Backend::new(&target, BackendOptions::job("j", Access::ALL)).unwrap();
        let (id, run) = (target.id(), nothing());
        let writer = Writer { target: Some(backend), id, filter: None, run };
        let job = jobs.start(JobOptions::new("j"), Box::new(writer)).await.unwrap();
        settle().await;
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert!(!target.is_poisoned());
        assert_eq!((job.info().cleanup_error, target.in_flight()), (None, 0));
    });
}

#[test]
fn a_commit_that_waits_for_requests_can_be_cancelled() {
    let sim = calm(1);
    let jobs = manager(&sim);
    sim.block_on(async {
        let disk = open(&jobs, &format!("{SLOW},node-name=disk")).await;
        let filter =
            open(&jobs, "driver=throttle,limits.iops-total=1000,node-name=filter,file=disk").await;
        let guest = Backend::new(&filter, BackendOptions::registered("guest")).unwrap();
        let reads = guest.clone();
        let iov = bds_io::Buf::zeroed(512, 512).iov();
        let read = bds_io::spawn(async move { reads.read(0, iov).await });
        settle().await;
        let (id, run) = (disk.id(), nothing());
        let before = jobs.graph().dump();
        let writer = Writer { target: None, id, filter: Some(filter), run };
        let options = JobOptions { cancel_timeout: Duration::ZERO, ..JobOptions::new("j") };
        let job = jobs.start(options, Box::new(writer)).await.unwrap();
        bds_io::sleep(Duration::from_secs(10)).await;
        assert_eq!(job.status(), JobStatus::Pending, "the change waits for the read");
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        let after = jobs.graph().dump().replace(" poisoned", "");
        assert_eq!(guest.node().unwrap().name(), "filter", "nothing has changed: {after}");
        assert!(before.contains("filter"));
        drop(read);
    });
}

#[test]
fn a_start_that_fails_retires_the_job_though_its_caller_is_gone() {
    for polls in 0..3 {
        run(move |jobs| async move {
            let slow = part(|_| {
                Box::pin(async {
                    bds_io::sleep(Duration::from_millis(1)).await;
                    Ok(())
                })
            });
            let fake = Fake { retire: slow, ..Fake::new() };
            let log = fake.log.clone();
            {
                let mut start = pin!(jobs.start(JobOptions::new("?"), Box::new(fake)));
                for _ in 0..polls {
                    let mut cx = Context::from_waker(Waker::noop());
                    assert!(matches!(start.as_mut().poll(&mut cx), Poll::Pending));
                }
            }
            settle().await;
            let retired = usize::from(polls > 0);
            assert_eq!(log.lock().unwrap().len(), retired, "not polled: only dropped");
        });
    }
}

#[test]
fn futures_of_callers_hold_up_no_job() {
    run(|jobs| async move {
        let job = jobs.start(JobOptions::new("j"), Box::new(Fake::running(endless()))).await;
        let job = job.unwrap();
        let mut kept = Box::pin(job.wait());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(kept.as_mut().poll(&mut cx).is_pending());
        let mut dropped = Box::pin(job.wait_status(JobStatus::Ready));
        assert!(dropped.as_mut().poll(&mut cx).is_pending());
        drop(dropped);
        job.cancel(true).unwrap();
        job.clone().wait().await.unwrap_err();
        assert!(kept.as_mut().poll(&mut cx).is_ready());
    });
}

#[test]
fn a_job_waits_at_the_gate_of_a_drained_node_without_a_change_of_state() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let target = open(&jobs, "driver=mem,node-name=target,size=1M").await;
        let backend = Backend::new(&target, BackendOptions::job("j", Access::ALL)).unwrap();
        let drained = jobs.graph().drain(&target).await;
        let (id, run) = (target.id(), nothing());
        let writer = Writer { target: Some(backend), id, filter: None, run };
        let job = jobs.start(JobOptions::new("j"), Box::new(writer)).await.unwrap();
        bds_io::sleep(Duration::from_secs(1)).await;
        assert_eq!((job.status(), target.in_flight()), (JobStatus::Running, 0));
        drop(drained);
        job.wait().await.unwrap();
        settle().await;
        assert_eq!(crate::fake::trace(&mut events).len(), 7, "no paused and running by the drain");
    });
}
