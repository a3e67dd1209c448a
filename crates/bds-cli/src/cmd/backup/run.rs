//! `backup run`: adds a point to a directory of backups.
//!
//! ```text
//! notes ─► one change: new bitmaps (`moment`) ─► job: NNNNNN.qcow2.partial, its record, then its
//!   manifest ─► source closed: its bitmap is stored ─► image closed: durable ─► image and manifest
//!   get their names ─► record and notes removed
//! ```
//! Killed anywhere, it leaves the points before, and an unfinished one with which the next run goes
//! on (`leftover`), or which it removes.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bds_core::copy::CopyMap;
use bds_core::graph::{BitmapInfo, Graph, NodeRef};
use bds_core::{Error, ErrorKind, Options, Result};
use bds_jobs::backup::{BackupOptions, BackupSync, BitmapSync};
use bds_jobs::manifest::{ContentHash, Manifest};
use bds_jobs::record::{ManifestOptions, RecordOptions};
use serde_json::{Value, json};

use super::copy::GRANULARITY;
use super::copy_jobs;
use super::leftover::{self, Leftover, Wanted};
use super::moment::{self, Begun, Edit};
use super::notes::{self, Found, Notes};
use crate::args::{BackupRun, Output};
use crate::backup_set::{BackupSet, Kind, Note, Point, image_name, read_manifest};
use crate::image_spec::{self, Spec};
use crate::interrupt::Interrupt;
use crate::{cmd, image, printer};

/// Shortest run of zeros that is stored as such, in bytes.
const SPARSE_LEN: u64 = 4096;

/// The images, and the directory.
pub(super) fn paths(args: &BackupRun) -> (&[OsString], &Path) {
    let (directory, sources) = args.paths.split_last().expect("the parser wants two");
    (sources, Path::new(directory))
}

/// Adds a point of one disk.
pub(super) fn run(args: &BackupRun, source_name: &OsStr, directory: &Path) -> Result<()> {
    let set = BackupSet::open_or_make(directory)?;
    let (mut made, begun) = cmd::job::block_on(async {
        let sources = [(source_name, &set)];
        let made = make_and_close(args, &sources).await?;
        set.publish(made.0[0].number)?;
        Ok(made)
    })?;
    set.remove_all_unfinished()?;
    print(args, &made.pop().expect("of one disk"), moment::longest_ns(&begun))
}

/// Makes the points of all disks, each with its directory, and closes the sources. Nothing is
/// published.
pub(super) async fn make_and_close(
    args: &BackupRun,
    disks: &[(&OsStr, &BackupSet)],
) -> Result<(Vec<Made>, Vec<Begun>)> {
    let interrupt = Interrupt::watch()?;
    let graph = image::trusting_graph();
    let mut nodes: Vec<NodeRef> = Vec::with_capacity(disks.len());
    for (name, _) in disks {
        nodes.push(image::open(&graph, &spec(args, name)?).await?);
    }
    let mut runs = Vec::with_capacity(disks.len());
    for ((name, set), node) in disks.iter().zip(&nodes) {
        runs.push(Run::new(args, &graph, set, (name, node))?);
    }
    let made = match make_all(&graph, &runs, &interrupt).await {
        Ok(made) => Ok(made),
        Err(error) => Err(give_up(&runs, error).await),
    };
    let is_kept = runs.iter().any(Run::has_record);
    drop(runs);
    // The bitmaps are stored before the point exists that depends on them.
    let mut closed = Ok(());
    for node in nodes {
        closed = closed.and(node.close().await?.into_result());
    }
    if made.is_err() && !is_kept {
        disks.iter().try_for_each(|(_, set)| set.remove_all_unfinished())?;
    }
    let made = made?;
    closed?;
    Ok(made)
}

/// How a source is opened.
fn spec<'a>(args: &'a BackupRun, name: &'a OsStr) -> Result<Spec<'a>> {
    let cache = image_spec::cache_mode("-T", &args.cache)?;
    let spec = Spec::read(name, &args.source)?.cache(cache);
    Ok(if args.no_bitmap { spec } else { spec.writable() })
}

/// After a failure: what there is a record of is kept; else the new bitmaps are removed.
async fn give_up(runs: &[Run<'_>], mut error: Error) -> Error {
    if runs.iter().any(Run::has_record) {
        return error;
    }
    for run in runs {
        error = run.take_back(error).await;
    }
    error
}

/// One run of a backup of one disk.
struct Run<'a> {
    args: &'a BackupRun,
    graph: &'a Graph,
    set: &'a BackupSet,
    number: u32,
    /// What an earlier run has noted of the point.
    notes: Found,
    /// Names the directory in bitmaps.
    set_id: String,
    source: &'a NodeRef,
    source_name: &'a OsStr,
    /// How often the record is brought up to date.
    interval_bytes: u64,
}

