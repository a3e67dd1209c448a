//! Error policies: what a failed request does to its job, and which events say so.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bds_core::{Error, ErrorKind};
use bds_jobs::{
    ErrorSite, ErrorVerdict, IoStatus, JobEvent, JobOptions, JobStatus, MAX_FLUSH_ATTEMPTS,
    OnError, RetryPolicy, Side,
};

use crate::fake::{Fake, Part, part, run, settle};

/// Writes a range that fails so many times; counts its attempts.
fn writes(failures: u32, kind: ErrorKind, attempts: &Arc<AtomicU32>) -> Part {
    let attempts = Arc::clone(attempts);
    part(move |ctx| {
        let attempts = Arc::clone(&attempts);
        Box::pin(async move {
            loop {
                ctx.pause_point().await;
                if attempts.fetch_add(1, Ordering::SeqCst) >= failures {
                    return Ok(());
                }
                let error = Error::new(kind, "write");
                let site = ErrorSite { offset: 65536, len: 4096, node: "target".into() };
                match ctx.on_error(Side::Target, site, &error).await {
                    ErrorVerdict::Retry => {}
                    ErrorVerdict::Skip => return Ok(()),
                    ErrorVerdict::Fail => return Err(error),
                }
            }
        })
    })
}

fn policy(on_target_error: OnError) -> JobOptions {
    JobOptions { on_target_error, ..JobOptions::new("j") }
}

#[test]
fn report_fails_with_the_errno() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let count = Arc::<AtomicU32>::default();
        let fake = Fake::running(writes(9, ErrorKind::NoSpace, &count));
        let job = jobs.start(policy(OnError::Report), Box::new(fake)).await.unwrap();
        assert_eq!(job.wait().await.unwrap_err().kind(), ErrorKind::NoSpace);
        let event = std::iter::from_fn(|| events.try_next())
            .find(|event| event.name() == "BLOCK_JOB_ERROR")
            .unwrap();
        let expected = concat!(
            r#"{"event":"BLOCK_JOB_ERROR","data":{"device":"j","operation":"write","#,
            r#""action":"report","offset":65536,"length":4096,"errno":28,"#,
            r#""node-name":"target","attempts":1,"count":1}}"#
        );
        assert_eq!(event.to_json().to_string(), expected);
    });
}

#[test]
fn stop_pauses_until_a_user_resumes() {
    for (kind, status) in
        [(ErrorKind::NoSpace, IoStatus::Nospace), (ErrorKind::Io, IoStatus::Failed)]
    {
        run(move |jobs| async move {
            let count = Arc::<AtomicU32>::default();
            let fake = Fake::running(writes(1, kind, &count));
            let job = jobs.start(policy(OnError::Stop), Box::new(fake)).await.unwrap();
            job.wait_status(JobStatus::Paused).await.unwrap();
            let info = job.info();
            assert_eq!((info.io_status, info.paused, info.busy), (status, true, false));
            assert_eq!(job.pause().unwrap_err().to_string(), "Job is already paused");
            job.resume().unwrap();
            assert_eq!(job.info().io_status, IoStatus::Ok);
            job.wait().await.unwrap();
            assert_eq!(count.load(Ordering::SeqCst), 2, "the range was tried again");
        });
    }
}

#[test]
fn enospc_stops_for_space_and_reports_the_rest() {
    for (policy_, kind, stops) in [
        (OnError::Enospc, ErrorKind::NoSpace, true),
        (OnError::Enospc, ErrorKind::Io, false),
        (OnError::Auto, ErrorKind::NoSpace, true),
        (OnError::Auto, ErrorKind::Io, false),
    ] {
        run(move |jobs| async move {
            let count = Arc::<AtomicU32>::default();
            let fake = Fake::running(writes(1, kind, &count));
            let job = jobs.start(policy(policy_), Box::new(fake)).await.unwrap();
            settle().await;
            assert_eq!(job.status() == JobStatus::Paused, stops);
            if stops {
                job.cancel(true).unwrap();
            }
            assert!(job.wait().await.is_err());
        });
    }
}

