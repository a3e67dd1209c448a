//! The power goes at every write: afterwards the image checks, holds every flushed byte, and works on.

use std::cell::RefCell;

use bds_core::graph::Graph;
use bds_io::sim::CutMode;
use bds_io::{Sim, SimConfig};
use bds_testkit::{DiskModel, Scratch, Shape, Step, Workload, qemu_img};
use serde_json::json;

use super::rig::{Disk, Kind, World};
use super::seeds;

/// Survivors of which QEMU is asked its opinion: one in so many.
const ASK_QEMU_EVERY: u64 = 400;

/// What sweeping came to.
#[derive(Debug, Default)]
struct Sum {
    workloads: u64,
    cuts: u64,
    leaks: u64,
    stale_sectors: u64,
    dirty: u64,
    asked_qemu: u64,
}

/// Cuts the power at every write of `seed_count` workloads on each kind of image.
fn sweep(kinds: &[Kind], seed_count: u64, steps: usize) {
    let img = qemu_img();
    let scratch = Scratch::new();
    let mut sum = Sum::default();
    for kind in kinds {
        // A short write may stop inside a sector; a power cut never does.
        let base = Sim::new(7, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
        World::Sim(base.clone()).make(kind);
        for seed in seeds(seed_count) {
            let workload = Workload::new(seed, &kind.shape(steps));
            sum.workloads += 1;
            let first = writes_of(&base, kind, &workload, seed, 0);
            let all = writes_of(&base, kind, &workload, seed, workload.steps.len());
            for n in first..=all {
                let case = Case { base: &base, kind, workload: &workload, seed, n };
                let after = match case.run(&mut sum) {
                    Ok(after) => after,
                    Err(error) => panic!("{error}"),
                };
                let Some(img) = img.as_ref().filter(|_| sum.cuts % ASK_QEMU_EVERY == 0) else {
                    continue;
                };
                sum.asked_qemu += 1;
                let out = after.qemu_check(img, kind, &scratch);
                let is_fine = out.code == 0 || out.code == 3 || kind.is_lazy;
                assert!(is_fine, "{} seed {seed} cut {n}: {out:?}", kind.name);
            }
        }
    }
    #[expect(clippy::print_stdout, reason = "what was covered belongs into the log")]
    {
        println!("{sum:?}");
    }
}

/// Cuts the power at every write of one workload.
pub(crate) fn cut_at_every_write(kind: &Kind, workload: &Workload) {
    let base = Sim::new(7, SimConfig { short_io_rate: 0.0, ..SimConfig::default() });
    World::Sim(base.clone()).make(kind);
    let seed = workload.seed;
    let all = writes_of(&base, kind, workload, seed, workload.steps.len());
    for n in writes_of(&base, kind, workload, seed, 0)..=all {
        let case = Case { base: &base, kind, workload, seed, n };
        if let Err(error) = case.run(&mut Sum::default()) {
            panic!("{error}");
        }
    }
}

/// State-changing operations until so many steps are done.
fn writes_of(base: &Sim, kind: &Kind, workload: &Workload, seed: u64, steps: usize) -> u64 {
    let sim = base.fork(seed);
    let world = World::Sim(sim.clone());
    let graph = world.graph();
    let model = RefCell::new(kind.model());
    let done = world.block_on(async {
        let disk = Disk::open(&world, kind, &graph).await.map_err(|e| e.to_string())?;
        run(&disk, &workload.prefix(steps), &model, &RefCell::new(0)).await
    });
    if let Err(error) = done {
        panic!("{} seed {seed}: without any cut: {error}\n{workload}", kind.name);
    }
    sim.writes()
}

/// All steps; `reached` tells how far it came.
async fn run(
    disk: &Disk,
    workload: &Workload,
    model: &RefCell<DiskModel>,
    reached: &RefCell<usize>,
) -> Result<(), String> {
    for (number, step) in workload.steps.iter().enumerate() {
        *reached.borrow_mut() = number + 1;
        let Step::Requests(ops) = step else { continue };
        if let Some(error) = disk.requests(ops, model).await?.first() {
            return Err(format!("step {number}: {error}"));
        }
    }
    Ok(())
}

/// One cut.
struct Case<'a> {
    base: &'a Sim,
    kind: &'a Kind,
    workload: &'a Workload,
    seed: u64,
    /// The state-changing operation with which the power goes.
    n: u64,
}

