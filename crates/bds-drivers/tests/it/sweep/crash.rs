//! Cuts the power at every write: afterwards the image checks, holds every flushed byte, and goes
//! on working.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::time::Duration;

use bds_core::graph::Graph;
use bds_io::sim::CutMode;
use bds_io::{Sim, SimConfig};
use bds_testkit::{DiskModel, Op, Scratch, Shape, Step, Workload, pattern, qemu_img};
use serde_json::json;

use super::nearly_full::{self, Growth, Tables};
use super::{is_full, one_seed, seeds};
use crate::kit::{Disk, ImageKind, TestEnv, sim_with_image};

/// One of so many images after a cut is checked by QEMU.
const ASK_QEMU_EVERY: u64 = 400;

/// What happens to unflushed writes: the extremes, and at random.
const MODES: [CutMode; 6] = [
    CutMode::Random,
    CutMode::Reorder,
    CutMode::Tear,
    CutMode::LoseAll,
    CutMode::KeepAll,
    CutMode::InOrder,
];

/// How long a step without requests lasts: enough for background work.
const PAUSE: Duration = Duration::from_secs(1);

/// What a sweep covered.
#[derive(Debug, Default)]
struct Coverage {
    workloads: u64,
    cuts: u64,
    leaks: u64,
    stale_sectors: u64,
    dirty: u64,
    qemu_checks: u64,
    growth: Growth,
}

impl Coverage {
    /// Fails if the sweep cut almost nothing or never lost anything: it would prove nothing.
    fn check(&self) {
        if one_seed().is_some() {
            return;
        }
        assert!(self.cuts >= 8 * self.workloads, "{self:?}");
        assert!(self.leaks + self.dirty > 0, "no cut interrupted anything: {self:?}");
    }
}

/// Cuts the power at every write of `seed_count` workloads on each kind of image.
fn sweep(kinds: &[ImageKind], seed_count: u64, steps: usize) -> Coverage {
    let img = qemu_img();
    let scratch = Scratch::new();
    let mut coverage = Coverage::default();
    for kind in kinds {
        let base = base_of(kind);
        for seed in seeds(seed_count) {
            let workload = kind.workload(seed, steps);
            coverage.workloads += 1;
            let (first, all) = writes_of(&base, kind, &workload, &mut coverage.growth);
            for n in first..=all {
                // The modes in turn.
                let mode = &MODES[usize::try_from((seed + n) % 6).expect("below six")..][..1];
                let case = Case { base: &base, kind, workload: &workload, n, modes: mode };
                let after = match case.run(&mut coverage) {
                    Ok(after) => after,
                    Err(error) => panic!("{error}"),
                };
                let Some(img) = img.as_ref().filter(|_| coverage.cuts % ASK_QEMU_EVERY == 0) else {
                    continue;
                };
                coverage.qemu_checks += 1;
                let out = after.qemu_check(img, kind, &scratch);
                let is_fine = out.code == 0 || out.code == 3 || kind.is_lazy;
                assert!(is_fine, "{} seed {seed} cut {n}: {out:?}", kind.name);
            }
        }
    }
    #[expect(clippy::print_stdout, reason = "the coverage is logged")]
    {
        println!("{coverage:?}");
    }
    coverage.check();
    coverage
}

/// Cuts the power at every write of one workload.
pub(crate) fn cut_at_every_write(kind: &ImageKind, workload: &Workload) {
    let base = base_of(kind);
    let (first, all) = writes_of(&base, kind, workload, &mut Growth::default());
    cut_between(&base, kind, workload, first..=all, &MODES[..1]);
}

/// Cuts the power at some writes of one workload, and checks the result of each of these modes.
fn cut_between(
    base: &Sim,
    kind: &ImageKind,
    workload: &Workload,
    cuts: RangeInclusive<u64>,
    modes: &[CutMode],
) {
    for n in cuts {
        let case = Case { base, kind, workload, n, modes };
        if let Err(error) = case.run(&mut Coverage::default()) {
            panic!("{error}");
        }
    }
}

/// A disk with this image on it.
fn base_of(kind: &ImageKind) -> Sim {
    // A short write may stop inside a sector; a power cut never does.
    sim_with_image(7, SimConfig { short_io_rate: 0.0, ..SimConfig::default() }, kind)
}

