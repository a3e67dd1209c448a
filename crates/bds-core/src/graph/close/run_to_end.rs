//! Runs work to its end even if the caller's future is dropped.
//!
//! Closing a node, once begun, must not stop half-way. The work is a task of its own; its result goes to the waiter,
//! or to `orphaned` if the waiter is gone, and never to both.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bds_io::sync::Notify;

struct Inbox<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

enum State<T> {
    Running,
    Done(T),
    /// The waiter is gone, or has taken the result.
    Left,
    /// The task was dropped before its end: its executor is gone.
    Lost,
}

impl<T> Inbox<T> {
    /// The result, if it is there; taken once.
    fn take(&self) -> State<T> {
        let mut state = self.lock();
        match *state {
            State::Running => State::Running,
            _ => std::mem::replace(&mut *state, State::Left),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `work` to its end. `None` only if the executor went away before that. If the returned future is dropped,
/// `orphaned` gets the result.
pub(in crate::graph) async fn run_to_end<T, O>(
    work: impl Future<Output = T> + Send + 'static,
    orphaned: O,
) -> Option<T>
where
    T: Send + 'static,
    O: Fn(T) + Clone + Send + 'static,
{
    let inbox = Arc::new(Inbox { state: Mutex::new(State::Running), changed: Notify::new() });
    let sender = Sender { inbox: Arc::clone(&inbox), orphaned: orphaned.clone() };
    bds_io::spawn(async move { sender.deliver(work.await) }).detach();
    let mut waiter = Waiter { inbox, orphaned };
    waiter.wait().await
}

struct Sender<T, O: Fn(T)> {
    inbox: Arc<Inbox<T>>,
    orphaned: O,
}

impl<T, O: Fn(T)> Sender<T, O> {
    fn deliver(self, value: T) {
        let mut state = self.inbox.lock();
        if matches!(*state, State::Left) {
            drop(state);
            (self.orphaned)(value);
        } else {
            *state = State::Done(value);
        }
    }
}

impl<T, O: Fn(T)> Drop for Sender<T, O> {
    fn drop(&mut self) {
        let mut state = self.inbox.lock();
        if matches!(*state, State::Running) {
            *state = State::Lost;
        }
        drop(state);
        self.inbox.changed.notify_waiters();
    }
}

struct Waiter<T, O: Fn(T)> {
    inbox: Arc<Inbox<T>>,
    orphaned: O,
}

impl<T, O: Fn(T)> Waiter<T, O> {
    async fn wait(&mut self) -> Option<T> {
        loop {
            let mut changed = pin!(self.inbox.changed.notified());
            changed.as_mut().enable();
            match self.inbox.take() {
                State::Done(value) => return Some(value),
                State::Lost | State::Left => return None,
                State::Running => changed.await,
            }
        }
    }
}

impl<T, O: Fn(T)> Drop for Waiter<T, O> {
    fn drop(&mut self) {
        let before = std::mem::replace(&mut *self.inbox.lock(), State::Left);
        if let State::Done(value) = before {
            (self.orphaned)(value);
        }
    }
}
