//! Directories and tables of bitmaps: layout, limits, damage.

use super::*;

fn geometry() -> Geometry {
    Geometry::new(16, false, 4).unwrap()
}

fn entry(name: &[u8]) -> BitmapEntry {
    BitmapEntry {
        table_offset: 0x5_0000,
        table_size: 2,
        flags: AUTO,
        granularity_bits: 16,
        extra: Vec::new(),
        name: name.to_vec(),
    }
}

fn parse(bytes: &[u8], count: u32) -> Result<Vec<BitmapEntry>> {
    parse_directory(bytes, count, &geometry(), 1 << 30)
}

#[test]
fn one_entry_is_laid_out_as_the_specification_says() {
    let bytes = encode_directory(&[entry(b"daily")]).unwrap();
    let mut expected = 0x5_0000_u64.to_be_bytes().to_vec();
    expected.extend([0, 0, 0, 2]);
    expected.extend([0, 0, 0, 2]);
    expected.extend([1, 16, 0, 5, 0, 0, 0, 0]);
    expected.extend(b"daily\0\0\0");
    assert_eq!(bytes, expected);
    assert_eq!(entry_len(5), 32);
}

#[test]
fn directories_round_trip() {
    let longest = [b'x'; MAX_NAME_LEN];
    let mut entries: Vec<BitmapEntry> =
        [&b"a"[..], b"12345678", b"123456789", &longest].into_iter().map(entry).collect();
    entries[1].flags = IN_USE;
    entries[2].extra = vec![7; 13];
    entries[2].flags = EXTRA_COMPATIBLE | AUTO;
    let bytes = encode_directory(&entries).unwrap();
    assert_eq!(bytes.len() as u64, entries.iter().map(BitmapEntry::encoded_len).sum::<u64>());
    assert_eq!(parse(&bytes, 4).unwrap(), entries);
    for (at, entry) in flags_at(&entries).zip(&entries) {
        assert_eq!(be32(&bytes, usize::try_from(at).unwrap()), entry.flags);
        assert_eq!(at % 8, 4, "flags may not straddle two sectors");
    }
    // Bytes that pad an entry may be anything.
    let mut padded = encode_directory(&[entry(b"a")]).unwrap();
    padded[31] = 9;
    assert_eq!(parse(&padded, 1).unwrap(), [entry(b"a")]);
}

#[test]
fn extra_data_of_unknown_meaning_makes_a_bitmap_unusable_unless_it_says_otherwise() {
    let with = |flags, extra: &[u8]| BitmapEntry { flags, extra: extra.to_vec(), ..entry(b"b") };
    assert!(with(AUTO, b"").is_usable() && with(0, b"").is_usable());
    assert!(with(EXTRA_COMPATIBLE, b"1234").is_usable());
    assert!(!with(AUTO, b"1234").is_usable());
    assert!(!with(EXTRA_COMPATIBLE | IN_USE, b"").is_usable());
}

#[test]
fn damaged_entries_are_refused() {
    type Change = fn(&mut BitmapEntry);
    let cases: [(Change, &str); 15] = [
        (|e| e.table_offset = 0, "begin at a cluster"),
        (|e| e.table_offset = 0x5_0200, "begin at a cluster"),
        (|e| e.table_offset = !0xffff, "beyond any file"),
        (|e| e.table_size = 0, "empty or too large"),
        (|e| e.table_size = 0x800_0001, "empty or too large"),
        (|e| e.table_size = 8193, "larger than 512 MiB"),
        (|e| e.table_size = u32::MAX, "empty or too large"),
        (|e| e.flags = 8, "unknown flags"),
        (|e| e.flags = 1 << 31, "unknown flags"),
        (|e| e.granularity_bits = 8, "granularity"),
        (|e| e.granularity_bits = 32, "granularity"),
        (|e| e.granularity_bits = 255, "granularity"),
        (|e| e.name.clear(), "1 to 1023 bytes"),
        (|e| e.name = vec![b'n'; 1024], "1 to 1023 bytes"),
        (|e| (e.granularity_bits, e.table_size) = (9, 1), "shorter than the disk"),
    ];
    for (change, words) in cases {
        let mut bad = entry(b"good");
        change(&mut bad);
        let bytes = encode_directory(&[entry(b"first"), bad.clone()]).unwrap();
        let error = parse(&bytes, 2).unwrap_err();
        assert!(error.to_string().contains(words), "{bad:?}: {error}");
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
    }
    // One that is in use may be too short: the disk may have grown.
    let short = BitmapEntry { flags: IN_USE, granularity_bits: 9, table_size: 1, ..entry(b"s") };
    assert!(parse(&encode_directory(&[short]).unwrap(), 1).is_ok());
    let mut other_type = encode_directory(&[entry(b"t")]).unwrap();
    other_type[16] = 2;
    assert!(parse(&other_type, 1).unwrap_err().to_string().contains("type"));
}

