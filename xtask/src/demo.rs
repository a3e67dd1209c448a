//! `cargo xtask demo`: shows and checks the main use end to end, without input.
//!
//! A base image with data one recognises, an overlay with changes, the graph with its references,
//! the chain converted to a compressed image, compared; then a reference is taken, released, and a
//! stale handle tried; a full and an incremental backup are made, proved and restored, of one disk
//! and of two as one; an image moves as a job; the overlay is committed; and a C program repeats
//! the stale handle. All output is checked, bytes against
//! bytes computed here; the first thing that does not match ends it with an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::dist;
use crate::run::{cargo, output, run, say, target_dir, which};

const DISK_LEN: usize = 64 << 20;
/// The parts of the base that hold data: (offset, length).
const BASE_DATA: [(usize, usize); 3] =
    [(0, 4 << 20), (17 << 20, 3 << 20), (DISK_LEN - (1 << 20), 1 << 20)];
/// What the overlay changes, as `lifecycle` (an example of bds) writes it: (offset, length,
/// byte).
const CHANGES: [(usize, usize, u8); 3] =
    [(1 << 20, 300_000, 0xa5), (20 << 20, 65_536, 0x5a), (40 << 20, 4096, 0x77)];

/// How the example's lines begin.
const LIFE: [&str; 7] = [
    "opened:   node 'disk', count 1",
    "acquired: a second reference by its handle, count 2",
    "released: NotLast ",
    "released: Last ",
    "stale:    acquiring the old handle says \"",
    "stale:    'disk' lives again as another node; the old handle still says \"",
    "shutdown: nothing is left over",
];

/// Runs the demo.
pub(crate) fn demo() -> Result<(), String> {
    build()?;
    let scene = Scene::new()?;
    let expected = scene.make_images()?;
    scene.look()?;
    scene.convert_and_compare(&expected)?;
    scene.stale_handle()?;
    scene.backups(&expected)?;
    scene.two_disks(&expected)?;
    scene.mirror(&expected)?;
    scene.commit()?;
    scene.handles_in_c()?;
    say(
        "\neverything matched: images, backups and the commit byte for byte, and stale handles were refused",
    );
    Ok(())
}

/// Builds the tool and the example. Cargo says on standard error what it compiles meanwhile.
fn build() -> Result<(), String> {
    say(
        "0. building the tool 'bds' and the example 'lifecycle', a debug build: minutes the first time, seconds afterwards",
    );
    let began = Instant::now();
    run(cargo().args([
        "build",
        "--package",
        "bds-cli",
        "--package",
        "bds",
        "--bin",
        "bds",
        "--example",
        "lifecycle",
    ]))?;
    say(&format!(
        "   built in {} s; the images go to {}",
        began.elapsed().as_secs(),
        dir().display()
    ));
    Ok(())
}

/// Where the demo's images lie.
fn dir() -> PathBuf {
    target_dir().join("demo")
}

struct Scene {
    dir: PathBuf,
    bds: PathBuf,
    lifecycle: PathBuf,
}

impl Scene {
    fn new() -> Result<Self, String> {
        let dir = dir();
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        let bin = target_dir().join("debug");
        Ok(Self { bds: bin.join("bds"), lifecycle: bin.join("examples/lifecycle"), dir })
    }

