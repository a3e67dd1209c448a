//! Passes progress from a request's task to its caller's callback.
//!
//! The callback borrows from the caller, so the task cannot call it. The task stores its latest
//! figures here, and the caller's future passes them on when it is polled. Figures in between may
//! be skipped, the last ones never.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

#[derive(Default)]
struct Latest {
    /// (done, total) that were not passed on yet.
    figures: Option<(u64, u64)>,
    waker: Option<Waker>,
}

/// The task's end of the channel.
pub(super) struct Reporter(Arc<Mutex<Latest>>);

/// The caller's end of the channel.
pub(super) struct Reported(Arc<Mutex<Latest>>);

/// Makes both ends.
pub(super) fn channel() -> (Reporter, Reported) {
    let latest = Arc::new(Mutex::default());
    (Reporter(Arc::clone(&latest)), Reported(latest))
}

impl Reporter {
    /// Stores the latest figures for the caller.
    pub(super) fn report(&self, done: u64, total: u64) {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest.figures = Some((done, total));
        let waker = latest.waker.take();
        // Waking may run a foreign executor's code.
        drop(latest);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Reported {
    /// Awaits `work` and passes on what it reports meanwhile.
    pub(super) async fn pass_on_until<T>(
        &mut self,
        work: impl Future<Output = T>,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> T {
        let mut work = pin!(work);
        poll_fn(|cx| {
            let result = work.as_mut().poll(cx);
            let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            latest.waker = result.is_pending().then(|| cx.waker().clone());
            let figures = latest.figures.take();
            drop(latest);
            if let Some((done, total)) = figures {
                progress(done, total);
            }
            result
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use bds_io::{Sim, SimConfig, spawn_now, yield_now};

    use super::*;

    #[test]
    fn progress_is_passed_on_during_the_work_and_the_last_figures_always() {
        for seed in 0..50 {
            let seen = Mutex::new(Vec::new());
            let progress = |done, total| seen.lock().unwrap().push((done, total));
            Sim::new(seed, SimConfig::calm()).block_on(async {
                let (reporter, mut reported) = channel();
                let work = spawn_now(async move {
                    for done in 0..=20 {
                        reporter.report(done, 20);
                        yield_now().await;
                    }
                    reporter.report(21, 20);
                    7
                });
                assert_eq!(reported.pass_on_until(work, &progress).await, 7);
            });
            let seen = seen.into_inner().unwrap();
            assert!(seen.is_sorted() && seen.len() > 2, "{seen:?}");
            assert_eq!(seen.last(), Some(&(21, 20)));
        }
    }
}
