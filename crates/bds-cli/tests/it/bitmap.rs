//! Compares the verb `bitmap` with qemu-img's: the same commands leave the same bitmaps, bit for
//! bit, whichever tool ran them, and fail with the same words.

use bds_testkit::{Chance, Output, bitmap_sums, qemu_img, qemu_io, tool};
use serde_json::{Value, json};

use crate::workdir::Workdir;

/// Two equal images, `ours` and `theirs`, and others to merge from; `None` without QEMU's tools.
fn workdir() -> Option<Workdir> {
    let io = qemu_io()?;
    qemu_img()?;
    tool("qemu-storage-daemon")?;
    let workdir = Workdir::new();
    for words in [
        "create -q -f qcow2 ours.qcow2 4M",
        "bitmap --add -g 4k ours.qcow2 b0",
        "bitmap --add ours.qcow2 b1",
        "create -q -f qcow2 source.qcow2 4M",
        "bitmap --add -g 512 source.qcow2 s0",
        "create -q -f qcow2 longer.qcow2 8M",
        "bitmap --add longer.qcow2 s0",
        "create -q -f qcow2 -o compat=v2 old.qcow2 1M",
        "create -q -f raw plain.raw 1M",
    ] {
        workdir.must_qemu(words);
    }
    let file = |name: &str| workdir.dir().join(name).to_string_lossy().into_owned();
    io.must(["-f", "qcow2", "-c", "write 64k 12k", "-c", "write 3M 100k", &file("ours.qcow2")]);
    io.must(["-f", "qcow2", "-c", "write 1M 512", "-c", "write 2M 1M", &file("source.qcow2")]);
    let bytes = workdir.read("ours.qcow2");
    workdir.write("theirs.qcow2", &bytes);
    Some(workdir)
}

/// The list of bitmaps as `info` prints it, and the sums of their bits.
fn bitmaps(workdir: &Workdir, image: &str) -> (Value, Vec<String>) {
    let info = workdir.must_qemu(&format!("info --output=json {image}")).json();
    let list = info["format-specific"]["data"]["bitmaps"].clone();
    let names: Vec<&str> =
        list.as_array().into_iter().flatten().filter_map(|b| b["name"].as_str()).collect();
    let sums = bitmap_sums(&workdir.dir().join(image), &names);
    (list, sums)
}

/// An error without the program's name, the image's, and generated names of nodes.
fn plain(output: &Output) -> String {
    let text = output.stderr.trim().replace("theirs.qcow2", "ours.qcow2");
    let text = text.trim_start_matches("qemu-img: ").trim_start_matches("bds: ");
    let mut words: Vec<&str> = text.split(' ').collect();
    for word in &mut words {
        if word.contains("#block") {
            *word = "NODE";
        }
    }
    words.join(" ")
}

#[test]
fn commands_have_the_effects_and_errors_of_qemu_img() {
    let Some(workdir) = workdir() else { return };
    for words in [
        "",
        "%",
        "% b0",
        "--add %",
        "--add % b0 extra",
        "--add % b0",
        "--add -g 100 % b2",
        "--add -g 3k % b2",
        "--add -g 4G % b2",
        "--add -g 0 % b2",
        "--add -g 2G % b3",
        "-g 4k --clear % b0",
        "-b source.qcow2 --clear % b0",
        "-F qcow2 --clear % b0",
        "--remove % nope",
        "--clear % nope",
        "--enable % nope",
        "--disable % nope",
        "--merge nope % b0",
        "--merge b0 % nope",
        "--merge nope -b source.qcow2 % b0",
        "--merge s0 -b longer.qcow2 % b0",
        "--merge b0 % b1",
        "--merge b0 % b0",
        "--merge s0 -b source.qcow2 -F qcow2 % b1",
        "--merge s0 --source-file source.qcow2 % b0",
        "--add --disable % d0",
        "--add --merge b0 --disable % d1",
        "--enable --disable --add % zz",
        "--add --merge b1 --merge nope % d2",
        "--disable --clear % b0",
        "--enable -f qcow2 % b0",
        "--clear --enable --remove % d2",
        "--remove --add -g 1M % b1",
        "--add --granularity 64k --merge s0 -b source.qcow2 % b4",
        "--add --image-opts driver=qcow2,file.filename=% b5",
        "--clear --merge b0 --clear --merge b4 % b1",
        "--remove % b0",
        "--remove % b1",
    ] {
        let theirs =
            workdir.qemu_img(format!("bitmap {}", words.replace('%', "theirs.qcow2")).trim_end());
        let ours = workdir.bds(&format!("bitmap {}", words.replace('%', "ours.qcow2")));
        assert_eq!(ours.code, theirs.code, "{words}\n{ours:?}\n{theirs:?}");
        assert_eq!(plain(&ours), plain(&theirs), "{words}");
        assert_eq!(ours.stdout, theirs.stdout, "{words}");
        assert_eq!(bitmaps(&workdir, "ours.qcow2"), bitmaps(&workdir, "theirs.qcow2"), "{words}");
        workdir.must_qemu("check -q ours.qcow2");
    }
    // QEMU cannot keep bitmaps of raw images; here that is so if the user says so.
    let off =
        "--add --image-opts driver=raw,bitmap-file=off,file.driver=file,file.filename=plain.raw b";
    for (words, ours) in [("--add old.qcow2 b", None), ("--add -f raw plain.raw b", Some(off))] {
        let theirs = workdir.qemu_img(&format!("bitmap {words}"));
        let ours = workdir.bds(&format!("bitmap {}", ours.unwrap_or(words)));
        assert_eq!((ours.code, plain(&ours)), (theirs.code, plain(&theirs)), "{words}");
    }
}

