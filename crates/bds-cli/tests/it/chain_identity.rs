//! Overlays remember what their backing file held: a wrong file under the right name is refused,
//! what is not known is not, and QEMU takes our images as they are.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use bds_testkit::pattern;

use crate::programs::Tools;
use crate::workdir::Workdir;

const LEN: usize = 4 << 20;

fn workdir() -> Workdir {
    let workdir = Workdir::new();
    for (name, seed) in [("a", 1), ("b", 2)] {
        workdir.write(&format!("{name}.raw"), &pattern(seed, 0, LEN));
        workdir.must(&format!("convert -f raw -O qcow2 {name}.raw {name}.qcow2"));
    }
    std::fs::copy(workdir.dir().join("a.qcow2"), workdir.dir().join("base.qcow2")).expect("copied");
    workdir.must("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    workdir
}

fn replace_base(workdir: &Workdir, name: &str) {
    workdir.write("base.qcow2", &workdir.read(name));
}

#[test]
fn another_image_under_the_name_of_the_base_is_refused() {
    let workdir = workdir();
    workdir.must("compare -q top.qcow2 a.qcow2");
    replace_base(&workdir, "b.qcow2");
    let refused = workdir.bds("convert -O raw top.qcow2 out.raw");
    assert_eq!(refused.code, 1, "{refused:?}");
    for words in ["top.qcow2", "'base.qcow2' is not what this overlay was made on", "-U"] {
        assert!(refused.stderr.contains(words), "{words}: {}", refused.stderr);
    }
    workdir.must("convert -U -O raw top.qcow2 out.raw");
    let options = "driver=qcow2,file.filename=top.qcow2,backing-check=off";
    workdir.must(&format!("convert --image-opts -O raw {options} out.raw"));
    // Of no use to find out what is wrong, if it were refused here.
    workdir.must("info top.qcow2");
    replace_base(&workdir, "a.qcow2");
    workdir.must("compare -q top.qcow2 a.qcow2");
}

#[test]
fn a_base_that_was_written_to_is_named_as_such() {
    let workdir = workdir();
    workdir.must("bench -w -c 1 -s 4096 -o 1M --pattern 7 base.qcow2");
    let refused = workdir.bds("convert -O raw top.qcow2 out.raw");
    assert!(
        refused.stderr.contains("it was written to after this overlay was made"),
        "{}",
        refused.stderr
    );
}

#[test]
fn a_commit_and_a_stream_keep_the_chain_together() {
    let workdir = workdir();
    workdir.must("bench -w -c 1 -s 4096 -o 0 --pattern 7 top.qcow2");
    workdir.must("create -q -f qcow2 -b top.qcow2 -F qcow2 third.qcow2");
    workdir.must("commit -q top.qcow2");
    workdir.must("convert -O raw third.qcow2 out.raw");
    let mut expected = pattern(1, 0, LEN);
    expected[..4096].fill(7);
    assert!(workdir.read("out.raw") == expected);
    // The base was changed by the commit, and the image notes what it holds now.
    replace_base(&workdir, "b.qcow2");
    assert_eq!(workdir.bds("convert -O raw top.qcow2 out.raw").code, 1);
    replace_base(&workdir, "a.qcow2");
    assert_eq!(workdir.bds("convert -O raw top.qcow2 out.raw").code, 1, "not the old one either");

    let workdir = self::workdir();
    workdir.must("create -q -f qcow2 -b top.qcow2 -F qcow2 third.qcow2");
    workdir.must("stream -q -b base.qcow2 third.qcow2");
    workdir.must("compare -q third.qcow2 a.qcow2");
    replace_base(&workdir, "b.qcow2");
    assert_eq!(workdir.bds("convert -O raw third.qcow2 out.raw").code, 1);
}

/// The base has changed where samples are taken, and the chain is right all the same.
#[test]
fn a_commit_that_was_killed_leaves_a_chain_that_opens() {
    let workdir = Workdir::new();
    workdir.write("base.raw", &vec![0; 64 << 20]);
    workdir.must("create -q -f qcow2 -b base.raw -F raw top.qcow2");
    workdir.write("data.raw", &pattern(1, 0, 64 << 20));
    workdir.must("convert -n -f raw -O qcow2 data.raw top.qcow2");
    let mut command = workdir.command(&["commit", "-p", "--output=json", "-r", "1M", "top.qcow2"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("bds starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let has_copied = |line: String| {
        let event: serde_json::Value = serde_json::from_str(&line).expect("an event a line");
        event["event"] == "BDS_JOB_PROGRESS" && event["data"]["offset"].as_u64() > Some(0)
    };
    assert!(lines.map(|line| line.expect("UTF-8")).any(has_copied), "it shows its progress");
    child.kill().expect("it is ours");
    assert!(!child.wait().expect("ours").success(), "it was killed on its way");
    assert!(workdir.read("base.raw")[..4096] == pattern(1, 0, 4096), "the base holds some of it");
    workdir.must("convert -O raw top.qcow2 out.raw");
    assert!(workdir.read("out.raw") == workdir.read("data.raw"));
}

/// Copies of a whole chain, another name for the base, and a base that grew are honest.
#[test]
fn a_chain_may_move_and_its_base_may_grow_and_get_another_name() {
    let workdir = workdir();
    std::fs::create_dir(workdir.dir().join("moved")).expect("scratch is writable");
    for name in ["base.qcow2", "top.qcow2"] {
        workdir.write(&format!("moved/{name}"), &workdir.read(name));
    }
    workdir.must("compare -q moved/top.qcow2 a.qcow2");
    workdir.must("resize -q moved/base.qcow2 +1M");
    workdir.must("compare -q moved/top.qcow2 a.qcow2");
    // Another format and another name, the same content.
    workdir.must("convert -O raw base.qcow2 renamed.raw");
    let options = "driver=qcow2,file.filename=top.qcow2,backing.driver=raw,\
                   backing.file.filename=renamed.raw";
    workdir.must(&format!("convert --image-opts -O raw {options} out.raw"));
    assert!(workdir.read("out.raw") == pattern(1, 0, LEN));
}

/// QEMU reads our overlays, and drops the note by opening one for writing.
#[test]
fn qemu_takes_overlays_with_a_note() {
    let Some(tools) = Tools::find() else { return };
    let workdir = workdir();
    let path = |name: &str| workdir.dir().join(name);
    let text = |name: &str| path(name).to_str().expect("UTF-8").to_owned();
    workdir.must_qemu("check -q top.qcow2");
    workdir.must_qemu("compare -q top.qcow2 a.qcow2");
    // A reader keeps the note, and so does our own writer.
    workdir.must("bench -w -c 1 -s 4096 -o 0 --pattern 7 top.qcow2");
    replace_base(&workdir, "b.qcow2");
    assert_eq!(workdir.bds("convert -O raw top.qcow2 out.raw").code, 1);
    replace_base(&workdir, "a.qcow2");
    let kept = workdir.read("top.qcow2").windows(4).any(|bytes| bytes == b"bdsb");
    assert!(kept);
    // QEMU may have committed into the base: nothing is known then.
    tools.io.must(["-f", "qcow2", "-c", "write -P 9 64k 4k", &text("top.qcow2")]);
    replace_base(&workdir, "b.qcow2");
    workdir.must("convert -O raw top.qcow2 out.raw");
    workdir.must_qemu("check -q top.qcow2");
    // It keeps extensions that it does not know: without the bit they say nothing.
    let bytes = workdir.read("top.qcow2");
    assert!(bytes.windows(4).any(|bytes| bytes == b"bdsb"));
    assert_eq!(bytes[88] & 0x20, 0);
    // A commit by QEMU changes the base, and the chain stays usable.
    replace_base(&workdir, "a.qcow2");
    workdir.must("create -q -f qcow2 -b base.qcow2 -F qcow2 other.qcow2");
    tools.io.must(["-f", "qcow2", "-c", "write -P 9 0 64k", &text("other.qcow2")]);
    workdir.must_qemu("commit -q other.qcow2");
    workdir.must("convert -O raw other.qcow2 out.raw");
}

/// Verbs of qemu-img that rewrite the header: the extension stays, its bit does not.
#[test]
fn verbs_of_qemu_img_drop_the_note_and_keep_the_image() {
    if Tools::find().is_none() {
        return;
    }
    for (verb, is_dropped) in [
        ("info top.qcow2", false),
        ("check -q top.qcow2", false),
        ("map top.qcow2", false),
        ("amend -f qcow2 -o lazy_refcounts=on top.qcow2", true),
        ("rebase -q -u -f qcow2 -b base.qcow2 -F qcow2 top.qcow2", true),
        ("snapshot -c one top.qcow2", true),
        ("resize -q top.qcow2 +1M", true),
        ("bitmap --add top.qcow2 changes", true),
    ] {
        let workdir = workdir();
        workdir.must_qemu(verb);
        let bytes = workdir.read("top.qcow2");
        assert_eq!(bytes[88] & 0x20 == 0, is_dropped, "{verb}");
        assert!(bytes[..65536].windows(4).any(|bytes| bytes == b"bdsb"), "{verb}");
        replace_base(&workdir, "b.qcow2");
        let opened = workdir.bds("convert -O raw top.qcow2 out.raw");
        assert_eq!(opened.code, i32::from(!is_dropped), "{verb}: {opened:?}");
        workdir.must_qemu("check -q top.qcow2");
    }
}
