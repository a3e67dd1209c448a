//! The course of an operation: submit, take effect, complete.
//!
//! ```text
//!   submit ──────► effect (whole, or in two pieces) ──────► complete ──► waker
//!     now            a seeded moment                  a seeded latency
//! ```

use super::SyncFailure;
use super::clock::Event;
use super::fault::OpMask;
use super::op::{Aftermath, Flight, Request};
use super::trace::{Note, Stage};
use super::world::World;

impl World {
    /// Sends an operation on its way. `None`: the power is gone and it never completes.
    pub(super) fn submit(
        &mut self,
        file: usize,
        request: Request,
        refused: Option<i32>,
    ) -> (Option<usize>, Aftermath) {
        let mut aftermath = Aftermath::default();
        if self.is_cut {
            aftermath.requests.push(request);
            return (None, aftermath);
        }
        let flight = self.plan(file, request, refused);
        let (kind, is_write) = (flight.kind, flight.kind == OpMask::WRITE);
        let is_data = is_write || kind == OpMask::READ;
        let offset = flight.place.0;
        let (limit, has_effect) = (flight.limit, flight.errno.is_none() || flight.limit > 0);
        let is_last = self.count(kind);
        self.note(&flight, if is_last { Stage::Cut } else { Stage::Submitted });
        let slot = self.flights.insert(flight);
        if is_last {
            self.cut(&mut aftermath);
            return (None, aftermath);
        }
        let latency_ns = self.latency_ns();
        let now_ns = self.clock.now_ns();
        // A third at once, a third at the end, a third somewhere between (torn in two by seed).
        if has_effect && kind != OpMask::SYNC {
            match self.chance.below(3) {
                0 => self.take_effect(slot, u64::MAX),
                1 => {}
                _ => {
                    let is_split = is_data && limit > 1 && self.chance.hit(self.config.split_rate);
                    let cut = if is_split { self.chance.below(limit) } else { 0 };
                    let cut = if is_write { self.whole_sectors(offset, cut) } else { cut };
                    let upto = if cut > 0 { cut } else { u64::MAX };
                    let at_ns = now_ns + self.chance.below(latency_ns.max(1));
                    self.push(at_ns, Event::Effect { slot, upto });
                }
            }
        }
        self.push(now_ns + latency_ns, Event::Complete { slot });
        (Some(slot), aftermath)
    }

    /// Does an operation here and now, as the page cache can. `None`: the power went meanwhile.
    pub(super) fn run_inline(
        &mut self,
        file: usize,
        request: Request,
    ) -> (Option<Result<u64, i32>>, Aftermath) {
        let mut aftermath = Aftermath::default();
        let flight = self.plan(file, request, None);
        let is_last = self.count(flight.kind);
        self.note(&flight, if is_last { Stage::Cut } else { Stage::Submitted });
        let slot = self.flights.insert(flight);
        if is_last {
            self.cut(&mut aftermath);
            return (None, aftermath);
        }
        self.complete(slot, &mut aftermath);
        (self.flights.remove(slot).result, aftermath)
    }

    /// Decides what will become of an operation.
    fn plan(&mut self, file: usize, request: Request, refused: Option<i32>) -> Flight {
        let kind = request.kind();
        let place = request.place();
        let failure = match refused {
            Some(_) => None,
            None if self.config.unsupported.contains(kind) => None,
            None => self.faults.decide(kind, &self.files[file].path, &mut self.chance),
        };
        let unsupported = self.config.unsupported.contains(kind).then_some(libc::EOPNOTSUPP);
        let errno = refused.or(unsupported).or(failure.map(|failure| failure.errno));
        let mut limit = place.1;
        if errno.is_some() {
            let is_partial = failure.is_some_and(|failure| failure.partial);
            let is_torn = is_partial && kind == OpMask::WRITE && limit > 0;
            limit = if is_torn { self.chance.below(limit) } else { 0 };
        } else if self.may_be_short(kind, limit) {
            limit = self.chance.between(1, limit - 1);
        }
        if limit < place.1 {
            let unit = request.unit();
            limit =
                if errno.is_some() { limit / unit * unit } else { limit.next_multiple_of(unit) };
        }
        let op = self.next_op;
        self.next_op += 1;
        let acks = self.files[file].journal.acks();
        Flight {
            op,
            file,
            request: Some(request),
            kind,
            place,
            limit,
            done: 0,
            is_begun: false,
            errno,
            acks,
            waker: None,
            result: None,
            is_abandoned: false,
        }
    }

    /// How much of the first `len` bytes at `offset` is up to the end of a sector: a cache takes and hands on sectors as
    /// a whole, so a write is seen in pieces of them only. (One that is short may stop anywhere.)
    fn whole_sectors(&self, offset: u64, len: u64) -> u64 {
        let sector_len = u64::from(self.config.sector_len);
        ((offset + len) / sector_len * sector_len).saturating_sub(offset)
    }

    fn may_be_short(&mut self, kind: OpMask, len: u64) -> bool {
        let can = OpMask::READ | OpMask::WRITE | OpMask::COPY;
        can.contains(kind) && len > 1 && self.chance.hit(self.config.short_io_rate)
    }

