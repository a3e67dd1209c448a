//! `Clock`: virtual time and the events to come.
//!
//! Time advances only when an event is taken, so waiting costs nothing. Events of the same moment
//! come in seeded order.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::Sim;

/// Names a pending event: moment, seeded tie-break, number.
pub(super) type EventKey = (u64, u64, u64);

/// A future event.
pub(super) enum Event {
    /// A sleeper wakes.
    Wake(Waker),
    /// The operation in this slot takes effect up to this many bytes.
    Effect { slot: usize, upto: u64 },
    /// The operation in this slot completes.
    Complete { slot: usize },
    /// The power is cut.
    Cut,
}

/// The current moment and the events to come.
#[derive(Default)]
pub(super) struct Clock {
    now_ns: u64,
    next: u64,
    events: BTreeMap<EventKey, Event>,
}

impl Clock {
    /// Nanoseconds since the world began.
    pub(super) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Schedules an event.
    pub(super) fn push(&mut self, at_ns: u64, tie: u64, event: Event) -> EventKey {
        let key = (at_ns.max(self.now_ns), tie, self.next);
        self.next += 1;
        self.events.insert(key, event);
        key
    }

    /// Takes the next event and moves time to it.
    pub(super) fn pop(&mut self) -> Option<Event> {
        let ((at_ns, _, _), event) = self.events.pop_first()?;
        self.now_ns = at_ns;
        Some(event)
    }

    /// Moment of the next event.
    pub(super) fn next_ns(&self) -> Option<u64> {
        self.events.first_key_value().map(|((at_ns, _, _), _)| *at_ns)
    }

    /// Removes an event; `None` if it came already.
    pub(super) fn cancel(&mut self, key: EventKey) -> Option<Event> {
        self.events.remove(&key)
    }

    /// Exchanges a sleeper's waker; false if it was woken already.
    pub(super) fn swap_waker(&mut self, key: EventKey, waker: &mut Waker) -> bool {
        match self.events.get_mut(&key) {
            Some(Event::Wake(old)) => {
                std::mem::swap(old, waker);
                true
            }
            _ => false,
        }
    }

    /// Takes all events to come.
    pub(super) fn drain(&mut self) -> BTreeMap<EventKey, Event> {
        std::mem::take(&mut self.events)
    }
}

/// Future of a sleep in virtual time.
pub(super) struct Sleep {
    sim: Sim,
    how_long: Duration,
    key: Option<EventKey>,
}

impl Sleep {
    /// A sleep that begins when it is first polled.
    pub(super) fn new(sim: Sim, how_long: Duration) -> Sleep {
        Sleep { sim, how_long, key: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let sim = self.sim.clone();
        // Wakers may run foreign code when cloned and dropped: never under the world's lock.
        let mut waker = cx.waker().clone();
        let mut world = sim.world();
        if let Some(key) = self.key {
            let is_pending = world.clock.swap_waker(key, &mut waker);
            drop(world);
            return if is_pending { Poll::Pending } else { Poll::Ready(()) };
        }
        let how_long_ns = u64::try_from(self.how_long.as_nanos()).unwrap_or(u64::MAX);
        let at_ns = world.clock.now_ns().saturating_add(how_long_ns);
        if !world.is_cut {
            let tie = world.rng.any();
            self.key = Some(world.clock.push(at_ns, tie, Event::Wake(waker)));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let _waker = self.sim.world().clock.cancel(key);
        }
    }
}
