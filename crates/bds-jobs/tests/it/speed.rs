//! Speed and pauses, on the virtual clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bds_jobs::{JobOptions, JobStatus};

use crate::fake::{Fake, Part, part, run, settle};

const MIB: u64 = 1 << 20;

/// Copies chunks for ever at the job's speed.
fn copies(chunk: u64, done: &Arc<AtomicU64>) -> Part {
    let done = Arc::clone(done);
    part(move |ctx| {
        let done = Arc::clone(&done);
        Box::pin(async move {
            loop {
                ctx.throttle(chunk).await;
                if ctx.should_pause() {
                    ctx.pause_point().await;
                    continue;
                }
                done.fetch_add(chunk, Ordering::Relaxed);
                bds_io::sleep(Duration::from_micros(100)).await;
            }
        })
    })
}

#[test]
fn speed_is_kept_within_five_percent() {
    for (chunk, speed) in [(MIB, 4 * MIB), (65536, 4 * MIB), (4096, MIB), (3 * MIB, 2 * MIB)] {
        run(move |jobs| async move {
            let done = Arc::<AtomicU64>::default();
            let options = JobOptions { speed, ..JobOptions::new("j") };
            let fake = Fake::running(copies(chunk, &done));
            let job = jobs.start(options, Box::new(fake)).await.unwrap();
            // After the burst and the first chunk.
            bds_io::sleep(Duration::from_secs(2)).await;
            let begun = done.load(Ordering::Relaxed);
            bds_io::sleep(Duration::from_secs(30)).await;
            let rate = (done.load(Ordering::Relaxed) - begun) / 30;
            let (low, high) = (speed / 100 * 95, speed / 100 * 105);
            assert!((low..=high).contains(&rate), "chunk {chunk}: {rate} of {speed}");
            job.cancel(true).unwrap();
            job.wait().await.unwrap_err();
        });
    }
}

#[test]
fn the_first_chunk_goes_at_once_and_a_new_speed_wakes_the_job() {
    run(|jobs| async move {
        let done = Arc::<AtomicU64>::default();
        let options = JobOptions { speed: 1, ..JobOptions::new("j") };
        let fake = Fake::running(copies(MIB, &done));
        let job = jobs.start(options, Box::new(fake)).await.unwrap();
        bds_io::sleep(Duration::from_secs(60)).await;
        assert_eq!(done.load(Ordering::Relaxed), MIB, "the second waits for 2^20 seconds");
        job.set_speed(10 * MIB).unwrap();
        bds_io::sleep(Duration::from_secs(1)).await;
        assert!(done.load(Ordering::Relaxed) > 9 * MIB);
        job.set_speed(0).unwrap();
        bds_io::sleep(Duration::from_secs(1)).await;
        assert!(done.load(Ordering::Relaxed) > 1000 * MIB);
        assert_eq!(job.info().speed, 0);
        job.cancel(true).unwrap();
    });
}

#[test]
fn a_job_that_waits_for_its_speed_pauses_and_is_cancelled_at_once() {
    run(|jobs| async move {
        let done = Arc::<AtomicU64>::default();
        let options = JobOptions { speed: 1, ..JobOptions::new("j") };
        let fake = Fake::running(copies(MIB, &done));
        let job = jobs.start(options, Box::new(fake)).await.unwrap();
        settle().await;
        job.pause().unwrap();
        settle().await;
        assert_eq!(job.status(), JobStatus::Paused);
        job.resume().unwrap();
        settle().await;
        assert_eq!((job.status(), done.load(Ordering::Relaxed)), (JobStatus::Running, MIB));
        let begun = bds_io::now();
        job.cancel(true).unwrap();
        job.wait().await.unwrap_err();
        assert!(bds_io::now() - begun < Duration::from_millis(1));
    });
}