/// Numbers of state-changing operations when the workload begins and when it ended without a cut;
/// adds the growth of tables.
fn writes_of(base: &Sim, kind: &ImageKind, workload: &Workload, growth: &mut Growth) -> (u64, u64) {
    let sim = base.fork(workload.seed);
    let env = TestEnv::Sim(sim.clone());
    let graph = env.graph();
    let model = RefCell::new(kind.model());
    let disk = env.block_on(Disk::open(&env, kind, &graph)).expect("it was just made");
    let first = sim.writes();
    let mut tables = Tables::of(&env, kind);
    for step in &workload.steps {
        let step = Workload { seed: workload.seed, steps: vec![step.clone()] };
        let done = env.block_on(run(&disk, &step, &model, &RefCell::new(0)));
        assert_eq!(done, Ok(()), "{} without any cut\n{workload}", kind.name);
        let now = Tables::of(&env, kind);
        growth.add(std::mem::replace(&mut tables, now), now);
    }
    (first, sim.writes())
}

/// Runs all steps; `reached` is the number of the last one that started.
async fn run(
    disk: &Disk,
    workload: &Workload,
    model: &RefCell<DiskModel>,
    reached: &RefCell<usize>,
) -> Result<(), String> {
    for (number, step) in workload.steps.iter().enumerate() {
        *reached.borrow_mut() = number + 1;
        let Step::Requests(ops) = step else { continue };
        if ops.is_empty() {
            bds_io::sleep(PAUSE).await;
        }
        if let Some(error) = disk.requests(ops, model).await?.first() {
            return Err(format!("step {number}: {error}"));
        }
    }
    Ok(())
}

/// One cut.
struct Case<'a> {
    base: &'a Sim,
    kind: &'a ImageKind,
    workload: &'a Workload,
    /// The state-changing operation at which the power is cut.
    n: u64,
    /// What happens to unflushed writes: each mode is checked.
    modes: &'a [CutMode],
}

impl Case<'_> {
    /// Runs the workload, cuts, and checks the image; returns the environment of the last check.
    fn run(&self, coverage: &mut Coverage) -> Result<TestEnv, String> {
        let Case { kind, n, .. } = *self;
        let seed = self.workload.seed;
        coverage.cuts += 1;
        let sim = self.base.fork(seed);
        let env = TestEnv::Sim(sim.clone());
        let graph = env.graph();
        let model = RefCell::new(kind.model());
        let reached = RefCell::new(0);
        let disk = env.block_on(Disk::open(&env, kind, &graph)).map_err(|e| e.to_string())?;
        sim.cut_after_writes(Some(n));
        let ended = sim.run_until_cut(run(&disk, self.workload, &model, &reached));
        // On the disk without power: outside of it, dropping the graph would look for a Context to
        // close its nodes in.
        sim.power_cut();
        let gone = sim.run_until_cut(async move {
            let _held = (disk, graph);
            std::future::pending::<()>().await;
        });
        assert!(gone.is_none(), "the power is gone");
        let blame = |error: String| {
            let steps = self.workload.prefix(*reached.borrow());
            format!("{} seed {seed} cut {n} {error}\n{}\n{steps}", kind.name, env.trace())
        };
        if let Some(Err(error)) = ended {
            return Err(blame(error));
        }
        let mut last = None;
        for mode in self.modes {
            let after = TestEnv::Sim(sim.after_cut_by(seed ^ (n << 20), *mode));
            check_after_cut(&after, kind, model.clone(), seed ^ n, coverage)
                .map_err(|error| blame(format!("{mode:?}: {error}")))?;
            last = Some(after);
        }
        Ok(last.expect("there is at least one mode"))
    }
}

/// Checks the image after the cut: it checks, holds what it must, and goes on working.
fn check_after_cut(
    after: &TestEnv,
    kind: &ImageKind,
    model: RefCell<DiskModel>,
    seed: u64,
    coverage: &mut Coverage,
) -> Result<(), String> {
    let graph = after.graph();
    let is_dirty = after.block_on(async {
        let disk =
            Disk::open_read_only(after, kind, &graph).await.map_err(|e| format!("open: {e}"))?;
        let info = disk.backend.info().await.map_err(|e| format!("info: {e}"))?;
        if info.is_dirty && !kind.is_lazy {
            return Err("the dirty bit is set".to_owned());
        }
        if info.is_corrupt {
            return Err("the corrupt bit is set".to_owned());
        }
        // Behind the dirty bit refcounts may be anything: a repair fixes them.
        if !info.is_dirty {
            coverage.leaks += disk.check().await.map_err(|e| format!("after the cut: {e}"))?.1;
        }
        let survivors = disk.survivors(kind.cluster).await;
        {
            let mut model = model.borrow_mut();
            model.check_crash(disk.backend.len(), &survivors)?;
            coverage.stale_sectors += model.stale_seen();
        }
        disk.close().await.map_err(|e| format!("close: {e}"))?;
        Ok(info.is_dirty)
    })?;
    if is_dirty {
        coverage.dirty += 1;
        return Ok(());
    }
    let goes_on = after.block_on(go_on(after, kind, &graph, &model, seed));
    goes_on.map_err(|error| format!("going on after the cut: {error}"))
}

