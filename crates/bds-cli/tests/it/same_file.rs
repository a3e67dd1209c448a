//! Tests that no verb writes to a file that it reads, by whatever path: it is refused before a byte
//! is changed.

use std::os::unix::fs::symlink;
use std::process::Command;

use bds_testkit::pattern;

use crate::workdir::{LoopDevice, Workdir};

const LEN: usize = 1 << 20;

/// A raw disk under four names, an image with an external data file, a chain of three.
fn workdir() -> Workdir {
    let workdir = Workdir::new();
    workdir.write("a.raw", &pattern(1, 0, LEN));
    symlink("a.raw", workdir.dir().join("soft")).expect("scratch has links");
    std::fs::hard_link(workdir.dir().join("a.raw"), workdir.dir().join("hard"))
        .expect("and hard ones");
    for words in [
        "convert -f raw -O qcow2 -o data_file=d.raw,data_file_raw=on a.raw d.qcow2",
        "convert -f raw -O raw a.raw base.raw",
        "create -q -f qcow2 -b base.raw -F raw mid.qcow2",
        "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
    ] {
        workdir.must(words);
    }
    workdir
}

const FILES: [&str; 6] = ["a.raw", "d.raw", "d.qcow2", "base.raw", "mid.qcow2", "top.qcow2"];

/// Runs a command that must be refused, with all files as they were and none added.
#[track_caller]
fn refused(workdir: &Workdir, words: &str) {
    let before: Vec<Vec<u8>> = FILES.iter().map(|name| workdir.read(name)).collect();
    let count = || std::fs::read_dir(workdir.dir()).expect("it is there").count();
    let files = count();
    let output = workdir.bds(words);
    assert_eq!(output.code, 1, "{words}: {output:?}");
    assert!(output.stderr.contains("destroy"), "{words}: {output:?}");
    for (name, bytes) in FILES.iter().zip(before) {
        assert!(workdir.read(name) == bytes, "{words}: {name} was changed");
    }
    assert_eq!(count(), files, "{words}: something is left behind");
}

#[test]
fn an_input_is_refused_as_output_by_any_path() {
    let workdir = workdir();
    workdir.write("b.raw", &pattern(2, 0, LEN));
    let absolute = workdir.dir().join("a.raw").display().to_string();
    for name in ["a.raw", "./a.raw", "soft", "hard", "file:a.raw", &absolute] {
        for words in [
            "convert -f raw -O raw a.raw",
            "convert -n -f raw -O raw a.raw",
            "convert -n -W -m 16 -f raw -O raw a.raw",
            "convert -f raw -O qcow2 a.raw",
            "convert -f raw -O raw b.raw a.raw b.raw",
            "convert -n -f raw -O raw -S 0 a.raw b.raw",
            "convert -U -n -f raw -O raw a.raw",
            "convert -n -O raw json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"hard\"}}",
            "convert --image-opts -O raw driver=raw,file.driver=file,file.filename=soft",
        ] {
            refused(&workdir, &format!("{words} {name}"));
        }
        refused(&workdir, &format!("dd -f raw -O raw bs=64k if=a.raw of={name}"));
        refused(&workdir, &format!("dd -f raw -O qcow2 if=soft of={name}"));
        refused(
            &workdir,
            &format!(
                "convert -n -f raw --target-image-opts a.raw driver=raw,file.driver=file,file.filename={}",
                name.trim_start_matches("file:")
            ),
        );
    }
}

#[test]
fn a_descriptor_of_an_input_is_refused_as_output() {
    let workdir = workdir();
    for (redirection, name) in [("5<>a.raw", "/dev/fd/5"), ("5<>a.raw", "/proc/self/fd/5")] {
        for verb in ["convert -f raw -O raw a.raw", "convert -n -f raw -O raw a.raw"] {
            let script = format!("exec {redirection}; exec \"$0\" {verb} {name}");
            let mut command = Command::new("sh");
            command.args(["-c", &script, env!("CARGO_BIN_EXE_bds")]).current_dir(workdir.dir());
            let output = command.output().expect("sh runs");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && errors.contains("destroy"), "{name}: {errors}");
            assert!(workdir.read("a.raw") == pattern(1, 0, LEN), "{verb} {name}");
        }
    }
}

