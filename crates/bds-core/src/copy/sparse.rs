//! Finding zeros in data that was read.
//!
//! Looked for in grains aligned in the target, so that what becomes a hole can be one. The buffer is ours: nobody
//! changes it between the look and the write.

use std::ops::Range;

use bds_io::IoVec;

use super::GRAIN;

/// Part of a buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// All of it is zeros.
    pub(super) is_zero: bool,
    /// Bytes of the buffer.
    pub(super) range: Range<usize>,
}

/// Cuts a buffer that goes to `target_offset` into parts of zeros, each at least `sparse_len` bytes (or the whole
/// buffer), and parts of data.
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

/// Zeros too short to be worth a hole of their own go with the data beside them.
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
        // which grains are zero, first grain's offset in the target, sparse_len: parts as (zero?, grains)
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
    fn grains_are_aligned_in_the_target() {
        let mut bytes = vec![0; 2 * GRAIN];
        bytes[0] = 1;
        let found = parts(&IoVec::from(bytes), 1024, 4096);
        let data = Part { is_zero: false, range: 0..3072 };
        assert_eq!(found, [data, Part { is_zero: true, range: 3072..8192 }]);
    }
}
