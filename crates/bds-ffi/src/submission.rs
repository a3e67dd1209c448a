//! Submissions: a batch of requests of C's, each checked and begun.
//!
//! A request that does not need to wait is done here, without a lock and without an allocation of
//! its own: the batch reserves its places at once, posts what completed at its end, and uses one
//! ticket for requests that complete one after the other. Whether such a request has left its
//! memory alone is not assumed: the ticket is used again only if no anchor of it is left.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bds_io::IoVec;
use bds_io::buf::Anchor;
use futures_util::FutureExt;
use futures_util::future::{AbortHandle, Abortable};
use smallvec::{SmallVec, smallvec};

use crate::abi::bds_opcode::{
    self, BDS_OP_BLOCK_STATUS, BDS_OP_COPY_RANGE, BDS_OP_DISCARD, BDS_OP_FLUSH, BDS_OP_READ,
    BDS_OP_WRITE, BDS_OP_WRITE_ZEROES,
};
use crate::abi::bds_status::{BDS_ERR_CANCELLED, BDS_ERR_PANIC, BDS_ERR_VERSION, BDS_OK};
use crate::abi::{bds_backend, bds_completion, bds_request};
use crate::backend::{self, BackendShared};
use crate::context::{Context, check_flags, check_same};
use crate::entry::{forget_payload, panic_text};
use crate::extents::{EXTENT_LEN, Question};
use crate::failure::{Failure, code_of};
use crate::fault;
use crate::iothread::Iothread;
use crate::memory::{self, Region};
use crate::ptr::{Sink, request_memory};
use crate::request::{self, Operation};
use crate::table::Object;
use crate::ticket::{QueueState, Ticket};

/// Completions of a batch that are kept without an allocation.
const INLINE_COMPLETIONS: usize = 32;
/// Most extents of a block status.
const MAX_EXTENTS: usize = 1 << 16;

type Segments = SmallVec<[(Sink, usize); 1]>;

/// C's reference to a queue.
pub(crate) struct QueueObject {
    pub(crate) state: Arc<QueueState>,
    pub(crate) context: Arc<Context>,
    pub(crate) iothread: Option<Arc<Iothread>>,
    /// False: requests are never done by the submission itself.
    pub(crate) may_inline: bool,
}

impl Object for QueueObject {}

/// A batch under way. Its drop gives places back and posts completions, in whatever way it ends.
pub(crate) struct Submission<'a> {
    queue: &'a QueueObject,
    /// Places that are reserved and not used.
    places: usize,
    last_id: u64,
    done: SmallVec<[bds_completion; INLINE_COMPLETIONS]>,
    /// The backend that was looked up last, and its handle.
    backend: Option<(bds_backend, Arc<BackendShared>)>,
    /// The ticket of a request that has completed; its completion is in `done`.
    spare: Option<Arc<Ticket>>,
}

impl<'a> Submission<'a> {
    pub(crate) fn new(queue: &'a QueueObject, wanted: usize) -> Self {
        let (places, last_id) = queue.state.reserve(wanted);
        Self { queue, places, last_id, done: SmallVec::new(), backend: None, spare: None }
    }

    /// Checks one request and begins it; returns its id.
    pub(crate) fn submit(&mut self, request: &bds_request) -> Result<u64, Failure> {
        if request.reserved != [0; 3] {
            return Err(Failure::new(BDS_ERR_VERSION, "a reserved word is not 0"));
        }
        let opcode = request::opcode(request.opcode)?;
        self.look_up(request.backend)?;
        let operation = operation(opcode, request, self.queue)?;
        let region = match request.memory.raw {
            0 => None,
            _ => Some(memory::find(request.memory)?),
        };
        let segments = segments(opcode, request, region.as_deref())?;
        if self.places == 0 {
            return Err(Failure::errno(libc::EAGAIN, "the queue is full; take completions"));
        }
        let id = self.last_id + 1;
        let mut ticket = self.ticket((id, request.user_data), region);
        let iov = match anchored(segments, &ticket) {
            Ok(iov) => iov,
            Err(failure) => {
                // No anchor is left: the list of segments was dropped.
                if let Some(ticket) = Arc::get_mut(&mut ticket) {
                    ticket.retract();
                }
                return Err(failure);
            }
        };
        self.last_id = id;
        self.places -= 1;
        self.begin(ticket, operation, iov);
        Ok(id)
    }

