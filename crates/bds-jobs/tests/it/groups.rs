//! Groups: all members take effect together, or none.

use bds_core::ErrorKind;
use bds_jobs::{JobDriver, JobHandle, JobManager, JobOptions, JobStatus, JobType};

use crate::fake::{Fake, Log, endless, fails, manual, nothing, run, settle, trace};

async fn start(jobs: &JobManager, members: Vec<(JobOptions, Fake)>) -> Vec<JobHandle> {
    let boxed = members
        .into_iter()
        .map(|(options, fake)| (options, Box::new(fake) as Box<dyn JobDriver>))
        .collect();
    jobs.start_group(boxed).await.expect("the ids are free")
}

/// Members of all types, each with its part, in one log.
fn members(log: &Log, count: usize, part: impl Fn(usize, Fake) -> Fake) -> Vec<(JobOptions, Fake)> {
    let types =
        [JobType::Backup, JobType::Mirror, JobType::Commit, JobType::Stream, JobType::Create];
    let member = |n: usize| {
        let fake = Fake { job_type: types[n % 5], log: log.clone(), ..Fake::new() };
        (JobOptions::new(format!("j{n}")), part(n, fake))
    };
    (0..count).map(member).collect()
}

#[test]
fn a_group_is_pending_and_concluded_newest_first() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let log = Log::default();
        let members = vec![
            (JobOptions::new("a"), Fake { log: log.clone(), ..Fake::new() }),
            (manual("b"), Fake { log: log.clone(), ..Fake::new() }),
        ];
        let handles = start(&jobs, members).await;
        settle().await;
        let expected = [
            "a created",
            "b created",
            "a running",
            "a waiting",
            "b running",
            "b waiting",
            "b pending",
            "b PENDING",
            "a pending",
        ];
        let mut seen = trace(&mut events);
        let (pending, begun) = (seen.split_off(6), seen);
        assert_eq!(pending, expected[6..]);
        let mut begun = begun;
        begun.sort();
        let mut all = expected[..6].to_vec();
        all.sort_unstable();
        assert_eq!(begun, all, "their order is the scheduler's");
        assert!(log.lock().unwrap().is_empty(), "one manual member holds all");

        handles[0].finalize().unwrap();
        for handle in &handles {
            handle.wait().await.unwrap();
        }
        settle().await;
        let expected = ["b COMPLETED", "b concluded", "a COMPLETED", "a concluded", "a null"];
        assert_eq!(trace(&mut events), expected);
        let expected = ["plan a", "plan b", "retire b: committed", "retire a: committed"];
        assert_eq!(*log.lock().unwrap(), expected);
        jobs.dismiss("b").unwrap();
    });
}

#[test]
fn a_failure_at_each_position_aborts_all() {
    for failing in 0..5 {
        run(move |jobs| async move {
            let log = Log::default();
            let members = members(&log, 5, |n, fake| Fake {
                run: match n {
                    n if n == failing => fails("broken"),
                    n if n % 2 == 0 => nothing(),
                    _ => endless(),
                },
                ..fake
            });
            let handles = start(&jobs, members).await;
            for (n, handle) in handles.iter().enumerate() {
                let error = handle.wait().await.unwrap_err();
                let expected = if n == failing { "broken" } else { "Operation canceled" };
                assert_eq!(error.to_string(), expected);
            }
            let log = log.lock().unwrap();
            let retired = log.iter().filter(|line| line.starts_with("retire"));
            assert_eq!(retired.count(), 5);
            assert!(!log.iter().any(|line| line.starts_with("plan")), "{log:?}");
        });
    }
}

#[test]
fn a_plan_that_fails_at_each_position_aborts_all() {
    for failing in 0..4 {
        run(move |jobs| async move {
            let mut events = jobs.events();
            let log = Log::default();
            let members = members(&log, 4, |n, fake| Fake {
                plan: if n == failing { fails("no plan") } else { nothing() },
                ..fake
            });
            let handles = start(&jobs, members).await;
            for (n, handle) in handles.iter().enumerate() {
                let error = handle.wait().await.unwrap_err();
                let expected = if n == failing { "no plan" } else { "Operation canceled" };
                assert_eq!(error.to_string(), expected);
                let last = format!("retire j{n}: {expected}");
                assert!(log.lock().unwrap().contains(&last));
            }
            let plans = log.lock().unwrap().iter().filter(|l| l.starts_with("plan")).count();
            assert_eq!(plans, failing + 1);
            let ends = trace(&mut events);
            let ends = ends.iter().filter(|l| l.contains("COMPLETED") || l.contains("CANCELLED"));
            assert_eq!(ends.count(), 4, "each exactly one final event");
        });
    }
}

#[test]
fn a_cancel_of_a_member_that_waits_ends_all() {
    run(|jobs| async move {
        let log = Log::default();
        let members = members(&log, 3, |n, fake| Fake {
            run: if n == 0 { nothing() } else { endless() },
            ..fake
        });
        let handles = start(&jobs, members).await;
        handles[0].wait_status(JobStatus::Waiting).await.unwrap();
        handles[0].cancel(true).unwrap();
        for handle in &handles {
            assert_eq!(handle.wait().await.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        assert_eq!(log.lock().unwrap().len(), 3, "{log:?}");
    });
}

#[test]
fn a_group_with_an_id_in_use_does_not_start() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let log = Log::default();
        let members = [("a", &log), ("b", &log), ("a", &log)].map(|(id, log)| {
            let fake = Fake { log: log.clone(), ..Fake::new() };
            (JobOptions::new(id), Box::new(fake) as Box<dyn JobDriver>)
        });
        let error = jobs.start_group(members.into()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        let words = "Job ID 'a' already in use";
        let expected = ["a", "b", "a"].map(|id| format!("retire {id}: {words}"));
        assert_eq!(*log.lock().unwrap(), expected);
        assert!(trace(&mut events).is_empty());
    });
}

#[test]
fn jobs_that_are_not_started_are_all_retired_newest_first() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let log = Log::default();
        let members = ["a", "b", "c"].map(|id| {
            let fake = match id {
                // A failure of one keeps no other from giving back what it holds.
                "b" => Fake { retire: fails("stuck"), ..Fake::new() },
                _ => Fake::new(),
            };
            let driver = Box::new(Fake { log: log.clone(), ..fake }) as Box<dyn JobDriver>;
            (JobOptions::new(id), driver)
        });
        let error = jobs.discard(members.into()).await.unwrap_err();
        assert_eq!(error.message(), "stuck");
        let words = "the job was not started";
        let expected = ["c", "b", "a"].map(|id| format!("retire {id}: {words}"));
        assert_eq!(*log.lock().unwrap(), expected);
        assert!(trace(&mut events).is_empty() && jobs.jobs().is_empty());
    });
}

#[test]
fn a_group_that_does_not_start_retires_all_its_jobs_even_if_one_fails_to() {
    run(|jobs| async move {
        let log = Log::default();
        let members = ["a", "b", "a"].map(|id| {
            let retire = if id == "b" { fails("stuck") } else { Fake::new().retire };
            let fake = Fake { retire, log: log.clone(), ..Fake::new() };
            (JobOptions::new(id), Box::new(fake) as Box<dyn JobDriver>)
        });
        let error = jobs.start_group(members.into()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(log.lock().unwrap().len(), 3);
    });
}
