//! Measures the memory that hostile images make a process use; a test program of its own, because
//! it measures the whole process.

#![cfg(feature = "qcow2")]

use bds_core::options::Options;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};

/// Peak memory of this process, in KiB (Linux).
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Small files that claim tables, snapshots, bitmaps and windows at the limits.
#[test]
fn small_files_never_take_much_memory() {
    let file = MemPort::default();
    let options = Options::new().with("size", "64M").with("cluster_size", "64k");
    fuzzing::create(options, &file, None).unwrap();
    let good = file.bytes();
    let Some(before) = peak_kib() else {
        bds_testkit::skip("no /proc/self/status");
        return;
    };
    for (at, value) in [
        (36, &(4u32 << 20).to_be_bytes()[..]),
        (56, &128u32.to_be_bytes()),
        (60, &65_536u32.to_be_bytes()),
        (24, &(1u64 << 62).to_be_bytes()),
        (40, &0x1000_0000u64.to_be_bytes()),
        (100, &65_536u32.to_be_bytes()),
        (0x10000, &(1u64 << 50).to_be_bytes()),
        (0x30000, &(1u64 << 50).to_be_bytes()),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        fuzzing::open(&bytes);
        fuzzing::check(&bytes);
    }
    // A bitmap directory of 64 MiB, and a zstd frame with a window of 2^30.
    let mut bitmaps = [0x2385_2875u32.to_be_bytes(), 24u32.to_be_bytes()].concat();
    bitmaps.extend([0, 0, 0xff, 0xff, 0, 0, 0, 0]);
    bitmaps.extend((65_535u64 * 1024).to_be_bytes());
    bitmaps.extend(0x10000u64.to_be_bytes());
    let mut bytes = good.clone();
    bytes[95] = 1;
    bytes[112..112 + bitmaps.len()].copy_from_slice(&bitmaps);
    fuzzing::check(&bytes);
    fuzzing::decompress(&[1, 0x28, 0xb5, 0x2f, 0xfd, 0x00, 20 << 3, 9, 0, 0, 0x41]);
    let grown = peak_kib().unwrap() - before;
    assert!(grown < 96 << 10, "{grown} KiB");
}
