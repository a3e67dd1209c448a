//! A simulated operation as a value, and the future that waits for it.
//!
//! An operation owns its memory from submission to completion, also if its future is dropped: a
//! dropped future leaves the operation running (or has it cancelled, by seed, if it took no effect
//! yet), a forgotten one leaves an empty slot.
//!
//! Lock rule: wakers and buffers may run foreign code when woken or dropped, so both are returned
//! in a [`Deferred`], which is used after the lock is released.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::Sim;
use super::fault::OpMask;
use super::journal::Effect;
use crate::IoVec;

/// Kind of an operation, with its arguments.
pub(super) enum Request {
    /// A short one still ends on a multiple of `unit` bytes.
    Read {
        offset: u64,
        iov: IoVec,
        unit: u64,
    },
    Write {
        offset: u64,
        iov: IoVec,
        unit: u64,
        is_dsync: bool,
    },
    Sync,
    /// An effect that happens at once or not at all.
    Change {
        kind: OpMask,
        effect: Effect,
        len: NewLen,
    },
    Copy {
        source: usize,
        offset: u64,
        target_offset: u64,
        len: u64,
    },
}

/// Effect of a change on the file's length.
#[derive(Clone, Copy)]
pub(super) enum NewLen {
    Same,
    AtLeast(u64),
    Exactly(u64),
}

impl NewLen {
    pub(super) fn after(self, before: u64) -> u64 {
        match self {
            NewLen::Same => before,
            NewLen::AtLeast(len) => before.max(len),
            NewLen::Exactly(len) => len,
        }
    }
}

impl Request {
    pub(super) fn kind(&self) -> OpMask {
        match self {
            Request::Read { .. } => OpMask::READ,
            Request::Write { .. } => OpMask::WRITE,
            Request::Sync => OpMask::SYNC,
            Request::Change { kind, .. } => *kind,
            Request::Copy { .. } => OpMask::COPY,
        }
    }

    /// Offset and length, as far as it has them.
    pub(super) fn place(&self) -> (u64, u64) {
        match self {
            Request::Read { offset, iov, .. } | Request::Write { offset, iov, .. } => {
                (*offset, iov.len() as u64)
            }
            Request::Sync => (0, 0),
            Request::Change { effect, len, .. } => match (effect, len) {
                (Effect::Cut { .. } | Effect::Grow, NewLen::Exactly(len)) => (*len, 0),
                _ => {
                    (effect.range().start, effect.range().end.saturating_sub(effect.range().start))
                }
            },
            Request::Copy { target_offset, len, .. } => (*target_offset, *len),
        }
    }

    pub(super) fn unit(&self) -> u64 {
        match self {
            Request::Read { unit, .. } | Request::Write { unit, .. } => *unit,
            _ => 1,
        }
    }
}

/// An operation between submission and completion, or waiting for its result to be fetched.
pub(super) struct PendingOp {
    pub op: u64,
    pub file: usize,
    /// `None` once completed: the memory is released.
    pub request: Option<Request>,
    pub kind: OpMask,
    pub place: (u64, u64),
    /// Bytes it will do; a seeded short length, or 0 for a failure.
    pub limit: u64,
    /// Bytes it did.
    pub done: u64,
    pub is_begun: bool,
    pub errno: Option<i32>,
    /// Completed operations of the file when it was submitted, which a sync covers.
    pub acks: u64,
    pub waker: Option<Waker>,
    pub result: Option<Result<u64, i32>>,
    pub is_abandoned: bool,
}

/// Wakers to wake and values to drop once the world's lock is released.
#[derive(Default)]
pub(super) struct Deferred {
    pub wakers: Vec<Waker>,
    pub requests: Vec<Request>,
    pub ops: Slab<PendingOp>,
}

impl Deferred {
    /// Wakes the wakers and drops the rest.
    pub(super) fn finish(self) {
        self.wakers.into_iter().for_each(Waker::wake);
    }
}

impl PendingOp {
    /// True if nothing of it has taken effect.
    pub(super) fn is_untouched(&self) -> bool {
        !self.is_begun && self.errno.is_none()
    }
}

/// Future of an operation.
pub(super) struct OpFuture {
    sim: Sim,
    slot: Option<usize>,
}

impl Sim {
    /// Submits now; the future only waits.
    pub(super) fn submit(&self, file: usize, request: Request, refused: Option<i32>) -> OpFuture {
        let (slot, deferred) = self.world().submit(file, request, refused);
        deferred.finish();
        OpFuture { sim: self.clone(), slot }
    }
}

impl Future for OpFuture {
    type Output = io::Result<u64>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u64>> {
        let Some(slot) = self.slot else { return Poll::Pending };
        // Wakers may run foreign code when cloned and dropped: never under the world's lock.
        let waker = cx.waker().clone();
        let mut world = self.sim.world();
        // The power was cut: the slots are gone and nothing completes any more.
        let Some(pending) = world.ops.get_mut(slot) else { return Poll::Pending };
        if let Some(result) = pending.result {
            let _ = world.ops.remove(slot);
            drop(world);
            self.slot = None;
            return Poll::Ready(result.map_err(io::Error::from_raw_os_error));
        }
        let old = pending.waker.replace(waker);
        drop(world);
        drop(old);
        Poll::Pending
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let mut world = self.sim.world();
        let Some(pending) = world.ops.get_mut(slot) else { return };
        let waker = pending.waker.take();
        if pending.result.is_some() {
            let _ = world.ops.remove(slot);
        } else {
            pending.is_abandoned = true;
            world.maybe_cancel(slot);
        }
        drop(world);
        drop(waker);
    }
}
