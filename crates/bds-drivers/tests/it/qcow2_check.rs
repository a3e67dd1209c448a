//! Compares `check` with `qemu-img check`: good images of every shape, then images with bytes
//! changed one place at a time.
//!
//! Known, wanted differences are the table in [`more_than_qemu`]; everything else must give QEMU's
//! counts.

use std::path::Path;

use bds_core::driver::CheckReport;
use bds_drivers::format::qcow2::check_image;
use bds_drivers::format::qcow2::fuzzing::MemPort;
use bds_testkit::{Scratch, Tool, qemu_img, qemu_io};
use futures_util::FutureExt;

use crate::sweep::is_full;

fn ours(bytes: &[u8]) -> Result<CheckReport, String> {
    let file = MemPort::new(bytes.to_vec());
    let report = check_image(&file, None, &|_, _| {})
        .now_or_never()
        .expect("memory never waits")
        .map_err(|e| e.to_string());
    assert_eq!(file.writes(), 0, "a check changes nothing");
    report
}

/// QEMU's counts: corruptions, leaks, check errors, allocated, fragmented, compressed, image end.
/// `None` if it refuses the image.
fn qemu(img: &Tool, path: &Path) -> Option<[u64; 7]> {
    let out = img.run([
        "check".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "--output=json".as_ref(),
        path.as_os_str(),
    ]);
    let json: serde_json::Value = serde_json::from_str(&out.stdout).ok()?;
    // Zeros are left out, except this one.
    assert!(json["check-errors"].is_u64(), "no report of a check: {out:?}");
    let n = |key: &str| match &json[key] {
        serde_json::Value::Null => 0,
        number => number.as_u64().unwrap_or_else(|| panic!("{key} is {number}")),
    };
    Some([
        n("corruptions"),
        n("leaks"),
        n("check-errors"),
        n("allocated-clusters"),
        n("fragmented-clusters"),
        n("compressed-clusters"),
        n("image-end-offset"),
    ])
}

fn counts(report: &CheckReport) -> [u64; 7] {
    [
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
        report.image_end_offset,
    ]
}

/// Images by `qemu-img` with data, holes, compressed clusters, snapshots and bitmaps.
fn images(img: &Tool, io: &Tool, scratch: &Scratch) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for (name, options, extra) in [
        ("v3", "compat=1.1", ""),
        ("v2", "compat=0.10", ""),
        ("small", "cluster_size=512", "sc"),
        ("bits1", "cluster_size=4k,refcount_bits=1", ""),
        ("bits64", "cluster_size=1k,refcount_bits=64", "s"),
        ("ext", "cluster_size=16k,extended_l2=on", "s"),
        ("zstd", "cluster_size=4k,compression_type=zstd", "c"),
        ("bitmaps", "cluster_size=4k", "b"),
        ("lazy", "lazy_refcounts=on,cluster_size=4k", ""),
        ("prealloc", "preallocation=metadata,cluster_size=4k", ""),
    ] {
        let path = scratch.path(name);
        let file = path.to_str().unwrap();
        img.must(["create", "-q", "-f", "qcow2", "-o", options, file, "3M"]);
        for write in
            ["write -P 1 0 100k", "write -P 2 1M 70k", "write -z 1200k 200k", "write -P 3 900k 4k"]
        {
            io.must(["-f", "qcow2", "-c", write, file]);
        }
        if extra.contains('c') {
            for at in ["2M", "2100k", "2200k"] {
                let write = format!("write -c -P 7 {at} 8k");
                io.must(["-f", "qcow2", "-c", &write, file]);
            }
        }
        if extra.contains('s') {
            img.must(["snapshot", "-c", "one", file]);
            io.must(["-f", "qcow2", "-c", "write -P 9 50k 30k", file]);
            img.must(["snapshot", "-c", "two", file]);
        }
        if extra.contains('b') {
            img.must(["bitmap", "--add", file, "b0"]);
            io.must(["-f", "qcow2", "-c", "write -P 9 50k 30k", file]);
        }
        all.push((name.to_owned(), std::fs::read(&path).unwrap()));
    }
    all
}