#[test]
fn ignored_errors_are_tried_again_ever_more_rarely() {
    run(|jobs| async move {
        let count = Arc::<AtomicU32>::default();
        let fake = Fake::running(writes(u32::MAX, ErrorKind::Io, &count));
        let job = jobs.start(policy(OnError::Ignore), Box::new(fake)).await.unwrap();
        bds_io::sleep(Duration::from_secs(60)).await;
        // 0.1 + 0.2 + … + 6.4 s, then one every ten seconds.
        assert_eq!(count.load(Ordering::SeqCst), 12);
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
    });
}

/// A flush that failed five times on end fails the job, though errors are ignored; failures with a
/// flush that succeeded in between do not add up, nor do those of a write at offset 0.
#[test]
fn ignored_errors_of_flushes_end_the_job_after_a_few_on_end() {
    for rounds in [vec![4, 4, 4], vec![4, 5]] {
        run(|jobs| async move {
            let succeeds = rounds.iter().all(|failures| *failures < MAX_FLUSH_ATTEMPTS);
            let fake = Fake::running(part(move |ctx| {
                let rounds = rounds.clone();
                Box::pin(async move {
                    let error = Error::new(ErrorKind::Io, "flush");
                    for failures in rounds {
                        for len in std::iter::repeat_n(0, failures as usize).chain([512]) {
                            let site = ErrorSite { offset: 0, len, node: "target".into() };
                            match ctx.on_error(Side::Target, site, &error).await {
                                ErrorVerdict::Retry | ErrorVerdict::Skip => {}
                                ErrorVerdict::Fail => return Err(error),
                            }
                        }
                        ctx.flushed(Side::Target);
                    }
                    Ok(())
                })
            }));
            let job = jobs.start(policy(OnError::Ignore), Box::new(fake)).await.unwrap();
            assert_eq!(job.wait().await.is_ok(), succeeds);
        });
    }
}

#[test]
fn events_of_ignored_errors_are_few_and_count_the_rest_but_no_change_of_state_is_lost() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let count = Arc::<AtomicU32>::default();
        let retry = RetryPolicy {
            first_wait: Duration::from_millis(1),
            max_wait: Duration::from_millis(1),
            max_attempts: Some(5000),
        };
        let fake = Fake::running(writes(u32::MAX, ErrorKind::Io, &count));
        let options = JobOptions { retry, ..policy(OnError::Ignore) };
        let job = jobs.start(options, Box::new(fake)).await.unwrap();
        assert_eq!(job.wait().await.unwrap_err().kind(), ErrorKind::Io);
        let seconds = bds_io::now().as_secs();
        let (mut errors, mut counted, mut last) = (0, 0, None);
        for event in std::iter::from_fn(|| events.try_next()) {
            if let JobEvent::Error { count, action, .. } = event {
                (errors, counted, last) = (errors + 1, counted + count, Some(action.as_str()));
            }
        }
        assert!(errors <= seconds + 2, "{errors} events in {seconds} s");
        assert_eq!((counted, last), (5000, Some("report")));
    });
}

#[test]
fn a_job_that_is_cancelled_reports_the_errors_that_were_held_back() {
    run(|jobs| async move {
        let mut events = jobs.events();
        let count = Arc::<AtomicU32>::default();
        let fake = Fake::running(writes(u32::MAX, ErrorKind::Io, &count));
        let job = jobs.start(policy(OnError::Ignore), Box::new(fake)).await.unwrap();
        bds_io::sleep(Duration::from_millis(500)).await;
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        let counts: Vec<u64> = std::iter::from_fn(|| events.try_next())
            .filter_map(|event| match event {
                JobEvent::Error { count, .. } => Some(count),
                _ => None,
            })
            .collect();
        assert_eq!(counts, [1, 2]);
    });
}
