//! Cuts the power at every write of a job under load, and right after its end: the disk that the
//! header leads to is one that may be there, and after the end it is the whole one.
//!
//! A sample by default; `BDS_TEST_BUDGET=full` makes 10,000 cuts of each type.

use std::cell::Cell;

use bds_core::graph::{Graph, NodeRef};
use bds_io::Sim;
use bds_io::sim::CutMode;
use bds_jobs::{Commit, CommitOptions, JobDriver, JobManager, Stream, StreamOptions};
use bds_testkit::{SECTOR, Step, Workload};

use crate::budget::{CRASH_POINTS, cut_power_holding, report};

use super::kit::{Chain, Layer, User, graph_on, is_full, run_job, sectors, world, writer};

const K: u64 = 1024;
const MODES: [CutMode; 6] = [
    CutMode::Random,
    CutMode::Reorder,
    CutMode::Tear,
    CutMode::LoseAll,
    CutMode::KeepAll,
    CutMode::InOrder,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    StreamAll,
    StreamToLow,
    StreamIntoMid,
    CommitIntoBase,
    CommitIntoLow,
}

impl What {
    async fn prepare(self, nodes: &[NodeRef]) -> Box<dyn JobDriver> {
        let stream = |device: &NodeRef| StreamOptions::new(device);
        let mid = Some(nodes[2].clone());
        let commit = CommitOptions { top: mid, ..CommitOptions::new(&nodes[3]) };
        let low = Some(nodes[1].clone());
        let job = match self {
            Self::StreamAll => Stream::prepare("j", stream(&nodes[3])).await,
            Self::StreamToLow => {
                Stream::prepare("j", StreamOptions { base: low, ..stream(&nodes[3]) }).await
            }
            Self::StreamIntoMid => Stream::prepare("j", stream(&nodes[2])).await,
            Self::CommitIntoBase => Commit::prepare("j", commit).await,
            Self::CommitIntoLow => {
                Commit::prepare("j", CommitOptions { base: low, ..commit }).await
            }
        };
        job.unwrap()
    }

    /// What the image that the job rewrote records before and after: its name, and these.
    fn records(self) -> (&'static str, Option<&'static str>, Option<&'static str>) {
        match self {
            Self::StreamAll => ("top", Some("mid"), None),
            Self::StreamToLow | Self::CommitIntoLow => ("top", Some("mid"), Some("low")),
            Self::StreamIntoMid => ("mid", Some("low"), None),
            Self::CommitIntoBase => ("top", Some("mid"), Some("base")),
        }
    }
}

/// Requests of whole sectors: a write inside a sector at the end of the file may be torn there.
fn workload(chain: &Chain, seed: u64) -> Workload {
    let mut workload = chain.workload(seed, 9);
    for step in &mut workload.steps {
        let Step::Requests(ops) = step else { continue };
        ops.retain(|op| op.range().is_none_or(|(at, len)| (at | len).is_multiple_of(SECTOR)));
    }
    workload
}

/// The whole of a run: open, start the job, write meanwhile. `ended` is set when the job has
/// ended.
async fn story(
    chain: &Chain,
    what: What,
    seed: u64,
    graph: &Graph,
    user: &User<'_>,
    ended: &Cell<bool>,
) {
    let jobs = JobManager::new(graph);
    let nodes: Vec<NodeRef> = chain.layers.iter().map(|l| graph.find(l.name).unwrap()).collect();
    let job = what.prepare(&nodes).await;
    drop(nodes);
    let workload = workload(chain, seed);
    let work = async {
        run_job(&jobs, "j", job).await.unwrap();
        ended.set(true);
    };
    let (played, ()) = futures_util::future::join(user.play(&workload), work).await;
    played.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{workload}"));
}

