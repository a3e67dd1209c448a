//! Time of the host: now, and who waits for when.

use std::cmp;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use crate::cell::AnswerCell;
use crate::context::background;
use crate::current::{self, Current};

/// Time since the first question.
pub(crate) fn now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed()
}

/// Below this many timers nobody looks for abandoned ones.
const PURGE_MIN: usize = 64;

/// A timer as the map holds it: when, its number, and who waits.
pub(crate) type Timer = ((Duration, u64), Arc<AnswerCell<()>>);

/// Who waits for when, in order; those of one moment in the order they came.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_time: BTreeMap<(Duration, u64), Arc<AnswerCell<()>>>,
    next_number: u64,
    purge_at: usize,
}

impl Timers {
    /// Adds a timer. Now and then returns those that nothing waits for any more: dropping them runs foreign code (the
    /// drop of a waker), so the caller does that once nothing is borrowed.
    #[must_use = "to be dropped when nothing is borrowed"]
    pub(crate) fn add(&mut self, deadline: Duration, cell: Arc<AnswerCell<()>>) -> Vec<Timer> {
        let mut abandoned = Vec::new();
        if self.by_time.len() >= cmp::max(self.purge_at, PURGE_MIN) {
            // A cell that only we hold belongs to a sleep that was dropped.
            abandoned.extend(self.by_time.extract_if(.., |_, cell| Arc::strong_count(cell) == 1));
            self.purge_at = self.by_time.len() * 2;
        }
        self.by_time.insert((deadline, self.next_number), cell);
        self.next_number += 1;
        abandoned
    }

    /// When the first timer is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.by_time.first_key_value().map(|((deadline, _), _)| *deadline)
    }

    /// Takes the first timer if it is due.
    pub(crate) fn take_due(&mut self, now: Duration) -> Option<Arc<AnswerCell<()>>> {
        let first = self.by_time.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// Takes everything, for another Context to go on with.
    pub(crate) fn take_all(&mut self) -> Vec<(Duration, Arc<AnswerCell<()>>)> {
        let all = std::mem::take(&mut self.by_time);
        all.into_iter().map(|((deadline, _), cell)| (deadline, cell)).collect()
    }
}

/// Waits on the host's clock. Begins (and finds its Context) when first polled; the time counts from `new`.
#[derive(Debug)]
pub(crate) struct Sleep {
    deadline: Duration,
    cell: Option<Arc<AnswerCell<()>>>,
}

impl Sleep {
    pub(crate) fn new(how_long: Duration) -> Sleep {
        Sleep { deadline: now().saturating_add(how_long), cell: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(cell) = &self.cell {
            return cell.poll(cx);
        }
        if self.deadline <= now() {
            return Poll::Ready(());
        }
        let cell = AnswerCell::new(cx.waker().clone());
        let abandoned = current::with(|world| match world {
            Current::Host(local) => Some(local.add_timer(self.deadline, cell.clone())),
            _ => None,
        });
        if abandoned.is_none() {
            match background() {
                Ok(background) => background.add_timer(self.deadline, cell.clone()),
                // No thread can be had that would wait for us.
                Err(_) => {
                    thread::sleep(self.deadline.saturating_sub(now()));
                    return Poll::Ready(());
                }
            }
        }
        self.cell = Some(cell);
        Poll::Pending
    }
}
