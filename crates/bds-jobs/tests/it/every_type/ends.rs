//! Cancels at every await, callers that are forgotten, errors at every operation, pauses and
//! drained sections at random moments.
//!
//! Samples by default; `BDS_TEST_BUDGET=full` takes every await and every operation.

use std::path::Path;
use std::time::Duration;

use bds_io::sim::Fault;
use bds_io::{Sim, SimConfig};
use bds_jobs::{JobHandle, JobOptions, JobStatus};
use bds_testkit::Chance;

use crate::budget::{self, is_full};
use crate::load::{Load, Pace};

use super::rig::{KINDS, Kind, Rig, shape};

const LEN: u64 = 96 << 10;

/// A load that ends by itself, so that the world gets idle.
const SHORT: Pace = Pace { depth: 3, max_pause_us: 300, most: 60 };

struct Scene {
    sim: Sim,
    rig: Rig,
    before: String,
}

fn scene(kind: Kind, seed: u64) -> Scene {
    let sim = Sim::new(seed, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
    let rig = sim.block_on(Rig::make(sim.fs(), Path::new("/"), kind, LEN, seed));
    let before = shape(rig.graph());
    Scene { sim, rig, before }
}

fn kept() -> JobOptions {
    JobOptions { auto_dismiss: false, ..JobOptions::new("j") }
}

/// Cancels a job when it is dropped.
struct CancelOnDrop(JobHandle);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        // `Err`: it is over.
        let _late = self.0.cancel(true);
    }
}

/// Runs a job until its end; mirrors and active commits are completed.
async fn run_to_the_end(job: &JobHandle, kind: Kind) {
    if kind.gets_ready() {
        if job.wait_status(JobStatus::Ready).await.is_err() {
            return;
        }
        let _late = job.complete();
    }
    let _result = job.wait().await;
}

/// Waits for the end of a job without a waiter, and checks everything. True if it succeeded.
///
/// With a fault of the guest's disk the job may not be able to return everything in order: the
/// flush before the filter goes fails, and is reported. It goes all the same.
async fn conclude(scene: Scene, load: Load, job: JobHandle, has_fault: bool, words: &str) -> bool {
    let Scene { sim, rig, before } = scene;
    let kind = rig.kind;
    let mut rounds = 0;
    while !job.status().is_over() {
        let _refused = [job.resume(), job.complete()];
        bds_io::sleep(Duration::from_millis(1)).await;
        rounds += 1;
        assert!(rounds < 20_000, "{kind:?} {words}: it does not end: {:?}", job.info());
    }
    let note = job.info().cleanup_error;
    assert!(has_fault || note.is_none(), "{kind:?} {words}: {note:?}");
    let succeeded = job.wait().await.is_ok();
    let _may_be_dismissed = rig.jobs.dismiss("j");
    let _closed = rig.graph().reap().await;
    if !succeeded {
        assert_eq!(shape(rig.graph()), before, "{kind:?} {words}: the graph");
    }
    rig.finish(load, succeeded, sim.fs(), words).await;
    succeeded
}

/// How a caller stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abandon {
    /// It is dropped, and cancels the job by force at exactly that poll.
    Cancel,
    /// It is forgotten: no destructor runs.
    Forget,
}

/// Starts a job, lets the world go on for `n` polls of tasks and futures, and abandons the caller.
/// Returns whether that came before the caller's end, and whether the job succeeded.
fn abandon_at(kind: Kind, n: usize, how: Abandon) -> (bool, bool) {
    let mut scene = scene(kind, n as u64);
    let (load, job) = scene.sim.block_on(async {
        let load = scene.rig.load_of(7, SHORT);
        bds_io::sleep(Duration::from_micros(300)).await;
        (load, scene.rig.start(kept()).await.unwrap())
    });
    let guard = CancelOnDrop(job.clone());
    let work = async move {
        let guard = guard;
        run_to_the_end(&guard.0, kind).await;
    };
    let abandoned = match how {
        Abandon::Cancel => scene.sim.drop_at(work, n),
        Abandon::Forget => scene.sim.forget_at(work, n),
    };
    assert_eq!(load.failures(), 0, "{kind:?} {how:?} at {n}: the guest notices nothing");
    let sim = scene.sim.clone();
    let words = format!("{how:?} at poll {n}");
    let succeeded = sim.block_on(conclude(scene, load, job, false, &words));
    assert!(how == Abandon::Cancel || succeeded, "{kind:?} {words}: it was not cancelled");
    (abandoned, succeeded)
}

