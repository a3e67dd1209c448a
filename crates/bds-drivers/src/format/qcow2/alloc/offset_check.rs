//! Checks that a host offset named by an entry lies inside its file and has a refcount.
//!
//! An entry is only a number in a file that may be truncated, damaged or crafted. What begins
//! behind the end of the file was never written, or is lost: reading zeros there would be silent
//! data loss, writing there would let a file of some kilobytes grow to 2^56 bytes. A cluster with
//! refcount 0 may be allocated again at any time, so it must not be written in place. Both are
//! errors.
//!
//! A cluster of data that begins inside the file and ends behind it is fine: the last one often
//! does, and reads as zeros there.
//!
//! The file's end is cached, rounded up to a cluster, so that the common case costs one load; the
//! node's length is read again only where that does not suffice. An entry's count is looked up
//! once, before the first write in place: the slice remembers it.

use std::sync::atomic::Ordering;

use bds_core::error::{Error, ErrorKind};

use crate::format::qcow2::layout::entry::{BadEntry, L2Entry, Place};
use crate::format::qcow2::layout::space::{Clusters, DataOffset, MetaOffset, Offset};
use crate::format::qcow2::meta::lookup::Run;
use crate::format::qcow2::meta::tables::Slice;
use crate::format::qcow2::plan::{MetaResult, NeedMeta, corrupt_entry};
use crate::format::qcow2::state::{Image, Meta};

impl Image {
    /// Do all clusters of `len` bytes of data at `place` begin inside the file that holds them?
    #[inline]
    pub(crate) fn is_in_file(&self, place: DataOffset, len: u64) -> bool {
        let end = place.0.saturating_add(len);
        end <= self.data_end.load(Ordering::Relaxed) || end <= self.find_data_end()
    }

    /// The end of the file that holds data as it is now, rounded up to a cluster.
    #[cold]
    fn find_data_end(&self) -> u64 {
        let end = self.geometry().cluster_ceil(self.data().len()).unwrap_or(u64::MAX);
        self.data_end.store(end, Ordering::Relaxed);
        end
    }

    /// The error of a read at `guest` whose bytes lie behind the end of the file.
    #[cold]
    pub(crate) fn truncated_data_error(&self, place: DataOffset, guest: u64) -> Error {
        let words = beyond(&format!("the cluster at {place} for guest offset {guest:#x}"));
        let words = format!("{words} ({} bytes): {REMEDY}", self.data().len());
        let error = Error::new(ErrorKind::Corrupt, words).at(guest);
        match self.data().filename() {
            Some(path) => self.name_error(error).file(path),
            None => self.name_error(error),
        }
    }

    /// The error of metadata at `place` that lies behind the end of the image file.
    #[cold]
    pub(crate) fn truncated_meta_error(&self, what: &str, place: MetaOffset) -> Error {
        let words = beyond(&format!("{what} at {place}"));
        let words = format!("{words} ({} bytes): {REMEDY}", self.file.len());
        self.name_file(Error::new(ErrorKind::Corrupt, words).at(place.0))
    }

    /// Is the table at `place`, a cluster long, all in the image file? Every writer writes whole
    /// tables, so one that the file ends in has lost entries.
    pub(crate) fn is_whole_table(&self, place: MetaOffset) -> bool {
        place.0.saturating_add(self.geometry().cluster_size()) <= self.file.len()
    }

    /// May the cluster of `run` (entry number `index` of `slice`) be changed where it is? It may if
    /// the entry says that its refcount is one and the count agrees. An entry with an offset that
    /// no writer can have stored makes the image unusable.
    pub(crate) fn may_write_in_place(
        &self,
        meta: &mut Meta,
        slice: &Slice,
        index: usize,
        run: &Run,
        guest: u64,
    ) -> MetaResult<bool> {
        let geometry = self.geometry();
        let start = DataOffset(geometry.cluster_floor(run.host.0));
        let Some(counted) = self.space().counted(start) else {
            // In a data file no cluster is shared.
            slice.note_checked(index);
            return Ok(true);
        };
        if !run.kind.has_place() || !run.entry.is_copied() {
            return Ok(false);
        }
        if slice.is_checked(index) {
            return Ok(true);
        }
        let one = Clusters { start: counted, count: 1 };
        let is_alone = self.check_counted(meta, one, guest)? == 1;
        if is_alone {
            slice.note_checked(index);
        }
        // With a count of two the mark is wrong: another entry may point there, so it is copied.
        Ok(is_alone)
    }

    /// Refuses to free or keep the clusters of `old` at `guest` if no writer can have put them
    /// there.
    pub(crate) fn check_old(&self, meta: &mut Meta, old: L2Entry, guest: u64) -> MetaResult<()> {
        let geometry = *self.geometry();
        let clusters =
            match old.place(&self.rules).map_err(|b: BadEntry| corrupt_entry(b, guest))? {
                Place::None => return Ok(()),
                Place::Cluster(place) => match self.space().counted(place) {
                    Some(start) => Clusters { start, count: 1 },
                    None => return Ok(()),
                },
                Place::Compressed(range) => {
                    let start = MetaOffset(geometry.cluster_floor(range.offset.0));
                    let count = geometry.clusters(range.offset.0 + range.len - start.0);
                    Clusters { start, count }
                }
            };
        self.check_counted(meta, clusters, guest).map(|_| ())
    }

    /// The lowest count of clusters that an entry for `guest` names. They must be counted, and
    /// begin inside the file.
    fn check_counted(
        &self,
        meta: &mut Meta,
        clusters: Clusters<MetaOffset>,
        guest: u64,
    ) -> MetaResult<u64> {
        let geometry = *self.geometry();
        let damaged = |at: MetaOffset, how: &str| NeedMeta::Corrupt {
            what: format!("the cluster at {at} for guest offset {guest:#x} {how}"),
            at: at.0,
        };
        let mut lowest = u64::MAX;
        for i in 0..clusters.count {
            let at = clusters.start.plus(i << geometry.cluster_bits());
            if at.0 >= self.file.len() {
                return Err(damaged(at, "lies behind the end of the file"));
            }
            let count = meta.counts.count(geometry.cluster_index(at.0))?;
            if count == 0 {
                return Err(damaged(at, "has refcount 0"));
            }
            lowest = lowest.min(count);
        }
        Ok(lowest)
    }
}

const REMEDY: &str =
    "the file was cut short; fetch a whole copy, or save what is left with convert --salvage";

fn beyond(what: &str) -> String {
    format!("{what} reaches behind the end of the file")
}
