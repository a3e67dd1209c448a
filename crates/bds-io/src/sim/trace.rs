//! `Trace`: the recent operations of a world, for failure messages, and a fingerprint of all.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::fault::OpMask;

/// One event of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct TraceEntry {
    pub at_ns: u64,
    pub op: u64,
    pub kind: OpMask,
    pub stage: Stage,
    pub file: usize,
    pub offset: u64,
    pub len: u64,
}

/// Stage of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    Submitted,
    /// Done with this many bytes.
    Done(u64),
    /// Failed with this errno.
    Failed(i32),
    /// The power was cut while it was submitted.
    Cut,
}

impl fmt::Display for TraceEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TraceEntry { at_ns, op, kind, stage, offset, len, .. } = self;
        let at = Duration::from_nanos(*at_ns);
        write!(f, "{at:>12?} op {op:>5} {:<7} {offset}+{len} ", name(*kind))?;
        match stage {
            Stage::Submitted => write!(f, "submitted"),
            Stage::Done(bytes) => write!(f, "done: {bytes}"),
            Stage::Failed(errno) => write!(f, "failed: errno {errno}"),
            Stage::Cut => write!(f, "power cut"),
        }
    }
}

fn name(kind: OpMask) -> &'static str {
    kind.iter_names().next().map_or("none", |(name, _)| name)
}

/// The last operations and a hash over all.
pub(super) struct Trace {
    ring: VecDeque<TraceEntry>,
    capacity: usize,
    hash: u64,
}

impl Trace {
    /// Keeps the last `capacity` entries.
    pub(super) fn new(capacity: usize) -> Trace {
        Trace { ring: VecDeque::new(), capacity, hash: 0xcbf2_9ce4_8422_2325 }
    }

    /// Adds an entry.
    pub(super) fn push(&mut self, entry: TraceEntry) {
        let (stage, value) = match entry.stage {
            Stage::Submitted => (0, 0),
            Stage::Done(bytes) => (1, bytes),
            Stage::Failed(errno) => (2, u64::from(errno.unsigned_abs())),
            Stage::Cut => (3, 0),
        };
        let fields = [entry.at_ns, entry.op, u64::from(entry.kind.bits()), stage, value];
        for field in fields.into_iter().chain([entry.file as u64, entry.offset, entry.len]) {
            self.hash = (self.hash ^ field).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        if self.capacity > 0 {
            if self.ring.len() == self.capacity {
                self.ring.pop_front();
            }
            self.ring.push_back(entry);
        }
    }

    /// The last entries, oldest first; `path` names a file.
    pub(super) fn lines(&self, path: impl Fn(usize) -> String) -> Vec<String> {
        self.ring.iter().map(|entry| format!("{entry} ({})", path(entry.file))).collect()
    }

    /// Equal for equal histories, also of entries that the ring no longer has.
    pub(super) fn fingerprint(&self) -> u64 {
        self.hash
    }
}
