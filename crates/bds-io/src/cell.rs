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
        // Wakers are foreign code also when cloned and dropped: both happen outside the lock.
        let mut waker = None;
        loop {
            let mut state = self.lock();
            if let Some(answer) = state.answer.take() {
                drop(state);
                return Poll::Ready(answer);
            }
            if state.waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            let replaced = match waker.take() {
                Some(waker) => state.waker.replace(waker),
                None => {
                    drop(state);
                    waker = Some(cx.waker().clone());
                    continue;
                }
            };
            drop(state);
            drop(replaced);
            return Poll::Pending;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing under the lock panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

    use super::AnswerCell;

    /// A waker whose every function looks into the cell, as a foreign executor's may that polls inline.
    struct Curious {
        cell: Arc<AnswerCell<u32>>,
        calls: AtomicUsize,
    }

    impl Curious {
        /// Takes the cell's lock; counts if that was possible at once.
        fn look(&self) {
            assert!(self.cell.state.try_lock().is_ok(), "foreign code runs under the cell's lock");
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
    }

    // One address, which is how a waker is known again.
    static VTABLE: RawWakerVTable = RawWakerVTable::new(
        |data| {
            // SAFETY: `data` came from Arc::into_raw and its count is one for this waker.
            let curious =
                unsafe { std::mem::ManuallyDrop::new(Arc::from_raw(data.cast::<Curious>())) };
            curious.look();
            RawWaker::new(Arc::into_raw(Arc::clone(&curious)).cast(), &VTABLE)
        },
        |data| {
            // SAFETY: as above; waking gives the count up.
            unsafe { Arc::from_raw(data.cast::<Curious>()) }.look();
        },
        |data| {
            // SAFETY: as above; the borrow ends before the waker.
            unsafe { &*data.cast::<Curious>() }.look();
        },
        |data| {
            // SAFETY: as above; dropping gives the count up.
            unsafe { Arc::from_raw(data.cast::<Curious>()) }.look();
        },
    );

    fn waker(curious: &Arc<Curious>) -> Waker {
        // SAFETY: the table's functions treat the pointer as the one count of an Arc that it is.
        unsafe {
            Waker::from_raw(RawWaker::new(Arc::into_raw(Arc::clone(curious)).cast(), &VTABLE))
        }
    }

    #[test]
    fn wakers_are_cloned_woken_and_dropped_outside_the_lock() {
        let cell = AnswerCell::new(Waker::noop().clone());
        let curious = || Arc::new(Curious { cell: cell.clone(), calls: AtomicUsize::new(0) });
        let (first, second) = (curious(), curious());
        let (one, two) = (waker(&first), waker(&second));
        for waker in [&one, &two, &one, &two] {
            assert_eq!(cell.poll(&mut Context::from_waker(waker)), Poll::Pending);
        }
        assert_eq!(first.calls.load(Ordering::Relaxed), 4, "cloned and dropped, twice");
        cell.complete(7);
        assert_eq!(second.calls.load(Ordering::Relaxed), 4, "cloned twice, dropped, woken");
        assert_eq!(cell.poll(&mut Context::from_waker(&one)), Poll::Ready(7));
    }

    /// The same waker once more costs neither a clone nor a drop.
    #[test]
    fn a_known_waker_is_kept() {
        let cell = AnswerCell::<u32>::new(Waker::noop().clone());
        let curious = Arc::new(Curious { cell: cell.clone(), calls: AtomicUsize::new(0) });
        let waker = waker(&curious);
        for _ in 0..5 {
            assert_eq!(cell.poll(&mut Context::from_waker(&waker)), Poll::Pending);
        }
        assert_eq!(curious.calls.load(Ordering::Relaxed), 1);
    }
}
