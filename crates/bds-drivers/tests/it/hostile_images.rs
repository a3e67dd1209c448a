//! Opens and checks hostile images: every error names file, field and value; nothing panics or
//! hangs, and a refused open leaves the file unchanged. (Limits of single header fields are tables
//! in the units; memory has a test of its own.)

use bds_core::driver::{CheckReport, Driver, OpenFlags, ReadFlags, WriteFlags};
use bds_core::options::Options;
use bds_core::{ErrorKind, Result};
use bds_drivers::format::qcow2::check_image;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort, open_image};
use bds_io::Buf;
use serde_json::json;

use crate::kit::{Fixture, block_on_sim};

const COPIED: u64 = 1 << 63;

/// The bytes of an image made with these options.
pub(crate) fn image(options: &[(&str, &str)]) -> Vec<u8> {
    let mut tree = Options::new();
    for (key, value) in options {
        tree.set(key, *value);
    }
    let (file, data) = (MemPort::default(), MemPort::default());
    let has_data_file = tree.contains("data_file");
    fuzzing::create(tree, &file, has_data_file.then_some(&data)).unwrap();
    file.bytes()
}

/// A disk of 256 KiB with every cluster mapped; clusters of 4 KiB: header, reftable, refblock, L1,
/// L2, data.
fn mapped() -> Vec<u8> {
    image(&[("size", "256k"), ("cluster_size", "4k"), ("preallocation", "metadata")])
}

const L1: usize = 0x3000;
const L2: usize = 0x4000;
const DATA: u64 = 0x5000;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn try_open(bytes: &[u8], read_only: bool) -> (MemPort, Result<Box<dyn Driver>>) {
    let file = MemPort::new(bytes.to_vec());
    let flags = OpenFlags { read_only, ..OpenFlags::default() };
    let opened = block_on_sim(open_image(&file, None, None, flags));
    (file, opened)
}

fn check(bytes: &[u8]) -> CheckReport {
    let file = MemPort::new(bytes.to_vec());
    block_on_sim(check_image(&file, None, &|_, _| {})).unwrap()
}

async fn read(image: &dyn Driver, offset: u64, len: usize) -> Result<Vec<u8>> {
    let iov = Buf::zeroed(len, 4096).iov();
    image.read(offset, iov.clone(), ReadFlags::empty()).await?;
    let mut bytes = vec![0; len];
    iov.copy_to(0, &mut bytes);
    Ok(bytes)
}

fn extension(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = [kind.to_be_bytes(), u32::try_from(data.len()).unwrap().to_be_bytes()].concat();
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// Description, bytes, and what the error must contain.
fn refused() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = mapped();
    let with = |changes: &[(usize, Vec<u8>)]| {
        let mut bytes = good.clone();
        for (at, value) in changes {
            bytes[*at..*at + value.len()].copy_from_slice(value);
        }
        bytes
    };
    let n = |v: u64| v.to_be_bytes().to_vec();
    let w = |v: u32| v.to_be_bytes().to_vec();
    let twice = [extension(0xe279_2aca, b"raw"), extension(0xe279_2aca, b"qcow2")].concat();
    let nul = [extension(0xe279_2aca, b"ra\0"), extension(0, b"")].concat();
    let long_end = extension(0, &[1; 8]);
    vec![
        ("empty", Vec::new(), "header"),
        ("not qcow2", vec![0; 4096], "magic"),
        ("version", with(&[(4, w(9))]), "version = 9"),
        ("cluster size", with(&[(20, w(63))]), "cluster_bits = 63"),
        ("l1 outside the file", with(&[(40, n(1 << 40))]), "l1_table_offset = 1099511627776"),
        ("giant l1", with(&[(36, w(4 << 20))]), "l1 table"),
        ("giant l1, over the limit", with(&[(36, w(u32::MAX))]), "l1_size = 4294967295"),
        ("lying size", with(&[(24, n(1 << 40))]), "l1_size = 1"),
        ("giant size", with(&[(24, n(u64::MAX))]), "size = 18446744073709551615"),
        ("giant reftable", with(&[(56, w(1 << 20))]), "refcount_table_clusters = 1048576"),
        ("reftable outside the file", with(&[(48, n(1 << 40))]), "refcount_table_offset"),
        ("l1 on the header", with(&[(40, n(0))]), "l1_table_offset = 0"),
        ("l1 on the reftable", with(&[(40, n(0x1000))]), "overlaps"),
        ("too many snapshots", with(&[(60, w(65_537))]), "nb_snapshots = 65537"),
        ("unknown feature", with(&[(72, n(1 << 20))]), "feature bit 20"),
        ("corrupt bit", with(&[(72, n(2))]), "corrupt"),
        ("encrypted", with(&[(32, w(2))]), "encrypt"),
        ("extension twice", with(&[(112, twice)]), "twice"),
        ("NUL in a name", with(&[(112, nul)]), "NUL"),
        ("an end mark with a length", with(&[(112, long_end)]), "end mark"),
        ("no snapshots, off a cluster", with(&[(64, n(0x1001))]), "snapshots_offset = 4097"),
        ("no snapshots, beyond any file", with(&[(64, n(1 << 63))]), "snapshots_offset = 9223"),
        ("snapshots on the header", with(&[(60, w(1))]), "snapshots_offset = 0"),
        ("l2 behind the end", with(&[(L1, n(1 << 30 | COPIED))]), "an L2 table at host offset"),
        ("counts behind the end", with(&[(0x1000, n(1 << 30))]), "a refcount block at host offset"),
        ("odd length", with(&[(24, n(1000))]), "size = 1000"),
        ("backing name in the header", with(&[(8, n(16)), (16, w(8))]), "backing_file_offset = 16"),
    ]
}

