//! What C passes as pointers. The only file with unsafe code of this crate.
//!
//! Each type here is one pointer wide and stands for a pointer parameter of an exported function.
//! No safe Rust code can make one out of an address, so a value of such a type carries C's promise,
//! which the header states at the function: what it points to is NULL where that is allowed, or
//! valid, for the length given beside it, until the call returns (for buffers of requests: until
//! the completion). Rust programs, tests among them, make them through [`testing`].
//!
//! C can break its promises; what can be checked is checked: NULL, alignment, overflow of lengths.

use std::ffi::{CStr, OsStr, c_char, c_void};
use std::mem::{MaybeUninit, align_of, size_of};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use bds_io::IoVec;
use bds_io::buf::Anchor;
use libc::iovec;

use crate::abi::bds_status::{BDS_ERR_UTF8, BDS_ERR_VERSION};
use crate::abi::{
    bds_backend, bds_backend_options, bds_change, bds_completion, bds_context, bds_context_options,
    bds_event, bds_extent, bds_guard, bds_iothread, bds_job, bds_job_info, bds_limits, bds_memory,
    bds_node, bds_options, bds_queue, bds_queue_options, bds_request, bds_section,
};
use crate::failure::Failure;

/// Longest IOV array.
const MAX_IOV: u64 = 1024;

/// Plain data: any bytes of this length are a value.
///
/// # Safety
/// The type is `repr(C)` and has neither invalid values nor padding that is read.
#[doc(hidden)]
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ty),*) => {$(
        // SAFETY: integers, arrays of them, raw pointers, and an optional function pointer, whose
        // every value C vouches for; laid out without padding (layout tests).
        unsafe impl Plain for $name {}
    )*};
}

plain!(u64, usize, i32, *mut c_char, *mut c_void);
plain!(bds_context, bds_options, bds_iothread, bds_node, bds_backend, bds_change, bds_section);
plain!(
    bds_queue,
    bds_memory,
    bds_job,
    bds_guard,
    bds_event,
    bds_extent,
    bds_request,
    bds_completion,
    bds_limits,
    bds_job_info
);
plain!(bds_context_options, bds_backend_options, bds_queue_options);

/// A NUL-terminated string, or NULL: `const char *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Text(*const c_char);

impl Text {
    fn c_str(&self) -> Option<&CStr> {
        if self.0.is_null() {
            return None;
        }
        // SAFETY: not NULL, so by C's promise a NUL-terminated string that lasts until the call
        // returns; `self` lives no longer than that.
        Some(unsafe { CStr::from_ptr(self.0) })
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The text; `what` names the parameter.
    pub(crate) fn str(&self, what: &str) -> Result<&str, Failure> {
        self.optional(what)?.ok_or_else(|| Failure::argument(format!("{what} is NULL")))
    }

    /// The text, or `None` for NULL.
    pub(crate) fn optional(&self, what: &str) -> Result<Option<&str>, Failure> {
        let wrong = |_| Failure::new(BDS_ERR_UTF8, format!("{what} is not UTF-8"));
        self.c_str().map(|text| text.to_str().map_err(wrong)).transpose()
    }

    /// A file name: any bytes.
    pub(crate) fn path(&self, what: &str) -> Result<&Path, Failure> {
        let text = self.c_str().ok_or_else(|| Failure::argument(format!("{what} is NULL")))?;
        Ok(Path::new(OsStr::from_bytes(text.to_bytes())))
    }
}

/// Where a result is written: `T *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Refuses NULL and misaligned addresses; `what` names the parameter.
    pub(crate) fn check(self, what: &str) -> Result<Checked<T>, Failure> {
        if self.0.is_null() {
            return Err(Failure::argument(format!("{what} is NULL")));
        }
        if !self.0.is_aligned() {
            return Err(Failure::argument(format!("{what} is misaligned")));
        }
        Ok(Checked(self.0))
    }

    /// As `check`, but NULL is allowed.
    pub(crate) fn check_optional(self, what: &str) -> Result<Option<Checked<T>>, Failure> {
        if self.0.is_null() { Ok(None) } else { self.check(what).map(Some) }
    }
}

