//! Compares `create`, `measure` and `info` with qemu-img: the same options give the same image.
//!
//! Intended differences: with preallocation our tables come first and the data behind them in one
//! piece, so bytes differ and length agrees; with many refcount blocks their place differs, so only
//! small plain images are compared byte by byte.

use bds_core::driver::{DriverType, MeasureSource};
use bds_core::options::Options;
use bds_drivers::format::qcow2::fuzzing::{self, MemPort};
use bds_drivers::format::qcow2::{Qcow2Format, check_image};
use bds_testkit::{Scratch, qemu_img};
use futures_util::FutureExt;

fn tree(options: &str) -> Options {
    let mut tree = Options::new();
    for pair in options.split(',').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap();
        tree.set(key, value);
    }
    tree
}

/// Option lists of the matrix, without size.
fn matrix() -> Vec<String> {
    let mut all = Vec::new();
    for cluster in ["512", "4k", "64k", "2M"] {
        for (compat, bits) in [("0.10", 16), ("1.1", 1), ("1.1", 16), ("1.1", 64)] {
            for prealloc in ["off", "metadata"].into_iter().take(if bits == 16 { 2 } else { 1 }) {
                all.push(format!(
                    "compat={compat},cluster_size={cluster},refcount_bits={bits},preallocation={prealloc}"
                ));
            }
        }
    }
    for more in [
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,preallocation=metadata",
        "extended_l2=on,backing_file=base.raw,backing_fmt=raw,preallocation=metadata",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=base.raw,backing_fmt=raw,cluster_size=512",
        "backing_file=base.raw,backing_fmt=raw,compat=0.10",
        "preallocation=full,cluster_size=4k",
        "preallocation=falloc",
    ] {
        all.push(more.to_owned());
    }
    all
}

#[test]
fn the_same_options_give_qemus_image() {
    let Some(img) = qemu_img() else { return };
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base.raw"), vec![1; 1 << 20]).unwrap();
    let (ours, theirs) = (scratch.path("ours.qcow2"), scratch.path("theirs.qcow2"));
    for options in matrix() {
        let options = &options;
        img.must(["create", "-q", "-f", "qcow2", "-o", options, theirs.to_str().unwrap(), "3000k"]);
        let file = MemPort::default();
        fuzzing::create(tree(options).with("size", "3000k"), &file, None).unwrap();
        let bytes = file.bytes();
        std::fs::write(&ours, &bytes).unwrap();
        let qemus = std::fs::read(&theirs).unwrap();
        let mine = fuzzing::info(&file).unwrap();
        // QEMU cuts the last data cluster where the disk ends, ours is whole.
        let slack = usize::try_from(mine.cluster_size.unwrap()).unwrap();
        assert!(bytes.len() < qemus.len() + slack, "{options}: {} {}", bytes.len(), qemus.len());
        let is_plain = !options.contains("preallocation=m") && !options.contains("preallocation=f");
        if is_plain {
            assert!(bytes == qemus, "{options}: bytes differ");
        }
        img.must(["check", "-q", "-f", "qcow2", ours.to_str().unwrap()]);
        let report = check_image(&file, None, &|_, _| {}).now_or_never().unwrap().unwrap();
        assert!(report.is_clean(), "{options}: {report:?}");
        let info = |path: &std::path::Path| {
            let text = ["info", "--output=json", "-f", "qcow2", path.to_str().unwrap()];
            img.must(text).json()
        };
        let (a, b) = (info(&ours), info(&theirs));
        for key in [
            "virtual-size",
            "cluster-size",
            "format-specific",
            "backing-filename",
            "backing-filename-format",
        ] {
            assert_eq!(a.get(key), b.get(key), "{options}: {key}");
        }
        assert_eq!(mine.format_specific.as_ref(), b.get("format-specific"), "{options}");
        assert_eq!(mine.cluster_size, b["cluster-size"].as_u64(), "{options}");
    }
}

#[test]
fn the_same_options_measure_the_same() {
    let Some(img) = qemu_img() else { return };
    for options in matrix().iter().filter(|o| !o.contains("backing")) {
        for size in [0u64, 1, 3 << 20, (5 << 30) + 512] {
            let size_arg = size.to_string();
            let args =
                ["measure", "--output=json", "-O", "qcow2", "-o", options, "--size", &size_arg];
            let theirs = img.must(args).json();
            let source = MeasureSource { virtual_len: size, data: Some(Vec::new()) };
            let ours = Qcow2Format.measure(&mut tree(options), &source).unwrap();
            let what = format!("{options} {size}");
            assert_eq!(Some(ours.required), theirs["required"].as_u64(), "{what}");
            assert_eq!(Some(ours.fully_allocated), theirs["fully-allocated"].as_u64(), "{what}");
        }
    }
}

/// Snapshots and bitmaps, as QEMU shows them.
#[test]
fn info_shows_snapshots_and_bitmaps_as_qemu_does() {
    let Some(img) = qemu_img() else { return };
    let scratch = Scratch::new();
    let path = scratch.path("i.qcow2");
    let file = path.to_str().unwrap();
    img.must(["create", "-q", "-f", "qcow2", file, "10M"]);
    img.must(["snapshot", "-c", "first", file]);
    img.must(["snapshot", "-c", "second ü", file]);
    img.must(["bitmap", "--add", file, "b0"]);
    img.must(["bitmap", "--add", "-g", "512", "--disable", file, "b1"]);
    let theirs = img.must(["info", "--output=json", file]).json();
    let ours = fuzzing::info(&MemPort::new(std::fs::read(&path).unwrap())).unwrap();
    assert_eq!(ours.format_specific.as_ref(), theirs.get("format-specific"));
    assert_eq!(Some(&serde_json::Value::from(ours.snapshots)), theirs.get("snapshots"));
}
