//! A directory of backups of one disk: points in time, each an image and its manifest.
//!
//! ```text
//! 000001.qcow2  000001.manifest     a full backup
//! 000002.qcow2  000002.manifest     an increment: its backing file is 000001.qcow2
//! 000002.full                       that increment was made a full backup (prune)
//! 000003.qcow2.partial  000003.record  000003.unfinished  000003.manifest.partial
//!                                   being made, or left by a run that did not complete
//! ```
//! A point exists when its manifest does: the image is made durable first, then the manifest gets
//! its name. The manifest's note says what the point is ([`Note`]), its root hash names the
//! content, and its parent the content below it. One process at a time works on a directory.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use bds_core::{Error, ErrorKind, Result};
use bds_jobs::manifest::Manifest;
use serde::{Deserialize, Serialize};

/// File that is locked while a process works on the directory.
const LOCK: &str = "lock";
/// Number of the last point: names have six digits.
const MAX_NUMBER: u32 = 999_999;

/// What a point contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// The whole disk.
    Full,
    /// What changed since the point before.
    Incremental,
}

/// What a manifest's note says about its point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Names the directory: bitmaps of the source carry it.
    pub(crate) set: String,
    pub(crate) kind: Kind,
    /// The source as the user named it.
    pub(crate) source: String,
    /// When the backup began, in seconds since 1970.
    pub(crate) time: u64,
    /// The bitmap of the source that records what changes after this point.
    pub(crate) bitmap: Option<String>,
}

/// A point in time.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) number: u32,
    pub(crate) manifest: Manifest,
    pub(crate) note: Note,
}

/// A directory of backups, locked.
#[derive(Debug)]
pub(crate) struct BackupSet {
    directory: PathBuf,
    /// Oldest first.
    points: Vec<Point>,
    _lock: File,
}

