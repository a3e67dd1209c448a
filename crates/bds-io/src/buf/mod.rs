//! Memory that operations point at.
//!
//! Two rules hold here and nowhere have to be remembered elsewhere:
//! - **Foreign memory is read once.** Another party (a guest, a clone of the buffer, the kernel) may change
//!   bytes while we look. So nobody gets a `&[u8]` into shared memory: bytes are copied in and out through
//!   `raw`, and whoever checks a value checks his copy. `Buf::get_mut` gives a slice only to a sole owner.
//! - **An operation in flight owns an anchor of every segment.** Memory lives as long as any `IoVec` that
//!   names it, so dropping or forgetting a future frees nothing that the kernel may still write to.
//!
//! Clones may be used by several threads at once, by safe code: what a race reads is unspecified bytes, each
//! of which was written at some time, and nothing worse. `raw` says how that is kept, and what the kernel and
//! a virtual machine are in that picture.
//!
//! What it does not do: I/O, and deciding how much memory there may be (`BufPool` only limits what lies idle).

use std::any::Any;
use std::sync::Arc;

mod iovec;
mod pool;
mod raw;
mod region;

pub use iovec::{IoVec, Segment};
pub use pool::BufPool;
pub use region::Buf;

/// What keeps a segment's memory alive.
pub type Anchor = Arc<dyn Any + Send + Sync>;

/// The alignment of pool buffers and copies: a page, enough for O_DIRECT on every device we know.
pub const PAGE_LEN: usize = 4096;
