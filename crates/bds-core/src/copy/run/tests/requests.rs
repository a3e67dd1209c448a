//! Which requests the engine sends, by table; errors and verdicts.

use std::sync::atomic::Ordering;

use super::{Control, Fake, GRANULE, pattern};
use crate::copy::{CopyControl, CopyMap, ErrorSite, ErrorVerdict, Found, RunOptions, Side, run};
use crate::error::ErrorKind;
use crate::test_kit::{lock, run as simulate};

/// Runs a copy of a marked image of `len` bytes and returns the requests to the target.
fn requests(
    len: u64,
    found: &[(std::ops::Range<u64>, Found)],
    options: &RunOptions,
) -> Vec<(&'static str, std::ops::Range<u64>)> {
    simulate(1, async {
        let source = Fake::new("source", pattern(len, 8), 1);
        *lock(&source.found) = found.to_vec();
        let target = Fake::new("target", vec![0xEE; usize::try_from(len).unwrap()], 2);
        let map = CopyMap::new(len, u32::try_from(GRANULE).unwrap()).unwrap();
        map.mark_all();
        run(&map, &*source, &*target, options, &()).await.unwrap();
        assert!(map.is_clean());
        let mut log = lock(&target.log).clone();
        log.sort_by_key(|(_, range)| (range.start, range.end));
        log
    })
}

#[test]
fn granules_are_merged_up_to_a_chunk_and_clipped_at_the_end() {
    let options = RunOptions { max_chunk: 3 * GRANULE + 5, ..RunOptions::default() };
    let log = requests(7 * GRANULE + 100, &[], &options);
    let g = GRANULE;
    let expected = [0..3 * g, 3 * g..6 * g, 6 * g..7 * g + 100];
    assert_eq!(log, expected.map(|range| ("write", range)));
}

#[test]
fn zeros_and_gaps_are_one_request_each_and_mixed_granules_are_data() {
    let g = GRANULE;
    let found = [
        (0..2 * g + 512, Found::Zero),
        (3 * g..8 * g, Found::Unallocated),
        (9 * g..20 * g, Found::Zero),
    ];
    let options = RunOptions { max_chunk: g, may_unmap: true, ..RunOptions::default() };
    let log = requests(20 * g, &found, &options);
    let expected = [
        ("unmap", 0..2 * g),
        ("write", 2 * g..3 * g),
        ("write", 8 * g..9 * g),
        ("unmap", 9 * g..20 * g),
    ];
    assert_eq!(log, expected);
    let options = RunOptions { target_is_zero: true, ..options };
    let log = requests(20 * g, &found, &options);
    assert_eq!(log, [("write", 2 * g..3 * g), ("write", 8 * g..9 * g)]);
}

#[test]
fn compressed_clusters_are_written_one_a_request_and_padded_at_the_end() {
    let g = GRANULE;
    let options = RunOptions { compress: Some(g / 2), ..RunOptions::default() };
    let log = requests(2 * g + 100, &[(0..g, Found::Zero)], &options);
    let end = 2 * g + 100;
    let expected = [
        ("zero", 0..g),
        ("compressed", g..g + g / 2),
        ("compressed", g + g / 2..2 * g),
        ("compressed", 2 * g..end),
        ("compressed", end..end),
    ];
    assert_eq!(log, expected);
}

