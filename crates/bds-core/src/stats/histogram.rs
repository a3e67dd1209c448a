//! Latency histograms with boundaries of the user's choice.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};

/// More boundaries than this are refused.
const MAX_BOUNDARIES: usize = 1024;

/// A latency histogram.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Histogram {
    /// Boundaries between the bins, in nanoseconds, rising.
    pub boundaries_ns: Vec<u64>,
    /// Counts, one more than boundaries: below the first, from each on, from the last on.
    pub bins: Vec<u64>,
}

/// The counters of a histogram.
pub(super) struct Bins {
    boundaries_ns: Box<[u64]>,
    counts: Box<[AtomicU64]>,
}

impl Bins {
    pub(super) fn new(boundaries_ns: &[u64]) -> Result<Self> {
        let refuse = |words: String| Err(Error::new(ErrorKind::InvalidInput, words));
        if boundaries_ns.len() > MAX_BOUNDARIES {
            return refuse(format!("a histogram has at most {MAX_BOUNDARIES} boundaries"));
        }
        let mut last = 0;
        for &boundary in boundaries_ns {
            if boundary <= last {
                return refuse(format!(
                    "boundaries must rise from above zero: {boundary} does not"
                ));
            }
            last = boundary;
        }
        let counts = (0..=boundaries_ns.len()).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { boundaries_ns: boundaries_ns.into(), counts })
    }

    pub(super) fn count(&self, took_ns: u64) {
        let bin = self.boundaries_ns.partition_point(|&boundary| boundary <= took_ns);
        self.counts[bin].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn view(&self) -> Histogram {
        let bins = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        Histogram { boundaries_ns: self.boundaries_ns.to_vec(), bins }
    }
}
