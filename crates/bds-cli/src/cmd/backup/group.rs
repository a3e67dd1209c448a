//! Backups of several disks as one: a point exists only if all disks have it.
//!
//! ```text
//! disks.json            the names of the disks
//! NAME/000001.qcow2 …   the directory of each disk, as `crate::backup_set` has it
//! 000001.point          a point: which point of which disk, and its content
//! ```
//! All images are opened, and so locked, before one change gives each of them the bitmap of the
//! point (`moment`): no other program writes to any of them until the last one is copied, and what
//! is copied is of that moment. The images of a
//! point are made and become durable first, then its record gets its name. A run that is killed
//! leaves unfinished points, or points of single disks that no record names, which are unfinished
//! again; the next run goes on with them. Its increments are on the last point that all disks have.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bds_core::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::list::{self, utc};
use super::moment::{self, Begun};
use super::prune::{self, Pruned};
use super::restore;
use super::run::{Made, make_and_close, seconds};
use super::verify::verify_point;
use crate::args::{BackupList, BackupPrune, BackupRestore, BackupRun, BackupVerify, Output};
use crate::backup_set::{BackupSet, Point, lock, number_of};
use crate::interrupt::Interrupt;
use crate::{cmd, image, printer};

/// Names the disks.
const DISKS: &str = "disks.json";
/// Longest name of a disk, in bytes.
const MAX_NAME_LEN: usize = 128;

/// A point of all disks.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    point: u32,
    /// When the backup began, in seconds since 1970.
    time: u64,
    disks: BTreeMap<String, Part>,
}

/// The point of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    point: u32,
    /// Root hash of its manifest.
    root: String,
}

/// A directory of backups of several disks, locked.
pub(super) struct Group {
    directory: PathBuf,
    names: BTreeSet<String>,
    /// Oldest first.
    records: Vec<Record>,
    _lock: File,
}

impl Group {
    /// Whether this is a directory of several disks.
    pub(super) fn is_one(directory: &Path) -> bool {
        directory.join(DISKS).exists()
    }

    fn open(directory: &Path) -> Result<Self> {
        let io = |error| Error::io(error, "cannot list").file(directory);
        let lock = lock(directory)?;
        let names = read(&directory.join(DISKS))?;
        let mut records: Vec<Record> = Vec::new();
        for entry in fs::read_dir(directory).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".point"));
            if stem.and_then(number_of).is_some() {
                records.push(read(&directory.join(&name))?);
            }
        }
        records.sort_by_key(|record| record.point);
        Ok(Self { directory: directory.to_owned(), names, records, _lock: lock })
    }

    /// Opens a directory for these disks, or makes it.
    fn open_or_make(directory: &Path, names: &BTreeSet<String>) -> Result<Self> {
        let refuse =
            |message: String| Err(Error::new(ErrorKind::InvalidInput, message).file(directory));
        if !Self::is_one(directory) {
            match fs::create_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(error, "cannot make the directory").file(directory));
                }
                _ => {}
            }
            if !BackupSet::open(directory)?.points().is_empty() {
                return refuse("holds backups of a single disk: name another directory".into());
            }
            if names.len() < 2 {
                return refuse("--name is for several images".into());
            }
            let bytes = serde_json::to_vec(names).expect("a list of texts");
            write(&directory.join(DISKS), &bytes)?;
        }
        let this = Self::open(directory)?;
        if this.names != *names {
            let list = |names: &BTreeSet<String>| {
                names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
            };
            return refuse(format!(
                "holds backups of the disks {}, not of {}: a point has all of them",
                list(&this.names),
                list(names)
            ));
        }
        Ok(this)
    }

    fn set(&self, name: &str) -> Result<BackupSet> {
        BackupSet::open(&self.directory.join(name))
    }

    /// The record of this point; the newest without one.
    fn record(&self, number: Option<u32>) -> Result<&Record> {
        let found = match number {
            Some(number) => self.records.iter().find(|record| record.point == number),
            None => self.records.last(),
        };
        found.ok_or_else(|| {
            let message = match number {
                Some(number) => format!("there is no point {number}; see 'bds backup list'"),
                None => "there is no backup".to_owned(),
            };
            Error::new(ErrorKind::NotFound, message).file(&self.directory)
        })
    }

    /// Removes points of this disk that no record names. The last one is taken back to what it was
    /// before it was published, if it can be gone on with.
    fn remove_unfinished(&self, name: &str, set: &BackupSet) -> Result<()> {
        let is_named = |point: &Point| {
            let part = |record: &Record| record.disks.get(name).map(|part| part.point);
            self.records.iter().any(|record| part(record) == Some(point.number))
        };
        let mut unnamed: Vec<Point> =
            set.points().iter().filter(|point| !is_named(point)).cloned().collect();
        if let [.., last] = &unnamed[..]
            && set.record(last.number).exists()
        {
            set.withdraw(last.number)?;
            unnamed.pop();
        }
        prune::remove(set, &unnamed)
    }

    /// The point that a run has left unfinished, and the disks of which something was copied.
    fn unfinished(&self) -> Result<Option<(u32, Vec<String>)>> {
        let mut disks = Vec::new();
        for name in self.names.iter().filter(|name| self.directory.join(name).exists()) {
            let set = self.set(name)?;
            let named = |record: &Record| record.disks.get(name).map(|part| part.point);
            let last = self.records.last().and_then(named);
            let is_left = set.last().map(|point| point.number) > last;
            if is_left || list::UnfinishedPoint::of(&set)?.is_some() {
                disks.push(name.clone());
            }
        }
        Ok((!disks.is_empty()).then(|| (self.next_number(), disks)))
    }

    fn next_number(&self) -> u32 {
        self.records.last().map_or(1, |last| last.point + 1)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.point"))
    }
}

