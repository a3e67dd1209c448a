//! Slab arena, generational handles and counted references.
//!
//! What a handle promises, and for how long: a [`Handle`] names one object for ever. While the object has references,
//! [`Arena::acquire`] makes one more from the handle; from the very decrement that gives up the last one, it never does
//! again, also when the object's slot holds another one. A stale handle is an error, never undefined behaviour.
//!
//! ```
//! use bds_refcount::{Arena, Kind, Release, Stale};
//!
//! let arena = Arena::new(Kind::new(1));
//! let node = arena.insert("disk")?;            // a Strong: count 1, ours
//! let id = node.handle();                      // a Handle: Copy, 64 bits, keeps nothing alive
//! let second = arena.acquire(id)?;             // the only way from name to object
//!
//! assert_eq!(second.release(), Release::NotLast);
//! assert_eq!(node.release(), Release::Last);   // a fact about this call
//! assert_eq!(arena.acquire(id).err(), Some(Stale::Dying));
//!
//! for (id, dead) in arena.reap() {             // close it here, at leisure
//!     println!("closing {} ({id})", *dead);
//! }
//! assert_eq!(arena.acquire(id).err(), Some(Stale::Released));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In reading order:
//! * `handle`: the 64 bits; `lifecycle`: count, state and generation in one word.
//! * `slot`: one slot and its cell; `pages`: where slots lie; `arena`: insert, look up, retire.
//! * `strong`: the counted reference; `graveyard` and `dead`: what happens after the last one.
//! * `watch`: to learn of the end; `holder`: who holds what; `stale`: why not; `tag`: which arena.
//! * `rcu_cell`: a value that many read and somebody exchanges once in a while: how an edge holds its reference.
//! * `borrowed_future`: work that borrows from an object and may go on without whoever began it.
//! * `sync`: std or loom.
//!
//! All `unsafe` is about one cell, the slot's, and one pointer, the reference's: `slot` states who may touch the cell,
//! `strong`, `dead` and `graveyard` keep to it, and `tests/loom_arena.rs` explores it. (`rcu_cell` and `borrowed_future` argue their own.)
//!
//! What is deliberately not here: closing (drivers do that, on what the reaper hands them), names, edges, any I/O, and
//! any callback from a release. The request path is meant to [`check`](Arena::check), not to count.

mod arena;
mod borrowed_future;
mod dead;
mod graveyard;
mod handle;
mod holder;
mod lifecycle;
mod pages;
mod rcu_cell;
mod slot;
mod stale;
mod strong;
mod sync;
mod tag;
mod watch;

pub use arena::{Arena, ArenaConfig, ArenaStats};
pub use borrowed_future::{BorrowedFuture, OwnedFuture};
pub use dead::Dead;
pub use graveyard::Reap;
pub use handle::{Handle, Kind};
pub use holder::{Held, Holder, HolderInfo, HolderKind, HolderName};
pub use rcu_cell::{RcuCell, RcuGuard};
pub use stale::{Full, Stale, TooManyReferences};
pub use strong::{Release, Strong};
pub use watch::Watch;