/// Bitmaps of a raw image: all verbs, shown by `info`, copied to and from qcow2 images, counted.
#[test]
fn raw_images_have_bitmaps_in_a_file_beside_them() {
    let workdir = Workdir::new();
    workdir.must("create -q -f raw disk.raw 4M");
    assert!(!workdir.must("info -f raw disk.raw").stdout.contains("Bitmaps"));
    workdir.must("bitmap --add -g 64k -f raw disk.raw daily");
    workdir.must("bench -q -w -f raw -c 1 -s 4096 -o 131072 --pattern 1 disk.raw");
    workdir.must("bitmap --add -g 4k -f raw disk.raw weekly");
    workdir.must("bitmap --merge daily --disable -f raw disk.raw weekly");
    let known = |image: &str| -> Vec<Value> {
        let info = workdir.must(&format!("info --output=json {image}")).json();
        let inside = &info["format-specific"]["data"]["bitmaps"];
        let all = if inside.is_null() { &info["bitmap-log"] } else { inside };
        all.as_array().cloned().unwrap_or_default()
    };
    let both = [
        json!({"name": "daily", "granularity": 65536, "flags": ["auto"], "count": 65536}),
        json!({"name": "weekly", "granularity": 4096, "flags": [], "count": 65536}),
    ];
    assert_eq!(known("-f raw disk.raw"), both);
    let text = workdir.must("info -f raw disk.raw").stdout;
    assert!(text.contains("Bitmaps in the file beside the image:"), "{text}");
    let measured = workdir.must("measure -O qcow2 -f raw disk.raw").stdout;
    assert!(measured.contains("bitmaps size: ") && !measured.contains("size: 0"), "{measured}");
    // Into the image, where QEMU finds them, and out of it.
    workdir.must("convert --bitmaps -f raw -O qcow2 disk.raw disk.qcow2");
    let without_count = both.clone().map(|mut bitmap| {
        bitmap.as_object_mut().unwrap().remove("count");
        bitmap
    });
    assert_eq!(known("disk.qcow2"), without_count);
    workdir.must("convert --bitmaps -O raw disk.qcow2 back.raw");
    assert_eq!(known("-f raw back.raw"), both);
    // The last one takes the file along.
    workdir.must("bitmap --clear -f raw disk.raw daily");
    assert_eq!(known("-f raw disk.raw")[0]["count"], 0);
    workdir.must("bitmap --remove -f raw disk.raw weekly");
    assert!(workdir.dir().join("disk.raw.bds-cbt").exists());
    workdir.must("bitmap --remove -f raw disk.raw daily");
    assert!(!workdir.dir().join("disk.raw.bds-cbt").exists());
    let gone = workdir.bds("bitmap --clear -f raw disk.raw daily");
    assert!(gone.code == 1 && gone.stderr.contains("Dirty bitmap 'daily' not found"), "{gone:?}");
}

