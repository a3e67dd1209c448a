//! Helpers: runs a test on every engine, and makes scratch files.

use bds_io::{Context, ContextOptions, EngineKind, File, Fs, IoVec, OpenOptions};
use tempfile::TempDir;

/// Runs `test` once with each engine; prints which one is not available here.
pub(crate) fn on_every_engine(test: impl Fn(&Context)) {
    for engine in [EngineKind::Uring, EngineKind::Pool] {
        let options = ContextOptions { engine, ..ContextOptions::default() };
        match Context::new(options) {
            Ok(context) => test(&context),
            Err(error) => println!("skipped: no {engine:?} engine here: {error}"),
        }
    }
}

/// A fresh writable file in a directory of its own.
pub(crate) fn scratch() -> (TempDir, File) {
    scratch_with(&OpenOptions::default())
}

/// As `scratch`, opened otherwise.
pub(crate) fn scratch_with(options: &OpenOptions) -> (TempDir, File) {
    let dir = tempfile::tempdir().unwrap();
    let options = OpenOptions { write: true, create: true, ..options.clone() };
    let file = Fs::Host.open(&dir.path().join("disk"), &options).unwrap();
    (dir, file)
}

/// Bytes that differ by position and seed.
pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..=u16::MAX).cycle().take(len).map(|at| mix(at.to_le_bytes(), seed)).collect()
}

/// The bytes of a list.
pub(crate) fn bytes(iov: &IoVec) -> Vec<u8> {
    iov.to_vec(0..iov.len())
}

fn mix([low, high]: [u8; 2], seed: u8) -> u8 {
    low ^ high.wrapping_mul(29) ^ seed
}
