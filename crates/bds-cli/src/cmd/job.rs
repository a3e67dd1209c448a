//! Runs a job on closed images, in the foreground: progress, events, interrupts.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bds_core::graph::{Graph, NodeRef, walk};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Context, ContextOptions};
use bds_jobs::{JobDriver, JobEvent, JobEvents, JobHandle, JobManager, JobOptions, RecordUse};
use futures_util::future::{Either, select};
use serde_json::{Value, json};

use crate::args::{JobDisplay, Output};
use crate::image;
use crate::interrupt::Interrupt;
use crate::printer;
use crate::progress::Progress;
use crate::rates::{Meter, Rates};

/// The id of the one job that a command runs.
pub(crate) const ID: &str = "bds";
/// How often progress is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often progress becomes a line of JSON.
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// Name of the event that tells progress, if it is asked for. QAPI has none.
const PROGRESS_EVENT: &str = "BDS_JOB_PROGRESS";

/// How a job runs and what is shown of it.
#[derive(Debug)]
pub(crate) struct Settings {
    shows_progress: bool,
    prints_events: bool,
    /// Progress is printed between the events.
    prints_progress: bool,
    is_quiet: bool,
    speed: u64,
}

/// What is done with a job that is ready, and goes on until a command ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WhenReady {
    /// There is no such moment.
    Never,
    /// It ends in order; the graph stays as it is.
    End,
}

impl Settings {
    /// # Errors
    /// `InvalidInput`: the rate is no size.
    pub(crate) fn new(display: &JobDisplay, rate: Option<&str>, is_quiet: bool) -> Result<Self> {
        Ok(Self {
            shows_progress: display.progress && !is_quiet && display.output == Output::Human,
            prints_events: display.output == Output::Json,
            prints_progress: display.output == Output::Json && display.progress,
            is_quiet: is_quiet || display.output == Output::Json,
            speed: rate.map_or(Ok(0), |text| super::size("rate limit", text))?,
        })
    }

    /// For a command that prints a result of its own.
    pub(crate) fn of_command(shows_progress: bool, is_quiet: bool) -> Self {
        Self { shows_progress, prints_events: false, prints_progress: false, is_quiet, speed: 0 }
    }

    /// Prints a line for people.
    pub(crate) fn say(&self, words: &str) -> Result<()> {
        if self.is_quiet { Ok(()) } else { printer::line(words) }
    }
}

/// Runs a command that copies: on this thread, with requests enough for a job.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    let context = Context::new(ContextOptions::default());
    context.map_err(|e| Error::io(e, "cannot start"))?.block_on(future)
}

/// Runs a job to its end. A signal cancels it.
pub(crate) async fn run(graph: &Graph, job: Box<dyn JobDriver>, settings: &Settings) -> Result<()> {
    let interrupt = Interrupt::watch()?;
    run_until(graph, job, settings, &interrupt, WhenReady::Never).await.map_err(|(error, _)| error)
}

/// As [`run`]. A failure is returned with the number of bytes that were done before it.
pub(crate) async fn run_until(
    graph: &Graph,
    job: Box<dyn JobDriver>,
    settings: &Settings,
    interrupt: &Interrupt,
    when_ready: WhenReady,
) -> Result<(), (Error, u64)> {
    let early = |error| (error, 0);
    let jobs = JobManager::new(graph);
    let events = jobs.events();
    let options = JobOptions { speed: settings.speed, ..JobOptions::new(ID) };
    let handle = jobs.start(options, job).await.map_err(early)?;
    let (result, done, _) = follow(&[handle], events, settings, interrupt, when_ready).await;
    result.map_err(|error| (error, done))
}

/// Follows started jobs until all have ended: shows them, and cancels them if a signal arrives.
/// Returns also the bytes that were done, and those there were to do.
pub(crate) async fn follow(
    jobs: &[JobHandle],
    events: JobEvents,
    settings: &Settings,
    interrupt: &Interrupt,
    when_ready: WhenReady,
) -> (Result<()>, u64, u64) {
    let progress = Progress::of_job(settings.shows_progress);
    let mut shown = Shown { events, settings, progress, meter: Meter::default(), next_line: None };
    let mut ended = pin!(end_of(jobs));
    let result = loop {
        let pause = pin!(bds_io::sleep(LOOK_INTERVAL));
        match select(ended.as_mut(), pause).await {
            Either::Left((result, _)) => break result,
            Either::Right(((), _)) => {}
        }
        if let Err(error) = shown.update(jobs) {
            cancel(jobs, true);
            let _cancelled = ended.await;
            let (done, total) = done_and_total(jobs);
            return (Err(error), done, total);
        }
        if interrupt.has_arrived() {
            cancel(jobs, true);
        } else if when_ready == WhenReady::End
            && jobs.iter().any(|job| job.info().status.is_ready())
        {
            // Accepted once; the job needs a moment.
            cancel(jobs, false);
        }
    };
    let (done, total) = done_and_total(jobs);
    match &result {
        Ok(()) => shown.progress.finish(total),
        Err(_) => shown.progress.abandon(),
    }
    let printed = show_events(&mut shown.events, settings);
    (result.and(printed), done, total)
}

