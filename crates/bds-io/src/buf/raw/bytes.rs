//! Copies by relaxed atomic bytes in plain Rust: the reference form of `raw`, see there.

use std::sync::atomic::{AtomicU8, Ordering};

/// # Safety
/// `at` must be valid for an access of one byte.
unsafe fn load(at: *const u8) -> u8 {
    // SAFETY: valid by the caller's promise, every address is aligned for a byte, and all accesses
    // that race with this one are atomic accesses of a byte (the module's rule). Only loaded from,
    // so that a pointer to memory that is only readable will do.
    unsafe { AtomicU8::from_ptr(at.cast_mut()) }.load(Ordering::Relaxed)
}

/// # Safety
/// `at` must be valid for writes of one byte.
unsafe fn store(at: *mut u8, byte: u8) {
    // SAFETY: as in `load`, and writable by the caller's promise.
    unsafe { AtomicU8::from_ptr(at) }.store(byte, Ordering::Relaxed);
}

/// Copies from the lowest byte to the highest.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn copy_up(from: *const u8, to: *mut u8, len: usize) {
    for at in 0..len {
        // SAFETY: at < len, valid by the caller's promise.
        unsafe { store(to.add(at), load(from.add(at))) }
    }
}

/// Copies from the highest byte to the lowest.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn copy_down(from: *const u8, to: *mut u8, len: usize) {
    for at in (0..len).rev() {
        // SAFETY: at < len, valid by the caller's promise.
        unsafe { store(to.add(at), load(from.add(at))) }
    }
}

/// Sets `len` bytes to `byte`.
///
/// # Safety
/// `to` must be valid for writes of `len` bytes.
pub(super) unsafe fn fill(to: *mut u8, byte: u8, len: usize) {
    for at in 0..len {
        // SAFETY: at < len, valid by the caller's promise.
        unsafe { store(to.add(at), byte) }
    }
}

/// True if all of `len` bytes were zero when they were read.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes.
pub(super) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    // SAFETY: at < len, valid by the caller's promise.
    (0..len).all(|at| unsafe { load(from.add(at)) } == 0)
}
