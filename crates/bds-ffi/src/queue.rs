//! Queues: batches of requests, and their completions on the caller's thread.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use bds_io::IoVec;
use bds_io::buf::Anchor;
use futures_util::FutureExt;
use futures_util::future::{AbortHandle, Abortable};

use crate::abi::bds_opcode::{
    self, BDS_OP_COPY_RANGE, BDS_OP_DISCARD, BDS_OP_FLUSH, BDS_OP_READ, BDS_OP_WRITE,
    BDS_OP_WRITE_ZEROES,
};
use crate::abi::bds_status::{
    BDS_ERR_CANCELLED, BDS_ERR_PANIC, BDS_ERR_VERSION, BDS_OK, BDS_STILL_REFERENCED,
};
use crate::abi::{bds_completion, bds_context, bds_queue, bds_queue_options, bds_request};
use crate::backend::{self, BackendShared};
use crate::context::{self, Context, check_flags, check_same};
use crate::entry::{entry, forget_payload, panic_text};
use crate::failure::{Failure, code_of};
use crate::fault;
use crate::iothread::{self, Iothread};
use crate::memory::{self, Region};
use crate::ptr::{Array, In, Out, Sink, request_memory};
use crate::request::{self, Operation};
use crate::table::{Object, Ref, Table};
use crate::ticket::{QueueState, Ticket, Waited};

static QUEUES: Table<QueueObject> = Table::new(6);

/// Depth of a queue that was made without options.
const DEFAULT_DEPTH: u32 = 128;
/// Largest depth.
const MAX_DEPTH: u32 = 65536;

struct QueueObject {
    state: Arc<QueueState>,
    context: Arc<Context>,
    iothread: Option<Arc<Iothread>>,
}

impl Object for QueueObject {}

#[inline]
fn find(queue: bds_queue) -> Result<Ref<QueueObject>, Failure> {
    QUEUES.get(queue.raw).map_err(|failure| failure.of("queue"))
}

/// The entry of a queue, also of one that a panic has poisoned: completions of accepted requests
/// come all the same, and say when their memory is the caller's again.
#[inline]
fn find_any(queue: bds_queue) -> Result<Ref<QueueObject>, Failure> {
    QUEUES.find(queue.raw).map_err(|failure| failure.of("queue"))
}

/// Makes a queue for any number of backends of the context. [any]
///
/// `options` may be NULL: depth 128, served by a thread that all such queues share. Release the
/// handle with bds_queue_unref.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (depth; an iothread of another context),
/// BDS_ERR_VERSION.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_create(
    context: bds_context,
    options: In<bds_queue_options>,
    out: Out<bds_queue>,
) -> i32 {
    entry("bds_queue_create", || {
        let out = out.check("out")?;
        let context = context::find(context)?;
        let options = options.read("options")?;
        check_flags(options.map_or(0, |options| options.flags), 0)?;
        let depth = options.map_or(DEFAULT_DEPTH, |options| options.depth);
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(Failure::argument(format!("the depth must be 1 to {MAX_DEPTH}")));
        }
        let iothread = match options {
            Some(options) if options.iothread.raw != 0 => {
                let thread = iothread::find(options.iothread)?;
                check_same(&context, &thread.context)?;
                Some(thread)
            }
            _ => None,
        };
        let depth = usize::try_from(depth).expect("it is small");
        let object = QueueObject { state: QueueState::new(depth), context, iothread };
        out.set(bds_queue { raw: QUEUES.insert(object)? });
        Ok(0)
    })
}

/// Releases the queue: waits under way return BDS_ERR_CANCELLED, completions are dropped. [any]
///
/// BDS_OK: no request is in flight, and all buffers are the caller's. BDS_STILL_REFERENCED: some
/// are; their buffers must stay valid until the requests end, and nothing says when that is. Wait
/// for the completions first.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_unref(queue: bds_queue) -> i32 {
    entry("bds_queue_unref", || {
        let state = Arc::clone(&QUEUES.find(queue.raw)?.state);
        // One of any number of concurrent calls gets here.
        drop(QUEUES.remove(queue.raw)?);
        match state.close() {
            0 => Ok(BDS_OK as i32),
            _ => Ok(BDS_STILL_REFERENCED as i32),
        }
    })
}

/// A descriptor that is readable while a completion waits: for poll, epoll and event loops. [any]
///
/// It belongs to the queue: do not read, write or close it; dup it if it must outlive the queue.
/// When it is readable, call bds_queue_poll until that returns less than its capacity.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; -EMFILE.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_fd(queue: bds_queue) -> i32 {
    entry("bds_queue_fd", || find_any(queue)?.state.descriptor())
}

