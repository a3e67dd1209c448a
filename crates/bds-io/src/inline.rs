//! Runs work on the calling thread where no other thread can be had (RLIMIT_NPROC).
//!
//! Work may make other work ready. That is queued and run by the outermost call, one after another, so neither the
//! stack grows with it nor does work run inside other work.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Something to do on some thread.
pub(crate) type Work = Box<dyn FnOnce()>;

thread_local! {
    /// `None` unless work runs on this thread.
    static QUEUE: RefCell<Option<VecDeque<Work>>> = const { RefCell::new(None) };
}

/// Ends the outermost call, also if work panics; what is still queued then is run first.
struct Outermost;

impl Drop for Outermost {
    fn drop(&mut self) {
        while let Some(work) = next() {
            work();
        }
    }
}

/// The next work; none left: the outermost call is over.
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

/// Runs `work` now, or after the work that is under way on this thread.
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
    fn work_that_becomes_ready_meanwhile_runs_afterwards() {
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
    fn a_panic_leaves_nothing_undone() {
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
