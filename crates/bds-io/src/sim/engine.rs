//! Engine of the simulated disk: submits, applies and completes operations at seeded moments.
//!
//! ```text
//!   submit ──────► effect (whole, or in two pieces) ──────► complete ──► waker
//!     now            a seeded moment                  a seeded latency
//! ```

use super::SyncFailure;
use super::clock::Event;
use super::fault::OpMask;
use super::op::{Deferred, PendingOp, Request};
use super::trace::{Stage, TraceEntry};
use super::world::World;

impl World {
    /// Submits an operation. `None`: the power is off and it never completes.
    pub(super) fn submit(
        &mut self,
        file: usize,
        request: Request,
        refused: Option<i32>,
    ) -> (Option<usize>, Deferred) {
        let mut deferred = Deferred::default();
        if self.is_cut {
            deferred.requests.push(request);
            return (None, deferred);
        }
        let pending = self.plan(file, request, refused);
        let (kind, is_write) = (pending.kind, pending.kind == OpMask::WRITE);
        let is_data = is_write || kind == OpMask::READ;
        let offset = pending.place.0;
        let (limit, has_effect) = (pending.limit, pending.errno.is_none() || pending.limit > 0);
        let is_last = self.count(kind);
        self.record_trace(&pending, if is_last { Stage::Cut } else { Stage::Submitted });
        let slot = self.ops.insert(pending);
        if is_last {
            self.cut(&mut deferred);
            return (None, deferred);
        }
        let latency_ns = self.latency_ns();
        let now_ns = self.clock.now_ns();
        // A third takes effect at once, a third at the end, a third between (torn in two by seed).
        if has_effect && kind != OpMask::SYNC {
            match self.rng.below(3) {
                0 => self.take_effect(slot, u64::MAX),
                1 => {}
                _ => {
                    let is_split = is_data && limit > 1 && self.rng.hit(self.config.split_rate);
                    let cut = if is_split { self.rng.below(limit) } else { 0 };
                    let cut = if is_write { self.whole_sectors(offset, cut) } else { cut };
                    let upto = if cut > 0 { cut } else { u64::MAX };
                    let at_ns = now_ns + self.rng.below(latency_ns.max(1));
                    self.push(at_ns, Event::Effect { slot, upto });
                }
            }
        }
        self.push(now_ns + latency_ns, Event::Complete { slot });
        (Some(slot), deferred)
    }

    /// Executes an operation at once, as the page cache can. `None`: the power was cut meanwhile.
    pub(super) fn run_inline(
        &mut self,
        file: usize,
        request: Request,
    ) -> (Option<Result<u64, i32>>, Deferred) {
        let mut deferred = Deferred::default();
        let pending = self.plan(file, request, None);
        let is_last = self.count(pending.kind);
        self.record_trace(&pending, if is_last { Stage::Cut } else { Stage::Submitted });
        let slot = self.ops.insert(pending);
        if is_last {
            self.cut(&mut deferred);
            return (None, deferred);
        }
        self.complete(slot, &mut deferred);
        (self.ops.remove(slot).result, deferred)
    }

