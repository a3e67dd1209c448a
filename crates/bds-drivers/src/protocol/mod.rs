//! Protocols: drivers that store bytes in a file, a device or memory. Only they see a descriptor.

#[cfg(feature = "file")]
pub mod file;
#[cfg(feature = "mem")]
pub mod mem;
#[cfg(feature = "null")]
pub mod null;
