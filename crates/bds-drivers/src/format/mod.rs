//! Image formats: drivers that lay out a disk in the bytes of a file node.

#[cfg(any(feature = "qcow2", feature = "raw"))]
pub(crate) mod bitmap_sidecar;
#[cfg(feature = "qcow2")]
pub mod qcow2;
#[cfg(feature = "raw")]
pub mod raw;
