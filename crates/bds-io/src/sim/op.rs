//! An operation as a value, and the future that waits for it.
//!
//! An operation owns its memory from submission to completion, whatever becomes of the future that
//! waits for it: dropped futures leave the operation running (or have it cancelled, by seed, if it
//! took no effect yet), forgotten ones leave an empty slot.
//!
//! Lock rule: wakers and buffers may run foreign code when woken or dropped, so both leave the world
//! in an [`Aftermath`], which is used after the lock is released.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use slab::Slab;

use super::Sim;
use super::fault::OpMask;
use super::journal::Effect;
use crate::IoVec;

/// What to do.
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

/// What a change does to the length.
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
pub(super) struct Flight {
    pub op: u64,
    pub file: usize,
    /// `None` once completed: the memory is let go.
    pub request: Option<Request>,
    pub kind: OpMask,
    pub place: (u64, u64),
    /// Bytes it will do; a seeded short length, or 0 for a failure.
    pub limit: u64,
    /// Bytes it did.
    pub done: u64,
    pub is_begun: bool,
    pub errno: Option<i32>,
    /// Completed operations of the file when it was submitted: what a sync answers for.
    pub acks: u64,
    pub waker: Option<Waker>,
    pub result: Option<Result<u64, i32>>,
    pub is_abandoned: bool,
}

/// What has to be woken and dropped once the world's lock is released.
#[derive(Default)]
pub(super) struct Aftermath {
    pub wakers: Vec<Waker>,
    pub requests: Vec<Request>,
    pub flights: Slab<Flight>,
}

impl Aftermath {
    /// Wakes; everything else is dropped.
    pub(super) fn finish(self) {
        self.wakers.into_iter().for_each(Waker::wake);
    }
}

impl Flight {
    /// True if nothing of it has taken effect.
    pub(super) fn is_untouched(&self) -> bool {
        !self.is_begun && self.errno.is_none()
    }
}

/// Waits for an operation.
pub(super) struct InFlight {
    sim: Sim,
    slot: Option<usize>,
}

impl Sim {
    /// Submits now; the future only waits.
    pub(super) fn submit(&self, file: usize, request: Request, refused: Option<i32>) -> InFlight {
        let (slot, aftermath) = self.world().submit(file, request, refused);
        aftermath.finish();
        InFlight { sim: self.clone(), slot }
    }
}

impl Future for InFlight {
    type Output = io::Result<u64>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u64>> {
        let Some(slot) = self.slot else { return Poll::Pending };
        // Wakers may run foreign code when cloned and dropped: never under the world's lock.
        let waker = cx.waker().clone();
        let mut world = self.sim.world();
        // The power went: the slots are gone and nothing completes any more.
        let Some(flight) = world.flights.get_mut(slot) else { return Poll::Pending };
        if let Some(result) = flight.result {
            let _ = world.flights.remove(slot);
            drop(world);
            self.slot = None;
            return Poll::Ready(result.map_err(io::Error::from_raw_os_error));
        }
        let old = flight.waker.replace(waker);
        drop(world);
        drop(old);
        Poll::Pending
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Some(slot) = self.slot else { return };
        let mut world = self.sim.world();
        let Some(flight) = world.flights.get_mut(slot) else { return };
        let waker = flight.waker.take();
        if flight.result.is_some() {
            let _ = world.flights.remove(slot);
        } else {
            flight.is_abandoned = true;
            world.maybe_cancel(slot);
        }
        drop(world);
        drop(waker);
    }
}
