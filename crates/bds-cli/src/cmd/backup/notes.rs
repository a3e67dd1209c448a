//! `Notes`: what a point that is not complete is to become, in a file beside its image.
//!
//! ```text
//! hash of the rest, in hex \n
//! JSON
//! ```
//! Written before the source gets the bitmap of the point, replaced as a whole when a later run
//! goes on. They say whether what was left is of this disk and this kind of point; that its content
//! is right does not depend on them (`leftover`).

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use bds_core::graph::{NodeRef, walk};
use bds_core::{Error, Result};
use bds_jobs::manifest::ContentHash;
use serde::{Deserialize, Serialize};

use crate::backup_set::{BackupSet, Kind};

/// Longest file that is read, in bytes.
const MAX_LEN: u64 = 1 << 20;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Notes {
    /// Names the directory: bitmaps of the source carry it.
    pub(super) set: String,
    pub(super) kind: Kind,
    /// Root hash of the point that it is an increment on.
    pub(super) base: Option<String>,
    /// The source as the user named it.
    pub(super) source: String,
    /// When the last run that worked on it began, in seconds since 1970.
    pub(super) time: u64,
    /// Bitmaps of the source, each made by a run that worked on it.
    pub(super) bitmaps: Vec<String>,
    /// Of a source that keeps no bitmap: the inode of its file.
    pub(super) inode: Option<u64>,
}

/// What the file of a point's notes holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Missing,
    /// It was damaged, or holds no notes.
    Damaged,
    Notes(Notes),
}

impl Found {
    pub(super) fn into_notes(self) -> Option<Notes> {
        match self {
            Self::Notes(notes) => Some(notes),
            Self::Missing | Self::Damaged => None,
        }
    }

    pub(super) fn notes(&self) -> Option<&Notes> {
        match self {
            Self::Notes(notes) => Some(notes),
            Self::Missing | Self::Damaged => None,
        }
    }
}

impl Notes {
    /// Reads the notes of a point.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn read(set: &BackupSet, number: u32) -> Result<Found> {
        let path = set.notes(number);
        let io = |error| Error::io(error, "cannot read").file(&path);
        let facts = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            facts => facts.map_err(io)?,
        };
        // Reading a FIFO would wait for its writer.
        let bytes = match facts.is_file() && facts.len() <= MAX_LEN {
            true => fs::read(&path).map_err(io)?,
            false => Vec::new(),
        };
        Ok(Self::parse(&bytes).map_or(Found::Damaged, Found::Notes))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (hash, text) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
        let is_right = ContentHash::of_chunk(text.as_bytes()).to_string() == hash;
        is_right.then(|| serde_json::from_str(text).ok()).flatten()
    }

    fn to_bytes(&self) -> Vec<u8> {
        let text = serde_json::to_string_pretty(self).expect("a struct of texts and numbers");
        format!("{}\n{text}", ContentHash::of_chunk(text.as_bytes())).into_bytes()
    }

    /// Writes them, durably, in the place of earlier ones.
    pub(super) fn write(&self, set: &BackupSet, number: u32) -> Result<()> {
        let path = set.notes(number);
        let temporary = path.with_extension(format!("unfinished.{}.tmp", std::process::id()));
        let written = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&self.to_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        written().map_err(|error| Error::io(error, "cannot write").file(&path))
    }

    /// Whether this is the disk that they are about, as far as can be known: it has a bitmap that
    /// was made for the point, or is the same file if it keeps none.
    pub(super) fn are_of(&self, source: &NodeRef) -> bool {
        match self.bitmaps.is_empty() {
            true => self.inode.is_some() && self.inode == inode(source),
            false => self.bitmaps.iter().any(|name| source.find_bitmap(name).is_some()),
        }
    }
}

/// The inode of an image's file.
pub(super) fn inode(image: &NodeRef) -> Option<u64> {
    walk::identity(image).map(|(_, inode)| inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes() -> Notes {
        Notes {
            set: "0123".into(),
            kind: Kind::Incremental,
            base: Some("ab".into()),
            source: "disk.qcow2".into(),
            time: 7,
            bitmaps: vec!["bds-0123-1".into()],
            inode: None,
        }
    }

    #[test]
    fn notes_come_back_from_their_bytes() {
        assert_eq!(Notes::parse(&notes().to_bytes()), Some(notes()));
    }

    #[test]
    fn damaged_notes_are_never_believed() {
        let bytes = notes().to_bytes();
        for at in 0..bytes.len() {
            assert_eq!(Notes::parse(&bytes[..at]), None, "cut at {at}");
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(Notes::parse(&changed), None, "byte {at}");
        }
        for other in [&b""[..], b"\n", b"\xff\n{}", b"{}\n{}"] {
            assert_eq!(Notes::parse(other), None);
        }
    }
}
