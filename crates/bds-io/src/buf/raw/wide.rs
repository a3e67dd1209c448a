//! Copies by wide moves of x86-64, with the meaning of relaxed atomic bytes; see `raw`.
//!
//! Relaxed atomics in Rust are not joined to wide moves by the compiler (a byte at a time is 20
//! times slower than memcpy at 4 KiB, a word at a time 2.5 times). Assembly is opaque to it, so it
//! may move many bytes at once: here 64 by four SSE registers, which every x86-64 has, and long
//! runs by the string instructions where the processor says that they are fast.
//!
//! Invariant of all kernels: a block is loaded whole before any byte of it is stored. So a copy
//! upwards is right for a target in front of its source, and one downwards for a target behind it.

use std::arch::{asm, is_x86_feature_detected};

/// Bytes of one block: four SSE registers.
const BLOCK_LEN: usize = 64;
/// From this length on the string instructions beat the block loop (measured on Zen 3).
const STRING_LEN_MIN: usize = 1024;
const WORD_LEN: usize = 8;

/// True if `rep movsb` and `rep stosb` are the fast ones. One relaxed load.
fn has_fast_strings() -> bool {
    is_x86_feature_detected!("ermsb")
}

/// Copies from low addresses to high ones.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn copy_up(from: *const u8, to: *mut u8, len: usize) {
    if len >= STRING_LEN_MIN && has_fast_strings() {
        // SAFETY: reads and writes exactly `len` bytes that the caller vouches for, each as a
        // relaxed atomic access would; the direction flag is clear by the ABI.
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags)
            );
        }
        return;
    }
    let blocks_len = len - len % BLOCK_LEN;
    if blocks_len > 0 {
        // SAFETY: `blocks_len` is a multiple of the block, not zero, and within what the caller
        // vouches for.
        unsafe { copy_blocks(from, to, blocks_len) }
    }
    let words_end = len - len % WORD_LEN;
    for at in (blocks_len..words_end).step_by(WORD_LEN) {
        // SAFETY: at + WORD_LEN <= len, valid by the caller's promise.
        unsafe { copy_word(from.add(at), to.add(at)) }
    }
    for at in words_end..len {
        // SAFETY: at < len, valid by the caller's promise.
        unsafe { copy_byte(from.add(at), to.add(at)) }
    }
}

/// Copies from high addresses to low ones.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes.
pub(super) unsafe fn copy_down(from: *const u8, to: *mut u8, len: usize) {
    let words_end = len - len % WORD_LEN;
    for at in (words_end..len).rev() {
        // SAFETY: at < len, valid by the caller's promise.
        unsafe { copy_byte(from.add(at), to.add(at)) }
    }
    for at in (0..words_end).step_by(WORD_LEN).rev() {
        // SAFETY: at + WORD_LEN <= len, valid by the caller's promise.
        unsafe { copy_word(from.add(at), to.add(at)) }
    }
}

/// # Safety
/// `from` must be valid for reads and `to` for writes of `len` bytes, a multiple of the block that
/// is not 0.
unsafe fn copy_blocks(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the loop reads and writes `len` bytes in whole blocks, each byte as a relaxed atomic
    // access would; it ends because `len` is a multiple of the block and not zero.
    unsafe {
        asm!(
            "2:",
            "movdqu {a}, [{from}]",
            "movdqu {b}, [{from} + 16]",
            "movdqu {c}, [{from} + 32]",
            "movdqu {d}, [{from} + 48]",
            "movdqu [{to}], {a}",
            "movdqu [{to} + 16], {b}",
            "movdqu [{to} + 32], {c}",
            "movdqu [{to} + 48], {d}",
            "add {from}, 64",
            "add {to}, 64",
            "sub {len}, 64",
            "jnz 2b",
            from = inout(reg) from => _, to = inout(reg) to => _, len = inout(reg) len => _,
            a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _, d = out(xmm_reg) _,
            options(nostack)
        );
    }
}

/// # Safety
/// `from` must be valid for reads and `to` for writes of eight bytes.
unsafe fn copy_word(from: *const u8, to: *mut u8) {
    // SAFETY: eight bytes by the caller's promise, each as a relaxed atomic access would.
    unsafe {
        asm!(
            "mov {word}, [{from}]",
            "mov [{to}], {word}",
            from = in(reg) from, to = in(reg) to, word = out(reg) _,
            options(nostack, preserves_flags)
        );
    }
}

/// # Safety
/// `from` must be valid for reads and `to` for writes of one byte.
unsafe fn copy_byte(from: *const u8, to: *mut u8) {
    // SAFETY: one byte by the caller's promise, as a relaxed atomic access would.
    unsafe {
        asm!(
            "mov {byte}, [{from}]",
            "mov [{to}], {byte}",
            from = in(reg) from, to = in(reg) to, byte = out(reg_byte) _,
            options(nostack, preserves_flags)
        );
    }
}

