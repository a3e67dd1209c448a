//! Formats give bytes a shape.

#[cfg(feature = "qcow2")]
pub mod qcow2;
#[cfg(feature = "raw")]
pub mod raw;