/// A place for a result, neither NULL nor misaligned.
#[derive(Clone, Copy)]
pub(crate) struct Checked<T>(*mut T);

impl<T: Plain> Checked<T> {
    /// Writes the result.
    pub(crate) fn set(self, value: T) {
        // SAFETY: by C's promise the place is writable until the call returns; not NULL and aligned
        // by `Out::check`. What was there is plain data and needs no drop.
        unsafe { self.0.write(value) }
    }
}

/// An array in which results are written, or that is read and written back: `T *` and a length.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Array<T>(*mut T);

impl<T: Plain> Array<T> {
    /// The array of `len` elements. An empty one may be NULL.
    pub(crate) fn check(self, len: usize, what: &str) -> Result<Elements<T>, Failure> {
        let bytes = len.checked_mul(size_of::<T>());
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            return Err(Failure::argument(format!("{what}: {len} elements are too many")));
        }
        if len > 0 {
            Out(self.0).check(what)?;
        }
        Ok(Elements { first: self.0, len })
    }
}

/// A checked array of C's.
#[derive(Clone, Copy)]
pub(crate) struct Elements<T> {
    first: *mut T,
    len: usize,
}

impl<T: Plain> Elements<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Copies an element out.
    pub(crate) fn read(&self, index: usize) -> T {
        assert!(index < self.len, "the caller counts to len");
        // SAFETY: inside the array by the assert; readable and of a plain type by C's promise, not
        // NULL and aligned by `Array::check`.
        unsafe { self.first.add(index).read() }
    }

    /// Writes an element.
    pub(crate) fn write(&self, index: usize, value: T) {
        assert!(index < self.len, "the caller counts to len");
        // SAFETY: as in `read`, and writable by C's promise.
        unsafe { self.first.add(index).write(value) }
    }
}

impl Elements<bds_request> {
    /// Writes the id of a request back.
    pub(crate) fn set_request_id(&self, index: usize, id: u64) {
        assert!(index < self.len, "the caller counts to len");
        // SAFETY: as in `write`; the field lies in the element.
        unsafe { (&raw mut (*self.first.add(index)).request_id).write(id) }
    }
}

/// A struct that begins with its size, from C: `const T *`. NULL means the defaults.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct In<T>(*const T);

impl<T: Plain> In<T> {
    /// The struct, with zeros for a tail that an older program does not know. `None` for NULL.
    ///
    /// A longer struct is accepted if its unknown tail is zero.
    pub(crate) fn read(self, what: &str) -> Result<Option<T>, Failure> {
        if self.0.is_null() {
            return Ok(None);
        }
        let from = self.0.cast::<u8>();
        let len = read_size(self.0.cast(), what)?;
        for at in size_of::<T>()..len {
            // SAFETY: by C's promise `struct_size` bytes are readable; `at` is below that.
            if unsafe { from.add(at).read() } != 0 {
                let words = format!("{what}: byte {at} is set, which this version does not know");
                return Err(Failure::new(BDS_ERR_VERSION, words));
            }
        }
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: `len` bytes are readable by C's promise, `value` holds the smaller length,
        // and a local of ours does not overlap what C passed.
        unsafe { value.as_mut_ptr().cast::<u8>().copy_from(from, len.min(size_of::<T>())) };
        // SAFETY: all bytes are initialised, by zeroes or by C's, and every value of a Plain type
        // is valid.
        Ok(Some(unsafe { value.assume_init() }))
    }
}

/// A struct that begins with its size, which the library fills: `T *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct InOut<T>(*mut T);

impl<T: Plain> InOut<T> {
    /// The place to fill.
    pub(crate) fn check(self, what: &str) -> Result<Fill<T>, Failure> {
        Out(self.0).check(what)?;
        let len = read_size(self.0.cast_const().cast(), what)?;
        Ok(Fill { place: self.0, len })
    }
}

/// A checked struct that is filled.
pub(crate) struct Fill<T> {
    place: *mut T,
    len: usize,
}

