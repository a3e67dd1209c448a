//! Decides the content of a file after a power cut.
//!
//! A page cache and a drive write back sectors in any order and at any time, so of the changes that
//! are not durable each sector keeps *some version since the durable one*: none, a few or all of
//! what was written to it, and its neighbours may have kept another. Versions build on each other
//! (a sector is written as a whole), and so do lengths and cuts, which a file system journals in
//! order. Durable changes always survive.
//!
//! Coin flips for every sector almost never keep a long write whole and lose the next one whole,
//! which is what catches a forgotten flush. So a cut follows one of several [`CutMode`]s.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::image::Image;
use super::journal::{Change, Durability, Effect, Journal};
use super::rng::Rng;

/// How a power cut treats changes that are not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CutMode {
    /// One of the others, by seed.
    #[default]
    Random,
    /// Nothing survives.
    LoseAll,
    /// Everything submitted survives, as when only the process is killed.
    KeepAll,
    /// Each change survives whole or not at all: writes are reordered, not torn.
    Reorder,
    /// Each sector on its own: writes are reordered and torn.
    Tear,
    /// Everything up to a moment survives, nothing after it.
    InOrder,
}

/// Sectors of a zeroed range up to which it is torn; longer ones are one journal entry.
const TORN_ZERO_SECTORS: u64 = 256;

/// One cut of one file, with its mode chosen.
struct Cut<'a> {
    mode: CutMode,
    rng: &'a mut Rng,
    /// `InOrder`: last change that survives.
    until: u64,
    /// `Reorder`: changes that survive.
    kept: BTreeSet<u64>,
}

impl Cut<'_> {
    /// Number of the versions made by `changes` (in order) that one sector keeps.
    fn versions_kept(&mut self, changes: &[u64]) -> usize {
        let last = |is_kept: &dyn Fn(u64) -> bool| {
            changes.iter().rposition(|seq| is_kept(*seq)).map_or(0, |at| at + 1)
        };
        match self.mode {
            CutMode::Random => unreachable!("chosen before"),
            CutMode::LoseAll => 0,
            CutMode::KeepAll => changes.len(),
            CutMode::InOrder => last(&|seq| seq <= self.until),
            CutMode::Reorder => last(&|seq| self.kept.contains(&seq)),
            CutMode::Tear => self.rng.index(changes.len() + 1),
        }
    }

    /// The length after a surviving change of it: a torn append may have grown the file by a part.
    fn grown_len(&mut self, change: &Change, sector_len: u64) -> u64 {
        let (before, after) = (change.len_before, change.len_after);
        let is_append = matches!(change.effect, Effect::Write { .. }) && before < after;
        if self.mode == CutMode::Tear && is_append && self.rng.coin() {
            let sectors = self.rng.between(before / sector_len, after / sector_len);
            return (sectors * sector_len).clamp(before, after);
        }
        after
    }
}

/// Versions of a sector: the last durable change, and the changes since.
#[derive(Default)]
struct Sector {
    floor: u64,
    open: Vec<u64>,
}

impl Sector {
    fn set_durable(&mut self, seq: u64) {
        self.floor = seq;
        self.open.clear();
    }
}

/// The image of a file after a cut, by `mode` and `rng`.
pub(super) fn survivors(journal: &Journal, mode: CutMode, sector_len: u64, rng: &mut Rng) -> Image {
    let mut image = journal.base.clone();
    let Some(last) = journal.changes.last().map(|change| change.seq) else {
        return image;
    };
    let mode = match mode {
        CutMode::Random => [
            CutMode::LoseAll,
            CutMode::KeepAll,
            CutMode::Reorder,
            CutMode::Reorder,
            CutMode::Tear,
            CutMode::Tear,
            CutMode::InOrder,
        ][rng.index(7)],
        chosen => chosen,
    };
    let first = journal.changes[0].seq;
    let until = if mode == CutMode::InOrder { rng.between(first - 1, last) } else { 0 };
    let kept = match mode {
        CutMode::Reorder => {
            journal.changes.iter().map(|change| change.seq).filter(|_| rng.coin()).collect()
        }
        _ => BTreeSet::new(),
    };
    let mut cut = Cut { mode, rng, until, kept };
    let (len_until, len) = surviving_len(journal, &mut cut, sector_len);
    let plan = Plan::new(journal, &mut cut, sector_len, len_until);
    for change in &journal.changes {
        plan.apply(change, &mut image);
    }
    image.set_len(len);
    image
}

