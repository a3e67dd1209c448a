//! Makes the images that the benches read, once a run and with bds itself, so that the benches also
//! run where qemu-img is missing.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::process::Command;

use super::stage::Stage;
use crate::run::output;

/// Length of the dense disk.
pub(crate) const DENSE: u64 = 1 << 30;
/// Length of the disk below scattered copies on write: what a small cloud image has.
pub(crate) const WIDE: u64 = 2 << 30;
/// Length of the disk for compression.
pub(crate) const TEXT: u64 = 256 << 20;
/// Depths of backing chains.
pub(crate) const CHAINS: [u32; 4] = [1, 10, 100, 200];

/// What must be put in order before a run.
#[derive(Clone, Debug)]
pub(crate) enum Prepare {
    /// Remove a file if it is there.
    Remove(String),
    /// Run a command.
    Run(Vec<String>),
}

/// Carries out one preparation.
pub(crate) fn prepare(stage: &Stage, step: &Prepare) -> Result<(), String> {
    match step {
        Prepare::Remove(name) => match fs::remove_file(stage.dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{name}: {e}")),
            _ => Ok(()),
        },
        Prepare::Run(words) => {
            output(Command::new(&words[0]).args(&words[1..]).current_dir(&stage.dir)).map(|_| ())
        }
    }
}

/// Makes what is not there yet.
pub(crate) fn make(stage: &Stage) -> Result<(), String> {
    let raw = |name: &str, len, fill: fn(u64, &mut [u8])| write_raw(stage, name, len, fill);
    dense(stage, "dense", DENSE)?;
    raw("wide.raw", WIDE, noise)?;
    raw("text.raw", TEXT, text)?;
    raw("sparse.raw", 4 << 30, |at, block| {
        if at.is_multiple_of(64 << 20) {
            noise(at, block);
        }
    })?;
    for name in ["sparse", "text"] {
        once(
            stage,
            &format!("{name}.qcow2"),
            &["convert", "-f", "raw", "-O", "qcow2", &format!("{name}.raw")],
        )?;
    }
    let zlib =
        ["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zlib", "text.raw"];
    once(stage, "zlib.qcow2", &zlib)?;
    let zstd =
        ["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "text.raw"];
    once(stage, "zstd.qcow2", &zstd)?;
    chain(stage)
}

/// A disk of so many bytes, all data, as `NAME.raw` and `NAME.qcow2`.
pub(crate) fn dense(stage: &Stage, name: &str, len: u64) -> Result<(), String> {
    let (raw, qcow2) = (format!("{name}.raw"), format!("{name}.qcow2"));
    write_raw(stage, &raw, len, noise)?;
    once(stage, &qcow2, &["convert", "-f", "raw", "-O", "qcow2", &raw])
}

/// A dense base below 200 empty overlays.
fn chain(stage: &Stage) -> Result<(), String> {
    let last = CHAINS[CHAINS.len() - 1];
    let mut below = "dense.qcow2".to_owned();
    for layer in 1..=last {
        let name = format!("layer{layer}.qcow2");
        if !stage.dir.join(&name).exists() {
            let words = ["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &name, "1G"];
            output(Command::new(&stage.bds).args(words).current_dir(&stage.dir))?;
        }
        below = name;
    }
    Ok(())
}

fn once(stage: &Stage, name: &str, words: &[&str]) -> Result<(), String> {
    if stage.dir.join(name).exists() {
        return Ok(());
    }
    output(Command::new(&stage.bds).args(words).arg(name).current_dir(&stage.dir)).map(|_| ())
}

fn write_raw(stage: &Stage, name: &str, len: u64, fill: fn(u64, &mut [u8])) -> Result<(), String> {
    let path = stage.dir.join(name);
    if path.exists() {
        return Ok(());
    }
    let write = || -> std::io::Result<()> {
        let file = File::create(&path)?;
        file.set_len(len)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut block = vec![0; 1 << 20];
        for at in (0..len).step_by(block.len()) {
            block.fill(0);
            fill(at, &mut block);
            if block.iter().all(|b| *b == 0) {
                std::io::Seek::seek(&mut out, std::io::SeekFrom::Start(at + block.len() as u64))?;
            } else {
                out.write_all(&block)?;
            }
        }
        out.flush()
    };
    write().map_err(|e| format!("{}: {e}", path.display()))
}

/// Bytes that do not compress.
fn noise(at: u64, block: &mut [u8]) {
    let mut state = at ^ 0x9e37_79b9_7f4a_7c15;
    for chunk in block.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// Bytes that compress to about a third: words of a small vocabulary, numbers in between.
fn text(at: u64, block: &mut [u8]) {
    const WORDS: [&str; 16] = [
        "block ",
        "node ",
        "graph ",
        "image ",
        "cluster ",
        "offset ",
        "table ",
        "entry ",
        "read ",
        "write ",
        "flush ",
        "backing ",
        "file\n",
        "refcount ",
        "0x00000000",
        "snapshot ",
    ];
    let mut state = at.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let mut out = 0;
    while out < block.len() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let number = format!("{} ", state >> 44);
        let word = if state.is_multiple_of(5) {
            &number
        } else {
            WORDS[usize::from(state.to_le_bytes()[1] & 15)]
        };
        let take = word.len().min(block.len() - out);
        block[out..out + take].copy_from_slice(&word.as_bytes()[..take]);
        out += take;
    }
}