/// How a point is made.
struct Plan<'a> {
    /// The point that it is an increment on.
    base: Option<&'a Point>,
    note: Note,
    /// Bitmaps of the source that are not needed any more.
    stale: Vec<String>,
    /// The image that an earlier run has left, until it is the target.
    left: Option<NodeRef>,
    /// Why what an earlier run has left is of no use.
    started_over: Option<String>,
}

/// A point that is not published yet.
pub(super) struct Made {
    pub(super) number: u32,
    pub(super) manifest: Manifest,
    note: Note,
    /// Bytes that an earlier run had copied.
    resumed: u64,
    /// Why nothing of what it left is used.
    started_over: Option<String>,
}

impl Made {
    /// What became of an unfinished point, for JSON.
    pub(super) fn add_to(&self, object: &mut Value) {
        object["resumed-bytes"] = json!(self.resumed);
        if let Some(why) = &self.started_over {
            object["started-over"] = json!(why);
        }
    }
}

/// Makes the points of all disks, which show one moment. Nothing is published.
async fn make_all(
    graph: &Graph,
    runs: &[Run<'_>],
    interrupt: &Interrupt,
) -> Result<(Vec<Made>, Vec<Begun>)> {
    let mut plans = Vec::with_capacity(runs.len());
    for run in runs {
        plans.push(interrupt.run_or_drop(run.plan()).await?);
    }
    for (run, plan) in runs.iter().zip(&plans) {
        run.begin(plan)?;
    }
    let edits = runs.iter().zip(&plans).map(|(run, plan)| Edit {
        disk: run.source,
        bitmap: plan.note.bitmap.clone(),
        removed: plan.stale.clone(),
    });
    let begun = moment::take(graph, edits.collect()).await?;
    let mut targets = Vec::with_capacity(runs.len());
    for (run, plan) in runs.iter().zip(&mut plans) {
        targets.push(interrupt.run_or_drop(run.target(plan)).await?);
    }
    let disks = runs.iter().zip(&plans).zip(&targets).enumerate();
    let backups = disks.map(|(at, ((run, plan), target))| run.backup(plan, target, at));
    let copied = copy_jobs::run(graph, backups.collect(), (runs[0].args, interrupt)).await;
    let mut closed = Ok(());
    for target in targets {
        closed = closed.and(target.close().await?.into_result());
    }
    let resumed = copied?;
    closed?;
    let mut made = Vec::with_capacity(runs.len());
    for ((run, plan), resumed) in runs.iter().zip(plans).zip(resumed) {
        let manifest = read_manifest(&run.set.partial_manifest(run.number))?;
        let Plan { note, started_over, .. } = plan;
        made.push(Made { number: run.number, manifest, note, resumed, started_over });
    }
    Ok((made, begun))
}

impl<'a> Run<'a> {
    fn new(
        args: &'a BackupRun,
        graph: &'a Graph,
        set: &'a BackupSet,
        (source_name, source): (&'a OsStr, &'a NodeRef),
    ) -> Result<Self> {
        let number = set.next_number()?;
        let notes = Notes::read(set, number)?;
        let known = set.last().map(|last| &last.note.set);
        let known = known.or(notes.notes().map(|notes| &notes.set));
        let set_id = known.map_or_else(|| token("set"), Clone::clone);
        let interval = args.record_interval.as_deref();
        let interval_bytes = interval.map_or(Ok(0), |text| cmd::size("record interval", text))?;
        Ok(Self { args, graph, set, number, notes, set_id, source, source_name, interval_bytes })
    }

    /// True if it can be gone on with later.
    fn has_record(&self) -> bool {
        self.set.record(self.number).exists()
    }

    /// Finds out what the point is made on, and with. Changes nothing.
    async fn plan(&self) -> Result<Plan<'_>> {
        let base = self.base()?;
        let (left, started_over) = match self.left(base).await? {
            Leftover::Nothing => (None, None),
            Leftover::Usable(node) => (Some(node), None),
            Leftover::Unusable(why) => (None, Some(why)),
        };
        let note = Note {
            set: self.set_id.clone(),
            kind: if base.is_some() { Kind::Incremental } else { Kind::Full },
            source: self.source_name.to_string_lossy().into_owned(),
            time: seconds(),
            bitmap: self.new_bitmap(),
        };
        let stale = self.stale_bitmaps(self.notes.notes());
        Ok(Plan { base, note, stale, left, started_over })
    }

    async fn left(&self, base: Option<&Point>) -> Result<Leftover> {
        let Self { graph, set, number, notes, source, .. } = self;
        if self.args.start_over {
            let is_there = set.partial_image(*number).exists();
            let why = "as --start-over asks".to_owned();
            return Ok(if is_there { Leftover::Unusable(why) } else { Leftover::Nothing });
        }
        let map = self.map(base)?;
        Wanted { graph, set, source, number: *number, base, map: &map, notes }.left().await
    }

    /// Removes what is of no use, and notes what is being made.
    fn begin(&self, plan: &Plan<'_>) -> Result<()> {
        if let Some(why) = plan.started_over.as_ref().filter(|_| !self.args.quiet) {
            let number = self.number;
            printer::message(format_args!("bds: starting over with point {number}: {why}"));
        }
        self.set.remove_unfinished(self.number, plan.left.is_some())?;
        let earlier = self.notes.notes().map(|notes| &notes.bitmaps[..]).unwrap_or_default();
        let is_there = |name: &&String| self.source.find_bitmap(name).is_some();
        let bitmaps = earlier.iter().filter(is_there).chain(&plan.note.bitmap).cloned().collect();
        let notes = Notes {
            set: self.set_id.clone(),
            kind: plan.note.kind,
            base: plan.base.map(|base| base.manifest.root().to_string()),
            source: plan.note.source.clone(),
            time: plan.note.time,
            bitmaps,
            inode: notes::inode(self.source),
        };
        notes.write(self.set, self.number)
    }

    /// The image that takes the copy: what was left, or a new one.
    async fn target(&self, plan: &mut Plan<'_>) -> Result<NodeRef> {
        if let Some(left) = plan.left.take() {
            return Ok(left);
        }
        let mut options = Options::new();
        options.set("size", self.source.len());
        if let Some(base) = plan.base {
            options.set("backing_file", image_name(base.number));
            options.set("backing_fmt", "qcow2");
        }
        let path = self.set.partial_image(self.number);
        cmd::create::create(self.graph, "qcow2", path, options, false).await?;
        let node = leftover::open(self.graph, self.set, self.number).await?;
        // Durable before there is a record of it: a crash leaves an image that can be opened.
        image::backend(&node, true)?.flush().await?;
        Ok(node)
    }

    /// The job that copies the disk.
    fn backup(&self, plan: &Plan<'_>, target: &NodeRef, at: usize) -> BackupOptions {
        let manifest = ManifestOptions {
            base: plan.base.map(|base| self.set.manifest(base.number)),
            note: serde_json::to_string(&plan.note).expect("a struct of texts and numbers"),
            ..ManifestOptions::new(self.set.partial_manifest(self.number))
        };
        let record = RecordOptions {
            check_target: cmd::mirror::check_target(self.args.check_target),
            interval_bytes: self.interval_bytes,
            // Until the point has its name.
            keep_at_success: true,
            ..RecordOptions::new(self.set.record(self.number))
        };
        let bitmap = plan.base.and_then(|base| base.note.bitmap.clone());
        BackupOptions {
            sync: if bitmap.is_some() { BackupSync::Bitmap } else { BackupSync::Full },
            // It goes with the run after, when a later point exists.
            bitmap_mode: bitmap.is_some().then_some(BitmapSync::Never),
            bitmap,
            compress: self.args.compress,
            sparse_len: SPARSE_LEN,
            target_is_zero: plan.base.is_none(),
            record: Some(record),
            manifest: Some(manifest),
            ..BackupOptions::new(self.source, target, format!("disk{at}"))
        }
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

    /// Bitmaps of this directory's earlier points, and of points that were not made.
    fn stale_bitmaps(&self, notes: Option<&Notes>) -> Vec<String> {
        if self.args.no_bitmap {
            return Vec::new();
        }
        let last = self.set.last().map(|last| &last.note);
        let current = last.and_then(|note| note.bitmap.as_deref());
        let prefix = last.map(|note| format!("bds-{}-", note.set));
        let is_stale = |name: &&str| {
            let is_ours = prefix.as_ref().is_some_and(|prefix| name.starts_with(prefix));
            let is_noted = notes.is_some_and(|notes| notes.bitmaps.iter().any(|it| it == name));
            (is_ours || is_noted) && Some(*name) != current
        };
        let bitmaps = self.source.bitmaps();
        let names = bitmaps.iter().filter_map(|info| info.name.as_deref());
        names.filter(is_stale).map(str::to_owned).collect()
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

    /// Removes the bitmap of a point that was not made.
    async fn take_back(&self, error: Error) -> Error {
        let removed = async {
            // With the bitmap that this run has added.
            let notes = Notes::read(self.set, self.number)?;
            for name in self.stale_bitmaps(notes.notes()) {
                self.source.remove_bitmap(&name).await?;
            }
            Ok::<_, Error>(())
        };
        match removed.await {
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

fn print(args: &BackupRun, made: &Made, hold_ns: u128) -> Result<()> {
    let Made { number, manifest, note, .. } = made;
    if args.output == Output::Json {
        let mut object = json!({
            "point": number,
            "kind": note.kind,
            "length": manifest.len(),
            "root": manifest.root().to_string(),
            "longest-write-hold-ns": hold_ns,
        });
        made.add_to(&mut object);
        return printer::json(&object);
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
