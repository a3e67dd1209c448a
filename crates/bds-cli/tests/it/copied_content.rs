//! Tests that after exit code 0 the output reads like the input: format, length, every kind of
//! backing chain.

use std::path::Path;

use bds_io::{ByteLock, Fs, OpenOptions};
use bds_testkit::{pattern, qemu_img};

use crate::workdir::Workdir;

const MIB: usize = 1 << 20;

/// First bytes, last bytes, and the name that the error must contain.
type Container = (&'static str, &'static [u8], &'static [u8], &'static str);

const CONTAINERS: [Container; 26] = [
    (
        "flat.vmdk",
        b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"x.vmdk\" 0\n",
        b"",
        "vmdk",
    ),
    ("dos.vmdk", b"# Disk DescriptorFile\r\nversion=1\r\nCID=fffffffe\r\n", b"", "vmdk"),
    ("bare.vmdk", b"\n# comment\nversion=3\nCID=123\n", b"", "vmdk"),
    ("sparse.vmdk", b"KDMV\x01\0\0\0", b"", "vmdk"),
    ("stream.vmdk", b"KDMV\x03\0\0\0", b"", "vmdk"),
    ("esx.vmdk", b"COWD\x01\0\0\0", b"", "vmdk"),
    ("sesparse.vmdk", b"\xbe\xba\xfe\xca\0\0\0\0", b"", "vmdk"),
    ("x.vhdx", b"vhdxfile", b"", "vhdx"),
    ("dynamic.vhd", b"conectix", b"", "vhd"),
    ("fixed.vhd", b"guest data", b"conectix", "vhd"),
    ("x.qcow", b"QFI\xfb\0\0\0\x01", b"", "qcow (version 1)"),
    ("future.qcow", b"QFI\xfb\0\0\0\x09", b"", ""),
    ("x.qed", b"QED\0", b"", "qed"),
    ("x.parallels", b"WithoutFreeSpace", b"", "parallels"),
    ("ext.parallels", b"WithouFreSpacExt", b"", "parallels"),
    ("x.luks", b"LUKS\xba\xbe\0\x01", b"", "luks"),
    ("two.luks", b"LUKS\xba\xbe\0\x02", b"", "luks"),
    ("x.bochs", b"Bochs Virtual HD Image", b"", "bochs"),
    ("x.cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", b"", "cloop"),
    ("x.dmg", b"guest data", b"koly\0\0\0\x04", "dmg"),
    ("x.simg", b"\x3a\xff\x26\xed\x01\0\0\0", b"", "Android"),
    ("x.e01", b"EVF\x09\x0d\x0a\xff\0", b"", "EWF"),
    ("disk.gz", b"\x1f\x8b\x08\x00\0\0\0\0\0\x03", b"", "gzip"),
    ("disk.bz2", b"BZh91AY&SY", b"", "bzip2"),
    ("disk.xz", b"\xfd7zXZ\0", b"", "xz"),
    ("disk.zst", b"\x28\xb5\x2f\xfd", b"", "zstd"),
];