/// A few more requests, a clean close, and another check.
async fn go_on(
    after: &TestEnv,
    kind: &ImageKind,
    graph: &Graph,
    model: &RefCell<DiskModel>,
    seed: u64,
) -> Result<(), String> {
    let disk = Disk::open(after, kind, graph).await.map_err(|e| format!("open: {e}"))?;
    let shape = Shape { len: model.borrow().len(), batches: false, ..kind.shape(3) };
    run(&disk, &Workload::new(!seed, &shape), model, &RefCell::new(0)).await?;
    disk.close().await.map_err(|e| format!("close: {e}"))?;
    let disk = Disk::open_read_only(after, kind, graph).await.map_err(|e| format!("open: {e}"))?;
    disk.check().await?;
    let survivors = disk.survivors(kind.cluster).await;
    {
        let mut model = model.borrow_mut();
        model.flushed();
        model.check_crash(disk.backend.len(), &survivors)?;
    }
    disk.close().await.map_err(|e| format!("close: {e}"))
}

/// Small clusters: a few tables within kilobytes. For tables that grow see `nearly_full.rs`.
fn small() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 512).sized(512 * 160, 512 * 240);
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

fn larger() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 4096).sized(4096 * 24, 4096 * 40);
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
    let q = |name| ImageKind::qcow2(name, 16384).extended().sized(16384 * 8, 16384 * 12);
    sweep(&[q("16k-ext"), q("16k-ext-backed").backed(90_000).strict()], 3, 9);
}

