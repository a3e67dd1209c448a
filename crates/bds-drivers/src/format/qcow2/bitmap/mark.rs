//! Marks bitmaps "in use" in the file before they become stale (rule O10), so that a crash leaves
//! no wrong one.
//!
//! Only the flags change, in place. Each lies in one sector, which a crash leaves old or new, and
//! both are true: nothing was written yet that the bitmap should record. So the directory stays
//! valid all the time, and one flush suffices.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bds_core::error::{Error, ErrorKind, Result};

use super::directory::{Directory, with_remedy};
use crate::format::qcow2::layout::bitmap_directory::{
    BitmapEntry, IN_USE, encode_directory, flags_at,
};
use crate::format::qcow2::layout::space::MetaOffset;
use crate::format::qcow2::state::Image;

/// Bitmaps that an error names.
const MAX_NAMED: usize = 4;

/// What is known about the bitmaps in memory.
#[derive(Debug, Default)]
pub(crate) struct BitmapsInMemory(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// They were loaded: they record writes, and are stored before the image is given up.
    are_loaded: bool,
    /// Those that this process has marked: they are newer in memory than in the file.
    marked: BTreeSet<Vec<u8>>,
    /// Marks were written that no flush has made durable yet.
    needs_flush: bool,
    /// A change of the header's pointer has failed, or is under way.
    is_header_uncertain: bool,
    /// The log of an earlier session that crashed was read, or a new one was started.
    is_log_known: bool,
}

impl BitmapsInMemory {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Plain facts, each set at once: a panic elsewhere leaves them usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All were loaded; the file has the same, except for those that were recovered from the log.
    pub(super) fn note_loaded(&self, recovered: BTreeSet<Vec<u8>>) {
        let mut known = self.known();
        known.are_loaded = true;
        known.marked = recovered;
    }

    pub(super) fn set_log_known(&self, is_known: bool) {
        self.known().is_log_known = is_known;
    }

    /// Whether the log that the header names is the one that is kept: if not, it must not count
    /// once data changes.
    pub(super) fn is_log_known(&self) -> bool {
        self.known().is_log_known
    }

    /// All were stored.
    pub(super) fn note_stored(&self) {
        self.known().marked.clear();
    }

    /// Another process has the image: what is in memory does not count.
    pub(crate) fn forget(&self) {
        *self.known() = Known::default();
    }

    /// Says whether the header in the file may differ from what is in memory.
    pub(super) fn set_header_uncertain(&self, is_uncertain: bool) {
        self.known().is_header_uncertain = is_uncertain;
    }

    pub(super) fn is_header_uncertain(&self) -> bool {
        self.known().is_header_uncertain
    }

    fn are_loaded(&self) -> bool {
        self.known().are_loaded
    }
}

impl Image {
    /// Before the first write: marks bitmaps that record it. False if they cannot be kept at all,
    /// which the user has allowed.
    pub(crate) async fn mark_bitmaps(&self) -> Result<bool> {
        let may_be_lost = self.config.load().invalidate_bitmaps;
        let directory = match self.directory().await {
            Ok(directory) => directory,
            Err(error) if may_be_lost && error.kind() == ErrorKind::InvalidImage => {
                tracing::warn!(node = self.node_name, %error, "qcow2: the persistent bitmaps are lost");
                return Ok(false);
            }
            Err(error) => return Err(self.name_file(with_remedy(error))),
        };
        let records = |entry: &BitmapEntry| entry.is_auto();
        if !self.bitmaps.are_loaded() && !may_be_lost {
            refuse(&directory, records, "they were not loaded")
                .map_err(|error| self.name_file(error))?;
        }
        self.mark(directory, records).await?;
        Ok(true)
    }

    /// Before a bitmap in memory changes otherwise than by a write.
    pub(super) async fn mark_all_bitmaps(&self) -> Result<()> {
        let _lock = self.prepare_lock.lock().await;
        self.check_usable()?;
        self.write_state.check().map_err(|e| self.name_error(e))?;
        let directory = self.directory().await.map_err(|e| self.name_file(e))?;
        self.mark(directory, |_| true).await
    }

    /// Before the disk grows: the stored bitmaps become too short. Those that could not be stored
    /// again with the new length are in the way.
    pub(crate) async fn mark_bitmaps_to_grow(&self) -> Result<()> {
        let _lock = self.prepare_lock.lock().await;
        let may_be_lost = self.config.load().invalidate_bitmaps;
        let directory = match self.directory().await {
            Ok(directory) => directory,
            // The first write has handled that.
            Err(error) if may_be_lost && error.kind() == ErrorKind::InvalidImage => return Ok(()),
            Err(error) => return Err(self.name_file(with_remedy(error))),
        };
        if !may_be_lost {
            let is_stuck = |entry: &BitmapEntry| match entry.is_usable() {
                true => !self.bitmaps.are_loaded(),
                false => !self.bitmaps.known().marked.contains(&entry.name),
            };
            refuse(&directory, is_stuck, "they cannot follow the disk's new length")
                .map_err(|error| self.name_file(error))?;
        }
        self.mark(directory, |_| true).await
    }

    /// Sets "in use", durably, for those of `which` that do not have it.
    async fn mark(
        &self,
        mut directory: Directory,
        which: impl Fn(&BitmapEntry) -> bool,
    ) -> Result<()> {
        let Some(pointer) = directory.pointer else { return Ok(()) };
        let places: Vec<u64> = flags_at(&directory.entries).collect();
        let mut span: Option<(u64, u64)> = None;
        let mut names = Vec::new();
        for (entry, at) in directory.entries.iter_mut().zip(places) {
            if !entry.is_in_use() && which(entry) {
                entry.flags |= IN_USE;
                names.push(entry.name.clone());
                span = Some((span.map_or(at, |(first, _)| first), at + 4));
            }
        }
        if let Some((first, end)) = span {
            {
                let mut known = self.bitmaps.known();
                known.needs_flush = true;
                if known.are_loaded {
                    known.marked.extend(names);
                }
            }
            // What lies between two flags is written as it is.
            let bytes = encode_directory(&directory.entries)?;
            let in_memory = |at| usize::try_from(at).expect("a directory fits in memory");
            let bytes = bytes[in_memory(first)..in_memory(end)].to_vec();
            self.write_file(MetaOffset(pointer.directory_offset + first), bytes).await?;
        }
        if self.bitmaps.known().needs_flush {
            self.file.flush().await.map_err(|error| self.name_error(error))?;
            self.bitmaps.known().needs_flush = false;
        }
        Ok(())
    }
}

fn refuse(
    directory: &Directory,
    is_in_the_way: impl Fn(&BitmapEntry) -> bool,
    why: &str,
) -> Result<()> {
    let names: Vec<String> = directory
        .entries
        .iter()
        .filter(|entry| is_in_the_way(entry))
        .map(|entry| format!("'{}'", entry.name.escape_ascii()))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let more = match names.len().checked_sub(MAX_NAMED) {
        Some(more) if more > 0 => format!(" and {more} more"),
        _ => String::new(),
    };
    let names = names[..names.len().min(MAX_NAMED)].join(", ");
    Err(Error::new(
        ErrorKind::NotSupported,
        format!(
            "the persistent bitmaps {names}{more} would become inconsistent, as {why}: remove them first, or open the image with \
             invalidate-bitmaps=on"
        ),
    ))
}