#[test]
fn images_of_other_formats_are_not_probed_as_raw() {
    let workdir = Workdir::new();
    let mut vdi = b"<<< Oracle VM VirtualBox Disk Image >>>\n".to_vec();
    vdi.resize(64, 0);
    vdi.extend(b"\x7f\x10\xda\xbe\x01\0\x01\0");
    let containers =
        CONTAINERS.into_iter().chain([("x.vdi", vdi.leak() as &[u8], b"" as &[u8], "vdi")]);
    for (name, head, footer, format) in containers {
        let mut bytes = head.to_vec();
        bytes.resize(65536, 0);
        if !footer.is_empty() {
            bytes.extend(footer);
            bytes.resize(65536 + 512, 0);
        }
        workdir.write(name, &bytes);
        for words in [
            "convert -O raw FILE out.raw",
            "convert -O qcow2 FILE out.raw",
            "convert -O raw plain.raw FILE out.raw",
            "dd -O raw if=FILE of=out.raw",
            "info FILE",
            "info --output json FILE",
            "map FILE",
            "measure FILE",
            "compare FILE FILE",
            "check FILE",
            "bench -c 1 FILE",
            "graph FILE",
        ] {
            workdir.write("plain.raw", &[0; 512]);
            let output = workdir.bds(&words.replace("FILE", name));
            let code = if words.starts_with("compare") { 2 } else { 1 };
            let is_check = words.starts_with("check") && output.code == 63;
            assert!(output.code == code || is_check, "{words} {name}: {output:?}");
            assert!(output.stderr.contains(format), "{words} {name}: {output:?}");
            assert!(output.stderr.contains(name), "{words} {name}: {output:?}");
            assert!(!workdir.dir().join("out.raw").exists(), "{words} {name}");
        }
        // With `-f raw` the bytes are copied.
        workdir.must(&format!("convert -f raw -O raw {name} same.raw"));
        assert!(workdir.read("same.raw") == bytes, "{name}");
    }
}

#[test]
fn a_backing_file_of_another_format_is_not_probed_as_raw() {
    let Some(_) = qemu_img() else { return };
    let workdir = Workdir::new();
    let mut bytes = b"KDMV\x01\0\0\0".to_vec();
    bytes.resize(65536, 0);
    workdir.write("b.vmdk", &bytes);
    workdir.must("create -q -f qcow2 -b b.vmdk -F raw v.qcow2");
    // Without a stored format: the image does not name one.
    workdir.must_qemu("rebase -u -f qcow2 -b b.vmdk -F raw v.qcow2");
    let mut image = workdir.read("v.qcow2");
    let mark = [0xe2, 0x79, 0x2a, 0xca];
    let at = image.windows(4).position(|four| four == mark).expect("the format is stored");
    // An extension of an unknown type, which readers skip.
    image[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    workdir.write("v.qcow2", &image);
    let output = workdir.bds("convert -f qcow2 -O raw v.qcow2 o.raw");
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("vmdk"), "{output:?}");
}

/// source ─► middle ─► base, of different lengths, with data, zeros and gaps in each; `copy.raw`
/// holds what base does.
fn chain(workdir: &Workdir, sizes: [usize; 3]) {
    let [base, middle, top] = sizes;
    let mut bytes = pattern(1, 0, base);
    bytes[200_000..300_000].fill(0);
    workdir.write("base.raw", &bytes);
    workdir.write("copy.raw", &bytes);
    workdir.must(&format!("create -q -f qcow2 -b base.raw -F raw mid.qcow2 {middle}"));
    workdir.must("bench -q -w --pattern 5 -c 3 -s 64k -S 256k -f qcow2 mid.qcow2");
    workdir.must("bench -q -w --pattern 0 -c 1 -s 64k -o 128k -f qcow2 mid.qcow2");
    workdir.must(&format!("create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 {top}"));
    workdir.must("bench -q -w --pattern 6 -c 2 -s 32k -S 300k -o 64k -f qcow2 top.qcow2");
    workdir.must("convert -f qcow2 -O raw top.qcow2 want.raw");
}

#[track_caller]
fn shows_the_same(workdir: &Workdir, image: &str, words: &str) {
    let output = workdir.bds(&format!("compare -f raw -F qcow2 want.raw {image}"));
    assert_eq!(output.stdout, "Images are identical.\n", "{words}: {output:?}");
    workdir.must(&format!("check -q {image}"));
}

