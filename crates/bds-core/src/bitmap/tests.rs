//! Bitmaps against a plain vector of bools, for short and long ranges, and under threads.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

/// The same as a set of granules.
struct Model {
    len: u64,
    granularity: u64,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn new(len: u64, granularity: u32) -> Self {
        Self { len, granularity: u64::from(granularity), dirty: BTreeSet::new() }
    }

    fn granules(&self) -> u64 {
        self.len.div_ceil(self.granularity)
    }

    fn touched(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(self.len);
        if range.start >= end {
            return 0..0;
        }
        range.start / self.granularity..end.div_ceil(self.granularity)
    }

    fn set(&mut self, range: &Range<u64>) {
        self.dirty.extend(self.touched(range));
    }

    fn clear(&mut self, range: &Range<u64>) {
        let (granularity, len) = (self.granularity, self.len);
        self.dirty.retain(|n| {
            let (start, end) = (n * granularity, ((n + 1) * granularity).min(len));
            !(range.start <= start && end <= range.end.min(len).max(range.start))
        });
    }

    fn areas(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut areas: Vec<Range<u64>> = Vec::new();
        for n in self.touched(range).filter(|n| self.dirty.contains(n)) {
            let start = (n * self.granularity).max(range.start);
            let end = ((n + 1) * self.granularity).min(self.len).min(range.end);
            match areas.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => areas.push(start..end),
            }
        }
        areas
    }

    fn check(&self, bitmap: &HBitmap) {
        assert_eq!(bitmap.granules(), self.granules());
        assert_eq!(bitmap.dirty_granules(), self.dirty.len() as u64);
        assert_eq!(bitmap.areas(0..u64::MAX).collect::<Vec<_>>(), self.areas(&(0..self.len)));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Set(Range<u64>),
    Clear(Range<u64>),
    Search(Range<u64>),
    Claim(Range<u64>, u64),
    Stream(u64, usize),
    SetLen(u64),
}

fn range(len: u64) -> impl Strategy<Value = Range<u64>> {
    let short = (0..=len, 0..5000u64).prop_map(|(start, len)| start..start + len);
    let long = (0..=len, 0..=len + 9000).prop_map(|(a, b)| a.min(b)..a.max(b));
    prop_oneof![short, long]
}

fn step(len: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range(len).prop_map(Step::Set),
        2 => range(len).prop_map(Step::Clear),
        2 => range(len).prop_map(Step::Search),
        2 => (range(len), 0..100_000u64).prop_map(|(range, max)| Step::Claim(range, max)),
        1 => (0..len / 4096 + 10, 0..40usize).prop_map(|(at, count)| Step::Stream(at, count)),
        1 => (0..=2 * len).prop_map(Step::SetLen),
    ]
}

fn run(len: u64, granularity: u32, steps: Vec<Step>) {
    let bitmap = HBitmap::new(len, granularity).unwrap();
    let mut model = Model::new(len, granularity);
    for step in steps {
        match step {
            Step::Set(range) => {
                bitmap.set(range.clone());
                model.set(&range);
            }
            Step::Clear(range) => {
                bitmap.clear(range.clone());
                model.clear(&range);
            }
            Step::Search(range) => search(&bitmap, &model, range),
            Step::Claim(range, max) => claim(&bitmap, &mut model, range, max),
            Step::Stream(at, count) => stream(&bitmap, &model, at, count),
            Step::SetLen(len) => {
                bitmap.set_len(len);
                model.len = len;
                let kept = model.granules();
                model.dirty.retain(|n| *n < kept);
            }
        }
        model.check(&bitmap);
    }
    copies(&bitmap, &model);
}

fn search(bitmap: &HBitmap, model: &Model, range: Range<u64>) {
    let areas = model.areas(&range);
    assert_eq!(bitmap.next_dirty(range.clone()), areas.first().map(|area| area.start));
    assert_eq!(bitmap.areas(range.clone()).collect::<Vec<_>>(), areas);
    let end = range.end.min(model.len);
    if range.start >= end {
        assert_eq!(bitmap.status(range.start, range.end), (false, 0));
        assert_eq!(bitmap.next_clean(range), None);
        return;
    }
    let is_dirty = model.dirty.contains(&(range.start / model.granularity));
    assert_eq!(bitmap.is_dirty(range.start), is_dirty);
    let first = areas.first();
    let run = match is_dirty {
        true => first.unwrap().end,
        false => first.map_or(end, |area| area.start),
    };
    assert_eq!(bitmap.status(range.start, range.end), (is_dirty, run - range.start));
    let clean = if is_dirty { run } else { range.start };
    assert_eq!(bitmap.next_clean(range), Some(clean).filter(|clean| *clean < end));
}

