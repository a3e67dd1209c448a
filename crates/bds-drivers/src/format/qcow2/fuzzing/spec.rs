//! A slow, literal reading of the specification's tables for L2 entries, to compare the real
//! decoder with.

use crate::format::qcow2::layout::entry::{EntryRules, Kind, L2Entry};

/// Bits `low..=high` of `word`.
fn bits(word: u64, low: u32, high: u32) -> u64 {
    (low..=high).filter(|bit| word >> bit & 1 == 1).map(|bit| 1 << (bit - low)).sum()
}

/// What the specification says subcluster `index` is; `None` where it gives no meaning.
fn meaning(entry: L2Entry, index: u32, rules: &EntryRules) -> Option<Kind> {
    let word = entry.word;
    let cluster_bits = rules.geometry.cluster_bits();
    let extended = rules.geometry.has_extended_l2();
    if bits(word, 62, 62) == 1 {
        // Compressed Clusters Descriptor: x = 62 - (cluster_bits - 8).
        let x = 62 - (cluster_bits - 8);
        let offset = bits(word, 0, x - 1);
        let is_good = !rules.has_data_file && offset < 1 << 56 && entry.bitmap == 0;
        return is_good.then_some(Kind::Compressed);
    }
    let offset = bits(word, 9, 55) << 9;
    if !offset.is_multiple_of(1 << cluster_bits) {
        return None;
    }
    let copied = bits(word, 63, 63) == 1;
    if !extended {
        let zero = bits(word, 0, 0) == 1;
        return match (zero, offset) {
            (true, _) if !rules.has_zero_flag => None,
            (true, 0) => Some(Kind::ZeroPlain),
            (true, _) => Some(Kind::ZeroAlloc),
            (false, 0) if rules.has_data_file && copied => Some(Kind::Normal),
            (false, 0) => Some(Kind::Unallocated),
            (false, _) => Some(Kind::Normal),
        };
    }
    let is_allocated = offset != 0 || rules.has_data_file && copied;
    for i in 0..32 {
        let (alloc, zero) = (bits(entry.bitmap, i, i), bits(entry.bitmap, 32 + i, 32 + i));
        if is_allocated && alloc + zero == 2 || !is_allocated && alloc == 1 {
            return None;
        }
    }
    let (alloc, zero) =
        (bits(entry.bitmap, index, index), bits(entry.bitmap, 32 + index, 32 + index));
    Some(match (is_allocated, zero, alloc) {
        (true, 1, _) => Kind::ZeroAlloc,
        (true, _, 1) => Kind::Normal,
        (true, ..) => Kind::UnallocatedAlloc,
        (false, 1, _) => Kind::ZeroPlain,
        (false, ..) => Kind::Unallocated,
    })
}

/// Panics if the decoder and the specification disagree about any subcluster of `entry`.
pub(super) fn compare(entry: L2Entry, rules: &EntryRules) {
    let count = rules.geometry.subclusters();
    let mut index = 0;
    while index < count {
        let Ok((kind, run)) = entry.kind(index, rules) else {
            assert_eq!(meaning(entry, index, rules), None, "{entry:x?} {index} {rules:?}");
            index += 1;
            continue;
        };
        assert!(run >= 1 && index + run <= count, "{entry:x?} {index}: run of {run}");
        for i in index..index + run {
            assert_eq!(meaning(entry, i, rules), Some(kind), "{entry:x?} {i} {rules:?}");
        }
        index += run;
    }
    if entry.is_compressed() {
        let range = entry.compressed_range(&rules.geometry);
        assert!(range.len >= 1 && range.len <= 2 << rules.geometry.cluster_bits().max(10));
    }
}
