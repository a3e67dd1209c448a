//! Runs one job beside a guest that writes, and prints what both cost as one line of JSON, for
//! `cargo xtask bench --only jobs`.
//!
//! ```text
//! jobs KIND DIR [rate=N] [depth=N] [latency=MS] [staging=MIB] [stall=MS] [direct=on]
//! ```
//!
//! | kind | images in DIR | job |
//! |---|---|---|
//! | `backup`, `mirror` | `src.qcow2`, `dst.qcow2` | full copy; the mirror completes when it is ready |
//! | `stream` | `top.qcow2` over `base.qcow2` | all of the base into the top |
//! | `commit` | `top.qcow2` over `mid.qcow2` over `base.qcow2` | the middle into the base |
//! | `active` | `mid.qcow2` over `base.qcow2` | the middle, which the guest writes to, into the base |
//! | `chain` | `layer1.qcow2` to the last, over `base.qcow2` | all below the last layer but one, and it, into the base |
//!
//! `rate`: 4-KiB writes a second at random offsets, by the clock, whether or not earlier ones have
//! ended; 0: as many as `depth` allows. `depth`: most writes in flight; 0: no guest. `latency`: the
//! image that is read (`backup`, `stream`) or written (`commit`) is a null device that takes so
//! long. The job counts as ended when its result is durable.
#![expect(clippy::print_stdout, reason = "the line is the interface to xtask")]

mod disks;
mod guest;
mod settings;

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bds_core::graph::{Graph, GraphConfig};
use bds_jobs::{JobHandle, JobManager, JobOptions, JobStatus};
use serde_json::{Value, json};

use disks::Prepared;
use guest::{GuestLoad, Phase};
use settings::Settings;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;
pub(crate) type Result<T> = std::result::Result<T, Failure>;

/// How long the guest writes before the job starts.
const ALONE: Duration = Duration::from_secs(2);
/// A mirror that is not ready by then is cancelled.
const READY_WITHIN: Duration = Duration::from_secs(15);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let settings = Settings::parse(&words)?;
    println!("{}", run(&settings)?);
    Ok(())
}

fn run(settings: &Settings) -> Result<Value> {
    let graph = Graph::new(GraphConfig::new(Arc::new(bds_drivers::registry())));
    let report = bds_io::block_on(measure(&graph, settings))?;
    bds_io::block_on(graph.shutdown()).check_leaks()?;
    Ok(report)
}

async fn measure(graph: &Graph, settings: &Settings) -> Result<Value> {
    let disks = disks::open(graph, settings).await?;
    let guest = GuestLoad::start(&disks.guest, settings)?;
    if guest.is_some() {
        bds_io::sleep(ALONE).await;
    }
    let manager = JobManager::new(graph);
    let begun = Begun::now();
    set_phase(guest.as_ref(), Phase::During);
    let Prepared { work, needs_complete } = disks::prepare(settings, &disks).await?;
    let job = manager.start(JobOptions::new("job0"), work).await?;
    let ready = match needs_complete {
        true => complete(&job, guest.as_ref()).await?,
        false => None,
    };
    let result = job.wait().await;
    let seconds = begun.at.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - begun.cpu;
    let is_cancelled = needs_complete && ready.is_none();
    if !is_cancelled {
        result?;
    }
    let load = guest.map(GuestLoad::stop).transpose()?;
    let len = disks.guest.len();
    drop(disks);
    for report in graph.reap().await {
        report.into_result()?;
    }
    Ok(json!({
        "seconds": seconds, "cpu_s": cpu, "peak_kib": peak_kib(), "len": len,
        "ready_s": ready, "is_cancelled": is_cancelled, "load": load,
    }))
}

/// Waits until the job is ready and completes it; returns the seconds until then. `None`: it was
/// not ready in time and is cancelled.
async fn complete(job: &JobHandle, guest: Option<&GuestLoad>) -> Result<Option<f64>> {
    let begun = Instant::now();
    while !job.status().is_ready() {
        if job.status().is_over() {
            return Ok(None);
        }
        if begun.elapsed() > READY_WITHIN {
            job.cancel(true)?;
            return Ok(None);
        }
        bds_io::sleep(Duration::from_millis(1)).await;
    }
    let ready = begun.elapsed().as_secs_f64();
    set_phase(guest, Phase::Pivot);
    match job.complete() {
        Err(error) if job.status() != JobStatus::Ready => Err(error.into()),
        result => result.map(|()| Some(ready)).map_err(Into::into),
    }
}

fn set_phase(guest: Option<&GuestLoad>, phase: Phase) {
    if let Some(guest) = guest {
        guest.set_phase(phase);
    }
}

/// When the job was begun, and the CPU time used by then.
struct Begun {
    at: Instant,
    cpu: f64,
}

impl Begun {
    fn now() -> Self {
        Self { at: Instant::now(), cpu: cpu_seconds() }
    }
}

/// User and system time of this process: the guest's is among it.
fn cpu_seconds() -> f64 {
    const TICKS_A_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The fields behind the name, which may hold anything: user is the 12th of them, system next.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>()
        / TICKS_A_SECOND
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}
