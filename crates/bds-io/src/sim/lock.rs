//! `LockTable`: byte locks of one file, owned by open descriptions, with the rules of OFD locks.
//!
//! A description never conflicts with itself: a lock it takes replaces its locks on those bytes,
//! one it drops may leave two pieces. Nothing waits here; a conflict is a result.

use crate::file::ByteLock;

/// Mode of a byte lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Other owners may share it (F_RDLCK).
    Shared,
    /// No other owner may hold a lock on it (F_WRLCK).
    Exclusive,
}

/// A held range, both ends included, so that the last byte of the number range can be named.
#[derive(Clone, Copy, Debug)]
struct Held {
    owner: u64,
    first: u64,
    last: u64,
    kind: LockKind,
}

/// The locks of one file.
#[derive(Clone, Debug, Default)]
pub(super) struct LockTable {
    held: Vec<Held>,
}

/// First and last byte; a length of 0 reaches to the end of all offsets, as in fcntl(2).
fn span(lock: ByteLock) -> (u64, u64) {
    match lock.len {
        0 => (lock.offset, u64::MAX),
        len => (lock.offset, lock.offset.saturating_add(len - 1)),
    }
}

impl LockTable {
    /// True if a lock of this kind would conflict with one of another owner.
    pub(super) fn conflicts(&self, owner: u64, lock: ByteLock, kind: LockKind) -> bool {
        let (first, last) = span(lock);
        self.held.iter().any(|held| {
            held.owner != owner
                && held.first <= last
                && first <= held.last
                && (held.kind == LockKind::Exclusive || kind == LockKind::Exclusive)
        })
    }

    /// Takes a lock; false (and nothing changed) if it conflicts.
    pub(super) fn lock(&mut self, owner: u64, lock: ByteLock, kind: LockKind) -> bool {
        if self.conflicts(owner, lock, kind) {
            return false;
        }
        self.unlock(owner, lock);
        let (first, last) = span(lock);
        self.held.push(Held { owner, first, last, kind });
        true
    }

    /// Drops the locks of `owner` on these bytes.
    pub(super) fn unlock(&mut self, owner: u64, lock: ByteLock) {
        let (first, last) = span(lock);
        let mut rest = Vec::with_capacity(self.held.len() + 1);
        for held in self.held.drain(..) {
            if held.owner != owner || held.last < first || last < held.first {
                rest.push(held);
                continue;
            }
            if held.first < first {
                rest.push(Held { last: first - 1, ..held });
            }
            if last < held.last {
                rest.push(Held { first: last + 1, ..held });
            }
        }
        self.held = rest;
    }

    /// Drops all locks of `owner` (its description was closed).
    pub(super) fn release(&mut self, owner: u64) {
        self.held.retain(|held| held.owner != owner);
    }
}
