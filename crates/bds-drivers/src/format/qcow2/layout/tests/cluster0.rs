//! Header fields at and over every limit, and round trips of cluster 0.

use super::super::header::{Compatible, MAX_DISK_SIZE};
use super::super::units::Geometry;
use super::*;

const FILE_LEN: u64 = 1 << 30;

fn sample(version: u32) -> Cluster0 {
    let mut header = Header::new(version, Geometry::new(16, false, 4).unwrap());
    header.size = 1 << 20;
    header.l1_size = 1;
    header.l1_offset = 0x30000;
    header.reftable_offset = 0x10000;
    header.reftable_clusters = 1;
    let feature_names = (version == 3).then(Extensions::known_feature_names);
    let extensions = Extensions { feature_names, ..Default::default() };
    Cluster0 { header, extensions, backing_name: None }
}

fn parse(bytes: &[u8], mode: Strictness) -> Result<Cluster0> {
    parse_in(bytes, FILE_LEN, mode)
}

/// Reads a piece at a time, as the driver does.
fn parse_in(bytes: &[u8], file_len: u64, mode: Strictness) -> Result<Cluster0> {
    let file = usize::try_from(file_len).unwrap();
    let mut have = Cluster0::FIRST_READ_LEN.min(file);
    loop {
        let mut head = bytes[..have.min(bytes.len())].to_vec();
        head.resize(have, 0);
        match Cluster0::parse(&head, file_len, mode)? {
            Parsed::Complete(c) => return Ok(*c),
            Parsed::NeedMore(n) => {
                assert!(n > have, "no progress: {n} of {have}");
                have = n.min(file);
            }
        }
    }
}

#[test]
fn a_fresh_header_has_qemus_bytes() {
    let bytes = sample(3).encode().unwrap();
    assert_eq!(bytes.len(), 65536);
    assert_eq!(bytes[..8], [0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3]);
    assert_eq!(
        bytes[96..116],
        [0, 0, 0, 4, 0, 0, 0, 112, 0, 0, 0, 0, 0, 0, 0, 0, 0x68, 3, 0xf8, 0x57]
    );
    assert_eq!(bytes[116..120], 384u32.to_be_bytes());
    assert!(bytes[120 + 384..].iter().all(|b| *b == 0));
    let bytes = sample(2).encode().unwrap();
    assert!(bytes[72..].iter().all(|b| *b == 0));
}

#[test]
fn cluster_0_round_trips() {
    for version in [2, 3] {
        let mut image = sample(version);
        image.backing_name = Some(b"base \xff.img".to_vec());
        image.extensions.backing_format = Some(b"raw".to_vec());
        image.extensions.unknown.push(crate::format::qcow2::layout::extension::UnknownExtension {
            kind: 0x1234,
            data: vec![3; 9000],
        });
        if version == 3 {
            image.header.header_len = 120;
            image.header.tail = (1..=15).collect();
            image.header.compatible = Compatible::from_bits_retain(1 << 40 | 1);
            image.header.autoclear = Autoclear::from_bits_retain(1 << 50);
        }
        let bytes = image.encode().unwrap();
        assert_eq!(parse(&bytes, Strictness::Use).unwrap(), image);
    }
    let mut short = sample(3);
    short.header.header_len = 104;
    short.header.tail.clear();
    let bytes = short.encode().unwrap();
    assert_eq!(parse(&bytes, Strictness::Use).unwrap(), short);
}

#[test]
fn cluster_0_overflow_is_no_space() {
    let mut image = sample(3);
    image.header.geometry = Geometry::new(9, false, 4).unwrap();
    image.extensions.feature_names = None;
    image.backing_name = Some(vec![b'x'; 512 - 112 - 8]);
    assert!(image.encode().is_ok());
    image.backing_name = Some(vec![b'x'; 512 - 112 - 8 + 1]);
    assert_eq!(image.encode().unwrap_err().kind(), ErrorKind::NoSpace);
    let mut image = sample(3);
    image.backing_name = Some(vec![b'x'; 1024]);
    assert_eq!(image.encode().unwrap_err().kind(), ErrorKind::InvalidInput);
}

/// One field set to a value: what a reader says.
fn with(version: u32, at: usize, value: &[u8], mode: Strictness) -> Result<Cluster0> {
    let mut bytes = sample(version).encode().unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
    parse(&bytes, mode)
}

