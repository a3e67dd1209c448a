//! `backup run` goes on with what a run that was killed, interrupted or has failed left: bytes are
//! equal, less is copied, the next increment misses nothing; what is of no use is not believed.

use std::path::Path;
use std::process::{Command, Stdio};

use bds_testkit::{Output, pattern};
use serde_json::Value;

use crate::workdir::Workdir;

const LEN: usize = 6 << 20;
/// Bytes that an increment of the tests has, in chunks of 64 KiB.
const CHANGED: usize = 3 << 20;
/// Pages of a record begin here; until something is recorded they are zeros.
const PAGES_AT: usize = 8192;

/// A disk of which the test knows the content.
struct Disk {
    workdir: Workdir,
    name: &'static str,
    content: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        let workdir = Workdir::new();
        let content = make(&workdir, "disk", 1);
        Self { workdir, name: "disk", content }
    }

    /// With a full backup, and many changes since.
    fn with_point() -> Self {
        let mut disk = Self::new();
        disk.workdir.must("backup run -q disk.qcow2 set");
        disk.change_much(2);
        disk
    }

    fn write(&mut self, at: usize, len: usize, byte: u8) {
        self.content[at..at + len].fill(byte);
        let name = self.name;
        let words = format!("bench -q -w -c 1 -s {len} -o {at} --pattern {byte} {name}.qcow2");
        self.workdir.must(&words);
    }

    fn change_much(&mut self, byte: u8) {
        for at in (0..CHANGED).step_by(1 << 20) {
            self.write(at, 1 << 20, byte);
        }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.workdir.dir().join(name)
    }

    fn run(&self, options: &str) -> Output {
        self.workdir.bds(&format!("backup run --output=json {options} disk.qcow2 set"))
    }

    fn run_well(&self, options: &str) -> Value {
        let made = self.run(options);
        assert!(made.ok(), "{made:?}");
        made.json()
    }

    /// Runs a backup that takes long, and sends a signal once something of it is recorded.
    fn cut(&self, options: &str, signal: &str) -> Output {
        let words = format!("{options} --image-opts {}", slow("disk.qcow2"));
        let record = self.next_record();
        cut(&self.workdir, &format!("{words} set"), &[&record], signal)
    }

    fn next_record(&self) -> String {
        let number = (1..).find(|n| !self.path(&format!("set/{n:06}.manifest")).exists());
        format!("set/{:06}.record", number.expect("one is free"))
    }

    /// The newest point is the disk, the next increment misses nothing, and nothing is left.
    fn check(mut self, point: u32) {
        self.check_point(point);
        self.write(5 << 20, 4096, 77);
        let next = self.run_well("");
        assert_eq!((&next["point"], &next["kind"]), (&(point + 1).into(), &"incremental".into()));
        self.check_point(point + 1);
        self.workdir.must("backup verify -q set");
    }

    fn check_point(&self, point: u32) {
        let words = format!("backup restore -q -O raw --point {point} set out.raw");
        self.workdir.must(&words);
        assert!(self.workdir.read("out.raw") == self.content, "point {point}");
        std::fs::remove_file(self.path("out.raw")).expect("it was made");
        assert_eq!(unfinished(&self.path("set")), Vec::<String>::new());
    }
}

fn make(workdir: &Workdir, name: &str, seed: u64) -> Vec<u8> {
    let content = pattern(seed, 0, LEN);
    workdir.write("base.raw", &content);
    workdir.must(&format!("convert -f raw -O qcow2 base.raw {name}.qcow2"));
    content
}

/// Opens an image so slowly that a signal finds the program at work.
fn slow(image: &str) -> String {
    format!(
        "driver=qcow2,file.driver=throttle,file.limits.bps-total=3M,\
         file.file.driver=file,file.file.filename={image}"
    )
}

fn knows_something(record: &Path) -> bool {
    let bytes = std::fs::read(record).unwrap_or_default();
    bytes.get(PAGES_AT..).is_some_and(|pages| pages.iter().any(|byte| *byte != 0))
}

