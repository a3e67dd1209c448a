//! Generates seeded sequences of disk requests.
//!
//! A workload is data: it can be printed, cut short, and run again. Bytes written carry their
//! position and the number of the operation that wrote them (see [`crate::pattern`]), so that a
//! misplaced or old byte is recognised.

use std::fmt;
use std::sync::Arc;

use crate::{Chance, pattern};

/// Sector: the unit in which contents are compared after a crash.
pub const SECTOR: u64 = 512;

/// One request.
#[derive(Clone)]
pub enum Op {
    /// Writes bytes.
    Write {
        /// Offset in bytes.
        at: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
        /// Durable when it ends.
        fua: bool,
    },
    /// Writes one cluster (or the disk's tail) compressed.
    Compressed {
        /// Offset in bytes.
        at: u64,
        /// The bytes.
        bytes: Arc<[u8]>,
    },
    /// Writes zeros.
    Zero {
        /// Offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
        /// May free the space.
        may_unmap: bool,
        /// Durable when it ends.
        fua: bool,
    },
    /// Discards: reads as before or as zeros afterwards.
    Discard {
        /// Offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Reads and compares.
    Read {
        /// Offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Flushes: makes durable what completed before.
    Flush,
    /// Grows the disk to this many bytes.
    Grow {
        /// New length in bytes.
        len: u64,
    },
}

impl Op {
    /// The bytes it touches: offset and length; `None` for a flush or a growth.
    pub fn range(&self) -> Option<(u64, u64)> {
        match self {
            Self::Write { at, bytes, .. } | Self::Compressed { at, bytes } => {
                Some((*at, bytes.len() as u64))
            }
            Self::Zero { at, len, .. } | Self::Discard { at, len } | Self::Read { at, len } => {
                Some((*at, *len))
            }
            Self::Flush | Self::Grow { .. } => None,
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |is_set: bool, word| if is_set { word } else { "" };
        match self {
            Self::Write { at, bytes, fua } => {
                write!(f, "write {at:#x}+{:#x}{}", bytes.len(), flag(*fua, " fua"))
            }
            Self::Compressed { at, bytes } => write!(f, "compressed {at:#x}+{:#x}", bytes.len()),
            Self::Zero { at, len, may_unmap, fua } => {
                let unmap = flag(*may_unmap, " unmap");
                write!(f, "zero {at:#x}+{len:#x}{unmap}{}", flag(*fua, " fua"))
            }
            Self::Discard { at, len } => write!(f, "discard {at:#x}+{len:#x}"),
            Self::Read { at, len } => write!(f, "read {at:#x}+{len:#x}"),
            Self::Flush => f.write_str("flush"),
            Self::Grow { len } => write!(f, "grow to {len:#x}"),
        }
    }
}

/// One step of a workload.
#[derive(Clone, Debug)]
pub enum Step {
    /// Requests that run concurrently; mostly one.
    Requests(Vec<Op>),
    /// Closes the image and opens it again.
    Reopen,
}

/// Parameters of a workload.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Length of the disk in bytes, a multiple of 512.
    pub len: u64,
    /// Length it may grow to.
    pub max_len: u64,
    /// Allocation unit in bytes.
    pub cluster: u64,
    /// Number of steps.
    pub steps: usize,
    /// Half of the requests go to the first `hot_len` bytes, so that they overlap.
    pub hot_len: u64,
    /// Longest write in bytes.
    pub max_write: u64,
    /// Compressed writes are possible.
    pub has_compression: bool,
    /// The image may be closed and opened in between.
    pub reopens: bool,
    /// More than one request at a time is possible.
    pub batches: bool,
    /// Reads are included (a crash sweep does not need them).
    pub reads: bool,
}

/// A sequence of steps and its seed.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The seed.
    pub seed: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

impl Workload {
    /// Generates the workload of this seed.
    pub fn new(seed: u64, shape: &Shape) -> Self {
        let mut maker =
            Maker { chance: Chance::new(seed), shape, len: shape.len, stamp: seed << 12 };
        let steps = (0..shape.steps).map(|_| maker.step()).collect();
        Self { seed, steps }
    }

    /// Returns its first `count` steps.
    #[must_use]
    pub fn prefix(&self, count: usize) -> Self {
        Self { seed: self.seed, steps: self.steps[..count.min(self.steps.len())].to_vec() }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "workload of seed {}:", self.seed)?;
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {number:>3} {step:?}")?;
        }
        Ok(())
    }
}

struct Maker<'a> {
    chance: Chance,
    shape: &'a Shape,
    len: u64,
    stamp: u64,
}

