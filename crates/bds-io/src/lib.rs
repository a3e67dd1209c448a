//! The cellar: buffers, executor and engines. All syscalls, all chance and all time come from here.
//!
//! Reading order: [`buf`] (what an operation points at), [`mod@file`] (what it is done to), [`context`] (who
//! drives it), [`sim`] (the same world on a seed).

pub mod buf;
mod cell;
mod clock;
pub mod context;
mod current;
mod engine;
mod executor;
pub mod file;
mod host;
mod identity;
mod inline;
mod op;
pub mod signals;
pub mod sim;
pub mod sync;
mod sys;
mod task;
mod workers;

pub use buf::{Buf, BufPool, IoVec};
pub use context::{
    Context, ContextHandle, ContextOptions, EngineKind, block_on, ensure_home, now, offload, sleep,
    spawn, spawn_now, yield_now,
};
pub use file::{ByteLock, Extent, File, FileKind, FileLook, Fs, OpenOptions, ZeroMode};
pub use identity::shares_bytes;
pub use sim::{Sim, SimConfig};
pub use task::{DetachOnDrop, Task};
