//! Compares the output of each verb with qemu-img's, for the same arguments.
//!
//! Known differences, each on purpose: file lengths are exact here and rounded up to 512 there;
//! `map` of a data file shows its holes; options of encryption are not offered.

use bds_testkit::{pattern, qemu_img};
use serde_json::Value;

use crate::workdir::Workdir;

/// A chain, a compressed image, a data file, an old version, odd features; all made by qemu-img.
fn images() -> Option<Workdir> {
    qemu_img()?;
    let workdir = Workdir::new();
    let mut disk = vec![0; 10 << 20];
    disk[1 << 20..2 << 20].copy_from_slice(&pattern(1, 0, 1 << 20));
    disk[5_000_000..5_100_000].copy_from_slice(&pattern(2, 0, 100_000));
    workdir.write("base.raw", &disk);
    disk[2 << 20..(2 << 20) + 65536].copy_from_slice(&pattern(3, 0, 65536));
    workdir.write("top.raw", &disk);
    for words in [
        "convert -O qcow2 base.raw base.qcow2",
        "convert -O qcow2 -B base.qcow2 -F qcow2 top.raw top.qcow2",
        "convert -O qcow2 -c top.raw zlib.qcow2",
        "convert -O qcow2 -c -o compression_type=zstd top.raw zstd.qcow2",
        "convert -O qcow2 -o compat=0.10 top.raw old.qcow2",
        "convert -O qcow2 -o cluster_size=512,refcount_bits=1 top.raw small.qcow2",
        "create -q -f qcow2 -o data_file=data.raw data.qcow2 3M",
        "create -q -f qcow2 -o extended_l2=on,preallocation=metadata,lazy_refcounts=on odd.qcow2 3M",
        "create -q -f qcow2 empty.qcow2 1G",
    ] {
        workdir.must_qemu(words);
    }
    Some(workdir)
}

const IMAGES: [&str; 9] = ["base", "top", "zlib", "zstd", "old", "small", "data", "odd", "empty"];

/// Rounds file lengths up to sectors as qemu-img does; bds prints them exactly.
fn rounded(mut info: Value) -> Value {
    let images = match &mut info {
        Value::Array(images) => images.as_mut_slice(),
        one => std::slice::from_mut(one),
    };
    for child in images.iter_mut().filter_map(|image| image["children"].as_array_mut()).flatten() {
        let len = &mut child["info"]["virtual-size"];
        *len = len.as_u64().expect("a length").next_multiple_of(512).into();
    }
    info
}

fn without_file_lengths(text: &str) -> String {
    text.lines()
        .filter(|line| !line.contains("file length:"))
        .map(|l| l.to_owned() + "\n")
        .collect()
}

/// Runs both; output and exit code must be equal.
#[track_caller]
fn same(workdir: &Workdir, words: &str) {
    let (theirs, ours) = (workdir.qemu_img(words), workdir.bds(words));
    assert_eq!(ours.code, theirs.code, "{words}\n{ours:?}\n{theirs:?}");
    if words.contains("--output=json") && theirs.ok() {
        assert_eq!(rounded(ours.json()), rounded(theirs.json()), "{words}");
    } else {
        let (ours, theirs) =
            (without_file_lengths(&ours.stdout), without_file_lengths(&theirs.stdout));
        assert_eq!(ours, theirs, "{words}");
    }
}

#[test]
fn info_and_check_print_the_same() {
    let Some(workdir) = images() else { return };
    for image in IMAGES {
        same(&workdir, &format!("info {image}.qcow2"));
        same(&workdir, &format!("info --output=json {image}.qcow2"));
        same(&workdir, &format!("info --output=json --backing-chain {image}.qcow2"));
        same(&workdir, &format!("check {image}.qcow2"));
        same(&workdir, &format!("check --output=json {image}.qcow2"));
    }
    same(&workdir, "info --backing-chain top.qcow2");
    same(&workdir, "info base.raw");
    same(&workdir, "info -f raw --output=json base.raw");
    same(&workdir, "check base.raw");
}

#[test]
fn map_and_measure_print_the_same() {
    let Some(workdir) = images() else { return };
    for image in IMAGES {
        same(&workdir, &format!("map --output=json {image}.qcow2"));
        same(&workdir, &format!("map {image}.qcow2"));
        same(&workdir, &format!("measure {image}.qcow2"));
        same(&workdir, &format!("measure -O qcow2 {image}.qcow2"));
    }
    same(&workdir, "map -s 1M -l 2M --output=json top.qcow2");
    same(&workdir, "measure -O qcow2 --size 1G");
    same(&workdir, "measure -O qcow2 -o cluster_size=2M,refcount_bits=64 --size 1T");
}

