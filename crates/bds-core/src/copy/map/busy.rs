//! `Busy`: the ranges of a copy map that are claimed or excluded now.
//!
//! Claims do not overlap each other, so they are ordered by their start: a staging area may hold
//! many thousands of them, and each write looks one up. Exclusions may overlap anything that was
//! there before them, and are few. Which wait for which is decided by tickets, in order.

use std::collections::BTreeMap;
use std::ops::Range;

/// The claims and exclusions of one map.
#[derive(Default)]
pub(super) struct Busy {
    last_ticket: u64,
    /// By start.
    claims: BTreeMap<u64, Held>,
    exclusions: Vec<(u64, Range<u64>)>,
    claimed_bytes: u64,
}

/// A claim.
struct Held {
    end: u64,
    ticket: u64,
}

fn overlaps(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Busy {
    /// The ticket of what is added next.
    pub(super) fn next_ticket(&self) -> u64 {
        self.last_ticket + 1
    }

    /// Bytes of all claims.
    pub(super) fn claimed_bytes(&self) -> u64 {
        self.claimed_bytes
    }

    /// Adds a claim of a range that nothing overlaps.
    pub(super) fn add_claim(&mut self, range: &Range<u64>) {
        self.last_ticket += 1;
        self.claimed_bytes += range.end - range.start;
        let held = Held { end: range.end, ticket: self.last_ticket };
        self.claims.insert(range.start, held);
    }

    /// Moves the end of the claim that begins at `start`.
    pub(super) fn set_claim_end(&mut self, start: u64, end: u64) {
        let held = self.claims.get_mut(&start).expect("a claim is removed by its owner alone");
        self.claimed_bytes = self.claimed_bytes + end - held.end;
        held.end = end;
    }

    /// Removes the claim that begins at `start`.
    pub(super) fn remove_claim(&mut self, start: u64) {
        let held = self.claims.remove(&start).expect("a claim is removed by its owner alone");
        self.claimed_bytes -= held.end - start;
    }

    /// Adds an exclusion; returns its ticket.
    pub(super) fn add_exclusion(&mut self, range: Range<u64>) -> u64 {
        self.last_ticket += 1;
        self.exclusions.push((self.last_ticket, range));
        self.last_ticket
    }

    /// Removes an exclusion.
    pub(super) fn remove_exclusion(&mut self, ticket: u64) {
        self.exclusions.retain(|(number, _)| *number != ticket);
    }

    fn overlapping_claims(&self, range: &Range<u64>) -> impl Iterator<Item = (&u64, &Held)> {
        let before = self.claims.range(..=range.start).next_back();
        let first = before.filter(|(_, held)| held.end > range.start).map_or(range.start, |c| *c.0);
        // An empty range overlaps nothing.
        let end = if range.start < range.end { range.end.max(first) } else { first };
        self.claims.range(first..end)
    }

    /// True if a claim overlaps the range.
    pub(super) fn has_claim(&self, range: &Range<u64>) -> bool {
        self.overlapping_claims(range).next().is_some()
    }

    /// The claim or exclusion that overlaps the range and begins first.
    pub(super) fn first_overlap(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let claim = self.overlapping_claims(range).next().map(|(start, held)| *start..held.end);
        let excluded = self.exclusions.iter().map(|(_, r)| r).filter(|r| overlaps(r, range));
        excluded.cloned().chain(claim).min_by_key(|found| found.start)
    }

    /// True if something with a lower ticket overlaps the range.
    pub(super) fn has_earlier(&self, range: &Range<u64>, ticket: u64) -> bool {
        let is_earlier = |(number, r): &(u64, Range<u64>)| *number < ticket && overlaps(r, range);
        self.overlapping_claims(range).any(|(_, held)| held.ticket < ticket)
            || self.exclusions.iter().any(is_earlier)
    }
}