/// Sets `len` bytes to `byte`.
///
/// # Safety
/// `to` must be valid for writes of `len` bytes.
pub(super) unsafe fn fill(to: *mut u8, byte: u8, len: usize) {
    if len >= STRING_LEN_MIN && has_fast_strings() {
        // SAFETY: writes exactly `len` bytes that the caller vouches for, each as a relaxed atomic
        // access would; the direction flag is clear by the ABI.
        unsafe {
            asm!(
                "rep stosb",
                inout("rcx") len => _, inout("rdi") to => _, in("al") byte,
                options(nostack, preserves_flags)
            );
        }
        return;
    }
    let word = u64::from(byte) * (u64::MAX / 0xff);
    let blocks_len = len - len % BLOCK_LEN;
    if blocks_len > 0 {
        // SAFETY: `blocks_len` is a multiple of the block, not zero, and within what the caller
        // vouches for.
        unsafe { fill_blocks(to, word, blocks_len) }
    }
    let words_end = len - len % WORD_LEN;
    for at in (blocks_len..words_end).step_by(WORD_LEN) {
        // SAFETY: at + WORD_LEN <= len, valid by the caller's promise; each byte as a relaxed
        // atomic access.
        unsafe {
            asm!(
                "mov [{to}], {word}",
                to = in(reg) to.add(at), word = in(reg) word,
                options(nostack, preserves_flags)
            );
        }
    }
    for at in words_end..len {
        // SAFETY: at < len, valid by the caller's promise; one byte, as a relaxed atomic access.
        unsafe {
            asm!(
                "mov [{to}], {byte}",
                to = in(reg) to.add(at), byte = in(reg_byte) byte,
                options(nostack, preserves_flags)
            );
        }
    }
}

/// # Safety
/// `to` must be valid for writes of `len` bytes, a multiple of the block that is not 0.
unsafe fn fill_blocks(to: *mut u8, word: u64, len: usize) {
    // SAFETY: the loop writes `len` bytes in whole blocks, each byte as a relaxed atomic access
    // would; it ends because `len` is a multiple of the block and not zero.
    unsafe {
        asm!(
            "movq {a}, {word}",
            "punpcklqdq {a}, {a}",
            "2:",
            "movdqu [{to}], {a}",
            "movdqu [{to} + 16], {a}",
            "movdqu [{to} + 32], {a}",
            "movdqu [{to} + 48], {a}",
            "add {to}, 64",
            "sub {len}, 64",
            "jnz 2b",
            to = inout(reg) to => _, len = inout(reg) len => _, word = in(reg) word,
            a = out(xmm_reg) _,
            options(nostack)
        );
    }
}

/// Bytes examined before an early exit is possible: two cache lines.
const STRIDE_LEN: usize = 128;

/// True if all of `len` bytes were zero when they were read.
///
/// # Safety
/// `from` must be valid for reads of `len` bytes.
pub(super) unsafe fn is_zero(from: *const u8, len: usize) -> bool {
    let strides_len = len - len % STRIDE_LEN;
    if strides_len > 0 {
        // SAFETY: `strides_len` is a multiple of the stride, not zero, and within what the caller
        // vouches for.
        if !unsafe { are_strides_zero(from, strides_len) } {
            return false;
        }
    }
    let words_end = len - len % WORD_LEN;
    let mut seen = 0;
    for at in (strides_len..words_end).step_by(WORD_LEN) {
        let word: u64;
        // SAFETY: at + WORD_LEN <= len, valid by the caller's promise; each byte as a relaxed
        // atomic access.
        unsafe {
            asm!(
                "mov {word}, [{from}]",
                from = in(reg) from.add(at), word = out(reg) word,
                options(nostack, preserves_flags, readonly)
            );
        }
        seen |= word;
    }
    for at in words_end..len {
        let byte: u8;
        // SAFETY: at < len, valid by the caller's promise; one byte, as a relaxed atomic access.
        unsafe {
            asm!(
                "mov {byte}, [{from}]",
                from = in(reg) from.add(at), byte = out(reg_byte) byte,
                options(nostack, preserves_flags, readonly)
            );
        }
        seen |= u64::from(byte);
    }
    seen == 0
}

/// # Safety
/// `from` must be valid for reads of `len` bytes, a multiple of the stride that is not 0.
unsafe fn are_strides_zero(from: *const u8, len: usize) -> bool {
    let left: usize;
    // SAFETY: the loop reads at most `len` bytes in whole strides, each byte as a relaxed atomic
    // access would; it ends because `len` is a multiple of the stride and not zero.
    unsafe {
        asm!(
            "pxor {zero}, {zero}",
            "2:",
            "movdqu {a}, [{from}]",
            "movdqu {b}, [{from} + 16]",
            "movdqu {c}, [{from} + 32]",
            "movdqu {d}, [{from} + 48]",
            "movdqu {e}, [{from} + 64]",
            "movdqu {f}, [{from} + 80]",
            "por {a}, {e}",
            "por {b}, {f}",
            "movdqu {e}, [{from} + 96]",
            "movdqu {f}, [{from} + 112]",
            "por {c}, {e}",
            "por {d}, {f}",
            "por {a}, {b}",
            "por {c}, {d}",
            "por {a}, {c}",
            "pcmpeqb {a}, {zero}",
            "pmovmskb {mask:e}, {a}",
            "cmp {mask:e}, 0xffff",
            "jne 3f",
            "add {from}, 128",
            "sub {len}, 128",
            "jnz 2b",
            "3:",
            from = inout(reg) from => _, len = inout(reg) len => left, mask = out(reg) _,
            zero = out(xmm_reg) _, a = out(xmm_reg) _, b = out(xmm_reg) _, c = out(xmm_reg) _,
            d = out(xmm_reg) _, e = out(xmm_reg) _, f = out(xmm_reg) _,
            options(nostack, readonly)
        );
    }
    left == 0
}