/// Abandons the caller at poll 0, 1, 2 and so on, or at some of them.
fn sweep(how: Abandon) {
    for kind in KINDS {
        let (mut n, mut cancelled) = (0, 0);
        loop {
            let (abandoned, succeeded) = abandon_at(kind, n, how);
            cancelled += u64::from(!succeeded);
            if !abandoned {
                break;
            }
            n = if is_full() { n + 1 } else { n + n / 2 + 7 };
        }
        assert!(n > 50, "{kind:?}: {n} polls");
        assert!(how == Abandon::Forget || cancelled > 3, "{kind:?}: {cancelled} cancels");
    }
}

#[test]
fn a_cancel_at_every_await_leaves_graph_bitmaps_and_images_as_the_table_says() {
    sweep(Abandon::Cancel);
}

#[test]
fn a_caller_forgotten_at_every_await_does_not_keep_the_job_from_its_end() {
    sweep(Abandon::Forget);
}

/// One operation fails, of the job or of the guest.
fn fail_at(kind: Kind, n: u64) -> bool {
    let mut scene = scene(kind, n);
    let sim = scene.sim.clone();
    let errno = if n.is_multiple_of(2) { libc::EIO } else { libc::ENOSPC };
    let words = format!("errno {errno} at operation {n}");
    sim.block_on(async {
        let load = scene.rig.load_of(7, SHORT);
        scene.sim.fail_nth(n, Fault::once(errno));
        scene.rig.has_fault = true;
        let started = scene.rig.start(kept()).await;
        let job = match started {
            Ok(job) => job,
            Err(_) => {
                scene.sim.clear_faults();
                let _closed = scene.rig.graph().reap().await;
                assert_eq!(shape(scene.rig.graph()), scene.before, "{kind:?} {words}: no start");
                scene.rig.finish(load, false, scene.sim.fs(), &words).await;
                return false;
            }
        };
        run_to_the_end(&job, kind).await;
        scene.sim.clear_faults();
        conclude(scene, load, job, true, &words).await
    })
}

#[test]
fn an_error_of_every_operation_leaves_graph_bitmaps_and_images_as_the_table_says() {
    for kind in KINDS {
        let (mut failed, mut in_a_row, mut n) = (0, 0, 0);
        while in_a_row < 6 {
            match fail_at(kind, n) {
                true => in_a_row += 1,
                false => (failed, in_a_row) = (failed + 1, 0),
            }
            n = if is_full() { n + 1 } else { n + n / 12 + 3 };
            if n > 1200 {
                break;
            }
        }
        assert!(failed > 0, "{kind:?}: no error was the job's");
    }
}

/// Pauses, speeds, drained sections and queries at random moments: the job succeeds.
fn storm(kind: Kind, seed: u64) {
    let mut scene = scene(kind, seed);
    let sim = scene.sim.clone();
    let mut chance = Chance::new(seed);
    sim.block_on(async {
        let load = scene.rig.load_of(seed, Pace { most: 400, ..SHORT });
        let job = scene.rig.start(kept()).await.unwrap();
        let graph = scene.rig.graph().clone();
        let mut is_paused = false;
        for _ in 0..chance.between(4, 20) {
            bds_io::sleep(Duration::from_micros(chance.below(400))).await;
            let _refused = match chance.below(6) {
                0 => job.pause().map(|()| is_paused = true),
                1 => job.resume().map(|()| is_paused = false),
                2 => job.set_speed([0, 8 << 20, 64 << 20][chance.below(3) as usize]),
                3 => {
                    let drained = graph.drain(&scene.rig.top()).await;
                    bds_io::sleep(Duration::from_micros(chance.below(800))).await;
                    drop(drained);
                    Ok(())
                }
                4 => {
                    drop(graph.drain_all().await);
                    Ok(())
                }
                _ => {
                    assert!(graph.query_graph()["nodes"].is_array());
                    Ok(())
                }
            };
            // Copies by the guest's requests go on, where there are such.
            let copies_alone = matches!(kind, Kind::Mirror | Kind::ActiveCommit | Kind::Commit);
            if copies_alone && is_paused && job.status() == JobStatus::Paused {
                let before = job.info().current_progress;
                bds_io::sleep(Duration::from_millis(5)).await;
                assert_eq!(job.info().current_progress, before, "{kind:?} {seed}: it is paused");
            }
        }
        let _over = [job.resume(), job.set_speed(0)];
        let words = format!("storm of seed {seed}");
        assert_eq!(load.failures(), 0, "{kind:?} {words}");
        assert!(conclude(scene, load, job, false, &words).await, "{kind:?} {words}");
    });
}

#[test]
fn pauses_speeds_and_drained_sections_do_not_change_what_a_job_does() {
    for seed in budget::seeds(6, 500) {
        for kind in KINDS {
            storm(kind, seed);
        }
    }
}
