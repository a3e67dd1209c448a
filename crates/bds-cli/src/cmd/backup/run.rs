//! `backup run`: adds a point to a directory of backups.
//!
//! ```text
//! one change: new bitmaps (`moment`) ─► copy to NNNNNN.qcow2.partial ─► source closed: its bitmap is stored
//!   ─► image closed: durable ─► image and manifest get their names
//! ```
//! Killed anywhere, it leaves the points before, and at most an unfinished file and a bitmap too
//! many, which the next run removes.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bds_core::copy::{CopyMap, RunOptions};
use bds_core::graph::{BitmapInfo, Graph, NodeRef};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::manifest::{ContentHash, Manifest, ManifestBuilder};
use serde_json::json;

use super::copy::{GRANULARITY, copy};
use super::moment::{self, Begun};
use crate::args::{BackupRun, Output};
use crate::backup_set::{BackupSet, Kind, Note, Point, image_name};
use crate::image_spec::{self, Spec};
use crate::interrupt::Interrupt;
use crate::partial_output::PartialOutput;
use crate::progress::Progress;
use crate::{cmd, image, printer};

/// The images, and the directory.
pub(super) fn paths(args: &BackupRun) -> (&[OsString], &Path) {
    let (directory, sources) = args.paths.split_last().expect("the parser wants two");
    (sources, Path::new(directory))
}

/// Adds a point of one disk.
pub(super) fn run(args: &BackupRun, source_name: &OsStr, directory: &Path) -> Result<()> {
    let spec = spec(args, source_name)?;
    let set = BackupSet::open_or_make(directory)?;
    set.remove_partial_files()?;
    let (number, manifest, note, hold_ns) = image::block_on(async {
        let interrupt = Interrupt::watch()?;
        let graph = image::trusting_graph();
        let source = image::open(&graph, &spec).await?;
        let run = Run::new(args, &graph, &set, (source_name, &source));
        let made = interrupt.run_or_drop(make_all(&graph, std::slice::from_ref(&run))).await;
        let made = match made {
            Ok(made) => Ok(made),
            Err(error) => Err(run.take_back(error).await),
        };
        // The bitmap is stored before the point exists that depends on it.
        let closed = source.close().await?.into_result();
        let (mut made, begun) = made?;
        closed?;
        let (number, manifest, note, partial) = made.pop().expect("of one disk");
        set.publish(number, &manifest)?;
        partial.complete();
        Ok((number, manifest, note, moment::longest_ns(&begun)))
    })?;
    print(args, number, &manifest, &note, hold_ns)
}

/// How a source is opened.
pub(super) fn spec<'a>(args: &'a BackupRun, name: &'a OsStr) -> Result<Spec<'a>> {
    let cache = image_spec::cache_mode("-T", &args.cache)?;
    let spec = Spec::read(name, &args.source)?.cache(cache);
    Ok(if args.no_bitmap { spec } else { spec.writable() })
}

/// One run of a backup of one disk.
pub(super) struct Run<'a> {
    args: &'a BackupRun,
    graph: &'a Graph,
    set: &'a BackupSet,
    /// Names the directory in bitmaps.
    set_id: String,
    source: &'a NodeRef,
    source_name: &'a OsStr,
}

/// Number of a point, and the point that it is an increment on.
struct Plan<'a> {
    number: u32,
    base: Option<&'a Point>,
}

