//! Tests `mirror`: copies equal their source in every mode, events come in order, and what does not
//! complete leaves nothing behind.

use std::process::{Command, Stdio};
use std::time::Duration;

use bds_testkit::{pattern, qemu_img};
use serde_json::Value;

use crate::workdir::Workdir;

const LEN: usize = 4 << 20;

/// A base with data, and an overlay with other data, zeros above data, and holes.
fn workdir() -> (Workdir, Vec<u8>) {
    let workdir = Workdir::new();
    let mut bytes = vec![0; LEN];
    bytes[..LEN / 2].copy_from_slice(&pattern(1, 0, LEN / 2));
    workdir.write("base.raw", &bytes);
    workdir.must("convert -f raw -O qcow2 base.raw base.qcow2");
    workdir.must("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    for (at, len, byte) in [(1 << 20, 200_704, 0xa5_u8), (65536, 65536, 0), (3 << 20, 4096, 0x5a)] {
        let zeros = if byte == 0 { "--pattern 0".to_owned() } else { format!("--pattern {byte}") };
        workdir.must(&format!("bench -w -c 1 -s {len} -o {at} {zeros} top.qcow2"));
        bytes[at..at + len].fill(byte);
    }
    (workdir, bytes)
}

fn exists(workdir: &Workdir, name: &str) -> bool {
    workdir.dir().join(name).exists()
}

#[test]
fn a_mirror_shows_what_its_source_shows() {
    let (workdir, bytes) = workdir();
    for words in [
        "-O raw",
        "-O qcow2",
        "-O qcow2 -o cluster_size=4k,extended_l2=off --granularity 512",
        "-O qcow2 --copy-mode write-blocking --buffer-size 1M --no-unmap",
        "-O raw -t none -T none -r 1G -p",
        "--sync top -O qcow2 -B base.qcow2 -F qcow2",
        "-U --source-format qcow2 -O qcow2 -q",
    ] {
        let said = workdir.must(&format!("mirror {words} top.qcow2 out")).stdout;
        assert!(said.ends_with("Image mirrored.\n") || words.ends_with("-q"), "{words}: {said}");
        workdir.must("convert -O raw out out.raw");
        assert!(workdir.read("out.raw") == bytes, "{words}");
        if qemu_img().is_some() && !words.contains("-O raw") {
            workdir.must_qemu("check -q out");
            workdir.must_qemu("compare -q top.qcow2 out");
        }
        std::fs::remove_file(workdir.dir().join("out")).expect("it was made");
    }
}

#[test]
fn the_copy_of_an_own_layer_holds_nothing_else() {
    let (workdir, _) = workdir();
    workdir.must("mirror --sync top -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 out.qcow2");
    let (source, copy) = (own_ranges(&workdir, "top.qcow2"), own_ranges(&workdir, "out.qcow2"));
    assert!(!source.is_empty());
    assert_eq!(source, copy);

    let other = workdir.bds("mirror --sync top -O qcow2 -B base.raw -F raw top.qcow2 other.qcow2");
    assert!(other.code == 1 && other.stderr.contains("fits on its own backing file"), "{other:?}");
    assert!(!exists(&workdir, "other.qcow2"));
}

/// Start and end of what an image holds itself.
fn own_ranges(workdir: &Workdir, name: &str) -> Vec<(u64, u64)> {
    let ranges: Value = workdir.must(&format!("map --output json {name}")).json();
    let mut own: Vec<(u64, u64)> = Vec::new();
    for range in ranges.as_array().expect("a list").iter().filter(|range| range["depth"] == 0) {
        let number = |key: &str| range[key].as_u64().expect("a number");
        let (start, end) = (number("start"), number("start") + number("length"));
        match own.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => own.push((start, end)),
        }
    }
    own
}

#[test]
fn an_existing_target_is_overwritten_in_full() {
    let (workdir, bytes) = workdir();
    workdir.write("out.raw", &vec![0x77; LEN]);
    workdir.must("mirror -n -O raw top.qcow2 out.raw");
    assert!(workdir.read("out.raw") == bytes, "zeros were written where the target held bytes");

    workdir.write("short.raw", &vec![0x77; LEN - 512]);
    let short = workdir.bds("mirror -n -O raw top.qcow2 short.raw");
    assert!(short.code == 1 && short.stderr.contains("another size"), "{short:?}");
    assert!(workdir.read("short.raw").iter().all(|byte| *byte == 0x77), "untouched");

    let own = workdir.bds("mirror -n -O qcow2 top.qcow2 base.qcow2");
    assert!(own.code == 1 && own.stderr.contains("is read as a part of"), "{own:?}");
    workdir.must("compare -q base.raw base.qcow2");
}

#[test]
fn events_are_lines_of_json_in_order() {
    let (workdir, _) = workdir();
    let out = workdir.must("mirror -p --output json -O qcow2 top.qcow2 out.qcow2").stdout;
    let events: Vec<Value> =
        out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(events.iter().all(|event| event["timestamp"]["seconds"].is_u64()), "{out}");
    let name = |event: &Value| match event["data"]["status"].as_str() {
        Some(status) if event["event"] == "JOB_STATUS_CHANGE" => status.to_owned(),
        _ => event["event"].as_str().expect("a name").to_owned(),
    };
    let names: Vec<String> =
        events.iter().map(name).filter(|name| name != "BDS_JOB_PROGRESS").collect();
    let expected = [
        "created",
        "running",
        "ready",
        "BLOCK_JOB_READY",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(names, expected);
    let ready = events.iter().find(|event| event["event"] == "BLOCK_JOB_READY").expect("once");
    assert_eq!(ready["data"]["device"], "bds");
    assert_eq!(ready["data"]["len"], ready["data"]["offset"]);
}

#[test]
fn a_signal_cancels_and_removes_what_was_created() {
    let workdir = Workdir::new();
    workdir.write("big.raw", &pattern(1, 0, 32 << 20));
    for (options, is_kept) in [("", false), ("--keep-partial", true)] {
        let words = format!("mirror {options} -f raw -r 1M --output json -p big.raw out.raw");
        let args: Vec<&str> = words.split_whitespace().collect();
        let mut command = workdir.command(&args);
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("bds starts");
        while !exists(&workdir, "out.raw") {
            std::thread::sleep(Duration::from_millis(5));
        }
        // The file appears before the job runs; the copy takes half a minute.
        std::thread::sleep(Duration::from_millis(300));
        let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
        assert!(sent.expect("kill runs").success());
        assert_eq!(child.wait().expect("ours").code(), Some(130), "{options}");
        let output = child.wait_with_output().expect("it has ended");
        let (events, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(events.contains("BLOCK_JOB_CANCELLED"), "{events}");
        assert!(
            errors.contains("bds: interrupted; the output 'out.raw' is incomplete"),
            "{errors}"
        );
        assert_eq!(exists(&workdir, "out.raw"), is_kept, "{errors}");
    }
}
