//! `IoVec`: scatter lists, the memory that an operation reads into or writes from.
//!
//! A list is cheap to clone, cut and join: it copies addresses and counts, never bytes. Guest
//! memory enters through `IoVec::from_raw`, everything else through `Buf`.
//!
//! Invariant: no segment is empty, so an empty list has no segments and names no memory.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use super::{Anchor, Buf, raw};

/// One contiguous piece of a scatter list.
#[derive(Clone)]
pub struct Segment {
    anchor: Anchor,
    ptr: *mut u8,
    len: usize,
}

// SAFETY: the anchor is Send and keeps the memory alive wherever the segment goes; the address
// itself may be used on any thread (`Segment::new`'s contract).
unsafe impl Send for Segment {}
// SAFETY: `&Segment` gives an address and a length; bytes are reached through `raw` only, which
// forms no references and makes atomic accesses only, so that two threads may do it at once.
unsafe impl Sync for Segment {}

impl Segment {
    /// # Safety
    /// While `anchor` lives, `len` bytes at `ptr` must be valid for reads and writes from any
    /// thread, and no reference to them may be used while the segment or a copy of it is.
    pub(super) unsafe fn new(anchor: Anchor, ptr: *mut u8, len: usize) -> Segment {
        Segment { anchor, ptr, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte (valid while the segment lives).
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    fn part(&self, range: Range<usize>) -> Segment {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: start <= len, so the address stays inside (or one past) the memory this segment
        // names.
        let ptr = unsafe { self.ptr.add(range.start) };
        Segment { anchor: self.anchor.clone(), ptr, len: range.len() }
    }

    /// True if `next` is the memory right behind this one, under the same anchor.
    fn is_followed_by(&self, next: &Segment) -> bool {
        Arc::as_ptr(&self.anchor).cast::<u8>() == Arc::as_ptr(&next.anchor).cast::<u8>()
            && self.ptr.wrapping_add(self.len) == next.ptr
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{}", self.ptr, self.len)
    }
}

/// A scatter list whose segments keep their memory alive. Clone, slice and split are cheap and copy
/// no data.
#[derive(Clone, Default)]
pub struct IoVec {
    segs: SmallVec<[Segment; 1]>,
}

impl fmt::Debug for IoVec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoVec({} bytes in {} segments)", self.len(), self.segs.len())
    }
}

impl IoVec {
    /// A list without bytes.
    pub fn new() -> IoVec {
        IoVec::default()
    }

    /// `len` bytes of foreign memory (a guest's) at `ptr`, kept alive by `anchor`.
    ///
    /// # Safety
    /// While `anchor` or a clone of it lives, the bytes must stay mapped, readable and writable,
    /// from any thread. Others (the guest, a device) may change them at any time; Rust references
    /// to them must not be used while the list, a part of it or an operation on it lives.
    pub unsafe fn from_raw(anchor: Anchor, ptr: *mut u8, len: usize) -> IoVec {
        // SAFETY: the caller's promise is the one `Segment::new` asks for.
        IoVec::from(unsafe { Segment::new(anchor, ptr, len) })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.segs.iter().map(Segment::len).sum()
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.segs.is_empty()
    }

    /// The pieces in order. None of them is empty.
    pub fn segments(&self) -> &[Segment] {
        &self.segs
    }

    /// The bytes `range` of this list, sharing memory. Panics if out of range (caller's
    /// arithmetic).
    pub fn slice(&self, range: Range<usize>) -> IoVec {
        let mut part = IoVec::default();
        self.for_pieces(range, |seg, piece, _| part.segs.push(seg.part(piece)));
        part
    }

    /// Cuts the list in two at `at`: keeps the first bytes, returns the rest. Panics if out of
    /// range.
    pub fn split_off(&mut self, at: usize) -> IoVec {
        let tail = self.slice(at..self.len());
        *self = self.slice(0..at);
        tail
    }

    /// Appends another list. Neighbours in memory become one segment.
    pub fn push(&mut self, tail: IoVec) {
        for seg in tail.segs {
            match self.segs.last_mut() {
                Some(last) if last.is_followed_by(&seg) => last.len += seg.len,
                _ => self.segs.push(seg),
            }
        }
    }

