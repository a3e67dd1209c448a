//! Entries against the tables of the specification.

use super::*;

const PLACE: u64 = 0x50000;

fn rules(extended: bool, v3: bool, data_file: bool) -> EntryRules {
    EntryRules {
        geometry: Geometry::new(16, extended, 4).unwrap(),
        has_zero_flag: v3,
        has_data_file: data_file,
    }
}

#[test]
fn standard_entries_by_the_table() {
    let v3 = rules(false, true, false);
    let v2 = rules(false, false, false);
    let external = rules(false, true, true);
    for (word, rules, kind) in [
        (0, v3, Ok(Kind::Unallocated)),
        (COPIED, v3, Ok(Kind::Unallocated)),
        (PLACE, v3, Ok(Kind::Normal)),
        (PLACE | COPIED, v3, Ok(Kind::Normal)),
        (ZERO, v3, Ok(Kind::ZeroPlain)),
        (PLACE | ZERO | COPIED, v3, Ok(Kind::ZeroAlloc)),
        (COMPRESSED | PLACE, v3, Ok(Kind::Compressed)),
        (PLACE | 0x200, v3, Err(BadEntry::UnalignedData(PLACE | 0x200))),
        (ZERO, v2, Err(BadEntry::ZeroFlagInV2)),
        (PLACE | ZERO, v2, Err(BadEntry::ZeroFlagInV2)),
        (COMPRESSED | ZERO, v2, Ok(Kind::Compressed)),
        (COPIED, external, Ok(Kind::Normal)),
        (0, external, Ok(Kind::Unallocated)),
        (COPIED | ZERO, external, Ok(Kind::ZeroPlain)),
        (PLACE | COPIED | ZERO, external, Ok(Kind::ZeroAlloc)),
        (COMPRESSED | PLACE, external, Err(BadEntry::CompressedWithDataFile)),
    ] {
        let got = L2Entry::standard(word).kind(0, &rules);
        assert_eq!(got, kind.map(|k| (k, 1)), "{word:#x} {rules:?}");
    }
}

#[test]
fn extended_entries_by_the_table() {
    let ext = rules(true, true, false);
    let external = rules(true, true, true);
    let bits = |zero: u32, alloc: u32| u64::from(zero) << 32 | u64::from(alloc);
    let compressed = COMPRESSED | PLACE;
    for (word, bitmap, index, rules, kind) in [
        (PLACE, bits(0, 0b0111), 0, ext, Ok((Kind::Normal, 3))),
        (PLACE, bits(0, 0b0111), 2, ext, Ok((Kind::Normal, 1))),
        (PLACE, bits(0, 0b0111), 3, ext, Ok((Kind::UnallocatedAlloc, 29))),
        (PLACE, bits(0b1000, 0b0111), 3, ext, Ok((Kind::ZeroAlloc, 1))),
        (PLACE, bits(0b1000, 0b0111), 4, ext, Ok((Kind::UnallocatedAlloc, 28))),
        (PLACE, bits(0, u32::MAX), 31, ext, Ok((Kind::Normal, 1))),
        (PLACE, bits(1, 1), 5, ext, Err(BadEntry::SubclusterBoth(bits(1, 1)))),
        (0, 0, 0, ext, Ok((Kind::Unallocated, 32))),
        (0, bits(u32::MAX, 0), 0, ext, Ok((Kind::ZeroPlain, 32))),
        (0, bits(0b10, 0), 0, ext, Ok((Kind::Unallocated, 1))),
        (0, bits(0, 1), 9, ext, Err(BadEntry::SubclusterWithoutCluster(1))),
        (compressed, 0, 7, ext, Ok((Kind::Compressed, 25))),
        (compressed, 5, 7, ext, Err(BadEntry::CompressedBitmap(5))),
        (COPIED, bits(0, 1), 0, external, Ok((Kind::Normal, 1))),
        (ZERO, 0, 0, ext, Ok((Kind::Unallocated, 32))),
    ] {
        let got = L2Entry { word, bitmap }.kind(index, &rules);
        assert_eq!(got, kind, "{word:#x} {bitmap:#x} {index}");
    }
    assert_eq!(L2Entry::standard(ZERO).reserved(&ext), ZERO);
    assert_eq!(L2Entry::standard(ZERO).reserved(&rules(false, true, false)), 0);
    assert_eq!(L2Entry::standard(1 << 56 | 2).reserved(&ext), 1 << 56 | 2);
}

