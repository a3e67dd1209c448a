//! Tests what `convert` and the like keep: an existing output if refused, data behind the source's
//! end, preallocated space, links.

use std::os::unix::fs::{MetadataExt, symlink};

use bds_testkit::{pattern, qemu_img};

use crate::workdir::{LoopDevice, Workdir};

const MIB: usize = 1 << 20;

/// A source, and an output that must survive.
fn workdir() -> Workdir {
    let workdir = Workdir::new();
    workdir.write("src.raw", &pattern(1, 0, MIB));
    workdir.write("keep", &pattern(2, 0, 300_000));
    workdir
}

#[test]
fn convert_refuses_before_it_changes_an_existing_output() {
    let workdir = workdir();
    let keep = workdir.read("keep");
    let mut commands = Vec::new();
    for words in [
        "-O qcow2 -o cluster_size=3000",
        "-O qcow2 -o cluster_size=4M",
        "-O qcow2 -o preallocation=bogus",
        "-O qcow2 -o compat=0.10,compression_type=zstd",
        "-O qcow2 -o compat=0.10,lazy_refcounts=on",
        "-O qcow2 -o nosuch=1",
        "-O qcow2 -o nocow=maybe",
        "-O qcow2 -o size=1k",
        "-O qcow2 -o size=64P",
        "-O qcow2 -o refcount_bits=3",
        "-O qcow2 -o extended_l2=on,cluster_size=4k",
        "-O qcow2 -o encrypt.format=luks",
        "-O raw -o preallocation=metadata",
        "-O raw -o extent_size_hint=9G",
        "-O nosuch",
        "-O qcow2 -S 3",
        "-O qcow2 -S 2G",
        "-O qcow2 -r 0",
        "-O qcow2 -r fast",
        "-O qcow2 -m 0",
        "-O qcow2 -t bogus",
        "-O qcow2 -T bogus",
        "-O qcow2 -B nowhere -F raw",
        "-O qcow2 -B src.raw -F nosuch",
        "-O qcow2 -B src.raw",
        "-O qcow2 -F raw",
        "-O qcow2 -o backing_fmt=raw",
        "-O qcow2 -B src.raw -F raw -o preallocation=full",
        "-c -O qcow2 -o data_file=d",
        "-c -O qcow2 -o preallocation=full",
        "-c -C -O qcow2",
        "-c -O raw",
        "-O qcow2 -o data_file=nowhere/x",
        "-O qcow2 -o data_file_raw=on",
    ] {
        commands.push(format!("convert -f raw {words} src.raw t"));
    }
    commands.push("convert -f raw -O qcow2 missing.raw t".to_owned());
    commands.push("convert -f qcow2 -O qcow2 src.raw t".to_owned());
    for option in [
        "cluster_size=3000",
        "preallocation=bogus",
        "compat=9",
        "refcount_bits=3",
        "compression_type=lz4",
        "data_file_raw=on",
        "data_file=nowhere/x",
        "data_file=.",
        "nosuch=1",
        "backing_file=gone,backing_fmt=raw",
    ] {
        commands.push(format!("create -q -f qcow2 -o {option} t 1M"));
    }
    for words in ["-f qcow2 t 64P", "-f qcow2 -F raw t 1M", "-f qcow2 t 93.1", "-f raw t 16383P"] {
        commands.push(format!("create -q {words}"));
    }
    commands.push("create -q -f raw -o preallocation=metadata t 1M".to_owned());
    commands.push("dd -f raw -O nosuch if=src.raw of=t".to_owned());
    commands.push("dd -f raw -O raw bs=0 if=src.raw of=t".to_owned());
    commands.push("dd -f raw -O raw if=missing of=t".to_owned());
    for words in commands {
        workdir.write("t", &keep);
        let output = workdir.bds(&words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(workdir.read("t") == keep, "{words}: the old output is gone");
        assert!(!workdir.dir().join("d").exists(), "{words}: a data file is left");
        let fresh = words.replace(" t ", " fresh ").replace("of=t", "of=fresh");
        let fresh = fresh.strip_suffix(" t").map(|f| format!("{f} fresh")).unwrap_or(fresh);
        assert_eq!(workdir.bds(&fresh).code, 1, "{fresh}");
        assert!(!workdir.dir().join("fresh").exists(), "{fresh}: a file is left");
    }
}

#[test]
fn a_missing_or_wrong_backing_file_is_an_error_unless_it_is_not_wanted() {
    let workdir = workdir();
    let t = |words: &str| workdir.bds(&format!("create -q -f qcow2 {words} o.qcow2 1M"));
    for words in [
        "-b gone.raw -F raw",
        "-o backing_file=gone.qcow2,backing_fmt=qcow2",
        "-b src.raw -F qcow2",
        "-b gone.raw -F nosuchformat",
        "-b src.raw -F nosuchformat",
    ] {
        let output = t(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(!workdir.dir().join("o.qcow2").exists(), "{words}");
    }
    assert!(t("-b gone.raw -F raw").stderr.contains("gone.raw"));
    assert!(t("-u -b gone.raw -F raw").ok());
    assert!(t("-b src.raw -F raw").ok());
}

#[test]
fn a_dangling_symlink_is_followed_to_the_new_output() {
    let workdir = workdir();
    std::fs::create_dir(workdir.dir().join("vol")).expect("scratch is writable");
    for (number, words) in [
        "create -q -f qcow2 LINK 1M",
        "create -q -f raw LINK 1M",
        "convert -f raw -O qcow2 src.raw LINK",
        "convert -f raw -O raw src.raw LINK",
        "dd -f raw -O raw bs=64k if=src.raw of=LINK",
        "create -q -f qcow2 -o data_file=LINK x.qcow2 1M",
    ]
    .into_iter()
    .enumerate()
    {
        let (link, end) = (format!("link{number}"), format!("vol/{number}"));
        // Over a second link, to be sure.
        symlink(format!("over{number}"), workdir.dir().join(&link)).expect("scratch has links");
        symlink(&end, workdir.dir().join(format!("over{number}"))).expect("scratch has links");
        workdir.must(&words.replace("LINK", &link));
        assert!(!workdir.read(&end).is_empty(), "{words}");
        let meta = std::fs::symlink_metadata(workdir.dir().join(&link)).expect("it stays");
        assert!(meta.is_symlink(), "{words}: the link is no link any more");
    }
    // After a failure the link is as it was, and what was made at its end is gone.
    symlink("vol/none", workdir.dir().join("bad")).expect("scratch has links");
    for words in [
        "create -q -f qcow2 -o data_file=nowhere/x bad 1M",
        "convert -f raw -O qcow2 -o cluster_size=3 src.raw bad",
    ] {
        assert_eq!(workdir.bds(words).code, 1, "{words}");
        assert!(workdir.dir().join("bad").is_symlink(), "{words}");
        assert!(!workdir.dir().join("vol/none").exists(), "{words}");
    }
}

#[test]
fn data_behind_the_sources_end_stays() {
    let workdir = workdir();
    let old = pattern(3, 0, 3 * MIB);
    workdir.write("old.raw", &old);
    let expected = [&workdir.read("src.raw")[..], &old[MIB..]].concat();
    // Zeros at its begin, so that something has to be zeroed too.
    let mut sparse = pattern(4, 0, MIB);
    sparse[..MIB / 2].fill(0);
    workdir.write("sparse.raw", &sparse);
    let sparse_expected = [&sparse[..], &old[MIB..]].concat();
    for switches in ["", "-S 0", "-W", "-C"] {
        for (source, expected) in [("src.raw", &expected), ("sparse.raw", &sparse_expected)] {
            let convert = format!("convert -n {switches} -f raw");
            workdir.write("t.raw", &old);
            workdir.must(&format!("{convert} -O raw {source} t.raw"));
            assert!(workdir.read("t.raw") == *expected, "raw {switches} {source}");

            workdir.must("convert -f raw -O qcow2 old.raw t.qcow2");
            workdir.must("create -q -f qcow2 -b old.raw -F raw v.qcow2");
            for image in ["t.qcow2", "v.qcow2"] {
                workdir.must(&format!("{convert} -O qcow2 {source} {image}"));
                workdir.must(&format!("convert -f qcow2 -O raw {image} o.raw"));
                assert!(workdir.read("o.raw") == *expected, "{image} {switches} {source}");
                workdir.must(&format!("check -q {image}"));
            }
        }
    }
    if qemu_img().is_some() {
        workdir.write("t.raw", &old);
        workdir.must_qemu("convert -n -f raw -O raw sparse.raw t.raw");
        assert!(workdir.read("t.raw") == sparse_expected, "qemu-img does the same");
    }
}

#[test]
fn a_device_keeps_its_data_behind_the_sources_end() {
    let workdir = workdir();
    let old = pattern(3, 0, 3 * MIB);
    let mut sparse = pattern(4, 0, MIB);
    sparse[..MIB / 2].fill(0);
    workdir.write("sparse.raw", &sparse);
    let expected = [&sparse[..], &old[MIB..]].concat();
    for words in [
        "convert -f raw -O raw sparse.raw",
        "convert -n -f raw -O raw sparse.raw",
        "convert -n -t none -f raw -O raw sparse.raw",
        "convert -S 0 -f raw -O raw sparse.raw",
        "dd -f raw -O raw bs=64k if=sparse.raw",
    ] {
        workdir.write("dev.img", &old);
        let Some(device) = LoopDevice::new(&workdir, "dev.img", &[]) else {
            eprintln!("skipped: no loop devices here");
            return;
        };
        let output = if words.starts_with("dd") { "of=" } else { "" };
        workdir.must(&format!("{words} {output}{}", device.name()));
        drop(device);
        let found = workdir.read("dev.img");
        let differs = found.iter().zip(&expected).position(|(one, other)| one != other);
        assert!(found == expected, "{words}: {} bytes, others from {differs:?}", found.len());
    }
}

#[test]
fn a_device_that_is_too_small_is_left_alone() {
    let workdir = workdir();
    let old = pattern(3, 0, MIB);
    workdir.write("dev.img", &old);
    let Some(device) = LoopDevice::new(&workdir, "dev.img", &[]) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    workdir.write("large.raw", &pattern(4, 0, 2 * MIB));
    let name = device.name();
    for words in [
        format!("convert -f raw -O raw large.raw {name}"),
        format!("convert -n -f raw -O raw large.raw {name}"),
        format!("convert -f raw -O qcow2 -o preallocation=metadata large.raw {name}"),
        format!("create -q -f raw {name} 2M"),
        format!("create -q -f qcow2 -o preallocation=full {name} 1M"),
        format!("create -q -f qcow2 -o cluster_size=2M {name} 1M"),
        format!("create -q -f qcow2 -o data_file={name} new.qcow2 2M"),
        format!("dd -f raw -O raw bs=64k if=large.raw of={name}"),
    ] {
        let output = workdir.bds(&words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(!workdir.dir().join("new.qcow2").exists(), "{words}");
    }
    drop(device);
    assert!(workdir.read("dev.img") == old);
}

#[test]
fn an_output_keeps_the_space_that_was_preallocated() {
    let workdir = workdir();
    let mut sparse = vec![0; MIB];
    sparse[..4096].fill(1);
    workdir.write("sparse.raw", &sparse);
    workdir.must("create -q -f raw -o preallocation=full p.raw 4M");
    workdir.must("create -q -f qcow2 -o preallocation=full p.qcow2 4M");
    let space =
        |name: &str| std::fs::metadata(workdir.dir().join(name)).expect("it is there").blocks();
    for (format, name) in [("raw", "p.raw"), ("qcow2", "p.qcow2")] {
        let before = space(name);
        assert!(before >= (4 * MIB as u64) / 512, "{name} is preallocated");
        workdir.must(&format!("convert -n -f raw -O {format} sparse.raw {name}"));
        assert!(space(name) >= before, "{name}: {} of {before} blocks are left", space(name));
        workdir.must(&format!("convert -f {format} -O raw {name} o.raw"));
        assert!(workdir.read("o.raw")[..MIB] == sparse, "{name}");
    }
}

#[test]
fn an_output_that_is_too_small_is_left_alone() {
    let workdir = workdir();
    workdir.must("create -q -f qcow2 small.qcow2 512k");
    let image = workdir.read("small.qcow2");
    let keep = workdir.read("keep");
    for (format, name) in [("raw", "keep"), ("qcow2", "small.qcow2")] {
        let output = workdir.bds(&format!("convert -n -f raw -O {format} src.raw {name}"));
        assert_eq!(output.code, 1, "{name}: {output:?}");
        assert!(output.stderr.contains("smaller than the input"), "{output:?}");
    }
    assert!(workdir.read("keep") == keep && workdir.read("small.qcow2") == image);
}
