//! `convert`: copies one or more images into a new one.
//!
//! The library copies; this file opens the images, and reports progress, success and failure.
//! `convert_plan` checks the arguments, `convert_target` creates and closes the output.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bds_core::copy::{self, CopyOptions, CopyReport, CopySource};
use bds_core::driver::OpenFlags;
use bds_core::graph::{Graph, NodeRef};
use bds_core::{Error, ErrorKind, Result};
use bds_io::{Context, ContextOptions};

use super::convert_bitmaps::Bitmaps;
use super::convert_plan::Plan;
use super::convert_target::Target;
use crate::args::Convert;
use crate::cmd::create;
use crate::image;
use crate::image_spec::Spec;
use crate::incomplete::Failure;
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;
use crate::printer;
use crate::progress::Progress;

pub(crate) fn run(args: &Convert) -> Result<()> {
    if create::wants_help(&args.options) {
        let format = args.output_format.as_deref().unwrap_or("raw");
        return create::help(format, args.filenames.last().map(OsString::as_os_str));
    }
    let plan = Plan::new(args)?;
    let context =
        Context::new(ContextOptions::default()).map_err(|e| Error::io(e, "cannot start"))?;
    context.block_on(convert(&plan))
}

async fn convert(plan: &Plan<'_>) -> Result<()> {
    let interrupt = Interrupt::watch()?;
    let graph = image::trusting_graph();
    let sources = interrupt.run_or_drop(open_sources(&graph, plan)).await?;
    let total = total_len(&sources)?;
    let bitmaps = Bitmaps::of(plan.args, &sources)?;
    let mut partial = match plan.args.no_create {
        true => PartialOutput::of_existing(),
        false => create::partial(create::path(plan.output)?, &plan.options, plan.args.keep_partial),
    };
    let opened =
        interrupt.run_or_drop(Target::open(&graph, plan, &sources, total, &mut partial)).await;
    let outcome = match opened {
        Err(error) => Err(Failure::before_copy(error)),
        Ok(target) => fill(plan, &interrupt, &sources, bitmaps.as_ref(), target).await,
    };
    let outcome = match outcome {
        Ok(()) => {
            partial.complete();
            Ok(())
        }
        Err(failure) => Err(failure.into_error(plan.output, total, partial)),
    };
    for source in sources {
        source.close().await?.into_result()?;
    }
    outcome
}

/// Copies into the output and closes it.
async fn fill(
    plan: &Plan<'_>,
    interrupt: &Interrupt,
    sources: &[NodeRef],
    bitmaps: Option<&Bitmaps>,
    target: Target,
) -> Result<(), Failure> {
    let copied = copy_with_bitmaps(plan, interrupt, sources, bitmaps, &target).await;
    let closed = target.close().await;
    match copied {
        Ok(report) => {
            let failed = |error| Failure { error, done: Some(report.total), closing: None };
            closed.map_err(failed)
        }
        Err((error, done)) => Err(Failure { error, done: Some(done), closing: closed.err() }),
    }
}

/// Copies data and bitmaps. A failure is returned with the number of bytes copied before it.
async fn copy_with_bitmaps(
    plan: &Plan<'_>,
    interrupt: &Interrupt,
    sources: &[NodeRef],
    bitmaps: Option<&Bitmaps>,
    target: &Target,
) -> Result<CopyReport, (Error, u64)> {
    if let Some(bitmaps) = bitmaps {
        bitmaps.add_to(&target.node).await.map_err(|error| (error, 0))?;
    }
    let report = copy_all(plan, interrupt, sources, target).await?;
    if let (Some(bitmaps), [source]) = (bitmaps, sources) {
        let filled = bitmaps.fill(source, &target.node).await;
        filled.map_err(|error| (error, report.total))?;
    }
    Ok(report)
}

