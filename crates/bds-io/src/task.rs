//! `Task`: the handle of a spawned future, which awaits, cancels or detaches it.
//!
//! ```text
//! spawn      queued; polled first by the executor
//! spawn_now  polled first where it is called, then by the executor, also if the handle is not polled
//! ```
//! Dropping the handle of a `spawn_now` task drops its future before it returns, as dropping a
//! plain future would: a dropped write must exclude requests that overlap it from then on, not from
//! a later turn of its executor. The handle reaches the future through [`DropHandle`], whose lock
//! is held while the future is polled; what is left of the task is freed by the executor.

use std::cell::UnsafeCell;
use std::fmt;
use std::future::Future;
use std::marker::PhantomPinned;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll};

/// A task that is ready to be polled.
pub(crate) type Runnable = async_task::Runnable<DropHandle>;

/// Handle of a spawned future. Dropping it cancels the task; `detach` lets it continue. If the
/// future panics, so does awaiting the handle.
#[derive(Debug)]
#[must_use = "dropping a Task cancels it; await or detach it"]
pub struct Task<T> {
    /// `None` only while it is being dropped or detached.
    task: Option<async_task::Task<T, DropHandle>>,
}

impl<T> Task<T> {
    /// Lets the task run to completion without a handle.
    pub fn detach(mut self) {
        if let Some(task) = self.task.take() {
            task.detach();
        }
    }
}

impl<T> Task<T> {
    /// Makes a handle that detaches the task instead of cancelling it when it is dropped: the task
    /// runs to completion.
    pub fn detach_on_drop(self) -> DetachOnDrop<T> {
        DetachOnDrop { task: Some(self) }
    }
}

/// The handle of a task that runs to completion even if the handle is dropped. Awaiting it gives
/// the task's output.
#[derive(Debug)]
pub struct DetachOnDrop<T> {
    /// `None` only after the task's end.
    task: Option<Task<T>>,
}

impl<T> Future for DetachOnDrop<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let task = self.task.as_mut().expect("not polled again after it was ready");
        let output = std::task::ready!(Pin::new(task).poll(cx));
        self.task = None;
        Poll::Ready(output)
    }
}

impl<T> Drop for DetachOnDrop<T> {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.detach();
        }
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let task = self.task.as_mut().expect("taken only when the handle ends");
        Pin::new(task).poll(cx)
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        let Some(task) = self.task.take() else { return };
        task.metadata().drop_future();
        drop(task);
    }
}

/// Makes a task whose wake-ups go to `schedule`. It is not scheduled yet.
pub(crate) fn create<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
    schedule: impl Fn(Runnable) + Send + Sync + 'static,
) -> (Runnable, Task<T>) {
    let (runnable, task) = builder().spawn(|_| future, schedule);
    (runnable, Task { task: Some(task) })
}

/// As [`create`], but the future is dropped with the handle. The caller runs it at once.
pub(crate) fn create_dropped_with_handle<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
    schedule: impl Fn(Runnable) + Send + Sync + 'static,
) -> (Runnable, Task<T>) {
    // SAFETY: `spawn_unchecked` asks that the future is `Send`, that what it borrows outlives it,
    // and that `schedule` is `Send`, `Sync` and borrows nothing. `future` and `schedule` are bound
    // so above, and `DroppableFuture` is `Send` with its future. It borrows the metadata alone,
    // which async-task keeps in the same allocation, in place, until after the future was dropped.
    let (runnable, task) = unsafe {
        builder().spawn_unchecked(|drop_handle| DroppableFuture::new(future, drop_handle), schedule)
    };
    (runnable, Task { task: Some(task) })
}

fn builder() -> async_task::Builder<DropHandle> {
    // A panic is passed on to the code that awaits the task instead of ending the thread that
    // drives it.
    async_task::Builder::new().propagate_panic(true).metadata(DropHandle::default())
}

/// Lets a task's handle drop the task's future.
#[derive(Default)]
pub(crate) struct DropHandle {
    /// `None` before the first poll, after completion, and always for tasks of `spawn`.
    future: Mutex<Option<FuturePtr>>,
    /// The thread that holds the lock to poll, by its unique number; 0: none.
    polled_by: AtomicUsize,
}

/// Type-erased pointer to the future of a task.
struct FuturePtr(NonNull<dyn Clear>);

// SAFETY: it leads to an `Option` of a future that is `Send` (`DroppableFuture::poll` makes it so),
// and is dereferenced only by the thread that holds the lock around it.
unsafe impl Send for FuturePtr {}

/// Drops what is inside, in place.
trait Clear {
    fn clear(&mut self);
}

impl<F> Clear for Option<F> {
    fn clear(&mut self) {
        *self = None;
    }
}

impl fmt::Debug for DropHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DropHandle").finish_non_exhaustive()
    }
}

impl DropHandle {
    fn lock(&self) -> MutexGuard<'_, Option<FuturePtr>> {
        // A future that panicked is not polled again, and is dropped like any other.
        self.future.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the future; if another thread polls it, after that poll. A future that drops the
    /// handle of its own task while it is polled is dropped when that poll ends.
    fn drop_future(&self) {
        let mut place = match self.future.try_lock() {
            Ok(place) => place,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                if self.polled_by.load(Ordering::Relaxed) == this_thread() {
                    return;
                }
                self.lock()
            }
        };
        if let Some(FuturePtr(mut future)) = place.take() {
            // SAFETY: the pointer is set only between the first poll of the `DroppableFuture` and
            // the end of its future, so the future is, pinned in its task. Nothing else touches it:
            // a poll and the drop of the `DroppableFuture` hold the lock that is held here. It is
            // dropped where it lies, as `Pin` demands.
            unsafe { future.as_mut() }.clear();
        }
    }
}

