//! `checkpoint`: overlays and bitmap edits of several closed images, in one change.
//!
//! ```text
//! images opened, and so locked ─► overlays created and opened ─► one change ─► all closed
//! ```
//! Overlays that were created are removed again unless the change took effect. qemu-img has no such
//! command; QEMU has `transaction`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use bds_core::graph::{BitmapOptions, Graph, NodeRef, walk};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::{Checkpoint, CheckpointReport, JobManager};
use serde_json::{Value, json};

use super::{create, job};
use crate::args::Output;
use crate::args::checkpoint::Checkpoint as Args;
use crate::image_spec::Spec;
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;
use crate::{image, image_options, printer};

/// An image, and its new overlay.
struct Disk {
    source: NodeRef,
    overlay: Option<Overlay>,
}

struct Overlay {
    node: NodeRef,
    /// Removes the file unless it is completed.
    partial: PartialOutput,
}

impl Disk {
    /// The image that is written from now on.
    fn active(&self) -> &NodeRef {
        self.overlay.as_ref().map_or(&self.source, |overlay| &overlay.node)
    }

    /// How long writes to the image had to wait.
    fn hold_ns(&self, report: &CheckpointReport) -> u128 {
        let is_ours = |node: &str| node == self.source.name() || node == self.active().name();
        let holds = report.holds.iter().filter(|hold| is_ours(&hold.node));
        holds.map(|hold| hold.held.as_nanos()).max().unwrap_or_default()
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    check(args)?;
    let holds_ns = image::block_on(checkpoint(args))?;
    print(args, &holds_ns)
}

fn check(args: &Args) -> Result<()> {
    let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    let (overlays, images) = (args.overlays.len(), args.images.len());
    if overlays != 0 && overlays != images {
        return refuse(format!("--overlay is given {overlays} times for {images} images"));
    }
    let bitmaps = [&args.add, &args.reset, &args.disable, &args.remove];
    if overlays == 0 && bitmaps.iter().all(|names| names.is_empty()) {
        return refuse("nothing to do: give --overlay, or an edit of a bitmap".to_owned());
    }
    Ok(())
}

/// Returns how long the writes of each image were held.
async fn checkpoint(args: &Args) -> Result<Vec<u128>> {
    let interrupt = Interrupt::watch()?;
    let graph = image::trusting_graph();
    let mut disks = interrupt.run_or_drop(open_all(&graph, args)).await?;
    // From here on a signal is too late: the change is made as a whole.
    let taken = take(&graph, args, &disks).await;
    let mut closed = Ok(());
    for disk in &mut disks {
        let Some(overlay) = disk.overlay.take() else { continue };
        if taken.is_ok() {
            overlay.partial.complete();
        }
        closed = closed.and(overlay.node.close().await?.into_result());
    }
    for disk in disks {
        closed = closed.and(disk.source.close().await?.into_result());
    }
    let holds_ns = taken?;
    closed.map(|()| holds_ns)
}

async fn open_all(graph: &Graph, args: &Args) -> Result<Vec<Disk>> {
    let mut disks = Vec::with_capacity(args.images.len());
    for name in &args.images {
        let source = image::open(graph, &Spec::read(name, &args.source)?.writable()).await?;
        disks.push(Disk { source, overlay: None });
    }
    for (disk, name) in disks.iter_mut().zip(&args.overlays) {
        disk.overlay = Some(make_overlay(graph, &disk.source, create::path(name)?).await?);
    }
    Ok(disks)
}

/// Creates an overlay, and opens it without its backing file.
async fn make_overlay(graph: &Graph, source: &NodeRef, path: PathBuf) -> Result<Overlay> {
    if fs::symlink_metadata(&path).is_ok() {
        let message = "exists: name a new file for the overlay, or remove it first";
        return Err(Error::new(ErrorKind::AlreadyExists, message).file(&path));
    }
    let mut options = Options::new();
    options.set("size", source.len());
    options.set_path("backing_file", Path::new(&recorded_name(source, &path)?));
    options.set("backing_fmt", walk::skip_filters(source).driver_name());
    let mut partial = PartialOutput::before_creation([path.clone()], false);
    create::create(graph, "qcow2", path.clone(), options, true).await?;
    partial.set_created();
    let options = Options::new()
        .with("driver", "qcow2")
        .with("file", image_options::file(&path).into_json())
        .with("backing", Value::Null);
    Ok(Overlay { node: graph.open(options).await?, partial })
}

/// The name by which an overlay at `path` finds the image: relative in the same directory, so that
/// the two can be moved together, else absolute.
fn recorded_name(source: &NodeRef, path: &Path) -> Result<OsString> {
    let Some(image) = walk::filename(source) else {
        let message = "it has no file name that an overlay could record";
        return Err(Error::new(ErrorKind::NotSupported, message).node(source.name()));
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let (image, path) = (absolute(&image), absolute(path));
    match image.file_name() {
        Some(name) if image.parent() == path.parent() => Ok(name.to_owned()),
        _ => Ok(image.into_os_string()),
    }
}

async fn take(graph: &Graph, args: &Args, disks: &[Disk]) -> Result<Vec<u128>> {
    let mut checkpoint = Checkpoint::new(&JobManager::new(graph));
    for disk in disks {
        if let Some(overlay) = &disk.overlay {
            checkpoint = checkpoint.snapshot(&disk.source, &overlay.node);
        }
        for name in &args.remove {
            checkpoint = checkpoint.remove_bitmap(&disk.source, name);
        }
        for name in &args.reset {
            checkpoint = checkpoint.reset_bitmap(&disk.source, name);
        }
        for name in &args.disable {
            checkpoint = checkpoint.disable_bitmap(&disk.source, name);
        }
        for name in &args.add {
            let options = BitmapOptions { persistent: true, ..BitmapOptions::named(name) };
            checkpoint = checkpoint.add_bitmap(disk.active(), options);
        }
    }
    let report = checkpoint.take().await?;
    job::warn_of_left_over(&report.left_over);
    Ok(disks.iter().map(|disk| disk.hold_ns(&report)).collect())
}

fn print(args: &Args, holds_ns: &[u128]) -> Result<()> {
    let longest_ns = holds_ns.iter().max().copied().unwrap_or_default();
    if args.output == Output::Json {
        let disks = args.images.iter().zip(holds_ns).enumerate().map(|(index, (image, hold_ns))| {
            let overlay = args.overlays.get(index).map(|name| name.to_string_lossy());
            json!({ "image": image.to_string_lossy(), "overlay": overlay, "write-hold-ns": hold_ns })
        });
        let disks: Vec<Value> = disks.collect();
        return printer::json(&json!({ "longest-write-hold-ns": longest_ns, "disks": disks }));
    }
    if args.quiet {
        return Ok(());
    }
    let (count, plural) = (holds_ns.len(), if holds_ns.len() == 1 { "" } else { "s" });
    printer::line(format_args!(
        "Checkpoint of {count} image{plural}; longest write hold {} us",
        longest_ns.div_ceil(1000)
    ))
}