#[test]
fn fields_at_and_over_their_limits() {
    use ErrorKind::{InvalidImage, LimitExceeded, NotSupported};
    let n = |v: u64| v.to_be_bytes().to_vec();
    let w = |v: u32| v.to_be_bytes().to_vec();
    let ok = None;
    for (name, at, value, want) in [
        ("magic", 0, w(0x5146_49fc), Some(InvalidImage)),
        ("version", 4, w(1), Some(NotSupported)),
        ("version", 4, w(4), Some(NotSupported)),
        ("backing_file_offset", 8, n(65536), ok),
        ("backing_file_offset", 8, n(65537), Some(InvalidImage)),
        ("backing_file_offset", 8, n(111), Some(InvalidImage)),
        ("backing_file_offset", 8, n(u64::MAX), Some(InvalidImage)),
        ("cluster_bits", 20, w(8), Some(InvalidImage)),
        ("cluster_bits", 20, w(22), Some(InvalidImage)),
        ("cluster_bits", 20, w(u32::MAX), Some(InvalidImage)),
        ("size", 24, n(512 << 20), ok),
        ("size", 24, n((512 << 20) + 1), Some(InvalidImage)), // one L1 entry is too few
        ("size", 24, n(MAX_DISK_SIZE + 512), Some(LimitExceeded)),
        ("size", 24, n(u64::MAX), Some(LimitExceeded)),
        ("crypt_method", 32, w(2), ok),
        ("crypt_method", 32, w(3), Some(InvalidImage)),
        ("l1_size", 36, w(4 << 20), ok),
        ("l1_size", 36, w((4 << 20) + 1), Some(LimitExceeded)),
        ("l1_size", 36, w(0), Some(InvalidImage)),
        ("l1_table_offset", 40, n(0x30200), Some(InvalidImage)),
        ("l1_table_offset", 40, n(0), Some(InvalidImage)),
        ("l1_table_offset", 40, n(0x10000), Some(InvalidImage)), // on the refcount table
        ("l1_table_offset", 40, n(FILE_LEN - 65536), ok),
        ("l1_table_offset", 40, n(FILE_LEN), Some(InvalidImage)),
        ("l1_table_offset", 40, n(!0xffff), Some(InvalidImage)),
        ("refcount_table_offset", 48, n(0x10200), Some(InvalidImage)),
        ("refcount_table_offset", 48, n(0), Some(InvalidImage)),
        ("refcount_table_offset", 48, n((1 << 63) - 65536), Some(InvalidImage)),
        ("refcount_table_clusters", 56, w(2), ok),
        ("refcount_table_clusters", 56, w(129), Some(LimitExceeded)),
        ("refcount_table_clusters", 56, w(0), Some(InvalidImage)),
        ("nb_snapshots", 60, [w(65536), n(0x40000)].concat(), ok),
        ("snapshots_offset", 60, w(1), Some(InvalidImage)), // on the header
        ("nb_snapshots", 60, w(65537), Some(LimitExceeded)),
        ("snapshots_offset", 64, n(0x40000), ok),
        ("snapshots_offset", 64, n(0x40001), Some(InvalidImage)),
        ("snapshots_offset", 64, n(1 << 56), Some(InvalidImage)), // though it is empty
        ("incompatible_features", 72, n(3), ok),
        ("incompatible_features", 72, n(8), Some(InvalidImage)), // deflate needs no bit
        ("incompatible_features", 72, n(32), Some(NotSupported)),
        ("compatible_features", 80, n(u64::MAX), ok),
        ("autoclear_features", 88, n(!3), ok),
        ("autoclear_features", 88, n(2), Some(InvalidImage)), // raw data file without one
        ("refcount_order", 96, w(6), ok),
        ("refcount_order", 96, w(7), Some(InvalidImage)),
        ("header_length", 100, w(103), Some(InvalidImage)),
        ("header_length", 100, w(108), Some(InvalidImage)), // no multiple of 8
        ("header_length", 100, w(65536), ok),
        ("header_length", 100, w(65544), Some(InvalidImage)),
        ("compression_type", 104, vec![1], Some(InvalidImage)), // the bit is missing
        ("compression_type", 104, vec![2], Some(NotSupported)),
    ] {
        let got = with(3, at, &value, Strictness::Use);
        let text = got.as_ref().err().map(ToString::to_string).unwrap_or_default();
        assert_eq!(got.err().map(|e| e.kind()), want, "{name} = {value:x?}: {text}");
        let is_named = !["incompatible_features", "autoclear_features", "magic"].contains(&name);
        if want.is_some() && is_named {
            let is_said = text.contains(name) || ["size", "l1_table_offset"].contains(&name);
            assert!(is_said && text.contains("at offset"), "{name} = {value:x?}: {text}");
        }
    }
}

