//! `backup restore`: writes the content of a point to a new image, verified on the way.

use std::ops::Range;
use std::path::Path;

use bds_core::copy::{CopyMap, RunOptions};
use bds_core::graph::{Graph, NodeRef};
use bds_core::request::Backend;
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::manifest::{Manifest, ManifestBuilder, VerifyReport};
use serde_json::{Value, json};

use super::copy::{GRANULARITY, copy};
use crate::args::BackupRestore;
use crate::backup_set::{BackupSet, Point};
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;
use crate::progress::Progress;
use crate::{cmd, image, printer};

/// Returns whether the content is what the manifest describes; else the new image is removed.
pub(super) fn run(args: &BackupRestore) -> Result<bool> {
    if args.disk.is_some() {
        let message = "--disk is for a directory of several disks";
        return Err(Error::new(ErrorKind::InvalidInput, message).file(&args.directory));
    }
    let set = BackupSet::open(&args.directory)?;
    let point = set.point(args.point)?;
    set.chain(point)?;
    refuse_existing(&args.target)?;
    let report = image::block_on(async {
        let interrupt = Interrupt::watch()?;
        let restored = interrupt.run_or_drop(restore(args, &set, point, &args.target)).await;
        let (report, partial) = restored?;
        if report.is_good() {
            partial.complete();
        }
        Ok(report)
    })?;
    if !args.quiet || !report.is_good() {
        let words = verdict(point.number, &report);
        match report.is_good() {
            true => printer::line(format_args!("Restored {}; {words}", args.target.display()))?,
            false => printer::message(format_args!("bds: nothing was restored: {words}")),
        }
    }
    Ok(report.is_good())
}

/// # Errors
/// `AlreadyExists`.
pub(super) fn refuse_existing(target: &Path) -> Result<()> {
    if std::fs::symlink_metadata(target).is_err() {
        return Ok(());
    }
    let message = "exists: restore to a new file, or remove it first";
    Err(Error::new(ErrorKind::AlreadyExists, message).file(target))
}

/// Writes a point to a new image, which is removed unless it is completed.
pub(super) async fn restore(
    args: &BackupRestore,
    set: &BackupSet,
    point: &Point,
    path: &Path,
) -> Result<(VerifyReport, PartialOutput)> {
    let graph = image::trusting_graph();
    let (source, source_node) = open_point(&graph, set, point).await?;
    let mut partial = PartialOutput::before_creation([path.to_owned()], false);
    let mut options = Options::new();
    options.set("size", source.len());
    let format = cmd::create::stored_format(&args.output_format);
    cmd::create::create(&graph, format, path.to_owned(), options, false).await?;
    partial.set_created();
    let mut options = Options::new();
    options.set("driver", format);
    options.set("file.driver", "file");
    options.set_path("file.filename", path);
    let node = graph.open(options).await?;
    let target = image::backend(&node, true)?;

    let map = CopyMap::new(source.len(), GRANULARITY)?;
    map.mark_all();
    let builder = ManifestBuilder::new(source.len())?;
    let options = RunOptions { target_is_zero: true, sparse_len: 4096, ..RunOptions::default() };
    let progress = Progress::new(args.progress && !args.quiet);
    copy(&map, (&source, &target), &builder, &options, progress).await?;
    let read = builder.finish(&source, None, "", |_, _| true).await?;
    let report = compare(&point.manifest, &read);
    image::close(target, node).await?;
    image::close(source, source_node).await?;
    Ok((report, partial))
}

/// The ranges in which what was read differs from the manifest.
fn compare(expected: &Manifest, read: &Manifest) -> VerifyReport {
    let mut report = VerifyReport { checked: read.len(), ..VerifyReport::default() };
    let chunk = read.chunk_len();
    let pairs = (0u64..).zip(expected.hashes().iter().zip(read.hashes()));
    for (index, _) in pairs.filter(|(_, (expected, read))| expected != read) {
        report.add_bad(index * chunk..read.len().min((index + 1) * chunk));
    }
    report
}

/// Opens the image of a point, read-only, with the images below.
pub(super) async fn open_point(
    graph: &Graph,
    set: &BackupSet,
    point: &Point,
) -> Result<(Backend, NodeRef)> {
    let mut options = Options::new();
    options.set("driver", "qcow2");
    options.set("read-only", true);
    options.set("file.driver", "file");
    options.set_path("file.filename", set.image(point.number));
    let node = graph.open(options).await?;
    let backend = image::backend(&node, false)?;
    if backend.len() == point.manifest.len() {
        return Ok((backend, node));
    }
    let message = "the image has another length than its manifest";
    Err(Error::new(ErrorKind::InvalidImage, message).file(set.image(point.number)))
}

/// One line about a verification.
pub(super) fn verdict(number: u32, report: &VerifyReport) -> String {
    if report.is_good() {
        return format!("point {number} is verified");
    }
    let ranges: Vec<String> = report
        .bad
        .iter()
        .map(|range| format!("bytes {} to {}", range.start, range.end - 1))
        .collect();
    format!("point {number} differs from its manifest: {}", ranges.join(", "))
}

pub(super) fn range(range: &Range<u64>) -> Value {
    json!({ "start": range.start, "length": range.end - range.start })
}
