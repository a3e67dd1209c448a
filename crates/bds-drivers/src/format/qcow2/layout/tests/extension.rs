//! Extensions to bytes and back, and what is refused.

use super::*;

fn geometry() -> Geometry {
    Geometry::new(16, false, 4).unwrap()
}

fn raw(list: &[(u32, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, data) in list {
        put(&mut out, *kind, data);
    }
    out
}

fn parse(bytes: &[u8]) -> Result<Extensions> {
    match Extensions::parse(bytes, 0, bytes.len())? {
        Scan::Complete(e) => Ok(e),
        Scan::NeedMore(n) => panic!("wants {n} of {} bytes", bytes.len()),
    }
}

#[test]
fn extensions_round_trip() {
    let all = Extensions {
        backing_format: Some(b"qcow2".to_vec()),
        data_file: Some(b"data.raw".to_vec()),
        crypto: Some(CryptoPointer { offset: 0x40000, len: 4096 }),
        feature_names: Some(Extensions::known_feature_names()),
        bitmaps: Some(BitmapsPointer {
            count: 2,
            reserved: 0,
            directory_len: 64,
            directory_offset: 0x50000,
        }),
        bitmap_log: Some(BitmapLogId(*b"0123456789abcdef")),
        unknown: vec![
            UnknownExtension { kind: 7, data: vec![1, 2, 3] },
            UnknownExtension { kind: 5, data: vec![] },
            UnknownExtension { kind: 7, data: vec![9; 16] },
        ],
    };
    let mut bytes = Vec::new();
    all.encode(&mut bytes);
    assert_eq!(bytes.len() % 8, 0);
    assert_eq!(parse(&bytes).unwrap(), all);
    // Parsed piece by piece, it requests more until it has all.
    let mut have = 0;
    loop {
        match Extensions::parse(&bytes[..have], 0, bytes.len()).unwrap() {
            Scan::Complete(e) => break assert_eq!(e, all),
            Scan::NeedMore(n) => {
                assert!(n > have && n <= bytes.len());
                have = n;
            }
        }
    }
}

#[test]
fn ambiguous_extensions_are_refused() {
    for (list, word) in [
        (&[(BACKING_FORMAT, &b"raw"[..]), (BACKING_FORMAT, b"qcow2")][..], "twice"),
        (&[(DATA_FILE, b"a"), (DATA_FILE, b"a")], "twice"),
        (&[(FEATURE_NAMES, b""), (FEATURE_NAMES, b"")], "twice"),
        (&[(CRYPTO, &[0; 16]), (CRYPTO, &[0; 16])], "twice"),
        (&[(BITMAPS, &[0; 24]), (BITMAPS, &[0; 24])], "twice"),
        (&[(BITMAP_LOG, &[1; 16]), (BITMAP_LOG, &[1; 16])], "twice"),
        (&[(BACKING_FORMAT, b"raw\0x")], "NUL"),
        (&[(DATA_FILE, b"a\0b")], "NUL"),
        (&[(BACKING_FORMAT, &[b'x'; 16])], "longer than 15"),
        (&[(DATA_FILE, &[b'x'; 4096])], "longer than 4095"),
        (&[(CRYPTO, &[0; 15])], "16 bytes"),
        (&[(BITMAPS, &[0; 25])], "24 bytes"),
    ] {
        let error = parse(&raw(list)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(error.to_string().contains(word), "{error}");
    }
    assert!(parse(&raw(&[(BACKING_FORMAT, &[b'x'; 15])])).is_ok());
    assert!(parse(&raw(&[(DATA_FILE, &[b'x'; 4095])])).is_ok());
}

#[test]
fn extension_list_ends_with_its_area() {
    let mut bytes = raw(&[(7, b"12345678"), (END, b""), (BACKING_FORMAT, b"after the end mark")]);
    let found = parse(&bytes).unwrap();
    assert_eq!((found.unknown.len(), &found.backing_format), (1, &None));
    bytes[7] = 200;
    let error = parse(&bytes[..16]).unwrap_err().to_string();
    assert!(error.contains("longer than the area"), "{error}");
    // No end mark, and no space for one.
    assert_eq!(parse(&raw(&[(7, b"12345678")])).unwrap().unknown.len(), 1);
    assert_eq!(parse(&raw(&[(7, b"12345678")])[..16]).unwrap().unknown.len(), 1);
    assert_eq!(parse(&[0, 0, 0, 7]).unwrap(), Extensions::default());
}

#[test]
fn bitmap_directories_at_and_over_the_limits() {
    let good = BitmapsPointer {
        count: MAX_BITMAPS,
        reserved: 0,
        directory_len: MAX_BITMAP_DIRECTORY_LEN,
        directory_offset: 0x10000,
    };
    assert!(good.validate(&geometry()).is_ok());
    for bad in [
        BitmapsPointer { count: 0, ..good },
        BitmapsPointer { count: MAX_BITMAPS + 1, ..good },
        BitmapsPointer { reserved: 1, ..good },
        BitmapsPointer { directory_len: 0, ..good },
        BitmapsPointer { directory_len: MAX_BITMAP_DIRECTORY_LEN + 1, ..good },
        BitmapsPointer { directory_offset: 0, ..good },
        BitmapsPointer { directory_offset: 0x10200, ..good },
        BitmapsPointer { directory_offset: !0xffff, ..good },
    ] {
        assert!(bad.validate(&geometry()).is_err(), "{bad:?}");
    }
}

#[test]
fn names_of_unknown_features_come_from_the_image() {
    let mut table = Extensions::known_feature_names();
    table.extend([0, 9]);
    table.extend(b"warp drive");
    table.resize(table.len().next_multiple_of(48), 0);
    let e = Extensions { feature_names: Some(table), ..Default::default() };
    assert_eq!(e.incompatible_name(0).as_deref(), Some("dirty bit"));
    assert_eq!(e.incompatible_name(9).as_deref(), Some("warp drive"));
    assert_eq!(e.incompatible_name(10), None);
}
