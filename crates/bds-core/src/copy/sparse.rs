//! Finds zeros, and differences from old contents, in data that was read.
//!
//! In grains aligned in the target, so that the target can make holes of them. The buffer belongs
//! to the worker, so it does not change between the comparison and the write.

use std::ops::Range;

use bds_io::IoVec;

use super::options::GRAIN;

/// Part of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// All of it is zeros.
    pub(super) is_zero: bool,
    /// Bytes of the buffer.
    pub(super) range: Range<usize>,
}

/// Cuts a buffer that goes to `target_offset` into parts of zeros, each at least `sparse_len` bytes
/// (or the whole buffer), and parts of data.
pub(super) fn parts(iov: &IoVec, target_offset: u64, sparse_len: u64) -> Vec<Part> {
    let len = iov.len();
    let sparse_len = usize::try_from(sparse_len).unwrap_or(usize::MAX);
    if sparse_len == 0 {
        return vec![Part { is_zero: false, range: 0..len }];
    }
    let mut parts: Vec<Part> = Vec::new();
    let mut at = 0;
    while at < len {
        let into = usize::try_from((target_offset + at as u64) % GRAIN as u64).unwrap_or(0);
        let end = len.min(at + GRAIN - into);
        let is_zero = iov.is_zero(at..end);
        match parts.last_mut() {
            Some(last) if last.is_zero == is_zero => last.range.end = end,
            _ => parts.push(Part { is_zero, range: at..end }),
        }
        at = end;
    }
    if parts.len() > 1 { join_short_zeros(parts, sparse_len) } else { parts }
}

/// The parts of `new`, in grains as above, that differ from `old`. Both have the same length.
pub(super) fn differing(new: &IoVec, old: &IoVec, target_offset: u64) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let (mut new_grain, mut old_grain) = ([0; GRAIN], [0; GRAIN]);
    let len = new.len();
    let mut at = 0;
    while at < len {
        let into = usize::try_from((target_offset + at as u64) % GRAIN as u64).unwrap_or(0);
        let end = len.min(at + GRAIN - into);
        new.copy_to(at, &mut new_grain[..end - at]);
        old.copy_to(at, &mut old_grain[..end - at]);
        if new_grain[..end - at] != old_grain[..end - at] {
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => ranges.push(at..end),
            }
        }
        at = end;
    }
    ranges
}

/// Joins zeros that are too short for a hole with the data beside them.
fn join_short_zeros(parts: Vec<Part>, sparse_len: usize) -> Vec<Part> {
    let mut joined: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts {
        let is_zero = part.is_zero && part.range.len() >= sparse_len;
        match joined.last_mut() {
            Some(last) if last.is_zero == is_zero => last.range.end = part.range.end,
            _ => joined.push(Part { is_zero, range: part.range }),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_by_table() {
        // which grains are zero, first grain's offset in the target, sparse_len: parts as (zero?,
        // grains)
        type Case = (&'static [bool], u64, &'static [(bool, usize)]);
        let table: [Case; 6] = [
            (&[true, true, false], 4096, &[(true, 2), (false, 1)]),
            (&[true, false, true, true], 8192, &[(false, 2), (true, 2)]),
            (&[true, true], 1 << 20, &[(true, 2)]),
            (&[true, false, true, false], 8192, &[(false, 4)]),
            (&[false, true, true, true, false], 8192, &[(false, 1), (true, 3), (false, 1)]),
            (&[true, false], 0, &[(false, 2)]),
        ];
        for (zeros, sparse_len, expected) in table {
            let bytes: Vec<u8> =
                zeros.iter().flat_map(|zero| vec![u8::from(!zero); GRAIN]).collect();
            let found: Vec<(bool, usize)> = parts(&IoVec::from(bytes), 0, sparse_len)
                .into_iter()
                .map(|part| (part.is_zero, part.range.len() / GRAIN))
                .collect();
            assert_eq!(found, expected, "{zeros:?} {sparse_len}");
        }
    }

    #[test]
    fn differences_are_found_in_grains() {
        let old = vec![7; 4 * GRAIN];
        let mut new = old.clone();
        new[0] = 1;
        new[GRAIN] = 1;
        new[4 * GRAIN - 1] = 1;
        let (new, old) = (IoVec::from(new), IoVec::from(old));
        assert_eq!(differing(&new, &old, 0), [0..2 * GRAIN, 3 * GRAIN..4 * GRAIN]);
        assert_eq!(differing(&old, &old, 512), Vec::<Range<usize>>::new());
        let tail = GRAIN + (GRAIN - 512)..4 * GRAIN;
        assert_eq!(differing(&new, &old, 512)[0], 0..2 * GRAIN - 512, "grains of the target");
        assert!(tail.contains(&differing(&new, &old, 512)[1].start));
    }

    #[test]
    fn grains_are_aligned_in_the_target() {
        let mut bytes = vec![0; 2 * GRAIN];
        bytes[0] = 1;
        let found = parts(&IoVec::from(bytes), 1024, 4096);
        let data = Part { is_zero: false, range: 0..3072 };
        assert_eq!(found, [data, Part { is_zero: true, range: 3072..8192 }]);
    }
}