/// A number of this thread, unique while the thread lives, and not 0.
fn this_thread() -> usize {
    thread_local! {
        static HERE: u8 = const { 0 };
    }
    // Without its locals the thread is ending, and polls nothing.
    HERE.try_with(|here| std::ptr::from_ref(here).addr()).unwrap_or(0)
}

/// A future that its handle can drop.
struct DroppableFuture<'m, F> {
    /// `None` once it completed or was dropped by the handle. Accessed under `drop_handle`'s lock
    /// only.
    future: UnsafeCell<Option<F>>,
    drop_handle: &'m DropHandle,
    _pinned: PhantomPinned,
}

impl<'m, F> DroppableFuture<'m, F> {
    fn new(future: F, drop_handle: &'m DropHandle) -> Self {
        Self { future: UnsafeCell::new(Some(future)), drop_handle, _pinned: PhantomPinned }
    }
}

impl<F: Future + Send + 'static> Future for DroppableFuture<'_, F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.as_ref().get_ref();
        let mut place = this.drop_handle.lock();
        // SAFETY: the lock is held; the handle and `drop` access the cell under it only.
        let slot = unsafe { &mut *this.future.get() };
        // Dropped by the handle; the executor sees the cancellation next.
        let Some(future) = slot.as_mut() else { return Poll::Pending };
        // SAFETY: the future lies in a pinned `DroppableFuture`, is never moved out, and is dropped
        // in place.
        let future = unsafe { Pin::new_unchecked(future) };
        this.drop_handle.polled_by.store(this_thread(), Ordering::Relaxed);
        let result = future.poll(cx);
        this.drop_handle.polled_by.store(0, Ordering::Relaxed);
        *place = None;
        if result.is_ready() {
            *slot = None;
        } else {
            *place = NonNull::new(this.future.get() as *mut dyn Clear).map(FuturePtr);
        }
        result
    }
}

impl<F> Drop for DroppableFuture<'_, F> {
    fn drop(&mut self) {
        // Also after a panic of the future: the handle must not use the pointer any more.
        let mut place = self.drop_handle.lock();
        *place = None;
        *self.future.get_mut() = None;
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;
    use std::task::Waker;

    use super::*;

    type Queue = Arc<Mutex<Vec<Runnable>>>;

    /// A task that is polled `polls` times; its future holds a clone of `sign`.
    fn start(queue: &Queue, polls: usize, sign: &Arc<()>) -> Task<usize> {
        let (sign, queue) = (Arc::clone(sign), Arc::clone(queue));
        let mut left = polls;
        let work = async move {
            poll_fn(|cx| {
                left -= 1;
                cx.waker().wake_by_ref();
                if left == 0 { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            Arc::strong_count(&sign)
        };
        let (runnable, task) =
            create_dropped_with_handle(work, move |runnable| queue.lock().unwrap().push(runnable));
        runnable.run();
        task
    }

    fn run_all(queue: &Queue) {
        loop {
            let next = queue.lock().unwrap().pop();
            let Some(runnable) = next else { return };
            runnable.run();
        }
    }

    #[test]
    fn dropping_a_handle_drops_the_future_in_every_state() {
        for polls in 1..4 {
            for ran in 0..polls {
                let (queue, sign) = (Queue::default(), Arc::new(()));
                let task = start(&queue, polls, &sign);
                for _ in 0..ran {
                    let next = queue.lock().unwrap().pop();
                    next.map(Runnable::run);
                }
                drop(task);
                assert_eq!(Arc::strong_count(&sign), 1, "{polls} {ran}");
                // The rest of the task finds nothing to poll.
                run_all(&queue);
            }
        }
    }

    #[test]
    fn a_task_dropped_by_its_executor_leaves_its_handle_nothing_to_drop() {
        let (queue, sign) = (Queue::default(), Arc::new(()));
        let task = start(&queue, 3, &sign);
        queue.lock().unwrap().clear();
        assert_eq!(Arc::strong_count(&sign), 1);
        drop(task);
    }

    #[test]
    fn the_future_is_dropped_before_its_output_is_taken() {
        let (queue, sign) = (Queue::default(), Arc::new(()));
        let mut task = start(&queue, 3, &sign);
        run_all(&queue);
        assert_eq!(Arc::strong_count(&sign), 1);
        let answer = Pin::new(&mut task).poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(answer, Poll::Ready(2));
    }

    #[test]
    fn a_task_runs_to_completion_if_its_handle_detaches_on_drop() {
        let (queue, sign) = (Queue::default(), Arc::new(()));
        drop(start(&queue, 3, &sign).detach_on_drop());
        assert_eq!(Arc::strong_count(&sign), 2, "the future is there");
        run_all(&queue);
        assert_eq!(Arc::strong_count(&sign), 1);

        let mut handle = start(&queue, 3, &sign).detach_on_drop();
        run_all(&queue);
        let output = Pin::new(&mut handle).poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(output, Poll::Ready(2));
    }

    #[test]
    fn a_future_that_panicked_is_dropped_once() {
        let (queue, sign) = (Queue::default(), Arc::new(()));
        let (inside, schedules) = (Arc::clone(&sign), Arc::clone(&queue));
        let work = async move {
            let _inside = inside;
            panic!("on purpose")
        };
        let (runnable, task) = create_dropped_with_handle::<()>(work, move |runnable| {
            schedules.lock().unwrap().push(runnable);
        });
        runnable.run();
        assert_eq!(Arc::strong_count(&sign), 1);
        drop(task);
    }
}