/// Makes the points of all disks, which show one moment. Nothing is published.
pub(super) async fn make_all(graph: &Graph, runs: &[Run<'_>]) -> Result<(Vec<Made>, Vec<Begun>)> {
    let mut plans = Vec::with_capacity(runs.len());
    for run in runs {
        plans.push(run.plan().await?);
    }
    let disks = runs.iter().map(|run| (run.source, run.new_bitmap()));
    let begun = moment::take(graph, disks.collect()).await?;
    let mut made = Vec::with_capacity(runs.len());
    for ((run, plan), disk) in runs.iter().zip(&plans).zip(&begun) {
        made.push(run.make(plan, disk.bitmap.clone()).await?);
    }
    Ok((made, begun))
}

/// Number, manifest, note and image of a point that is not published yet.
pub(super) type Made = (u32, Manifest, Note, PartialOutput);

impl<'a> Run<'a> {
    pub(super) fn new(
        args: &'a BackupRun,
        graph: &'a Graph,
        set: &'a BackupSet,
        (source_name, source): (&'a OsStr, &'a NodeRef),
    ) -> Self {
        let set_id = set.last().map_or_else(|| token("set"), |last| last.note.set.clone());
        Self { args, graph, set, set_id, source, source_name }
    }

    /// Finds out what the point is made on. Removes bitmaps of points that were not made.
    async fn plan(&self) -> Result<Plan<'_>> {
        let number = self.set.next_number()?;
        self.remove_stale_bitmaps().await?;
        Ok(Plan { number, base: self.base()? })
    }

    /// Copies the disk. Nothing is published; [`Run::take_back`] undoes it.
    async fn make(&self, plan: &Plan<'_>, bitmap: Option<String>) -> Result<Made> {
        let Plan { number, base } = *plan;
        let note = Note {
            set: self.set_id.clone(),
            kind: if base.is_some() { Kind::Incremental } else { Kind::Full },
            source: self.source_name.to_string_lossy().into_owned(),
            time: seconds(),
            bitmap,
        };
        let path = self.set.partial_image(number);
        let mut partial = PartialOutput::before_creation([path.clone()], false);
        self.create(&path, base).await?;
        partial.set_created();
        let manifest = self.copy(&path, base, &note).await?;
        Ok((number, manifest, note, partial))
    }

    /// The point that an increment is made on; `None` for a full backup.
    fn base(&self) -> Result<Option<&Point>> {
        let Some(last) = self.set.last().filter(|_| !self.args.full) else { return Ok(None) };
        match self.changes_since(last).and_then(|_| self.set.chain(last)) {
            Ok(_) => Ok(Some(last)),
            Err(error) if self.args.or_full => {
                let why = crate::report::message(&error);
                printer::message(format_args!("bds: making a full backup: {why}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The bitmap that recorded what changed after this point.
    fn changes_since(&self, point: &Point) -> Result<BitmapInfo> {
        let number = point.number;
        let refuse = |why: &str| {
            let message = format!(
                "no increment on point {number} can be made: {why}; use --full, or --or-full"
            );
            Err(Error::new(ErrorKind::InvalidInput, message))
        };
        let Some(name) = &point.note.bitmap else {
            return refuse("that point was made without a bitmap");
        };
        let bitmaps = self.source.bitmaps();
        match bitmaps.into_iter().find(|info| info.name.as_deref() == Some(name)) {
            None => refuse(&format!(
                "the source has no bitmap '{name}': it is another disk, or a program that keeps no \
                 bitmaps has written to it"
            )),
            Some(info) if info.inconsistent => {
                refuse("its bitmap was not stored: the program that wrote to the source was killed")
            }
            Some(info) if !info.recording => refuse("its bitmap is disabled"),
            Some(info) => Ok(info),
        }
    }

    /// Removes bitmaps of this directory's earlier points.
    async fn remove_stale_bitmaps(&self) -> Result<()> {
        if self.args.no_bitmap {
            return Ok(());
        }
        let current = self.set.last().and_then(|last| last.note.bitmap.as_deref());
        let prefix = format!("bds-{}-", self.set_id);
        for info in self.source.bitmaps() {
            let name = info.name.as_deref().unwrap_or_default();
            if name.starts_with(&prefix) && Some(name) != current {
                self.source.remove_bitmap(name).await?;
            }
        }
        Ok(())
    }

    /// The name of a bitmap that records what changes after this backup. `None`: the source cannot
    /// keep one.
    fn new_bitmap(&self) -> Option<String> {
        if self.args.no_bitmap {
            return None;
        }
        if self.source.stores_bitmaps() {
            return Some(format!("bds-{}-{}", self.set_id, token("point")));
        }
        if !self.args.quiet {
            let format = self.source.driver_name();
            printer::message(format_args!(
                "bds: the next backup will be full: a {format} image keeps no bitmap"
            ));
        }
        None
    }

    async fn create(&self, path: &Path, base: Option<&Point>) -> Result<()> {
        let mut options = Options::new();
        options.set("size", self.source.len());
        if let Some(base) = base {
            options.set("backing_file", image_name(base.number));
            options.set("backing_fmt", "qcow2");
        }
        cmd::create::create(self.graph, "qcow2", path.to_owned(), options, false).await.map(drop)
    }

    async fn copy(&self, path: &Path, base: Option<&Point>, note: &Note) -> Result<Manifest> {
        let mut options = Options::new();
        options.set("driver", "qcow2");
        options.set("file.driver", "file");
        options.set_path("file.filename", path);
        let target = self.graph.open(options).await?;
        let source = image::backend(self.source, false)?;
        let backend = image::backend(&target, true)?;
        let map = self.map(base)?;
        let builder = ManifestBuilder::new(source.len())?;
        let options = RunOptions {
            target_is_zero: base.is_none(),
            may_unmap: true,
            sparse_len: 4096,
            compress: self
                .args
                .compress
                .then(|| backend.compressed_unit().map(u64::from))
                .flatten(),
            ..RunOptions::default()
        };
        let progress = Progress::new(self.args.progress && !self.args.quiet);
        copy(&map, (&source, &backend), &builder, &options, progress).await?;
        let parent = base.map(|base| base.manifest.root());
        if let Some(base) = base {
            builder.fill_from(&base.manifest)?;
        }
        let manifest = self.finish(builder, &source, parent, note).await?;
        drop(source);
        image::close(backend, target).await?;
        Ok(manifest)
    }

    /// What is to be copied.
    fn map(&self, base: Option<&Point>) -> Result<CopyMap> {
        let map = CopyMap::new(self.source.len(), GRANULARITY)?;
        match base {
            None => map.mark_all(),
            Some(base) => {
                let id = self.changes_since(base)?.id;
                let lease = self.graph.lease_bitmap(id, "bds backup")?;
                let bits = lease.bits();
                let len = self.source.len();
                bits.areas(0..bits.len()).for_each(|area| map.mark(area.start..area.end.min(len)));
            }
        }
        Ok(map)
    }

    async fn finish(
        &self,
        builder: ManifestBuilder,
        source: &bds_core::request::Backend,
        parent: Option<ContentHash>,
        note: &Note,
    ) -> Result<Manifest> {
        let note = serde_json::to_string(note).expect("a struct of texts and numbers");
        builder.finish(source, parent, &note, |_, _| true).await
    }

    /// Removes the bitmap of a point that was not made.
    pub(super) async fn take_back(&self, error: Error) -> Error {
        match self.remove_stale_bitmaps().await {
            Ok(()) => error,
            Err(second) => error.caused_by(second.context("the new bitmap is left")),
        }
    }
}

pub(super) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// A name that no other run makes.
fn token(what: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let seed = format!("{what} {now} {}", std::process::id());
    ContentHash::of_chunk(seed.as_bytes()).to_string()[..16].to_owned()
}

fn print(
    args: &BackupRun,
    number: u32,
    manifest: &Manifest,
    note: &Note,
    hold_ns: u128,
) -> Result<()> {
    if args.output == Output::Json {
        return printer::json(&json!({
            "point": number,
            "kind": note.kind,
            "length": manifest.len(),
            "root": manifest.root().to_string(),
            "longest-write-hold-ns": hold_ns,
        }));
    }
    if args.quiet {
        return Ok(());
    }
    let kind = match note.kind {
        Kind::Full => "full",
        Kind::Incremental => "incremental",
    };
    printer::line(format_args!("Made point {number} ({kind}): content {}", manifest.root()))
}