    /// Looks a backend up, if it is not the one before.
    fn look_up(&mut self, handle: bds_backend) -> Result<(), Failure> {
        if self.backend.as_ref().is_some_and(|(known, _)| *known == handle) {
            return Ok(());
        }
        let object = backend::find(handle, "backend")?;
        check_same(&self.queue.context, &object.shared.context)?;
        self.backend = Some((handle, Arc::clone(&object.shared)));
        Ok(())
    }

    /// A ticket on the backend that was looked up.
    fn ticket(&mut self, numbers: (u64, u64), region: Option<Arc<Region>>) -> Arc<Ticket> {
        let (_, backend) = self.backend.as_ref().expect("it was looked up");
        if let Some(mut ticket) = self.spare.take()
            && Arc::ptr_eq(ticket.backend(), backend)
            && let Some(own) = Arc::get_mut(&mut ticket)
        {
            own.renew(numbers, region);
            return ticket;
        }
        Ticket::new(&self.queue.state, numbers, Arc::clone(backend), region)
    }

    /// Begins a request: at once if it needs no waiting, else in a task.
    fn begin(&mut self, mut ticket: Arc<Ticket>, operation: Operation, iov: IoVec) {
        if self.queue.may_inline {
            // A panic here must not fail the submission: the request is accepted and has its
            // completion.
            let inline = AssertUnwindSafe(|| operation.try_now(ticket.backend(), &iov));
            let status = match catch_unwind(inline) {
                Ok(None) => None,
                Ok(Some(result)) => Some(status(result)),
                Err(payload) => Some(after_panic(ticket.backend(), payload)),
            };
            if let Some(status) = status {
                ticket.set_outcome(status, 0);
                drop(iov);
                // Otherwise the drop of the last anchor posts the completion.
                if Arc::get_mut(&mut ticket).is_some() {
                    self.done.push(ticket.completion());
                    self.retire(ticket);
                }
                return;
            }
        }
        // Nor one from here on: the request has its completion, and this says why.
        let (queue, accepted) = (self.queue, Arc::clone(&ticket));
        let start = AssertUnwindSafe(move || spawn(queue, ticket, operation, iov));
        if let Err(payload) = catch_unwind(start) {
            accepted.set_outcome(after_panic(accepted.backend(), payload), 0);
        }
    }

    /// Keeps a ticket whose completion is in `done` for the next request.
    fn retire(&mut self, ticket: Arc<Ticket>) {
        if let Some(mut former) = self.spare.replace(ticket)
            && let Some(former) = Arc::get_mut(&mut former)
        {
            former.retract();
        }
    }
}

impl Drop for Submission<'_> {
    fn drop(&mut self) {
        // First what the requests held: with the completions in hand, C may count on it.
        if let Some(mut spare) = self.spare.take()
            && let Some(spare) = Arc::get_mut(&mut spare)
        {
            spare.retract();
        }
        self.backend = None;
        self.queue.state.end_submission(self.places, &self.done);
    }
}

/// The memory of a request as a scatter list that the ticket anchors.
fn anchored(segments: Segments, ticket: &Arc<Ticket>) -> Result<IoVec, Failure> {
    let one = |(sink, len): (Sink, usize)| sink.iov(len, Arc::clone(ticket) as Anchor);
    match segments.len() {
        1 => one(segments[0]),
        _ => segments.into_iter().map(one).collect(),
    }
}

fn operation(
    opcode: bds_opcode,
    request: &bds_request,
    queue: &QueueObject,
) -> Result<Operation, Failure> {
    let &bds_request { offset, bytes, flags, .. } = request;
    if opcode != BDS_OP_COPY_RANGE && (request.target.raw != 0 || request.target_offset != 0) {
        return Err(Failure::argument("only a copy has a target"));
    }
    if opcode != BDS_OP_BLOCK_STATUS && request.base.raw != 0 {
        return Err(Failure::argument("only a block status has a base"));
    }
    let plain = |operation| check_flags(flags, 0).map(|()| operation);
    match opcode {
        BDS_OP_READ => plain(Operation::Read { offset }),
        BDS_OP_WRITE => request::write(offset, flags),
        BDS_OP_FLUSH => plain(Operation::Flush),
        BDS_OP_DISCARD => plain(Operation::Discard { offset, len: bytes }),
        BDS_OP_WRITE_ZEROES => request::write_zeroes(offset, bytes, flags),
        BDS_OP_BLOCK_STATUS => {
            let base = request::base(&queue.context, request.base)?;
            let capacity = extent_count(request)?;
            plain(Operation::BlockStatus(Question { offset, len: bytes, base, capacity }))
        }
        BDS_OP_COPY_RANGE => {
            check_flags(flags, 0)?;
            let target = backend::find(request.target, "target")?;
            check_same(&queue.context, &target.shared.context)?;
            let (target, target_offset) = (Arc::clone(&target.shared), request.target_offset);
            Ok(Operation::CopyRange { offset, len: bytes, target, target_offset })
        }
    }
}