impl Record {
    /// The point of a disk, checked to be the one that was recorded.
    fn point<'s>(&self, name: &str, set: &'s BackupSet) -> Result<&'s Point> {
        let refuse = |words: &str| {
            let message = format!("point {} of the disk '{name}' {words}", self.point);
            Error::new(ErrorKind::InvalidImage, message)
        };
        let part = self.disks.get(name).ok_or_else(|| refuse("was not recorded"))?;
        let point =
            set.point(Some(part.point)).map_err(|error| refuse("is missing").caused_by(error))?;
        match point.manifest.root().to_string() == part.root {
            true => Ok(point),
            false => Err(refuse("has another content than was recorded")),
        }
    }
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|error| Error::io(error, "cannot read").file(path))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("is damaged ({error})");
        Error::new(ErrorKind::InvalidImage, message).file(path)
    })
}

/// Writes a file so that it has its name when its bytes are durable.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let partial = path.with_extension("partial");
    let written = || -> io::Result<()> {
        let mut file = File::create(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        File::open(path.parent().expect("it lies in a directory"))?.sync_all()
    };
    written().map_err(|error| Error::io(error, "cannot write").file(path))
}

/// The names of the disks, in the order of the images.
fn names(args: &BackupRun, sources: &[OsString]) -> Result<Vec<String>> {
    let refuse = |message: String| Err(Error::new(ErrorKind::InvalidInput, message));
    if !args.names.is_empty() && args.names.len() != sources.len() {
        return refuse(format!(
            "--name is given {} times for {} images",
            args.names.len(),
            sources.len()
        ));
    }
    let stem = |source: &OsString| {
        let stem = Path::new(source).file_stem().and_then(OsStr::to_str);
        stem.filter(|_| !args.source.image_opts).map(str::to_owned)
    };
    let names: Vec<String> = match args.names.is_empty() {
        false => args.names.clone(),
        true => sources.iter().map(|source| stem(source).unwrap_or_default()).collect(),
    };
    for (index, name) in names.iter().enumerate() {
        let is_fine = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | ' ');
        let is_name = name.starts_with(char::is_alphanumeric) && name.chars().all(is_fine);
        let is_ours = name == DISKS
            || name == "lock"
            || [".point", ".partial"].iter().any(|end| name.ends_with(end));
        if !is_name || name.len() > MAX_NAME_LEN || is_ours {
            return refuse(format!("'{name}' cannot name a disk: give a --name for each image"));
        }
        if names[..index].contains(name) {
            return refuse(format!("two images are named '{name}': give a --name for each"));
        }
    }
    Ok(names)
}

/// Adds a point of all disks.
pub(super) fn run(args: &BackupRun, sources: &[OsString], directory: &Path) -> Result<()> {
    let names = names(args, sources)?;
    let group = Group::open_or_make(directory, &names.iter().cloned().collect())?;
    let mut sets = Vec::with_capacity(names.len());
    for name in &names {
        let path = directory.join(name);
        let set = BackupSet::open_or_make(&path)?;
        group.remove_unfinished(name, &set)?;
        // Without the points that were removed.
        drop(set);
        sets.push(BackupSet::open(&path)?);
    }
    let number = group.next_number();
    let time = seconds();
    let pairs: Vec<(&OsStr, &BackupSet)> =
        sources.iter().map(OsString::as_os_str).zip(&sets).collect();
    let (made, begun) = cmd::job::block_on(make_and_close(args, &pairs))?;
    let disks = publish(&group, (number, time), &names, &sets, &made)?;
    // Only now none of them has to be made again.
    sets.iter().try_for_each(BackupSet::remove_all_unfinished)?;
    print(args, number, &names, &made, (&disks, &begun))
}