#[test]
fn an_overlay_of_any_base_shows_what_the_source_shows() {
    // Goes on from one chain to the next, so that each base meets several.
    let mut switches = ["-c", "-W -m 16", "-S 0", "-o cluster_size=4k", "-C"].iter().cycle();
    for sizes in
        [[MIB; 3], [3 * MIB, MIB, 2 * MIB], [MIB, 2 * MIB, 3 * MIB], [2 * MIB, 3 * MIB, MIB]]
    {
        let workdir = Workdir::new();
        chain(&workdir, sizes);
        workdir.write("other.raw", &pattern(9, 0, MIB + 1000));
        workdir.must("convert -f qcow2 -O qcow2 mid.qcow2 mid-copy.qcow2");
        for base in [
            "mid.qcow2 -F qcow2",
            "base.raw -F raw",
            "copy.raw -F raw",
            "other.raw -F raw",
            "mid-copy.qcow2 -F qcow2",
            // As bytes: another disk than the image in it.
            "mid.qcow2 -F raw",
            "top.qcow2 -F qcow2",
        ] {
            // Every base without switches, and with one more in turn.
            for switches in switches.next().into_iter().chain([&""]) {
                let words =
                    format!("convert {switches} -f qcow2 -O qcow2 -B {base} top.qcow2 out.qcow2");
                workdir.must(&words);
                shows_the_same(&workdir, "out.qcow2", &format!("{sizes:?} {words}"));
            }
        }
        // What the base shows is not stored twice.
        for base in ["base.raw -F raw", "copy.raw -F raw", "top.qcow2 -F qcow2"] {
            workdir.must(&format!("convert -f qcow2 -O qcow2 -B {base} top.qcow2 out.qcow2"));
            let output = workdir.must("map --output=json -f qcow2 out.qcow2").json();
            let runs = output.as_array().expect("a list");
            let is_left_out = |run: &serde_json::Value| run["depth"] != 0;
            assert!(runs.iter().any(is_left_out), "{base}: {output}");
        }
    }
}

#[test]
fn a_longer_base_is_hidden_behind_the_sources_end() {
    let workdir = Workdir::new();
    workdir.write("base.raw", &pattern(1, 0, 3 * MIB));
    let source = pattern(2, 0, MIB + 1000);
    workdir.write("src.raw", &source);
    for (switches, len) in [
        ("", (MIB + 1024) as u64),
        ("-c", (MIB + 1024) as u64),
        ("-o size=2M", 2 << 20),
        ("-c -o size=4M", 4 << 20),
    ] {
        workdir.must(&format!(
            "convert {switches} -f raw -O qcow2 -B base.raw -F raw src.raw o.qcow2"
        ));
        let mut want = source.clone();
        want.resize(usize::try_from(len).expect("small"), 0);
        workdir.write("want.raw", &want);
        shows_the_same(&workdir, "o.qcow2", switches);
    }
}

#[test]
fn an_existing_overlay_is_filled_with_what_differs_or_refused() {
    let workdir = Workdir::new();
    chain(&workdir, [MIB; 3]);
    workdir.must("create -q -f qcow2 -b base.raw -F raw out.qcow2");
    let fresh = workdir.read("out.qcow2");
    let convert = "convert -n -f qcow2 -O qcow2 -B base.raw -F raw top.qcow2 out.qcow2";
    workdir.must(convert);
    shows_the_same(&workdir, "out.qcow2", "a fresh overlay");
    // Data of its own, where the source shows the base.
    workdir.write("out.qcow2", &fresh);
    workdir.must("bench -q -w --pattern 7 -c 4 -s 64k -S 256k -o 32k -f qcow2 out.qcow2");
    workdir.must(convert);
    shows_the_same(&workdir, "out.qcow2", "an overlay with data of its own");

    workdir.must("create -q -f qcow2 plain.qcow2 1M");
    workdir.must("create -q -f qcow2 -b mid.qcow2 -F qcow2 other.qcow2");
    for output in ["plain.qcow2", "other.qcow2"] {
        let before = workdir.read(output);
        let words = format!("convert -n -f qcow2 -O qcow2 -B base.raw -F raw top.qcow2 {output}");
        let refusal = workdir.bds(&words);
        assert_eq!(refusal.code, 1, "{words}: {refusal:?}");
        assert!(refusal.stderr.contains("overlay of"), "{refusal:?}");
        assert!(workdir.read(output) == before, "{words}");
    }
}