impl Maker<'_> {
    fn step(&mut self) -> Step {
        if self.shape.reopens && self.chance.one_in(16) {
            return Step::Reopen;
        }
        if !self.shape.batches || !self.chance.one_in(3) {
            let op = if self.len + self.grow_by() <= self.shape.max_len && self.chance.one_in(12) {
                self.len += self.grow_by();
                Op::Grow { len: self.len }
            } else {
                self.op_of_fixed_len()
            };
            return Step::Requests(vec![op]);
        }
        let count = self.chance.between(2, 8);
        let mut ops: Vec<Op> = Vec::new();
        for _ in 0..count {
            let op = self.op_of_fixed_len();
            if ops.iter().all(|other| may_race(other, &op)) {
                ops.push(op);
            }
        }
        Step::Requests(ops)
    }

    fn grow_by(&self) -> u64 {
        (self.shape.cluster * 3 + SECTOR).next_multiple_of(SECTOR)
    }

    /// Any request but a growth, which runs alone: valid ranges would depend on the order.
    fn op_of_fixed_len(&mut self) -> Op {
        let shape = self.shape;
        match self.chance.below(24) {
            0..=10 => self.write(),
            11..=12 => {
                let (at, len) = self.range();
                let (may_unmap, fua) = (self.chance.one_in(2), self.chance.one_in(8));
                Op::Zero { at, len, may_unmap, fua }
            }
            13..=14 => {
                let (at, len) = self.range();
                Op::Discard { at, len }
            }
            15..=16 if shape.has_compression => self.compressed(),
            17..=19 => Op::Flush,
            _ if shape.reads => {
                let (at, len) = self.range();
                Op::Read { at, len }
            }
            _ => self.write(),
        }
    }

    fn write(&mut self) -> Op {
        let (at, len) = self.range();
        let bytes = pattern(self.next_stamp(), at, to_usize(len)).into();
        Op::Write { at, bytes, fua: self.chance.one_in(10) }
    }

    fn compressed(&mut self) -> Op {
        let cluster = self.shape.cluster;
        let at = self.chance.below(self.len.div_ceil(cluster)) * cluster;
        let at =
            if self.chance.one_in(2) { at % self.hot_len().next_multiple_of(cluster) } else { at };
        let at = if at < self.len { at } else { 0 };
        let len = cluster.min(self.len - at);
        let stamp = self.next_stamp();
        let mut bytes = Vec::with_capacity(to_usize(len));
        while (bytes.len() as u64) < len {
            // A short identity, and then bytes that every codec compresses.
            let mut sector = pattern(stamp, at + bytes.len() as u64, 512);
            let fill = sector[17];
            sector[24..].fill(fill);
            bytes.extend_from_slice(&sector);
        }
        bytes.truncate(to_usize(len));
        Op::Compressed { at, bytes: bytes.into() }
    }

    fn next_stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.stamp
    }

    fn hot_len(&self) -> u64 {
        self.shape.hot_len.clamp(SECTOR, self.len)
    }

    /// A range inside the disk: whole clusters, sectors, a few odd bytes, or across a boundary.
    fn range(&mut self) -> (u64, u64) {
        let Shape { cluster, max_write, .. } = *self.shape;
        let area = if self.chance.one_in(2) { self.hot_len() } else { self.len };
        let at = self.chance.below(area);
        let (at, len) = match self.chance.below(8) {
            0..=2 => (at / cluster * cluster, cluster * self.chance.between(1, 4)),
            3..=4 => {
                (at / SECTOR * SECTOR, SECTOR * self.chance.between(1, 2 * (cluster / SECTOR)))
            }
            5 => (at, self.chance.between(1, 700)),
            6 => {
                let before = self.chance.between(1, 300);
                let edge = (at / cluster + 1) * cluster;
                (edge - before.min(edge), before + self.chance.between(1, 300))
            }
            _ => (at, self.chance.between(1, max_write)),
        };
        let at = at.min(self.len - 1);
        (at, len.min(max_write).min(self.len - at))
    }
}

/// May these run concurrently? The model must know the possible results: either they share no byte,
/// or both are whole sectors (then each sector is that of one of them).
fn may_race(a: &Op, b: &Op) -> bool {
    let (Some((a_at, a_len)), Some((b_at, b_len))) = (a.range(), b.range()) else {
        return true;
    };
    if a_at + a_len <= b_at || b_at + b_len <= a_at {
        return true;
    }
    // A read, or a discard, which may be partial, beside a change of the same bytes has no defined
    // result.
    let is_plain =
        |op: &Op| matches!(op, Op::Write { .. } | Op::Zero { .. } | Op::Compressed { .. });
    is_plain(a)
        && is_plain(b)
        && [a_at, a_len, b_at, b_len].iter().all(|n| n.is_multiple_of(SECTOR))
}

fn to_usize(n: u64) -> usize {
    match usize::try_from(n) {
        Ok(n) => n,
        Err(_) => panic!("{n} bytes do not fit into memory"),
    }
}