impl<T: Plain> Fill<T> {
    /// Writes as much of `value` as C's struct has, behind its size, and zeros behind that.
    pub(crate) fn set(self, value: &T) {
        let (to, from) = (self.place.cast::<u8>(), std::ptr::from_ref(value).cast::<u8>());
        let (head, len) = (size_of::<usize>(), self.len.min(size_of::<T>()));
        // SAFETY: C's struct has `self.len` writable bytes and `value` has size_of::<T>(); both
        // ranges lie in them, and C's memory is not ours.
        unsafe { to.add(head).copy_from_nonoverlapping(from.add(head), len - head) };
        // SAFETY: the range ends with C's struct.
        unsafe { to.add(len).write_bytes(0, self.len - len) };
    }
}

/// The size at the beginning of a struct of C's: at least the size itself.
fn read_size(at: *const usize, what: &str) -> Result<usize, Failure> {
    const MAX: usize = 4096;
    if !at.is_aligned() {
        return Err(Failure::argument(format!("{what} is misaligned")));
    }
    // SAFETY: not NULL (checked by the callers), aligned, and readable by C's promise, since each
    // such struct begins with its size.
    let len = unsafe { at.read() };
    if !(size_of::<usize>()..=MAX).contains(&len) || !len.is_multiple_of(align_of::<usize>()) {
        let words = format!("{what}: struct_size {len} is wrong; begin with the INIT macro");
        return Err(Failure::new(BDS_ERR_VERSION, words));
    }
    Ok(len)
}

/// Memory that the library reads: `const void *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Source(*const c_void);

/// Memory that the library writes: `void *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Sink(*mut c_void);

impl Source {
    /// A scatter list of this memory, for a request that only reads it.
    pub(crate) fn iov(self, len: usize, anchor: Anchor) -> Result<IoVec, Failure> {
        Sink(self.0.cast_mut()).iov(len, anchor)
    }
}

impl Sink {
    /// A scatter list of this memory, which is the library's while `anchor` lives.
    pub(crate) fn iov(self, len: usize, anchor: Anchor) -> Result<IoVec, Failure> {
        let start = check_range(self.0, len)?;
        // SAFETY: by C's promise `len` bytes are mapped, and writable if the request writes them,
        // until the request's completion, which is reported only after the last clone of `anchor`
        // is dropped (`lease.rs`). No Rust reference to them exists.
        Ok(unsafe { IoVec::from_raw(anchor, start, len) })
    }

    /// First address and length, for the check against a registered region.
    pub(crate) fn range(self, len: usize) -> Result<(usize, usize), Failure> {
        check_range(self.0, len).map(|start| (start.addr(), len))
    }
}

fn check_range(start: *mut c_void, len: usize) -> Result<*mut u8, Failure> {
    if start.is_null() && len > 0 {
        return Err(Failure::argument("the buffer is NULL"));
    }
    let fits = isize::try_from(len).is_ok() && start.addr().checked_add(len).is_some();
    if !fits {
        return Err(Failure::argument(format!("a buffer of {len} bytes is too long")));
    }
    Ok(start.cast())
}

/// An array of segments: `const struct iovec *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Segments(*const iovec);

impl Segments {
    /// Copies the array; of each segment first address and length.
    pub(crate) fn read(self, count: u64) -> Result<Vec<(Sink, usize)>, Failure> {
        if count > MAX_IOV {
            return Err(Failure::argument(format!("more than {MAX_IOV} segments")));
        }
        let count = usize::try_from(count).expect("it is small");
        let list = Array(self.0.cast_mut()).check_raw(count)?;
        let mut total = 0usize;
        let mut segments = Vec::with_capacity(count);
        for index in 0..count {
            // SAFETY: `count` elements are readable by C's promise; not NULL and aligned.
            let one = unsafe { list.add(index).read() };
            check_range(one.iov_base, one.iov_len)?;
            total = total
                .checked_add(one.iov_len)
                .filter(|sum| isize::try_from(*sum).is_ok())
                .ok_or_else(|| Failure::argument("the segments are too long together"))?;
            segments.push((Sink(one.iov_base), one.iov_len));
        }
        Ok(segments)
    }
}