#[test]
fn wrong_options_are_refused_before_anything_is_touched() {
    let wrong = [
        RunOptions { max_requests: 0, ..RunOptions::default() },
        RunOptions { max_requests: 65, ..RunOptions::default() },
        RunOptions { compress: Some(3 * GRANULE), ..RunOptions::default() },
        RunOptions { compress: Some(GRANULE), offload: true, ..RunOptions::default() },
        RunOptions { sparse_len: 1, ..RunOptions::default() },
    ];
    for options in wrong {
        simulate(1, async {
            let source = Fake::new("source", pattern(GRANULE, 8), 1);
            let map = CopyMap::new(GRANULE, 4096).unwrap();
            map.mark_all();
            let error = run(&map, &*source, &*source, &options, &()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{options:?}");
            assert_eq!(map.dirty_bytes(), GRANULE);
        });
    }
}

#[test]
fn memory_and_requests_are_bounded() {
    simulate(5, async {
        let len = 64 * GRANULE;
        let source = Fake::new("source", pattern(len, 8), 1);
        let target = Fake::new("target", vec![0; usize::try_from(len).unwrap()], 2);
        for (max_requests, memory, most) in [(64, 3 * GRANULE, 3), (2, u64::MAX, 2), (5, 1, 1)] {
            let map = CopyMap::new(len, 4096).unwrap();
            map.mark_all();
            target.most.store(0, Ordering::SeqCst);
            let options =
                RunOptions { max_requests, memory, max_chunk: 1, ..RunOptions::default() };
            run(&map, &*source, &*target, &options, &()).await.unwrap();
            assert!(target.most.load(Ordering::SeqCst) <= most);
            assert_eq!(target.bytes(), source.bytes());
        }
    });
}

/// A disk that others use all the time, or never.
struct Used(bool);

impl CopyControl for Used {
    fn is_disk_in_use(&self) -> bool {
        self.0
    }
}

#[test]
fn beside_users_of_the_disk_requests_are_short_and_one_at_a_time() {
    simulate(5, async {
        let len = 4 << 20;
        let source = Fake::new("source", pattern(len, 8), 1);
        for (is_used, longest, is_alone) in [(true, 256 << 10, true), (false, 1 << 20, false)] {
            let target = Fake::new("target", vec![0; usize::try_from(len).unwrap()], 2);
            let map = CopyMap::new(len, 4096).unwrap();
            map.mark_all();
            let options = RunOptions::default();
            run(&map, &*source, &*target, &options, &Used(is_used)).await.unwrap();
            assert_eq!(target.bytes(), source.bytes());
            let log = lock(&target.log);
            let most = log.iter().map(|(_, range)| range.end - range.start).max();
            assert_eq!(most, Some(longest));
            assert_eq!(target.most.load(Ordering::SeqCst) == 1, is_alone);
        }
    });
}

#[test]
fn an_error_names_side_node_and_place_and_leaves_the_rest_dirty() {
    simulate(1, async {
        let len = 4 * GRANULE;
        let source = Fake::new("source", pattern(len, 8), 1);
        let target = Fake::new("target", vec![0; usize::try_from(len).unwrap()], 2);
        let map = CopyMap::new(len, 4096).unwrap();
        map.mark(GRANULE..2 * GRANULE);
        target.fails.store(1, Ordering::SeqCst);
        let control = Control::new(&source, &target, ErrorVerdict::Fail, 0);
        let error = run(&map, &*source, &*target, &RunOptions::default(), &*control).await;
        let text = "node 'below': cannot write the target: injected at offset 0x1000";
        assert_eq!(error.unwrap_err().to_string(), text);
        assert_eq!((map.dirty_bytes(), map.in_flight_bytes()), (GRANULE, 0));
        let site = ErrorSite { offset: GRANULE, len: GRANULE, node: "below".into() };
        assert_eq!(lock(&control.errors)[..], [(Side::Target, site, text.to_owned())]);
        // Skipped, it is clean and counted.
        let control = Control::new(&source, &target, ErrorVerdict::Skip, 0);
        run(&map, &*source, &*target, &RunOptions::default(), &*control).await.unwrap();
        assert!(map.is_clean());
        assert_eq!(control.copied.load(Ordering::SeqCst), GRANULE);
    });
}

#[test]
fn what_was_copied_is_discarded_while_it_is_claimed() {
    simulate(1, async {
        let len = 4 * GRANULE;
        let source = Fake::new("source", pattern(len, 8), 1);
        *lock(&source.found) = vec![(0..GRANULE, Found::Zero)];
        let target = Fake::new("target", vec![0; usize::try_from(len).unwrap()], 2);
        let map = CopyMap::new(len, 4096).unwrap();
        map.mark_all();
        let options = RunOptions { discard_source: true, ..RunOptions::default() };
        run(&map, &*source, &*target, &options, &()).await.unwrap();
        let last = lock(&source.log).last().cloned();
        assert_eq!(last, Some(("discard", GRANULE..len)));
    });
}

/// Another user of the map copies a range: the engine does not return before that has ended, and
/// copies it itself if it failed.
#[test]
fn returns_only_when_the_claims_of_others_have_ended() {
    for fails in [false, true] {
        simulate(1, async {
            let len = 4 * GRANULE;
            let source = Fake::new("source", pattern(len, 8), 1);
            let target = Fake::new("target", vec![0; usize::try_from(len).unwrap()], 2);
            let map = CopyMap::new(len, 4096).unwrap();
            map.mark_all();
            let claim = map.claim(0..1, 1).unwrap();
            let options = RunOptions::default();
            let copy = run(&map, &*source, &*target, &options, &());
            let mut copy = std::pin::pin!(copy);
            for _ in 0..100 {
                assert!(futures_util::poll!(copy.as_mut()).is_pending());
                bds_io::yield_now().await;
            }
            assert_eq!(target.bytes()[GRANULE as usize..], source.bytes()[GRANULE as usize..]);
            if fails {
                drop(claim)
            } else {
                claim.done()
            }
            copy.await.unwrap();
            assert_eq!(target.bytes()[0] == source.bytes()[0], fails);
        });
    }
}