/// Reads write here: copied data must be durable before anything points at it, because no flush
/// follows a read.
#[test]
fn flushed_bytes_survive_a_cut_at_every_write_of_a_copy_on_read() {
    let q = |kind: ImageKind| kind.backed(90_000).through(json!({"driver": "copy-on-read"}));
    let kinds = [
        q(ImageKind::qcow2("512-cor", 512).sized(512 * 160, 512 * 240)),
        q(ImageKind::qcow2("4k-v2-cor", 4096).version_2().sized(4096 * 24, 4096 * 40)),
        q(ImageKind::qcow2("4k-data-cor", 4096).with_data_file().sized(4096 * 24, 4096 * 40)),
        q(ImageKind::qcow2("16k-ext-cor", 16384).extended().sized(16384 * 8, 16384 * 12)),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_through_compress() {
    let q = |kind: ImageKind| kind.through(json!({"driver": "compress"}));
    let kinds = [
        q(ImageKind::qcow2("512-compress", 512).sized(512 * 160, 512 * 240)),
        q(ImageKind::qcow2("4k-compress", 4096).backed(70_000).sized(4096 * 24, 4096 * 40)),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn flushed_bytes_survive_a_cut_at_every_write_upon_preallocate() {
    let filter = json!({"driver": "preallocate", "prealloc-align": 8192, "prealloc-size": 20_000});
    let kinds = [
        ImageKind::qcow2("512-prealloc", 512).sized(512 * 160, 512 * 240).upon(filter.clone()),
        ImageKind::qcow2("4k-prealloc", 4096).sized(4096 * 24, 4096 * 40).upon(filter),
    ];
    sweep(&kinds, 6, 9);
}

#[test]
fn lazy_refcounts_leave_the_dirty_bit_after_a_cut() {
    let kinds = [
        ImageKind::qcow2("512-lazy", 512).lazy(),
        ImageKind::qcow2("4k-lazy", 4096).lazy().strict(),
    ];
    let coverage = sweep(&kinds, 6, 12);
    assert!(one_seed().is_some() || coverage.dirty > 0, "{coverage:?}");
}

/// New refcount blocks, and a moved L1 table: rules O5 and O6.
#[test]
fn flushed_bytes_survive_a_cut_at_every_write_of_a_nearly_full_image() {
    let kinds = nearly_full::blocks();
    // The fullest grow for certain; all of them take too long for the default run.
    let kinds = if is_full() { &kinds[..] } else { &kinds[4..] };
    let coverage = sweep(kinds, 4, 9);
    let grown = sweep(&[nearly_full::l1("512-l1")], 4, 2);
    if one_seed().is_none() {
        assert!(coverage.growth.new_blocks >= 4, "{coverage:?}");
        assert!(grown.growth.moved_l1 >= 4, "{grown:?}");
    }
}

/// A moved refcount table: rule O7.
#[test]
fn flushed_bytes_survive_a_cut_at_every_write_that_moves_the_refcount_table() {
    let kind = nearly_full::table("512-rc64-table");
    let base = base_of(&kind);
    for seed in seeds(1) {
        let mut growth = Growth::default();
        let workload = kind.workload(seed, 0);
        let (first, all) = writes_of(&base, &kind, &workload, &mut growth);
        assert_eq!((growth.moved_tables, growth.moved_l1), (1, 1), "seed {seed}: {growth:?}");
        cut_between(&base, &kind, &workload, first..=all, &MODES[..3]);
    }
}

fn write(stamp: u64, at: u64, len: usize) -> Op {
    Op::Write { at, bytes: pattern(stamp, at, len).into(), fua: false }
}

/// Rule O2: so many freed runs that they are released before a flush request still wait for a flush
/// of the driver's own.
#[test]
fn clusters_freed_without_a_flush_request_survive_a_cut() {
    let kind = nearly_full::in_pieces("512-in-pieces");
    let base = base_of(&kind);
    let start = kind.len - kind.fill;
    let len = usize::try_from(start / 4).expect("small");
    for seed in seeds(2) {
        let discard = vec![Op::Discard { at: start, len: kind.fill }];
        let writes = (0..4).map(|n| vec![write(seed + n, start / 4 * n, len)]);
        let steps = [discard, Vec::new()].into_iter().chain(writes).map(Step::Requests).collect();
        let workload = Workload { seed, steps };
        let (_, first) = writes_of(&base, &kind, &workload.prefix(2), &mut Growth::default());
        let (_, all) = writes_of(&base, &kind, &workload, &mut Growth::default());
        assert!(
            reuses_before_a_flush(&base, &kind, &workload),
            "seed {seed}: no freed cluster was reused"
        );
        cut_between(&base, &kind, &workload, first..=all, &MODES[..3]);
    }
}

/// Do most writes after the first step go to clusters that the first has freed, in a workload
/// without a flush?
fn reuses_before_a_flush(base: &Sim, kind: &ImageKind, workload: &Workload) -> bool {
    let sim = base.fork(workload.seed);
    let env = TestEnv::Sim(sim.clone());
    let graph = env.graph();
    let model = RefCell::new(kind.model());
    let before = sim.snapshot_file(env.path("disk")).len();
    let done = env.block_on(async {
        let disk = Disk::open(&env, kind, &graph).await.map_err(|e| e.to_string())?;
        run(&disk, workload, &model, &RefCell::new(0)).await
    });
    assert_eq!(done, Ok(()), "{workload}");
    let grown = sim.snapshot_file(env.path("disk")).len() - before;
    let written = kind.len - kind.fill;
    (grown as u64) < written / 2
}

/// Rule O4: a new L2 table at the end of the file is in the file before the L1 entry that points at
/// it.
#[test]
fn a_table_of_zeros_at_the_end_of_the_file_survives_a_cut() {
    let kind = ImageKind::qcow2("512-tables-of-zeros", 512).sized(512 * 64 * 4, 512 * 64 * 4);
    for seed in seeds(4) {
        let steps = (0..4).flat_map(|table| {
            let zero =
                Op::Zero { at: 512 * (64 * table + seed), len: 512, may_unmap: false, fua: false };
            [vec![zero], vec![Op::Flush]].map(Step::Requests)
        });
        cut_at_every_write(&kind, &Workload { seed, steps: steps.collect() });
    }
}

/// Rules O1, O5: a flush covers what was written before it began, and not what a concurrent growth
/// writes back.
#[test]
fn growth_concurrent_with_a_flush_survives_a_cut() {
    let kind = nearly_full::l1("512-l1-beside-a-flush");
    let base = base_of(&kind);
    let mut growth = Growth::default();
    for seed in seeds(4) {
        let rounds = (0..3).flat_map(|round| {
            // Freed clusters are what a flush flushes for; nothing here has data that links would
            // wait for.
            let discard = Op::Discard { at: kind.len - 512 * 20 * (round + 1), len: 512 * 3 };
            [vec![discard], vec![Op::Flush, Op::Grow { len: kind.len + 512 * 64 * (round + 1) }]]
        });
        let workload = Workload { seed, steps: rounds.map(Step::Requests).collect() };
        let (first, all) = writes_of(&base, &kind, &workload, &mut growth);
        cut_between(&base, &kind, &workload, first..=all, &MODES[..2]);
    }
    assert!(one_seed().is_some() || growth.moved_l1 >= 12, "{growth:?}");
}
