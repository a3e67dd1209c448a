//! Events of a context: fetched one by one, announced by a descriptor.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_core::event::{Event, Events};
use bds_core::graph::Graph;
use bds_jobs::{JobEvent, JobEvents};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::entry::forget_payload;
use crate::failure::Failure;
use crate::fault;

/// Events that wait for C once a descriptor announces them; the oldest are lost beyond that.
const MAX_WAITING: usize = 4096;

/// A descriptor that is readable while something waits.
pub(crate) struct Signal(EventFd);

impl Signal {
    pub(crate) fn new() -> Result<Self, Failure> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Makes the descriptor readable.
    pub(crate) fn raise(&self) {
        // It fails only when the counter is full, and is readable then.
        let _ = self.0.write(1);
    }

    /// Makes it not readable.
    pub(crate) fn clear(&self) {
        // It fails only when the counter is 0 already.
        let _ = self.0.read();
    }

    pub(crate) fn number(&self) -> i32 {
        self.0.as_fd().as_raw_fd()
    }
}

/// An event of the graph, or of a job.
pub(crate) enum Happened {
    Graph(Event),
    Job(JobEvent),
}

/// The events of one context.
pub(crate) struct EventSource(Arc<Mutex<State>>);

struct State {
    /// `None` once a task moves the events to `waiting`.
    direct: Option<Events>,
    /// Of the jobs, once there were any; `None` also after `direct` was taken.
    direct_jobs: Option<JobEvents>,
    waiting: VecDeque<Happened>,
    lost: u64,
    sequence: u64,
    signal: Option<Signal>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Queues an event. One whose delivery panics counts as lost, and those behind it are delivered.
fn deliver(state: &Mutex<State>, event: Happened) {
    let push = AssertUnwindSafe(|| {
        fault::point("event");
        lock(state).push(event);
    });
    if let Err(payload) = catch_unwind(push) {
        forget_payload(payload);
        lock(state).note_lost();
    }
}

impl EventSource {
    /// Events from now on.
    pub(crate) fn new(graph: &Graph) -> Self {
        let direct = Some(graph.events());
        let waiting = VecDeque::new();
        let (lost, sequence, signal, direct_jobs) = (0, 0, None, None);
        let state = State { direct, direct_jobs, waiting, lost, sequence, signal };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Adds the events of the context's jobs.
    pub(crate) fn add_jobs(&self, events: JobEvents) {
        let mut state = lock(&self.0);
        match state.direct {
            Some(_) => state.direct_jobs = Some(events),
            None => self.pump_jobs(events),
        }
    }

    fn pump_jobs(&self, mut events: JobEvents) {
        let weak = Arc::downgrade(&self.0);
        bds_io::spawn(async move {
            while let Some(event) = events.next().await {
                let Some(state) = weak.upgrade() else { return };
                deliver(&state, Happened::Job(event));
            }
        })
        .detach();
    }

    /// The descriptor. From the first call on a task of the background fills the queue.
    pub(crate) fn descriptor(&self) -> Result<i32, Failure> {
        let mut state = lock(&self.0);
        if let Some(signal) = &state.signal {
            return Ok(signal.number());
        }
        let signal = Signal::new()?;
        let number = signal.number();
        state.signal = Some(signal);
        let mut events = state.direct.take().expect("it is taken with the first descriptor");
        if let Some(events) = state.direct_jobs.take() {
            self.pump_jobs(events);
        }
        let weak = Arc::downgrade(&self.0);
        bds_io::spawn(async move {
            while let Some(event) = events.next().await {
                // The context is gone: nothing fetches its events any more.
                let Some(state) = weak.upgrade() else { return };
                deliver(&state, Happened::Graph(event));
            }
        })
        .detach();
        Ok(number)
    }

    pub(crate) fn next(&self) -> Option<(u64, Happened)> {
        let mut state = lock(&self.0);
        let event = state.take()?;
        state.sequence += 1;
        Some((state.sequence, event))
    }
}

impl State {
    fn push(&mut self, event: Happened) {
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
            self.lost += 1;
        }
        self.waiting.push_back(event);
        if self.waiting.len() == 1 {
            self.signal.iter().for_each(Signal::raise);
        }
    }

    /// An event was lost; the descriptor says that something waits.
    fn note_lost(&mut self) {
        self.lost += 1;
        self.signal.iter().for_each(Signal::raise);
    }

    fn take(&mut self) -> Option<Happened> {
        if let Some(direct) = &mut self.direct {
            let jobs = self.direct_jobs.as_mut();
            return direct
                .try_next()
                .map(Happened::Graph)
                .or_else(|| jobs?.try_next().map(Happened::Job));
        }
        if self.lost > 0 {
            let count = std::mem::take(&mut self.lost);
            if self.waiting.is_empty() {
                self.signal.iter().for_each(Signal::clear);
            }
            return Some(Happened::Graph(Event::EventsLost { count }));
        }
        let event = self.waiting.pop_front();
        if self.waiting.is_empty() {
            self.signal.iter().for_each(Signal::clear);
        }
        event
    }
}