#[test]
fn a_refused_open_says_why_and_leaves_the_file_as_it_was() {
    for (what, bytes, word) in refused() {
        let (file, opened) = try_open(&bytes, false);
        let Err(error) = opened else { panic!("{what} was opened") };
        let text = error.to_string();
        assert!(text.contains(word), "{what}: {text}");
        assert_eq!(file.writes(), 0, "{what}");
        assert!(file.bytes() == bytes, "{what}");
    }
}

#[test]
fn the_error_names_the_file() {
    for (what, bytes, word) in refused() {
        let fixture = Fixture::new(3);
        fixture.sim.put_file("/evil.qcow2", &bytes);
        let options =
            json!({"driver": "qcow2", "file": {"driver": "file", "filename": "/evil.qcow2"}});
        let text = fixture.node(options).unwrap_err().to_string();
        assert!(text.contains("/evil.qcow2") && text.contains(word), "{what}: {text}");
        assert!(fixture.sim.snapshot_file("/evil.qcow2") == bytes, "{what}");
    }
}

#[test]
fn images_cut_at_every_structure_fail_cleanly() {
    for options in [
        &[("size", "40k"), ("cluster_size", "512"), ("preallocation", "metadata")][..],
        &[
            ("size", "64k"),
            ("cluster_size", "16k"),
            ("extended_l2", "on"),
            ("preallocation", "metadata"),
        ],
        &[("size", "9k"), ("cluster_size", "512"), ("compat", "v2"), ("preallocation", "full")],
    ] {
        let whole = image(options);
        let step = (whole.len() / 60).next_multiple_of(512);
        for cut in (0..whole.len()).step_by(step) {
            for len in [cut.saturating_sub(1), cut, cut + 1] {
                fuzzing::open(&whole[..len]);
                fuzzing::check(&whole[..len]);
            }
        }
    }
}

