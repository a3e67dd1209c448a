//! Kinds of requests that are counted apart.

use std::time::Duration;

/// Kind of a request, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Reads.
    Read,
    /// Writes, compressed ones too.
    Write,
    /// Zero writes.
    Zero,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

/// Number of kinds.
pub(super) const OPERATIONS: usize = 5;

/// Nanoseconds, as far as they fit: 584 years.
pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
