//! Re-exports the synchronisation primitives of this crate: std's, or loom's under `--cfg loom`.
//!
//! Nothing else in `src` names `std::sync` for state that threads share, so the loom tests explore
//! the same code that ships. Holder records and wakers are plain data behind these locks and stay
//! with std.

#[cfg(loom)]
pub(crate) use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc,
    atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering},
};

#[cfg(loom)]
use loom::sync as imp;
#[cfg(not(loom))]
use std::sync as imp;

use std::sync::PoisonError;

#[cfg(not(loom))]
pub(crate) use std::hint::spin_loop;

/// A pause between two attempts that cannot fail for ever, so that loom needs no yield here.
#[cfg(loom)]
pub(crate) fn spin_loop() {}

/// `std::cell::UnsafeCell` in loom's shape: access through closures that get a raw pointer.
#[cfg(not(loom))]
pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    #[inline(always)]
    pub(crate) fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        f(self.0.get())
    }

    #[inline(always)]
    pub(crate) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

/// A mutex that ignores poison: our critical sections leave the data consistent at each point where
/// they could panic (an allocation failing), and no `unsafe` argument leans on a lock's poison
/// state.
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> imp::MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
