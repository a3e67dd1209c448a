//! Copies between shared memory and private memory: the only module that dereferences a segment.
//!
//! Shared memory may be written by another party at the same moment. As in every VMM, such a race
//! gives unspecified bytes, which is why results are copies that are examined afterwards and never
//! references: no `&[u8]`, no `&mut [u8]` to shared memory is ever formed here.
//!
//! **Memory model.** Clones of a `Buf` may be read and written by several threads through safe
//! code, so no access here may be an ordinary one: a race of ordinary accesses is undefined
//! behaviour. Every access to shared memory is a relaxed atomic access of single bytes, in one of
//! two forms with the same meaning:
//! - `bytes`: `AtomicU8`, in Rust. What Miri and the sanitizers see (`--cfg bds_byte_copies`), and
//!   other processors than x86-64.
//! - `wide` (x86-64): inline assembly that moves up to 64 bytes at once. The compiler must assume
//!   of it what it must assume of the first form; the processor gives at least relaxed order for
//!   each byte.
//!
//! All sizes are single bytes because racing atomic accesses of different sizes are undefined as
//! well. What is outside this model: a virtual machine and the kernel, which access the same memory
//! during an operation. The compiler sees neither; they behave as one more thread that makes
//! relaxed byte accesses.
//!
//! Order between threads does not come from here but from what passed the buffer on (a completion,
//! a lock, a channel, the count of its `Arc`).

#[cfg(any(test, not(target_arch = "x86_64"), miri, bds_byte_copies))]
mod bytes;
#[cfg(all(target_arch = "x86_64", not(miri), not(bds_byte_copies)))]
mod wide;

#[cfg(any(not(target_arch = "x86_64"), miri, bds_byte_copies))]
use bytes as form;
#[cfg(all(target_arch = "x86_64", not(miri), not(bds_byte_copies)))]
use wide as form;

/// Copies `out.len()` bytes from `from`.
///
/// # Safety
/// `from` must be valid for reads of `out.len()` bytes and must not overlap `out`.
pub(super) unsafe fn read(from: *const u8, out: &mut [u8]) {
    // SAFETY: the source by the caller's promise, the target because it is a live, exclusive slice.
    unsafe { form::copy_up(from, out.as_mut_ptr(), out.len()) }
}

/// Copies `bytes` to `to`.
///
/// # Safety
/// `to` must be valid for writes of `bytes.len()` bytes.
pub(super) unsafe fn write(to: *mut u8, bytes: &[u8]) {
    // SAFETY: the target by the caller's promise, the source because it is a live slice. Overlap is
    // allowed, so a caller's slice that is itself a view of foreign memory does no harm.
    unsafe { transfer(bytes.as_ptr(), to, bytes.len()) }
}

/// Copies `len` bytes between two pieces of shared memory, which may overlap.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn transfer(from: *const u8, to: *mut u8, len: usize) {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // The target begins in front of the source or behind its end: upwards, no byte is
        // overwritten before it was read. SAFETY: both by the caller's promise.
        unsafe { form::copy_up(from, to, len) }
    } else {
        // SAFETY: both by the caller's promise.
        unsafe { form::copy_down(from, to, len) }
    }
}

/// Sets `len` bytes to `byte`.
///
/// # Safety
/// `to` must be valid for writes of `len` bytes.
pub(super) unsafe fn fill(to: *mut u8, byte: u8, len: usize) {
    // SAFETY: by the caller's promise.
    unsafe { form::fill(to, byte, len) }
}

/// True if all of `len` bytes were zero when they were read.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes.
pub(super) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    // SAFETY: by the caller's promise.
    unsafe { form::is_zero(from, len) }
}

#[cfg(test)]
mod tests;
