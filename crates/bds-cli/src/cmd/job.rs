//! Runs a job on closed images, in the foreground: progress, events, interrupts.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use bds_core::graph::{Graph, NodeRef, walk};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Context, ContextOptions};
use bds_jobs::{JobDriver, JobEvents, JobManager, JobOptions};
use futures_util::future::{Either, select};

use crate::args::{JobDisplay, Output};
use crate::image;
use crate::interrupt::Interrupt;
use crate::printer;
use crate::progress::Progress;

/// The id of the one job that a command runs.
pub(crate) const ID: &str = "bds";
/// How often progress is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// How a job runs and what is shown of it.
#[derive(Debug)]
pub(crate) struct Settings {
    shows_progress: bool,
    prints_events: bool,
    is_quiet: bool,
    speed: u64,
}

impl Settings {
    /// # Errors
    /// `InvalidInput`: the rate is no size.
    pub(crate) fn new(display: &JobDisplay, rate: Option<&str>, is_quiet: bool) -> Result<Self> {
        Ok(Self {
            shows_progress: display.progress && !is_quiet && display.output == Output::Human,
            prints_events: display.output == Output::Json,
            is_quiet: is_quiet || display.output == Output::Json,
            speed: rate.map_or(Ok(0), |text| super::size("rate limit", text))?,
        })
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
    let jobs = JobManager::new(graph);
    let mut events = jobs.events();
    let interrupt = Interrupt::watch()?;
    let options = JobOptions { speed: settings.speed, ..JobOptions::new(ID) };
    let handle = jobs.start(options, job).await?;
    let mut progress = Progress::new(settings.shows_progress);
    let mut ended = pin!(handle.wait());
    let result = loop {
        let pause = pin!(bds_io::sleep(LOOK_INTERVAL));
        match select(ended.as_mut(), pause).await {
            Either::Left((result, _)) => break result,
            Either::Right(((), _)) => {}
        }
        let info = handle.info();
        progress.show(info.current_progress, info.total_progress);
        print(&mut events, settings)?;
        if interrupt.has_arrived() {
            // It may have ended just now.
            let _ended = handle.cancel(true);
        }
    };
    match &result {
        Ok(()) => progress.finish(handle.info().total_progress),
        Err(_) => progress.abandon(),
    }
    print(&mut events, settings)?;
    result
}

fn print(events: &mut JobEvents, settings: &Settings) -> Result<()> {
    while let Some(event) = events.try_next() {
        if settings.prints_events {
            printer::line(event.to_json())?;
        }
    }
    Ok(())
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