impl Case<'_> {
    /// Runs the workload, cuts, and looks at what is left; the world in which it was looked at.
    fn run(&self, sum: &mut Sum) -> Result<World, String> {
        let Case { kind, seed, n, .. } = *self;
        sum.cuts += 1;
        let sim = self.base.fork(seed);
        let world = World::Sim(sim.clone());
        let graph = world.graph();
        let model = RefCell::new(kind.model());
        let reached = RefCell::new(0);
        let disk = world.block_on(Disk::open(&world, kind, &graph)).map_err(|e| e.to_string())?;
        sim.cut_after_writes(Some(n));
        let ended = sim.run_until_cut(run(&disk, self.workload, &model, &reached));
        // Inside the dead world: outside, the graph's end would look for another one to close its nodes in.
        sim.power_cut();
        let gone = sim.run_until_cut(async move {
            let _held = (disk, graph);
            std::future::pending::<()>().await;
        });
        assert!(gone.is_none(), "the power is gone");
        // The extremes in turn, and by chance.
        let modes = [
            CutMode::Random,
            CutMode::Reorder,
            CutMode::Tear,
            CutMode::LoseAll,
            CutMode::KeepAll,
            CutMode::InOrder,
        ];
        let mode = modes[usize::try_from((seed + n) % 6).expect("below six")];
        let blame = |error: String| {
            let steps = self.workload.prefix(*reached.borrow());
            format!(
                "{} seed {seed} cut {n} {mode:?}: {error}\n{}\n{steps}",
                kind.name,
                world.trace()
            )
        };
        if let Some(Err(error)) = ended {
            return Err(blame(error));
        }
        let after = World::Sim(sim.after_cut_by(seed ^ (n << 20), mode));
        look_after(&after, kind, model, seed ^ n, sum).map_err(blame)?;
        Ok(after)
    }
}

/// The image after the cut: it checks, holds what it must, and goes on working.
fn look_after(
    after: &World,
    kind: &Kind,
    model: RefCell<DiskModel>,
    seed: u64,
    sum: &mut Sum,
) -> Result<(), String> {
    let graph = after.graph();
    let is_dirty = after.block_on(async {
        let disk = Disk::look(after, kind, &graph).await.map_err(|e| format!("open: {e}"))?;
        let info = disk.backend.info().await.map_err(|e| format!("info: {e}"))?;
        if info.is_dirty && !kind.is_lazy {
            return Err("the dirty bit is set".to_owned());
        }
        if info.is_corrupt {
            return Err("the corrupt bit is set".to_owned());
        }
        // Behind the dirty bit refcounts may be anything: a repair settles them.
        if !info.is_dirty {
            sum.leaks += disk.check().await.map_err(|e| format!("after the cut: {e}"))?.1;
        }
        let survivors = disk.survivors(kind.cluster).await;
        {
            let mut model = model.borrow_mut();
            model.check_crash(disk.backend.len(), &survivors)?;
            sum.stale_sectors += model.stale_seen();
        }
        disk.close().await.map_err(|e| format!("close: {e}"))?;
        Ok(info.is_dirty)
    })?;
    if is_dirty {
        sum.dirty += 1;
        return Ok(());
    }
    let goes_on = after.block_on(go_on(after, kind, &graph, &model, seed));
    goes_on.map_err(|error| format!("going on after the cut: {error}"))
}

