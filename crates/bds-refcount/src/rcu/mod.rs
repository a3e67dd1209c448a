//! Read-mostly values and futures that borrow from counted objects.
//!
//! * [`cell`]: [`RcuCell`], a value read by many threads and replaced now and then, with grace
//!   periods.
//! * [`borrowed_future`]: [`BorrowedFuture`], a future that borrows from an object and can be given
//!   a reference of its own.
//!
//! Needs `shard` (counters spread over threads) and `strong` (the counted reference). Each file
//! argues its own `unsafe`.

mod borrowed_future;
mod cell;

pub use borrowed_future::{BorrowedFuture, OwnedFuture};
pub use cell::{RcuCell, RcuGuard, WaitUnread};
