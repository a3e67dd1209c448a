//! Buffers and scatter lists: memory of I/O operations that stays alive while an operation uses it.
//!
//! Two rules that the types enforce:
//! - **Foreign memory is read once.** Another party (a guest, a clone of the buffer, the kernel)
//!   may change bytes at any time. So there is no `&[u8]` into shared memory: bytes are copied in
//!   and out through `raw`, and code that checks a value checks its copy. `Buf::get_mut` gives a
//!   slice only to a sole owner.
//! - **An operation in flight owns an anchor of every segment.** Memory lives as long as any
//!   `IoVec` that names it, so dropping or forgetting a future frees nothing that the kernel may
//!   still write to.
//!
//! Clones may be used by several threads at once, by safe code: what a race reads is unspecified
//! bytes, each of which was written at some time, and nothing worse. `raw` argues this, for the
//! kernel and a virtual machine too.
//!
//! What it does not do: I/O, and limiting the memory in use (`BufPool` only limits idle memory).

use std::any::Any;
use std::sync::Arc;

mod iovec;
mod pool;
mod raw;
mod region;

pub use iovec::{IoVec, Segment};
pub use pool::BufPool;
pub use region::Buf;

/// An owner that keeps a segment's memory alive.
pub type Anchor = Arc<dyn Any + Send + Sync>;

/// The alignment of pool buffers and copies: a page, enough for O_DIRECT on every known device.
pub const PAGE_LEN: usize = 4096;