/// Each command is run by the one tool on the one image and by the other on the other, in turn, so
/// that each goes on with what the other wrote.
#[test]
fn both_tools_take_turns() {
    let Some(workdir) = workdir() else { return };
    let io = qemu_io().expect("it was there");
    let mut chance = Chance::new(7);
    let mut names = vec!["b0".to_owned(), "b1".to_owned()];
    for turn in 0..60_u64 {
        let name = names[usize::try_from(chance.below(names.len() as u64)).unwrap_or(0)].clone();
        let other = names[usize::try_from(chance.below(names.len() as u64)).unwrap_or(0)].clone();
        let words = match chance.below(8) {
            0 if names.len() < 6 => {
                names.push(format!("n{turn}"));
                format!("--add -g {} % n{turn}", 512 << chance.below(10))
            }
            1 if names.len() > 1 => {
                names.retain(|kept| *kept != name);
                format!("--remove % {name}")
            }
            2 if chance.one_in(2) => format!("--clear % {name}"),
            3 => format!("--disable % {name}"),
            4 => format!("--enable % {name}"),
            5 => format!("--merge s0 -b source.qcow2 % {name}"),
            _ => format!("--merge {other} % {name}"),
        };
        let (mine, yours) = if turn % 2 == 0 { ("ours", "theirs") } else { ("theirs", "ours") };
        workdir.must(&format!("bitmap {}", words.replace('%', &format!("{mine}.qcow2"))));
        workdir.must_qemu(&format!("bitmap {}", words.replace('%', &format!("{yours}.qcow2"))));
        let write = format!("write {} {}", chance.below(8000) * 512, (1 + chance.below(30)) * 512);
        for image in ["ours.qcow2", "theirs.qcow2"] {
            let path = workdir.dir().join(image).to_string_lossy().into_owned();
            io.must(["-f", "qcow2", "-c", &write, &path]);
            workdir.must_qemu(&format!("check -q {image}"));
        }
        assert_eq!(bitmaps(&workdir, "ours.qcow2"), bitmaps(&workdir, "theirs.qcow2"), "{words}");
    }
}

/// Verbs that write keep bitmaps in step, as QEMU's do.
#[test]
fn what_other_verbs_write_is_recorded() {
    let Some(workdir) = workdir() else { return };
    workdir.must_qemu("bitmap --disable ours.qcow2 b0");
    workdir.must_qemu("bitmap --disable theirs.qcow2 b0");
    workdir.write("new.raw", &vec![0x5a; 4 << 20]);
    for words in [
        "bench -w -c 16 -d 4 -s 4k -o 1M -f qcow2 -q %.qcow2",
        "convert -n -f raw -O qcow2 new.raw %.qcow2",
    ] {
        let theirs = workdir.qemu_img(&words.replace('%', "theirs"));
        let ours = workdir.bds(&words.replace('%', "ours"));
        assert_eq!(ours.code, theirs.code, "{words}: {ours:?} {theirs:?}");
        assert_eq!(bitmaps(&workdir, "ours.qcow2"), bitmaps(&workdir, "theirs.qcow2"), "{words}");
        workdir.must_qemu("check -q ours.qcow2");
        let (ours, theirs) =
            (workdir.must("info ours.qcow2").stdout, workdir.must_qemu("info ours.qcow2").stdout);
        let of = |text: &str| {
            text.split("bitmaps:").nth(1).map(|t| t.split("refcount").next().map(str::to_owned))
        };
        assert_eq!(of(&ours), of(&theirs));
    }
    // A longer disk: QEMU leaves the new part clean, here what records it has it dirty.
    workdir.must("resize -q ours.qcow2 6M");
    workdir.must_qemu("resize -q theirs.qcow2 6M");
    workdir.must_qemu("check -q ours.qcow2");
    let (ours, theirs) = (bitmaps(&workdir, "ours.qcow2"), bitmaps(&workdir, "theirs.qcow2"));
    assert_eq!((ours.0, &ours.1[0]), (theirs.0, &theirs.1[0]));
}

