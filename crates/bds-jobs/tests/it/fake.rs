//! A graph in a simulated world, a job that does what a test says, and the trace of its events.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bds_core::driver::BoxFuture;
use bds_core::graph::{Change, Graph, GraphConfig};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Sim, SimConfig};
use bds_jobs::{JobContext, JobDriver, JobEvents, JobManager, JobOptions, JobType, Outcome};

/// A graph without nodes in the world, and its jobs.
pub(crate) fn manager(sim: &Sim) -> JobManager {
    let mut config = GraphConfig::new(Arc::new(bds_drivers::registry()));
    config.fs = sim.fs();
    JobManager::new(&Graph::new(config))
}

pub(crate) fn calm(seed: u64) -> Sim {
    Sim::new(seed, SimConfig::calm())
}

/// A part of a fake job's life.
pub(crate) type Part = Box<dyn for<'a> FnMut(&'a JobContext) -> BoxFuture<'a, Result<()>> + Send>;

/// Lets the compiler see the signature of a closure.
pub(crate) fn part<F>(part: F) -> Part
where
    F: for<'a> FnMut(&'a JobContext) -> BoxFuture<'a, Result<()>> + Send + 'static,
{
    Box::new(part)
}

/// A part that does nothing.
pub(crate) fn nothing() -> Part {
    part(|_| Box::pin(async { Ok(()) }))
}

/// A part that stops at pause points until it is dropped.
pub(crate) fn endless() -> Part {
    part(|ctx| {
        Box::pin(async {
            loop {
                ctx.pause_point().await;
                bds_io::sleep(Duration::from_millis(1)).await;
            }
        })
    })
}

/// A part that is ready and ends when it is completed or cancelled softly.
pub(crate) fn mirror() -> Part {
    part(|ctx| {
        Box::pin(async {
            ctx.pause_point().await;
            ctx.ready().await;
            loop {
                ctx.pause_point().await;
                if ctx.complete_requested() || ctx.soft_cancel_requested() {
                    return Ok(());
                }
                bds_io::sleep(Duration::from_millis(1)).await;
            }
        })
    })
}

/// A part that fails.
pub(crate) fn fails(words: &'static str) -> Part {
    Box::new(move |_| Box::pin(async move { Err(Error::new(ErrorKind::Io, words)) }))
}

/// What was called, and with what outcome; shared with the test.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

/// A job made of parts.
pub(crate) struct Fake {
    pub(crate) job_type: JobType,
    pub(crate) run: Part,
    pub(crate) plan: Part,
    pub(crate) retire: Part,
    pub(crate) is_mirror: bool,
    pub(crate) log: Log,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self {
            job_type: JobType::Backup,
            run: nothing(),
            plan: nothing(),
            retire: nothing(),
            is_mirror: false,
            log: Log::default(),
        }
    }

    pub(crate) fn running(run: Part) -> Self {
        Self { run, ..Self::new() }
    }
}

impl JobDriver for Fake {
    fn job_type(&self) -> JobType {
        self.job_type
    }

    fn run<'a>(&'a mut self, ctx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        (self.run)(ctx)
    }

    fn plan<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        change: Change,
    ) -> BoxFuture<'a, Result<Change>> {
        self.log.lock().expect("no thread panics").push(format!("plan {}", ctx.id()));
        Box::pin(async move { (self.plan)(ctx).await.map(|()| change) })
    }

    fn retire<'a>(
        &'a mut self,
        ctx: &'a JobContext,
        outcome: Outcome<'a>,
    ) -> BoxFuture<'a, Result<()>> {
        let words = match outcome {
            Outcome::Committed => "committed".to_owned(),
            Outcome::Aborted(error) => error.to_string(),
        };
        self.log.lock().expect("no thread panics").push(format!("retire {}: {words}", ctx.id()));
        (self.retire)(ctx)
    }

    fn supports_complete(&self) -> bool {
        self.is_mirror
    }

    fn supports_soft_cancel(&self) -> bool {
        self.is_mirror
    }
}

/// Options of a job that waits to be finalized and dismissed.
pub(crate) fn manual(id: &str) -> JobOptions {
    JobOptions { auto_finalize: false, auto_dismiss: false, ..JobOptions::new(id) }
}

/// Runs a test of one manager in a calm world, then all that is left, and checks that the jobs of
/// the manager left nothing behind.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(JobManager) -> F) {
    let sim = calm(1);
    let jobs = manager(&sim);
    sim.block_on(test(jobs.clone()));
    sim.run_until_idle();
    sim.block_on(async { jobs.graph().shutdown().await.check_leaks() }).expect("no leak");
}

/// Waits until all that is ready has run.
pub(crate) async fn settle() {
    bds_io::sleep(Duration::from_millis(10)).await;
}

/// The events so far in short: `id status`, and names in capitals.
pub(crate) fn trace(events: &mut JobEvents) -> Vec<String> {
    let mut lines = Vec::new();
    while let Some(event) = events.try_next() {
        let json = event.to_json();
        let data = &json["data"];
        let id = event.id().unwrap_or_default().to_owned();
        let mut line = match data["status"].as_str() {
            Some(status) => format!("{id} {status}"),
            None => format!("{id} {}", event.name().trim_start_matches("BLOCK_JOB_")),
        };
        if let Some(error) = data["error"].as_str() {
            line += &format!(": {error}");
        }
        lines.push(line);
    }
    lines
}