/// Submits requests, in order; returns how many were accepted. [any]
///
/// Each accepted request gets its `request_id`, and exactly one completion, whatever happens. A
/// request that is not accepted, and those behind it, were not begun and their buffers are the
/// caller's: submit them again after completions were taken. Requests in flight are not ordered
/// among each other; a flush covers what completed before it was submitted.
///
/// Errors, for the first request: -EAGAIN: the queue is full; BDS_ERR_STALE, BDS_ERR_KIND,
/// BDS_ERR_POISONED (a backend, target or memory); BDS_ERR_VERSION: an unknown opcode, flag or
/// reserved word; BDS_ERR_ARGUMENT: its buffers, or another context; BDS_ERR_RANGE: a segment lies
/// outside `memory`. Whatever the medium says comes with the completion.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_submit(
    queue: bds_queue,
    requests: Array<bds_request>,
    count: usize,
) -> i32 {
    entry("bds_queue_submit", || {
        let requests = requests.check(count, "requests")?;
        let object = find(queue)?;
        let limit = requests.len().min(MAX_DEPTH as usize);
        for index in 0..limit {
            let mut request = requests.read(index);
            match catch_unwind(AssertUnwindSafe(|| submit(&object, &mut request))) {
                Ok(Ok(())) => requests.write(index, request),
                Ok(Err(failure)) if index == 0 => return Err(failure),
                Err(payload) if index == 0 => resume_unwind(payload),
                // Those in front were accepted, whatever happened to this one.
                Ok(Err(_)) => return Ok(as_count(index)),
                Err(payload) => {
                    forget_payload(payload);
                    return Ok(as_count(index));
                }
            }
        }
        Ok(as_count(limit))
    })
}

fn as_count(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// Checks one request and begins it.
fn submit(queue: &QueueObject, request: &mut bds_request) -> Result<(), Failure> {
    if request.reserved != [0; 4] {
        return Err(Failure::new(BDS_ERR_VERSION, "a reserved word is not 0"));
    }
    let opcode = request::opcode(request.opcode)?;
    let backend = {
        let object = backend::find(request.backend, "backend")?;
        check_same(&queue.context, &object.shared.context)?;
        Arc::clone(&object.shared)
    };
    let operation = operation(opcode, request, queue)?;
    let region = match request.memory.raw {
        0 => None,
        _ => Some(memory::find(request.memory)?),
    };
    let segments = segments(opcode, request, region.as_deref())?;
    let Some(ticket) = queue.state.admit(request.user_data, backend, region) else {
        return Err(Failure::errno(libc::EAGAIN, "the queue is full; take completions"));
    };
    let id = ticket.id();
    let anchored = |(sink, len): (Sink, usize)| sink.iov(len, Arc::clone(&ticket) as Anchor);
    let iov: IoVec = match segments.into_iter().map(anchored).collect() {
        Ok(iov) => iov,
        Err(failure) => {
            queue.state.refuse(ticket);
            return Err(failure);
        }
    };
    begin(queue, ticket, operation, iov);
    request.request_id = id;
    Ok(())
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
    let plain = |operation| check_flags(flags, 0).map(|()| operation);
    match opcode {
        BDS_OP_READ => plain(Operation::Read { offset }),
        BDS_OP_WRITE => request::write(offset, flags),
        BDS_OP_FLUSH => plain(Operation::Flush),
        BDS_OP_DISCARD => plain(Operation::Discard { offset, len: bytes }),
        BDS_OP_WRITE_ZEROES => request::write_zeroes(offset, bytes, flags),
        BDS_OP_COPY_RANGE => {
            check_flags(flags, 0)?;
            let target = backend::find(request.target, "target")?;
            check_same(&queue.context, &target.shared.context)?;
            let (target, target_offset) = (Arc::clone(&target.shared), request.target_offset);
            Ok(Operation::CopyRange { offset, len: bytes, target, target_offset })
        }
    }
}

/// The memory of a request, checked against its region.
fn segments(
    opcode: bds_opcode,
    request: &bds_request,
    region: Option<&Region>,
) -> Result<smallvec::SmallVec<[(Sink, usize); 1]>, Failure> {
    let has_iov = request.iovcnt != 0;
    if !matches!(opcode, BDS_OP_READ | BDS_OP_WRITE) {
        let is_bare = request.buffer.is_null() && request.iov.is_null() && !has_iov;
        return match is_bare && region.is_none() {
            true => Ok(smallvec::SmallVec::new()),
            false => Err(Failure::argument("only reads and writes have buffers")),
        };
    }
    let (buffer, iov) = request_memory(request);
    let len = usize::try_from(request.bytes)
        .map_err(|_| Failure::argument("bytes does not fit into memory"))?;
    let segments: smallvec::SmallVec<[(Sink, usize); 1]> = match has_iov {
        false if request.iov.is_null() => smallvec::smallvec![(buffer, len)],
        _ if !request.buffer.is_null() => {
            return Err(Failure::argument("a request has a buffer or segments, not both"));
        }
        _ => iov.read(request.iovcnt)?.into(),
    };
    let sum: usize = segments.iter().map(|(_, len)| len).sum();
    if has_iov && len != 0 && sum != len {
        return Err(Failure::argument("bytes is not the sum of the segments"));
    }
    for (segment, len) in &segments {
        match region {
            Some(region) => region.check(*segment, *len)?,
            None => drop(segment.range(*len)?),
        }
    }
    Ok(segments)
}

/// Begins a request: at once if it needs no waiting, else in a task.
fn begin(queue: &QueueObject, ticket: Arc<Ticket>, operation: Operation, iov: IoVec) {
    // A panic here must not fail the submission: the request is accepted and has its completion.
    let inline = AssertUnwindSafe(|| operation.try_now(ticket.backend(), &iov));
    match catch_unwind(inline) {
        Ok(None) => {}
        Ok(Some(result)) => return ticket.set_status(status(result)),
        Err(payload) => return ticket.set_status(after_panic(ticket.backend(), payload)),
    }
    // Nor one from here on: the request has its completion, and this says why.
    let accepted = Arc::clone(&ticket);
    let start = AssertUnwindSafe(move || start(queue, ticket, operation, iov));
    if let Err(payload) = catch_unwind(start) {
        accepted.set_status(after_panic(accepted.backend(), payload));
    }
}

/// Spawns the task of a request.
fn start(queue: &QueueObject, ticket: Arc<Ticket>, operation: Operation, iov: IoVec) {
    let (handle, registration) = AbortHandle::new_pair();
    queue.state.activate(ticket.id(), handle);
    fault::point("spawn");
    let task = async move {
        let backend = Arc::clone(ticket.backend());
        let work = async move { operation.run(&backend, iov).await };
        let work = Abortable::new(AssertUnwindSafe(work).catch_unwind(), registration);
        let status = match work.await {
            Ok(Ok(result)) => status(result),
            Ok(Err(payload)) => after_panic(ticket.backend(), payload),
            Err(_aborted) => BDS_ERR_CANCELLED as i32,
        };
        ticket.set_status(status);
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
    let say = || log.error("panic", &format!("a request of a queue panicked: {words}"));
    // The sink is C's, and the request's status must be set whatever becomes of the message.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(say)) {
        forget_payload(payload);
    }
    BDS_ERR_PANIC as i32
}

/// Takes completions that are there; returns how many. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_poll(
    queue: bds_queue,
    completions: Array<bds_completion>,
    capacity: usize,
) -> i32 {
    entry("bds_queue_poll", || {
        let out = completions.check(capacity, "completions")?;
        let object = find_any(queue)?;
        Ok(as_count(object.state.poll(out.len(), |index, one| out.write(index, one))))
    })
}

