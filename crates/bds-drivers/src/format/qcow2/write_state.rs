//! Whether an open image may be written: opened for writing, in use by this process, and prepared
//! for the first write.

use std::sync::atomic::{AtomicBool, Ordering};

use bds_core::error::{Error, ErrorKind, Result};

/// Whether requests may change the image. Changes only while no request is in flight.
#[derive(Debug)]
pub(crate) struct WriteState {
    /// Opened for writing.
    is_writable: AtomicBool,
    /// False: another process is using the bytes.
    is_active: AtomicBool,
    /// Both of these.
    allows_changes: AtomicBool,
    /// Rules O10 and O13 are met as well: guest writes may begin.
    may_write: AtomicBool,
}

impl WriteState {
    pub(crate) fn new(is_writable: bool) -> Self {
        Self {
            is_writable: AtomicBool::new(is_writable),
            is_active: AtomicBool::new(true),
            allows_changes: AtomicBool::new(is_writable),
            may_write: AtomicBool::new(false),
        }
    }

    /// Sets another state. What a writer must do before its first write must be done again.
    pub(crate) fn set(&self, is_writable: bool, is_active: bool) {
        self.may_write.store(false, Ordering::Release);
        self.is_writable.store(is_writable, Ordering::Release);
        self.is_active.store(is_active, Ordering::Release);
        self.allows_changes.store(is_writable && is_active, Ordering::Release);
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.is_writable.load(Ordering::Acquire)
    }

    pub(crate) fn is_active(&self) -> bool {
        self.is_active.load(Ordering::Acquire)
    }

    /// Writable and active.
    #[inline]
    pub(crate) fn allows_changes(&self) -> bool {
        self.allows_changes.load(Ordering::Acquire)
    }

    #[inline]
    pub(crate) fn may_write(&self) -> bool {
        self.may_write.load(Ordering::Acquire)
    }

    pub(crate) fn writes_may_begin(&self) {
        self.may_write.store(true, Ordering::Release);
    }

    /// O10 is not met any more: a bitmap was stored.
    pub(crate) fn writes_must_be_prepared(&self) {
        self.may_write.store(false, Ordering::Release);
    }

    /// An error if changes are not allowed.
    pub(crate) fn check(&self) -> Result<()> {
        if !self.is_active() {
            let message =
                "the image is inactive: another process may be writing to it; activate it first";
            return Err(Error::new(ErrorKind::Inactive, message));
        }
        if !self.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "the image is open read-only"));
        }
        Ok(())
    }
}