    fn latency_ns(&mut self) -> u64 {
        let (low, high) = (self.config.latency_min, self.config.latency_max);
        let ns =
            |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 64);
        let latency_ns = self.chance.between(ns(low), ns(high.max(low)));
        // A straggler now and then: long enough for everybody else to overtake it.
        if self.chance.below(16) == 0 { latency_ns.saturating_mul(16) } else { latency_ns }
    }

    fn push(&mut self, at_ns: u64, event: Event) {
        let tie = self.chance.any();
        self.clock.push(at_ns, tie, event);
    }

    fn note(&mut self, flight: &Flight, stage: Stage) {
        let (offset, len) = flight.place;
        let (op, kind, file) = (flight.op, flight.kind, flight.file);
        let at_ns = self.clock.now_ns();
        self.trace.push(Note { at_ns, op, kind, stage, file, offset, len });
    }

    /// Nobody waits for this operation any more: an engine may then keep it from beginning.
    pub(super) fn maybe_cancel(&mut self, slot: usize) {
        let flight = &mut self.flights[slot];
        let can = flight.is_untouched() && flight.kind != OpMask::SYNC;
        if can && self.chance.hit(self.config.cancel_rate) {
            flight.errno = Some(libc::ECANCELED);
            flight.limit = 0;
        }
    }

    /// Takes the next event. False if there is none.
    pub(super) fn fire(&mut self, aftermath: &mut Aftermath) -> bool {
        match self.clock.pop() {
            None => return false,
            Some(Event::Wake(waker)) => aftermath.wakers.push(waker),
            Some(Event::Effect { slot, upto }) => self.take_effect(slot, upto),
            Some(Event::Complete { slot }) => self.complete(slot, aftermath),
            Some(Event::Cut) => self.cut(aftermath),
        }
        true
    }

    fn complete(&mut self, slot: usize, aftermath: &mut Aftermath) {
        self.take_effect(slot, u64::MAX);
        let flight = &mut self.flights[slot];
        let file = &mut self.files[flight.file];
        let result = flight.errno.map_or(Ok(flight.done), Err);
        if let Some(Request::Sync) = flight.request {
            match (result, self.config.sync_failure) {
                (Ok(_), _) => file.sync_succeeded(flight.acks),
                (Err(_), SyncFailure::DropDirty) => file.journal.lost(flight.acks),
                (Err(_), SyncFailure::KeepDirty) => {}
            }
        } else if flight.kind != OpMask::READ {
            let is_dsync = matches!(flight.request, Some(Request::Write { is_dsync: true, .. }));
            file.journal.acknowledge(flight.op, is_dsync && result.is_ok());
        }
        flight.result = Some(result);
        aftermath.requests.extend(flight.request.take());
        aftermath.wakers.extend(flight.waker.take());
        let stage = match result {
            Ok(bytes) => Stage::Done(bytes),
            Err(errno) => Stage::Failed(errno),
        };
        let (offset, len) = flight.place;
        let (op, kind, file) = (flight.op, flight.kind, flight.file);
        let is_abandoned = flight.is_abandoned;
        let at_ns = self.clock.now_ns();
        self.trace.push(Note { at_ns, op, kind, stage, file, offset, len });
        if is_abandoned {
            let _ = self.flights.remove(slot);
        }
    }

    /// Does an operation up to `upto` of its bytes.
    fn take_effect(&mut self, slot: usize, upto: u64) {
        let flight = &mut self.flights[slot];
        let upto = upto.min(flight.limit);
        if flight.is_begun && flight.done >= upto {
            return;
        }
        let is_first = !std::mem::replace(&mut flight.is_begun, true);
        let (op, file, done) = (flight.op, flight.file, flight.done);
        // Failures have a limit, too: what they leave behind.
        if flight.errno.is_some() && upto == 0 {
            return;
        }
        let Some(request) = flight.request.take() else { return };
        let outcome = match &request {
            Request::Read { offset, iov, .. } => {
                Ok(self.files[file].read(*offset, iov, done, upto))
            }
            Request::Write { offset, iov, .. } => self.write(op, file, *offset, iov, done, upto),
            Request::Change { effect, len, .. } if is_first => {
                self.change(op, file, effect, *len).map(|()| upto)
            }
            Request::Copy { source, offset, target_offset, .. } if is_first => {
                self.copy(op, (*source, *offset), (file, *target_offset), upto)
            }
            Request::Sync | Request::Change { .. } | Request::Copy { .. } => Ok(done),
        };
        let flight = &mut self.flights[slot];
        flight.request = Some(request);
        match outcome {
            Ok(now_done) => {
                if now_done < upto {
                    flight.limit = now_done;
                }
                flight.done = now_done;
            }
            Err(errno) if done == 0 => {
                flight.errno = flight.errno.or(Some(errno));
                flight.limit = 0;
            }
            // A full disk after the first piece: a short write.
            Err(_) => flight.limit = done,
        }
    }
}
