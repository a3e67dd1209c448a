//! Compares `check` with qemu-img's on damaged images: same exit code, same counts.

use std::path::Path;

use bds_testkit::{Output, Scratch};
use serde_json::Value;

use crate::programs::{Tools, count, outcome_line, text};

/// Where an undamaged image of ours keeps things.
struct Image {
    bytes: Vec<u8>,
    cluster: usize,
    l1: usize,
    /// The first L2 table.
    l2: usize,
    refcount_table: usize,
    refcount_block: usize,
}

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Image {
    fn new(bytes: Vec<u8>, cluster: usize) -> Self {
        let mut image = Self { bytes, cluster, l1: 0, l2: 0, refcount_table: 0, refcount_block: 0 };
        let place = |n: u64| usize::try_from(n & OFFSET).expect("images here are small");
        image.l1 = place(image.read(40));
        image.refcount_table = place(image.read(48));
        image.l2 = place(image.read(image.l1));
        image.refcount_block = place(image.read(image.refcount_table));
        image
    }

    fn read(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn set(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn change(&mut self, at: usize, change: impl Fn(u64) -> u64) {
        self.set(at, change(self.read(at)));
    }

    /// The entry of this guest cluster.
    fn entry(&self, index: usize) -> usize {
        self.l2 + 8 * index
    }

    /// Sets the refcount (16 bits) of the cluster that a guest cluster lies in.
    fn count(&mut self, index: usize, change: impl Fn(u16) -> u16) {
        let offset = self.read(self.entry(index)) & OFFSET;
        let number = usize::try_from(offset).expect("images here are small") / self.cluster;
        let at = self.refcount_block + 2 * number;
        let old = u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]]);
        self.bytes[at..at + 2].copy_from_slice(&change(old).to_be_bytes());
    }
}

type Damage = fn(&mut Image);

const DAMAGES: [(&str, Damage); 19] = [
    ("nothing", |_| {}),
    ("a count too high", |i| i.count(0, |n| n + 1)),
    ("a count too low", |i| i.count(0, |_| 0)),
    ("two counts too high", |i| {
        i.count(0, |_| 7);
        i.count(1, |_| 7);
    }),
    ("a count of the L2 table too high", |i| {
        let at = i.refcount_block + 2 * (i.l2 / i.cluster);
        i.bytes[at + 1] = 2;
    }),
    ("an entry is not marked as ours", |i| i.change(i.entry(0), |e| e & !COPIED)),
    ("an entry is cleared", |i| i.set(i.entry(1), 0)),
    ("an entry is not aligned", |i| i.change(i.entry(0), |e| e + 512)),
    ("an entry points behind the file", |i| i.set(i.entry(0), COPIED | 1 << 30)),
    ("an entry has a reserved bit", |i| i.change(i.entry(0), |e| e | 2)),
    ("two entries point to one cluster", |i| {
        let first = i.read(i.entry(0));
        i.set(i.entry(1), first);
    }),
    ("an entry points to the header", |i| i.set(i.entry(0), COPIED)),
    ("an entry points to the L2 table", |i| i.set(i.entry(0), COPIED | i.l2 as u64)),
    ("a zero entry keeps a place", |i| i.change(i.entry(0), |e| e | 1)),
    ("an L1 entry is not marked as ours", |i| i.change(i.l1, |e| e & !COPIED)),
    ("an L1 entry is not aligned", |i| i.change(i.l1, |e| e + 512)),
    ("an L1 entry points behind the file", |i| i.set(i.l1, COPIED | 1 << 30)),
    ("a refcount block is gone", |i| i.set(i.refcount_table, 0)),
    ("the file was cut", |i| i.bytes.truncate(i.bytes.len() - i.cluster)),
];

#[test]
fn damaged_images_get_the_same_check_result() {
    let Some(tools) = Tools::find() else { return };
    let mut problems = Vec::new();
    for cluster in [4096, 65536] {
        let scratch = Scratch::in_memory();
        let path = scratch.path("x.qcow2");
        let bytes = make(&tools, &path, cluster);
        for (what, damage) in DAMAGES {
            let mut image = Image::new(bytes.clone(), cluster);
            damage(&mut image);
            std::fs::write(&path, &image.bytes).expect("scratch is writable");
            let problem = judge(&tools, &path);
            problems.extend(problem.map(|problem| format!("{cluster}, {what}: {problem}")));
            let is_same = std::fs::read(&path).expect("it is there") == image.bytes;
            assert!(is_same, "{cluster}, {what}: looking has changed the image");
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// An image with data, compressed data and zeros under one L2 table.
fn make(tools: &Tools, path: &Path, cluster: usize) -> Vec<u8> {
    let options = format!("cluster_size={cluster}");
    tools.img.must(["create", "-q", "-f", "qcow2", "-o", &options, text(path), "1M"]);
    let commands = [
        format!("write -q -P 1 0 {}", 3 * cluster),
        format!("write -q -c -P 2 {} {}", 4 * cluster, 2 * cluster),
        format!("write -q -z {} {}", 7 * cluster, cluster),
    ];
    let args = commands.iter().flat_map(|command| ["-c", command.as_str()]);
    tools.io.must(["-f", "qcow2"].into_iter().chain(args).chain([text(path)]));
    let mut bytes = std::fs::read(path).expect("it was made");
    // Compressed bytes may end inside a cluster.
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    bytes
}

/// Nothing: both say the same.
fn judge(tools: &Tools, path: &Path) -> Option<String> {
    let arguments = ["check", "-f", "qcow2", "--output=json", text(path)];
    let (theirs, ours) = (tools.img.run(arguments), tools.bds.run(arguments));
    let (ours_counts, theirs_counts) = (counts(&ours), counts(&theirs));
    let is_same = ours.code == theirs.code && ours_counts.is_ok() && ours_counts == theirs_counts;
    (!is_same).then(|| {
        format!(
            "corruptions, leaks, errors: ours {ours_counts:?}, theirs {theirs_counts:?}\n    ours {}\n    theirs {}",
            outcome_line(&ours),
            outcome_line(&theirs)
        )
    })
}

/// Corruptions, leaks and check errors; an error if this is no report.
fn counts(output: &Output) -> Result<[u64; 3], String> {
    let value: Value = serde_json::from_str(&output.stdout).map_err(|e| e.to_string())?;
    Ok(["corruptions", "leaks", "check-errors"].map(|key| count(&value, key)))
}

#[test]
fn output_that_is_no_report_does_not_pass_as_a_clean_check() {
    let output = |stdout: &str| Output { code: 0, stdout: stdout.into(), stderr: String::new() };
    assert_eq!(counts(&output(r#"{"check-errors": 0, "leaks": 2}"#)), Ok([0, 2, 0]));
    for text in ["", "No errors were found", "[1"] {
        assert!(counts(&output(text)).is_err(), "{text}");
    }
}