#[test]
fn backing_names_at_and_over_their_length() {
    let place = 0x8000u64;
    for (len, ok) in [(0, true), (1023, true), (1024, false), (u32::MAX, false)] {
        let mut bytes = sample(2).encode().unwrap();
        bytes[8..16].copy_from_slice(&place.to_be_bytes());
        bytes[16..20].copy_from_slice(&len.to_be_bytes());
        bytes[0x8000..0x8000 + 2000].fill(b'n');
        assert_eq!(parse(&bytes, Strictness::Use).is_ok(), ok, "{len}");
    }
    let mut image = sample(3);
    image.backing_name = Some(b"a\0b".to_vec());
    let error = parse(&image.encode().unwrap(), Strictness::Use).unwrap_err().to_string();
    assert!(error.contains("NUL"), "{error}");
}

#[test]
fn version_2_has_no_features() {
    // The bytes of version 3's fields are extensions here; a zero type ends them.
    let image = parse(&sample(2).encode().unwrap(), Strictness::Use).unwrap();
    assert_eq!(image.header.incompatible, Incompatible::empty());
    assert_eq!((image.header.header_len, image.header.geometry.refcount_bits()), (72, 16));
}

#[test]
fn extended_l2_needs_16_kib_clusters() {
    for (bits, ok) in [(13, false), (14, true)] {
        let mut bytes = sample(3).encode().unwrap();
        bytes[79] = 16;
        bytes[23] = bits;
        assert_eq!(parse(&bytes, Strictness::Use).is_ok(), ok, "{bits}");
    }
}

#[test]
fn unknown_features_are_refused_by_the_images_own_name() {
    let mut image = sample(3);
    let mut table = Extensions::known_feature_names();
    table[1] = 40; // what was the dirty bit's name is now that of bit 40
    image.extensions.feature_names = Some(table);
    image.header.incompatible = Incompatible::from_bits_retain(1 << 40 | 1 << 41);
    // a feature may change what this means: it must not be looked at first
    image.header.l1_size = 0;
    let error = parse(&image.encode().unwrap(), Strictness::Use).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotSupported);
    let text = error.to_string();
    assert!(text.contains("dirty bit, unknown incompatible feature bit 41"), "{text}");
}

#[test]
fn inspection_tolerates_what_a_check_repairs() {
    let n = |v: u64| v.to_be_bytes().to_vec();
    for (at, value) in [(48, n(0)), (56, vec![0; 4]), (60, vec![0xff; 4]), (64, n(7)), (40, n(0))] {
        assert!(with(3, at, &value, Strictness::Use).is_err(), "{at}");
        assert!(with(3, at, &value, Strictness::Inspect).is_ok(), "{at}");
    }
}

#[test]
fn file_ending_inside_cluster_0() {
    let mut image = sample(3);
    image.backing_name = Some(b"base.img".to_vec());
    let bytes = image.encode().unwrap();
    let end = 120 + 384 + 8 + 8;
    for len in 0..end + 10u64 {
        let got = parse_in(&bytes, len, Strictness::Inspect);
        assert_eq!(got.is_ok(), len >= end, "{len}: {got:?}");
    }
}

/// Read-only shows all bytes, writing is refused.
#[test]
fn f10_odd_disk_length_is_shown_exactly_and_never_written() {
    let image = with(3, 24, &1000u64.to_be_bytes(), Strictness::Use).unwrap();
    assert_eq!(image.header.size, 1000);
    let error = image.check_writable(FILE_LEN).unwrap_err().to_string();
    assert!(error.contains("size = 1000"), "{error}");
    assert!(sample(3).check_writable(FILE_LEN).is_ok());
    assert!(sample(3).check_writable(0x1ffff).is_err());
}
