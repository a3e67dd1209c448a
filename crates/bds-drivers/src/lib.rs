//! The rooms: image formats, protocols and filters. Each sees only its own children.
#![forbid(unsafe_code)]

#[cfg(feature = "qcow2")]
pub mod format;
pub mod protocol;
