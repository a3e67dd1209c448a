//! Probes formats: guesses from the first bytes of a file which drivers could read it. Opens
//! nothing.
//!
//! A guess must never choose how a file is *written* without the user's consent: a guest that can
//! write a raw disk can make it look like any format. So no open path calls this; a caller that
//! wants a guess requests it explicitly.

use super::{Category, Registry};

/// How many leading bytes of a file are probed.
pub const PROBE_LEN: usize = 64 << 10;

/// A format that a probe found possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// The driver's name.
    pub driver: &'static str,
    /// Confidence: 1 to 100.
    pub score: u8,
}

/// The formats that a file of `file_len` bytes may have that begins with `head` (at most
/// [`PROBE_LEN`] bytes are examined), the most likely first, equals by name. `raw`, which fits
/// everything, is not among them unless its driver says so: an empty answer means raw or unknown.
pub fn probe(registry: &Registry, head: &[u8], file_len: u64) -> Vec<Candidate> {
    let head = &head[..head.len().min(PROBE_LEN)];
    let mut found: Vec<Candidate> = registry
        .iter()
        .filter(|driver| driver.category() == Category::Format)
        .map(|driver| Candidate { driver: driver.name(), score: driver.probe(head, file_len) })
        .filter(|candidate| candidate.score > 0)
        .collect();
    found.sort_by(|a, b| b.score.cmp(&a.score).then(a.driver.cmp(b.driver)));
    found
}
