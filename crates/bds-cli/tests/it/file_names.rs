//! Tests file names on the command line: bytes that are not UTF-8, colons, working directories; and
//! files that hold no image.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use bds_testkit::{pattern, qemu_img};

use crate::workdir::Workdir;

/// Runs bds with words that may hold any bytes; `%` stands for the odd name.
#[track_caller]
fn must(workdir: &Workdir, words: &str, name: &[u8]) -> String {
    let word = |word: &str| -> OsString {
        let mut bytes = Vec::new();
        for (number, part) in word.split('%').enumerate() {
            if number > 0 {
                bytes.extend_from_slice(name);
            }
            bytes.extend_from_slice(part.as_bytes());
        }
        OsString::from_vec(bytes)
    };
    let args: Vec<OsString> = words.split(' ').map(word).collect();
    let output = workdir.command(&args).output().expect("bds runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn file_names_need_not_be_utf8() {
    let workdir = Workdir::new();
    workdir.write("s.raw", &pattern(1, 0, 256 << 10));
    for name in [b"\xff".as_slice(), b"a\xfe\xffb", b"gr\xfcn", b"\xc3"] {
        for words in [
            "convert -f raw -O qcow2 s.raw %.qcow2",
            "info %.qcow2",
            "info --output json --backing-chain %.qcow2",
            "check -q %.qcow2",
            "map %.qcow2",
            "map --output json %.qcow2",
            "measure -O raw %.qcow2",
            "compare -q -f raw -F qcow2 s.raw %.qcow2",
            "dd if=%.qcow2 of=%.dd",
            "bench -q -c 1 -f qcow2 %.qcow2",
            "graph %.qcow2",
            "resize -q -f qcow2 %.qcow2 1M",
            "create -f qcow2 -b %.qcow2 -F qcow2 %.top",
            "create -q -f qcow2 -o backing_file=%.qcow2,backing_fmt=qcow2 %.top",
            "info --backing-chain %.top",
            "compare -q -f qcow2 -F qcow2 %.top %.qcow2",
            "convert -O qcow2 -B %.qcow2 -F qcow2 %.top %.copy",
            "compare -q -f qcow2 -F qcow2 %.copy %.qcow2",
            "create -q -f qcow2 -o data_file=%.data %.ext 1M",
            "bench -q -w -c 2 -s 4096 -f qcow2 %.ext",
            "check -q %.ext",
            "info --image-opts driver=qcow2,file.filename=%.qcow2",
        ] {
            must(&workdir, words, name);
        }
        let mut data = name.to_vec();
        data.extend_from_slice(b".data");
        assert!(workdir.dir().join(OsStr::from_bytes(&data)).exists());
    }
}

/// Names in an image mean the same file to bds and to QEMU, and what is none to QEMU is none here.
#[test]
fn names_in_images_are_resolved_as_by_qemu() {
    if qemu_img().is_none() {
        return;
    }
    let workdir = Workdir::new();
    std::fs::create_dir(workdir.dir().join("sub")).expect("scratch is writable");
    workdir.must("create -q -f qcow2 -o data_file=ours.raw sub/ours.qcow2 1M");
    workdir.must_qemu("check -q sub/ours.qcow2");
    workdir.must_qemu("create -q -f qcow2 -o data_file=theirs.raw sub/theirs.qcow2 1M");
    workdir.must("check -q sub/theirs.qcow2");
    // A likely place, but no tool looks there: the error names the place.
    std::fs::rename(workdir.dir().join("theirs.raw"), workdir.dir().join("sub/theirs.raw"))
        .expect("ours");
    let output = workdir.bds("check -q sub/theirs.qcow2");
    assert!(output.stderr.contains("one beside the image only"), "{output:?}");

    workdir.must("create -q -f qcow2 base.qcow2 1M");
    workdir.must("create -q -f qcow2 ./a:b.qcow2 1M");
    for backing in ["a:b.qcow2", "nbd://host/x", "json:{'driver':'null-co'}"] {
        workdir.must_qemu(&format!("create -q -u -f qcow2 -b {backing} -F qcow2 colon.qcow2 1M"));
        let ours = workdir.bds("compare colon.qcow2 base.qcow2");
        assert!(ours.code == 2 && ours.stderr.contains("unknown protocol"), "{backing}: {ours:?}");
    }
    workdir.must_qemu("create -q -f qcow2 -b file:base.qcow2 -F qcow2 sub/typed.qcow2");
    workdir.must("compare sub/typed.qcow2 base.qcow2");
    workdir.must("create -q -f qcow2 -b ./a:b.qcow2 -F qcow2 plain.qcow2");
    workdir.must_qemu("compare plain.qcow2 base.qcow2");
}

/// Nothing that could wait for another process is opened as an image, and the error comes at once.
#[test]
fn special_files_are_refused_at_once() {
    let workdir = Workdir::new();
    workdir.write("x", &pattern(1, 0, 1 << 20));
    let made = Command::new("mkfifo").arg("fifo").current_dir(workdir.dir()).status();
    assert!(made.expect("mkfifo runs").success());
    std::fs::create_dir(workdir.dir().join("dir")).expect("scratch is writable");
    let _listener = UnixListener::bind(workdir.dir().join("socket")).expect("a socket");
    // The master side of a pseudo terminal is a terminal.
    for (file, words) in [
        ("fifo", "is a FIFO"),
        ("dir", "is a directory"),
        ("socket", "is a socket"),
        ("/dev/ptmx", "is a terminal"),
    ] {
        for command in [
            format!("info {file}"),
            format!("info -f raw {file}"),
            format!("convert -O raw {file} o.raw"),
            format!("convert -f raw -O raw {file} o.raw"),
            format!("dd if={file} of=o.raw"),
            format!("compare {file} x"),
            format!("measure -O raw {file}"),
            format!("check {file}"),
            format!("map {file}"),
            format!("bench -w -f raw {file}"),
            format!("resize -f raw {file} 1M"),
        ] {
            let args: Vec<&str> = command.split(' ').collect();
            let output = Command::new("timeout")
                .args(["-k", "1", "20", env!("CARGO_BIN_EXE_bds")])
                .args(&args)
                .current_dir(workdir.dir())
                .stdin(Stdio::null())
                .output()
                .expect("timeout runs");
            let code = output.status.code();
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            let wanted = if command.starts_with("compare") { 2 } else { 1 };
            assert_eq!(code, Some(wanted), "{command}: {stderr}");
            // A socket or directory cannot be opened for writing at all; the system's words say so
            // then.
            let is_named = stderr.contains(words)
                || stderr.contains("Is a directory")
                || stderr.contains("No such device");
            assert!(is_named, "{command}: {stderr}");
            assert!(!workdir.dir().join("o.raw").exists(), "{command}");
        }
    }
}

/// Also where a FIFO is named inside an image or for other purposes, and as an output.
#[test]
fn a_fifo_is_refused_wherever_it_is_named() {
    let workdir = Workdir::new();
    workdir.write("x", &pattern(1, 0, 1 << 20));
    let made = Command::new("mkfifo").arg("fifo").current_dir(workdir.dir()).status();
    assert!(made.expect("mkfifo runs").success());
    workdir.must("create -q -u -f qcow2 -b fifo -F raw raw-below.qcow2 1M");
    workdir.must("create -q -u -f qcow2 -b fifo -F qcow2 below.qcow2 1M");
    for command in [
        "convert -O raw raw-below.qcow2 o.raw",
        "convert -O raw below.qcow2 o.raw",
        "info --backing-chain below.qcow2",
        "create -f qcow2 -b fifo -F raw o.raw",
        "create -f raw fifo 1M",
        "convert -f raw -O qcow2 x fifo",
        "convert -n -f raw -O raw x fifo",
        "dd -f raw if=x of=fifo",
        "create -f qcow2 -o data_file=fifo o.raw 1M",
        "info --image-opts driver=raw,file.filename=fifo",
        "info --image-opts driver=raw,file.driver=host_device,file.filename=fifo",
        "info --image-opts driver=blkdebug,config=fifo,image.filename=x",
    ] {
        let args: Vec<&str> = command.split(' ').collect();
        let output = Command::new("timeout")
            .args(["-k", "1", "20", env!("CARGO_BIN_EXE_bds")])
            .args(&args)
            .current_dir(workdir.dir())
            .stdin(Stdio::null())
            .output()
            .expect("timeout runs");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{command}: {stderr}");
        assert!(stderr.contains("fifo") && stderr.contains("regular file"), "{command}: {stderr}");
        assert!(!workdir.dir().join("o.raw").exists(), "{command}");
    }
}

/// Each image of a chain takes one descriptor, also while the chain is being opened.
#[test]
fn a_chain_takes_one_descriptor_an_image() {
    let workdir = Workdir::new();
    workdir.must("create -q -f qcow2 0.qcow2 1M");
    for number in 1..100 {
        let below = number - 1;
        workdir.must(&format!("create -q -u -f qcow2 -b {below}.qcow2 -F qcow2 {number}.qcow2 1M"));
    }
    let line = "ulimit -n 130; exec \"$0\" map 99.qcow2";
    let output = Command::new("bash")
        .args(["-c", line, env!("CARGO_BIN_EXE_bds")])
        .current_dir(workdir.dir())
        .output()
        .expect("bash runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_error_names_a_file_once() {
    let workdir = Workdir::new();
    let mut random = vec![0; 4 << 20];
    let mut source = std::fs::File::open("/dev/urandom").expect("Linux has it");
    std::io::Read::read_exact(&mut source, &mut random).expect("random");
    workdir.write("big", &random);
    workdir.must("create -q -f qcow2 grows 8M");
    for command in [
        "convert -f raw -O raw big output",
        "convert -f raw -O qcow2 big output",
        "convert -c -f raw -O qcow2 big output",
        "dd -f raw -O qcow2 if=big of=output",
        "create -f raw -o preallocation=full output 4M",
        "info output",
        "info -f qcow2 output",
        "compare output grows",
    ] {
        // The same way as ENOSPC takes, without a file system of one's own.
        let output = Command::new("bash")
            .args([
                "-c",
                &format!("ulimit -f 1024; exec \"$0\" {command}"),
                env!("CARGO_BIN_EXE_bds"),
            ])
            .current_dir(workdir.dir())
            .output()
            .expect("bash runs");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{command}");
        // "the output is incomplete" is not its name.
        let count = stderr.replace("the output", "it").matches("output").count();
        assert_eq!(count, 1, "{command}: {stderr}");
    }
}