#[test]
fn every_file_of_the_sources_chain_is_refused_as_output() {
    let workdir = workdir();
    for n in ["", "-n"] {
        refused(&workdir, &format!("convert {n} -f qcow2 -O raw d.qcow2 d.raw"));
        refused(&workdir, &format!("convert {n} -f qcow2 -O raw top.qcow2 base.raw"));
        refused(&workdir, &format!("convert {n} -f qcow2 -O raw top.qcow2 mid.qcow2"));
        refused(&workdir, &format!("convert {n} -f qcow2 -O qcow2 mid.qcow2 mid.qcow2"));
    }
    // What is written is not only the file that is named.
    refused(&workdir, "convert -n -f raw -O qcow2 d.raw d.qcow2");
    refused(&workdir, "convert -f raw -O qcow2 -o data_file=a.raw a.raw new.qcow2");
    refused(&workdir, "convert -f qcow2 -O qcow2 -o data_file=base.raw top.qcow2 new.qcow2");
    refused(&workdir, "dd -f qcow2 -O raw if=top.qcow2 of=base.raw");
    // Above its own backing image a copy is what an overlay is for.
    workdir.must("convert -n -f raw -O qcow2 base.raw top.qcow2");
    workdir.must("compare -f raw -F qcow2 base.raw top.qcow2");
}

#[test]
fn a_new_image_is_not_made_in_a_file_of_its_own_chain() {
    let workdir = workdir();
    for u in ["", "-u"] {
        for file in ["base.raw", "mid.qcow2", "top.qcow2"] {
            refused(&workdir, &format!("create {u} -q -f qcow2 -b top.qcow2 -F qcow2 {file} 1M"));
            let data = format!("-o data_file={file}");
            refused(
                &workdir,
                &format!("create {u} -q -f qcow2 -b top.qcow2 -F qcow2 {data} new 1M"),
            );
            refused(
                &workdir,
                &format!("create {u} -q -f qcow2 -b top.qcow2 -F qcow2 {data} {file} 1M"),
            );
        }
        refused(&workdir, &format!("create {u} -q -f qcow2 -b hard -F raw soft 1M"));
        refused(&workdir, &format!("create {u} -q -f qcow2 -b d.qcow2 -F qcow2 d.raw 1M"));
    }
    refused(&workdir, "create -q -f qcow2 -o data_file=new new 1M");
    refused(&workdir, "convert -f raw -O qcow2 -B base.raw -F raw a.raw base.raw");
    refused(&workdir, "convert -f raw -O qcow2 -B top.qcow2 -F qcow2 a.raw base.raw");
}

#[test]
fn a_drawing_is_not_written_over_the_image() {
    let workdir = workdir();
    for file in ["top.qcow2", "./base.raw", "mid.qcow2"] {
        refused(&workdir, &format!("graph --write-to {file} top.qcow2"));
    }
    workdir.must("graph --write-to drawing top.qcow2");
}

#[test]
fn a_device_is_compared_by_number_and_backing_file() {
    let workdir = workdir();
    let Some(device) = LoopDevice::new(&workdir, "a.raw", &[]) else {
        eprintln!("skipped: no loop devices here");
        return;
    };
    let name = device.name();
    symlink(name, workdir.dir().join("device")).expect("scratch has links");
    for n in ["", "-n"] {
        refused(&workdir, &format!("convert {n} -f raw -O raw {name} device"));
        refused(&workdir, &format!("convert {n} -f raw -O raw {name} a.raw"));
        refused(&workdir, &format!("convert {n} -f raw -O raw a.raw {name}"));
    }
    refused(&workdir, &format!("create -q -f qcow2 -b {name} -F raw a.raw 1M"));
    let Some(second) = LoopDevice::new(&workdir, "a.raw", &[]) else { return };
    refused(&workdir, &format!("convert -n -f raw -O raw {name} {}", second.name()));
}
