//! Two thread pools of the process: one for blocking system calls, one for computing.
//!
//! A thread starts when there are more jobs than idle threads, and ends after a while without work.
//! The sizes bound the threads of the process. Where no thread can be started, `submit` refuses and
//! the caller does the work itself.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// A job for a thread.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Blocking calls in parallel at most: enough to keep a device busy, few enough not to thrash.
const IO_THREADS_MAX: usize = 16;
/// A thread ends after so long without work.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// The pool for blocking system calls.
pub(crate) fn io() -> &'static Workers {
    static IO: LazyLock<Workers> = LazyLock::new(|| Workers::new("bds-io-pool", IO_THREADS_MAX));
    &IO
}

/// The pool for computing, one thread a core.
pub(crate) fn cpu() -> &'static Workers {
    static CPU: LazyLock<Workers> = LazyLock::new(|| {
        Workers::new("bds-cpu-pool", thread::available_parallelism().map_or(1, |cores| cores.get()))
    });
    &CPU
}

/// Starts a thread, if one can be had.
pub(crate) fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    #[cfg(test)]
    if tests::NO_THREADS.get() {
        return Err(io::Error::from_raw_os_error(libc::EAGAIN));
    }
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
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

    /// Queues the job that `make` gives. False if the pool has no thread and none can be started;
    /// then `make` was not called.
    #[must_use = "if false, nothing does the work"]
    pub(crate) fn submit(&'static self, make: impl FnOnce() -> Job) -> bool {
        let state = self.lock();
        let is_served = state.queue.len() < state.idle || state.threads == self.threads_max;
        if is_served {
            self.push(state, make());
            return true;
        }
        drop(state);
        let is_started = start_thread(self.name, || self.serve()).is_ok();
        let state = self.lock();
        // Without a new thread others do the work, if there are any: none ends while there is work.
        if !is_started && state.threads == 0 {
            return false;
        }
        self.push(state, make());
        true
    }

    fn push(&self, mut state: MutexGuard<'_, State>, job: Job) {
        state.queue.push_back(job);
        drop(state);
        self.work.notify_one();
    }

    fn serve(&self) {
        let mut state = self.lock();
        if state.threads == self.threads_max {
            // Others were started first; they do the work.
            return;
        }
        state.threads += 1;
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                // A job that must report its panic catches it itself; here it only must not cost a
                // thread.
                let _ = catch_unwind(AssertUnwindSafe(job));
                state = self.lock();
                continue;
            }
            state.idle += 1;
            let (guard, waited) =
                self.work.wait_timeout(state, IDLE_TIMEOUT).unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock, and nothing under it panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;
    use std::sync::mpsc;

    use super::Workers;

    thread_local! {
        /// Starting a thread from this one fails.
        pub(crate) static NO_THREADS: Cell<bool> = const { Cell::new(false) };
    }

    /// Until the guard is dropped, this thread can start no other.
    pub(crate) fn without_threads() -> impl Drop {
        struct AllowThreads;
        impl Drop for AllowThreads {
            fn drop(&mut self) {
                NO_THREADS.set(false);
            }
        }
        NO_THREADS.set(true);
        AllowThreads
    }

    fn workers(threads_max: usize) -> &'static Workers {
        Box::leak(Box::new(Workers::new("bds-test", threads_max)))
    }

    #[test]
    fn without_a_thread_the_job_is_not_made() {
        let workers = workers(2);
        let none = without_threads();
        assert!(!workers.submit(|| unreachable!("there is no thread")));
        drop(none);
        let (sender, receiver) = mpsc::channel();
        assert!(workers.submit(|| Box::new(move || sender.send(1).unwrap())));
        assert_eq!(receiver.recv(), Ok(1));
    }

    /// A busy thread takes the jobs for which no other can be started.
    #[test]
    fn one_thread_is_enough() {
        let workers = workers(2);
        let (sender, receiver) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let busy = sender.clone();
        assert!(workers.submit(|| Box::new(move || {
            busy.send(0).unwrap();
            wait.recv().unwrap();
        })));
        assert_eq!(receiver.recv(), Ok(0));
        let none = without_threads();
        for number in 1..5 {
            let sender = sender.clone();
            assert!(workers.submit(|| Box::new(move || sender.send(number).unwrap())));
        }
        drop(none);
        go.send(()).unwrap();
        assert_eq!(receiver.iter().take(4).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }
}
