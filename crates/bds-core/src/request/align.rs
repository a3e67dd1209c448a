//! Widens a request to the alignment of the node below.
//!
//! A guest may ask for any byte range; a disk moves whole blocks. This module finds the blocks that
//! cover a request and makes the buffers for the bytes around it. Arithmetic and buffers only;
//! `block_io` does the reads.
//!
//! Invariant: the outer range contains the request and is less than two blocks longer.

use std::ops::Range;

use bds_io::{Buf, IoVec};

use super::range::{round_down, round_up};

/// A request widened to whole blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Padded {
    /// What is sent down; aligned at both ends.
    pub(super) outer: Range<u64>,
    /// Bytes of the first block that lie in front of the request.
    pub(super) head_len: usize,
    /// Bytes of the last block that lie behind the request.
    pub(super) tail_len: usize,
    align: usize,
}

impl Padded {
    /// `None` if the range is aligned already. The range is sane and not empty, `align` a power of
    /// two.
    #[inline]
    pub(super) fn new(range: &Range<u64>, align: u32) -> Option<Self> {
        let block = u64::from(align);
        if (range.start | range.end) & (block - 1) == 0 {
            return None;
        }
        let outer = round_down(range.start, block)..round_up(range.end, block);
        // Both are smaller than a block, and a block is at most 1 GiB.
        let small = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Some(Self {
            head_len: small(range.start - outer.start),
            tail_len: small(outer.end - range.end),
            outer,
            align: small(block),
        })
    }

    /// The blocks that a write must read first, as ranges of the node: one read if they touch.
    pub(super) fn reads(&self) -> impl Iterator<Item = Range<u64>> {
        let block = self.align as u64;
        let first = self.outer.start..self.outer.start + block;
        let last = self.outer.end - block..self.outer.end;
        let touching = last.start <= first.end;
        let (one, two) = match (self.head_len > 0, self.tail_len > 0) {
            (true, true) if touching => (Some(first.start..last.end), None),
            (true, true) => (Some(first), Some(last)),
            (true, false) => (Some(first), None),
            (false, _) => (Some(last), None),
        };
        one.into_iter().chain(two)
    }

    /// One buffer for all bytes around the request.
    pub(super) fn buffer(&self, memory_align: u32) -> PadBuf {
        let outer_len = self.outer.end - self.outer.start;
        let blocks = usize::try_from(outer_len).map_or(2, |len| (len / self.align).min(2));
        PadBuf { buf: Buf::zeroed(blocks * self.align, (memory_align as usize).max(512)) }
    }

    /// The part of the buffer that `read` (one of [`Padded::reads`]) fills.
    pub(super) fn place(&self, pad: &PadBuf, read: &Range<u64>) -> IoVec {
        let start = if read.start == self.outer.start { 0 } else { pad.buf.len() - self.align };
        // A read is one or two blocks, as is the buffer.
        let len = usize::try_from(read.end - read.start).unwrap_or(usize::MAX);
        pad.buf.slice(start..start + len)
    }

    /// Joins head, the caller's bytes and tail.
    pub(super) fn join(&self, pad: &PadBuf, data: IoVec) -> IoVec {
        if self.head_len == 0 && self.tail_len == 0 {
            return data;
        }
        let mut joined =
            if self.head_len > 0 { pad.buf.slice(0..self.head_len) } else { IoVec::default() };
        joined.push(data);
        if self.tail_len > 0 {
            joined.push(pad.buf.slice(pad.buf.len() - self.tail_len..pad.buf.len()));
        }
        joined
    }
}

/// What surrounds a request: the first block at the front, the last one at the end; both in one if
/// they are the same.
pub(super) struct PadBuf {
    buf: Buf,
}

impl PadBuf {
    /// A part of the first block.
    pub(super) fn front(&self, range: Range<usize>) -> IoVec {
        self.buf.slice(range)
    }

    /// The last `len` bytes.
    pub(super) fn back(&self, len: usize) -> IoVec {
        self.buf.slice(self.buf.len() - len..self.buf.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_by_table() {
        // range, align: outer, head, tail, reads as (start, end)
        type Case = (Range<u64>, u32, Range<u64>, usize, usize, &'static [(u64, u64)]);
        let table: [Case; 6] = [
            (512..1024, 4096, 0..4096, 512, 3072, &[(0, 4096)]),
            (4000..4200, 4096, 0..8192, 4000, 3992, &[(0, 8192)]),
            (0..4100, 4096, 0..8192, 0, 4092, &[(4096, 8192)]),
            (4095..8192, 4096, 0..8192, 4095, 0, &[(0, 4096)]),
            (1..12287, 4096, 0..12288, 1, 1, &[(0, 4096), (8192, 12288)]),
            (513..514, 512, 512..1024, 1, 510, &[(512, 1024)]),
        ];
        for (range, align, outer, head, tail, reads) in table {
            let padded = Padded::new(&range, align).expect("unaligned");
            assert_eq!((&padded.outer, padded.head_len, padded.tail_len), (&outer, head, tail));
            let found: Vec<(u64, u64)> =
                padded.reads().map(|read| (read.start, read.end)).collect();
            assert_eq!(found, reads, "{range:?}");
        }
        assert_eq!(Padded::new(&(0..8192), 4096), None);
        assert_eq!(Padded::new(&(3..4), 1), None);
    }
}
