//! The cellar: buffers, executor and engines. All syscalls, all chance and all time come from here.
//!
//! Reading order: [`buf`] (what an operation points at), [`file`] (what it is done to), [`context`] (who
//! drives it), [`sim`] (the same world on a seed).

pub mod buf;
pub mod context;
mod current;
pub mod file;
mod host;
pub mod sim;
pub mod sync;

pub use buf::{Buf, BufPool, IoVec};
pub use context::{
    Context, ContextOptions, EngineKind, Task, block_on, now, offload, sleep, spawn, yield_now,
};
pub use file::{ByteLock, File, FileKind, Fs, OpenOptions, ZeroMode};
pub use sim::{Sim, SimConfig};