impl BackupSet {
    /// Opens a directory that exists.
    ///
    /// # Errors
    /// `InUse`: another process works on it; `InvalidImage`: a manifest is damaged (it is named).
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let io = |error, words: &str| Error::io(error, words.to_owned()).file(directory);
        let entries = fs::read_dir(directory).map_err(|error| io(error, "cannot list"))?;
        let lock = lock(directory)?;
        let mut points = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| io(error, "cannot list"))?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".manifest"));
            if let Some(number) = stem.and_then(number_of) {
                points.push(read_point(directory, number)?);
            }
        }
        points.sort_by_key(|point| point.number);
        Ok(Self { directory: directory.to_owned(), points, _lock: lock })
    }

    /// Opens a directory, or makes it.
    pub(crate) fn open_or_make(directory: &Path) -> Result<Self> {
        match fs::create_dir(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::io(error, "cannot make the directory").file(directory))
            }
            _ => Self::open(directory),
        }
    }

    /// The number of the point that comes next.
    ///
    /// # Errors
    /// `LimitExceeded`: names have six digits.
    pub(crate) fn next_number(&self) -> Result<u32> {
        let next = self.last().map_or(1, |last| last.number + 1);
        if next <= MAX_NUMBER {
            return Ok(next);
        }
        let message = "the directory has had its last backup: begin another one";
        Err(Error::new(ErrorKind::LimitExceeded, message).file(&self.directory))
    }

    /// Oldest first.
    pub(crate) fn points(&self) -> &[Point] {
        &self.points
    }

    pub(crate) fn last(&self) -> Option<&Point> {
        self.points.last()
    }

    /// The point of this number; the newest without one.
    pub(crate) fn point(&self, number: Option<u32>) -> Result<&Point> {
        let found = match number {
            Some(number) => self.points.iter().find(|point| point.number == number),
            None => self.last(),
        };
        found.ok_or_else(|| {
            let message = match number {
                Some(number) => format!("there is no point {number}; see 'bds backup list'"),
                None => "there is no backup".to_owned(),
            };
            Error::new(ErrorKind::NotFound, message).file(&self.directory)
        })
    }

    /// The points whose content a point shows: itself first, down to the full backup.
    ///
    /// # Errors
    /// `InvalidImage`: a link is missing, or has another content than the increment was made on.
    pub(crate) fn chain(&self, top: &Point) -> Result<Vec<&Point>> {
        let mut chain = vec![self.point(Some(top.number))?];
        while let Some(point) = chain.last().filter(|point| !self.is_full(point)) {
            let below = self.points.iter().rfind(|other| other.number < point.number);
            let Some(below) = below else {
                let message = format!("the base of point {} is missing", point.number);
                return Err(Error::new(ErrorKind::InvalidImage, message).file(&self.directory));
            };
            point.manifest.check_parent(&below.manifest).map_err(|error| {
                error
                    .with_kind(ErrorKind::InvalidImage)
                    .context(format_args!("point {} does not fit", below.number))
                    .file(self.image(point.number))
            })?;
            chain.push(below);
        }
        Ok(chain)
    }

    /// Whether its image needs no other.
    pub(crate) fn is_full(&self, point: &Point) -> bool {
        point.note.kind == Kind::Full || self.full_mark(point.number).exists()
    }

    /// Notes that the image of a point holds all of its content.
    pub(crate) fn mark_full(&self, number: u32) -> Result<()> {
        let path = self.full_mark(number);
        let mark = || File::create(&path)?.sync_all().and_then(|()| self.sync());
        mark().map_err(|error| Error::io(error, "cannot mark the backup").file(&path))
    }

    fn full_mark(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.full"))
    }

    pub(crate) fn image(&self, number: u32) -> PathBuf {
        self.directory.join(image_name(number))
    }

    /// Where the image of a new point is made.
    pub(crate) fn partial_image(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{}.partial", image_name(number)))
    }

    /// Where the manifest of a new point is made.
    pub(crate) fn partial_manifest(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.manifest.partial"))
    }

    /// Where the job that copies keeps its record.
    pub(crate) fn record(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.record"))
    }

    /// Where the notes of a point are that is not complete.
    pub(crate) fn notes(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.unfinished"))
    }

    /// Removes what runs have left that did not complete. Of the point `number` the notes stay, and
    /// with `goes_on` its image and record.
    pub(crate) fn remove_unfinished(&self, number: u32, goes_on: bool) -> Result<()> {
        self.remove_parts(|of, part| {
            of == number && (part == Unfinished::Notes || goes_on && part.is_needed())
        })
    }

    /// Removes all of that.
    pub(crate) fn remove_all_unfinished(&self) -> Result<()> {
        self.remove_parts(|_, _| false)
    }

    fn remove_parts(&self, is_kept: impl Fn(u32, Unfinished) -> bool) -> Result<()> {
        let remove = || -> io::Result<()> {
            for entry in fs::read_dir(&self.directory)? {
                let path = entry?.path();
                if Unfinished::of(&path).is_some_and(|(number, part)| !is_kept(number, part)) {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        remove().map_err(|error| {
            Error::io(error, "cannot remove unfinished backups").file(&self.directory)
        })
    }

    /// Gives an image that got its name before its manifest had one its old name again.
    pub(crate) fn recover_image(&self, number: u32) -> Result<()> {
        let (partial, image) = (self.partial_image(number), self.image(number));
        if partial.exists() || !image.exists() || self.manifest(number).exists() {
            return Ok(());
        }
        let renamed = fs::rename(&image, partial).and_then(|()| self.sync());
        renamed.map_err(|error| Error::io(error, "cannot rename the backup").file(&image))
    }

    /// Takes back the publication of a point: it is unfinished again.
    pub(crate) fn withdraw(&self, number: u32) -> Result<()> {
        let path = self.manifest(number);
        let removed = fs::remove_file(&path).and_then(|()| self.sync());
        removed.map_err(|error| Error::io(error, "cannot take back the backup").file(&path))?;
        self.recover_image(number)
    }

    /// Publishes a point whose image and manifest are complete and durable.
    pub(crate) fn publish(&self, number: u32) -> Result<()> {
        let name = self.manifest(number);
        let publish = || -> io::Result<()> {
            fs::rename(self.partial_image(number), self.image(number))?;
            // The image has its name before the manifest has, also after a power cut.
            self.sync()?;
            fs::rename(self.partial_manifest(number), &name)?;
            self.sync()
        };
        publish().map_err(|error| Error::io(error, "cannot complete the backup").file(&name))
    }

    /// Removes a point: first from the list, then its image.
    pub(crate) fn remove(&self, number: u32) -> Result<()> {
        let remove = || -> io::Result<()> {
            fs::remove_file(self.manifest(number))?;
            self.sync()?;
            fs::remove_file(self.image(number))?;
            match fs::remove_file(self.full_mark(number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            self.sync()
        };
        remove()
            .map_err(|error| Error::io(error, "cannot remove the backup").file(self.image(number)))
    }

    /// The manifest of a point.
    pub(crate) fn manifest(&self, number: u32) -> PathBuf {
        self.directory.join(format!("{number:06}.manifest"))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

/// Locks the directory until the file is dropped.
pub(crate) fn lock(directory: &Path) -> Result<File> {
    let io = |error| Error::io(error, "cannot lock").file(directory);
    let mut options = File::options();
    options.create(true).truncate(false).write(true);
    let file = options.open(directory.join(LOCK)).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let message = "another process works on this directory";
            Err(Error::new(ErrorKind::InUse, message).file(directory))
        }
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}

/// The image's name inside the directory, as an increment refers to it.
pub(crate) fn image_name(number: u32) -> String {
    format!("{number:06}.qcow2")
}

/// What a file of an unfinished point is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfinished {
    Image,
    Manifest,
    Record,
    Notes,
    /// A file that was about to take the place of another one.
    Temporary,
}

impl Unfinished {
    /// The number and the part that a name says; `None`: the name is none that this program makes.
    pub(crate) fn of(path: &Path) -> Option<(u32, Self)> {
        let name = path.file_name()?.to_str()?;
        let (digits, rest) = name.split_at_checked(6)?;
        let part = match rest {
            ".qcow2.partial" => Self::Image,
            ".manifest.partial" => Self::Manifest,
            ".record" => Self::Record,
            ".unfinished" => Self::Notes,
            _ if is_temporary(rest) => Self::Temporary,
            _ => return None,
        };
        Some((number_of(digits)?, part))
    }

    /// Whether a run that goes on needs it.
    fn is_needed(self) -> bool {
        matches!(self, Self::Image | Self::Record | Self::Notes)
    }
}

/// Whether a name without its number is the temporary one of a process: `.record.4711.tmp`.
fn is_temporary(rest: &str) -> bool {
    let stem = rest.strip_suffix(".tmp").unwrap_or_default();
    let process = [".record.", ".manifest.partial.", ".unfinished."];
    let process = process.iter().find_map(|start| stem.strip_prefix(start)).unwrap_or_default();
    !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit())
}

/// The number that a name of six digits says.
pub(crate) fn number_of(digits: &str) -> Option<u32> {
    let is_one = digits.len() == 6 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_one.then(|| digits.parse().ok()).flatten()
}

pub(crate) fn read_manifest(path: &Path) -> Result<Manifest> {
    let bytes = fs::read(path).map_err(|error| Error::io(error, "cannot read").file(path))?;
    Manifest::parse(&bytes).map_err(|error| error.file(path))
}

fn read_point(directory: &Path, number: u32) -> Result<Point> {
    let path = directory.join(format!("{number:06}.manifest"));
    let manifest = read_manifest(&path)?;
    let note = serde_json::from_str(manifest.note()).map_err(|_| {
        Error::new(ErrorKind::InvalidImage, "this manifest is not of a backup").file(&path)
    })?;
    Ok(Point { number, manifest, note })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unfinished_files_of_this_program_are_removed() {
        for (name, expected) in [
            ("000001.qcow2.partial", Some((1, Unfinished::Image))),
            ("000001.manifest.partial", Some((1, Unfinished::Manifest))),
            ("000012.record", Some((12, Unfinished::Record))),
            ("000012.unfinished", Some((12, Unfinished::Notes))),
            ("000012.record.4711.tmp", Some((12, Unfinished::Temporary))),
            ("000012.manifest.partial.1.tmp", Some((12, Unfinished::Temporary))),
            ("000012.unfinished.1.tmp", Some((12, Unfinished::Temporary))),
            ("000001.qcow2", None),
            ("1.qcow2.partial", None),
            ("disk.qcow2.partial", None),
            ("00000a.qcow2.partial", None),
            ("000001.record.tmp", None),
            ("000001.record.x.tmp", None),
            ("000001.qcow2.1.tmp", None),
            ("my.record", None),
            ("0000ä.record", None),
            (".partial", None),
        ] {
            assert_eq!(Unfinished::of(Path::new(name)), expected, "{name}");
        }
    }
}