#[test]
fn runs_agree_with_looking_at_every_subcluster() {
    let ext = rules(true, true, false);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..2000 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let (zero, alloc) = (seed >> 32, seed & 0xffff_ffff);
        let entry = L2Entry { word: PLACE, bitmap: (zero & !alloc) << 32 | alloc };
        for index in 0..32 {
            let (kind, run) = entry.kind(index, &ext).unwrap();
            assert!(run >= 1 && index + run <= 32);
            for i in index..index + run {
                assert_eq!(entry.kind(i, &ext).unwrap().0, kind);
            }
            if index + run < 32 {
                assert_ne!(entry.kind(index + run, &ext).unwrap().0, kind);
            }
        }
    }
}

#[test]
fn compressed_descriptors_round_trip() {
    for bits in 9..=21 {
        let g = Geometry::new(bits, false, 4).unwrap();
        let size = g.cluster_size();
        for offset in [0, 1, 511, 512, 0x12345, g.max_compressed_offset() - 4 * size] {
            for len in [1, 2, 511, 512, 513, size - 1] {
                if offset > g.max_compressed_offset() {
                    continue;
                }
                let entry = L2Entry::compressed(&g, MetaOffset(offset), len).unwrap();
                let range = entry.compressed_range(&g);
                assert_eq!(range.offset.0, offset);
                assert!(range.len >= len && range.len < len + 512, "{bits} {offset} {len}");
                assert_eq!((range.offset.0 + range.len) % 512, 0);
            }
        }
        assert!(L2Entry::compressed(&g, MetaOffset(0), 0).is_none());
        assert!(L2Entry::compressed(&g, MetaOffset(0), 3 * size).is_none());
        let beyond = MetaOffset(g.max_compressed_offset() + 1);
        assert!(L2Entry::compressed(&g, beyond, 1).is_none());
    }
    let small =
        EntryRules { geometry: Geometry::new(9, false, 4).unwrap(), ..rules(false, true, false) };
    let high = L2Entry::standard(COMPRESSED | 1 << 56);
    assert_eq!(high.place(&small), Err(BadEntry::CompressedOffset(1 << 56)));
}

#[test]
fn l1_and_reftable_entries() {
    let g = Geometry::new(16, false, 4).unwrap();
    assert_eq!(L1Entry(0).table(&g), Ok(None));
    assert_eq!(L1Entry(COPIED).table(&g), Ok(None));
    let entry = L1Entry::new(MetaOffset(PLACE), true);
    assert!(entry.is_copied());
    assert_eq!(entry.table(&g), Ok(Some(MetaOffset(PLACE))));
    assert_eq!(L1Entry(PLACE | 0x200).table(&g), Err(BadEntry::UnalignedTable(PLACE | 0x200)));
    assert_eq!(L1Entry(PLACE | 1 << 56 | 1).reserved(), 1 << 56 | 1);
    assert_eq!(refblock_place(0x1ff, &g), Ok(None));
    assert_eq!(refblock_place(PLACE | 1, &g), Ok(Some(MetaOffset(PLACE))));
    let bad = Err(BadEntry::UnalignedRefblock(PLACE | 0x200));
    assert_eq!(refblock_place(PLACE | 0x200, &g), bad);
}

#[test]
fn refcounts_of_every_width_keep_their_neighbours() {
    for order in 0..=6 {
        let max = u64::MAX >> (64 - (1u32 << order));
        let mut block = [0u8; 64];
        let entries = 512usize >> order;
        let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & max;
        for i in 0..entries {
            assert!(write_refcount(&mut block, order, i, value(i)));
        }
        for i in (0..entries).rev() {
            assert_eq!(read_refcount(&block, order, i), Some(value(i)), "order {order} index {i}");
        }
        let before = block;
        assert!(!write_refcount(&mut block, order, entries, 0));
        if max < u64::MAX {
            assert!(!write_refcount(&mut block, order, 0, max + 1));
        }
        assert_eq!((before, read_refcount(&block, order, entries)), (block, None));
    }
    // Spec: narrow counts begin at the least significant bit, wide ones are big-endian.
    assert_eq!(read_refcount(&[0b0000_0010], 0, 1), Some(1));
    assert_eq!(read_refcount(&[0b0100_0000], 1, 3), Some(1));
    assert_eq!(read_refcount(&[1, 2], 4, 0), Some(0x102));
    assert_eq!(read_refcount(&[0; 8], 7, 0), None);
}