#[test]
fn damaged_directories_are_refused() {
    let bytes = encode_directory(&[entry(b"a"), entry(b"b")]).unwrap();
    for len in 0..bytes.len() {
        assert!(parse(&bytes[..len], 2).unwrap_err().to_string().contains("cut off"), "{len}");
    }
    assert!(parse(&bytes, 1).unwrap_err().to_string().contains("longer than its entries"));
    assert!(parse(&bytes, u32::MAX).unwrap_err().to_string().contains("cut off"));
    let twice = encode_directory(&[entry(b"a"), entry(b"b"), entry(b"a")]).unwrap();
    assert!(parse(&twice, 3).unwrap_err().to_string().contains("one name"));
    // Lengths that lie.
    for (at, value) in [(18, &[0xff, 0xff][..]), (20, &[0xff; 4])] {
        let mut bytes = bytes.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        assert!(parse(&bytes, 2).is_err(), "{at}");
    }
}

#[test]
fn limits_are_those_of_the_format() {
    let g = geometry();
    let size = |disk, granularity| table_size(&g, disk, granularity);
    assert_eq!(size(0, 65536).unwrap(), 1, "a table is never empty");
    assert_eq!(size(1, 65536).unwrap(), 1);
    // 64 KiB of bits at 64 KiB each: 32 GiB a cluster.
    assert_eq!(size(32 << 30, 65536).unwrap(), 1);
    assert_eq!(size((32 << 30) + 1, 65536).unwrap(), 2);
    // 512 MiB of bits.
    assert_eq!(size(1 << 41, 512).unwrap(), 8192);
    for (disk, granularity, words) in [
        ((1 << 41) + 1, 512, "Use larger granularity"),
        (u64::MAX, 1 << 31, "Use larger granularity"),
        (1 << 30, 256, "512 to 2147483648"),
        (1 << 30, 0, "512 to 2147483648"),
        (1 << 30, 513, "512 to 2147483648"),
        (1 << 30, 3 << 20, "512 to 2147483648"),
    ] {
        let error = size(disk, granularity).unwrap_err().to_string();
        assert!(error.contains(words), "{disk} {granularity}: {error}");
    }
    assert!(size(1 << 62, 1 << 31).is_ok());
    assert!(check_count(65_535).is_ok() && check_count(65_536).is_err());
    assert!(check_directory_len(65_535 * 1024).is_ok());
    assert!(check_directory_len(65_535 * 1024 + 8).is_err());
    let names: Vec<BitmapEntry> =
        (0..64_100_u32).map(|n| entry(format!("{n:01023}").as_bytes())).collect();
    assert!(encode_directory(&names[..64_000]).is_ok());
    assert!(encode_directory(&names).is_err(), "longer than a directory may be");
}

#[test]
fn table_entries_round_trip_and_reserved_bits_are_refused() {
    let g = geometry();
    for (word, place) in [
        (0, BitsPlace::Zeros),
        (1, BitsPlace::Ones),
        (0x5_0000, BitsPlace::Cluster(MetaOffset(0x5_0000))),
        (0x00ff_ffff_ffff_0000, BitsPlace::Cluster(MetaOffset(0x00ff_ffff_ffff_0000))),
    ] {
        assert_eq!(BitsPlace::parse(word, &g).unwrap(), place);
        assert_eq!(place.encode(), word);
    }
    for bad in [2, 0x100, 0x5_0001, 0x5_0200, 1 << 56, 1 << 63, 0x5_0000 | 1 << 56] {
        assert!(BitsPlace::parse(bad, &g).is_err(), "{bad:#x}");
    }
}
