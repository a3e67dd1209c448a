//! Every verb in every state, on jobs that are in it; and the further conditions.

use std::sync::Arc;

use bds_core::driver::BoxFuture;
use bds_core::{Error, ErrorKind, Result};
use bds_jobs::{
    CopyMode, JobChange, JobContext, JobControl, JobDriver, JobHandle, JobManager, JobOptions,
    JobStatus, JobType, JobVerb, Outcome,
};

use crate::fake::{Fake, endless, fails, manual, mirror, nothing, part, run, settle};

/// Brings a job into the state, by the shortest way.
async fn job_in(jobs: &JobManager, status: JobStatus) -> JobHandle {
    let is_mirror = status.is_ready();
    let run = match status {
        JobStatus::Waiting | JobStatus::Pending | JobStatus::Concluded => nothing(),
        JobStatus::Aborting => fails("broken"),
        _ if is_mirror => mirror(),
        _ => endless(),
    };
    let retire = match status {
        JobStatus::Aborting => part(|_| Box::pin(std::future::pending())),
        _ => nothing(),
    };
    let fake = Fake { is_mirror, retire, ..Fake::running(run) };
    let is_manual = status == JobStatus::Pending;
    let options = JobOptions { auto_finalize: !is_manual, ..manual("j") };
    let mut group: Vec<(JobOptions, Box<dyn JobDriver>)> = vec![(options, Box::new(fake))];
    if status == JobStatus::Waiting {
        group.push((JobOptions::new("other"), Box::new(Fake::running(endless()))));
    }
    let job = jobs.start_group(group).await.expect("the id is free").remove(0);
    if status != JobStatus::Created {
        settle().await;
    }
    if status.is_paused() {
        job.pause().expect("it works");
        settle().await;
    }
    assert_eq!(job.status(), status);
    job
}

fn verb(jobs: &JobManager, verb: JobVerb) -> Result<()> {
    match verb {
        JobVerb::Cancel => jobs.cancel("j", true),
        JobVerb::Pause => jobs.pause("j"),
        JobVerb::Resume => jobs.resume("j"),
        JobVerb::SetSpeed => jobs.set_speed("j", 1),
        JobVerb::Complete => jobs.complete("j"),
        JobVerb::Finalize => jobs.finalize("j"),
        JobVerb::Dismiss => jobs.dismiss("j"),
        JobVerb::Change => jobs.change("j", JobChange::MirrorCopyMode(CopyMode::WriteBlocking)),
    }
}

#[test]
fn every_verb_in_every_state() {
    let states = [
        JobStatus::Created,
        JobStatus::Running,
        JobStatus::Paused,
        JobStatus::Ready,
        JobStatus::Standby,
        JobStatus::Waiting,
        JobStatus::Pending,
        JobStatus::Aborting,
        JobStatus::Concluded,
    ];
    for status in states {
        for name in JobVerb::ALL {
            let sim = crate::fake::calm(1);
            let jobs = crate::fake::manager(&sim);
            sim.block_on(async {
                let job = job_in(&jobs, status).await;
                let refusal =
                    format!("Job 'j' in state '{status}' cannot accept command verb '{name}'");
                let expected = match name {
                    JobVerb::Resume if !status.is_paused() => {
                        "Can't resume a job that was not paused".to_owned()
                    }
                    _ if !status.accepts(name) => refusal,
                    JobVerb::Pause if status.is_paused() => "Job is already paused".to_owned(),
                    JobVerb::Change => "Job type does not support change".to_owned(),
                    _ => String::new(),
                };
                let text = verb(&jobs, name).map_or_else(|error| error.to_string(), |()| "".into());
                assert_eq!(text, expected, "{status}: {name}");
                settle().await;
                let after = job.status();
                let effect = match name {
                    _ if !expected.is_empty() => status,
                    JobVerb::Cancel | JobVerb::Complete | JobVerb::Finalize
                        if status != JobStatus::Standby || name == JobVerb::Cancel =>
                    {
                        JobStatus::Concluded
                    }
                    JobVerb::Dismiss => JobStatus::Null,
                    JobVerb::Pause if status == JobStatus::Ready => JobStatus::Standby,
                    JobVerb::Pause => JobStatus::Paused,
                    JobVerb::Resume if status == JobStatus::Standby => JobStatus::Ready,
                    JobVerb::Resume => JobStatus::Running,
                    _ => status,
                };
                let effect = match effect {
                    // It was on its way.
                    JobStatus::Created => JobStatus::Running,
                    effect => effect,
                };
                assert_eq!(after, effect, "{status}: {name}");
            });
        }
    }
}

