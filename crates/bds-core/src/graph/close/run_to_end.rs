//! Runs work to its end even if the caller's future is dropped.
//!
//! Closing a node, once begun, must not stop half-way. The work is a task of its own; its result
//! goes to the waiter, or to `orphaned` if the waiter is gone, and never to both.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::sync::Notify;

/// A oneshot whose unread value is not lost.
struct Oneshot<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

enum State<T> {
    Running,
    Done(T),
    /// The waiter is gone, or has taken the result.
    Abandoned,
    /// The task was dropped before its end: its executor is gone.
    Lost,
}

impl<T> Oneshot<T> {
    /// The result, if it is there; taken once.
    fn take(&self) -> State<T> {
        let mut state = self.lock();
        match *state {
            State::Running => State::Running,
            _ => std::mem::replace(&mut *state, State::Abandoned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `work` to its end. `None` only if the executor went away before that. If the returned
/// future is dropped, `orphaned` gets the result.
pub(in crate::graph) async fn run_to_end<T, O>(
    work: impl Future<Output = T> + Send + 'static,
    orphaned: O,
) -> Option<T>
where
    T: Send + 'static,
    O: Fn(T) + Clone + Send + 'static,
{
    let oneshot = Arc::new(Oneshot { state: Mutex::new(State::Running), changed: Notify::new() });
    let sender = Sender { oneshot: Arc::clone(&oneshot), orphaned: orphaned.clone() };
    bds_io::spawn(async move { sender.deliver(work.await) }).detach();
    let mut waiter = Waiter { oneshot, orphaned };
    waiter.wait().await
}

struct Sender<T, O: Fn(T)> {
    oneshot: Arc<Oneshot<T>>,
    orphaned: O,
}

impl<T, O: Fn(T)> Sender<T, O> {
    fn deliver(self, value: T) {
        let mut state = self.oneshot.lock();
        if matches!(*state, State::Abandoned) {
            drop(state);
            (self.orphaned)(value);
        } else {
            *state = State::Done(value);
        }
    }
}

impl<T, O: Fn(T)> Drop for Sender<T, O> {
    fn drop(&mut self) {
        let mut state = self.oneshot.lock();
        if matches!(*state, State::Running) {
            *state = State::Lost;
        }
        drop(state);
        self.oneshot.changed.notify_waiters();
    }
}

struct Waiter<T, O: Fn(T)> {
    oneshot: Arc<Oneshot<T>>,
    orphaned: O,
}

impl<T, O: Fn(T)> Waiter<T, O> {
    async fn wait(&mut self) -> Option<T> {
        let result = || match self.oneshot.take() {
            State::Done(value) => Some(Some(value)),
            State::Lost | State::Abandoned => Some(None),
            State::Running => None,
        };
        self.oneshot.changed.wait_for(result).await
    }
}

impl<T, O: Fn(T)> Drop for Waiter<T, O> {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.oneshot.lock(), State::Abandoned);
        if let State::Done(value) = before {
            (self.orphaned)(value);
        }
    }
}