impl Array<iovec> {
    fn check_raw(self, len: usize) -> Result<*const iovec, Failure> {
        if len > 0 {
            Out(self.0).check("iov")?;
        }
        Ok(self.0.cast_const())
    }
}

/// The memory that a request names.
pub(crate) fn request_memory(request: &bds_request) -> (Sink, Segments) {
    (Sink(request.buffer), Segments(request.iov))
}

/// The name in a backend's options.
pub(crate) fn backend_name(options: &bds_backend_options) -> Text {
    Text(options.name)
}

/// A string that the library gave out and gets back: `void *`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Given(*mut c_void);

impl Given {
    pub(crate) fn free(self) {
        // SAFETY: NULL, or by C's promise a string of `give_text` that was not freed yet; those
        // come from malloc.
        unsafe { libc::free(self.0) }
    }
}

/// Copies a text into memory that C owns from then on.
pub(crate) fn give_text(text: &str) -> Result<*mut c_char, Failure> {
    let bytes = text.as_bytes();
    // SAFETY: malloc has no precondition; the length does not overflow, as a str has at most
    // isize::MAX bytes.
    let place = unsafe { libc::malloc(bytes.len() + 1) }.cast::<u8>();
    if place.is_null() {
        return Err(Failure::errno(libc::ENOMEM, "no memory for a string"));
    }
    // SAFETY: fresh memory of that length plus one, which overlaps nothing.
    unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    // SAFETY: the last byte of it.
    unsafe { place.add(bytes.len()).write(0) };
    Ok(place.cast())
}

/// Allocates zeroed memory that C owns from then on. The alignment is a power of two, at least 8.
pub(crate) fn give_buffer(len: usize, alignment: usize) -> Result<*mut c_void, Failure> {
    let mut place = std::ptr::null_mut();
    let wanted = len.max(1);
    // SAFETY: `place` is writable; the alignment is a power of two and a multiple of a pointer's.
    let errno = unsafe { libc::posix_memalign(&raw mut place, alignment, wanted) };
    if errno != 0 {
        return Err(Failure::errno(errno, format!("no memory for {len} bytes")));
    }
    // SAFETY: fresh memory of that length.
    unsafe { place.cast::<u8>().write_bytes(0, wanted) };
    Ok(place)
}

/// The address of a static text that ends with NUL.
pub(crate) fn static_text(text: &'static str) -> *const c_char {
    assert!(text.ends_with('\0'), "C needs the NUL");
    text.as_ptr().cast()
}

/// Lets the C library call `child` in the child of every fork. Says whether it will.
pub(crate) fn at_fork(child: extern "C" fn()) -> bool {
    // SAFETY: `child` is a function of this library, which is never unloaded (`-z nodelete`), and
    // stores to one atomic, which is allowed in the child of a fork.
    unsafe { libc::pthread_atfork(None, None, Some(child)) == 0 }
}

/// Makes parameters out of Rust values, for tests and benches that call the exported functions.
#[doc(hidden)]
pub mod testing {
    use super::{Array, Given, In, InOut, Out, Segments, Sink, Source, Text};

    macro_rules! make {
        ($($name:ident $(<$param:ident>)? : $raw:ty;)*) => {$(
            impl$(<$param>)? $name$(<$param>)? {
                /// Makes the parameter.
                ///
                /// # Safety
                /// As C: what the header says at the function.
                pub unsafe fn new(raw: $raw) -> Self {
                    Self(raw)
                }
            }
        )*};
    }

    make! {
        Text: *const std::ffi::c_char;
        Out<T>: *mut T;
        Array<T>: *mut T;
        In<T>: *const T;
        InOut<T>: *mut T;
        Source: *const std::ffi::c_void;
        Sink: *mut std::ffi::c_void;
        Segments: *const libc::iovec;
        Given: *mut std::ffi::c_void;
    }
}