/// Publishes the points of the disks, then the record that makes them a point of all.
fn publish(
    group: &Group,
    (point, time): (u32, u64),
    names: &[String],
    sets: &[BackupSet],
    made: &[Made],
) -> Result<BTreeMap<String, Part>> {
    let mut disks = BTreeMap::new();
    for ((name, set), made) in names.iter().zip(sets).zip(made) {
        set.publish(made.number)?;
        let root = made.manifest.root().to_string();
        disks.insert(name.clone(), Part { point: made.number, root });
    }
    let record = Record { point, time, disks };
    let bytes = serde_json::to_vec_pretty(&record).expect("texts and numbers");
    write(&group.path(point), &bytes)?;
    Ok(record.disks)
}

fn print(
    args: &BackupRun,
    point: u32,
    names: &[String],
    made: &[Made],
    (disks, begun): (&BTreeMap<String, Part>, &[Begun]),
) -> Result<()> {
    let longest_ns = moment::longest_ns(begun);
    if args.output == Output::Json {
        let all = names.iter().zip(made).zip(begun).map(|((name, made), begun)| {
            let Part { point, root } = &disks[name];
            let hold_ns = begun.hold.as_nanos();
            let mut disk = json!({ "point": point, "root": root, "write-hold-ns": hold_ns });
            made.add_to(&mut disk);
            (name.clone(), disk)
        });
        let all: serde_json::Map<String, Value> = all.collect();
        return printer::json(
            &json!({ "point": point, "longest-write-hold-ns": longest_ns, "disks": all }),
        );
    }
    if args.quiet {
        return Ok(());
    }
    let names: Vec<&str> = disks.keys().map(String::as_str).collect();
    let names = names.join(", ");
    let count = disks.len();
    printer::line(format_args!(
        "Made point {point} of {count} disks: {names}; longest write hold {} us",
        longest_ns.div_ceil(1000)
    ))
}

pub(super) fn list(args: &BackupList) -> Result<()> {
    let group = Group::open(&args.directory)?;
    let unfinished = group.unfinished()?;
    if args.output == Output::Json {
        let records = group.records.iter().map(|record| json!(record));
        return printer::json(&records.chain(unfinished.map(as_json)).collect());
    }
    let mut text = String::from("POINT   TIME (UTC)           DISKS\n");
    for Record { point, time, disks } in &group.records {
        let disks: Vec<String> =
            disks.iter().map(|(name, part)| format!("{name} {:06}", part.point)).collect();
        text += &format!("{point:06}  {}  {}\n", utc(*time), disks.join(", "));
    }
    if let Some((point, disks)) = unfinished {
        text += &format!("{point:06}  {:<19}  {}\n", list::UNFINISHED, disks.join(", "));
    }
    printer::text(&text)
}

fn as_json((point, disks): (u32, Vec<String>)) -> Value {
    let disks: serde_json::Map<String, Value> =
        disks.into_iter().map(|name| (name, Value::Null)).collect();
    json!({ "point": point, "kind": list::UNFINISHED, "disks": disks })
}