/// How many extents the buffer of a block status holds.
fn extent_count(request: &bds_request) -> Result<usize, Failure> {
    let count = usize::try_from(request.iovcnt).ok().filter(|count| *count <= MAX_EXTENTS);
    count.ok_or_else(|| Failure::argument(format!("more than {MAX_EXTENTS} extents")))
}

/// The memory of a request, checked against its region.
fn segments(
    opcode: bds_opcode,
    request: &bds_request,
    region: Option<&Region>,
) -> Result<Segments, Failure> {
    if opcode == BDS_OP_BLOCK_STATUS {
        if !request.iov.is_null() {
            return Err(Failure::argument("the extents of a block status are in its buffer"));
        }
        let (buffer, _) = request_memory(request);
        let array = (buffer, extent_count(request)? * EXTENT_LEN);
        check_segment(array, region)?;
        return Ok(smallvec![array]);
    }
    let has_iov = request.iovcnt != 0;
    if !matches!(opcode, BDS_OP_READ | BDS_OP_WRITE) {
        let is_bare = request.buffer.is_null() && request.iov.is_null() && !has_iov;
        return match is_bare && region.is_none() {
            true => Ok(SmallVec::new()),
            false => Err(Failure::argument("only reads and writes have buffers")),
        };
    }
    let (buffer, iov) = request_memory(request);
    let len = usize::try_from(request.bytes)
        .map_err(|_| Failure::argument("bytes does not fit into memory"))?;
    let segments: Segments = match has_iov {
        false if request.iov.is_null() => smallvec![(buffer, len)],
        _ if !request.buffer.is_null() => {
            return Err(Failure::argument("a request has a buffer or segments, not both"));
        }
        _ => iov.read(request.iovcnt)?.into(),
    };
    let sum: usize = segments.iter().map(|(_, len)| len).sum();
    if has_iov && len != 0 && sum != len {
        return Err(Failure::argument("bytes is not the sum of the segments"));
    }
    for segment in &segments {
        check_segment(*segment, region)?;
    }
    Ok(segments)
}

fn check_segment((segment, len): (Sink, usize), region: Option<&Region>) -> Result<(), Failure> {
    match region {
        Some(region) => region.check(segment, len),
        None => segment.range(len).map(drop),
    }
}

/// Runs a request in a task.
fn spawn(queue: &QueueObject, ticket: Arc<Ticket>, operation: Operation, iov: IoVec) {
    let (handle, registration) = AbortHandle::new_pair();
    queue.state.activate(ticket.id(), handle);
    fault::point("spawn");
    let task = async move {
        let backend = Arc::clone(ticket.backend());
        let work = async move { operation.run(&backend, iov).await };
        let work = Abortable::new(AssertUnwindSafe(work).catch_unwind(), registration);
        let (status, value) = match work.await {
            Ok(Ok(Ok(value))) => (BDS_OK as i32, value),
            Ok(Ok(Err(error))) => (code_of(&error), 0),
            Ok(Err(payload)) => (after_panic(ticket.backend(), payload), 0),
            Err(_aborted) => (BDS_ERR_CANCELLED as i32, 0),
        };
        ticket.set_outcome(status, value);
    };
    match &queue.iothread {
        Some(iothread) => iothread.tasks.spawn(task).detach(),
        None => bds_io::spawn(task).detach(),
    }
}

fn status(result: bds_core::Result<()>) -> i32 {
    match result {
        Ok(()) => BDS_OK as i32,
        Err(error) => code_of(&error),
    }
}

/// Nothing may be written to an image whose metadata was just being changed.
fn after_panic(backend: &BackendShared, payload: Box<dyn Any + Send>) -> i32 {
    backend.poison();
    let words = panic_text(&*payload);
    forget_payload(payload);
    let log = backend.context.log();
    let say = || log.error("bds_ffi::queue", &format!("a request of a queue panicked: {words}"));
    // The request's status must be set whatever becomes of the message.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(say)) {
        forget_payload(payload);
    }
    BDS_ERR_PANIC as i32
}