/// The last change whose length survives, and the surviving length.
///
/// A sync writes the current inode, so the length up to the last durable change is durable.
fn surviving_len(journal: &Journal, cut: &mut Cut<'_>, sector_len: u64) -> (u64, u64) {
    let changes = &journal.changes;
    let durable = changes.iter().rposition(|change| change.durability == Durability::Durable);
    let floor = durable.map_or(0, |at| changes[at].seq);
    let open: Vec<&Change> = changes
        .iter()
        .filter(|change| change.seq > floor && change.len_after != change.len_before)
        .collect();
    let seqs: Vec<u64> = open.iter().map(|change| change.seq).collect();
    match cut.versions_kept(&seqs).checked_sub(1) {
        Some(at) => (open[at].seq, cut.grown_len(open[at], sector_len)),
        None => (floor, durable.map_or(journal.base.len(), |at| changes[at].len_after)),
    }
}

/// The last surviving change of each touched sector.
struct Plan {
    sector_len: u64,
    sectors: BTreeMap<u64, u64>,
    /// Surviving changes that are not torn: cuts and long zeroes.
    whole: BTreeSet<u64>,
}

impl Plan {
    fn new(journal: &Journal, cut: &mut Cut<'_>, sector_len: u64, len_until: u64) -> Plan {
        let mut sectors: BTreeMap<u64, Sector> = BTreeMap::new();
        let mut whole = BTreeSet::new();
        // Start of a truncated range whose truncation did not survive: newer bytes there cannot
        // survive either.
        let mut barrier = u64::MAX;
        for change in &journal.changes {
            let seq = change.seq;
            let range = change.effect.range();
            let touched = range.start / sector_len..range.end.div_ceil(sector_len);
            let is_durable = change.durability == Durability::Durable;
            if is_torn(&change.effect, &touched) {
                for number in touched {
                    let sector = sectors.entry(number).or_default();
                    if is_durable {
                        sector.set_durable(seq);
                    } else if number < barrier {
                        sector.open.push(seq);
                    }
                }
                continue;
            }
            let is_cut = matches!(change.effect, Effect::Cut { .. });
            let survives = if is_cut {
                seq <= len_until
            } else {
                is_durable || cut.versions_kept(&[seq]) == 1
            };
            if survives {
                whole.insert(seq);
                if matches!(change.effect, Effect::Allocate { .. } | Effect::Grow) {
                    continue;
                }
                for (_, sector) in sectors.range_mut(touched) {
                    sector.set_durable(seq);
                }
            } else if is_cut {
                barrier = barrier.min(touched.start);
            }
        }
        let choose = |(number, sector): (u64, Sector)| {
            let kept = cut.versions_kept(&sector.open);
            (number, kept.checked_sub(1).map_or(sector.floor, |at| sector.open[at]))
        };
        Plan { sector_len, sectors: sectors.into_iter().map(choose).collect(), whole }
    }

    fn apply(&self, change: &Change, image: &mut Image) {
        let range = change.effect.range();
        if self.whole.contains(&change.seq) {
            return change.effect.apply(image);
        }
        let numbers = range.start / self.sector_len..range.end.div_ceil(self.sector_len);
        let kept = self.sectors.range(numbers).filter(|(_, until)| change.seq <= **until);
        for run in runs(kept.map(|(number, _)| *number)) {
            let start = range.start.max(run.start * self.sector_len);
            let end = range.end.min(run.end * self.sector_len);
            apply_part(&change.effect, start..end, image);
        }
    }
}

/// True if sectors of this change survive one by one.
fn is_torn(effect: &Effect, touched: &Range<u64>) -> bool {
    match effect {
        Effect::Write { .. } => true,
        Effect::Zero { .. } => touched.end - touched.start <= TORN_ZERO_SECTORS,
        Effect::Allocate { .. } | Effect::Cut { .. } | Effect::Grow => false,
    }
}

/// Joins neighbouring numbers to ranges.
fn runs(numbers: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ => runs.push(number..number + 1),
        }
    }
    runs
}

fn apply_part(effect: &Effect, part: Range<u64>, image: &mut Image) {
    match effect {
        Effect::Write { offset, data } => {
            let at = |position: u64| usize::try_from(position - offset).expect("inside the data");
            image.write(part.start, &data[at(part.start)..at(part.end)]);
        }
        Effect::Zero { allocate: true, .. } => image.zero_allocate(part),
        Effect::Zero { allocate: false, .. } => image.punch(part),
        // Not torn; only a sector that continues beyond them contains them.
        Effect::Cut { .. } => image.punch(part),
        Effect::Allocate { .. } | Effect::Grow => {}
    }
}
