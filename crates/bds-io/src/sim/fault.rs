//! Fault injection: decides which operations fail, and how.
//!
//! Faults are armed by number (the n-th matching operation from now), or drawn at a rate. This file
//! only decides; the engine applies the decision.

use std::path::Path;

use bitflags::bitflags;

use super::rng::Rng;

bitflags! {
    /// A set of kinds of operations.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OpMask: u16 {
        /// Reads.
        const READ = 1;
        /// Writes.
        const WRITE = 1 << 1;
        /// fdatasync.
        const SYNC = 1 << 2;
        /// The fallocate family.
        const ZERO = 1 << 3;
        /// ftruncate.
        const SET_LEN = 1 << 4;
        /// copy_file_range; the mask means its target.
        const COPY = 1 << 5;
        /// A block device's discard and zero-out.
        const DEVICE = 1 << 6;
        /// Opening by name.
        const OPEN = 1 << 7;
        /// Taking a byte lock.
        const LOCK = 1 << 8;
        /// SEEK_DATA / SEEK_HOLE.
        const EXTENT = 1 << 9;

        /// Every awaited operation, which `Sim::ops` counts.
        const IO = 0x7f;
        /// Every operation that may change the content after a power cut, which `Sim::writes`
        /// counts.
        const CHANGE = 0x7e;
    }
}

/// A failure to inject.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The errno it fails with.
    pub errno: i32,
    /// Which operations match.
    pub ops: OpMask,
    /// Only files whose path contains this text; empty: any file.
    pub path: String,
    /// Every matching operation from the n-th on fails, not only the n-th.
    pub sticky: bool,
    /// A failing write may have written a part of its bytes.
    pub partial: bool,
}

impl Fault {
    /// One I/O operation fails with `errno` and does nothing.
    pub fn once(errno: i32) -> Fault {
        Fault { errno, ops: OpMask::IO, path: String::new(), sticky: false, partial: false }
    }

    /// All I/O operations from the n-th on fail with `errno` and do nothing.
    pub fn sticky(errno: i32) -> Fault {
        Fault { sticky: true, ..Fault::once(errno) }
    }

    /// Only these operations match.
    #[must_use]
    pub fn on(self, ops: OpMask) -> Fault {
        Fault { ops, ..self }
    }

    /// Only files whose path contains `part` match.
    #[must_use]
    pub fn in_path(self, part: &str) -> Fault {
        Fault { path: part.to_owned(), ..self }
    }

    /// A failing write writes a seeded part of its bytes.
    #[must_use]
    pub fn partially(self) -> Fault {
        Fault { partial: true, ..self }
    }
}

/// A decision to fail one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub errno: i32,
    pub partial: bool,
}

struct Armed {
    fault: Fault,
    /// Matching operations that still pass.
    passes: u64,
}

/// All faults of a world.
pub(super) struct FaultPlan {
    armed: Vec<Armed>,
    /// Probability that an operation of `rate_ops` fails with `rate_errno`.
    pub rate: f64,
    pub rate_ops: OpMask,
    pub rate_errno: i32,
}

impl FaultPlan {
    /// Nothing armed; failures at `rate` only.
    pub(super) fn new(rate: f64, rate_ops: OpMask, rate_errno: i32) -> FaultPlan {
        FaultPlan { armed: Vec::new(), rate, rate_ops, rate_errno }
    }

    /// Fails the matching operation number `n` (0: the next one) from now on.
    pub(super) fn arm(&mut self, n: u64, fault: Fault) {
        self.armed.push(Armed { fault, passes: n });
    }

    /// Disarms everything.
    pub(super) fn clear(&mut self) {
        self.armed.clear();
        self.rate = 0.0;
    }

    /// Decides about one operation on `path`.
    pub(super) fn decide(&mut self, op: OpMask, path: &Path, rng: &mut Rng) -> Option<Failure> {
        let mut failure = None;
        self.armed.retain_mut(|armed| {
            let fault = &armed.fault;
            let is_match = fault.ops.contains(op)
                && (fault.path.is_empty() || path.to_string_lossy().contains(&fault.path));
            if !is_match {
                return true;
            }
            if armed.passes > 0 {
                armed.passes -= 1;
                return true;
            }
            failure = failure.or(Some(Failure { errno: fault.errno, partial: fault.partial }));
            fault.sticky
        });
        if failure.is_none() && self.rate_ops.contains(op) && rng.hit(self.rate) {
            failure = Some(Failure { errno: self.rate_errno, partial: rng.coin() });
        }
        failure
    }
}
