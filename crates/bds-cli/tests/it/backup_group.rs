//! `backup` of several disks as one: points that all disks have, kills between them, restoration.

use std::collections::BTreeMap;

use bds_testkit::pattern;

use crate::workdir::Workdir;

const LEN: usize = 1 << 20;

/// Two disks and what they hold.
struct Disks {
    workdir: Workdir,
    content: BTreeMap<&'static str, Vec<u8>>,
}

impl Disks {
    fn new() -> Self {
        let (workdir, mut content) = (Workdir::new(), BTreeMap::new());
        for (name, seed) in [("data", 1), ("log", 2)] {
            let bytes = pattern(seed, 0, LEN);
            workdir.write("raw", &bytes);
            workdir.must(&format!("convert -f raw -O qcow2 raw {name}.qcow2"));
            content.insert(name, bytes);
        }
        Self { workdir, content }
    }

    fn change(&mut self, byte: u8) {
        for (n, (name, content)) in self.content.iter_mut().enumerate() {
            let at = 65536 * (n + usize::from(byte));
            content[at..at + 4096].fill(byte);
            let words = format!("bench -w -c 1 -s 4096 -o {at} --pattern {byte} {name}.qcow2");
            self.workdir.must(&words);
        }
    }

    fn backup(&self) -> String {
        self.workdir.must("backup run data.qcow2 log.qcow2 set").stdout
    }

    fn exists(&self, name: &str) -> bool {
        self.workdir.dir().join(name).exists()
    }

    #[track_caller]
    fn check(&self, point: u32, content: &BTreeMap<&'static str, Vec<u8>>) {
        self.workdir.must(&format!("backup restore -q -O raw --point {point} set out"));
        for (name, bytes) in content {
            assert!(self.workdir.read(&format!("out/{name}.raw")) == *bytes, "{name} at {point}");
        }
        std::fs::remove_dir_all(self.workdir.dir().join("out")).expect("it was made");
    }
}

#[test]
fn points_of_two_disks_are_restored_together() {
    let mut disks = Disks::new();
    let mut contents = vec![disks.content.clone()];
    let made = disks.backup();
    assert!(made.contains("Made point 1 of 2 disks: data, log; longest write hold "), "{made}");
    for byte in 1..4 {
        disks.change(byte);
        contents.push(disks.content.clone());
        disks.backup();
    }
    for (point, content) in (1..).zip(&contents) {
        disks.check(point, content);
    }
    let workdir = &disks.workdir;
    assert_eq!(workdir.must("backup list set").stdout.lines().count(), 5);
    let verified = workdir.must("backup verify set").stdout;
    assert_eq!(verified.lines().count(), 8, "{verified}");
    let one = workdir.must("backup list set/data").stdout;
    assert!(one.contains("000004  incremental"), "{one}");
    workdir.must("backup restore -O raw --disk log set log.raw");
    assert!(workdir.read("log.raw") == contents[3]["log"]);

    workdir.must("backup prune --keep 2 set");
    assert_eq!(workdir.must("backup list set").stdout.lines().count(), 3);
    assert!(!disks.exists("set/data/000001.qcow2") && !disks.exists("set/000002.point"));
    disks.check(3, &contents[2]);
    disks.change(5);
    disks.backup();
    disks.check(5, &disks.content);
}

/// A kill between the disks: one has a point that the other has not.
#[test]
fn a_point_that_not_all_disks_have_does_not_exist() {
    let mut disks = Disks::new();
    disks.backup();
    let first = disks.content.clone();
    disks.change(1);
    disks.backup();
    // As if the run had been killed before the record, and before the second disk's point.
    let set = disks.workdir.dir().join("set");
    std::fs::remove_file(set.join("000002.point")).expect("it was made");
    std::fs::remove_file(set.join("log/000002.manifest")).expect("it was made");
    std::fs::remove_file(set.join("log/000002.qcow2")).expect("it was made");
    let listed = disks.workdir.must("backup list set").stdout;
    assert!(listed.contains("000002  unfinished           data\n"), "{listed}");
    assert_eq!(listed.lines().count(), 3, "{listed}");
    disks.check(1, &first);
    let later = disks.workdir.bds("backup restore --point 2 set out");
    assert_eq!(later.code, 1);
    assert!(!disks.exists("out"));
    // The bitmaps of the first point are still there.
    disks.change(2);
    disks.backup();
    for name in ["data", "log"] {
        let listed = disks.workdir.must(&format!("backup list set/{name}")).stdout;
        assert!(listed.contains("000002  incremental"), "{name}: {listed}");
    }
    disks.check(2, &disks.content);
    disks.check(1, &first);
}