#[test]
fn compare_prints_and_exits_the_same() {
    let Some(workdir) = images() else { return };
    for (a, b) in [
        ("base", "top"),
        ("top", "zlib"),
        ("zlib", "zstd"),
        ("top", "old"),
        ("small", "top"),
        ("data", "odd"),
        ("data", "base"),
        ("data", "empty"),
    ] {
        same(&workdir, &format!("compare {a}.qcow2 {b}.qcow2"));
        same(&workdir, &format!("compare -s {a}.qcow2 {b}.qcow2"));
        same(&workdir, &format!("compare -q {a}.qcow2 {b}.qcow2"));
    }
    assert_eq!(workdir.bds("compare nothing.qcow2 top.qcow2").code, 2);
}

#[test]
fn create_prints_and_makes_the_same() {
    let Some(workdir) = images() else { return };
    for words in [
        "create -f qcow2 new.qcow2 3M",
        "create -f qcow2 -o compat=0.10,cluster_size=4k new.qcow2 3M",
        "create -f qcow2 -o preallocation=metadata,compression_type=zstd new.qcow2 1G",
        "create -f qcow2 -b base.qcow2 -F qcow2 new.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 new.qcow2 20M",
        "create -f raw -o preallocation=full new.raw 1M",
        "create new.raw 1M",
        "create -q -f qcow2 new.qcow2 3M",
    ] {
        same(&workdir, words);
        if words.contains("qcow2") {
            workdir.must_qemu("check new.qcow2");
        }
    }
    for words in
        ["create -f qcow2 new.qcow2", "create -f foo new 1M", "create -f qcow2 -o foo=1 new 1M"]
    {
        assert_eq!(workdir.bds(words).code, workdir.qemu_img(words).code, "{words}");
    }
}

#[test]
fn converted_images_are_the_same_to_qemu() {
    let Some(workdir) = images() else { return };
    for options in [
        "-O qcow2",
        "-O raw",
        "-O qcow2 -c",
        "-O qcow2 -c -o compression_type=zstd,cluster_size=2M -m 16 -W",
        "-O qcow2 -S 0",
        "-O qcow2 -o compat=0.10,cluster_size=512 -m 1",
        "-O qcow2 -o extended_l2=on,preallocation=metadata",
        "-O qcow2 -t none -T none",
        "-O raw -C",
        "-O qcow2 -B base.qcow2 -F qcow2",
    ] {
        workdir.must(&format!("convert {options} top.qcow2 new"));
        let format = if options.contains("raw") { "raw" } else { "qcow2" };
        workdir.must_qemu(&format!("compare -f qcow2 -F {format} top.qcow2 new"));
        if format == "qcow2" {
            workdir.must_qemu("check new");
        }
        std::fs::remove_file(workdir.dir().join("new")).expect("it was made");
    }
}

#[test]
fn several_inputs_follow_one_another() {
    let Some(workdir) = images() else { return };
    workdir.must("convert base.qcow2 top.qcow2 ours.raw");
    workdir.must_qemu("convert base.qcow2 top.qcow2 theirs.raw");
    assert!(workdir.read("ours.raw") == workdir.read("theirs.raw"));
}

#[test]
fn resized_images_are_the_same_to_qemu() {
    let Some(workdir) = images() else { return };
    for size in ["12M", "+1M", "+512"] {
        workdir.must(&format!("resize top.qcow2 {size}"));
        workdir.must_qemu("check top.qcow2");
    }
    let info = workdir.must_qemu("info --output=json top.qcow2").json();
    assert_eq!(info["virtual-size"], (13 << 20) + 512);
    workdir.must("resize -f raw base.raw +1M");
    assert_eq!(workdir.read("base.raw").len(), 11 << 20);
    same(&workdir, "resize -f raw base.raw 1M");
    same(&workdir, "resize -f raw --shrink base.raw -1M");
    same(&workdir, "resize -f raw --shrink base.raw -100M");
}

#[test]
fn dd_copies_the_same_blocks() {
    let Some(workdir) = images() else { return };
    for operands in [
        "bs=1M",
        "bs=1M count=2",
        "bs=1M count=3 skip=1",
        "count=1",
        "bs=64k skip=1000",
        "bs=4k skip=2",
    ] {
        workdir.must_qemu(&format!("dd {operands} if=top.qcow2 of=theirs.raw"));
        workdir.must(&format!("dd {operands} if=top.qcow2 of=ours.raw"));
        assert!(workdir.read("ours.raw") == workdir.read("theirs.raw"), "{operands}");
    }
}

#[test]
fn bench_announces_the_same() {
    let Some(workdir) = images() else { return };
    for words in [
        "bench -c 100 -f qcow2 top.qcow2",
        "bench -c 100 -d 8 -s 512 -S 1024 -o 4k -f qcow2 top.qcow2",
        "bench -c 100 -w --pattern 7 -d 4 --flush-interval 10 -f qcow2 top.qcow2",
    ] {
        let announced = |text: &str| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with("Run")).map(str::to_owned).collect()
        };
        let (ours, theirs) = (workdir.must(words), workdir.must_qemu(words));
        assert_eq!(announced(&ours.stdout), announced(&theirs.stdout), "{words}");
    }
    workdir.must_qemu("check top.qcow2");
}