async fn open_sources(graph: &Graph, plan: &Plan<'_>) -> Result<Vec<NodeRef>> {
    let args = plan.args;
    let mut sources = Vec::new();
    for name in plan.inputs {
        let flags = OpenFlags {
            read_only: true,
            force_share: args.force_share,
            // A copy of an image that is being written would be inconsistent.
            refuse_writers: !args.force_share,
            cache: plan.source_cache,
            ..OpenFlags::default()
        };
        let format = args.format.as_deref();
        let spec = Spec { name, is_options: args.image_opts, format, flags };
        sources.push(image::open(graph, &spec).await?);
    }
    Ok(sources)
}

fn total_len(sources: &[NodeRef]) -> Result<u64> {
    let sum = sources.iter().try_fold(0_u64, |sum, source| sum.checked_add(source.len()));
    sum.ok_or_else(|| {
        Error::new(ErrorKind::LimitExceeded, "the inputs together are larger than any image can be")
    })
}

/// Copies all sources. A failure is returned with the number of bytes copied before it.
async fn copy_all(
    plan: &Plan<'_>,
    interrupt: &Interrupt,
    sources: &[NodeRef],
    target: &Target,
) -> Result<CopyReport, (Error, u64)> {
    let args = plan.args;
    let early = |error| (error, 0);
    let sources = sources
        .iter()
        .map(|node| {
            let backend = Arc::new(image::backend(node, false)?);
            Ok(CopySource { backend, above: target.above })
        })
        .collect::<Result<Vec<CopySource>>>()
        .map_err(early)?;
    let shown = Arc::new(Mutex::new(Shown {
        progress: Progress::new(args.progress && !args.quiet),
        done: 0,
        total: 0,
    }));
    let for_callback = Arc::clone(&shown);
    let progress = move |done, total| {
        for_callback.lock().unwrap_or_else(PoisonError::into_inner).show(done, total);
    };
    let unit = target.backend.compressed_unit().map(u64::from);
    let options = CopyOptions {
        workers: args.parallel,
        out_of_order: args.oob_writes,
        sparse_len: plan.sparse_len,
        target_is_zero: target.is_zero,
        target_shows: target.shows.clone(),
        may_unmap: target.may_unmap,
        compress: unit.filter(|_| args.compress),
        offload: args.copy_range,
        salvage: args.salvage.then(|| Arc::new(warn_of_salvage) as copy::OnSalvage),
        progress: Some(Arc::new(progress)),
        rate_limit: plan.rate.map(rate_limit),
        cancel: Some(interrupt.flag()),
        ..CopyOptions::default()
    };
    let copied = copy::copy(&sources, &target.backend, &options).await;
    drop(options);
    let shown = Arc::into_inner(shown).expect("the copy and its options are gone");
    let shown = shown.into_inner().unwrap_or_else(PoisonError::into_inner);
    let done = shown.done;
    match &copied {
        Ok(report) => shown.progress.finish(report.total),
        Err(_) => shown.progress.abandon(),
    }
    copied.map_err(|error| (error, done))
}

/// Progress that the copy reports, for the bar and for the error message.
struct Shown {
    progress: Progress,
    done: u64,
    total: u64,
}

impl Shown {
    fn show(&mut self, done: u64, total: u64) {
        self.done = done;
        self.total = total;
        self.progress.show(done, total);
    }
}

/// Returns a limiter that delays each piece so that the rate since the first piece is not exceeded.
fn rate_limit(bytes_per_second: u64) -> copy::RateLimit {
    let spent = Mutex::new((None, 0_u64));
    Arc::new(move |len| {
        let mut spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = bds_io::now();
        let began = *spent.0.get_or_insert(now);
        let due_ns = u128::from(spent.1) * 1_000_000_000 / u128::from(bytes_per_second);
        spent.1 = spent.1.saturating_add(len);
        let due = Duration::from_nanos(u64::try_from(due_ns).unwrap_or(u64::MAX));
        due.saturating_sub(now.saturating_sub(began))
    })
}

fn warn_of_salvage(offset: u64, len: u64, error: &Error) {
    let why = crate::report::message(error);
    printer::message(format_args!(
        "bds: warning: error while reading offset {offset} ({len} bytes become zeros): {why}"
    ));
}
