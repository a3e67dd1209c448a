//! Fails every n-th I/O: the error reaches the caller unchanged, later requests work, nothing
//! flushed is lost.

use std::cell::RefCell;

use bds_io::sim::{CutMode, Fault, OpMask};
use bds_io::{Sim, SimConfig};
use bds_testkit::{DiskModel, Op, Step, Workload};
use serde_json::json;

use super::nearly_full::{self, Growth, Tables};
use super::{is_full, one_seed, seeds};
use crate::kit::{Disk, ImageKind, TestEnv, sim_with_image};

/// One failing operation, or all from that one on.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: u64,
    errno: i32,
    is_sticky: bool,
}

/// Result of a run with a fault.
#[derive(Default)]
struct FaultOutcome {
    /// Requests that failed, with their errno.
    errors: Vec<String>,
    /// A flush or close failed: bytes that were not flushed before may be lost.
    has_lost_flush: bool,
}

fn kinds() -> Vec<ImageKind> {
    let q = |name| ImageKind::qcow2(name, 512).sized(512 * 160, 512 * 240);
    vec![
        nearly_full::growing("512-rc64-full-growing"),
        q("512"),
        q("512-rc64-backed").create("refcount_bits", 64).backed(50_000).strict(),
        q("512-tiny-cache").open("l2-cache-size", 1024).open("refcount-cache-size", 2048),
        ImageKind::qcow2("4k-data", 4096).with_data_file().sized(4096 * 24, 4096 * 40),
        ImageKind::qcow2("16k-ext", 16384).extended().sized(16384 * 8, 16384 * 12),
        q("512-copy-on-read").backed(50_000).through(json!({"driver": "copy-on-read"})),
        q("512-preallocate").upon(
            json!({"driver": "preallocate", "prealloc-align": 8192, "prealloc-size": 20_000}),
        ),
        q("512-copy-before-write").sized(512 * 160, 512 * 160).through(json!({
            "driver": "copy-before-write", "target": {"driver": "mem", "size": 512 * 160}
        })),
        q("512-staged").sized(512 * 160, 512 * 160).through(json!({
            "driver": "copy-before-write", "target": {"driver": "mem", "size": 512 * 160},
            "staging-size": 65536
        })),
        q("512-compress").backed(50_000).through(json!({"driver": "compress"})),
    ]
}

/// Runs the workload whatever fails.
async fn run_with_faults(
    disk: &Disk,
    workload: &Workload,
    model: &RefCell<DiskModel>,
    case: Case,
    outcome: &mut FaultOutcome,
) -> Result<(), String> {
    for (number, step) in workload.steps.iter().enumerate() {
        let Step::Requests(ops) = step else { continue };
        // The disk may have failed to grow.
        let len = disk.backend.len();
        let fits = |op: &&Op| op.range().is_none_or(|(at, op_len)| at + op_len <= len);
        let ops: Vec<Op> = ops.iter().filter(fits).cloned().collect();
        for error in disk.requests(&ops, model).await.map_err(|e| format!("step {number}: {e}"))? {
            if error.errno() != case.errno {
                return Err(format!("step {number}: errno {} became {error}", case.errno));
            }
            outcome.has_lost_flush |= ops.iter().any(|op| {
                // Growing flushes too.
                let is_fua = matches!(op, Op::Write { fua: true, .. } | Op::Zero { fua: true, .. });
                is_fua || matches!(op, Op::Flush | Op::Grow { .. })
            });
            outcome.errors.push(format!("step {number}: {error}"));
        }
    }
    Ok(())
}

fn run(
    base: &Sim,
    kind: &ImageKind,
    workload: &Workload,
    case: Case,
) -> Result<FaultOutcome, String> {
    let sim = base.fork(workload.seed);
    let env = TestEnv::Sim(sim.clone());
    let graph = env.graph();
    let model = RefCell::new(kind.model());
    let mut outcome = FaultOutcome::default();
    let disk = env.block_on(Disk::open(&env, kind, &graph)).map_err(|e| e.to_string())?;
    // A failed write may stop inside an entry. Writing it again repairs that, so only where the
    // disk works again.
    let fault = if case.is_sticky { Fault::sticky(case.errno) } else { Fault::once(case.errno) };
    let is_cut = case.n % 2 == 1;
    sim.fail_nth(case.n, if case.is_sticky || is_cut { fault } else { fault.partially() });
    env.block_on(run_with_faults(&disk, workload, &model, case, &mut outcome))?;
    sim.clear_faults();
    // The disk works again: so do reads, and everything written is there.
    match env.block_on(disk.compare(&model)) {
        // A read that must copy does not go on where nothing can be written any more.
        Err(e) if kind.above.is_some() && e.contains("an earlier flush failed") => {
            outcome.has_lost_flush = true;
        }
        seen => seen.map_err(|e| format!("afterwards: {e}"))?,
    }
    if is_cut {
        let after = TestEnv::Sim(sim.after_cut_by(case.n, CutMode::Random));
        check_disk(&after, kind, &model, true).map_err(|e| format!("after a cut: {e}"))?;
        return Ok(outcome);
    }
    if let Err(error) = env.block_on(disk.close()) {
        outcome.has_lost_flush = true;
        if error.errno() != case.errno {
            return Err(format!("close: errno {} became {error}", case.errno));
        }
        outcome.errors.push(format!("close: {error}"));
    }
    let lost = outcome.has_lost_flush;
    check_disk(&env, kind, &model, lost).map_err(|e| format!("opened again: {e}"))?;
    Ok(outcome)
}

