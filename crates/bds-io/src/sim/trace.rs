//! What happened lately, for the message of a failing test.

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::fault::OpMask;

/// One thing that happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Note {
    pub at_ns: u64,
    pub op: u64,
    pub kind: OpMask,
    pub stage: Stage,
    pub file: usize,
    pub offset: u64,
    pub len: u64,
}

/// Where in its life an operation was.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    Submitted,
    /// Done with this many bytes.
    Done(u64),
    /// Failed with this errno.
    Failed(i32),
    /// The power went while it was submitted.
    Cut,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note { at_ns, op, kind, stage, offset, len, .. } = self;
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
    ring: VecDeque<Note>,
    capacity: usize,
    hash: u64,
}

impl Trace {
    /// Keeps the last `capacity` notes.
    pub(super) fn new(capacity: usize) -> Trace {
        Trace { ring: VecDeque::new(), capacity, hash: 0xcbf2_9ce4_8422_2325 }
    }

    /// Adds a note.
    pub(super) fn push(&mut self, note: Note) {
        let (stage, value) = match note.stage {
            Stage::Submitted => (0, 0),
            Stage::Done(bytes) => (1, bytes),
            Stage::Failed(errno) => (2, u64::from(errno.unsigned_abs())),
            Stage::Cut => (3, 0),
        };
        let fields = [note.at_ns, note.op, u64::from(note.kind.bits()), stage, value];
        for field in fields.into_iter().chain([note.file as u64, note.offset, note.len]) {
            self.hash = (self.hash ^ field).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        if self.capacity > 0 {
            if self.ring.len() == self.capacity {
                self.ring.pop_front();
            }
            self.ring.push_back(note);
        }
    }

    /// The last notes, oldest first; `path` names a file.
    pub(super) fn lines(&self, path: impl Fn(usize) -> String) -> Vec<String> {
        self.ring.iter().map(|note| format!("{note} ({})", path(note.file))).collect()
    }

    /// Equal for equal histories, also where the ring has forgotten them.
    pub(super) fn fingerprint(&self) -> u64 {
        self.hash
    }
}
