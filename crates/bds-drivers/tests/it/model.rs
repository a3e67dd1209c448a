//! Runs random requests on images and compares with a model that is a list of sectors.

use std::cell::RefCell;

use bds_io::{EngineKind, Sim, SimConfig};
use bds_testkit::{Cache, DiskModel, Scratch, Shape, Tool, Workload, qemu_img};
use serde_json::json;

use crate::kit::{ImageKind, TestEnv, play};
use crate::sweep::seeds;

/// The kinds of image under test.
fn kinds() -> Vec<ImageKind> {
    let q = ImageKind::qcow2;
    vec![
        q("512", 512),
        q("512-rc64", 512).create("refcount_bits", 64).open("cache-size", 4096),
        q("512-rc1", 512).create("refcount_bits", 1),
        q("4k", 4096).strict(),
        q("4k-v2", 4096).version_2(),
        q("4k-v2-backed", 4096).version_2().backed(200_000),
        q("4k-backed", 4096).backed(4096 * 128 + 1000),
        q("4k-backed-short", 4096).backed(50_000).strict(),
        q("4k-lazy", 4096).lazy(),
        q("4k-zstd", 4096).create("compression_type", "zstd"),
        q("4k-data", 4096).with_data_file(),
        q("4k-data-backed", 4096).with_data_file().backed(100_000),
        q("16k-ext", 16384).extended().sized(16384 * 24, 16384 * 40),
        q("16k-ext-backed", 16384).extended().backed(300_000).sized(16384 * 24, 16384 * 40),
        q("16k-ext-data", 16384).extended().with_data_file().sized(16384 * 24, 16384 * 40),
        q("64k", 65536).sized(65536 * 20, 65536 * 30),
        q("64k-ext-rc1", 65536).extended().create("refcount_bits", 1).sized(65536 * 20, 65536 * 30),
        ImageKind::raw("raw"),
        q("4k-cor", 4096).backed(200_000).through(json!({"driver": "copy-on-read"})),
        q("4k-data-cor", 4096)
            .with_data_file()
            .backed(100_000)
            .through(json!({"driver": "copy-on-read"})),
        q("16k-ext-cor", 16384)
            .extended()
            .backed(300_000)
            .sized(16384 * 24, 16384 * 40)
            .through(json!({"driver": "copy-on-read"})),
        q("4k-compress", 4096).backed(200_000).through(json!({"driver": "compress"})),
        q("16k-ext-compress", 16384)
            .extended()
            .sized(16384 * 24, 16384 * 40)
            .through(json!({"driver": "compress"})),
        q("4k-throttle", 4096)
            .through(json!({"driver": "throttle", "limits": {"iops-total": 1_000_000}})),
        q("4k-preallocate", 4096).upon(json!({"driver": "preallocate", "prealloc-size": 100_000})),
        ImageKind::raw("raw-preallocate")
            .upon(json!({"driver": "preallocate", "prealloc-align": 512, "prealloc-size": 0})),
    ]
}

fn shape(kind: &ImageKind, steps: usize) -> Shape {
    Shape { reads: true, reopens: true, ..kind.shape(steps) }
}

/// Runs the workload on a new image; returns the model at the end.
fn run(env: &TestEnv, kind: &ImageKind, workload: &Workload) -> Result<DiskModel, String> {
    env.make(kind);
    let model = RefCell::new(kind.model());
    env.block_on(play(env, kind, Cache::Writeback, workload, &model))?;
    Ok(model.into_inner())
}

/// `qemu-img check` of the image.
fn qemu_check(img: &Tool, env: &TestEnv, kind: &ImageKind) -> Result<(), String> {
    if kind.format != "qcow2" {
        return Ok(());
    }
    let scratch = Scratch::new();
    let out = env.qemu_check(img, kind, &scratch);
    if out.ok() { Ok(()) } else { Err(format!("qemu-img check: {out:?}")) }
}

/// Finds the shortest prefix that fails, by bisection: prefixes of a failing workload mostly fail
/// from some length on.
fn shrink(kind: &ImageKind, workload: &Workload, env: &dyn Fn() -> TestEnv) -> (Workload, String) {
    let fails = |count: usize| run(&env(), kind, &workload.prefix(count)).err();
    let (mut good, mut bad) = (0, workload.steps.len());
    let mut why = String::from("it does not fail again");
    while good + 1 < bad {
        let middle = usize::midpoint(good, bad);
        match fails(middle) {
            Some(error) => (bad, why) = (middle, error),
            None => good = middle,
        }
    }
    if let Some(error) = fails(bad) {
        why = error;
    }
    (workload.prefix(bad), why)
}

fn random(seed_count: u64, steps: usize, env: impl Fn(u64) -> TestEnv) {
    let img = qemu_img();
    for kind in kinds() {
        for seed in seeds(seed_count) {
            let workload = Workload::new(seed, &shape(&kind, steps));
            let here = env(seed);
            if let Err(error) = run(&here, &kind, &workload) {
                let trace = here.trace();
                let (short, why) = shrink(&kind, &workload, &|| env(seed));
                panic!("{} seed {seed}: {error}\n{trace}\nshortest: {short}{why}", kind.name);
            }
            let checked = img
                .as_ref()
                .filter(|_| seed == 0)
                .map_or(Ok(()), |img| qemu_check(img, &here, &kind));
            if let Err(error) = checked {
                panic!("{} seed {seed}: {error}\n{workload}", kind.name);
            }
        }
    }
}

#[test]
fn random_requests_on_the_simulated_disk() {
    random(6, 60, |seed| TestEnv::Sim(Sim::new(seed, SimConfig::default())));
}

#[test]
fn random_requests_through_io_uring() {
    match TestEnv::host(EngineKind::Uring) {
        Ok(_) => random(2, 60, |_| {
            TestEnv::host(EngineKind::Uring).expect("the engine was available before")
        }),
        Err(error) => bds_testkit::skip(&format!("no io_uring here: {error}")),
    }
}

#[test]
fn random_requests_through_threads() {
    random(2, 60, |_| TestEnv::host(EngineKind::Pool).expect("threads are always available"));
}
