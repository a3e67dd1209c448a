//! Queues: batches of requests, and their completions on the caller's thread.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::abi::bds_status::{BDS_ERR_CANCELLED, BDS_OK, BDS_STILL_REFERENCED};
use crate::abi::{
    BDS_QUEUE_OFFLOAD, bds_completion, bds_context, bds_queue, bds_queue_options, bds_request,
};
use crate::context::{self, check_flags, check_same};
use crate::entry::{entry, forget_payload};
use crate::failure::Failure;
use crate::iothread;
use crate::ptr::{Array, In, Out};
use crate::submission::{QueueObject, Submission};
use crate::table::{Ref, Table};
use crate::ticket::{QueueState, Waited};

static QUEUES: Table<QueueObject> = Table::new(6);

/// Depth of a queue that was made without options.
const DEFAULT_DEPTH: u32 = 128;
/// Largest depth.
const MAX_DEPTH: u32 = 65536;

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
        let flags = options.map_or(0, |options| options.flags);
        check_flags(flags, BDS_QUEUE_OFFLOAD)?;
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
        let may_inline = flags & BDS_QUEUE_OFFLOAD == 0;
        let state = QueueState::new(depth);
        let object = QueueObject { state, context, iothread, may_inline };
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
/// among each other; a flush covers what completed before it was submitted. A request that does not
/// need to wait (cached data) is done by this call, and its completion is there when it returns;
/// with BDS_QUEUE_OFFLOAD none is.
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
        let mut submission = Submission::new(&object, limit);
        for index in 0..limit {
            let request = requests.read(index);
            match catch_unwind(AssertUnwindSafe(|| submission.submit(&request))) {
                Ok(Ok(id)) => requests.set_request_id(index, id),
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
