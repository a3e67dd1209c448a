//! Runs jobs on the calling thread where no other thread can be started (RLIMIT_NPROC).
//!
//! A job may make other jobs ready. Those are queued and run by the outermost call, one after
//! another, so neither the stack grows with them nor does a job run inside another.

use std::cell::RefCell;
use std::collections::VecDeque;

/// A job for this thread.
pub(crate) type Work = Box<dyn FnOnce()>;

thread_local! {
    /// `None` unless a job runs on this thread.
    static QUEUE: RefCell<Option<VecDeque<Work>>> = const { RefCell::new(None) };
}

/// Ends the outermost call, also if a job panics; jobs that are still queued then are run first.
struct Outermost;

impl Drop for Outermost {
    fn drop(&mut self) {
        while let Some(work) = next() {
            work();
        }
    }
}

/// The next job. `None` ends the outermost call.
fn next() -> Option<Work> {
    let next = QUEUE.try_with(|queue| {
        let mut queue = queue.borrow_mut();
        let work = queue.as_mut().and_then(VecDeque::pop_front);
        if work.is_none() {
            *queue = None;
        }
        work
    });
    next.ok().flatten()
}

/// Runs `work` now, or after the job that runs on this thread.
pub(crate) fn run(work: Work) {
    let mut work = Some(work);
    let queued = QUEUE.try_with(|queue| match &mut *queue.borrow_mut() {
        Some(queue) => {
            queue.extend(work.take());
            true
        }
        none => {
            *none = Some(VecDeque::new());
            false
        }
    });
    let Some(work) = work else { return };
    if queued.is_err() {
        // The thread is ending and has no queue any more.
        return work();
    }
    let outermost = Outermost;
    work();
    drop(outermost);
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::run;

    #[test]
    fn a_job_that_becomes_ready_in_another_runs_after_it() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let (outer, inner) = (Rc::clone(&seen), Rc::clone(&seen));
        run(Box::new(move || {
            let last = Rc::clone(&inner);
            run(Box::new(move || {
                inner.borrow_mut().push(2);
                run(Box::new(move || last.borrow_mut().push(3)));
            }));
            outer.borrow_mut().push(1);
        }));
        assert_eq!(*seen.borrow(), [1, 2, 3]);
    }

    #[test]
    fn a_panic_does_not_lose_queued_jobs() {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let inner = Rc::clone(&seen);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(Box::new(move || {
                run(Box::new(move || inner.borrow_mut().push(1)));
                panic!("as planned");
            }));
        }));
        assert!(panicked.is_err());
        let again = Rc::clone(&seen);
        run(Box::new(move || again.borrow_mut().push(2)));
        assert_eq!(*seen.borrow(), [1, 2]);
    }
}
