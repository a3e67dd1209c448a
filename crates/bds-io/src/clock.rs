//! Clock and timers of the host.

use std::cmp;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use crate::completion::Completion;
use crate::context::background;
use crate::current::{self, Current};

/// Time since the first call.
pub(crate) fn now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Below this many timers the abandoned ones are not removed.
const PURGE_MIN: usize = 64;

/// A timer: deadline and number, and the completion to signal.
pub(crate) type Timer = ((Duration, u64), Arc<Completion<()>>);

/// Timers in order of deadline; those of one moment in order of their creation.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_time: BTreeMap<(Duration, u64), Arc<Completion<()>>>,
    next_number: u64,
    purge_at: usize,
}

impl Timers {
    /// Adds a timer. Now and then returns abandoned ones: dropping them runs foreign code (the drop
    /// of a waker), so the caller does that once nothing is borrowed.
    #[must_use = "to be dropped when nothing is borrowed"]
    pub(crate) fn add(
        &mut self,
        deadline: Duration,
        completion: Arc<Completion<()>>,
    ) -> Vec<Timer> {
        let mut abandoned = Vec::new();
        if self.by_time.len() >= cmp::max(self.purge_at, PURGE_MIN) {
            // A completion that only we hold belongs to a sleep that was dropped.
            abandoned.extend(
                self.by_time.extract_if(.., |_, completion| Arc::strong_count(completion) == 1),
            );
            self.purge_at = self.by_time.len() * 2;
        }
        self.by_time.insert((deadline, self.next_number), completion);
        self.next_number += 1;
        abandoned
    }

    /// Deadline of the first timer.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.by_time.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes the first timer if it is due.
    pub(crate) fn take_due(&mut self, now: Duration) -> Option<Arc<Completion<()>>> {
        let first = self.by_time.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// Takes all timers, to move them to another Context.
    pub(crate) fn take_all(&mut self) -> Vec<(Duration, Arc<Completion<()>>)> {
        let all = std::mem::take(&mut self.by_time);
        all.into_iter().map(|((deadline, _), completion)| (deadline, completion)).collect()
    }
}

/// Future of a sleep on the host's clock. Finds its Context when first polled; the time counts from
/// `new`.
#[derive(Debug)]
pub(crate) struct Sleep {
    deadline: Duration,
    completion: Option<Arc<Completion<()>>>,
}

impl Sleep {
    pub(crate) fn new(how_long: Duration) -> Sleep {
        Sleep { deadline: now().saturating_add(how_long), completion: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(completion) = &self.completion {
            return completion.poll(cx);
        }
        if self.deadline <= now() {
            return Poll::Ready(());
        }
        let completion = Completion::new(cx.waker().clone());
        let abandoned = current::with(|current| match current {
            Current::Host(local) => Some(local.add_timer(self.deadline, completion.clone())),
            _ => None,
        });
        if abandoned.is_none() {
            match background() {
                Ok(background) => background.add_timer(self.deadline, completion.clone()),
                // No thread can be started that would wait for us.
                Err(_) => {
                    thread::sleep(self.deadline.saturating_sub(now()));
                    return Poll::Ready(());
                }
            }
        }
        self.completion = Some(completion);
        Poll::Pending
    }
}
