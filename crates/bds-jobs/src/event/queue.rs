//! Queues of events, one a subscriber: bounded, and without loss of what a job has become.
//!
//! Sending never waits. A full queue makes space by leaving out, in this order: the oldest report
//! of a failed request; the oldest change of state that a later one of the same job follows; the
//! oldest event of a job that is gone. If there is none of these it grows: by a few events for each
//! job that lives, no more.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bds_io::sync::Notify;

use super::job_event::JobEvent;
use crate::state::JobStatus;

/// Length of a subscriber's queue, in events. A reader that is further behind gets
/// [`JobEvent::EventsLost`]. It loses reports of failed requests first, then states that were
/// followed by others, then events of jobs that were dismissed; never the newest state of a job,
/// nor how it ended, while the job is there to be asked.
pub const QUEUE_LEN: usize = 1024;

#[derive(Default)]
struct Queue {
    events: VecDeque<JobEvent>,
    lost: u64,
    is_closed: bool,
}

impl Queue {
    fn push(&mut self, event: JobEvent) {
        self.events.push_back(event);
        if self.events.len() > QUEUE_LEN
            && let Some(index) = self.dispensable()
        {
            self.events.remove(index);
            self.lost += 1;
        }
    }

    /// The event that is left out of a full queue.
    fn dispensable(&self) -> Option<usize> {
        let is_error = |event: &JobEvent| matches!(event, JobEvent::Error { .. });
        self.events.iter().position(is_error).or_else(|| self.superseded()).or_else(|| self.gone())
    }

    /// The first change of state that another one of the same job follows.
    fn superseded(&self) -> Option<usize> {
        let mut later = HashSet::new();
        let mut found = None;
        for (index, event) in self.events.iter().enumerate().rev() {
            if let JobEvent::StatusChange { id, .. } = event
                && !later.insert(id.as_str())
            {
                found = Some(index);
            }
        }
        found
    }

    /// The first event of a job that is gone.
    fn gone(&self) -> Option<usize> {
        let mut is_gone = HashMap::new();
        for event in &self.events {
            if let JobEvent::StatusChange { id, status } = event {
                is_gone.insert(id.as_str(), *status == JobStatus::Null);
            }
        }
        let gone = |id: &str| is_gone.get(id).is_some_and(|gone| *gone);
        self.events.iter().position(|event| event.id().is_some_and(gone))
    }

    fn pop(&mut self) -> Option<JobEvent> {
        match std::mem::take(&mut self.lost) {
            0 => self.events.pop_front(),
            count => Some(JobEvent::EventsLost { count }),
        }
    }
}

/// What a subscriber and the senders share.
#[derive(Default)]
struct Subscriber {
    queue: Mutex<Queue>,
    changed: Notify,
}

impl Subscriber {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The subscribers of a manager.
#[derive(Default)]
struct Hub(Mutex<Vec<Weak<Subscriber>>>);

impl Hub {
    fn subscribers(&self) -> MutexGuard<'_, Vec<Weak<Subscriber>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        for subscriber in self.subscribers().iter().filter_map(Weak::upgrade) {
            subscriber.queue().is_closed = true;
            subscriber.changed.notify_waiters();
        }
    }
}

/// Sends events to subscribers. Clones share them.
#[derive(Clone)]
pub(crate) struct EventHub(Arc<Hub>);

impl fmt::Debug for EventHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventHub").field(&self.0.subscribers().len()).finish()
    }
}

impl EventHub {
    pub(crate) fn new() -> Self {
        Self(Arc::default())
    }

    /// Puts an event into every subscriber's queue, in the same order for all.
    pub(crate) fn emit(&self, event: JobEvent) {
        let mut subscribers = self.0.subscribers();
        subscribers.retain(|subscriber| {
            let Some(subscriber) = subscriber.upgrade() else { return false };
            subscriber.queue().push(event.clone());
            subscriber.changed.notify_waiters();
            true
        });
    }

    pub(crate) fn subscribe(&self) -> JobEvents {
        let subscriber = Arc::new(Subscriber::default());
        self.0.subscribers().push(Arc::downgrade(&subscriber));
        JobEvents(subscriber)
    }
}

/// A subscriber's queue of events. Made by [`JobManager::events`](crate::JobManager::events).
pub struct JobEvents(Arc<Subscriber>);

impl fmt::Debug for JobEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("JobEvents").field(&self.0.queue().events.len()).finish()
    }
}