/// Waits for all jobs. The error is that of the job that failed: the others are cancelled.
async fn end_of(jobs: &[JobHandle]) -> Result<()> {
    let mut ended = Ok(());
    for job in jobs {
        match (job.wait().await, &ended) {
            (Err(error), Ok(())) => ended = Err(error),
            (Err(error), Err(first)) if first.kind() == ErrorKind::Cancelled => ended = Err(error),
            _ => {}
        }
    }
    ended
}

fn cancel(jobs: &[JobHandle], is_forced: bool) {
    for job in jobs {
        // It may have ended just now, or with another one of its group.
        let _ended = job.cancel(is_forced);
    }
}

fn done_and_total(jobs: &[JobHandle]) -> (u64, u64) {
    let infos = jobs.iter().map(JobHandle::info);
    infos.fold((0, 0), |(done, total), info| {
        (done + info.current_progress, total + info.total_progress)
    })
}

/// Shows running jobs.
struct Shown<'s> {
    events: JobEvents,
    settings: &'s Settings,
    progress: Progress,
    meter: Meter,
    /// When progress becomes a line of JSON next.
    next_line: Option<Duration>,
}

impl Shown<'_> {
    fn update(&mut self, jobs: &[JobHandle]) -> Result<()> {
        let (done, total) = done_and_total(jobs);
        let now = bds_io::now();
        let rates = self.meter.add(now, done, total);
        self.progress.show_job(done, total, &rates);
        show_events(&mut self.events, self.settings)?;
        if !self.settings.prints_progress || self.next_line.is_some_and(|next| now < next) {
            return Ok(());
        }
        self.next_line = Some(now + JSON_INTERVAL);
        for info in jobs.iter().map(JobHandle::info) {
            let mut data = info.to_query_block_jobs().unwrap_or_else(|| info.to_query_jobs());
            add_rates(&mut data, &rates);
            printer::line(with_time(json!({ "event": PROGRESS_EVENT, "data": data })))?;
        }
        Ok(())
    }
}

fn add_rates(data: &mut Value, rates: &Rates) {
    data["rate"] = json!(rates.copied);
    data["dirty-rate"] = json!(rates.dirtied);
    if let Some(seconds) = rates.seconds_left {
        data["seconds-left"] = json!(seconds);
    }
}

/// Shows the events that have come since the last call.
fn show_events(events: &mut JobEvents, settings: &Settings) -> Result<()> {
    while let Some(event) = events.try_next() {
        if settings.prints_events {
            printer::line(with_time(JobEvent::to_json(&event)))?;
        } else if let JobEvent::Record { path, what, bytes, .. } = &event {
            report_record(path, what, *bytes, settings)?;
        }
    }
    Ok(())
}

/// Tells people what a job does with its record.
fn report_record(path: &str, what: &RecordUse, bytes: u64, settings: &Settings) -> Result<()> {
    match what {
        RecordUse::Begun => Ok(()),
        RecordUse::Continued => {
            settings.say(&format!("Going on with {path}: the target holds up to {bytes} bytes."))
        }
        RecordUse::Ignored { why } => {
            printer::message(format_args!("bds: {path} is not used: {why}; copying everything"));
            Ok(())
        }
        RecordUse::TargetDiffers { offset } => {
            printer::message(format_args!(
                "bds: the target is not what {path} says, from byte {offset} on: copying {bytes} \
                 bytes again"
            ));
            Ok(())
        }
    }
}

/// Adds the time, as QMP's events have it.
fn with_time(mut event: Value) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, microseconds) = (now.as_secs(), now.subsec_micros());
    event["timestamp"] = json!({ "seconds": seconds, "microseconds": microseconds });
    event
}

/// Says what a change could not do in order after it took effect.
pub(crate) fn warn_of_left_over(left_over: &[Error]) {
    for error in left_over {
        printer::message(format_args!("bds: warning: {}", crate::report::message(error)));
    }
}

/// Notes in an image what its backing file holds after a job. Without the note a wrong base is not
/// refused; the job has succeeded all the same.
pub(crate) async fn note_base(image: &Backend) {
    if let Err(error) = image.mark_base().await {
        super::create::warn_of_note(&error);
    }
}

/// The backing image of an image.
pub(crate) fn image_below(image: &NodeRef) -> Option<NodeRef> {
    walk::child(&walk::skip_filters(image), "backing").map(|(below, _)| below)
}

/// The image in the chain below that has this name: as the image above it records it, or as a path.
///
/// # Errors
/// `NotFound`.
pub(crate) async fn find_below(top: &NodeRef, name: &OsStr) -> Result<NodeRef> {
    let wanted = std::fs::metadata(name).ok().map(|file| (file.dev(), file.ino()));
    let mut at = top.clone();
    while let Some(below) = image_below(&at) {
        let recorded = image::backend(&walk::skip_filters(&at), false)?.info().await?.backing_file;
        let is_file = wanted.is_some() && walk::identity(&below) == wanted;
        if recorded.as_deref() == Some(name) || is_file {
            return Ok(below);
        }
        at = below;
    }
    let file = walk::filename(top).unwrap_or_default();
    let (name, top) = (Path::new(name).display(), file.display());
    let message = format!("Did not find '{name}' in the backing chain of '{top}'");
    Err(Error::new(ErrorKind::NotFound, message))
}
