//! Abandons futures (dropped, kept without polling, forgotten) at every await: the image stays
//! consistent, other requests go on, bytes are old or new.

use std::cell::{Cell, RefCell};

use bds_io::{Sim, SimConfig};
use bds_testkit::{DiskModel, Ended, Op, Step, Workload, pattern};
use futures_util::future::join_all;
use serde_json::json;

use super::nearly_full;
use super::seeds;
use crate::kit::{Disk, ImageKind, TestEnv, sim_with_image};

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 512).sized(512 * 160, 512 * 240);
    vec![
        q("512"),
        q("512-backed").backed(50_000),
        q("512-tiny-cache").open("l2-cache-size", 1024).open("refcount-cache-size", 2048),
        ImageKind::qcow2("4k-data", 4096).with_data_file().sized(4096 * 24, 4096 * 40),
        ImageKind::qcow2("16k-ext", 16384).extended().sized(16384 * 24, 16384 * 28),
        q("512-copy-on-read").backed(50_000).through(json!({"driver": "copy-on-read"})),
        q("512-preallocate").upon(
            json!({"driver": "preallocate", "prealloc-align": 8192, "prealloc-size": 20_000}),
        ),
        q("512-compress").through(json!({"driver": "compress"})),
        // Refcount blocks that are nearly full: the abandoned request may be adding one.
        nearly_full::block("512-rc64-full-50", 50),
    ]
}

fn write(seed: u64, at: u64, len: usize) -> Op {
    Op::Write { at, bytes: pattern(seed, at, len).into(), fua: false }
}

/// One of each request, on clusters that hold data, on others and on both.
fn victims(kind: &ImageKind) -> Vec<Vec<Op>> {
    let c = kind.cluster;
    let len = usize::try_from(c).expect("small");
    let mut all = vec![
        vec![write(90, 0, len)],
        vec![write(91, c * 3 + 100, 300)],
        vec![write(92, c + 17, len * 5)],
        vec![Op::Zero { at: c / 2, len: c * 3, may_unmap: true, fua: false }],
        vec![Op::Zero { at: c, len: c * 2, may_unmap: false, fua: true }],
        vec![Op::Discard { at: 0, len: c * 4 }],
        vec![Op::Flush],
        vec![Op::Read { at: c / 2, len: c * 14 }],
        vec![Op::Read { at: c * 5, len: c * 4 }, write(96, c * 6 + 9, 700), write(97, c * 7, len)],
        vec![Op::Grow { len: kind.len + c * 2 }],
        vec![write(93, c * 4, len), write(94, c * 4, len), write(95, c * 6 + 5, 100), Op::Flush],
    ];
    if kind.has_compression {
        let bytes = vec![7; len].into();
        all.push(vec![Op::Compressed { at: c * 5, bytes }]);
    }
    all
}

/// Writes some data that is flushed, and some that is not.
async fn begin(disk: &Disk, kind: &ImageKind, model: &RefCell<DiskModel>) -> Result<(), String> {
    let c = kind.cluster;
    let len = usize::try_from(c).expect("small");
    for ops in [
        vec![write(1, c, len * 2), write(2, c * 8 + 30, 200)],
        vec![Op::Flush],
        vec![write(3, c * 2 + 50, 100), write(4, c * 10, len)],
    ] {
        if let Some(error) = disk.requests(&ops, model).await?.first() {
            return Err(error.to_string());
        }
    }
    Ok(())
}

/// What happens to a future that is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abandon {
    Drop,
    Keep,
    Forget,
}

/// Abandons the request at its `k`-th await; false if it completed before.
fn run(base: &Sim, kind: &ImageKind, ops: &[Op], k: usize, how: Abandon) -> Result<bool, String> {
    let sim = base.fork(k as u64);
    let env = TestEnv::Sim(sim.clone());
    let graph = env.graph();
    let model = RefCell::new(kind.model());
    let disk = env.block_on(Disk::open(&env, kind, &graph)).map_err(|e| e.to_string())?;
    env.block_on(begin(&disk, kind, &model))?;
    model.borrow_mut().begin(ops);
    // The scheduler picks the first task: the polls may all have been those of other tasks.
    let is_polled = Cell::new(false);
    let work = async {
        is_polled.set(true);
        join_all(ops.iter().map(|op| disk.request(op))).await
    };
    let mut kept = None;
    let is_abandoned = match how {
        Abandon::Drop => sim.drop_at(work, k),
        Abandon::Forget => sim.forget_at(work, k),
        Abandon::Keep => {
            kept = sim.keep_at(work, k);
            kept.is_some()
        }
    };
    model.borrow_mut().end(ops, &vec![Ended::Partly; ops.len()]);
    model.borrow_mut().set_len(disk.backend.len());
    env.block_on(run_other_requests(&disk, kind, &model))?;
    // A request that was polled completed although it was not polled again; one that was never
    // polled must not start now.
    if let Some(kept) = kept.filter(|_| is_polled.get()) {
        for result in env.block_on(kept) {
            result.map_err(|e| format!("the kept request: {e}"))?;
        }
    }
    env.block_on(disk.close()).map_err(|e| format!("close: {e}"))?;
    check_disk(&env, kind, &model)?;
    Ok(is_abandoned)
}