/// Runs until the write of this number, and checks what the modes leave. Returns whether the job
/// had ended, and the number of writes.
fn cut(
    base: &Sim,
    chain: &Chain,
    what: What,
    seed: u64,
    at: Option<u64>,
    modes: &[CutMode],
) -> (bool, u64) {
    let sim = base.fork(seed);
    let graph = graph_on(sim.fs());
    let nodes = sim.block_on(chain.open(&graph));
    let disk = writer(nodes.last().unwrap(), "user");
    drop(nodes);
    let model = chain.model();
    let ended = Cell::new(false);
    sim.cut_after_writes(at.map(|n| sim.writes() + n));
    let before = sim.writes();
    let user = User { disk: &disk, model: &model };
    let _cut = sim.run_until_cut(story(chain, what, seed, &graph, &user, &ended));
    let writes = sim.writes() - before;
    cut_power_holding(&sim, (disk, graph));
    for mode in modes {
        let after = sim.after_cut_by(seed ^ at.unwrap_or(0) << 16, *mode);
        let case = format!("{what:?} seed {seed} cut {at:?} {mode:?}");
        let top = after.block_on(chain.found(after.fs(), "top")).0;
        let checked = model.borrow().clone().check_crash(top.len() as u64, &sectors(&top));
        checked.unwrap_or_else(|error| panic!("{case}: {error}\n{}", workload(chain, seed)));
        let (image, old, new) = what.records();
        let (bytes, found) = after.block_on(chain.found(after.fs(), image));
        let is_new = found.as_deref() == new;
        assert!(is_new || !ended.get() && found.as_deref() == old, "{case}: it records {found:?}");
        if image == "mid" {
            assert!(bytes == chain.views[2], "{case}: the image shows something else");
        }
    }
    (ended.get(), writes)
}

/// The full tier takes seeds until `full_cuts` cuts are made.
fn sweep(layers: &[Layer], whats: &[What], usual_cuts: u64, usual_seeds: u64, full_cuts: u64) {
    let (mut cuts, mut after_end) = (0, 0);
    for seed in 0.. {
        if if is_full() { cuts >= full_cuts } else { seed >= usual_seeds } {
            break;
        }
        let base = world(seed);
        let chain = base.block_on(Chain::new(layers).make(base.fs(), seed));
        for what in whats {
            let (ended, writes) = cut(&base, &chain, *what, seed, None, &MODES);
            assert!(ended, "{what:?} seed {seed}: the job has not ended");
            after_end += 1;
            let step = if is_full() { 1 } else { (writes / usual_cuts).max(1) };
            let first = seed % step;
            for n in (first..writes).step_by(usize::try_from(step).unwrap()) {
                let mode = usize::try_from((seed + n) % 6).unwrap();
                let (ended, _) = cut(&base, &chain, *what, seed, Some(n), &MODES[mode..=mode]);
                after_end += u64::from(ended);
                cuts += 1;
            }
        }
    }
    assert!(cuts >= usual_cuts * usual_seeds && after_end > 0, "{cuts} {after_end}");
    report(&format!("{cuts} power cuts of {whats:?}"));
}

fn small() -> Vec<Layer> {
    vec![
        Layer::raw("base", 50 * K + 512),
        Layer::qcow2("low", 64 * K, 4096),
        Layer::qcow2("mid", 56 * K, 2048),
        Layer::qcow2("top", 72 * K, 4096),
    ]
}

fn old() -> Vec<Layer> {
    vec![
        Layer { version: 2, ..Layer::qcow2("base", 80 * K, 512) },
        Layer { version: 2, ..Layer::qcow2("low", 40 * K, 4096) },
        Layer { extended: true, ..Layer::qcow2("mid", 128 * K, 16384) },
        Layer { version: 2, ..Layer::qcow2("top", 90 * K, 1024) },
    ]
}

#[test]
fn a_stream_survives_a_cut_at_every_write() {
    let whats = [What::StreamAll, What::StreamToLow, What::StreamIntoMid];
    sweep(&small(), &whats, 25, 3, CRASH_POINTS * 2 / 3);
    sweep(&old(), &whats, 15, 2, CRASH_POINTS.div_ceil(3));
}

#[test]
fn a_commit_survives_a_cut_at_every_write() {
    let whats = [What::CommitIntoBase, What::CommitIntoLow];
    sweep(&small(), &whats, 25, 3, CRASH_POINTS * 2 / 3);
    sweep(&old(), &whats, 15, 2, CRASH_POINTS.div_ceil(3));
}
