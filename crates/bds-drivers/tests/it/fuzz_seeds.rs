//! Replays the committed fuzz seeds: inputs that once crashed must not crash again.
//!
//! `BDS_WRITE_SEEDS=1` writes the seeds anew, from images of every shape.

use std::path::{Path, PathBuf};

use bds_drivers::format::qcow2::fuzzing;

use crate::hostile_images::image;
use crate::qcow2::bitmaps::hostile::with_bitmaps;

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 7] = [
    ("qcow2_header", fuzzing::header),
    ("qcow2_l2", fuzzing::l2),
    ("qcow2_check", fuzzing::check),
    ("qcow2_open", fuzzing::open),
    ("qcow2_bitmaps", fuzzing::bitmaps),
    ("intent_log", fuzzing::bitmap_log),
    ("decompress", fuzzing::decompress),
];

fn seeds(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target)
}

#[test]
fn every_seed_is_harmless() {
    if std::env::var_os("BDS_WRITE_SEEDS").is_some() {
        write_seeds();
    }
    for (name, run) in TARGETS {
        let mut count = 0;
        for entry in std::fs::read_dir(seeds(name)).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            run(&bytes);
            // Cut and damaged inputs are the common case of a fuzzer.
            for at in (0..bytes.len()).step_by(bytes.len() / 16 + 1) {
                run(&bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 0x81;
                run(&changed);
            }
            count += 1;
        }
        assert!(count > 0, "no seeds for {name}");
    }
}

fn write_seeds() {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(seeds(target)).unwrap();
        std::fs::write(seeds(target).join(name), bytes).unwrap();
    };
    let small = ("cluster_size", "512");
    for (name, options) in [
        ("plain", &[("size", "40k"), small][..]),
        ("v2", &[("size", "40k"), small, ("compat", "v2")]),
        ("mapped", &[("size", "9k"), small, ("preallocation", "metadata")]),
        ("bits1", &[("size", "9k"), small, ("refcount_bits", "1"), ("preallocation", "metadata")]),
        ("bits64", &[("size", "9k"), small, ("refcount_bits", "64")]),
        ("backing", &[("size", "9k"), small, ("backing_file", "b.img"), ("backing_fmt", "raw")]),
        ("zstd", &[("size", "9k"), small, ("compression_type", "zstd")]),
        ("lazy", &[("size", "9k"), small, ("lazy_refcounts", "on")]),
        ("data_file", &[("size", "9k"), small, ("data_file", "d"), ("data_file_raw", "on")]),
        ("extended", &[("size", "20k"), ("cluster_size", "16k"), ("extended_l2", "on")]),
    ] {
        let bytes = image(options);
        put("qcow2_header", name, &bytes[..512]);
        if bytes.len() <= 16 << 10 {
            put("qcow2_check", name, &bytes);
            put("qcow2_open", name, &bytes);
        }
    }
    put("qcow2_bitmaps", "three", &with_bitmaps(4096, 256 << 10));
    put("qcow2_bitmaps", "small_clusters", &with_bitmaps(512, 64 << 10));
    put("intent_log", "closed", &crate::bitmap_log::log_file(true));
    put("intent_log", "crashed", &crate::bitmap_log::log_file(false));
    // Entries that lead behind the end of the file, a cluster in use with refcount 0, an end mark
    // with a length, a snapshot table outside of the file.
    let mapped = image(&[("size", "9k"), small, ("preallocation", "metadata")]);
    let with = |changes: &[(usize, u64, usize)]| {
        let mut bytes = mapped.clone();
        for (at, value, len) in changes {
            bytes[*at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
        }
        bytes
    };
    let behind_end = with(&[(2048, 1 << 63 | ((1 << 56) - 512), 8), (2056, 1 << 62 | 1 << 40, 8)]);
    let free = with(&[(1024 + 2 * 5, 0, 2)]);
    for target in ["qcow2_check", "qcow2_open"] {
        put(target, "behind_end", &behind_end);
        put(target, "free", &free);
    }
    put("qcow2_header", "end_length", &with(&[(112, 8, 8)])[..512]);
    put("qcow2_header", "snapshots", &with(&[(64, 1 << 63, 8)])[..512]);
    put("qcow2_header", "names", &image(&[("size", "9k"), ("cluster_size", "8k")])[..600]);
    for (name, shape) in [("v3", 0b0011_1010), ("ext", 0b0011_1011), ("data_file", 0b0011_1110)] {
        let mut bytes = vec![shape];
        for word in
            [0u64, 1, 1 << 63, 0x8000_0000_0005_0000, 0x5_0001, 0x4000_0000_0005_0123, 7 << 54]
        {
            bytes.extend(word.to_be_bytes());
            bytes.extend(0x0000_00f0_0000_ff00u64.to_be_bytes());
        }
        put("qcow2_l2", name, &bytes);
    }
    // Raw deflate (stored block, fixed block) and two zstd frames, cut and whole.
    put("decompress", "stored", &[0, 1, 3, 0, 0xfc, 0xff, b'a', b'b', b'c']);
    put("decompress", "fixed", &[2, 0x4b, 0x4c, 0x04, 0x00]);
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x03, 0x19, 0, 0, b'a', b'b', b'c'];
    put("decompress", "zstd", &[&[1][..], &frame, &frame, &frame[..5]].concat());
}