    /// Decides the outcome of an operation: how much it does and whether it fails.
    fn plan(&mut self, file: usize, request: Request, refused: Option<i32>) -> PendingOp {
        let kind = request.kind();
        let place = request.place();
        let failure = match refused {
            Some(_) => None,
            None if self.config.unsupported.contains(kind) => None,
            None => self.faults.decide(kind, &self.files[file].path, &mut self.rng),
        };
        let unsupported = self.config.unsupported.contains(kind).then_some(libc::EOPNOTSUPP);
        let errno = refused.or(unsupported).or(failure.map(|failure| failure.errno));
        let mut limit = place.1;
        if errno.is_some() {
            let is_partial = failure.is_some_and(|failure| failure.partial);
            let is_torn = is_partial && kind == OpMask::WRITE && limit > 0;
            limit = if is_torn { self.rng.below(limit) } else { 0 };
        } else if self.may_be_short(kind, limit) {
            limit = self.rng.between(1, limit - 1);
        }
        if limit < place.1 {
            let unit = request.unit();
            limit =
                if errno.is_some() { limit / unit * unit } else { limit.next_multiple_of(unit) };
        }
        let op = self.next_op;
        self.next_op += 1;
        let acks = self.files[file].journal.acks();
        PendingOp {
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

    /// The part of the first `len` bytes at `offset` that ends with a sector: a cache writes back
    /// whole sectors, so a torn write is visible in whole sectors only. (A short one may stop
    /// anywhere.)
    fn whole_sectors(&self, offset: u64, len: u64) -> u64 {
        let sector_len = u64::from(self.config.sector_len);
        ((offset + len) / sector_len * sector_len).saturating_sub(offset)
    }

    fn may_be_short(&mut self, kind: OpMask, len: u64) -> bool {
        let can = OpMask::READ | OpMask::WRITE | OpMask::COPY;
        can.contains(kind) && len > 1 && self.rng.hit(self.config.short_io_rate)
    }

    fn latency_ns(&mut self) -> u64 {
        let (low, high) = (self.config.latency_min, self.config.latency_max);
        let ns =
            |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 64);
        let latency_ns = self.rng.between(ns(low), ns(high.max(low)));
        // One in sixteen is slow enough for all others to overtake it.
        if self.rng.below(16) == 0 { latency_ns.saturating_mul(16) } else { latency_ns }
    }

    fn push(&mut self, at_ns: u64, event: Event) {
        let tie = self.rng.any();
        self.clock.push(at_ns, tie, event);
    }

    fn record_trace(&mut self, pending: &PendingOp, stage: Stage) {
        let (offset, len) = pending.place;
        let (op, kind, file) = (pending.op, pending.kind, pending.file);
        let at_ns = self.clock.now_ns();
        self.trace.push(TraceEntry { at_ns, op, kind, stage, file, offset, len });
    }

    /// The operation's future was dropped: cancels it by seed if it has not begun, as an engine
    /// may.
    pub(super) fn maybe_cancel(&mut self, slot: usize) {
        let pending = &mut self.ops[slot];
        let can = pending.is_untouched() && pending.kind != OpMask::SYNC;
        if can && self.rng.hit(self.config.cancel_rate) {
            pending.errno = Some(libc::ECANCELED);
            pending.limit = 0;
        }
    }

    /// Takes and executes the next event. False if there is none.
    pub(super) fn fire(&mut self, deferred: &mut Deferred) -> bool {
        match self.clock.pop() {
            None => return false,
            Some(Event::Wake(waker)) => deferred.wakers.push(waker),
            Some(Event::Effect { slot, upto }) => self.take_effect(slot, upto),
            Some(Event::Complete { slot }) => self.complete(slot, deferred),
            Some(Event::Cut) => self.cut(deferred),
        }
        true
    }

    fn complete(&mut self, slot: usize, deferred: &mut Deferred) {
        self.take_effect(slot, u64::MAX);
        let pending = &mut self.ops[slot];
        let file = &mut self.files[pending.file];
        let result = pending.errno.map_or(Ok(pending.done), Err);
        if let Some(Request::Sync) = pending.request {
            match (result, self.config.sync_failure) {
                (Ok(_), _) => file.sync_succeeded(pending.acks),
                (Err(_), SyncFailure::DropDirty) => file.journal.lost(pending.acks),
                (Err(_), SyncFailure::KeepDirty) => {}
            }
        } else if pending.kind != OpMask::READ {
            let is_dsync = matches!(pending.request, Some(Request::Write { is_dsync: true, .. }));
            file.journal.acknowledge(pending.op, is_dsync && result.is_ok());
        }
        pending.result = Some(result);
        deferred.requests.extend(pending.request.take());
        deferred.wakers.extend(pending.waker.take());
        let stage = match result {
            Ok(bytes) => Stage::Done(bytes),
            Err(errno) => Stage::Failed(errno),
        };
        let (offset, len) = pending.place;
        let (op, kind, file) = (pending.op, pending.kind, pending.file);
        let is_abandoned = pending.is_abandoned;
        let at_ns = self.clock.now_ns();
        self.trace.push(TraceEntry { at_ns, op, kind, stage, file, offset, len });
        if is_abandoned {
            let _ = self.ops.remove(slot);
        }
    }

    /// Applies the effect of an operation up to `upto` of its bytes.
    fn take_effect(&mut self, slot: usize, upto: u64) {
        let pending = &mut self.ops[slot];
        let upto = upto.min(pending.limit);
        if pending.is_begun && pending.done >= upto {
            return;
        }
        let is_first = !std::mem::replace(&mut pending.is_begun, true);
        let (op, file, done) = (pending.op, pending.file, pending.done);
        // Failures have a limit, too: what they leave behind.
        if pending.errno.is_some() && upto == 0 {
            return;
        }
        let Some(request) = pending.request.take() else { return };
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
        let pending = &mut self.ops[slot];
        pending.request = Some(request);
        match outcome {
            Ok(now_done) => {
                if now_done < upto {
                    pending.limit = now_done;
                }
                pending.done = now_done;
            }
            Err(errno) if done == 0 => {
                pending.errno = pending.errno.or(Some(errno));
                pending.limit = 0;
            }
            // A full disk after the first piece: a short write.
            Err(_) => pending.limit = done,
        }
    }
}