    /// Copies bytes out, starting at `offset` of the list; fills `out` completely. Panics if out of
    /// range.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) {
        let range = range_at(offset, out.len());
        self.for_pieces(range, |seg, piece, at| {
            let out = &mut out[at..at + piece.len()];
            // SAFETY: the piece lies in the segment, whose memory is valid while `self` holds its
            // anchor; `out` is exclusive, so nothing of it is shared memory.
            unsafe { raw::read(seg.ptr.add(piece.start), out) }
        });
    }

    /// The bytes `range`, copied. Panics if out of range.
    pub fn to_vec(&self, range: Range<usize>) -> Vec<u8> {
        let mut out = vec![0; range.len()];
        self.copy_to(range.start, &mut out);
        out
    }

    /// Copies bytes in, starting at `offset` of the list. Panics if out of range.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let range = range_at(offset, bytes.len());
        self.for_pieces(range, |seg, piece, at| {
            let bytes = &bytes[at..at + piece.len()];
            // SAFETY: the piece lies in the segment, whose memory is valid while `self` holds its
            // anchor.
            unsafe { raw::write(seg.ptr.add(piece.start), bytes) }
        });
    }

    /// Copies all of `src` to `offset` of this list. Panics if out of range. If the two share
    /// memory at different places, the result is that of copying piece by piece in the order of
    /// `src`.
    pub fn copy_from_iov(&self, offset: usize, src: &IoVec) {
        let mut at = offset;
        for from in &src.segs {
            self.for_pieces(range_at(at, from.len), |to, piece, done| {
                // SAFETY: `done + piece.len() <= from.len` and the piece lies in `to`; both anchors
                // are held by the borrowed lists. Overlap is allowed.
                unsafe {
                    raw::transfer(from.ptr.add(done), to.ptr.add(piece.start), piece.len());
                }
            });
            at += from.len;
        }
    }

    /// Sets `range` to `byte`. Panics if out of range.
    pub fn fill(&self, range: Range<usize>, byte: u8) {
        self.for_pieces(range, |seg, piece, _| {
            // SAFETY: the piece lies in the segment, whose memory is valid while `self` holds its
            // anchor.
            unsafe { raw::fill(seg.ptr.add(piece.start), byte, piece.len()) }
        });
    }

    /// True if every byte of `range` was zero when it was read. Panics if out of range.
    pub fn is_zero(&self, range: Range<usize>) -> bool {
        let mut zero = true;
        self.for_pieces(range, |seg, piece, _| {
            // SAFETY: the piece lies in the segment, whose memory is valid while `self` holds its
            // anchor.
            zero = zero && unsafe { raw::is_zero(seg.ptr.add(piece.start), piece.len()) };
        });
        zero
    }

    /// Calls `visit(segment, part of that segment, its place in the range)` for each piece of
    /// `range`, in order, never with an empty part. Panics if the range does not lie in the list.
    fn for_pieces(
        &self,
        range: Range<usize>,
        mut visit: impl FnMut(&Segment, Range<usize>, usize),
    ) {
        let Range { start, end } = range;
        assert!(start <= end, "range {start}..{end} ends before it begins");
        let mut seg_start = 0;
        for seg in &self.segs {
            let seg_end = seg_start + seg.len;
            let from = start.max(seg_start);
            let to = end.min(seg_end);
            if from < to {
                visit(seg, from - seg_start..to - seg_start, from - start);
            }
            seg_start = seg_end;
            if seg_end >= end {
                return;
            }
        }
        assert!(end <= seg_start, "range {start}..{end} outside a list of {seg_start} bytes");
    }
}

fn range_at(offset: usize, len: usize) -> Range<usize> {
    let end = offset.checked_add(len).expect("the end of a range in memory fits usize");
    offset..end
}

impl From<Segment> for IoVec {
    fn from(seg: Segment) -> IoVec {
        let mut segs = SmallVec::new();
        if seg.len > 0 {
            segs.push(seg);
        }
        IoVec { segs }
    }
}

impl From<Vec<u8>> for IoVec {
    /// Takes the vector's memory as it is, without copying; aligned to 1.
    fn from(bytes: Vec<u8>) -> IoVec {
        Buf::from(bytes).iov()
    }
}

impl From<Buf> for IoVec {
    fn from(buf: Buf) -> IoVec {
        buf.iov()
    }
}

impl FromIterator<IoVec> for IoVec {
    fn from_iter<I: IntoIterator<Item = IoVec>>(lists: I) -> IoVec {
        let mut all = IoVec::default();
        for list in lists {
            all.push(list);
        }
        all
    }
}

#[cfg(test)]
#[path = "iovec_tests.rs"]
mod tests;
