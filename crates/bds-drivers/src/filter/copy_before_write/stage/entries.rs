//! `Entries`: the runs of old data in the staging area, ordered by what may be done with them next.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bds_core::copy::Claim;
use bds_io::IoVec;

use super::space::SpillRange;

/// Bytes that an entry of zeros counts for.
const ZERO_COST: u64 = 1024;

/// Where old data is.
#[derive(Clone)]
pub(in super::super) enum Data {
    /// It is zeros.
    Zero,
    Memory(IoVec),
    Spilled(Arc<SpillRange>),
}

/// What is being done with an entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    Idle,
    /// Written to the target. The bytes of memory that a copy from the spill file takes meanwhile.
    Writing(u64),
    /// Written to the spill file.
    Spilling,
}

/// Old data of one run.
pub(super) struct Entry {
    pub(super) range: Range<u64>,
    /// The duty to write it to the target. `None`: another copy of the range is under way, and this
    /// is kept in case that one fails.
    pub(super) claim: Option<Claim<'static>>,
    pub(super) data: Data,
    pub(super) work: Work,
    /// Writes to the target that failed.
    pub(super) attempts: u32,
    /// Not tried again before this moment; zero: at once.
    pub(super) not_before: Duration,
}

impl Entry {
    pub(super) fn new(range: Range<u64>, claim: Option<Claim<'static>>, data: Data) -> Self {
        let (work, attempts, not_before) = (Work::Idle, 0, Duration::ZERO);
        Self { range, claim, data, work, attempts, not_before }
    }

    pub(super) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Bytes of memory that it counts for.
    pub(super) fn memory(&self) -> u64 {
        let loaded = if let Work::Writing(loaded) = self.work { loaded } else { 0 };
        loaded + memory_of(&self.data, self.len())
    }
}

/// Bytes of memory that `len` bytes of old data count for.
pub(super) fn memory_of(data: &Data, len: u64) -> u64 {
    match data {
        Data::Zero => len.min(ZERO_COST),
        Data::Memory(_) => len,
        Data::Spilled(_) => 0,
    }
}

/// The entries, by start. They do not overlap.
#[derive(Default)]
pub(super) struct Entries {
    all: BTreeMap<u64, Entry>,
    /// In memory or zeros, may be written to the target now.
    ready: BTreeSet<u64>,
    /// In the spill file, may be written to the target now.
    ready_spilled: BTreeSet<u64>,
    /// May be written to the target later.
    delayed: BTreeSet<(Duration, u64)>,
    /// In memory, may be written to the spill file.
    spillable: BTreeSet<u64>,
    /// Bytes of memory of all entries.
    memory: u64,
    /// Those of them that are being written to the target.
    writing_memory: u64,
    /// Those of them that are being written to the spill file.
    spilling_memory: u64,
}

impl Entries {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn memory(&self) -> u64 {
        self.memory
    }

    pub(super) fn writing_memory(&self) -> u64 {
        self.writing_memory
    }

    pub(super) fn spilling_memory(&self) -> u64 {
        self.spilling_memory
    }

    pub(super) fn get(&self, start: u64) -> Option<&Entry> {
        self.all.get(&start)
    }

    /// The entry that holds this byte.
    pub(super) fn at(&self, offset: u64) -> Option<&Entry> {
        let (_, entry) = self.all.range(..=offset).next_back()?;
        entry.range.contains(&offset).then_some(entry)
    }

    /// The first entry that begins at or behind `offset`.
    pub(super) fn from(&self, offset: u64) -> Option<&Entry> {
        self.all.range(offset..).next().map(|(_, entry)| entry)
    }

    pub(super) fn insert(&mut self, entry: Entry) {
        self.count(&entry, true);
        self.all.insert(entry.range.start, entry);
    }

    pub(super) fn remove(&mut self, start: u64) -> Option<Entry> {
        let entry = self.all.remove(&start)?;
        self.count(&entry, false);
        Some(entry)
    }

    /// Changes an entry. `None`: it is gone.
    pub(super) fn update<T>(
        &mut self,
        start: u64,
        change: impl FnOnce(&mut Entry) -> T,
    ) -> Option<T> {
        let mut entry = self.remove(start)?;
        let result = change(&mut entry);
        self.insert(entry);
        Some(result)
    }

    /// Adds an entry to the sums and orders, or takes it out of them.
    fn count(&mut self, entry: &Entry, adds: bool) {
        let memory = entry.memory();
        let sum = |total: &mut u64| match adds {
            true => *total += memory,
            false => *total -= memory,
        };
        sum(&mut self.memory);
        let start = entry.range.start;
        match entry.work {
            Work::Writing(_) => return sum(&mut self.writing_memory),
            Work::Spilling => return sum(&mut self.spilling_memory),
            Work::Idle => {}
        }
        let put = |set: &mut BTreeSet<u64>| match adds {
            true => set.insert(start),
            false => set.remove(&start),
        };
        if matches!(entry.data, Data::Memory(_)) {
            put(&mut self.spillable);
        }
        if entry.claim.is_none() {
            return;
        }
        if !entry.not_before.is_zero() {
            let key = (entry.not_before, start);
            match adds {
                true => self.delayed.insert(key),
                false => self.delayed.remove(&key),
            };
        } else if matches!(entry.data, Data::Spilled(_)) {
            put(&mut self.ready_spilled);
        } else {
            put(&mut self.ready);
        }
    }

    /// Lets the entries be written whose moment has come; all of them with `now` at its largest.
    /// True if there were any.
    pub(super) fn wake_delayed(&mut self, now: Duration) -> bool {
        let mut any = false;
        while let Some((_, start)) = self.delayed.first().copied().filter(|(at, _)| *at <= now) {
            self.update(start, |entry| entry.not_before = Duration::ZERO);
            any = true;
        }
        any
    }

    /// The moment at which the next entry may be written that may not be written now.
    pub(super) fn next_moment(&self) -> Option<Duration> {
        self.delayed.first().map(|(at, _)| *at)
    }

    /// The first entry in memory that may be written to the target.
    pub(super) fn first_ready(&self) -> Option<u64> {
        self.ready.first().copied()
    }

    /// The first entry in the spill file that may be written to the target, and its length.
    pub(super) fn first_ready_spilled(&self) -> Option<(u64, u64)> {
        let start = *self.ready_spilled.first()?;
        self.get(start).map(|entry| (start, entry.len()))
    }

    /// An entry for the spill file for which `fits` holds: from the end, as the target is written
    /// from the beginning.
    pub(super) fn spillable(&self, fits: impl Fn(u64) -> bool) -> Option<u64> {
        let len = |start: u64| self.get(start).map_or(u64::MAX, Entry::len);
        self.spillable.iter().rev().copied().find(|start| fits(len(*start)))
    }

    /// The entries that lie in the range, as a whole, with which nothing is being done.
    pub(super) fn idle_within(&self, range: &Range<u64>) -> Vec<u64> {
        let within = self.all.range(range.clone()).filter(|(_, entry)| {
            entry.range.end <= range.end && entry.work == Work::Idle && entry.claim.is_some()
        });
        within.map(|(start, _)| *start).collect()
    }
}
