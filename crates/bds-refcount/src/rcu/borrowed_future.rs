//! `BorrowedFuture`: a future that borrows from a counted object and can outlive its caller.
//!
//! A driver's operation borrows from the node through the reference of its caller, which costs
//! nothing. If the caller is dropped before the operation is done, [`BorrowedFuture::keep`] takes a
//! reference of its own, and the same future goes on with that.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::strong::Strong;

/// A boxed future that may move between threads.
type Boxed<'a, R> = Pin<Box<dyn Future<Output = R> + Send + 'a>>;

/// A future that borrows from an object through the reference of its caller.
#[must_use = "futures do nothing unless polled"]
pub struct BorrowedFuture<'a, T: 'static, R: 'static> {
    /// Made from `**owner`, and borrows from nothing else.
    future: Boxed<'a, R>,
    owner: &'a Strong<T>,
}

/// A future that borrows from an object, with a reference of its own to it.
#[must_use = "futures do nothing unless polled"]
pub struct OwnedFuture<T: 'static, R: 'static> {
    /// Before `_owner`: dropped in this order. Its lifetime is false, so it is never handed out.
    future: Boxed<'static, R>,
    _owner: Strong<T>,
}

impl<'a, T: 'static, R: 'static> BorrowedFuture<'a, T, R> {
    /// Begins work on the object. `begin` takes a borrow of any length, so its future borrows from
    /// the object alone.
    #[inline]
    pub fn new(
        owner: &'a Strong<T>,
        begin: impl for<'t> FnOnce(&'t T) -> Pin<Box<dyn Future<Output = R> + Send + 't>>,
    ) -> Self {
        Self { future: begin(&**owner), owner }
    }

    /// Gives the future a reference of its own, which it drops when it is dropped.
    pub fn keep(self) -> OwnedFuture<T, R> {
        let owner = self.owner.clone();
        // SAFETY: only the lifetime changes. The future was made by `begin` from `&T`, for every
        // lifetime of that borrow; `T` and `R` are `'static`, so all that can end before `'static`
        // in it are borrows of the object. The object neither moves nor ends nor is borrowed
        // mutably while there is a reference to it (`slot` says why), and the clone is one: it is
        // stored beside the future, never given away, and dropped after it.
        let future = unsafe { std::mem::transmute::<Boxed<'a, R>, Boxed<'static, R>>(self.future) };
        OwnedFuture { future, _owner: owner }
    }
}

impl<T: 'static, R: 'static> Future for BorrowedFuture<'_, T, R> {
    type Output = R;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        self.future.as_mut().poll(cx)
    }
}

impl<T: 'static, R: 'static> Future for OwnedFuture<T, R> {
    type Output = R;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        self.future.as_mut().poll(cx)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::future::poll_fn;
    use std::sync::Mutex;
    use std::task::Waker;

    use super::*;
    use crate::{Arena, Kind};

    fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
        Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
    }

    fn note(seen: &Mutex<Vec<&'static str>>, event: &'static str) {
        seen.lock().expect("no holder panics").push(event);
    }

    /// Looks at the object in every poll and once more when it is dropped.
    fn work<'a>(seen: &'a Mutex<Vec<&'static str>>) -> Boxed<'a, usize> {
        struct Last<'a>(&'a Mutex<Vec<&'static str>>);
        impl Drop for Last<'_> {
            fn drop(&mut self) {
                note(self.0, "dropped");
            }
        }
        Box::pin(async move {
            let last = Last(seen);
            let mut turns = 0;
            poll_fn(|_| {
                note(last.0, "polled");
                turns += 1;
                if turns == 2 { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            turns
        })
    }

    #[test]
    fn an_owned_future_continues_and_holds_the_object_until_it_is_dropped() {
        let arena = Arena::new(Kind::new(1));
        let strong = arena.insert(Mutex::new(Vec::new())).unwrap();
        let mut future = BorrowedFuture::new(&strong, |seen| work(seen));
        assert_eq!(poll(&mut future), Poll::Pending);
        let mut kept = future.keep();
        drop(strong);
        assert_eq!(poll(&mut kept), Poll::Ready(2));
        assert!(!arena.has_dead());
        drop(kept);
        let (_, dead) = arena.reap_one().unwrap();
        assert_eq!(*dead.lock().unwrap(), ["polled", "polled", "dropped"]);
    }

    #[test]
    fn an_owned_future_that_is_dropped_early_still_has_its_object() {
        let arena = Arena::new(Kind::new(1));
        let strong = arena.insert(Mutex::new(Vec::new())).unwrap();
        let mut future = BorrowedFuture::new(&strong, |seen| work(seen));
        assert_eq!(poll(&mut future), Poll::Pending);
        let kept = future.keep();
        drop(strong);
        drop(kept);
        let (_, dead) = arena.reap_one().unwrap();
        assert_eq!(*dead.lock().unwrap(), ["polled", "dropped"]);
    }

    #[test]
    fn a_borrowed_future_takes_no_reference() {
        let arena = Arena::new(Kind::new(1));
        let strong = arena.insert(Mutex::new(Vec::new())).unwrap();
        let future = BorrowedFuture::new(&strong, |seen| work(seen));
        assert_eq!(strong.count(), 1);
        drop(future);
    }
}