/// Other requests write to the same places and read them.
async fn run_other_requests(
    disk: &Disk,
    kind: &ImageKind,
    model: &RefCell<DiskModel>,
) -> Result<(), String> {
    disk.compare(model).await.map_err(|e| format!("right afterwards: {e}"))?;
    let c = kind.cluster;
    let ops = [write(50, c + 100, 200), write(51, c * 4 + 7, 900), write(52, c * 7, 512)];
    for op in ops {
        let ops = [op, Op::Flush];
        if let Some(error) = disk.requests(&ops, model).await?.first() {
            return Err(format!("another request: {error}"));
        }
    }
    disk.compare(model).await.map_err(|e| format!("after others: {e}"))
}

fn check_disk(env: &TestEnv, kind: &ImageKind, model: &RefCell<DiskModel>) -> Result<(), String> {
    let graph = env.graph();
    env.block_on(async {
        let disk =
            Disk::open_read_only(env, kind, &graph).await.map_err(|e| format!("open: {e}"))?;
        disk.check().await?;
        disk.compare(model).await?;
        disk.close().await.map_err(|e| format!("close: {e}"))
    })
}

fn sweep(how: Abandon) {
    let mut runs = 0;
    for kind in kinds() {
        let base = sim_with_image(5, SimConfig::default(), &kind);
        for ops in victims(&kind) {
            for k in 0.. {
                runs += 1;
                match run(&base, &kind, &ops, k, how) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => panic!("{} {how:?} {ops:?} at await {k}: {error}", kind.name),
                }
            }
        }
    }
    #[expect(clippy::print_stdout, reason = "the coverage is logged")]
    {
        println!("{runs} runs");
    }
    // Every poll of a request is a poll of its task, and every poll of a task is a point: more than
    // requests had that were polled by their callers.
    assert!(runs > 900, "the sweep met too few awaits: {runs}");
}

#[test]
fn requests_dropped_at_every_await() {
    sweep(Abandon::Drop);
}

#[test]
fn requests_kept_at_every_await() {
    sweep(Abandon::Keep);
}

#[test]
fn requests_forgotten_at_every_await() {
    sweep(Abandon::Forget);
}

/// Drops the requests of each step of a workload at some await.
#[test]
fn a_workload_of_dropped_requests() {
    for kind in kinds() {
        let base = sim_with_image(6, SimConfig::default(), &kind);
        for seed in seeds(8) {
            let workload = Workload::new(seed, &kind.shape(30));
            let env = TestEnv::Sim(base.fork(seed));
            let TestEnv::Sim(sim) = &env else { unreachable!("made above") };
            let graph = env.graph();
            let model = RefCell::new(kind.model());
            let disk = env.block_on(Disk::open(&env, &kind, &graph)).expect("just made");
            for (number, step) in workload.steps.iter().enumerate() {
                let Step::Requests(ops) = step else { continue };
                model.borrow_mut().begin(ops);
                let k = (usize::try_from(seed).expect("small") + number * 7) % 9;
                sim.drop_at(async { join_all(ops.iter().map(|op| disk.request(op))).await }, k);
                model.borrow_mut().end(ops, &vec![Ended::Partly; ops.len()]);
                model.borrow_mut().set_len(disk.backend.len());
                let seen = env.block_on(disk.compare(&model));
                assert_eq!(seen, Ok(()), "{} seed {seed} step {number}\n{workload}", kind.name);
            }
            env.block_on(disk.close()).expect("nothing fails");
            assert_eq!(check_disk(&env, &kind, &model), Ok(()), "{} seed {seed}", kind.name);
        }
    }
}