#[test]
fn options_that_would_have_no_effect_are_refused_as_qemu_img_does() {
    let workdir = Workdir::new();
    workdir.write("base.raw", &pattern(1, 0, MIB));
    workdir.must("create -q -f qcow2 -b base.raw -F raw ov.qcow2");
    workdir.must("create -q -f qcow2 t.qcow2 1M");
    let before = workdir.read("t.qcow2");
    for words in [
        "convert -n -f qcow2 -O qcow2 -o backing_file=base.raw,backing_fmt=raw ov.qcow2 t.qcow2",
        "convert -n -f qcow2 -O qcow2 -o cluster_size=4k ov.qcow2 t.qcow2",
        "convert -f raw -O qcow2 -B base.raw -F raw base.raw base.raw new.qcow2",
        "convert -f raw -O qcow2 -o backing_file=base.raw,backing_fmt=raw base.raw base.raw new.qcow2",
    ] {
        let output = workdir.bds(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(
            workdir.read("t.qcow2") == before && !workdir.dir().join("new.qcow2").exists(),
            "{words}"
        );
        if qemu_img().is_some() {
            assert_eq!(workdir.qemu_img(words).code, 1, "{words}");
        }
    }
}

#[test]
fn several_inputs_are_compressed_whatever_their_lengths() {
    let workdir = Workdir::new();
    let lens = [100_001, 70_000, 0, 512, 65_536, 131_072, 3];
    let mut want = Vec::new();
    let mut names = String::new();
    for (number, len) in lens.into_iter().enumerate() {
        let mut bytes = pattern(number as u64, 0, len);
        bytes[len / 3..len / 2].fill(0);
        want.extend_from_slice(&bytes);
        workdir.write(&format!("{number}.raw"), &bytes);
        names += &format!(" {number}.raw");
    }
    want.resize(want.len().next_multiple_of(512), 0);
    workdir.write("want.raw", &want);
    for switches in [
        "",
        "-m 1",
        "-W -m 16",
        "-S 0",
        "-o cluster_size=512",
        "-o cluster_size=2M",
        "-o compression_type=zstd,extended_l2=on",
    ] {
        workdir.must(&format!("convert -c {switches} -f raw -O qcow2{names} out.qcow2"));
        shows_the_same(&workdir, "out.qcow2", switches);
        if qemu_img().is_some() {
            workdir.must_qemu("compare -f qcow2 -F raw out.qcow2 want.raw");
        }
    }
}

/// The locks of a program that writes to a raw file, as QEMU takes them.
fn lock_as_writer(path: &Path) -> bds_io::File {
    let file = Fs::Host.open(path, &OpenOptions { write: true, ..Default::default() });
    let file = file.expect("it is there");
    for offset in [100, 101] {
        file.lock_shared(ByteLock { offset, len: 1 }).expect("locks work here");
    }
    file
}

#[test]
fn a_raw_file_that_is_written_by_another_program_is_not_copied() {
    let workdir = Workdir::new();
    workdir.write("x.raw", &pattern(1, 0, MIB));
    workdir.must("create -q -f qcow2 -b x.raw -F raw ov.qcow2");
    workdir.must("create -q -f qcow2 -o data_file=d.raw,data_file_raw=on d.qcow2 1M");
    let commands = [
        "convert -f raw -O raw x.raw o.raw",
        "convert -f qcow2 -O raw ov.qcow2 o.raw",
        "convert -f qcow2 -O raw d.qcow2 o.raw",
        "dd -f raw -O raw bs=64k if=x.raw of=o.raw",
        "dd -f qcow2 -O raw bs=64k if=ov.qcow2 of=o.raw",
    ];
    let writers = [
        lock_as_writer(&workdir.dir().join("x.raw")),
        lock_as_writer(&workdir.dir().join("d.raw")),
    ];
    for words in commands {
        let output = workdir.bds(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(output.stderr.contains("lock"), "{words}: {output:?}");
        assert!(!workdir.dir().join("o.raw").exists(), "{words}");
        workdir.must(&words.replace("convert", "convert -U").replace("dd -f", "dd -U -f"));
        std::fs::remove_file(workdir.dir().join("o.raw")).expect("-U copies");
    }
    // Who only looks does not mind.
    workdir.must("compare -f raw -F qcow2 x.raw ov.qcow2");
    drop(writers);
    for words in commands {
        workdir.must(words);
    }
}

#[test]
fn a_size_is_a_whole_number_of_bytes() {
    let workdir = Workdir::new();
    for size in ["93.1", "1.5", "0.9", "1.0", "1.5b", "0.1k", "1.0001M"] {
        let output = workdir.bds(&format!("create -q -f raw o {size}"));
        assert_eq!(output.code, 1, "{size}: {output:?}");
        assert!(output.stderr.contains(size) && output.stderr.contains("whole"), "{output:?}");
        assert!(!workdir.dir().join("o").exists(), "{size}");
        assert_eq!(workdir.bds(&format!("create -q -f raw -o size={size} o")).code, 1, "{size}");
    }
    for (size, bytes) in [("1.5k", 1536), ("0.25M", 262_144), ("93", 93), ("512b", 512)] {
        workdir.must(&format!("create -q -f raw o {size}"));
        assert_eq!(workdir.read("o").len(), bytes, "{size}");
    }
}

#[test]
fn a_copy_has_the_length_of_its_source_with_every_cache_mode() {
    let workdir = Workdir::new();
    for len in [10_000, 1, 512, 511, 4097, 600_001] {
        let bytes = pattern(1, 0, len);
        workdir.write("u.raw", &bytes);
        for mode in ["writeback", "writethrough", "unsafe", "none", "directsync"] {
            for n in ["", "-n"] {
                if n.is_empty() {
                    let _ = std::fs::remove_file(workdir.dir().join("o.raw"));
                } else {
                    workdir.write("o.raw", &vec![0xAA; len]);
                }
                let words = format!("convert {n} -t {mode} -f raw -O raw u.raw o.raw");
                let output = workdir.bds(&words);
                if output.stderr.contains("O_DIRECT") {
                    eprintln!("skipped: no O_DIRECT in the scratch directory");
                    continue;
                }
                assert!(output.ok(), "{words}: {output:?}");
                assert!(
                    workdir.read("o.raw") == bytes,
                    "{len} {words}: {}",
                    workdir.read("o.raw").len()
                );
            }
        }
    }
}

#[test]
fn a_truncated_image_is_not_copied_as_zeros() {
    let workdir = Workdir::new();
    workdir.write("src.raw", &pattern(1, 0, MIB));
    for options in ["compat=1.1", "compat=0.10", "cluster_size=4k", "extended_l2=on"] {
        workdir.must(&format!("convert -f raw -O qcow2 -o {options} src.raw i.qcow2"));
        let whole = workdir.read("i.qcow2");
        for cut in [whole.len() / 2, whole.len() - 200_000, 327_680, 400_000] {
            workdir.write("c.qcow2", &whole[..cut]);
            assert_eq!(workdir.bds("check -q c.qcow2").code, 2, "{options} {cut}");
            let output = workdir.bds("convert -f qcow2 -O raw c.qcow2 out.raw");
            assert_eq!(output.code, 1, "{options} {cut}: {output:?}");
            let salvaged = workdir.must("convert --salvage -f qcow2 -O raw c.qcow2 out.raw");
            assert!(salvaged.stderr.contains("become zeros"), "{options} {cut}: {salvaged:?}");
            let (out, src) = (workdir.read("out.raw"), workdir.read("src.raw"));
            // The sector in which the file ends may be kept in part.
            let is_kept = |(out, src): (&u8, &u8)| out == src || *out == 0;
            assert!(out.len() == src.len() && out.iter().zip(&src).all(is_kept), "{options} {cut}");
            // At 320 KiB the data of an image with clusters of 64 KiB begins.
            let keeps_something = cut <= 327_680 || out.iter().any(|byte| *byte != 0);
            assert!(keeps_something, "{options} {cut}: what is there is kept");
        }
    }
}
