//! Tests `mirror --record` and `--manifest`: a copy that was killed or interrupted goes on when the
//! same command is given again, and is proved by `verify`.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use bds_testkit::pattern;
use serde_json::Value;

use crate::workdir::Workdir;

const LEN: usize = 24 << 20;
/// Pages of hashes begin here; until something is recorded they are zeros.
const PAGES_AT: usize = 8192;

fn workdir() -> (Workdir, Vec<u8>) {
    let workdir = Workdir::new();
    let mut bytes = pattern(3, 0, LEN);
    bytes[5 << 20..7 << 20].fill(0);
    workdir.write("big.raw", &bytes);
    (workdir, bytes)
}

fn knows_something(record: &Path) -> bool {
    let bytes = std::fs::read(record).unwrap_or_default();
    bytes.get(PAGES_AT..).is_some_and(|pages| pages.iter().any(|byte| *byte != 0))
}

/// Runs a mirror of some seconds, and sends a signal once something of it is recorded.
fn interrupt(workdir: &Workdir, format: &str, signal: &str) {
    let words = format!(
        "mirror -f raw -O {format} -r 2M --record rec --record-interval 64k -p --output json \
         big.raw out"
    );
    let args: Vec<&str> = words.split(' ').collect();
    let mut command = workdir.command(&args);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("bds starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    // A line a second, and none any more when it has ended.
    for line in lines {
        assert!(!line.expect("text").contains("COMPLETED"), "it ended before it was interrupted");
        if knows_something(&workdir.dir().join("rec")) {
            break;
        }
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
    assert!(!child.wait().expect("ours").success());
}

fn events(text: &str, name: &str) -> Vec<Value> {
    let parsed = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    parsed.filter(|event| event["event"] == name).collect()
}

/// Scenario 26 with a real process: killed, and the same command given again.
#[test]
fn scenario_26_a_mirror_that_was_killed_goes_on() {
    for (format, signal) in [("raw", "-KILL"), ("qcow2", "-KILL"), ("qcow2", "-INT")] {
        let (workdir, bytes) = workdir();
        interrupt(&workdir, format, signal);
        assert!(workdir.dir().join("rec").exists() && workdir.dir().join("out").exists());
        // The source has changed since.
        let mut bytes = bytes;
        bytes[70_000..70_005].copy_from_slice(b"later");
        workdir.write("big.raw", &bytes);
        let words = format!("mirror -f raw -O {format} --record rec --manifest m big.raw out");
        let said = workdir.must(&words);
        assert!(said.stdout.contains("Going on with rec: the target holds up to"), "{said:?}");
        assert_eq!(said.stderr, "", "{format}, {signal}");
        workdir.must(&format!("compare -q -f raw -F {format} big.raw out"));
        workdir.must(&format!("verify --manifest m -f {format} out"));
        assert!(!workdir.dir().join("rec").exists(), "it is removed at success");
    }
}

#[test]
fn events_tell_what_becomes_of_the_record() {
    let (workdir, _) = workdir();
    interrupt(&workdir, "raw", "-TERM");
    // Something else writes to the first megabytes, of which some are recorded.
    let mut bytes = workdir.read("out");
    bytes[..8 << 20].iter_mut().for_each(|byte| *byte ^= 1);
    workdir.write("out", &bytes);
    let words = "mirror -f raw -O raw --record rec -p --output json big.raw out";
    let out = workdir.must(words).stdout;
    let records = events(&out, "BLOCK_JOB_RECORD");
    let actions: Vec<&str> =
        records.iter().map(|event| event["data"]["action"].as_str().expect("a text")).collect();
    assert_eq!(actions[0], "continued", "{out}");
    assert!(actions[1..].contains(&"target-differs"), "{out}");
    assert_eq!(records[0]["data"]["record"], "rec");
    assert!(workdir.read("out") == workdir.read("big.raw"));
}

#[test]
fn what_does_not_fit_is_refused_and_left_alone() {
    let (workdir, _) = workdir();
    workdir.write("rec", b"a letter");
    let refused = workdir.bds("mirror -f raw -O raw --record rec big.raw out");
    assert!(refused.code == 1 && refused.stderr.contains("no record of a job"), "{refused:?}");
    assert!(workdir.read("rec") == b"a letter");
    let refused = workdir.bds("mirror -f raw -O raw --manifest rec big.raw out2");
    assert!(refused.code == 1 && refused.stderr.contains("no manifest"), "{refused:?}");
    assert!(workdir.read("rec") == b"a letter" && !workdir.dir().join("out2").exists());
    for words in ["--check-target none", "--record-interval 1M", "--note x", "-n --record r"] {
        let refused = workdir.bds(&format!("mirror -f raw -O raw {words} big.raw out3"));
        assert!(refused.code != 0 && !workdir.dir().join("out3").exists(), "{words}: {refused:?}");
    }
}

#[test]
fn verify_names_what_was_changed_after_the_mirror() {
    let (workdir, _) = workdir();
    workdir.must("mirror -f raw -O qcow2 --manifest m --note disk0 big.raw out");
    workdir.must("verify --manifest m -f qcow2 out");
    workdir.must("bench -w -c 1 -s 4096 -o 1M --pattern 9 -f qcow2 out");
    let differs = workdir.bds("verify --manifest m -f qcow2 out");
    assert!(differs.code == 2, "{differs:?}");
    assert!(differs.stdout.contains("bytes 1048576 to 1114111 differ"), "{differs:?}");
}