/// Every byte of an odd length can be read.
#[test]
fn an_odd_length_is_readable_to_its_last_byte() {
    let mut bytes = mapped();
    put(&mut bytes, 24, 1000);
    bytes[DATA as usize + 999] = 7;
    let (_, opened) = try_open(&bytes, true);
    let image = opened.unwrap();
    assert_eq!(image.len(), 1000);
    let shown = block_on_sim(read(&*image, 990, 10)).unwrap();
    assert_eq!(shown, [0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
}

/// QEMU's check reports nothing, and its read fails.
#[test]
fn a_data_file_offset_that_differs_is_found_and_refused() {
    let mut bytes = image(&[
        ("size", "64k"),
        ("cluster_size", "4k"),
        ("data_file", "d"),
        ("preallocation", "metadata"),
    ]);
    let l2 = L2 + 8 * 3;
    assert_eq!(bytes[l2..l2 + 8], (0x3000 | COPIED).to_be_bytes());
    put(&mut bytes, l2, 0x5000 | COPIED);
    let report = check(&bytes);
    assert_eq!(report.corruptions, 1, "{report:?}");
    assert!(report.messages[0].contains("data file offset 0x5000"), "{report:?}");
    let (file, data) = (MemPort::new(bytes), MemPort::new(vec![1; 65536]));
    let flags = OpenFlags { read_only: true, ..OpenFlags::default() };
    block_on_sim(async {
        let image = open_image(&file, Some(&data), None, flags).await.unwrap();
        assert!(read(&*image, 0x2000, 512).await.is_ok());
        let error = read(&*image, 0x3000, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    });
}

#[test]
fn check_reports_errors_that_qemu_does_not() {
    // Two ranges of the disk map to one cluster, and its refcount allows it.
    let mut shared = mapped();
    put(&mut shared, L2, DATA);
    put(&mut shared, L2 + 8, DATA);
    shared[0x2000 + 2 * 5..][..4].copy_from_slice(&[0, 2, 0, 0]);
    let report = check(&shared);
    assert_eq!((report.corruptions, report.leaks), (1, 0), "{report:?}");
    assert!(report.messages[0].contains("guest offset 0x1000"), "{report:?}");

    // Data in the L1 table's cluster, and its refcount allows it.
    let mut mixed = mapped();
    put(&mut mixed, L2, L1 as u64);
    mixed[0x2000 + 2 * 3..][..2].copy_from_slice(&[0, 2]);
    mixed[0x2000 + 2 * 5..][..2].copy_from_slice(&[0, 0]);
    let report = check(&mixed);
    assert_eq!(report.corruptions, 1, "{report:?}");
    assert!(report.messages[0].contains("different kinds"), "{report:?}");

    // The zero flag in version 2.
    let mut zero = image(&[
        ("size", "256k"),
        ("cluster_size", "4k"),
        ("compat", "v2"),
        ("preallocation", "metadata"),
    ]);
    put(&mut zero, L2, DATA | COPIED | 1);
    assert_eq!(check(&zero).corruptions, 1);
    assert!(check(&mapped()).is_clean());
}

/// Entries that point at metadata: a write through them must not reach it.
#[test]
fn a_write_through_a_hostile_entry_never_reaches_metadata() {
    for (what, target) in [
        ("header", 0u64),
        ("reftable", 0x1000),
        ("refblock", 0x2000),
        ("l1", 0x3000),
        ("l2", 0x4000),
    ] {
        for guest_slot in [0usize, 5] {
            let mut bytes = mapped();
            put(&mut bytes, L2 + 8 * guest_slot, target | COPIED);
            let (file, opened) = try_open(&bytes, false);
            let image = opened.unwrap_or_else(|e| panic!("{what}: an open reads no L2 table: {e}"));
            let at = guest_slot as u64 * 4096;
            let evil = vec![0xff; 4096];
            let write = block_on_sim(async {
                let write =
                    image.write(at, Buf::from_slice(&evil).iov(), WriteFlags::empty()).await;
                let _ = image.flush_to_os().await;
                let _ = image.close().await;
                write
            });
            let after = file.bytes();
            let start = usize::try_from(target).unwrap();
            assert!(after[start..start + 4096] != evil[..], "{what} was overwritten");
            if target != 0 {
                let error = write.expect_err("an entry that points at metadata");
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
            }
        }
    }
}

/// An L1 entry, an L2 entry and a refcount block that point outside of the file.
#[test]
fn entries_outside_the_file_are_errors_when_used() {
    for (at, value) in [
        (L1, 0x0080_0000_0000_0000 | COPIED),
        (L1, 0x3200 | COPIED),
        (L2, 0x5200 | COPIED),
        (L2, u64::MAX),
        (L2, 1 << 62 | u64::MAX >> 10),
        (0x1000, u64::MAX),
        (0x1000, 0x2200),
        (0x1000, 1 << 54),
    ] {
        let mut bytes = mapped();
        put(&mut bytes, at, value);
        assert!(!check(&bytes).is_clean(), "{at:#x} {value:#x}");
        fuzzing::open(&bytes);
        if at == L2 || at == L1 && value == (0x3200 | COPIED) {
            let (_, opened) = try_open(&bytes, true);
            let outcome = opened.and_then(|image| block_on_sim(read(&*image, 0, 512)));
            let error = outcome.expect_err("an entry outside of the file");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{at:#x} {value:#x}: {error}");
        }
    }
}

/// Snapshot tables with a wrong size.
#[test]
fn snapshot_tables_of_a_wrong_size_are_refused() {
    let mut bytes = mapped();
    bytes[60..64].copy_from_slice(&65_536u32.to_be_bytes());
    put(&mut bytes, 64, 0x5000);
    // Entries of zeros: 40 bytes each, 65,536 of them, in a file of 69 clusters.
    let report = check(&bytes);
    assert!(report.check_errors + report.corruptions > 0, "{report:?}");
    // Extra data of 4 GiB.
    bytes[0x5000 + 36..0x5000 + 40].copy_from_slice(&u32::MAX.to_be_bytes());
    let report = check(&bytes);
    assert!(report.check_errors > 0, "{report:?}");
    let error = fuzzing::info(&MemPort::new(bytes)).unwrap_err().to_string();
    assert!(error.contains("snapshot table is larger than 64 MiB"), "{error}");
}
