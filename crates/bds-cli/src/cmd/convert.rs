//! `convert`: one or more images into a new one.
//!
//! The copy itself is the library's; here it is decided what is opened how, whether the target can be taken to be zero, and
//! what to say when it is over or broken off.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bds_core::copy::{self, CopyOptions, CopyReport, CopySource, MAX_WORKERS};
use bds_core::driver::{Attempt, OpenFlags, ZeroFlags};
use bds_core::graph::{Graph, NodeRef, walk};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};
use bds_io::{Context, ContextOptions, Fs};

use crate::args::Convert;
use crate::cmd::create;
use crate::describe;
use crate::image::{self, Spec};
use crate::partial::Partial;
use crate::printer;
use crate::progress::Progress;
use crate::stop::{self, Stop};

/// Largest -S: more zeros than a buffer holds are never seen together.
const MAX_SPARSE_LEN: u64 = 1 << 30;

pub(crate) fn run(args: &Convert) -> Result<()> {
    if create::wants_help(&args.options) {
        let format = args.output_format.as_deref().unwrap_or("raw");
        return create::help(format, args.filenames.last().map(OsString::as_os_str));
    }
    let (names, target) = check(args)?;
    let context =
        Context::new(ContextOptions::default()).map_err(|e| Error::io(e, "cannot start"))?;
    context.block_on(convert(args, names, target))
}

/// Combinations that make no sense, and what is not there yet.
fn check(args: &Convert) -> Result<(&[OsString], &OsStr)> {
    image::refuse_objects(&args.object)?;
    image::cache_mode("-t", &args.target_cache)?;
    super::refuse(args.snapshot.is_some(), "-l", "internal snapshots cannot be read yet")?;
    let remedy = "bitmaps stay behind; copy them with qemu-img convert --bitmaps";
    super::refuse(args.bitmaps || args.skip_broken_bitmaps, "--bitmaps", remedy)?;
    let refuse = |is_wrong: bool, words: &str| match is_wrong {
        true => Err(Error::new(ErrorKind::InvalidInput, words)),
        false => Ok(()),
    };
    refuse(
        args.target_image_opts && !args.no_create,
        "--target-image-opts requires use of -n flag",
    )?;
    refuse(args.target_is_zero && !args.no_create, "--target-is-zero requires use of -n flag")?;
    refuse(args.compress && args.copy_range, "Cannot enable copy offloading when -c is used")?;
    let has_backing = args.backing.is_some();
    refuse(
        has_backing && args.target_is_zero,
        "Cannot use --target-is-zero when the target image has a backing file",
    )?;
    refuse(args.backing_format.is_some() && !has_backing, "-F needs -B")?;
    refuse(
        !(1..=MAX_WORKERS).contains(&args.parallel),
        "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16",
    )?;
    match args.filenames.split_last() {
        Some((target, names)) if !names.is_empty() => Ok((names, target)),
        _ => Err(Error::new(ErrorKind::InvalidInput, "Must specify image file name")),
    }
}

async fn convert(args: &Convert, names: &[OsString], target_name: &OsStr) -> Result<()> {
    let stop = Stop::watch()?;
    let graph = image::trusting_graph();
    refuse_incompressible(&graph, args)?;
    let sources = stop.or_drop(open_sources(&graph, args, names)).await?;
    let total = sources.iter().map(|(_, source)| source.backend.len()).sum();
    let mut options = create::format_options(&args.options)?;
    create::set_backing(&mut options, args.backing.as_deref(), args.backing_format.as_deref())?;
    let overlays = options.contains("backing_file");
    let target_path = describe::path_of(target_name);
    let mut partial = create::partial(&target_path, &options, args.keep_partial);
    if !args.no_create {
        refuse_own_source(&sources, target_name)?;
        let size = match options.take_size("size")? {
            Some(size) if size < total => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "the option 'size' is smaller than the input",
                )
                .field("size", size));
            }
            size => size.unwrap_or(total),
        };
        options.set("size", size);
        refuse_preallocated_compression(args, &options)?;
        stop.or_drop(create::create(&graph, format(args), &target_path, options, false)).await?;
        partial.set_created();
    } else if !args.options.is_empty() {
        printer::message("bds: warning: -o has no effect when skipping image creation");
    }
    let outcome = match fill(args, &stop, &graph, &sources, target_name, overlays).await {
        Ok(()) => {
            partial.complete();
            Ok(())
        }
        Err(failure) => Err(failure.into_error(target_name, total, partial)),
    };
    for (node, source) in sources {
        drop(source);
        node.close().await?.into_result()?;
    }
    outcome
}

/// Why the output is incomplete, and how many bytes of it are there if the copy had begun.
struct Failure {
    error: Error,
    done: Option<u64>,
    closing: Option<Error>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, done: None, closing: None }
    }
}

