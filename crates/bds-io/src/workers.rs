//! Threads that block, so that Contexts need not: one set for system calls, one for computing.
//!
//! Threads start when there is more work than idle threads, and leave after a while without work. Both sets
//! serve the whole process: their number bounds what the process asks of the machine.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Work for a thread.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Blocking calls in parallel at most: enough to keep a device busy, few enough not to thrash.
const IO_THREADS_MAX: usize = 16;
/// How long a thread without work stays.
const LINGER: Duration = Duration::from_secs(10);

/// The threads for blocking system calls.
pub(crate) fn io() -> &'static Workers {
    static IO: LazyLock<Workers> = LazyLock::new(|| Workers::new("bds-io-pool", IO_THREADS_MAX));
    &IO
}

/// The threads for computing, one a core.
pub(crate) fn cpu() -> &'static Workers {
    static CPU: LazyLock<Workers> = LazyLock::new(|| {
        Workers::new("bds-cpu-pool", thread::available_parallelism().map_or(1, |cores| cores.get()))
    });
    &CPU
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// A set of threads with one queue.
pub(crate) struct Workers {
    name: &'static str,
    threads_max: usize,
    state: Mutex<State>,
    work: Condvar,
}

impl Workers {
    fn new(name: &'static str, threads_max: usize) -> Workers {
        Workers { name, threads_max, state: Mutex::default(), work: Condvar::new() }
    }

    /// Queues a job. If no thread can be started at all, it runs here.
    pub(crate) fn submit(&'static self, job: Job) {
        let mut state = self.lock();
        state.queue.push_back(job);
        if state.queue.len() <= state.idle || state.threads == self.threads_max {
            drop(state);
            self.work.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let started = thread::Builder::new().name(self.name.into()).spawn(|| self.serve());
        if started.is_err() {
            self.without_thread();
        }
    }

    /// The machine gives no more threads: others will do the work if there are any, else we do.
    fn without_thread(&self) {
        let mut state = self.lock();
        state.threads -= 1;
        while state.threads == 0 {
            let Some(job) = state.queue.pop_front() else { return };
            drop(state);
            job();
            state = self.lock();
        }
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                // A job that must tell of its panic catches it itself; here it only must not cost a thread.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (guard, waited) =
                self.work.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock, and nothing under it panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
