//! Protocols hold the bytes; only they see a descriptor or socket.

#[cfg(feature = "file")]
pub mod file;
#[cfg(feature = "mem")]
pub mod mem;
#[cfg(feature = "null")]
pub mod null;