fn claim(bitmap: &HBitmap, model: &mut Model, range: Range<u64>, max: u64) {
    let most = (max / model.granularity).max(1);
    let mut touched = model.touched(&range);
    let first = touched.clone().find(|n| model.dirty.contains(n));
    let Some(first) = first else { return assert_eq!(bitmap.claim(range, max), None) };
    touched.start = first;
    let run = touched.take(usize::try_from(most).unwrap());
    let run: Vec<u64> = run.take_while(|n| model.dirty.contains(n)).collect();
    let end = (run.last().unwrap() + 1) * model.granularity;
    let wanted = first * model.granularity..end.min(model.len);
    assert_eq!(bitmap.claim(range, max), Some(wanted));
    run.iter().for_each(|n| assert!(model.dirty.remove(n)));
}

fn stream(bitmap: &HBitmap, model: &Model, at: u64, count: usize) {
    let bit = |n: u64| u8::from(model.dirty.contains(&n));
    let byte = |byte: u64| (0..8).map(|n| bit(byte * 8 + n) << n).sum::<u8>();
    let wanted: Vec<u8> = (at..at + count as u64).map(byte).collect();
    let mut found = vec![0xee; count];
    bitmap.read_stream(at, &mut found);
    assert_eq!(found, wanted, "from byte {at}");
    let granules = (at * 8).min(model.granules())..((at + count as u64) * 8).min(model.granules());
    let (total, dirty) =
        (granules.clone().count(), granules.filter(|n| model.dirty.contains(n)).count());
    let state = match dirty {
        0 => StreamState::Clean,
        _ if dirty == total => StreamState::Dirty,
        _ => StreamState::Mixed,
    };
    assert_eq!(bitmap.stream_state(at, count as u64), state);
}

fn copies(bitmap: &HBitmap, model: &Model) {
    let copy = HBitmap::new(model.len, bitmap.granularity()).unwrap();
    let mut bytes = vec![0; usize::try_from(bitmap.stream_len()).unwrap() + 3];
    bitmap.read_stream(0, &mut bytes);
    let end = bytes.len() - 3;
    assert_eq!(bytes[end..], [0; 3], "behind the end");
    bytes[end..].fill(0xff);
    let middle = end / 2;
    copy.merge_stream(0, &bytes[..middle]);
    copy.merge_stream(middle as u64, &bytes[middle..]);
    model.check(&copy);
    let longer = bitmap.resized(model.len + 123_456_789).unwrap();
    assert_eq!(longer.dirty_granules(), model.dirty.len() as u64);
    let shorter = bitmap.resized(model.len / 2).unwrap();
    let kept = shorter.granules();
    assert_eq!(shorter.dirty_granules(), model.dirty.range(..kept).count() as u64);
}

proptest! {
    // Large bitmaps have three pages, which a plain model walks slowly.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_bitmap_is_a_set_of_granules(
        (len, steps) in prop_oneof![7 => 0..2_000_000u64, 1 => 40_000_000..50_000_000u64]
            .prop_flat_map(|len| (Just(len), prop::collection::vec(step(len), 1..20))),
        shift in 9..14u32,
    ) {
        run(len, 1 << shift, steps);
    }

    #[test]
    fn merging_rounds_outwards(
        ranges in prop::collection::vec(range(3_000_000), 0..10),
        (from, to) in (9..16u32, 9..16u32),
    ) {
        let len = 3_000_001;
        let source = HBitmap::new(len, 1 << from).unwrap();
        let target = HBitmap::new(len, 1 << to).unwrap();
        let (mut fine, mut wanted) = (Model::new(len, 1 << from), Model::new(len, 1 << to));
        target.set(1_000_000..1_000_001);
        wanted.set(&(1_000_000..1_000_001));
        for range in &ranges {
            source.set(range.clone());
            fine.set(range);
        }
        fine.areas(&(0..len)).iter().for_each(|area| wanted.set(area));
        target.merge(&source).unwrap();
        wanted.check(&target);
        fine.check(&source);
    }
}

