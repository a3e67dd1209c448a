//! `Buf`: owned, aligned, reference-counted memory.
//!
//! A `Buf` is a counted pointer to a `Region`; the region returns to its pool, or to the allocator,
//! when the last `Buf`, `IoVec` or operation that names it is dropped.
//!
//! Invariant: a region's bytes are always initialised.

use std::alloc::{self, Layout};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use super::pool::SizeClasses;
use super::{IoVec, PAGE_LEN, Segment, raw};

/// One allocation. Reached by raw pointer only; see the module `buf` for why.
#[derive(Debug)]
pub(super) struct Region {
    ptr: NonNull<u8>,
    layout: Layout,
    /// The pool that the memory returns to.
    pool: Weak<SizeClasses>,
}

// SAFETY: a Region owns its memory and hands out nothing but addresses; the code that dereferences
// them (the functions of `raw`) copies bytes and forms no reference. Moving or sharing the struct
// between threads moves or shares three plain values.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives access to no byte without going through `raw`, whose accesses
// are atomic.
unsafe impl Sync for Region {}

impl Region {
    /// Fresh zero bytes. Aborts the process (as `Vec` does) if there is no memory.
    pub(super) fn zeroed(layout: Layout, pool: Weak<SizeClasses>) -> Region {
        if layout.size() == 0 {
            return Region { ptr: NonNull::dangling(), layout, pool };
        }
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc::alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { alloc::handle_alloc_error(layout) };
        Region { ptr, layout, pool }
    }

    /// Memory from a pool: initialised, with old content.
    pub(super) fn reused(idle: Idle, pool: Weak<SizeClasses>) -> Region {
        let idle = std::mem::ManuallyDrop::new(idle);
        Region { ptr: idle.ptr, layout: idle.layout, pool }
    }

    fn from_vec(bytes: Vec<u8>) -> (Region, usize) {
        let mut bytes = std::mem::ManuallyDrop::new(bytes);
        let layout = Layout::array::<u8>(bytes.capacity()).expect("a Vec of this capacity exists");
        let ptr = NonNull::new(bytes.as_mut_ptr()).expect("a Vec's pointer is never null");
        (Region { ptr, layout, pool: Weak::new() }, bytes.len())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let idle = Idle { ptr: self.ptr, layout: self.layout };
        if let Some(pool) = self.pool.upgrade() {
            pool.put(idle);
        }
    }
}

/// Idle memory of a pool; freed when dropped.
#[derive(Debug)]
pub(super) struct Idle {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: sole owner of an allocation that any thread may free.
unsafe impl Send for Idle {}
// SAFETY: `&Idle` gives access to two plain values, not to the bytes.
unsafe impl Sync for Idle {}

impl Idle {
    pub(super) fn len(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        if self.layout.size() > 0 {
            // SAFETY: `ptr` came from the global allocator with this layout (`zeroed`, or a
            // Vec<u8>, whose layout is an array of its capacity) and the one owner frees it once.
            unsafe { alloc::dealloc(self.ptr.as_ptr(), self.layout) }
        }
    }
}

/// An owned, aligned region of memory. Cheap to clone: clones denote the same bytes.
#[derive(Clone, Debug)]
pub struct Buf {
    region: Arc<Region>,
    len: usize,
}

impl Buf {
    /// `len` zero bytes at an address that is a multiple of `align` (a power of two).
    ///
    /// Panics if `align` is no power of two or `len` rounded up to it overflows `isize`: check
    /// sizes that come from an image before asking for memory.
    pub fn zeroed(len: usize, align: usize) -> Buf {
        let layout =
            Layout::from_size_align(len, align).expect("length and alignment were checked");
        Buf::of(Region::zeroed(layout, Weak::new()), len)
    }

    /// A copy of `bytes`, aligned to 4096.
    pub fn from_slice(bytes: &[u8]) -> Buf {
        let mut buf = Buf::zeroed(bytes.len(), PAGE_LEN);
        buf.get_mut().expect("it has no clone yet").copy_from_slice(bytes);
        buf
    }