/// `convert --bitmaps` copies them, whichever of its other options are given.
#[test]
fn converted_images_have_the_same_bitmaps() {
    let Some(workdir) = workdir() else { return };
    workdir.must_qemu("bitmap --add --disable ours.qcow2 off");
    workdir.must_qemu("bitmap --merge b0 ours.qcow2 off");
    for words in [
        "convert --bitmaps -O qcow2 ours.qcow2 %.qcow2",
        "convert --bitmaps -c -O qcow2 -o cluster_size=4k ours.qcow2 %.qcow2",
        "convert --bitmaps -O qcow2 -o preallocation=metadata ours.qcow2 %.qcow2",
        "convert --bitmaps -n -O qcow2 source.qcow2 %.qcow2",
        "convert --bitmaps -O qcow2 old.qcow2 %.qcow2",
        "convert --bitmaps -O qcow2 -o compat=v2 ours.qcow2 %.qcow2",
        "convert --bitmaps -O qcow2 ours.qcow2 source.qcow2 %.qcow2",
        "convert --skip-broken-bitmaps -O qcow2 ours.qcow2 %.qcow2",
        "convert --bitmaps -O qcow2 ours.qcow2 %.qcow2",
        "convert --bitmaps -n -O qcow2 ours.qcow2 %.qcow2",
    ] {
        let theirs = workdir.qemu_img(&words.replace('%', "b"));
        let ours = workdir.bds(&words.replace('%', "a"));
        assert_eq!(ours.code, theirs.code, "{words}\n{ours:?}\n{theirs:?}");
        let is_same_text = words.contains("compat=v2") || words.contains("-n");
        if ours.ok() {
            assert_eq!(bitmaps(&workdir, "a.qcow2"), bitmaps(&workdir, "b.qcow2"), "{words}");
            workdir.must_qemu("check -q a.qcow2");
            let source = if words.contains("source") { "source.qcow2" } else { "ours.qcow2" };
            workdir.must_qemu(&format!("compare -q {source} a.qcow2"));
        } else if !is_same_text {
            let (ours, theirs) = (plain(&ours), plain(&theirs));
            assert!(ours.starts_with(theirs.as_str()), "{words}\n{ours}\n{theirs}");
        }
    }
}

/// One that is inconsistent is in the way, or left out.
#[test]
fn broken_bitmaps_are_refused_or_skipped() {
    let Some(workdir) = workdir() else { return };
    let mut bytes = workdir.read("ours.qcow2");
    let magic = 0x2385_2875_u32.to_be_bytes();
    let at = bytes.windows(4).position(|four| four == magic).expect("it has bitmaps");
    let directory = u64::from_be_bytes(bytes[at + 24..at + 32].try_into().expect("8 bytes"));
    // The flags of the first.
    bytes[usize::try_from(directory).expect("in memory") + 15] |= 1;
    workdir.write("ours.qcow2", &bytes);
    let refused = workdir.bds("convert --bitmaps -O qcow2 ours.qcow2 a.qcow2");
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("Cannot copy inconsistent bitmap 'b0'"), "{refused:?}");
    assert!(!workdir.dir().join("a.qcow2").exists());
    let words = "convert --bitmaps --skip-broken-bitmaps -O qcow2 ours.qcow2";
    let ours = workdir.must(&format!("{words} a.qcow2"));
    let theirs = workdir.must_qemu(&format!("{words} b.qcow2"));
    assert_eq!(plain(&ours), plain(&theirs));
    assert_eq!(bitmaps(&workdir, "a.qcow2"), bitmaps(&workdir, "b.qcow2"));
    // They are counted, and can be removed.
    let measured = |output: Output| output.json();
    let words = "measure -O qcow2 --output=json ours.qcow2";
    assert_eq!(measured(workdir.must(words)), measured(workdir.must_qemu(words)));
    workdir.must("bitmap --remove ours.qcow2 b0");
    workdir.must_qemu("check -q ours.qcow2");
}

#[test]
fn measure_counts_bitmaps() {
    let Some(workdir) = workdir() else { return };
    for words in [
        "measure -O qcow2 ours.qcow2",
        "measure -O qcow2 --output=json source.qcow2",
        "measure -O qcow2 -o cluster_size=512 source.qcow2",
        "measure -O qcow2 -o compat=0.10 ours.qcow2",
        "measure -O qcow2 old.qcow2",
        "measure -O qcow2 longer.qcow2",
        "measure -O qcow2 -f raw plain.raw",
        "measure -O raw ours.qcow2",
        "measure -O qcow2 --size 1G",
    ] {
        let (theirs, ours) = (workdir.must_qemu(words), workdir.must(words));
        match words.contains("json") {
            true => assert_eq!(ours.json(), theirs.json(), "{words}"),
            false => assert_eq!(ours.stdout, theirs.stdout, "{words}"),
        }
    }
}
