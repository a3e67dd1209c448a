//! Runs one cell of the test matrix: an engine, a format and a cache mode (see
//! `xtask/matrix.toml`).

use std::cell::RefCell;

use bds_io::{EngineKind, Sim, SimConfig};
use bds_testkit::{Cache, Engine, Format, Scratch, Shape, Workload, axes, qemu_img, skip};

use crate::kit::{Disk, ImageKind, TestEnv, play};

fn kind(format: Format) -> ImageKind {
    let q = |name| ImageKind::qcow2(name, 65536).sized(65536 * 20, 65536 * 30);
    match format {
        Format::Raw => ImageKind::raw("raw"),
        Format::Qcow2 => q("qcow2"),
        Format::Qcow2V2 => q("qcow2-v2").version_2(),
        Format::Qcow2Ext => q("qcow2-ext").extended(),
        Format::Qcow2Data => q("qcow2-data").with_data_file(),
    }
}

/// The environment of this engine; `None` after a skip.
fn env(engine: Engine) -> Option<TestEnv> {
    let wanted = match engine {
        Engine::Sim => return Some(TestEnv::Sim(Sim::new(11, SimConfig::default()))),
        Engine::Uring => EngineKind::Uring,
        Engine::Pool => EngineKind::Pool,
    };
    match TestEnv::host(wanted) {
        Ok(env) => Some(env),
        Err(error) => {
            skip(&format!("no {engine:?} engine here: {error}"));
            None
        }
    }
}

/// Can images be opened with this cache mode? A file system without O_DIRECT cannot run the cells
/// of cache=none.
fn is_possible(env: &TestEnv, kind: &ImageKind, cache: Cache) -> bool {
    let graph = env.graph();
    env.block_on(async {
        match Disk::open_cached(env, kind, &graph, cache).await {
            Ok(disk) => {
                disk.close().await.expect("an open image can be closed");
                true
            }
            Err(error) if cache == Cache::None && error.errno() == libc::EINVAL => {
                skip(&format!("no direct I/O here: {error}"));
                false
            }
            Err(error) => panic!("{}: {error}", kind.name),
        }
    })
}

#[test]
fn random_requests_match_the_model() {
    let (engine, format, cache) = axes();
    let kind = kind(format);
    for seed in 0..2 {
        let Some(env) = env(engine) else { return };
        env.make(&kind);
        if !is_possible(&env, &kind, cache) {
            return;
        }
        let shape = Shape { reads: true, reopens: true, ..kind.shape(60) };
        let workload = Workload::new(seed, &shape);
        let model = RefCell::new(kind.model());
        let played = env.block_on(play(&env, &kind, cache, &workload, &model));
        assert_eq!(played, Ok(()), "{engine:?} {format:?} {cache:?} seed {seed}\n{workload}");
        if format == Format::Raw {
            continue;
        }
        let Some(img) = qemu_img() else { return };
        let out = env.qemu_check(&img, &kind, &Scratch::new());
        assert!(out.ok(), "{engine:?} {format:?} {cache:?} seed {seed}: {out:?}");
    }
}
