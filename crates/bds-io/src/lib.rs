//! File I/O for block layers: buffers, files, an executor with io_uring, and their simulation.
//!
//! * [`buf`]: [`Buf`], [`IoVec`] and [`BufPool`], memory that lives as long as any operation that
//!   names it.
//! * [`mod@file`]: [`File`], a file of the host or of a simulated disk.
//! * [`context`]: [`Context`], one thread's executor, engine and clock; [`spawn`], [`sleep`] and
//!   others find the right one.
//! * [`sim`]: [`Sim`], the same API on a seeded scheduler, a virtual clock, and a disk that fails
//!   and loses power.
//! * [`sync`]: async locks, notifications and queues; [`signals`]: signal dispositions that concern
//!   files.
//!
//! All system calls, randomness and time of bds come from this crate, so one seed replays a run on
//! the simulated disk.
//!
//! ```
//! use bds_io::{Buf, Fs, OpenOptions};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("disk.img");
//! let options = OpenOptions { write: true, create: true, ..OpenOptions::default() };
//! let file = Fs::Host.open(&path, &options)?;
//! let buf = Buf::zeroed(4096, 4096);
//! let len = bds_io::block_on(async {
//!     file.write(0, Buf::from_slice(b"hello").iov(), false).await?;
//!     file.sync_data().await?;
//!     file.read(0, buf.iov()).await
//! })?;
//! assert_eq!(buf.iov().to_vec(0..len), b"hello");
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Every future may be dropped or forgotten at any await: an operation owns its memory and file
//! until it is over.

pub mod buf;
mod clock;
mod completion;
pub mod context;
mod current;
mod engine;
mod executor;
pub mod file;
mod host;
mod identity;
mod inline;
mod long_write;
mod op;
pub mod signals;
pub mod sim;
pub mod sync;
mod sys;
mod task;
mod workers;

/// Runs the README's code as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use buf::{Buf, BufPool, IoVec};
pub use context::{
    Context, ContextHandle, ContextOptions, EngineKind, block_on, ensure_context, now, random_id,
    sleep, spawn, spawn_cpu, spawn_now, yield_now,
};
pub use file::{ByteLock, Extent, File, FileKind, FileStat, Fs, OpenOptions, ZeroMode};
pub use identity::shares_bytes;
pub use sim::{Sim, SimConfig};
pub use task::{DetachOnDrop, Task};