#[test]
fn a_disk_that_fails_leaves_no_point_of_the_others() {
    let mut disks = Disks::new();
    disks.backup();
    let first = disks.content.clone();
    disks.change(1);
    // The second image cannot be copied: its bitmap is gone.
    let name = disks.workdir.must("info --output=json log.qcow2").json();
    let name =
        name["format-specific"]["data"]["bitmaps"][0]["name"].as_str().expect("one").to_owned();
    disks.workdir.must(&format!("bitmap --remove log.qcow2 {name}"));
    let failed = disks.workdir.bds("backup run data.qcow2 log.qcow2 set");
    assert_eq!(failed.code, 1, "{failed:?}");
    assert!(!disks.exists("set/data/000002.qcow2") && !disks.exists("set/000002.point"));
    assert!(!disks.exists("set/data/000002.qcow2.partial"));
    disks.check(1, &first);
    disks.workdir.must("backup run --or-full data.qcow2 log.qcow2 set");
    disks.check(2, &disks.content);
    let kinds = disks.workdir.must("backup list set/data").stdout;
    assert!(kinds.contains("000002  incremental"), "the other one's bitmap was kept: {kinds}");
}

/// All bitmaps are added in one change, which says how long it held writes.
#[test]
fn the_longest_write_hold_is_reported() {
    let disks = Disks::new();
    let words = "backup run --output=json data.qcow2 log.qcow2 set";
    let made = disks.workdir.must(words).json();
    let hold = |value: &serde_json::Value| value.as_u64().expect("nanoseconds");
    let longest = hold(&made["longest-write-hold-ns"]);
    let holds = ["data", "log"].map(|name| hold(&made["disks"][name]["write-hold-ns"]));
    assert!(longest > 0 && Some(&longest) == holds.iter().max(), "{made}");
    assert_eq!(made["disks"]["log"]["point"], 1);
    // A disk that keeps no bitmap is in no change.
    let one = disks.workdir.must("backup run --output=json data.qcow2 single").json();
    assert!(hold(&one["longest-write-hold-ns"]) > 0, "{one}");
    let full = "backup run --full --no-bitmap --output=json data.qcow2 single";
    assert_eq!(hold(&disks.workdir.must(full).json()["longest-write-hold-ns"]), 0);
}

#[test]
fn damage_of_one_disk_restores_none() {
    let disks = Disks::new();
    disks.backup();
    let mut image = disks.workdir.read("set/log/000001.qcow2");
    let at = image.len() - 70_000;
    image[at] ^= 1;
    disks.workdir.write("set/log/000001.qcow2", &image);
    let restored = disks.workdir.bds("backup restore set out");
    assert_eq!(restored.code, 2, "{restored:?}");
    assert!(restored.stderr.contains("nothing was restored: log"), "{}", restored.stderr);
    assert!(!disks.exists("out"));
    assert_eq!(disks.workdir.bds("backup verify set").code, 2);
    // The other one is good by itself.
    disks.workdir.must("backup restore --disk data set data.out");
}

#[test]
fn names_and_directories_are_checked_first() {
    let disks = Disks::new();
    disks.workdir.must("backup run data.qcow2 one");
    disks.backup();
    for (words, expected) in [
        ("backup run data.qcow2 log.qcow2 one", "holds backups of a single disk"),
        ("backup run data.qcow2 set", "holds backups of the disks data, log, not of data"),
        ("backup run data.qcow2 data.qcow2 other", "two images are named 'data'"),
        ("backup run --name a --name ../b data.qcow2 log.qcow2 other", "'../b' cannot name a disk"),
        (
            "backup run --name 000001.point --name b data.qcow2 log.qcow2 other",
            "'000001.point' cannot name a disk",
        ),
        ("backup run --name lock --name b data.qcow2 log.qcow2 other", "'lock' cannot name a disk"),
        ("backup run --name a data.qcow2 log.qcow2 other", "--name is given 1 times for 2 images"),
        ("backup run --name a data.qcow2 other", "--name is for several images"),
        ("backup restore --disk b set out", "has no disk 'b'"),
        ("backup restore --disk b one out", "--disk is for a directory of several disks"),
        ("backup restore --point 7 set out", "there is no point 7"),
    ] {
        let output = disks.workdir.bds(words);
        assert_eq!(output.code, 1, "{words}: {output:?}");
        assert!(output.stderr.contains(expected), "{words}: {}", output.stderr);
        assert!(!disks.exists("out"), "{words}");
    }
    disks.workdir.must("backup run --name b --name a data.qcow2 log.qcow2 named");
    assert!(disks.exists("named/a/000001.qcow2") && disks.exists("named/b/000001.qcow2"));
}