    pub(super) fn of(region: Region, len: usize) -> Buf {
        debug_assert!(len <= region.layout.size());
        Buf { region: Arc::new(region), len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, if this is the sole owner: no clone, `IoVec` or operation in flight can reach
    /// them.
    pub fn get_mut(&mut self) -> Option<&mut [u8]> {
        let region = Arc::get_mut(&mut self.region)?;
        // SAFETY: the region has at least `len` initialised bytes (`of`, and regions are born
        // zeroed, from a Vec's initialised part, or reused). `Arc::get_mut` shows that no clone and
        // no segment exists, and the borrow of `self` keeps it so while the slice lives.
        Some(unsafe { std::slice::from_raw_parts_mut(region.ptr.as_ptr(), self.len) })
    }

    /// Copies bytes out, starting at `offset`; fills `out` completely. Panics if out of range.
    pub fn copy_to(&self, offset: usize, out: &mut [u8]) {
        let at = self.at(offset..offset + out.len());
        // SAFETY: `at` checked that the range lies in the region, which lives as long as `self`;
        // `out` is exclusive, so it is not part of the region (slices of it exist only under
        // `get_mut`'s borrow).
        unsafe { raw::read(at, out) }
    }

    /// Copies bytes in, starting at `offset`. Panics if out of range.
    pub fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let at = self.at(offset..offset + bytes.len());
        // SAFETY: `at` checked that the range lies in the region, which lives as long as `self`.
        unsafe { raw::write(at, bytes) }
    }

    /// The whole region as a scatter list.
    pub fn iov(&self) -> IoVec {
        self.slice(0..self.len)
    }

    /// A part of the region as a scatter list. Panics if out of range.
    pub fn slice(&self, range: Range<usize>) -> IoVec {
        let at = self.at(range.clone());
        // SAFETY: `at` checked that the range lies in the region; the anchor is the region's owner.
        IoVec::from(unsafe { Segment::new(self.region.clone(), at, range.len()) })
    }

    /// Address of the range's first byte. Panics if the range does not lie in the buffer.
    fn at(&self, range: Range<usize>) -> *mut u8 {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} outside a buffer of {} bytes",
            self.len
        );
        // SAFETY: start <= len <= the allocation's size, so the address stays inside (or one past)
        // it.
        unsafe { self.region.ptr.as_ptr().add(range.start) }
    }
}

impl From<Vec<u8>> for Buf {
    /// Takes the vector's memory as it is, without copying; aligned to 1.
    fn from(bytes: Vec<u8>) -> Buf {
        let (region, len) = Region::from_vec(bytes);
        Buf::of(region, len)
    }
}

#[cfg(test)]
mod tests {
    use super::Buf;

    #[test]
    fn get_mut_needs_a_sole_owner() {
        let mut buf = Buf::zeroed(10, 8);
        assert!(buf.get_mut().is_some());
        let iov = buf.slice(3..3);
        assert!(buf.get_mut().is_some(), "an empty list names no memory");
        let clone = buf.clone();
        assert!(buf.get_mut().is_none());
        drop(clone);
        let part = buf.slice(1..2);
        assert!(buf.get_mut().is_none());
        drop((part, iov));
        assert!(buf.get_mut().is_some());
    }

    #[test]
    fn alignment_is_kept() {
        for align in [1, 512, 4096, 1 << 16] {
            let buf = Buf::zeroed(100, align);
            assert_eq!(buf.iov().segments()[0].as_ptr() as usize % align, 0);
        }
        assert_eq!(Buf::from_slice(&[1]).iov().segments()[0].as_ptr() as usize % 4096, 0);
    }

    #[test]
    fn empty_buffers_work() {
        let mut buf = Buf::zeroed(0, 4096);
        assert!(buf.is_empty() && buf.iov().is_empty());
        assert_eq!(buf.get_mut(), Some(&mut [][..]));
        assert!(Buf::from(Vec::new()).is_empty());
    }

    #[test]
    #[should_panic(expected = "outside a buffer")]
    fn slice_outside_panics() {
        Buf::zeroed(10, 1).slice(4..11);
    }
}