fn cut(workdir: &Workdir, words: &str, records: &[&str], signal: &str) -> Output {
    let words = format!("backup run --record-interval 64k {words}");
    let args: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
    let mut command = workdir.command(&args);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("bds starts");
    while !records.iter().all(|record| knows_something(&workdir.dir().join(record))) {
        assert!(child.try_wait().expect("ours").is_none(), "it ended before it was interrupted");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(sent.expect("kill runs").success());
    let output = child.wait_with_output().expect("ours");
    assert!(!output.status.success(), "it ended before it was interrupted");
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Files of a directory that belong to no complete point.
pub(crate) fn unfinished(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("it is there");
    let names = entries.map(|entry| entry.expect("readable").file_name());
    let names = names.map(|name| name.into_string().expect("UTF-8"));
    let ends = [".qcow2", ".manifest", ".full", "lock"];
    names.filter(|name| !ends.iter().any(|end| name.ends_with(end))).collect()
}

fn resumed(made: &Value) -> u64 {
    made["resumed-bytes"].as_u64().expect("a number")
}

#[test]
fn a_full_backup_that_was_killed_goes_on() {
    for signal in ["-KILL", "-INT"] {
        let mut disk = Disk::new();
        let cut = disk.cut("", signal);
        let is_kept = "it is kept, the next run goes on with it";
        assert_eq!(cut.stderr.contains(is_kept), signal == "-INT", "{cut:?}");
        // Written meanwhile, in what was copied and in what was not.
        disk.write(0, 70_000 / 512 * 512, 9);
        disk.write(LEN - 4096, 4096, 8);
        let made = disk.run_well("");
        assert_eq!(made["kind"], "full");
        assert!((1..LEN as u64 - 131_072).contains(&resumed(&made)), "{made}");
        disk.check(1);
    }
}

#[test]
fn an_increment_that_was_killed_twice_goes_on() {
    let mut disk = Disk::with_point();
    disk.cut("-c", "-KILL");
    disk.write(65_536, 4096, 9);
    disk.write(4 << 20, 4096, 9);
    disk.cut("", "-TERM");
    // What was zero before, and is again.
    disk.write(1 << 20, 65_536, 0);
    let said = disk.workdir.must("backup run disk.qcow2 set");
    assert!(said.stdout.contains("Going on with set/000002.record: the target holds"), "{said:?}");
    assert!(said.stdout.contains("point 2 (incremental)"), "{said:?}");
    let stored = std::fs::metadata(disk.path("set/000002.qcow2")).expect("made").len();
    assert!(stored < 2 * CHANGED as u64, "{stored} bytes");
    disk.check(2);
}

/// Little is copied again: what was flushed and recorded is not.
#[test]
fn what_was_recorded_is_not_copied_again() {
    for check in ["full", "sample", "none"] {
        let disk = Disk::with_point();
        disk.cut("", "-INT");
        let made = disk.run_well(&format!("--check-target {check}"));
        assert_eq!(made["kind"], "incremental");
        // Interrupted in order, so all that was copied is in the record.
        let image = std::fs::metadata(disk.path("set/000002.qcow2")).expect("made").len();
        assert!(resumed(&made) > 0 && image >= CHANGED as u64, "{check}: {made}");
        disk.check(2);
    }
}

#[test]
fn two_disks_go_on_together() {
    let workdir = Workdir::new();
    let contents = [make(&workdir, "data", 1), make(&workdir, "log", 2)];
    let words = format!(
        "--name data --name log --image-opts {} {} set",
        slow("data.qcow2"),
        slow("log.qcow2")
    );
    cut(&workdir, &words, &["set/data/000001.record", "set/log/000001.record"], "-KILL");
    let listed = workdir.must("backup list set").stdout;
    assert!(listed.contains("000001  unfinished           data, log\n"), "{listed}");
    let listed = workdir.must("backup list --output=json set").json();
    assert_eq!(listed[0]["kind"], "unfinished");
    let made = workdir.must("backup run --output=json data.qcow2 log.qcow2 set").json();
    for (name, content) in ["data", "log"].iter().zip(&contents) {
        let resumed = resumed(&made["disks"][name]);
        assert!((1..LEN as u64).contains(&resumed), "{name}: {made}");
        workdir.must(&format!("backup restore -q -O raw --disk {name} set {name}.out"));
        assert!(workdir.read(&format!("{name}.out")) == *content, "{name}");
        let set = workdir.dir().join("set").join(name);
        assert_eq!(unfinished(&set), Vec::<String>::new());
    }
    workdir.must("backup verify -q set");
}

#[test]
fn a_source_without_bitmaps_goes_on() {
    let workdir = Workdir::new();
    let content = make(&workdir, "disk", 1);
    let words = format!("--full --no-bitmap --image-opts {} set", slow("disk.qcow2"));
    cut(&workdir, &words, &["set/000001.record"], "-KILL");
    let words = "backup run --full --no-bitmap --output=json disk.qcow2 set";
    let made = workdir.must(words).json();
    assert!(resumed(&made) > 0, "{made}");
    workdir.must("backup restore -q -O raw set out.raw");
    assert!(workdir.read("out.raw") == content);
}

/// A target that takes no more is one with which the next run goes on.
#[test]
fn a_target_that_fails_is_kept() {
    let disk = Disk::new();
    // The limit is one of all files: the image itself, with its bitmaps, is below it.
    std::fs::remove_file(disk.path("disk.qcow2")).expect("it was made");
    disk.workdir.must("convert -f raw -O qcow2 -o data_file=data.raw base.raw disk.qcow2");
    let bds = env!("CARGO_BIN_EXE_bds");
    let words =
        format!("ulimit -f 3000; exec {bds} backup run --record-interval 64k disk.qcow2 set");
    let failed = Command::new("bash").args(["-c", &words]).current_dir(disk.workdir.dir()).output();
    let failed = failed.expect("bash runs");
    let said = String::from_utf8_lossy(&failed.stderr);
    assert!(!failed.status.success() && said.contains("the next run goes on with it"), "{said}");
    let made = disk.run_well("");
    assert!(resumed(&made) > 0, "{made}");
    disk.check(1);
}

#[test]
fn other_verbs_leave_an_unfinished_point_alone() {
    let mut disk = Disk::with_point();
    disk.workdir.must("backup run -q disk.qcow2 set");
    disk.change_much(3);
    disk.cut("", "-KILL");
    let files = unfinished(&disk.path("set"));
    assert!(files.len() >= 3, "{files:?}");
    let listed = disk.workdir.must("backup list set").stdout;
    let line = listed.lines().last().expect("three lines");
    assert!(line.starts_with("000003  unfinished   ") && line.ends_with("iB"), "{listed}");
    let listed = disk.workdir.must("backup list --output=json set").json();
    assert_eq!(listed[2]["kind"], "unfinished");
    assert!(listed[2]["stored"].as_u64() > Some(0) && listed[2]["time"].as_u64() > Some(0));
    disk.workdir.must("backup verify -q set");
    disk.workdir.must("backup restore -q set out.qcow2");
    assert_eq!(disk.workdir.bds("backup restore --point 3 set out2.qcow2").code, 1);
    disk.workdir.must("backup prune -q --keep 1 set");
    assert_eq!(unfinished(&disk.path("set")), files);
    let made = disk.run_well("");
    assert!(resumed(&made) > 0, "{made}");
    disk.check(3);
}

/// Nothing is believed that does not fit; the line says why.
#[test]
fn what_is_of_no_use_is_removed_and_the_reason_is_said() {
    type Spoil = fn(&mut Disk);
    let cases: [(&str, Spoil, &str); 10] = [
        ("--start-over", |_| {}, "as --start-over asks"),
        ("--full", |_| {}, "it is an increment"),
        (
            "",
            |disk| spoil(disk, "000002.unfinished", |b| b[70] ^= 1),
            "notes of what it is are damaged",
        ),
        (
            "",
            |disk| spoil(disk, "000002.unfinished", |b| b.truncate(40)),
            "notes of what it is are damaged",
        ),
        ("", |disk| remove(disk, "000002.unfinished"), "there are no notes"),
        ("", |disk| remove(disk, "000002.record"), "there is no record"),
        (
            "",
            |disk| {
                spoil(disk, "000002.record", |b| b[..8192].iter_mut().skip(8).for_each(|b| *b ^= 1))
            },
            "is damaged",
        ),
        ("", |disk| spoil(disk, "000002.record", |b| b.fill(7)), "no record of a job"),
        ("", |disk| spoil(disk, "000002.record", Vec::clear), "no record of a job"),
        (
            "",
            |disk| spoil(disk, "000002.qcow2.partial", |b| b[..4096].fill(0)),
            "not in qcow2 format",
        ),
    ];
    for (options, spoil, why) in cases {
        let mut disk = Disk::with_point();
        disk.cut("", "-KILL");
        spoil(&mut disk);
        let made = disk.run(options);
        assert!(made.ok(), "{why}: {made:?}");
        assert!(made.stderr.contains("starting over with point 2: "), "{why}: {made:?}");
        let made = made.json();
        assert!(made["started-over"].as_str().expect("a text").contains(why), "{why}: {made}");
        assert_eq!(resumed(&made), 0, "{why}");
        disk.check_point(2);
    }
}

fn spoil(disk: &Disk, name: &str, change: fn(&mut Vec<u8>)) {
    let name = format!("set/{name}");
    let mut bytes = disk.workdir.read(&name);
    change(&mut bytes);
    disk.workdir.write(&name, &bytes);
}

fn remove(disk: &Disk, name: &str) {
    std::fs::remove_file(disk.path("set").join(name)).expect("it was left");
}

/// Pages of a record that is damaged behind its headers say nothing; what they said is copied.
#[test]
fn a_damaged_page_of_a_record_is_not_believed() {
    for (check, len) in [("full", 16_384), ("none", 16_384), ("none", PAGES_AT)] {
        let disk = Disk::with_point();
        disk.cut("", "-KILL");
        let mut record = disk.workdir.read("set/000002.record");
        record[PAGES_AT..].iter_mut().for_each(|byte| *byte ^= 0x10);
        record.truncate(len.max(PAGES_AT));
        disk.workdir.write("set/000002.record", &record);
        let made = disk.run_well(&format!("--check-target {check}"));
        assert_eq!(resumed(&made), 0, "{check} {len}");
        disk.check(2);
    }
}

/// What the target lost or something else changed is found and copied again.
#[test]
fn a_changed_target_is_found() {
    let disk = Disk::with_point();
    disk.cut("", "-INT");
    let words = "bench -q -w -c 4 -s 65536 --pattern 99 set/000002.qcow2.partial -f qcow2";
    disk.workdir.must(words);
    let made = disk.run("");
    assert!(made.ok() && made.stderr.contains("is not what set/000002.record says"), "{made:?}");
    disk.check(2);
}

/// A disk that was put in the place of another one: also if it has the bitmap of the last point.
#[test]
fn another_disk_of_the_same_name_begins_anew() {
    let mut disk = Disk::with_point();
    std::fs::copy(disk.path("disk.qcow2"), disk.path("other.qcow2")).expect("space");
    disk.write(5 << 20, 65_536, 50);
    disk.cut("", "-KILL");
    // The copy was made before the point was begun, and does not have what was written since.
    std::fs::rename(disk.path("other.qcow2"), disk.path("disk.qcow2")).expect("ours");
    disk.content = {
        disk.workdir.must("convert -O raw disk.qcow2 now.raw");
        disk.workdir.read("now.raw")
    };
    let made = disk.run_well("");
    assert_eq!(made["started-over"], "it is of another disk", "{made}");
    disk.check(2);
}

/// The bitmap was changed by hand: what the unfinished image holds would not be compared.
#[test]
fn an_image_that_holds_what_is_not_marked_begins_anew() {
    let disk = Disk::with_point();
    disk.cut("", "-KILL");
    let info = disk.workdir.must("info --output=json disk.qcow2").json();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().expect("bitmaps").clone();
    let notes = String::from_utf8(disk.workdir.read("set/000002.unfinished")).expect("text");
    let names = bitmaps.iter().map(|bitmap| bitmap["name"].as_str().expect("a name"));
    let last = names.into_iter().find(|name| !notes.contains(name)).expect("of the last point");
    disk.workdir.must(&format!("bitmap --clear disk.qcow2 {last}"));
    let made = disk.run_well("");
    let why = made["started-over"].as_str().expect("a text");
    assert!(why.contains("holds what has not changed, at byte 0"), "{made}");
}

/// A record with noise in any of its places, or notes of noise: no panic, and the point is right.
#[test]
fn hostile_records_and_notes_do_no_harm() {
    let disk = Disk::with_point();
    disk.cut("", "-KILL");
    let left = ["000002.record", "000002.unfinished", "000002.qcow2.partial"];
    let left = left.map(|name| format!("set/{name}"));
    let saved = left.each_ref().map(|name| disk.workdir.read(name));
    let before = disk.workdir.read("disk.qcow2");
    for round in 0..9_u64 {
        disk.workdir.write("disk.qcow2", &before);
        left.iter().zip(&saved).for_each(|(name, bytes)| disk.workdir.write(name, bytes));
        let mut bytes = saved[0].clone();
        let noise = pattern(round, 0, bytes.len());
        let at = usize::try_from(round).expect("small") * 1500;
        bytes[at..].iter_mut().zip(&noise).for_each(|(byte, noise)| *byte = *noise);
        disk.workdir.write(&left[0], &bytes);
        if round % 3 == 2 {
            disk.workdir.write(&left[1], &noise[..500]);
        }
        let made = disk.run("");
        assert!(made.ok() && !made.stderr.contains("panic"), "{round}: {made:?}");
        disk.check_point(2);
        std::fs::remove_file(disk.path("set/000002.manifest")).expect("it was made");
        // The file that the record is of keeps its number.
        let image = (disk.path("set/000002.qcow2"), disk.path("set/000002.qcow2.partial"));
        std::fs::rename(image.0, image.1).expect("it was made");
    }
}