#[test]
fn bad_shapes_are_refused() {
    for granularity in [0, 1, 256, 513, 65537, 3 << 20] {
        let error = HBitmap::new(1 << 20, granularity).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{granularity}");
    }
    let error = HBitmap::new((1 << 41) + 1, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    assert!(error.to_string().contains("choose a larger granularity"), "{error}");
    assert!(HBitmap::new(1 << 41, 512).is_ok(), "the most there may be");
    assert!(HBitmap::new(u64::MAX, MAX_GRANULARITY).is_err());
    let one = HBitmap::new(1 << 20, 512).unwrap();
    let error = one.merge(&HBitmap::new(1 << 21, 512).unwrap()).unwrap_err();
    assert!(error.to_string().contains("Bitmaps are of different sizes"), "{error}");
    assert_eq!(one.dirty_bytes(), 0);
}

#[test]
fn all_of_a_bitmap_is_set_and_cleared() {
    let bitmap = HBitmap::new(5 * 65536 + 1, 65536).unwrap();
    bitmap.set_all();
    assert_eq!((bitmap.dirty_granules(), bitmap.dirty_bytes()), (6, 6 * 65536));
    assert_eq!(bitmap.areas(0..u64::MAX).collect::<Vec<_>>(), vec![0..5 * 65536 + 1]);
    assert_eq!(bitmap.stream_state(0, 100), StreamState::Dirty);
    bitmap.clear(0..u64::MAX);
    assert_eq!(bitmap.dirty_granules(), 0);
    let empty = HBitmap::new(0, 512).unwrap();
    empty.set(0..100);
    empty.set_all();
    assert!(empty.is_empty());
    assert_eq!((empty.claim(0..100, 100), empty.stream_len()), (None, 0));
}

/// A bitmap of no bytes that grows far: each segment of pages is reached, and none moves.
#[test]
fn a_bitmap_grows_far() {
    let bitmap = HBitmap::new(0, 512).unwrap();
    let mut wanted = Vec::new();
    for shift in 20..43 {
        let len = 1 << shift;
        bitmap.grow(len);
        bitmap.grow(len / 2);
        assert_eq!(bitmap.len(), len);
        let last = len - 512..len;
        bitmap.set(last.clone());
        assert!(bitmap.is_dirty(len - 1) && !bitmap.is_dirty(len));
        wanted.push(last);
    }
    assert_eq!(bitmap.dirty_granules(), wanted.len() as u64);
    bitmap.set_len((1 << 21) + 1);
    assert_eq!(bitmap.areas(0..u64::MAX).collect::<Vec<_>>(), wanted[..2]);
}

/// One granule stays dirty while others of its page come and go: a search must find it at any time.
#[test]
fn searches_never_miss_a_granule_that_stays_dirty() {
    let bitmap = HBitmap::new(1000 * 512, 512).unwrap();
    bitmap.set(0..512);
    let left = AtomicU64::new(2);
    std::thread::scope(|scope| {
        for thread in 1..3 {
            let (bitmap, left) = (&bitmap, &left);
            scope.spawn(move || {
                for round in 0..20_000 {
                    let at = (1 + (round * thread) % 3) * 512;
                    bitmap.set(at..at + 512);
                    bitmap.claim(512..1000 * 512, u64::MAX);
                }
                left.fetch_sub(1, Ordering::Release);
            });
        }
        while left.load(Ordering::Acquire) > 0 {
            assert_eq!(bitmap.next_dirty(0..512), Some(0));
            assert!(bitmap.dirty_granules() > 0);
        }
    });
    bitmap.claim(512..1000 * 512, u64::MAX);
    assert_eq!(bitmap.dirty_granules(), 1, "the counts are exact in the end");
}

/// Stamps beside bits: a write stores its stamp and then marks; a copier claims and then reads. At
/// the end no stamp is missing in the copy, though bits are set, found set already, and claimed all
/// the time.
#[test]
fn no_write_is_lost_between_claim_and_mark() {
    const GRANULES: u64 = 200;
    const ROUNDS: u64 = 20_000;
    let bitmap = HBitmap::new(GRANULES * 512, 512).unwrap();
    let data: Vec<AtomicU64> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
    let copy: Vec<AtomicU64> = (0..GRANULES).map(|_| AtomicU64::new(0)).collect();
    let left = AtomicU64::new(3);
    let copy_all = || {
        while let Some(area) = bitmap.claim(0..u64::MAX, 3 * 512) {
            for n in area.start / 512..area.end / 512 {
                let n = usize::try_from(n).unwrap();
                // Two copiers may take a granule one after the other: the newer stamp stays.
                copy[n].fetch_max(data[n].load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let (bitmap, data, left) = (&bitmap, &data, &left);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    let n = (round * 7 + writer * 31) % GRANULES;
                    data[usize::try_from(n).unwrap()].fetch_add(1, Ordering::Relaxed);
                    bitmap.set(n * 512..n * 512 + 1);
                }
                left.fetch_sub(1, Ordering::Release);
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while left.load(Ordering::Acquire) > 0 {
                    copy_all();
                }
            });
        }
    });
    copy_all();
    assert_eq!(bitmap.dirty_granules(), 0, "the counts are exact in the end");
    for (data, copy) in data.iter().zip(&copy) {
        assert_eq!(data.load(Ordering::Relaxed), copy.load(Ordering::Relaxed));
    }
}
