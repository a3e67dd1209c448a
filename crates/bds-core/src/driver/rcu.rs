//! RCU cell for drivers: holds what requests read while a reopen exchanges it (children,
//! descriptors, options).
//!
//! A type of the contract, so that drivers do not depend on `bds_refcount`, which implements it.

use std::fmt;
use std::ops::Deref;

/// A value that many threads read at once and that is exchanged seldom. Reading is one atomic add
/// and takes no lock.
pub struct RcuCell<V>(bds_refcount::RcuCell<V>);

impl<V> RcuCell<V> {
    /// A cell with its first value.
    pub fn new(value: V) -> Self {
        Self(bds_refcount::RcuCell::new(value))
    }

    /// The present value. It stays valid as long as the guard lives, also if it is replaced
    /// meanwhile.
    #[inline]
    pub fn read(&self) -> RcuGuard<'_, V> {
        RcuGuard(self.0.read())
    }

    /// Replaces the value. The old one is dropped when its last reader has left, or at once if
    /// there is none.
    pub fn replace(&self, value: V) {
        self.0.replace(value);
    }

    /// The value. The caller owns the cell, so there are no readers.
    pub fn into_inner(self) -> V {
        self.0.into_inner()
    }
}

impl<V: fmt::Debug> fmt::Debug for RcuCell<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A value read from an [`RcuCell`].
pub struct RcuGuard<'a, V>(bds_refcount::RcuGuard<'a, V>);

impl<V> Deref for RcuGuard<'_, V> {
    type Target = V;

    #[inline]
    fn deref(&self) -> &V {
        &self.0
    }
}

impl<V: fmt::Debug> fmt::Debug for RcuGuard<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
