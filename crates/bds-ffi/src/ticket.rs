//! Requests in flight of a queue, and its completions: exactly one for each accepted request.
//!
//! A `Ticket` is the anchor of its request's memory. When its last clone is dropped, and not
//! before, the completion is there: whether the request ended, was cancelled, or its task was lost
//! to a panic. So no path can lose a completion or report one twice, and none returns memory that
//! an operation still uses.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::AbortHandle;

use crate::abi::bds_completion;
use crate::abi::bds_status::{BDS_ERR_CANCELLED, BDS_ERR_NOT_FOUND, BDS_ERR_PANIC};
use crate::backend::BackendShared;
use crate::entry::forget_payload;
use crate::event_source::Signal;
use crate::failure::Failure;
use crate::fault;
use crate::memory::Region;

/// A queue, shared by its handle and its requests in flight. Keeps no context: the last reference
/// may be that of a ticket whose completion C has already.
pub(crate) struct QueueState {
    depth: usize,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    done: VecDeque<bds_completion>,
    /// Requests that wait or run, with what cancels them.
    active: HashMap<u64, AbortHandle>,
    /// Accepted requests whose completion was not taken.
    outstanding: usize,
    last_id: u64,
    /// Made when C asks for it.
    signal: Option<Signal>,
    wakes: u64,
    is_closed: bool,
}

impl Inner {
    fn take(&mut self, capacity: usize, mut give: impl FnMut(usize, bds_completion)) -> usize {
        let count = self.done.len().min(capacity);
        for (index, completion) in self.done.drain(..count).enumerate() {
            give(index, completion);
        }
        self.outstanding -= count;
        if count > 0 && self.done.is_empty() {
            self.signal.iter().for_each(Signal::clear);
        }
        count
    }
}

/// What ended a wait.
pub(crate) enum Waited {
    /// This many completions were taken.
    Taken(usize),
    /// None came in time.
    TimedOut,
    /// The queue's handle was released.
    Closed,
}

impl QueueState {
    pub(crate) fn new(depth: usize) -> Arc<Self> {
        let inner = Mutex::new(Inner::default());
        Arc::new(Self { depth, inner, changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ticket for a request; `None`: the queue is full.
    pub(crate) fn admit(
        self: &Arc<Self>,
        user_data: u64,
        backend: Arc<BackendShared>,
        memory: Option<Arc<Region>>,
    ) -> Option<Arc<Ticket>> {
        let mut inner = self.lock();
        if inner.outstanding == self.depth {
            return None;
        }
        inner.outstanding += 1;
        inner.last_id += 1;
        let id = inner.last_id;
        drop(inner);
        Some(Arc::new(Ticket {
            queue: Arc::clone(self),
            user_data,
            id,
            status: AtomicI32::new(BDS_ERR_CANCELLED as i32),
            backend: Some(backend),
            memory,
        }))
    }

    /// Takes a request back that was never begun: it has no completion.
    pub(crate) fn refuse(&self, ticket: Arc<Ticket>) {
        if let Some(ticket) = Arc::into_inner(ticket) {
            ticket.forget();
        }
    }

    /// Lets `cancel` find the request. Before its task is spawned.
    pub(crate) fn activate(&self, id: u64, handle: AbortHandle) {
        self.lock().active.insert(id, handle);
    }

    fn complete(&self, completion: bds_completion) {
        let mut inner = self.lock();
        inner.active.remove(&completion.request_id);
        if inner.is_closed {
            inner.outstanding -= 1;
            return;
        }
        inner.done.push_back(completion);
        if inner.done.len() == 1 {
            inner.signal.iter().for_each(Signal::raise);
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Takes completions that are there.
    pub(crate) fn poll(&self, capacity: usize, give: impl FnMut(usize, bds_completion)) -> usize {
        self.lock().take(capacity, give)
    }

    /// Waits for at least `min` completions, a wake, the end of the queue or the timeout.
    pub(crate) fn wait(
        &self,
        (min, capacity): (usize, usize),
        timeout: Option<Duration>,
        give: impl FnMut(usize, bds_completion),
    ) -> Waited {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut inner = self.lock();
        let wakes = inner.wakes;
        let is_over = loop {
            if inner.is_closed {
                return Waited::Closed;
            }
            if inner.done.len() >= min || inner.wakes != wakes {
                break false;
            }
            let Some(deadline) = deadline else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break true;
            }
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        match inner.take(capacity, give) {
            0 if is_over => Waited::TimedOut,
            count => Waited::Taken(count),
        }
    }

    /// Ends the waits that are under way.
    pub(crate) fn wake(&self) {
        self.lock().wakes += 1;
        self.changed.notify_all();
    }

    /// Cancels a request.
    pub(crate) fn cancel(&self, id: u64) -> Result<(), Failure> {
        let inner = self.lock();
        if let Some(handle) = inner.active.get(&id).cloned() {
            drop(inner);
            handle.abort();
            return Ok(());
        }
        if inner.done.iter().any(|completion| completion.request_id == id) {
            return Err(Failure::errno(libc::EALREADY, "the request has completed"));
        }
        let words = "no such request, or its completion was taken";
        Err(Failure::new(BDS_ERR_NOT_FOUND, words))
    }

    /// Accepted requests whose completion was not taken.
    pub(crate) fn outstanding(&self) -> usize {
        self.lock().outstanding
    }

    /// The descriptor that is readable while completions wait.
    pub(crate) fn descriptor(&self) -> Result<i32, Failure> {
        let mut inner = self.lock();
        if inner.signal.is_none() {
            let signal = Signal::new()?;
            if !inner.done.is_empty() {
                signal.raise();
            }
            inner.signal = Some(signal);
        }
        Ok(inner.signal.as_ref().expect("it was made").number())
    }

    /// Drops completions from now on, and ends waits. Returns how many requests are in flight.
    pub(crate) fn close(&self) -> usize {
        let mut inner = self.lock();
        inner.is_closed = true;
        let dropped = inner.done.len();
        inner.done.clear();
        inner.outstanding -= dropped;
        inner.signal = None;
        let left = inner.outstanding;
        drop(inner);
        self.changed.notify_all();
        left
    }
}

/// One accepted request.
pub(crate) struct Ticket {
    queue: Arc<QueueState>,
    user_data: u64,
    id: u64,
    status: AtomicI32,
    /// `None` only while it is dropped.
    backend: Option<Arc<BackendShared>>,
    memory: Option<Arc<Region>>,
}

impl Ticket {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn backend(&self) -> &Arc<BackendShared> {
        self.backend.as_ref().expect("it is taken by the drop alone")
    }

    /// Sets the outcome; without one it is "cancelled".
    pub(crate) fn set_status(&self, status: i32) {
        self.status.store(status, Ordering::Relaxed);
    }

    fn forget(mut self) {
        self.backend = None;
        self.queue.lock().outstanding -= 1;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // `forget` has done the rest.
        let Some(backend) = self.backend.take() else { return };
        // First what the request holds: with the completion in hand, C may count on it. A panic of
        // these drops must not cost the completion.
        let memory = self.memory.take();
        let release = AssertUnwindSafe(|| {
            fault::point("ticket");
            drop((backend, memory));
        });
        if let Err(payload) = catch_unwind(release) {
            forget_payload(payload);
            self.set_status(BDS_ERR_PANIC as i32);
        }
        self.queue.complete(bds_completion {
            user_data: self.user_data,
            request_id: self.id,
            status: self.status.load(Ordering::Relaxed),
            flags: 0,
            value: 0,
            reserved: [0; 4],
        });
    }
}
