//! What stands on the medium after the power went.
//!
//! A page cache and a drive write back sectors in any order and at any time, so of the changes that
//! are not durable each sector keeps *some version since the durable one*: none, a few or all of
//! what was written to it, and its neighbours may have kept another. Versions build on each other
//! (a sector is written as a whole), and so do lengths and cuts, which a file system journals in
//! order. What is durable is never chosen about.
//!
//! Coin flips for every sector almost never keep a long write whole and lose the next one whole,
//! which is what catches a forgotten flush. So a cut follows one of several [`CutMode`]s.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::chance::Chance;
use super::image::Image;
use super::journal::{Change, Effect, Fate, Journal};

/// How a power cut treats what is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
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

/// One cut of one file, with its style settled.
struct Cut<'a> {
    mode: CutMode,
    chance: &'a mut Chance,
    /// `InOrder`: last change that survives.
    until: u64,
    /// `Reorder`: changes that survive.
    kept: BTreeSet<u64>,
}

impl Cut<'_> {
    /// How many of the versions made by `changes` (in order) one sector keeps.
    fn versions_kept(&mut self, changes: &[u64]) -> usize {
        let last = |is_kept: &dyn Fn(u64) -> bool| {
            changes.iter().rposition(|seq| is_kept(*seq)).map_or(0, |at| at + 1)
        };
        match self.mode {
            CutMode::Random => unreachable!("settled before"),
            CutMode::LoseAll => 0,
            CutMode::KeepAll => changes.len(),
            CutMode::InOrder => last(&|seq| seq <= self.until),
            CutMode::Reorder => last(&|seq| self.kept.contains(&seq)),
            CutMode::Tear => self.chance.index(changes.len() + 1),
        }
    }

    /// The length that a surviving change of it left: a torn append may have grown the file by a part.
    fn grown_len(&mut self, change: &Change, sector_len: u64) -> u64 {
        let (before, after) = (change.len_before, change.len_after);
        let is_append = matches!(change.effect, Effect::Write { .. }) && before < after;
        if self.mode == CutMode::Tear && is_append && self.chance.coin() {
            let sectors = self.chance.between(before / sector_len, after / sector_len);
            return (sectors * sector_len).clamp(before, after);
        }
        after
    }
}

/// A sector's versions: what it has for sure, and what may be on top.
#[derive(Default)]
struct Sector {
    floor: u64,
    open: Vec<u64>,
}

impl Sector {
    fn settle(&mut self, seq: u64) {
        self.floor = seq;
        self.open.clear();
    }
}

/// The image that `mode` and `chance` leave of a file.
pub(super) fn survivors(
    journal: &Journal,
    mode: CutMode,
    sector_len: u64,
    chance: &mut Chance,
) -> Image {
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
        ][chance.index(7)],
        settled => settled,
    };
    let first = journal.changes[0].seq;
    let until = if mode == CutMode::InOrder { chance.between(first - 1, last) } else { 0 };
    let kept = match mode {
        CutMode::Reorder => {
            journal.changes.iter().map(|change| change.seq).filter(|_| chance.coin()).collect()
        }
        _ => BTreeSet::new(),
    };
    let mut cut = Cut { mode, chance, until, kept };
    let (len_until, len) = surviving_len(journal, &mut cut, sector_len);
    let plan = Plan::new(journal, &mut cut, sector_len, len_until);
    for change in &journal.changes {
        plan.apply(change, &mut image);
    }
    image.set_len(len);
    image
}

/// Up to which change the length follows, and the length that is left.
///
/// A sync writes the inode as it stands, so the length up to the last durable change is durable.
fn surviving_len(journal: &Journal, cut: &mut Cut<'_>, sector_len: u64) -> (u64, u64) {
    let changes = &journal.changes;
    let durable = changes.iter().rposition(|change| change.fate == Fate::Durable);
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

/// Which change each touched sector goes up to.
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
        // What a cut of the file took off and that did not survive: newer bytes there cannot either.
        let mut barrier = u64::MAX;
        for change in &journal.changes {
            let seq = change.seq;
            let range = change.effect.range();
            let touched = range.start / sector_len..range.end.div_ceil(sector_len);
            let is_durable = change.fate == Fate::Durable;
            if is_torn(&change.effect, &touched) {
                for number in touched {
                    let sector = sectors.entry(number).or_default();
                    if is_durable {
                        sector.settle(seq);
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
                    sector.settle(seq);
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
        // Not torn; a sector that goes beyond them has them in it, and no other sector does.
        Effect::Cut { .. } => image.punch(part),
        Effect::Allocate { .. } | Effect::Grow => {}
    }
}