/// Checks the image, and compares it: after a cut, or a flush that failed, only with what was
/// flushed before.
fn check_disk(
    env: &TestEnv,
    kind: &ImageKind,
    model: &RefCell<DiskModel>,
    is_cut: bool,
) -> Result<(), String> {
    let graph = env.graph();
    env.block_on(async {
        let disk =
            Disk::open_read_only(env, kind, &graph).await.map_err(|e| format!("open: {e}"))?;
        disk.check().await?;
        if is_cut {
            let survivors = disk.survivors(kind.cluster).await;
            model.borrow_mut().check_crash(disk.backend.len(), &survivors)?;
        } else {
            disk.compare(model).await?;
        }
        disk.close().await.map_err(|e| format!("close: {e}"))
    })
}

/// Number of awaited operations of the workload without any fault; adds the growth of tables.
fn ops_of(base: &Sim, kind: &ImageKind, workload: &Workload, growth: &mut Growth) -> u64 {
    let sim = base.fork(workload.seed);
    let env = TestEnv::Sim(sim.clone());
    let graph = env.graph();
    let model = RefCell::new(kind.model());
    let disk = env.block_on(Disk::open(&env, kind, &graph)).expect("it was just made");
    let (before, tables) = (sim.ops(), Tables::of(&env, kind));
    let case = Case { n: 0, errno: 0, is_sticky: false };
    let done =
        env.block_on(run_with_faults(&disk, workload, &model, case, &mut FaultOutcome::default()));
    assert_eq!(done, Ok(()), "{workload}");
    env.block_on(disk.close()).expect("nothing fails");
    growth.add(tables, Tables::of(&env, kind));
    sim.ops() - before
}

/// Parameters of a sweep.
struct SweepPlan<'a> {
    errnos: &'a [i32],
    is_sticky: bool,
    seeds: u64,
    /// Random steps of a workload.
    steps: usize,
    /// Every so many-th operation fails.
    stride: usize,
}

fn sweep(kinds: &[ImageKind], plan: &SweepPlan<'_>) -> Growth {
    let (mut runs, mut reported, mut silent) = (0, 0, 0);
    let mut growth = Growth::default();
    for kind in kinds {
        let base = sim_with_image(3, SimConfig::calm(), kind);
        for seed in seeds(plan.seeds) {
            let workload = kind.workload(seed, plan.steps);
            for n in (0..ops_of(&base, kind, &workload, &mut growth)).step_by(plan.stride) {
                for errno in plan.errnos {
                    let case = Case { n, errno: *errno, is_sticky: plan.is_sticky };
                    runs += 1;
                    match run(&base, kind, &workload, case) {
                        Ok(run) if run.errors.is_empty() => silent += 1,
                        Ok(_) => reported += 1,
                        Err(e) => panic!("{} seed {seed} {case:?}: {e}\n{workload}", kind.name),
                    }
                }
            }
        }
    }
    #[expect(clippy::print_stdout, reason = "the coverage is logged")]
    {
        println!("{runs} runs: {reported} reported an error, {silent} did not");
    }
    // Discards are advisory and metadata is written again; most failures must reach a caller all
    // the same.
    assert!(reported > silent, "reported {reported}, silent {silent}");
    growth
}

/// New refcount blocks and moved tables are among what fails.
fn check(growth: Growth) {
    let has_grown = growth.new_blocks > 0 && growth.moved_l1 > 0;
    assert!(one_seed().is_some() || has_grown, "{growth:?}");
}

const BOTH: [i32; 2] = [libc::EIO, libc::ENOSPC];

#[test]
fn each_operation_fails_once() {
    let plan = SweepPlan { errnos: &BOTH, is_sticky: false, seeds: 2, steps: 8, stride: 1 };
    check(sweep(&kinds(), &plan));
}

#[test]
fn all_operations_fail_from_some_point_on() {
    let plan = SweepPlan { errnos: &BOTH, is_sticky: true, seeds: 1, steps: 8, stride: 1 };
    check(sweep(&kinds(), &plan));
}

/// A table that is being moved is not lost when a step fails.
#[test]
fn operations_that_move_the_refcount_table_fail_once() {
    let stride = if is_full() { 1 } else { 3 };
    let plan = SweepPlan { errnos: &[libc::EIO], is_sticky: false, seeds: 1, steps: 0, stride };
    let growth = sweep(&[nearly_full::table("512-rc64-table")], &plan);
    assert!(one_seed().is_some() || growth.moved_tables > 0, "{growth:?}");
}

/// A full disk refuses requests that allocate, and serves the others.
#[test]
fn a_full_disk_reports_enospc() {
    for kind in kinds() {
        let base = sim_with_image(3, SimConfig::calm(), &kind);
        let sim = base.fork(1);
        let env = TestEnv::Sim(sim.clone());
        let graph = env.graph();
        let model = RefCell::new(kind.model());
        let disk = env.block_on(Disk::open(&env, &kind, &graph)).expect("it was just made");
        sim.fail_nth(0, Fault::sticky(libc::ENOSPC).on(OpMask::WRITE));
        let workload = kind.workload(1, 6);
        let case = Case { n: 0, errno: libc::ENOSPC, is_sticky: true };
        let mut outcome = FaultOutcome::default();
        let done = env.block_on(run_with_faults(&disk, &workload, &model, case, &mut outcome));
        assert_eq!(done, Ok(()), "{}", kind.name);
        assert!(!outcome.errors.is_empty(), "{}: a failed write returned no error", kind.name);
        sim.clear_faults();
        env.block_on(disk.backend.flush()).expect("there is space again");
        env.block_on(disk.compare(&model)).expect("what was written is there");
        env.block_on(disk.close()).expect("there is space again");
        check_disk(&env, &kind, &model, false).expect("nothing is lost");
    }
}
