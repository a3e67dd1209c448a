//! Copies between shared memory and our own: the only place that dereferences a segment.
//!
//! Shared memory may be written by another party at the same moment. As in every VMM, such a race gives
//! unspecified bytes, which is why results are copies that are examined afterwards and never references:
//! no `&[u8]`, no `&mut [u8]` to shared memory is ever formed here.

use std::ptr;

/// Copies `out.len()` bytes from `from`.
///
/// # Safety
/// `from` must be valid for reads of `out.len()` bytes and must not overlap `out`.
pub(super) unsafe fn read(from: *const u8, out: &mut [u8]) {
    // SAFETY: the source by the caller's promise, the target because it is a live slice; the slice is
    // exclusive, so the two do not overlap.
    unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
}

/// Copies `bytes` to `to`.
///
/// # Safety
/// `to` must be valid for writes of `bytes.len()` bytes.
pub(super) unsafe fn write(to: *mut u8, bytes: &[u8]) {
    // SAFETY: the target by the caller's promise, the source because it is a live slice. `copy` allows
    // overlap, so a caller's slice that is itself a view of shared memory does no harm.
    unsafe { ptr::copy(bytes.as_ptr(), to, bytes.len()) }
}

/// Copies `len` bytes between two pieces of shared memory, which may overlap.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn transfer(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: both by the caller's promise; `copy` allows overlap.
    unsafe { ptr::copy(from, to, len) }
}

/// Sets `len` bytes to `byte`.
///
/// # Safety
/// `to` must be valid for writes of `len` bytes.
pub(super) unsafe fn fill(to: *mut u8, byte: u8, len: usize) {
    // SAFETY: by the caller's promise.
    unsafe { ptr::write_bytes(to, byte, len) }
}

/// Bytes examined between two chances to leave early: two cache lines.
const STRIDE_LEN: usize = 128;

/// True if all of `len` bytes were zero when looked at.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes.
pub(super) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    let strides_len = len - len % STRIDE_LEN;
    let mut at = 0;
    while at < strides_len {
        let mut seen = 0u64;
        let mut word = 0;
        // A fixed trip count, so that the compiler turns it into vector loads.
        while word < STRIDE_LEN {
            // SAFETY: at + word + 8 <= strides_len <= len, valid by the caller's promise; unaligned reads
            // need no alignment.
            seen |= unsafe { from.add(at + word).cast::<u64>().read_unaligned() };
            word += 8;
        }
        if seen != 0 {
            return false;
        }
        at += STRIDE_LEN;
    }
    while at < len {
        // SAFETY: at < len, valid by the caller's promise.
        if unsafe { from.add(at).read() } != 0 {
            return false;
        }
        at += 1;
    }
    true
}
