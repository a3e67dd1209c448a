//! Requests in flight of a queue, and its completions: exactly one for each accepted request.
//!
//! A `Ticket` is the anchor of its request's memory. When its last clone is dropped, and not
//! before, the completion is there: whether the request ended, was cancelled, or its task was lost
//! to a panic. So no path can lose a completion or report one twice, and none returns memory that
//! an operation still uses.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
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
    /// Threads in `wait`.
    waiters: usize,
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

    /// Reserves up to `wanted` places in flight, with ids that follow the one returned.
    pub(crate) fn reserve(&self, wanted: usize) -> (usize, u64) {
        let mut inner = self.lock();
        let count = wanted.min(self.depth - inner.outstanding);
        inner.outstanding += count;
        let before = inner.last_id;
        inner.last_id += count as u64;
        (count, before)
    }

    /// Ends a submission: gives places back, and posts what completed at once.
    pub(crate) fn end_submission(&self, unused: usize, done: &[bds_completion]) {
        if unused == 0 && done.is_empty() {
            return;
        }
        let mut inner = self.lock();
        inner.outstanding -= unused;
        self.post(inner, done);
    }

    /// Lets `cancel` find the request. Before its task is spawned.
    pub(crate) fn activate(&self, id: u64, handle: AbortHandle) {
        self.lock().active.insert(id, handle);
    }

    fn complete(&self, completion: bds_completion) {
        let mut inner = self.lock();
        inner.active.remove(&completion.request_id);
        self.post(inner, &[completion]);
    }

    fn post(&self, mut inner: MutexGuard<'_, Inner>, done: &[bds_completion]) {
        if inner.is_closed {
            inner.outstanding -= done.len();
            return;
        }
        let was_empty = inner.done.is_empty();
        inner.done.extend(done);
        if was_empty && !inner.done.is_empty() {
            inner.signal.iter().for_each(Signal::raise);
        }
        let is_awaited = inner.waiters > 0;
        drop(inner);
        // A notification is a system call, whether or not a thread waits.
        if is_awaited {
            self.changed.notify_all();
        }
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
        inner.waiters += 1;
        let is_over = loop {
            if inner.is_closed {
                inner.waiters -= 1;
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
        inner.waiters -= 1;
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
    value: AtomicU64,
    /// `None` while it is dropped, and once it shall not complete.
    backend: Option<Arc<BackendShared>>,
    memory: Option<Arc<Region>>,
}

impl Ticket {
    /// The ticket of a request; its place was reserved.
    pub(crate) fn new(
        queue: &Arc<QueueState>,
        (id, user_data): (u64, u64),
        backend: Arc<BackendShared>,
        memory: Option<Arc<Region>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue: Arc::clone(queue),
            user_data,
            id,
            status: AtomicI32::new(BDS_ERR_CANCELLED as i32),
            value: AtomicU64::new(0),
            backend: Some(backend),
            memory,
        })
    }

    /// Makes the ticket of a request that has completed that of another one on the same backend,
    /// in the same submission.
    pub(crate) fn renew(&mut self, (id, user_data): (u64, u64), memory: Option<Arc<Region>>) {
        (self.id, self.user_data, self.memory) = (id, user_data, memory);
        *self.status.get_mut() = BDS_ERR_CANCELLED as i32;
        *self.value.get_mut() = 0;
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn backend(&self) -> &Arc<BackendShared> {
        self.backend.as_ref().expect("it is taken by the drop alone")
    }

    /// Sets the outcome; without one it is "cancelled".
    pub(crate) fn set_outcome(&self, status: i32, value: u64) {
        self.value.store(value, Ordering::Relaxed);
        self.status.store(status, Ordering::Relaxed);
    }

    /// What C gets to know.
    pub(crate) fn completion(&self) -> bds_completion {
        bds_completion {
            user_data: self.user_data,
            request_id: self.id,
            status: self.status.load(Ordering::Relaxed),
            flags: 0,
            value: self.value.load(Ordering::Relaxed),
            reserved: [0; 4],
        }
    }

    /// Lets the drop post no completion: the request was not begun, or its completion is posted
    /// by the submission.
    pub(crate) fn retract(&mut self) {
        // The outcome stands.
        let _released = self.release();
    }

    /// Drops what the request holds. `false`: that panicked, which must not cost a completion.
    fn release(&mut self) -> bool {
        let held = (self.backend.take(), self.memory.take());
        let drops = AssertUnwindSafe(|| {
            fault::point("ticket");
            drop(held);
        });
        match catch_unwind(drops) {
            Ok(()) => true,
            Err(payload) => {
                forget_payload(payload);
                false
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.backend.is_none() {
            // Retracted.
            return;
        }
        // First what the request holds: with the completion in hand, C may count on it.
        if !self.release() {
            self.set_outcome(BDS_ERR_PANIC as i32, 0);
        }
        self.queue.complete(self.completion());
    }
}
