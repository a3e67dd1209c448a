//! Success under a guest's load, on every engine.

use std::path::Path;

use bds_io::{Context, ContextOptions, EngineKind, Fs, Sim, SimConfig};
use bds_jobs::{JobOptions, JobStatus};
use bds_testkit::Scratch;

use crate::budget;

use super::rig::{KINDS, Kind, Rig};

const LEN: u64 = 512 << 10;

async fn succeed(fs: Fs, dir: &Path, kind: Kind, seed: u64) {
    let mut rig = Rig::make(fs.clone(), dir, kind, LEN, seed).await;
    let load = rig.load(seed);
    let options = JobOptions { auto_dismiss: false, ..JobOptions::new("j") };
    let job = rig.start(options).await.unwrap();
    if kind.gets_ready() {
        job.wait_status(JobStatus::Ready).await.unwrap();
        bds_io::sleep(std::time::Duration::from_millis(1)).await;
        job.complete().unwrap();
    }
    job.wait().await.unwrap();
    let info = job.info();
    assert_eq!(info.current_progress, info.total_progress, "{kind:?}");
    assert_eq!((info.error, info.cleanup_error), (None, None), "{kind:?}");
    assert_eq!(load.failures(), 0, "{kind:?}: the guest notices nothing");
    bds_io::sleep(std::time::Duration::from_millis(1)).await;
    rig.finish(load, true, fs, &format!("seed {seed}")).await;
}

fn on_files(engine: EngineKind) {
    for kind in KINDS {
        let scratch = Scratch::new();
        let options = ContextOptions { engine, ..ContextOptions::default() };
        let context = match Context::new(options) {
            Ok(context) => context,
            Err(error) => return bds_testkit::skip(&format!("no {engine:?}: {error}")),
        };
        context.block_on(succeed(Fs::Host, scratch.dir(), kind, 1));
    }
}

#[test]
fn jobs_succeed_under_load_with_io_uring() {
    on_files(EngineKind::Uring);
}

#[test]
fn jobs_succeed_under_load_with_the_thread_pool() {
    on_files(EngineKind::Pool);
}

/// The deterministic scheduler, with requests that are split, cancelled and overtaken.
#[test]
fn jobs_succeed_under_load_in_the_simulated_world() {
    for seed in budget::seeds(4, 400) {
        for kind in KINDS {
            let sim = Sim::new(seed, SimConfig::default());
            sim.block_on(succeed(sim.fs(), Path::new("/"), kind, seed));
        }
    }
}