#[test]
fn good_images_have_qemus_counts() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let scratch = Scratch::new();
    for (name, bytes) in images(&img, &io, &scratch) {
        let report = ours(&bytes).unwrap();
        assert!(report.is_clean(), "{name}: {report:?}");
        assert_eq!(counts(&report), qemu(&img, &scratch.path(&name)).unwrap(), "{name}");
    }
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Positions whose change matters: entries of tables, by following them, and header fields for
/// tables.
fn places(bytes: &[u8]) -> Vec<usize> {
    let cluster = 1usize << bytes[23];
    let off = |at: usize| usize::try_from(be64(bytes, at) & 0x00ff_ffff_ffff_fe00).unwrap();
    let mut found = Vec::new();
    let l1 = off(40);
    let l1_size = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    for entry in (l1..l1 + l1_size * 8).step_by(8).take(6) {
        found.push(entry);
        let l2 = off(entry);
        if l2 > 0 {
            let some = |at: &usize| be64(bytes, *at) != 0;
            found.extend((l2..l2 + cluster).step_by(8).filter(some).take(6));
            found.push(l2 + cluster - 16);
        }
    }
    let reftable = off(48);
    found.extend([reftable, reftable + 8]);
    let block = off(reftable);
    found.extend((block..block + 48).step_by(8));
    found
}

/// Intended differences: what QEMU does not report, and an L1 entry without an offset, for which
/// QEMU takes the header for an L2 table and counts what it finds there.
fn more_than_qemu(report: &CheckReport, qemu: &[u64; 7]) -> bool {
    let says = |word: &str| report.messages.iter().any(|m| m.contains(word));
    if says("points at no table") {
        return report.corruptions > 0 && qemu[0] > 0;
    }
    let extra = ["version 2", "different kinds", "another place of the disk"];
    let is_named = extra.iter().any(|word| says(word)) || says("l2 entry has reserved bits");
    report.corruptions > qemu[0] && (is_named || report.messages_dropped > 0)
}

#[test]
fn changed_images_get_qemus_verdict() {
    let (Some(img), Some(io)) = (qemu_img(), qemu_io()) else { return };
    let scratch = Scratch::new();
    let path = scratch.path("changed");
    let (mut compared, mut refused, mut wanted, mut wrong) = (0, 0, 0, Vec::new());
    let mut seed = 0x1234_5678_9abc_def1u64;
    for (name, bytes) in images(&img, &io, &scratch) {
        let all = places(&bytes);
        let rounds = if is_full() { 140 } else { 14 };
        for round in 0..rounds {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = all[seed as usize % all.len()];
            let old = be64(&bytes, at);
            let changes = [
                old ^ 1 << 63,
                old ^ 1 << 62,
                old ^ 1,
                old ^ 0x200,
                old ^ 0x4000,
                old ^ 0x10000,
                old ^ 1 << 40,
                old ^ 1 << 57,
                0,
                u64::MAX,
                old.wrapping_add(0x1000),
                old ^ 1 << 55,
            ];
            let new = changes[(seed >> 32) as usize % changes.len()];
            let mut changed = bytes.clone();
            changed[at..at + 8].copy_from_slice(&new.to_be_bytes());
            std::fs::write(&path, &changed).unwrap();
            let theirs = qemu(&img, &path);
            let mine = ours(&changed);
            let what = format!("{name} round {round} at {at:#x}: {old:#x} -> {new:#x}");
            match (theirs, mine) {
                (None, Ok(report)) if report.is_clean() => {
                    wrong.push(format!("{what}\n qemu refuses it, ours is clean"));
                }
                (None, _) => refused += 1,
                (Some(theirs), Ok(report)) if counts(&report) == theirs => compared += 1,
                (Some(theirs), Ok(report)) if more_than_qemu(&report, &theirs) => wanted += 1,
                (Some(theirs), mine) => wrong.push(format!(
                    "{what}\n qemu {theirs:?}\n ours {:?}\n {:?}",
                    mine.as_ref().map(counts),
                    mine.as_ref().map(|r| &r.messages)
                )),
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}: {}", wrong.len(), wrong.join("\n"));
    assert!(compared > 100, "{compared} compared, {refused} refused, {wanted} wanted");
}
