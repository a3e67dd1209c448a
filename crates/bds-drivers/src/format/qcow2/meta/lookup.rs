//! Maps a guest range to its host offset: the longest run of one kind, without a lock.

use super::tables::SliceId;
use crate::format::qcow2::layout::entry::{BadEntry, Kind, L2Entry, Place};
use crate::format::qcow2::layout::space::{DataOffset, Offset};
use crate::format::qcow2::state::Image;

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub kind: Kind,
    pub len: u64,
    /// Where the first byte is, for kinds that have a place. Runs with a place are contiguous
    /// there.
    pub host: DataOffset,
    /// All of it may be written in place: the entries say so, and were checked.
    pub is_copied: bool,
    /// The entry of the first cluster.
    pub entry: L2Entry,
}

/// The result of a lookup.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found {
    Run(Run),
    /// This slice is not in memory.
    Missing(SliceId),
}

impl Image {
    /// Looks up the kind and host offset of `guest`, and how far (at most `max` bytes, at least
    /// one) the run goes. A run ends at the latest with its slice. A caller that uses the offset
    /// must hold a guard of `srcu`, from before the lookup.
    #[inline]
    pub(crate) fn lookup(&self, guest: u64, max: u64) -> Result<Found, BadEntry> {
        let geometry = self.geometry();
        let none = |len| {
            let (kind, entry) = (Kind::Unallocated, L2Entry::default());
            Ok(Found::Run(Run { kind, len, host: DataOffset(0), is_copied: false, entry }))
        };
        let Some(id) = self.tables.slice_id(guest) else { return none(max) };
        let l1 = self.tables.l1(id.table);
        if l1.table(geometry)?.is_none() {
            return none(self.empty_tables(guest, max));
        }
        let slice = self.tables.slice(id);
        let Some(slice) = slice.as_ref().and_then(|slice| slice.as_ref()) else {
            return Ok(Found::Missing(id));
        };
        slice.touch();
        let span = self.tables.slice_span();
        let max = max.min(span - (guest & (span - 1)));
        let first = usize::try_from((guest & (span - 1)) >> geometry.cluster_bits())
            .expect("a slice has at most 2^18 entries");
        let is_checked = slice.is_checked(first);
        let mut run = self.entry_run(slice.entry(first), guest)?;
        run.is_copied &= is_checked;
        let mut index = first;
        if run.kind == Kind::Unallocated && run.len < max {
            // Most entries of an overlay: not decoded one by one, since each layer of a chain looks
            // as far as the one above it does.
            let size = geometry.cluster_size();
            let most =
                usize::try_from((max - run.len) / size).expect("a slice has at most 2^18 entries");
            let count = slice.count_unallocated(first + 1, most);
            run.len += count as u64 * size;
            index += count;
        }
        while run.len < max && run.kind != Kind::Compressed {
            let at = guest + run.len;
            if !geometry.is_cluster_aligned(at) {
                break;
            }
            index += 1;
            let is_checked = slice.is_checked(index);
            let next = self.entry_run(slice.entry(index), at)?;
            let goes_on = next.kind == run.kind
                && (!run.kind.has_place() || next.host == run.host.plus(run.len));
            if !goes_on {
                break;
            }
            run.len += next.len;
            run.is_copied &= next.is_copied && is_checked;
        }
        run.len = run.len.min(max);
        run.is_copied &= l1.is_copied();
        Ok(Found::Run(run))
    }

    /// How far from `guest` on (at most `max`) there are no L2 tables.
    fn empty_tables(&self, guest: u64, max: u64) -> u64 {
        let span_bits = self.geometry().l2_span_bits();
        let mut table = guest >> span_bits;
        loop {
            table += 1;
            let Some(len) = (table << span_bits).checked_sub(guest).filter(|len| *len < max) else {
                return max;
            };
            match u32::try_from(table) {
                Ok(index) if self.tables.l1(index).0 == 0 => {}
                _ => return len,
            }
        }
    }

    /// The run that begins at `guest` inside its cluster.
    #[inline]
    pub(crate) fn entry_run(&self, entry: L2Entry, guest: u64) -> Result<Run, BadEntry> {
        let geometry = self.geometry();
        let sub =
            geometry.subcluster_index(crate::format::qcow2::layout::units::GuestOffset(guest));
        let (kind, count) = entry.kind(sub, &self.rules)?;
        let sub_bits = geometry.subcluster_bits();
        let end = u64::from(sub + count) << sub_bits;
        let in_cluster = geometry.offset_in_cluster(guest);
        let host = match entry.place(&self.rules)? {
            Place::Cluster(host) => {
                if self.rules.has_data_file && host.0 != guest - in_cluster {
                    return Err(BadEntry::DataFileOffset(host.0));
                }
                host.plus(in_cluster)
            }
            Place::Compressed(_) | Place::None => DataOffset(0),
        };
        let end = if kind == Kind::Compressed { geometry.cluster_size() } else { end };
        Ok(Run { kind, len: end - in_cluster, host, is_copied: entry.is_copied(), entry })
    }
}
