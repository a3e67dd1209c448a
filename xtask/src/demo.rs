//! `cargo xtask demo`: the main job, end to end, with no input.
//!
//! A base image with data one recognises, an overlay with changes, the graph with its references, the chain converted
//! to a compressed image, compared; then a reference is taken, released, and a stale handle tried. Every step's result is checked
//! against bytes computed here; the first thing that does not match ends the demo with an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{cargo, output, run, say, target_dir};

const DISK_LEN: usize = 64 << 20;
/// The parts of the base that hold data: (offset, length).
const BASE_DATA: [(usize, usize); 3] =
    [(0, 4 << 20), (17 << 20, 3 << 20), (DISK_LEN - (1 << 20), 1 << 20)];
/// What the overlay changes, as `lifecycle` (the example of bds-cli) writes it: (offset, length, byte).
const CHANGES: [(usize, usize, u8); 3] =
    [(1 << 20, 300_000, 0xa5), (20 << 20, 65_536, 0x5a), (40 << 20, 4096, 0x77)];

/// Runs the demo.
pub(crate) fn demo() -> Result<(), String> {
    say("building bds …");
    run(cargo().args([
        "build",
        "--quiet",
        "--package",
        "bds-cli",
        "--bin",
        "bds",
        "--example",
        "lifecycle",
    ]))?;
    let scene = Scene::new()?;
    let expected = scene.make_images()?;
    scene.look()?;
    scene.convert_and_compare(&expected)?;
    scene.stale_handle()?;
    say(
        "\neverything matched: the converted image equals base plus changes byte for byte, and the stale handle was refused",
    );
    Ok(())
}

struct Scene {
    dir: PathBuf,
    bds: PathBuf,
    lifecycle: PathBuf,
}

impl Scene {
    fn new() -> Result<Self, String> {
        let dir = target_dir().join("demo");
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
        self.lifecycle(&["write", "overlay.qcow2"])?;
        for (offset, len, byte) in CHANGES {
            disk[offset..offset + len].fill(byte);
        }
        Ok(disk)
    }

    fn look(&self) -> Result<(), String> {
        say("\n2. what is in it");
        self.bds(&["info", "--backing-chain", "overlay.qcow2"])?;
        say("\n3. the node graph, with reference counts and holders");
        self.bds(&["graph", "overlay.qcow2"])
    }

    fn convert_and_compare(&self, expected: &[u8]) -> Result<(), String> {
        say("\n4. the chain becomes one compressed image");
        self.bds(&["convert", "-p", "-c", "-O", "qcow2", "overlay.qcow2", "flat.qcow2"])?;
        self.bds(&["compare", "overlay.qcow2", "flat.qcow2"])?;
        self.bds(&["check", "flat.qcow2"])?;
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

    /// The example prints what a stale handle gets, and ends with 0 only if it was refused.
    fn stale_handle(&self) -> Result<(), String> {
        say("\n5. a reference is taken, released, and the handle tried again");
        let text = output(
            Command::new(&self.lifecycle).args(["stale", "flat.qcow2"]).current_dir(&self.dir),
        )?;
        say(text.trim_end());
        if text.contains("stale:") {
            Ok(())
        } else {
            Err("MISMATCH: the stale handle was not refused".into())
        }
    }

    fn bds(&self, args: &[&str]) -> Result<(), String> {
        say(&format!("$ bds {}", args.join(" ")));
        run(Command::new(&self.bds).args(args).current_dir(&self.dir))
    }

    fn lifecycle(&self, args: &[&str]) -> Result<(), String> {
        say(&format!("$ lifecycle {}", args.join(" ")));
        run(Command::new(&self.lifecycle).args(args).current_dir(&self.dir))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let path: &Path = &self.dir.join(name);
        fs::write(path, bytes).map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// A byte that tells where it stands: the sector's number, over and over, never zero.
fn sector_byte(at: usize) -> u8 {
    let sector = at / 512;
    let byte = sector.to_le_bytes()[at % 3];
    byte | 1
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let differing = a.iter().zip(b).position(|(x, y)| x != y);
    differing.or_else(|| (a.len() != b.len()).then(|| a.len().min(b.len())))
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
}
