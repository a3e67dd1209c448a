//! One answer, handed from whoever does the work to the future that waits for it.
//!
//! The two sides share the cell by `Arc`; either may go away first. The future may move between threads and
//! be polled by any executor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

#[derive(Debug)]
struct State<T> {
    answer: Option<T>,
    waker: Option<Waker>,
}

/// A place for one answer and one waiter.
#[derive(Debug)]
pub(crate) struct AnswerCell<T> {
    state: Mutex<State<T>>,
}

impl<T> AnswerCell<T> {
    /// An empty cell whose waiter is `waker`.
    pub(crate) fn new(waker: Waker) -> Arc<AnswerCell<T>> {
        Arc::new(AnswerCell { state: Mutex::new(State { answer: None, waker: Some(waker) }) })
    }

    /// Puts the answer in and wakes the waiter.
    pub(crate) fn complete(&self, answer: T) {
        let waker = {
            let mut state = self.lock();
            state.answer = Some(answer);
            state.waker.take()
        };
        // Outside the lock: waking runs a foreign executor's code.
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes the answer, or leaves the task's waker.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<T> {
        let mut state = self.lock();
        if let Some(answer) = state.answer.take() {
            return Poll::Ready(answer);
        }
        match &mut state.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing under the lock leaves the state half changed, so a panic of a waker's clone does no harm.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
