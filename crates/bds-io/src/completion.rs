//! `Completion<T>`: passes one result from the thread that has it to the future that awaits it.
//!
//! Both sides share it by `Arc`; either may be dropped first. The future may move between threads
//! and be polled by any executor.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

#[derive(Debug)]
struct State<T> {
    result: Option<T>,
    waker: Option<Waker>,
}

/// A slot for one result and one waker.
#[derive(Debug)]
pub(crate) struct Completion<T> {
    state: Mutex<State<T>>,
}

impl<T> Completion<T> {
    /// An empty completion that wakes `waker`.
    pub(crate) fn new(waker: Waker) -> Arc<Completion<T>> {
        Arc::new(Completion { state: Mutex::new(State { result: None, waker: Some(waker) }) })
    }

    /// Stores the result and wakes the waiting task.
    pub(crate) fn complete(&self, result: T) {
        let waker = {
            let mut state = self.lock();
            state.result = Some(result);
            state.waker.take()
        };
        // Outside the lock: waking runs a foreign executor's code.
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes the result, or registers the task's waker.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<T> {
        // Wakers are foreign code also when cloned and dropped: both happen outside the lock.
        let mut waker = None;
        loop {
            let mut state = self.lock();
            if let Some(result) = state.result.take() {
                drop(state);
                return Poll::Ready(result);
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

    use super::Completion;

    /// A waker whose every function takes the completion's lock, as that of a foreign executor may
    /// that polls inline.
    struct LockProbe {
        completion: Arc<Completion<u32>>,
        calls: AtomicUsize,
    }

    impl LockProbe {
        /// Takes the completion's lock; counts if that was possible at once.
        fn probe(&self) {
            assert!(self.completion.state.try_lock().is_ok(), "foreign code runs under the lock");
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
    }

    // One address, by which a waker is recognised.
    static VTABLE: RawWakerVTable = RawWakerVTable::new(
        |data| {
            // SAFETY: `data` came from Arc::into_raw and its count is one for this waker.
            let probe =
                unsafe { std::mem::ManuallyDrop::new(Arc::from_raw(data.cast::<LockProbe>())) };
            probe.probe();
            RawWaker::new(Arc::into_raw(Arc::clone(&probe)).cast(), &VTABLE)
        },
        |data| {
            // SAFETY: as above; waking gives the count up.
            unsafe { Arc::from_raw(data.cast::<LockProbe>()) }.probe();
        },
        |data| {
            // SAFETY: as above; the borrow ends before the waker.
            unsafe { &*data.cast::<LockProbe>() }.probe();
        },
        |data| {
            // SAFETY: as above; dropping gives the count up.
            unsafe { Arc::from_raw(data.cast::<LockProbe>()) }.probe();
        },
    );

    fn waker(probe: &Arc<LockProbe>) -> Waker {
        // SAFETY: the table's functions treat the pointer as the one count of an Arc that it is.
        unsafe { Waker::from_raw(RawWaker::new(Arc::into_raw(Arc::clone(probe)).cast(), &VTABLE)) }
    }

    #[test]
    fn wakers_are_cloned_woken_and_dropped_outside_the_lock() {
        let completion = Completion::new(Waker::noop().clone());
        let probe =
            || Arc::new(LockProbe { completion: completion.clone(), calls: AtomicUsize::new(0) });
        let (first, second) = (probe(), probe());
        let (one, two) = (waker(&first), waker(&second));
        for waker in [&one, &two, &one, &two] {
            assert_eq!(completion.poll(&mut Context::from_waker(waker)), Poll::Pending);
        }
        assert_eq!(first.calls.load(Ordering::Relaxed), 4, "cloned and dropped, twice");
        completion.complete(7);
        assert_eq!(second.calls.load(Ordering::Relaxed), 4, "cloned twice, dropped, woken");
        assert_eq!(completion.poll(&mut Context::from_waker(&one)), Poll::Ready(7));
    }

    /// The same waker once more costs neither a clone nor a drop.
    #[test]
    fn a_known_waker_is_kept() {
        let completion = Completion::<u32>::new(Waker::noop().clone());
        let probe =
            Arc::new(LockProbe { completion: completion.clone(), calls: AtomicUsize::new(0) });
        let waker = waker(&probe);
        for _ in 0..5 {
            assert_eq!(completion.poll(&mut Context::from_waker(&waker)), Poll::Pending);
        }
        assert_eq!(probe.calls.load(Ordering::Relaxed), 1);
    }
}
