//! `Journal`: the changes of a file since its durable image, and how durable each of them is.
//!
//! ```text
//!   base ──► change, change, change, …            ──► the visible image
//!   durable    each: racing → acked → durable          what reads see
//! ```
//!
//! Changes stand in the order of their effect on the visible image. An operation's changes *race*
//! until it completes, are *acked* from then on, and *durable* once a sync that was submitted after
//! that completes. A change whose sync failed is *lost*: no later sync makes it durable, as on
//! Linux, where a failed fsync marks the pages clean. Which changes survive a cut is decided in
//! [`super::crash`].
//!
//! Invariant: replaying all changes over the base gives the visible image.

use std::ops::Range;

use super::image::Image;

/// Progress of a change towards the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// Its operation is in flight.
    Racing,
    /// Its operation completed as the n-th of this file.
    Acked(u64),
    /// It survives any cut.
    Durable,
    /// A sync that should have made it durable failed.
    Lost,
}

/// Effect of a change on the bytes.
#[derive(Clone, Debug)]
pub(super) enum Effect {
    /// Bytes replaced.
    Write { offset: u64, data: Vec<u8> },
    /// Bytes zeroed, and their pages kept or allocated (`allocate`) or freed.
    Zero { range: Range<u64>, allocate: bool },
    /// Missing pages allocated; no byte changes.
    Allocate { range: Range<u64> },
    /// Everything from here on cut off.
    Cut { len: u64 },
    /// Only the length grew.
    Grow,
}

impl Effect {
    /// Applies the whole effect; where only the length grew, the caller sets it.
    pub(super) fn apply(&self, image: &mut Image) {
        match self {
            Effect::Write { offset, data } => image.write(*offset, data),
            Effect::Zero { range, allocate: true } => image.zero_allocate(range.clone()),
            Effect::Zero { range, allocate: false } => image.punch(range.clone()),
            Effect::Allocate { range } => image.allocate(range.clone()),
            Effect::Cut { len } => image.cut(*len),
            Effect::Grow => {}
        }
    }

    /// The bytes it changes, as far as they are bounded.
    pub(super) fn range(&self) -> Range<u64> {
        match self {
            Effect::Write { offset, data } => *offset..*offset + data.len() as u64,
            Effect::Zero { range, .. } | Effect::Allocate { range } => range.clone(),
            Effect::Cut { len } => *len..u64::MAX,
            Effect::Grow => 0..0,
        }
    }
}

/// One change of a file.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Position in the order of effects; grows along the journal, never 0.
    pub seq: u64,
    /// The operation it belongs to.
    pub op: u64,
    pub effect: Effect,
    /// Length of the file before and after.
    pub len_before: u64,
    pub len_after: u64,
    pub durability: Durability,
}

/// The durable image of a file and everything since.
#[derive(Clone, Default)]
pub(super) struct Journal {
    pub base: Image,
    pub changes: Vec<Change>,
    next_seq: u64,
    acks: u64,
}

impl Journal {
    /// A file all of which is durable.
    pub(super) fn new(base: Image) -> Journal {
        Journal { base, changes: Vec::new(), next_seq: 1, acks: 0 }
    }

    /// Records an effect of operation `op`, which was just applied to the visible image.
    pub(super) fn record(&mut self, op: u64, effect: Effect, len_before: u64, len_after: u64) {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.changes.push(Change {
            seq,
            op,
            effect,
            len_before,
            len_after,
            durability: Durability::Racing,
        });
    }

    /// Operation `op` completed. `durable`: it was a write that is durable on return.
    pub(super) fn acknowledge(&mut self, op: u64, durable: bool) {
        self.acks += 1;
        let durability = if durable { Durability::Durable } else { Durability::Acked(self.acks) };
        for change in self.changes.iter_mut().filter(|change| change.op == op) {
            change.durability = durability;
        }
        if durable {
            self.fold();
        }
    }

    /// Number of completed operations, which a sync submitted now covers.
    pub(super) fn acks(&self) -> u64 {
        self.acks
    }

    /// A sync that covers the first `acks` completed operations succeeded.
    pub(super) fn synced(&mut self, acks: u64) {
        self.set_acked(acks, Durability::Durable);
        self.fold();
    }

    /// A sync that covers the first `acks` completed operations failed for good.
    pub(super) fn lost(&mut self, acks: u64) {
        self.set_acked(acks, Durability::Lost);
    }

    fn set_acked(&mut self, acks: u64, durability: Durability) {
        for change in &mut self.changes {
            if matches!(change.durability, Durability::Acked(ack) if ack <= acks) {
                change.durability = durability;
            }
        }
    }

    /// Moves the durable head of the journal into the base.
    fn fold(&mut self) {
        let is_open = |change: &Change| change.durability != Durability::Durable;
        let head = self.changes.iter().position(is_open).unwrap_or(self.changes.len());
        for change in self.changes.drain(..head) {
            change.effect.apply(&mut self.base);
            self.base.set_len(change.len_after);
        }
    }
}
