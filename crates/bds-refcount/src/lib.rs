//! Slab arena, generational handles and counted references.
//!
//! A [`Handle`] names one object for ever. While the object has references, [`Arena::acquire`]
//! makes one more from the handle; from the decrement that releases the last one, it never does
//! again, also when the slot holds another object. A stale handle is an error, never undefined
//! behaviour.
//!
//! ```
//! use bds_refcount::{Arena, Kind, Release, Stale};
//!
//! let arena = Arena::new(Kind::new(1));
//! let node = arena.insert("disk")?;            // a Strong: count 1
//! let id = node.handle();                      // a Handle: Copy, 64 bits, keeps nothing alive
//! let second = arena.acquire(id)?;             // the only way from handle to object
//!
//! assert_eq!(second.release(), Release::NotLast);
//! assert_eq!(node.release(), Release::Last);   // a fact about this call
//! assert_eq!(arena.acquire(id).err(), Some(Stale::Dying));
//!
//! for (id, dead) in arena.reap() {             // close it here, outside the release
//!     println!("closing {} ({id})", *dead);
//! }
//! assert_eq!(arena.acquire(id).err(), Some(Stale::Released));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! In reading order:
//! * `handle`: the 64 bits; `lifecycle`: count, state and generation in one word.
//! * `slot`: one slot and its cell; `pages`: memory of the slots; `arena`: insert, look up, retire.
//! * `strong`: the counted reference; `graveyard` and `dead`: objects between the last release and
//!   their close.
//! * `watch`: a future of an object's end; `holder`: named references, for "who holds this?";
//!   `stale`: errors; `tag`: arena tags.
//! * `rcu`: [`RcuCell`], a read-mostly value (how an edge keeps its reference), and
//!   [`BorrowedFuture`], a future that borrows from an object and can outlive the request that
//!   began it.
//! * `shard`: counters spread over threads; `sync`: std or loom.
//!
//! All `unsafe` of the arena is about one cell, the slot's, and one pointer, the reference's:
//! `slot` states who may access the cell, `strong`, `dead` and `graveyard` keep to it, and
//! `tests/loom_arena.rs` explores it. (`rcu` argues its own.)
//!
//! What is deliberately not here: closing (drivers do that, on what a reap returns), names, edges,
//! any I/O, and any callback from a release. A request path should [`check`](Arena::check), not
//! count.

mod arena;
mod dead;
mod graveyard;
mod handle;
mod holder;
mod lifecycle;
mod pages;
mod rcu;
mod shard;
mod slot;
mod stale;
mod strong;
mod sync;
mod tag;
mod watch;

pub use arena::{Arena, ArenaConfig, ArenaStats};
pub use dead::Dead;
pub use graveyard::Reap;
pub use handle::{Handle, Kind};
pub use holder::{Held, Holder, HolderInfo, HolderKind, HolderName};
pub use rcu::{BorrowedFuture, OwnedFuture, RcuCell, RcuGuard, WaitUnread};
pub use shard::{MAX_SHARDS, own_shard, shard_count};
pub use stale::{Full, Stale, TooManyReferences};
pub use strong::{Release, Strong};
pub use watch::Watch;

/// Runs the README's code as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