impl Failure {
    /// Decides about the output, and says it.
    fn into_error(self, target: &OsStr, total: u64, partial: Partial) -> Error {
        let Self { error, done, closing } = self;
        let target = target.display();
        let state = match done {
            Some(done) => {
                format!("output '{target}' is incomplete: {done} of {total} bytes copied")
            }
            None if partial.has_created() => format!("output '{target}' is incomplete"),
            None => return error,
        };
        let state = format!("{state}; {}", partial.give_up());
        let error = match error.kind() {
            ErrorKind::Cancelled if stop::exit_code().is_some() => {
                Error::new(ErrorKind::Cancelled, format!("interrupted; {state}"))
            }
            _ => error.context(state),
        };
        match closing {
            None => error,
            Some(closing) => error.context(format_args!(
                "closing the output failed too ({})",
                crate::report::words(&closing)
            )),
        }
    }
}

/// Opens the output, copies, closes it.
async fn fill(
    args: &Convert,
    stop: &Stop,
    graph: &Graph,
    sources: &[(NodeRef, CopySource)],
    target_name: &OsStr,
    overlays: bool,
) -> Result<(), Failure> {
    let node = open_target(graph, args, target_name).await?;
    let backend = Arc::new(image::enter(&node, true)?);
    let is_zero = target_reads_zero(args, &node, &backend, overlays).await?;
    let copied = copy_all(args, stop, sources, overlays, &backend, is_zero).await;
    let closed = close(backend, node).await;
    match copied {
        Ok(report) => {
            closed.map_err(|error| Failure { error, done: Some(report.total), closing: None })
        }
        Err((error, done)) => Err(Failure { error, done: Some(done), closing: closed.err() }),
    }
}

fn format(args: &Convert) -> &str {
    args.output_format.as_deref().unwrap_or("raw")
}

async fn open_sources(
    graph: &Graph,
    args: &Convert,
    names: &[OsString],
) -> Result<Vec<(NodeRef, CopySource)>> {
    let cache = image::cache_mode("-T", &args.source_cache)?;
    let mut sources = Vec::new();
    for name in names {
        let flags = OpenFlags {
            read_only: true,
            force_share: args.force_share,
            cache,
            ..OpenFlags::default()
        };
        let format = args.format.as_deref();
        let spec = Spec { name, is_options: args.image_opts, format, flags };
        let node = image::open(graph, &spec).await?;
        let backend = Arc::new(image::enter(&node, false)?);
        sources.push((node, CopySource::from(backend)));
    }
    Ok(sources)
}

/// Making the target empties it, and raw readers do not lock each other out.
fn refuse_own_source(sources: &[(NodeRef, CopySource)], target: &OsStr) -> Result<()> {
    let path = describe::path_of(target);
    let Ok(file) = Fs::Host.open(&path, &bds_io::OpenOptions::default()) else { return Ok(()) };
    let Ok(identity) = file.identity() else { return Ok(()) };
    for (node, _) in sources {
        for image in walk::backing_chain(node) {
            if walk::identity(&image) == Some(identity) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "is input and output at once: creating it would destroy it",
                )
                .file(path));
            }
        }
    }
    Ok(())
}

/// A format that compresses has a way of doing so to choose. Asked before anything is made.
fn refuse_incompressible(graph: &Graph, args: &Convert) -> Result<()> {
    if !args.compress || args.no_create {
        return Ok(());
    }
    let format = graph.config().registry.format(format(args))?;
    match format.create_options().iter().any(|option| option.name == "compression_type") {
        true => Ok(()),
        false => Err(incompressible()),
    }
}

fn incompressible() -> Error {
    Error::new(ErrorKind::NotSupported, "Compression not supported for this file format")
}

fn refuse_preallocated_compression(args: &Convert, options: &Options) -> Result<()> {
    let preallocates = options.peek("preallocation").is_some_and(|mode| mode != "off");
    if args.compress && preallocates {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Compression and preallocation not supported at the same time",
        ));
    }
    Ok(())
}

async fn open_target(graph: &Graph, args: &Convert, name: &OsStr) -> Result<NodeRef> {
    let flags = OpenFlags {
        cache: image::cache_mode("-t", &args.target_cache)?,
        discard: true,
        ..OpenFlags::default()
    };
    let typed_format = Some(format(args)).filter(|_| !args.target_image_opts);
    let spec = Spec { name, is_options: args.target_image_opts, format: typed_format, flags };
    image::open(graph, &spec).await
}

