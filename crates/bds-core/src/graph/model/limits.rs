//! A node's limits in atomics, which every request reads.
//!
//! They change only with the graph below, which is rare. No field has a meaning only together with
//! another, so a reader that sees old and new fields together is as right as one that read a moment
//! earlier. A request reads them once.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::driver::Limits;

#[derive(Default)]
pub(crate) struct LimitsCell {
    request_alignment: AtomicU32,
    memory_alignment: AtomicU32,
    max_transfer: AtomicU64,
    opt_transfer: AtomicU64,
    max_iov: AtomicU32,
    zero_alignment: AtomicU32,
    max_zero: AtomicU64,
    discard_alignment: AtomicU32,
    max_discard: AtomicU64,
}

impl LimitsCell {
    pub(crate) fn new(limits: Limits) -> Self {
        let cell = Self::default();
        cell.store(limits);
        cell
    }

    #[inline]
    pub(crate) fn load(&self) -> Limits {
        Limits {
            request_alignment: self.request_alignment.load(Ordering::Relaxed),
            memory_alignment: self.memory_alignment.load(Ordering::Relaxed),
            max_transfer: self.max_transfer.load(Ordering::Relaxed),
            opt_transfer: self.opt_transfer.load(Ordering::Relaxed),
            max_iov: self.max_iov.load(Ordering::Relaxed),
            zero_alignment: self.zero_alignment.load(Ordering::Relaxed),
            max_zero: self.max_zero.load(Ordering::Relaxed),
            discard_alignment: self.discard_alignment.load(Ordering::Relaxed),
            max_discard: self.max_discard.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn store(&self, limits: Limits) {
        self.request_alignment.store(limits.request_alignment, Ordering::Relaxed);
        self.memory_alignment.store(limits.memory_alignment, Ordering::Relaxed);
        self.max_transfer.store(limits.max_transfer, Ordering::Relaxed);
        self.opt_transfer.store(limits.opt_transfer, Ordering::Relaxed);
        self.max_iov.store(limits.max_iov, Ordering::Relaxed);
        self.zero_alignment.store(limits.zero_alignment, Ordering::Relaxed);
        self.max_zero.store(limits.max_zero, Ordering::Relaxed);
        self.discard_alignment.store(limits.discard_alignment, Ordering::Relaxed);
        self.max_discard.store(limits.max_discard, Ordering::Relaxed);
    }
}

/// Narrows a driver's own limits by a child's: a request that the child would split need not be
/// longer. `request_alignment` is not merged, because every node aligns for itself; nor are the
/// limits of zero writes and discards.
pub(crate) fn merge(own: Limits, child: Limits) -> Limits {
    Limits {
        memory_alignment: own.memory_alignment.max(child.memory_alignment),
        max_transfer: min_non_zero(own.max_transfer, child.max_transfer),
        opt_transfer: own.opt_transfer.max(child.opt_transfer),
        max_iov: match (own.max_iov, child.max_iov) {
            (0, n) | (n, 0) => n,
            (a, b) => a.min(b),
        },
        discard_alignment: own.discard_alignment.max(child.discard_alignment),
        ..own
    }
}

fn min_non_zero(a: u64, b: u64) -> u64 {
    match (a, b) {
        (0, n) | (n, 0) => n,
        (a, b) => a.min(b),
    }
}

/// Makes a driver's limits safe to compute with: alignments are powers of two, `request_alignment`
/// at most 1 GiB.
pub(crate) fn sane(limits: Limits) -> Limits {
    let power = |n: u32| n.clamp(1, 1 << 30).next_power_of_two();
    Limits {
        request_alignment: power(limits.request_alignment),
        memory_alignment: power(limits.memory_alignment),
        ..limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_takes_the_narrower_bound_and_the_wider_alignment() {
        let own =
            Limits { max_transfer: 0, max_iov: 16, request_alignment: 512, ..Limits::default() };
        let child = Limits {
            max_transfer: 1 << 20,
            memory_alignment: 4096,
            request_alignment: 4096,
            max_iov: 1024,
            ..Limits::default()
        };
        let merged = merge(own, child);
        assert_eq!((merged.max_transfer, merged.max_iov), (1 << 20, 16));
        assert_eq!((merged.memory_alignment, merged.request_alignment), (4096, 512));
    }

    #[test]
    fn a_stored_value_is_loaded_unchanged() {
        let limits = Limits { opt_transfer: 7, max_discard: 9, ..Limits::default() };
        assert_eq!(LimitsCell::new(limits).load(), limits);
    }
}
