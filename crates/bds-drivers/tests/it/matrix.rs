//! Runs one cell of the test matrix: an engine, a format and a cache mode (see `xtask/matrix.toml`).

use std::cell::RefCell;

use bds_io::{EngineKind, Sim, SimConfig};
use bds_testkit::{Cache, Engine, Format, Scratch, Shape, Workload, axes, qemu_img, skip};

use crate::sweep::rig::{Disk, Kind, World, play};

fn kind(format: Format) -> Kind {
    let q = |name| Kind::qcow2(name, 65536).sized(65536 * 20, 65536 * 30);
    match format {
        Format::Raw => Kind::raw("raw"),
        Format::Qcow2 => q("qcow2"),
        Format::Qcow2V2 => q("qcow2-v2").version_2(),
        Format::Qcow2Ext => q("qcow2-ext").extended(),
        Format::Qcow2Data => q("qcow2-data").with_data_file(),
    }
}

/// The environment of this engine; `None` after a skip.
fn world(engine: Engine) -> Option<World> {
    let wanted = match engine {
        Engine::Sim => return Some(World::Sim(Sim::new(11, SimConfig::default()))),
        Engine::Uring => EngineKind::Uring,
        Engine::Pool => EngineKind::Pool,
    };
    match World::host(wanted) {
        Ok(world) => Some(world),
        Err(error) => {
            skip(&format!("no {engine:?} engine here: {error}"));
            None
        }
    }
}

/// Can images be opened with this cache mode? A file system without O_DIRECT cannot run the cells of cache=none.
fn is_possible(world: &World, kind: &Kind, cache: Cache) -> bool {
    let graph = world.graph();
    world.block_on(async {
        match Disk::open_cached(world, kind, &graph, cache).await {
            Ok(disk) => {
                disk.close().await.expect("what opens closes");
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
fn random_requests_come_out_right() {
    let (engine, format, cache) = axes();
    let kind = kind(format);
    for seed in 0..2 {
        let Some(world) = world(engine) else { return };
        world.make(&kind);
        if !is_possible(&world, &kind, cache) {
            return;
        }
        let shape = Shape { reads: true, reopens: true, ..kind.shape(60) };
        let workload = Workload::new(seed, &shape);
        let model = RefCell::new(kind.model());
        let played = world.block_on(play(&world, &kind, cache, &workload, &model));
        assert_eq!(played, Ok(()), "{engine:?} {format:?} {cache:?} seed {seed}\n{workload}");
        if format == Format::Raw {
            continue;
        }
        let Some(img) = qemu_img() else { return };
        let out = world.qemu_check(&img, &kind, &Scratch::new());
        assert!(out.ok(), "{engine:?} {format:?} {cache:?} seed {seed}: {out:?}");
    }
}