/// Can zeros be left out?
async fn target_reads_zero(
    args: &Convert,
    node: &NodeRef,
    backend: &Backend,
    overlays: bool,
) -> Result<bool> {
    if args.target_is_zero {
        return Ok(true);
    }
    if overlays || args.sparse_size == "0" {
        return Ok(false);
    }
    // A new image reads as zeros; a device keeps what it held.
    let on_device =
        walk::child(node, "file").is_some_and(|(f, _)| f.driver_name() == "host_device");
    let keeps_old_bytes = on_device && node.driver_name() == "raw";
    if !args.no_create && !keeps_old_bytes {
        return Ok(true);
    }
    if walk::next_below(node).is_some() && walk::backing_chain(node).len() > 1 {
        return Ok(false);
    }
    let fast = ZeroFlags::MAY_UNMAP | ZeroFlags::NO_FALLBACK;
    let attempt = backend.write_zeroes(0, backend.len(), fast).await?;
    Ok(attempt == Attempt::Done)
}

/// Copies. A failure comes with how many bytes were done by then.
async fn copy_all(
    args: &Convert,
    stop: &Stop,
    sources: &[(NodeRef, CopySource)],
    overlays: bool,
    target: &Backend,
    target_is_zero: bool,
) -> Result<CopyReport, (Error, u64)> {
    let early = |error| (error, 0);
    let shown = Arc::new(Mutex::new(Shown {
        progress: Progress::new(args.progress && !args.quiet),
        done: 0,
        total: 0,
    }));
    let told = Arc::clone(&shown);
    let progress = move |done, total| {
        told.lock().unwrap_or_else(PoisonError::into_inner).show(done, total);
    };
    let options = CopyOptions {
        workers: args.parallel,
        out_of_order: args.oob_writes,
        sparse_len: sparse_len(&args.sparse_size).map_err(early)?,
        target_is_zero,
        compress: compressed_cluster(args, target).await.map_err(early)?,
        offload: args.copy_range,
        salvage: args.salvage.then(|| Arc::new(warn_of_salvage) as copy::OnSalvage),
        progress: Some(Arc::new(progress)),
        rate_limit: args.rate.as_deref().map(rate_limit).transpose().map_err(early)?,
        cancel: Some(stop.flag()),
        ..CopyOptions::default()
    };
    let sources: Vec<CopySource> = sources
        .iter()
        .map(|(node, source)| CopySource {
            above: overlays.then(|| below(node)).flatten(),
            ..source.clone()
        })
        .collect();
    let copied = copy::copy(&sources, target, &options).await;
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

/// The image below the source's top one: what an overlay leaves to its backing file.
fn below(node: &NodeRef) -> Option<bds_core::graph::NodeId> {
    walk::next_below(&walk::skip_filters(node)).map(|below| below.id())
}

fn sparse_len(text: &str) -> Result<u64> {
    let len = super::size("buffer size for sparse output", text)?;
    if len.is_multiple_of(512) && len <= MAX_SPARSE_LEN {
        return Ok(len);
    }
    Err(Error::new(
        ErrorKind::InvalidInput,
        "Invalid buffer size for sparse output specified: use 0 or a multiple of 512 up to 1G",
    )
    .field("sparse size", text))
}

async fn compressed_cluster(args: &Convert, target: &Backend) -> Result<Option<u64>> {
    if !args.compress {
        return Ok(None);
    }
    let info = target.info().await?;
    info.cluster_size.map(Some).ok_or_else(incompressible)
}

/// Bytes a second, counted from the first piece.
fn rate_limit(text: &str) -> Result<copy::RateLimit> {
    let bytes_per_second = super::size("rate limit", text)?;
    if bytes_per_second == 0 {
        return Err(Error::new(ErrorKind::InvalidInput, "the rate limit must not be 0"));
    }
    let spent = Mutex::new((None, 0_u64));
    Ok(Arc::new(move |len| {
        let mut spent = spent.lock().unwrap_or_else(PoisonError::into_inner);
        let now = bds_io::now();
        let began = *spent.0.get_or_insert(now);
        let due_ns = u128::from(spent.1) * 1_000_000_000 / u128::from(bytes_per_second);
        spent.1 = spent.1.saturating_add(len);
        let due = Duration::from_nanos(u64::try_from(due_ns).unwrap_or(u64::MAX));
        due.saturating_sub(now.saturating_sub(began))
    }))
}

fn warn_of_salvage(offset: u64, len: u64, error: &Error) {
    let why = crate::report::words(error);
    printer::message(format_args!(
        "bds: warning: error while reading offset {offset} ({len} bytes become zeros): {why}"
    ));
}

async fn close(backend: Arc<Backend>, node: NodeRef) -> Result<()> {
    let backend = Arc::into_inner(backend).expect("the copy is over");
    image::close(backend, node).await.map_err(|e| e.context("cannot finish the output"))
}