/// A few more requests, a clean close, and another check.
async fn go_on(
    after: &World,
    kind: &Kind,
    graph: &Graph,
    model: &RefCell<DiskModel>,
    seed: u64,
) -> Result<(), String> {
    let disk = Disk::open(after, kind, graph).await.map_err(|e| format!("open: {e}"))?;
    let shape = Shape { len: model.borrow().len(), batches: false, ..kind.shape(3) };
    run(&disk, &Workload::new(!seed, &shape), model, &RefCell::new(0)).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))?;
    let disk = Disk::look(after, kind, graph).await.map_err(|e| format!("open: {e}"))?;
    disk.check().await?;
    let survivors = disk.survivors(kind.cluster).await;
    {
        let mut model = model.borrow_mut();
        model.flushed();
        model.check_crash(disk.backend.len(), &survivors)?;
    }
    disk.close().await.map_err(|e| format!("close: {e}"))
}

/// Small clusters: tables and refcount structures grow within kilobytes.
fn small() -> Vec<Kind> {
    let q = |name| Kind::qcow2(name, 512).sized(512 * 160, 512 * 240);
    vec![
        q("512"),
        q("512-strict").strict(),
        q("512-rc64").create("refcount_bits", 64).strict(),
        q("512-rc1").create("refcount_bits", 1),
        q("512-tiny-cache").open("l2-cache-size", 1024).open("refcount-cache-size", 2048),
        q("512-v2").version_2(),
        q("512-backed").backed(60_000).strict(),
        q("512-data").with_data_file().strict(),
        q("512-zstd").create("compression_type", "zstd"),
    ]
}

fn larger() -> Vec<Kind> {
    let q = |name| Kind::qcow2(name, 4096).sized(4096 * 24, 4096 * 40);
    vec![
        q("4k"),
        q("4k-strict").strict(),
        q("4k-backed").backed(70_000).strict(),
        q("4k-data").with_data_file(),
        q("4k-data-backed").with_data_file().backed(70_000).strict(),
        q("4k-v2-backed").version_2().backed(200_000),
        // A small cache is written back in the background all the time.
        q("4k-tiny-cache").open("l2-cache-size", 8192).open("refcount-cache-size", 4096),
    ]
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_512() {
    sweep(&small(), 12, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_4k() {
    sweep(&larger(), 16, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_with_subclusters() {
    let q = |name| Kind::qcow2(name, 16384).extended().sized(16384 * 8, 16384 * 12);
    sweep(&[q("16k-ext"), q("16k-ext-backed").backed(90_000).strict()], 3, 9);
}

/// Reads write here: what is copied up must be durable before anything points at it, because nobody flushes for a read.
#[test]
fn flushed_bytes_survive_a_cut_at_every_write_of_a_copy_on_read() {
    let q = |kind: Kind| kind.backed(90_000).through(json!({"driver": "copy-on-read"}));
    let kinds = [
        q(Kind::qcow2("512-cor", 512).sized(512 * 160, 512 * 240)),
        q(Kind::qcow2("4k-v2-cor", 4096).version_2().sized(4096 * 24, 4096 * 40)),
        q(Kind::qcow2("4k-data-cor", 4096).with_data_file().sized(4096 * 24, 4096 * 40)),
        q(Kind::qcow2("16k-ext-cor", 16384).extended().sized(16384 * 8, 16384 * 12)),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_through_compress() {
    let q = |kind: Kind| kind.through(json!({"driver": "compress"}));
    let kinds = [
        q(Kind::qcow2("512-compress", 512).sized(512 * 160, 512 * 240)),
        q(Kind::qcow2("4k-compress", 4096).backed(70_000).sized(4096 * 24, 4096 * 40)),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_upon_preallocate() {
    let filter = json!({"driver": "preallocate", "prealloc-align": 8192, "prealloc-size": 20_000});
    let kinds = [
        Kind::qcow2("512-prealloc", 512).sized(512 * 160, 512 * 240).upon(filter.clone()),
        Kind::qcow2("4k-prealloc", 4096).sized(4096 * 24, 4096 * 40).upon(filter),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn lazy_refcounts_say_that_they_are_not_to_be_trusted() {
    sweep(
        &[Kind::qcow2("512-lazy", 512).lazy(), Kind::qcow2("4k-lazy", 4096).lazy().strict()],
        6,
        12,
    );
}
