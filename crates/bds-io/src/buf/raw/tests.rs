//! Compares both forms of the copies with plain slices, over lengths, alignments and overlaps.

use super::{bytes, fill, is_zero, read, transfer, write};

/// Lengths around every boundary of the kernels.
const LENS: [usize; 20] =
    [0, 1, 7, 8, 9, 15, 63, 64, 65, 71, 127, 128, 129, 200, 255, 256, 1023, 1024, 1025, 4096];
const SHIFTS: [usize; 6] = [0, 1, 7, 8, 63, 65];

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    let mixed = |at: usize| at.wrapping_mul(31) ^ (at >> 8);
    (0..len).map(|at| u8::try_from(mixed(at) & 0xff).unwrap() ^ seed).collect()
}

#[test]
fn copies_move_exactly_their_bytes() {
    for len in LENS {
        for shift in SHIFTS {
            let source = pattern(len + 200, 3);
            let mut target = vec![0xaa; len + 200];
            let mut expected = target.clone();
            expected[shift..shift + len].copy_from_slice(&source[5..5 + len]);
            // SAFETY: both vectors are longer than any offset plus `len`.
            unsafe { transfer(source.as_ptr().add(5), target.as_mut_ptr().add(shift), len) };
            assert_eq!(target, expected, "transfer of {len} to {shift}");
            let mut out = vec![0; len];
            // SAFETY: the source is longer than shift + len, and `out` is another vector.
            unsafe { read(source.as_ptr().add(shift), &mut out) };
            assert_eq!(out, source[shift..shift + len], "read of {len} at {shift}");
            // SAFETY: the target is longer than shift + len.
            unsafe { write(target.as_mut_ptr().add(shift), &out) };
            expected[shift..shift + len].copy_from_slice(&out);
            assert_eq!(target, expected, "write of {len} to {shift}");
        }
    }
}

#[test]
fn overlapping_copies_are_those_of_a_copy_made_before() {
    for len in LENS {
        for (from, to) in [(0, 1), (1, 0), (0, 8), (8, 0), (3, 67), (67, 3), (0, 16), (70, 70)] {
            let mut memory = pattern(len + 100, 9);
            let mut expected = memory.clone();
            expected.copy_within(from..from + len, to);
            let start = memory.as_mut_ptr();
            // SAFETY: the vector is longer than either offset plus `len`; overlap is allowed.
            unsafe { transfer(start.add(from), start.add(to), len) };
            assert_eq!(memory, expected, "{len} bytes from {from} to {to}");
        }
    }
}

#[test]
fn fill_and_is_zero_see_exactly_their_bytes() {
    for len in LENS {
        for shift in SHIFTS {
            let mut memory = vec![0; len + 200];
            let start = memory.as_mut_ptr();
            for byte in [0x5a, 0xff, 0] {
                // SAFETY: the vector is longer than shift + len.
                unsafe { fill(start.add(shift), byte, len) };
                let is_inside = |at: usize| (shift..shift + len).contains(&at);
                for (at, found) in memory.iter().enumerate() {
                    assert_eq!(*found, if is_inside(at) { byte } else { 0 }, "{len} at {shift}");
                }
            }
            for at in [0, 1, len / 2, len.saturating_sub(1)] {
                // SAFETY: the vector is longer than shift + len + 1.
                let zero = || unsafe { is_zero(memory.as_ptr().add(shift), len) };
                assert!(zero(), "{len} at {shift}");
                memory[shift + at] = 0x80;
                // SAFETY: as above.
                let zero = unsafe { is_zero(memory.as_ptr().add(shift), len) };
                assert_eq!(zero, at >= len, "{len} at {shift} with a byte at {at}");
                memory[shift + at] = 0;
            }
        }
    }
}

/// The reference form does the same; where it is the only one, this compares it with itself.
#[test]
fn the_byte_form_agrees() {
    for len in LENS {
        for (from, to) in [(0, 9), (9, 0)] {
            let mut ours = pattern(len + 100, 1);
            let mut theirs = ours.clone();
            let (a, b) = (ours.as_mut_ptr(), theirs.as_mut_ptr());
            // SAFETY: the vectors are longer than either offset plus `len`.
            unsafe {
                transfer(a.add(from), a.add(to), len);
                match from < to {
                    true => bytes::copy_down(b.add(from), b.add(to), len),
                    false => bytes::copy_up(b.add(from), b.add(to), len),
                }
            }
            assert_eq!(ours, theirs, "{len} bytes from {from} to {to}");
            // SAFETY: as above.
            let zero = unsafe { (is_zero(a, len), bytes::is_zero(b, len)) };
            assert_eq!(zero.0, zero.1);
            // SAFETY: as above.
            unsafe { bytes::fill(b, 0, len) };
            assert!(theirs[..len].iter().all(|byte| *byte == 0));
        }
    }
}
