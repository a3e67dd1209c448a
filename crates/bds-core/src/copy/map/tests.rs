//! Tests the map: claims, exclusions, and a property test against one state a granule.
#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};

use futures_util::FutureExt as _;
use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

use super::{Claim, CopyMap};

const GRANULE: u64 = 512;

fn map_of(granules: u64) -> CopyMap {
    CopyMap::new(granules * GRANULE, 512).unwrap()
}

#[test]
fn a_marked_range_is_not_claimed_twice_at_once() {
    let map = map_of(8);
    map.mark(0..1);
    let first = map.claim(0..map.len(), u64::MAX).unwrap();
    map.mark(100..200);
    assert!(map.claim(0..map.len(), u64::MAX).is_none(), "its copy is under way");
    assert_eq!((map.dirty_bytes(), map.in_flight_bytes()), (GRANULE, GRANULE));
    first.done();
    let again = map.claim(0..map.len(), u64::MAX).unwrap();
    assert_eq!(again.range(), 0..GRANULE, "it was marked during the copy");
    again.done();
    assert!(map.is_clean());
    assert_eq!(map.done_bytes(), 2 * GRANULE);
}

#[test]
fn the_short_last_granule_counts_as_short() {
    let map = CopyMap::new(1300, 512).unwrap();
    map.mark_all();
    assert_eq!(map.dirty_bytes(), 1300);
    let claim = map.claim(1200..1300, 1).unwrap();
    assert_eq!((claim.range(), map.dirty_bytes(), map.in_flight_bytes()), (1024..1300, 1024, 276));
}

#[test]
fn claims_shrink_and_extend_over_dirty_granules_alone() {
    let map = map_of(8);
    map.mark(0..6 * GRANULE);
    let mut claim = map.claim(0..map.len(), 2 * GRANULE).unwrap();
    claim.shrink(1);
    assert_eq!((claim.range(), map.dirty_bytes()), (0..GRANULE, 5 * GRANULE));
    let other = map.claim(3 * GRANULE..map.len(), GRANULE).unwrap();
    assert_eq!(claim.extend(u64::MAX), 2 * GRANULE, "up to the other claim");
    other.done();
    assert_eq!(claim.extend(u64::MAX), 0, "it is clean now");
    drop(claim);
    assert_eq!(map.dirty_bytes(), 5 * GRANULE);
}

#[test]
fn an_exclusion_waits_for_copies_and_keeps_others_away() {
    let map = map_of(4);
    map.mark_all();
    let claim = map.claim(0..1, 1).unwrap();
    let mut waiting = Box::pin(map.exclude(0..2 * GRANULE));
    assert!(waiting.as_mut().now_or_never().is_none());
    assert_eq!(map.claim(0..map.len(), GRANULE).unwrap().range(), 2 * GRANULE..3 * GRANULE);
    claim.done();
    let mut waiting = Box::pin(waiting);
    let exclusion = waiting.as_mut().now_or_never().unwrap();
    assert!(map.claim(0..2 * GRANULE, 1).is_none(), "excluded");
    assert!(map.exclude(GRANULE..GRANULE + 1).now_or_never().is_none(), "they exclude each other");
    drop(exclusion);
    assert!(map.claim(0..2 * GRANULE, 1).is_some());
    assert!(map.wait_idle(0..map.len()).now_or_never().is_some());
}