impl JobEvents {
    /// Waits for the next event. `None`: the manager and its jobs are gone and the queue is empty.
    /// Dropping the future loses no event.
    pub async fn next(&mut self) -> Option<JobEvent> {
        let next = || {
            let mut queue = self.0.queue();
            let event = queue.pop();
            (event.is_some() || queue.is_closed).then_some(event)
        };
        self.0.changed.wait_for(next).await
    }

    /// The next event, if there is one now.
    pub fn try_next(&mut self) -> Option<JobEvent> {
        self.0.queue().pop()
    }
}

#[cfg(test)]
mod tests {
    use bds_core::copy::Side;

    use super::super::job_event::JobPoint;
    use super::*;
    use crate::kinds::JobType;
    use crate::policy::JobErrorAction;

    fn status(id: &str, status: JobStatus) -> JobEvent {
        JobEvent::StatusChange { id: id.into(), status }
    }

    fn error(offset: u64) -> JobEvent {
        let (side, action, node) = (Side::Target, JobErrorAction::Ignore, "n".to_owned());
        let (len, errno, attempts, count) = (1, 5, 1, 1);
        JobEvent::Error { id: "e".into(), side, action, offset, len, errno, node, attempts, count }
    }

    fn point(id: &str) -> JobPoint {
        let job_type = JobType::Backup;
        JobPoint { job_type, id: id.to_owned(), len: 1, offset: 1, speed: 0 }
    }

    fn drain(events: &mut JobEvents) -> (u64, Vec<JobEvent>) {
        let all: Vec<_> = std::iter::from_fn(|| events.try_next()).collect();
        match all.split_first() {
            Some((JobEvent::EventsLost { count }, rest)) => (*count, rest.to_vec()),
            _ => (0, all),
        }
    }

    #[test]
    fn states_survive_a_flood_of_errors() {
        let hub = EventHub::new();
        let mut events = hub.subscribe();
        hub.emit(status("e", JobStatus::Running));
        (0..5000).for_each(|offset| hub.emit(error(offset)));
        hub.emit(status("e", JobStatus::Paused));
        let (lost, kept) = drain(&mut events);
        assert_eq!((lost, kept.len()), (5002 - 1024, QUEUE_LEN));
        assert_eq!(kept[0], status("e", JobStatus::Running));
        assert_eq!(kept[1], error(5002 - 1024), "the oldest went");
        assert_eq!(kept[QUEUE_LEN - 1], status("e", JobStatus::Paused));
    }

    #[test]
    fn the_newest_state_of_each_job_survives_a_flood_of_states() {
        let hub = EventHub::new();
        let mut events = hub.subscribe();
        for round in 0..1000 {
            for job in 0..10 {
                let paused = round % 2 == 0;
                let state = if paused { JobStatus::Paused } else { JobStatus::Running };
                hub.emit(status(&format!("job{job}"), state));
            }
        }
        hub.emit(status("job3", JobStatus::Concluded));
        let (lost, kept) = drain(&mut events);
        assert_eq!((lost, kept.len()), (10_001 - 1024, QUEUE_LEN));
        for job in 0..10 {
            let id = format!("job{job}");
            let last = kept.iter().rev().find(|event| event.id() == Some(&id)).unwrap();
            let expected = if job == 3 { JobStatus::Concluded } else { JobStatus::Running };
            assert_eq!(*last, status(&id, expected));
        }
    }

    #[test]
    fn a_reader_that_never_reads_takes_bounded_memory() {
        let hub = EventHub::new();
        let mut events = hub.subscribe();
        for job in 0..600 {
            let id = format!("job{job}");
            hub.emit(JobEvent::Completed { point: point(&id), error: None });
            hub.emit(status(&id, JobStatus::Concluded));
            hub.emit(status(&id, JobStatus::Null));
        }
        // Jobs that are there to be asked lose nothing, however many they are.
        for job in 0..1200 {
            hub.emit(status(&format!("live{job}"), JobStatus::Running));
        }
        let (lost, kept) = drain(&mut events);
        assert_eq!(kept.len(), 1200);
        assert_eq!(lost, 1800);
        assert!(kept.iter().all(|event| event.id().is_some_and(|id| id.starts_with("live"))));
    }

    #[test]
    fn the_queue_ends_with_the_last_sender() {
        let hub = EventHub::new();
        let mut events = hub.subscribe();
        hub.emit(error(1));
        drop(hub);
        bds_io::block_on(async {
            assert_eq!(events.next().await, Some(error(1)));
            assert_eq!(events.next().await, None);
        });
    }
}
