//! Memory that operations point at. Rule: foreign memory is read once; an operation in flight owns an anchor of every segment.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

/// What keeps a segment's memory alive.
pub type Anchor = Arc<dyn Any + Send + Sync>;

/// An owned, aligned region of memory. Cheap to clone: clones denote the same bytes.
#[derive(Clone, Debug)]
pub struct Buf {
    _p: (),
}

impl Buf {
    /// `len` zero bytes at an address that is a multiple of `align` (a power of two).
    pub fn zeroed(len: usize, align: usize) -> Buf {
        let _ = (len, align);
        todo!()
    }
    /// A copy of `bytes`, aligned to 4096.
    pub fn from_slice(bytes: &[u8]) -> Buf {
        let _ = bytes;
        todo!()
    }
    /// Length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The bytes, if nobody else (clone, `IoVec`, operation in flight) can reach them now.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        todo!()
    }
    /// The whole region as a scatter list.
    pub fn iov(&self) -> IoVec {
        todo!()
    }
    /// A part of the region as a scatter list.
    pub fn slice(&self, range: Range<usize>) -> IoVec {
        let _ = range;
        todo!()
    }
}

/// Reuses buffers of one size class under a budget in bytes.
#[derive(Clone, Debug)]
pub struct BufPool {
    _p: (),
}

impl BufPool {
    /// A pool that keeps at most `budget_bytes` of idle memory.
    pub fn new(budget_bytes: usize) -> BufPool {
        let _ = budget_bytes;
        todo!()
    }
    /// A buffer of at least `len` bytes (content undefined but initialised), aligned to 4096; it returns to the pool when its last user is gone.
    pub fn take(&self, len: usize) -> Buf {
        let _ = len;
        todo!()
    }
}

/// One piece of a scatter list.
#[derive(Clone)]
pub struct Segment {
    #[allow(dead_code)]
    anchor: Anchor,
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Address of the first byte (valid while the segment lives).
    pub fn as_ptr(&self) -> *mut u8 {
        todo!()
    }
}

/// A scatter list whose segments keep their memory alive. Clone, slice and split are cheap and copy no data.
#[derive(Clone, Default)]
pub struct IoVec {
    segs: SmallVec<[Segment; 1]>,
}

impl std::fmt::Debug for IoVec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoVec({} segments)", self.segs.len())
    }
}

impl IoVec {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The pieces in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segs
    }
    /// The bytes `range` of this list, sharing memory. Panics if out of range (caller's arithmetic).
    pub fn slice(&self, range: Range<usize>) -> IoVec {
        let _ = range;
        todo!()
    }
    /// Appends another list.
    pub fn push(&mut self, tail: IoVec) {
        let _ = tail;
        todo!()
    }
    /// Copies bytes out, starting at `offset` of the list; fills `out` completely.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) {
        let _ = (offset, out);
        todo!()
    }
    /// Copies bytes in, starting at `offset` of the list.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let _ = (offset, bytes);
        todo!()
    }
    /// Copies all of `src` to `offset` of this list.
    pub fn copy_from_iov(&self, offset: usize, src: &IoVec) {
        let _ = (offset, src);
        todo!()
    }
    /// Sets `range` to `byte`.
    pub fn fill(&self, range: Range<usize>, byte: u8) {
        let _ = (range, byte);
        todo!()
    }
    /// True if every byte of `range` was zero when looked at.
    pub fn is_zero(&self, range: Range<usize>) -> bool {
        let _ = range;
        todo!()
    }
}

impl From<Vec<u8>> for IoVec {
    fn from(v: Vec<u8>) -> IoVec {
        let _ = v;
        todo!()
    }
}