#[test]
fn a_cancel_without_force_of_a_paused_job_is_refused() {
    run(|jobs| async move {
        let job = job_in(&jobs, JobStatus::Paused).await;
        let error = job.cancel(false).unwrap_err().to_string();
        assert_eq!(error, "The block job for device 'j' is currently paused");
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
    });
}

#[test]
fn what_cannot_be_completed() {
    run(|jobs| async move {
        let text = "The active block job 'j' cannot be completed";
        let job = job_in(&jobs, JobStatus::Standby).await;
        job.resume().unwrap();
        settle().await;
        job.cancel(false).unwrap();
        assert_eq!(job.complete().unwrap_err().to_string(), text, "it was cancelled");
        job.wait().await.unwrap();
        jobs.dismiss("j").unwrap();

        let job = jobs.start(JobOptions::new("j"), Box::new(Fake::running(mirror()))).await;
        let job = job.unwrap();
        job.wait_status(JobStatus::Ready).await.unwrap();
        assert_eq!(job.complete().unwrap_err().to_string(), text, "not of its type");
        job.cancel(false).unwrap();
        job.wait().await.expect_err("without the notion of a soft cancel every cancel is forced");
    });
}

#[test]
fn a_soft_cancel_can_be_followed_by_a_forced_one() {
    run(|jobs| async move {
        let ignores = part(|ctx| {
            Box::pin(async {
                ctx.ready().await;
                ctx.wait_complete().await;
                assert!(ctx.soft_cancel_requested() && !ctx.complete_requested());
                std::future::pending().await
            })
        });
        let fake = Fake { is_mirror: true, ..Fake::running(ignores) };
        let job = jobs.start(JobOptions::new("j"), Box::new(fake)).await.unwrap();
        job.wait_status(JobStatus::Ready).await.unwrap();
        job.cancel(false).unwrap();
        settle().await;
        assert_eq!(job.status(), JobStatus::Ready);
        job.cancel(true).unwrap();
        assert_eq!(job.wait().await.unwrap_err().kind(), ErrorKind::Cancelled);
    });
}

#[test]
fn a_pending_job_of_a_mirror_ignores_a_soft_cancel() {
    run(|jobs| async move {
        let fake = Fake { is_mirror: true, ..Fake::new() };
        let job = jobs.start(manual("j"), Box::new(fake)).await.unwrap();
        job.wait_status(JobStatus::Pending).await.unwrap();
        job.cancel(false).unwrap();
        settle().await;
        assert_eq!(job.status(), JobStatus::Pending);
        job.finalize().unwrap();
        job.finalize().expect("twice does no harm");
        job.wait().await.unwrap();
    });
}

/// A job whose commands fail.
struct Picky(Fake);

struct Refuses;

impl JobControl for Refuses {
    fn complete(&self) -> Result<()> {
        Err(Error::new(ErrorKind::NotFound, "Node name 'x' not found"))
    }
    fn change(&self, _: JobChange) -> Result<()> {
        Err(Error::new(
            ErrorKind::NotSupported,
            "Change to copy mode 'background' is not implemented",
        ))
    }
}

impl JobDriver for Picky {
    fn job_type(&self) -> JobType {
        JobType::Mirror
    }
    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        self.0.run(ctx)
    }
    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        self.0.retire(ctx, outcome)
    }
    fn supports_complete(&self) -> bool {
        true
    }
    fn control(&self) -> Option<Arc<dyn JobControl>> {
        Some(Arc::new(Refuses))
    }
}

#[test]
fn a_command_that_the_type_refuses_changes_nothing() {
    run(|jobs| async move {
        let driver = Picky(Fake::running(mirror()));
        let job = jobs.start(JobOptions::new("j"), Box::new(driver)).await.unwrap();
        job.wait_status(JobStatus::Ready).await.unwrap();
        assert_eq!(job.complete().unwrap_err().to_string(), "Node name 'x' not found");
        let change = JobChange::MirrorCopyMode(CopyMode::Background);
        assert!(job.change(change).unwrap_err().to_string().contains("'background'"));
        settle().await;
        assert_eq!(job.status(), JobStatus::Ready);
        job.cancel(true).unwrap();
    });
}