/// Waits until `min` completions are there, then takes up to `capacity`; returns how many. [io]
///
/// `timeout_ns`: -1: waits as long as it takes. Returns fewer, also 0, after bds_queue_wake, and
/// fewer, but at least one, after the timeout.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND, BDS_ERR_ARGUMENT (`min` above `capacity`); -ETIME: none
/// came in time; BDS_ERR_CANCELLED: the queue was released meanwhile.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_wait(
    queue: bds_queue,
    completions: Array<bds_completion>,
    capacity: usize,
    min: usize,
    timeout_ns: i64,
) -> i32 {
    entry("bds_queue_wait", || {
        let out = completions.check(capacity, "completions")?;
        if min > capacity {
            return Err(Failure::argument("min is above capacity"));
        }
        // Not the table's reference: a release must find none, to be the one that ends the wait.
        let state = Arc::clone(&find_any(queue)?.state);
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        match state.wait((min, out.len()), timeout, |index, one| out.write(index, one)) {
            Waited::Taken(count) => Ok(as_count(count)),
            Waited::TimedOut => Err(Failure::errno(libc::ETIME, "no completion in time")),
            Waited::Closed => Err(Failure::new(BDS_ERR_CANCELLED, "the queue was released")),
        }
    })
}

/// Lets the calls of bds_queue_wait that are under way return. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_wake(queue: bds_queue) -> i32 {
    entry("bds_queue_wake", || {
        find_any(queue)?.state.wake();
        Ok(0)
    })
}

/// Asks for the end of a request; its completion comes all the same. [any]
///
/// 0: the request was asked to end. Its completion says BDS_ERR_CANCELLED, or what it did if it
/// ended just then. A write that had begun may have happened. The buffer is the library's until the
/// completion.
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND; -EALREADY: its completion is there; BDS_ERR_NOT_FOUND: no
/// such request, or its completion was taken.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_cancel(queue: bds_queue, request_id: u64) -> i32 {
    entry("bds_queue_cancel", || {
        find_any(queue)?.state.cancel(request_id)?;
        Ok(0)
    })
}

/// Accepted requests whose completion was not taken. [any]
///
/// Errors: BDS_ERR_STALE, BDS_ERR_KIND.
#[unsafe(no_mangle)]
pub extern "C" fn bds_queue_in_flight(queue: bds_queue) -> i32 {
    entry("bds_queue_in_flight", || Ok(as_count(find_any(queue)?.state.outstanding())))
}