#[derive(Clone, Debug)]
enum Step {
    Mark(u64, u64),
    Claim(u64, u64),
    Shrink(usize, u64),
    Extend(usize, u64),
    Done(usize),
    Drop(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0..40 * GRANULE;
    let len = prop_oneof![Just(1_u64), Just(GRANULE), 1..9 * GRANULE];
    let pick = any::<usize>();
    let step = prop_oneof![
        3 => (at.clone(), len.clone()).prop_map(|(at, len)| Step::Mark(at, len)),
        3 => (at, len.clone()).prop_map(|(at, len)| Step::Claim(at, len)),
        1 => (pick, len.clone()).prop_map(|(n, len)| Step::Shrink(n, len)),
        1 => (pick, len).prop_map(|(n, len)| Step::Extend(n, len)),
        2 => pick.prop_map(Step::Done),
        1 => pick.prop_map(Step::Drop),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Model: a set of dirty granules and a map of claimed ones.
    #[test]
    fn claims_follow_the_model(granules in 1_u64..33, tail in 0..GRANULE, steps in steps()) {
        let len = granules * GRANULE - tail;
        let map = CopyMap::new(len, 512).unwrap();
        let granules = len.div_ceil(GRANULE);
        let mut dirty = vec![false; usize::try_from(granules).unwrap()];
        let mut claims: BTreeMap<u64, Claim<'_>> = BTreeMap::new();
        let end = len;
        let touched = |at: u64, len: u64| match len {
            1.. if at < end => at / GRANULE..(at + len).div_ceil(GRANULE).min(granules),
            _ => 0..0,
        };
        for step in steps {
            let pick = |n: usize, claims: &BTreeMap<u64, Claim<'_>>| {
                claims.keys().nth(n % claims.len().max(1)).copied()
            };
            match step {
                Step::Mark(at, len) => {
                    map.mark(at..at + len);
                    touched(at, len).for_each(|g| dirty[g as usize] = true);
                }
                Step::Claim(at, max) => {
                    if let Some(claim) = map.claim(at..len, max) {
                        assert!(claim.range().end <= (at.max(claim.range().start) + max.max(GRANULE))
                            .next_multiple_of(GRANULE));
                        let start = claim.range().start;
                        touched(start, claim.range().end - start)
                            .for_each(|g| assert!(std::mem::take(&mut dirty[g as usize])));
                        claims.insert(start, claim);
                    } else {
                        let busy = |g: u64| claims.values().any(|c| c.range().contains(&(g * GRANULE)));
                        let mut rest = at / GRANULE..granules;
                        assert!(at >= len || rest.all(|g| !dirty[g as usize] || busy(g)));
                    }
                }
                Step::Shrink(n, to) => {
                    let Some(start) = pick(n, &claims) else { continue };
                    let claim = claims.get_mut(&start).unwrap();
                    let before = claim.range();
                    claim.shrink(to);
                    let after = claim.range();
                    assert_eq!(after.start, before.start);
                    if after.end < before.end {
                        touched(after.end, before.end - after.end).for_each(|g| dirty[g as usize] = true);
                    }
                }
                Step::Extend(n, to) => {
                    let Some(start) = pick(n, &claims) else { continue };
                    let claim = claims.get_mut(&start).unwrap();
                    let before = claim.range();
                    let added = claim.extend(to);
                    assert_eq!(claim.range(), start..before.end + added);
                    touched(before.end, added).for_each(|g| assert!(std::mem::take(&mut dirty[g as usize])));
                }
                Step::Done(n) => {
                    let Some(start) = pick(n, &claims) else { continue };
                    claims.remove(&start).unwrap().done();
                }
                Step::Drop(n) => {
                    let Some(start) = pick(n, &claims) else { continue };
                    let range = claims.remove(&start).unwrap().range();
                    touched(start, range.end - start).for_each(|g| dirty[g as usize] = true);
                }
            }
            let bytes = |g: usize| GRANULE.min(len - g as u64 * GRANULE);
            let expected: u64 = (0..dirty.len()).filter(|g| dirty[*g]).map(bytes).sum();
            assert_eq!(map.dirty_bytes(), expected);
            let claimed: u64 = claims.values().map(|c| c.range().end - c.range().start).sum();
            assert_eq!(map.in_flight_bytes(), claimed);
            assert_eq!(map.is_clean(), expected + claimed == 0);
        }
    }
}

#[test]
fn threads_never_hold_one_granule_twice_and_lose_no_mark() {
    const GRANULES: usize = 64;
    let map = map_of(GRANULES as u64);
    let held: Vec<AtomicU8> = (0..GRANULES).map(|_| AtomicU8::new(0)).collect();
    map.mark_all();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (map, held) = (&map, &held);
            scope.spawn(move || {
                for round in 0..2000_u64 {
                    let at = (round * 7 + thread * 13) % map.len();
                    let Some(claim) = map.claim(at..map.len(), 3 * GRANULE) else { continue };
                    let granules = claim.range().start / GRANULE..claim.range().end / GRANULE;
                    for g in granules.clone() {
                        assert_eq!(held[g as usize].fetch_add(1, Ordering::SeqCst), 0);
                    }
                    map.mark(at..at + 1);
                    for g in granules {
                        held[g as usize].fetch_sub(1, Ordering::SeqCst);
                    }
                    if round % 3 == 0 { drop(claim) } else { claim.done() }
                }
            });
        }
    });
    while let Some(claim) = map.claim(0..map.len(), u64::MAX) {
        claim.done();
    }
    assert!(map.is_clean());
}