    /// Makes base and overlay; returns the bytes the overlay must show.
    fn make_images(&self) -> Result<Vec<u8>, String> {
        say("\n1. a base image with recognisable data, and an overlay with changes");
        let mut disk = vec![0; DISK_LEN];
        for (offset, len) in BASE_DATA {
            for (at, byte) in disk.iter_mut().enumerate().skip(offset).take(len) {
                *byte = sector_byte(at);
            }
        }
        self.write("base.raw", &disk)?;
        self.bds(&["convert", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"])?;
        self.bds(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "overlay.qcow2"])?;
        let text = self.lifecycle(&["write", "overlay.qcow2"])?;
        let wrote = CHANGES
            .map(|(offset, len, byte)| format!("wrote {len} bytes of {byte:#04x} at {offset:#x}"));
        expect_lines(&text, &wrote.each_ref().map(String::as_str))?;
        for (offset, len, byte) in CHANGES {
            disk[offset..offset + len].fill(byte);
        }
        Ok(disk)
    }

    fn look(&self) -> Result<(), String> {
        say("\n2. what is in it");
        let text = self.bds_output(&["info", "--backing-chain", "overlay.qcow2"])?;
        for line in ["image: overlay.qcow2", "backing file: base.qcow2", "image: base.qcow2"] {
            expect_count(&text, line, 1)?;
        }
        say("\n3. the node graph, with reference counts and holders");
        let text = self.bds_output(&["graph", "overlay.qcow2"])?;
        // Two images and their files, each held once: the topmost by the command that opened it,
        // the others by the edges from above.
        expect_count(&text, " refs=1", 4)?;
        expect_count(&text, "held by ", 1)?;
        expect_count(&text, "used by edge ", 3)
    }

    fn convert_and_compare(&self, expected: &[u8]) -> Result<(), String> {
        say("\n4. the chain becomes one compressed image");
        self.bds(&["convert", "-p", "-c", "-O", "qcow2", "overlay.qcow2", "flat.qcow2"])?;
        self.bds(&["compare", "overlay.qcow2", "flat.qcow2"])?;
        let text = self.bds_output(&["check", "--output=json", "flat.qcow2"])?;
        check_compressed(&text)?;
        self.bds(&["convert", "-O", "raw", "flat.qcow2", "flat.raw"])?;
        let path = self.dir.join("flat.raw");
        let found = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        match first_difference(expected, &found) {
            None => Ok(()),
            Some(at) => Err(format!(
                "MISMATCH: the converted image differs from what was written at byte {at:#x}"
            )),
        }
    }

    /// The example ends with an error if a stale handle is not refused, or if anything is left
    /// over.
    fn stale_handle(&self) -> Result<(), String> {
        say("\n5. a reference is taken, released, and the handle tried again");
        expect_lines(&self.lifecycle(&["stale", "flat.qcow2"])?, &LIFE)
    }

    /// A chain of backups restores at each point.
    fn backups(&self, expected: &[u8]) -> Result<(), String> {
        say("\n6. a full backup, a change, an increment; proved, and restored at each point");
        self.bds(&["backup", "run", "flat.qcow2", "backups"])?;
        self.bds_output(&[
            "bench",
            "-w",
            "-c",
            "16",
            "-s",
            "65536",
            "--pattern",
            "99",
            "flat.qcow2",
        ])?;
        self.bds(&["backup", "run", "flat.qcow2", "backups"])?;
        let listed = self.bds_output(&["backup", "list", "backups"])?;
        expect_count(&listed, "000001  full", 1)?;
        expect_count(&listed, "000002  incremental", 1)?;
        self.bds(&["backup", "verify", "backups"])?;
        let mut changed = expected.to_vec();
        changed[..1 << 20].fill(99);
        for (point, expected) in [("1", expected), ("2", &changed)] {
            let name = format!("point{point}.raw");
            self.bds(&["backup", "restore", "-O", "raw", "--point", point, "backups", &name])?;
            self.expect_bytes(&name, expected)?;
        }
        Ok(())
    }

    /// Two disks as one: what is restored is of one moment.
    fn two_disks(&self, expected: &[u8]) -> Result<(), String> {
        say("\n7. two disks backed up as one, restored together");
        self.bds(&["create", "-q", "-f", "qcow2", "log.qcow2", "1M"])?;
        self.bds(&["convert", "-O", "qcow2", "flat.raw", "data.qcow2"])?;
        self.bds(&["backup", "run", "data.qcow2", "log.qcow2", "both"])?;
        for image in ["data.qcow2", "log.qcow2"] {
            let write = ["bench", "-w", "-c", "1", "-s", "65536", "--pattern", "77", image];
            self.bds_output(&write)?;
        }
        self.bds(&["backup", "run", "data.qcow2", "log.qcow2", "both"])?;
        expect_count(&self.bds_output(&["backup", "list", "both"])?, "data 00000", 2)?;
        let mut changed = expected.to_vec();
        changed[..65536].fill(77);
        let mut log = vec![0; 1 << 20];
        for (point, data) in [("1", expected), ("2", &changed)] {
            let name = format!("both{point}");
            self.bds(&["backup", "restore", "-O", "raw", "--point", point, "both", &name])?;
            self.expect_bytes(&format!("{name}/data.raw"), data)?;
            self.expect_bytes(&format!("{name}/log.raw"), &log)?;
            log[..65536].fill(77);
        }
        Ok(())
    }

    /// The block job `mirror`, on a closed image.
    fn mirror(&self, expected: &[u8]) -> Result<(), String> {
        say("\n8. an image moves to another file as a job, with its events");
        let events = self.bds_output(&["mirror", "--output=json", "flat.raw", "moved.raw"])?;
        for event in ["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"] {
            expect_count(&events, event, 1)?;
        }
        self.expect_bytes("moved.raw", expected)
    }

    /// Compares a file with bytes computed here.
    fn expect_bytes(&self, name: &str, expected: &[u8]) -> Result<(), String> {
        let path = self.dir.join(name);
        let found = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        match first_difference(expected, &found) {
            None => Ok(()),
            Some(at) => Err(format!("MISMATCH: {name} differs at byte {at:#x}")),
        }
    }

    /// The block job `commit`, on closed images.
    fn commit(&self) -> Result<(), String> {
        say("\n9. the overlay is committed: the base alone shows what the overlay showed");
        self.bds(&["commit", "overlay.qcow2"])?;
        self.bds(&["compare", "-f", "qcow2", "-F", "raw", "base.qcow2", "point1.raw"])
    }

    /// The same library from C.
    fn handles_in_c(&self) -> Result<(), String> {
        say("\n10. counted handles from C");
        if which("cc").is_none() {
            say("skipped: cc is not installed");
            return Ok(());
        }
        let prefix = self.dir.join("c");
        dist::dist(Some(&prefix), true)
    }

    /// Runs the tool, with our own standard streams.
    fn bds(&self, args: &[&str]) -> Result<(), String> {
        say(&format!("$ bds {}", args.join(" ")));
        run(Command::new(&self.bds).args(args).current_dir(&self.dir))
    }

    /// The same, and returns what it printed.
    fn bds_output(&self, args: &[&str]) -> Result<String, String> {
        self.output_of("bds", &self.bds, args)
    }

    fn lifecycle(&self, args: &[&str]) -> Result<String, String> {
        self.output_of("lifecycle", &self.lifecycle, args)
    }

    fn output_of(&self, name: &str, program: &Path, args: &[&str]) -> Result<String, String> {
        say(&format!("$ {name} {}", args.join(" ")));
        let text = output(Command::new(program).args(args).current_dir(&self.dir))?;
        say(text.trim_end());
        Ok(text)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let path: &Path = &self.dir.join(name);
        fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// Returns the byte at an offset: the sector's number, repeated, never zero.
fn sector_byte(at: usize) -> u8 {
    let sector = at / 512;
    let byte = sector.to_le_bytes()[at % 3];
    byte | 1
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let differing = a.iter().zip(b).position(|(x, y)| x != y);
    differing.or_else(|| (a.len() != b.len()).then(|| a.len().min(b.len())))
}

/// Fails unless the text has exactly these lines, each known by how it begins.
fn expect_lines(text: &str, wanted: &[&str]) -> Result<(), String> {
    let lines: Vec<&str> = text.lines().collect();
    let differs = |at: &usize| match (lines.get(*at), wanted.get(*at)) {
        (Some(line), Some(start)) => !line.starts_with(start),
        _ => true,
    };
    match (0..lines.len().max(wanted.len())).find(differs) {
        None => Ok(()),
        Some(at) => Err(format!(
            "MISMATCH: line {} should begin with {:?} and is {:?}",
            at + 1,
            wanted.get(at),
            lines.get(at)
        )),
    }
}

/// Fails unless `what` stands so often in the text.
fn expect_count(text: &str, what: &str, wanted: usize) -> Result<(), String> {
    match text.matches(what).count() {
        found if found == wanted => Ok(()),
        found => {
            Err(format!("MISMATCH: '{what}' should be there {wanted} times, and is {found} times"))
        }
    }
}

/// Fails unless a check found nothing wrong and every cluster compressed.
fn check_compressed(json: &str) -> Result<(), String> {
    let report: serde_json::Value = serde_json::from_str(json).map_err(|e| e.to_string())?;
    let count = |key: &str| report[key].as_u64();
    for key in ["corruptions", "leaks", "check-errors"] {
        if count(key).unwrap_or(0) > 0 {
            return Err(format!("MISMATCH: the check reports {key}: {}", report[key]));
        }
    }
    match (count("allocated-clusters"), count("compressed-clusters")) {
        (Some(all), Some(compressed)) if all > 0 && all == compressed => Ok(()),
        (all, compressed) => Err(format!(
            "MISMATCH: {compressed:?} of {all:?} clusters are compressed, and all should be"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_found_also_at_the_end() {
        assert_eq!(first_difference(b"abc", b"abc"), None);
        assert_eq!(first_difference(b"abc", b"axc"), Some(1));
        assert_eq!(first_difference(b"abc", b"abcd"), Some(3));
    }

    #[test]
    fn lines_are_compared_by_their_beginnings_and_all_of_them() {
        let wanted = ["one ", "two"];
        assert_eq!(expect_lines("one thing\ntwo\n", &wanted), Ok(()));
        for text in ["one thing\n", "one thing\ntwo\nthree\n", "two\none thing\n", ""] {
            assert!(expect_lines(text, &wanted).is_err(), "{text:?}");
        }
        let life = LIFE.join("\n");
        assert_eq!(expect_lines(&life, &LIFE), Ok(()));
        let leaked = life.replace("nothing is left over", "1 node is left over");
        let why = expect_lines(&leaked, &LIFE).unwrap_err();
        assert!(why.starts_with("MISMATCH: line 7 should begin with"), "{why}");
    }

    #[test]
    fn counts_are_exact() {
        assert_eq!(expect_count("a refs=1 b refs=1", " refs=1", 2), Ok(()));
        assert!(expect_count("a refs=1 b refs=2", " refs=1", 2).is_err());
        assert!(expect_count("", " refs=1", 2).is_err());
    }

    #[test]
    fn a_check_passes_only_if_all_is_well_and_all_is_compressed() {
        let good = r#"{"check-errors":0,"allocated-clusters":8,"compressed-clusters":8}"#;
        assert_eq!(check_compressed(good), Ok(()));
        for (from, to) in [
            ("\"check-errors\":0", "\"check-errors\":1"),
            ("\"check-errors\":0", "\"check-errors\":0,\"leaks\":1"),
            ("\"check-errors\":0", "\"check-errors\":0,\"corruptions\":2"),
            ("\"compressed-clusters\":8", "\"compressed-clusters\":7"),
            (",\"compressed-clusters\":8", ""),
            (":8", ":0"),
            ("{", ""),
        ] {
            assert!(check_compressed(&good.replace(from, to)).is_err(), "{from} -> {to}");
        }
    }
}
