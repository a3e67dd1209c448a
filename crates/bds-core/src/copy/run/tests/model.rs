//! Property test: copies under random faults, pauses and guest writes reach the source's bytes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::{Just, ProptestConfig, any, prop, prop_oneof, proptest};

use super::{Control, Dice, Fake, GRANULE, pattern};
use crate::copy::{CopyMap, ErrorVerdict, Found, RunOptions, run};
use crate::test_kit::{lock, run as simulate, yield_times};

/// Writes to the source, then marks: as a mirror's filter does.
async fn guest(map: Arc<CopyMap>, source: Arc<Fake>, writes: u64, seed: u64) {
    let dice = Dice::new(seed);
    for write in 0..writes {
        yield_times(usize::try_from(dice.roll(6)).unwrap()).await;
        let at = dice.roll(map.len());
        let end = map.len().min(at + 1 + dice.roll(3 * GRANULE));
        lock(&source.found).retain(|(run, _)| run.end <= at || end <= run.start);
        let bytes = at as usize..end as usize;
        lock(&source.bytes)[bytes].fill(write as u8 | 1);
        map.mark(at..end);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_target_reaches_the_source(
        seed in any::<u64>(),
        len in 1..40 * GRANULE,
        dirty in prop::collection::vec((0..40 * GRANULE, 1..4 * GRANULE), 0..8),
        empty in prop::collection::vec((0..40 * GRANULE, 1..6 * GRANULE, any::<bool>()), 0..4),
        (requests, chunk, fails) in (1_usize..9, 1..6 * GRANULE, 0_u64..9),
        pauses in prop_oneof![Just(0_u64), 2_u64..9],
        writes in 0_u64..30,
    ) {
        let mut bytes = pattern(len, 8);
        let mut runs: Vec<(std::ops::Range<u64>, Found)> = Vec::new();
        for (at, run_len, is_zero) in empty {
            let run = at.min(len)..(at + run_len).min(len);
            if run.is_empty() || runs.iter().any(|(r, _)| r.start < run.end && run.start < r.end) {
                continue;
            }
            if is_zero {
                bytes[run.start as usize..run.end as usize].fill(0);
            }
            runs.push((run, if is_zero { Found::Zero } else { Found::Unallocated }));
        }
        let source = Fake::new("source", bytes, seed);
        *lock(&source.found) = runs.clone();
        let target = Fake::new("target", vec![0xEE; len as usize], seed ^ 1);
        for side in [&source, &target] {
            side.fails.store(fails * 3, Ordering::SeqCst);
        }
        let map = Arc::new(CopyMap::new(len, 4096).unwrap());
        dirty.iter().for_each(|(at, marked)| map.mark(*at..at + marked));
        let first: Vec<bool> = (0..len).map(|at| map.bitmap().is_dirty(at)).collect();
        let control = Control::new(&source, &target, ErrorVerdict::Retry, pauses);
        let options = RunOptions {
            max_requests: requests,
            max_chunk: chunk,
            sparse_len: if seed.is_multiple_of(2) { 4096 } else { 0 },
            ..RunOptions::default()
        };
        simulate(seed, async {
            let guest = bds_io::spawn(guest(map.clone(), source.clone(), writes, seed ^ 2));
            run(&map, &*source, &*target, &options, &*control).await.unwrap();
            assert_eq!(map.in_flight_bytes(), 0);
            assert_eq!(source.in_flight() + target.in_flight(), 0);
            guest.await;
            run(&map, &*source, &*target, &options, &*control).await.unwrap();
        });
        assert!(map.is_clean());
        let (source, target) = (source.bytes(), target.bytes());
        for at in 0..len {
            let is_gap = runs.iter().any(|(run, found)| {
                *found == Found::Unallocated && run.contains(&at)
            });
            let byte = (source[at as usize], target[at as usize]);
            let was_written = writes > 0 && byte.0 == byte.1;
            if first[at as usize] && !is_gap {
                assert_eq!(byte.0, byte.1, "at {at}");
            } else if !was_written {
                assert!(byte.1 == 0xEE || byte.0 == byte.1, "{at}: never dirty, but changed");
            }
        }
    }
}