/// Restores all disks of a point to a new directory, or one of them to a new file.
pub(super) fn restore(args: &BackupRestore) -> Result<bool> {
    let group = Group::open(&args.directory)?;
    let record = group.record(args.point)?;
    restore::refuse_existing(&args.target)?;
    if let Some(name) = args.disk.as_ref().filter(|name| !record.disks.contains_key(*name)) {
        let message = format!("has no disk '{name}'");
        return Err(Error::new(ErrorKind::NotFound, message).file(&args.directory));
    }
    let is_wanted = |name: &String| args.disk.as_ref().is_none_or(|wanted| wanted == name);
    let wanted: Vec<&String> = record.disks.keys().filter(|name| is_wanted(name)).collect();
    let mut sets = Vec::new();
    for name in &wanted {
        sets.push(group.set(name)?);
    }
    // All are looked at before the first is written.
    let mut points = Vec::new();
    for (name, set) in wanted.iter().zip(&sets) {
        let point = record.point(name, set)?;
        set.chain(point)?;
        points.push(point);
    }
    let new_directory = match args.disk {
        Some(_) => None,
        None => Some(NewDirectory::make(&args.target)?),
    };
    let reports = image::block_on(async {
        let interrupt = Interrupt::watch()?;
        let (mut reports, mut partials) = (Vec::new(), Vec::new());
        for ((name, set), point) in wanted.iter().zip(&sets).zip(&points) {
            let path = match args.disk {
                Some(_) => args.target.clone(),
                None => args.target.join(format!("{name}.{}", args.output_format)),
            };
            let restored = restore::restore(args, set, point, &path);
            let (report, partial) = interrupt.run_or_drop(restored).await?;
            reports.push((name.as_str(), point.number, report));
            partials.push(partial);
        }
        // All or none.
        if reports.iter().all(|(_, _, report)| report.is_good()) {
            partials.into_iter().for_each(|partial| partial.complete());
        }
        Ok(reports)
    })?;
    let is_good = reports.iter().all(|(_, _, report)| report.is_good());
    if is_good && let Some(directory) = new_directory {
        directory.keep();
    }
    for (name, number, report) in &reports {
        let words = restore::verdict(*number, report);
        match report.is_good() {
            false => printer::message(format_args!("bds: nothing was restored: {name}: {words}")),
            true if args.quiet || !is_good => {}
            true => printer::line(format_args!("Restored {name}; {words}"))?,
        }
    }
    Ok(is_good)
}

/// A directory that is removed again if it is empty when this is dropped.
struct NewDirectory(Option<PathBuf>);

impl NewDirectory {
    fn make(path: &Path) -> Result<Self> {
        let made = fs::create_dir(path);
        made.map_err(|error| Error::io(error, "cannot make the directory").file(path))?;
        Ok(Self(Some(path.to_owned())))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Fails if there is a file of another program meanwhile.
            let _removed = fs::remove_dir(path);
        }
    }
}

/// Returns whether all is good.
pub(super) fn verify(args: &BackupVerify) -> Result<bool> {
    let group = Group::open(&args.directory)?;
    let records: Vec<&Record> = match args.point {
        Some(number) => vec![group.record(Some(number))?],
        None => group.records.iter().collect(),
    };
    let mut found = Vec::new();
    image::block_on(async {
        let interrupt = Interrupt::watch()?;
        for record in records {
            for name in record.disks.keys() {
                let set = group.set(name)?;
                let point = record.point(name, &set)?;
                let shows_progress = args.progress && !args.quiet;
                let report = verify_point(&set, point, &interrupt, shows_progress).await?;
                found.push((record.point, name, point.number, report));
            }
        }
        Ok(())
    })?;
    if args.output == Output::Json {
        let all = found.iter().map(|(point, name, _, report)| {
            let bad: Vec<_> = report.bad.iter().map(restore::range).collect();
            json!({ "point": point, "disk": name, "checked": report.checked, "bad": bad })
        });
        printer::json(&all.collect::<Vec<_>>().into())?;
    } else if !args.quiet {
        for (point, name, number, report) in &found {
            let words = restore::verdict(*number, report);
            printer::line(format_args!("point {point}, disk {name}: {words}"))?;
        }
    }
    Ok(found.iter().all(|(_, _, _, report)| report.is_good()))
}

/// Removes the oldest points.
pub(super) fn prune(args: &BackupPrune) -> Result<Pruned> {
    let group = Group::open(&args.directory)?;
    let count = group.records.len();
    let (old, kept) = group.records.split_at(count.saturating_sub(args.keep));
    let (Some(first), false) = (kept.first(), old.is_empty()) else {
        return Ok(Pruned { removed: Vec::new(), kept_count: kept.len() });
    };
    for name in first.disks.keys() {
        let set = group.set(name)?;
        prune::make_full(&set, first.point(name, &set)?)?;
    }
    // Then no record names the old ones any more, and then they go.
    for record in old {
        let path = group.path(record.point);
        let removed = fs::remove_file(&path);
        removed.map_err(|error| Error::io(error, "cannot remove the point").file(&path))?;
    }
    let synced = File::open(&group.directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::io(error, "cannot remove the points").file(&group.directory))?;
    for (name, part) in &first.disks {
        let set = group.set(name)?;
        let older = set.points().iter().filter(|point| point.number < part.point);
        prune::remove(&set, &older.cloned().collect::<Vec<_>>())?;
    }
    let removed = old.iter().map(|record| record.point).collect();
    Ok(Pruned { removed, kept_count: kept.len() })
}
